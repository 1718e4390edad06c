// A stand-in for the part of libtorch_cpu.so that libdeep_ep.so uses: tensors, lists, strings, and what is registered.
#pragma once

#include <torch/csrc/stable/library.h>

#include <cstdint>
#include <string>

namespace stand_in {

using Kernel = void (*)(StableIValue* stack, uint64_t inputs, uint64_t outputs);

// What deep_ep has registered for an op under a dispatch key, such as CPU.
Kernel find(const std::string& key, const std::string& op);

}  // namespace stand_in
