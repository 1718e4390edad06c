// How an op on NPU tensors reaches its kernel: prepare, workspace, launch in torch_npu's task queue on the current
// stream.
#pragma once

#include <initializer_list>
#include <string>
#include <vector>

#include "arguments.h"

namespace deep_ep::npu {

// The number of ranks of a group whose windows are known to NPU kernels. Error: no kernels are loaded, or
// `deep_ep.init` was not called for the group.
int64_t group_size(const char* op, const std::string& group);

// Raises Error if a launch of the group has failed, as far as this rank's window tells by now. Waits for no stream.
void require_no_failure(const char* op, const std::string& group);

// Queues the kernel of `op`; see kernels.h for the order. `group` is "" if ranks do not communicate. Where it is not
// captured, the kernel is not queued behind one that has failed: see require_no_failure.
void run(const char* op, const std::string& group, std::initializer_list<Tensor> inputs,
         std::initializer_list<int64_t> integers, const std::vector<Tensor>& outputs);

// Whether the current stream is being captured into a graph, where the host must not wait for the device.
bool is_capturing(const Tensor& like);

// Raises Error unless all checks passed.
void require(const char* op, const Checks& checks);

}  // namespace deep_ep::npu
