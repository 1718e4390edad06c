// Signals for the Python program that waits here, such as Ctrl-C.
#pragma once

#include <stdexcept>

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

}  // namespace deep_ep
