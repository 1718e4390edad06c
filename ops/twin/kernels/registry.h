// The kernels in this library, by op and by the dtypes of inputs and outputs.
#pragma once

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

namespace twin::kernels {

struct Kernel {
  std::string op;
  std::vector<int32_t> dtypes;  // ge::DataType of every input, then of every output
  // The inputs, the outputs, their shapes where one depends on the computation, workspace and tiling.
  void (*call)(uint8_t* const* arguments);
};

std::vector<Kernel>& all();

inline bool add(std::string op, std::vector<int32_t> dtypes, void (*call)(uint8_t* const* arguments)) {
  all().push_back({std::move(op), std::move(dtypes), call});
  return true;
}

}  // namespace twin::kernels
