// The kernels in this library, by op and dtype of rows.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>
#include <utility>
#include <vector>

namespace twin::kernels {

constexpr int32_t kAnyDtype = -1;

struct Kernel {
  std::string op;
  int32_t dtype;  // aclDataType of rows, or kAnyDtype
  size_t num_arguments;
  std::function<void(uint8_t* const* arguments)> call;
};

std::vector<Kernel>& all();

template <typename... Address, size_t... I>
Kernel make(const char* op, int32_t dtype, void (*kernel)(Address...), std::index_sequence<I...>) {
  return {op, dtype, sizeof...(I), [kernel](uint8_t* const* arguments) { kernel(arguments[I]...); }};
}

template <typename... Address>
bool add(const char* op, int32_t dtype, void (*kernel)(Address...)) {
  all().push_back(make(op, dtype, kernel, std::index_sequence_for<Address...>{}));
  return true;
}

}  // namespace twin::kernels
