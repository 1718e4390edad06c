// Errors for users: they name the operation, the argument or rank, what was found and what is allowed.
#pragma once

#include <sstream>
#include <stdexcept>
#include <string>

namespace deep_ep {

struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// Concatenates its arguments as an ostream would print them.
template <typename... Args>
std::string str(const Args&... args) {
  std::ostringstream out;
  (out << ... << args);
  return out.str();
}

}  // namespace deep_ep
