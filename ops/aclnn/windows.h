// Windows of a group: HCCL's own buffers, which every rank's kernels can reach by address. HCCL has had several ways to
// them: each windows_*.cpp is one, and cmake/ascend.cmake takes the one for the SoC and the version of CANN.
#pragma once

#include <hccl/hccl.h>

#include <cstdint>
#include <string>
#include <vector>

#include "error.h"

namespace deep_ep::aclnn {

struct Window {
  uint64_t address;  // in this rank's device memory, whosever window it is
  uint64_t bytes;
};

// Collective. The window of every rank of the communicator with this name, in the order of ranks. HCCL frees them with
// the communicator.
//
// Error: HCCL refuses, and which call it was; or the communicator is not one of `size` ranks with `rank` as this one.
std::vector<Window> find_windows(const std::string& communicator, uint32_t rank, uint32_t size);

inline void check(HcclResult result, const char* call) {
  if (result != HCCL_SUCCESS) throw Error(str(call, " failed: ", HcclGetErrorString(result), " (", result, ")"));
}

inline void check_ranks(uint32_t found_rank, uint32_t found_size, uint32_t rank, uint32_t size) {
  if (found_rank != rank || found_size != size)
    throw Error(
        str("the communicator has rank ", found_rank, " of ", found_size, " here, the group has ", rank, " of ", size));
}

inline void check_ranks(HcclComm comm, uint32_t rank, uint32_t size) {
  uint32_t found_rank = 0, found_size = 0;
  check(HcclGetRankId(comm, &found_rank), "HcclGetRankId");
  check(HcclGetRankSize(comm, &found_size), "HcclGetRankSize");
  check_ranks(found_rank, found_size, rank, size);
}

}  // namespace deep_ep::aclnn
