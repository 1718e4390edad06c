// What this library needs of the Python program that it is in: its signals, such as Ctrl-C, and a function of it.
#pragma once

#include <stdexcept>
#include <string>

// As pybind11 has it, through which torch calls ops: what is derived from it says itself what it becomes in Python.
namespace pybind11 {
class __attribute__((visibility("default"))) builtin_exception : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
  // Needs the interpreter's lock.
  virtual void set_error() const = 0;
};
}  // namespace pybind11

namespace deep_ep {

using Interrupted = pybind11::builtin_exception;

constexpr int kHealthMilliseconds = 100;

// While the main thread waits, call this every kHealthMilliseconds, with no lock held: the program's signal handlers
// run as they do between two lines of Python. If one raises, this throws an Interrupted, which becomes that very
// exception. On other threads, and without an interpreter, it does nothing.
void check_interrupt();

// Calls a function of Python with two texts and returns its text. What it raises is thrown as an Interrupted, too.
std::string call_python(void* function, const char* first, const char* second);

}  // namespace deep_ep
