// A2 and A3 with CANN 8.5: HCCL makes a context in device memory for an operator's tiling, and the windows are read out
// of it. CANN 8.5 has no header for either: the offsets below are what its HCCL writes and reads.
#include <acl/acl.h>

#include <cstring>

#include "windows.h"

extern "C" {
HcclResult HcomGetCommHandleByGroup(const char* name, HcclComm* comm);
HcclResult HcomGetL0TopoTypeEx(const char* name, uint32_t* topology, uint32_t is_set_device);
HcclResult HcclAllocComResourceByTiling(HcclComm comm, void* stream, void* tiling, void** context);
}

namespace deep_ep::aclnn {
namespace {

// The part of a tiling in which an operator says what communication it wants.
struct Request {
  uint32_t version = 100;
  uint32_t count = 1;
  uint32_t offsets[8] = {64};  // of what follows, from the beginning
  uint8_t debug_mode = 0, prepare_position = 0;
  uint16_t queues = 0, blocks = 48;  // that serve queues: none do
  uint8_t device = 4;
  char reserved[17] = {};

  uint8_t skip_local_copy = 0, skip_window_copy = 0, step = 0, kind_version = 1;
  char more_reserved[9] = {};
  uint8_t engine = 3;  // vector cores
  uint8_t source_dtype = 0, destination_dtype = 0;
  char communicator[128] = {};
  char algorithm[128] = "AlltoAll=level0:fullmesh;level1:pairwise";
  uint32_t kind = 8;  // all to all
  uint32_t reduction = 0;
  char last_reserved[232] = {};  // HCCL's own ends here
};

// How a context begins. The rest depends on the topology. In a mesh, `windows` goes on with one address per rank.
// Elsewhere it has the own window only, and there is a list of pairs of pointers to what is known of each peer.
struct Context {
  uint64_t workspace, workspace_bytes;
  uint32_t rank, size;
  uint64_t window_bytes;
  uint64_t windows[1];
};
static_assert(offsetof(Context, windows) == 32);
constexpr uint32_t kMesh = 1;
constexpr uint64_t kPeers = 2984;

struct Pointers {
  uint64_t host, device;
};

struct Peer {
  uint32_t rank, world_rank;
  uint64_t window;
};

template <typename T>
void read(uint64_t device_address, T* values, size_t count) {
  const size_t bytes = count * sizeof(T);
  const aclError status =
      aclrtMemcpy(values, bytes, reinterpret_cast<void*>(device_address), bytes, ACL_MEMCPY_DEVICE_TO_HOST);
  if (status != ACL_SUCCESS) throw Error(str("HCCL's context cannot be read: aclrtMemcpy failed: ", status));
}

std::vector<uint64_t> addresses(uint64_t context, uint32_t rank, uint32_t size, bool is_mesh) {
  std::vector<uint64_t> found(size);
  if (is_mesh) {
    read(context + offsetof(Context, windows), found.data(), size);
    return found;
  }
  std::vector<Pointers> peers(size);
  read(context + kPeers, peers.data(), size);
  read(context + offsetof(Context, windows), &found[rank], 1);
  for (uint32_t r = 0; r < size; ++r) {
    if (r == rank || peers[r].device == 0) continue;
    Peer peer{};
    read(peers[r].device, &peer, 1);
    if (peer.rank == r) found[r] = peer.window;
  }
  return found;
}

}  // namespace

std::vector<Window> find_windows(const std::string& communicator, uint32_t rank, uint32_t size) {
  HcclComm comm = nullptr;
  check(HcomGetCommHandleByGroup(communicator.c_str(), &comm), "HcomGetCommHandleByGroup");
  check_ranks(comm, rank, size);
  uint32_t topology = 0;
  check(HcomGetL0TopoTypeEx(communicator.c_str(), &topology, 0), "HcomGetL0TopoTypeEx");

  Request request;
  std::strncpy(request.communicator, communicator.c_str(), sizeof(request.communicator) - 1);
  aclrtStream stream = nullptr;
  if (aclrtCreateStream(&stream) != ACL_SUCCESS) throw Error("aclrtCreateStream failed");
  void* memory = nullptr;
  const HcclResult result = HcclAllocComResourceByTiling(comm, stream, &request, &memory);
  aclrtSynchronizeStream(stream);
  aclrtDestroyStream(stream);
  check(result, "HcclAllocComResourceByTiling");

  const auto context_address = reinterpret_cast<uint64_t>(memory);
  Context context{};
  read(context_address, &context, 1);
  check_ranks(context.rank, context.size, rank, size);
  std::vector<Window> windows;
  for (uint64_t address : addresses(context_address, rank, size, topology == kMesh)) {
    if (address == 0)
      throw Error(str("HCCL's context has no window of rank ", windows.size(),
                      ": it is not laid out as that of CANN 8.5, or the rank is out of reach"));
    windows.push_back({address, context.window_bytes});
  }
  return windows;
}

}  // namespace deep_ep::aclnn
