#include "interrupt.h"

#include <dlfcn.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <memory>
#include <utility>

namespace deep_ep {
namespace {

// Of Python's stable ABI, looked up in the process: this library is linked to no Python.
struct Python {
  int (*is_initialized)();
  int (*ensure)();
  void (*release)(int);
  int (*check_signals)();
  void (*fetch)(void**, void**, void**);
  void (*restore)(void*, void*, void*);
  void (*decref)(void*);
  void* (*call)(void*, const char*, ...);
  const char* (*text)(void*, ssize_t*);
  bool found = find("Py_IsInitialized", is_initialized) && find("PyGILState_Ensure", ensure) &&
               find("PyGILState_Release", release) && find("PyErr_CheckSignals", check_signals) &&
               find("PyErr_Fetch", fetch) && find("PyErr_Restore", restore) && find("Py_DecRef", decref) &&
               find("PyObject_CallFunction", call) && find("PyUnicode_AsUTF8AndSize", text);

  static const Python& get() {
    static const Python instance{};
    return instance;
  }

 private:
  template <typename Function>
  static bool find(const char* name, Function*& function) {
    function = reinterpret_cast<Function*>(dlsym(RTLD_DEFAULT, name));
    return function != nullptr;
  }
};

class Interpreter {
 public:
  Interpreter() : state_(Python::get().ensure()) {}
  ~Interpreter() { Python::get().release(state_); }
  Interpreter(const Interpreter&) = delete;

 private:
  const int state_;
};

// What a signal handler, or another function, raised.
struct Raised {
  void* type = nullptr;
  void* value = nullptr;
  void* traceback = nullptr;

  Raised() { Python::get().fetch(&type, &value, &traceback); }
  Raised(const Raised&) = delete;
  ~Raised() {
    const Interpreter held;
    for (void* object : {type, value, traceback}) Python::get().decref(object);
  }
  void restore() {
    Python::get().restore(std::exchange(type, nullptr), std::exchange(value, nullptr),
                          std::exchange(traceback, nullptr));
  }
};

struct PythonRaised : Interrupted {
  explicit PythonRaised(std::shared_ptr<Raised> raised)
      : Interrupted("interrupted by a signal"), raised_(std::move(raised)) {}
  void set_error() const override { raised_->restore(); }

 private:
  std::shared_ptr<Raised> raised_;
};

}  // namespace

void check_interrupt() {
  if (syscall(SYS_gettid) != getpid()) return;
  const Python& python = Python::get();
  if (!python.found || !python.is_initialized()) return;
  const Interpreter held;
  if (python.check_signals() != 0) throw PythonRaised(std::make_shared<Raised>());
}

std::string call_python(void* function, const char* first, const char* second) {
  const Python& python = Python::get();
  const Interpreter held;
  void* const result = python.call(function, "ss", first, second);
  const char* const text = result != nullptr ? python.text(result, nullptr) : nullptr;
  std::string copy = text != nullptr ? text : "";
  if (result != nullptr) python.decref(result);
  if (text == nullptr) throw PythonRaised(std::make_shared<Raised>());
  return copy;
}

}  // namespace deep_ep
