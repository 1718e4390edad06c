// CANN's libraries, as far as ops/aclnn calls them. The window of rank r is at (r + 1) << 32 and has kWindowBytes;
// device memory is the host's. FAKE_CANN_MESH=1 in the environment makes the topology a mesh.
#include <acl/acl.h>
#include <aclnn/acl_meta.h>
#include <hccl/hccl.h>
#include <hccl/hccl_rank_graph.h>

#include <array>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "cann.h"

namespace {

constexpr uint32_t kRank = 1, kSize = 4;
constexpr uint64_t kWindowBytes = 200 << 20;

HcclComm communicator(const char* name) {
  static int own = 0;
  return std::string(name) == "own" ? &own : nullptr;
}

HcclResult window(uint64_t rank, void** address, uint64_t* bytes) {
  *address = reinterpret_cast<void*>((rank + 1) << 32);
  *bytes = kWindowBytes;
  return HCCL_SUCCESS;
}

std::array<uint64_t, 3> cleared;
int destroyed = 0;

bool is_mesh() { return std::getenv("FAKE_CANN_MESH") != nullptr; }

}  // namespace

extern "C" {

// aclnn

aclTensor* aclCreateTensor(const int64_t* sizes, uint64_t num_sizes, aclDataType dtype, const int64_t* strides, int64_t,
                           aclFormat, const int64_t*, uint64_t, void* data) {
  return new aclTensor{dtype, {sizes, sizes + num_sizes}, {strides, strides + num_sizes}, data};
}

int aclDestroyTensor(const aclTensor* tensor) {
  delete tensor;
  return 0;
}

aclIntArray* aclCreateIntArray(const int64_t* values, uint64_t count) {
  return new aclIntArray{{values, values + count}};
}

int aclDestroyIntArray(const aclIntArray* array) {
  delete array;
  return 0;
}

int aclDestroyAclOpExecutor(aclOpExecutor* executor) {
  delete reinterpret_cast<std::string*>(executor);
  ++destroyed;
  return 0;
}

// How many executors were destroyed that nothing was run with.
int fake_cann_destroyed() { return destroyed; }

// acl

const char* aclGetRecentErrMsg() { return "EZ9999: what CANN says"; }

aclError aclrtMemcpy(void* to, size_t, const void* from, size_t bytes, aclrtMemcpyKind) {
  std::memcpy(to, from, bytes);
  return ACL_SUCCESS;
}

// What FAKE_CANN_OP_TIMEOUT_MS in the environment says; without it CANN is too old to tell.
aclError aclrtGetOpExecuteTimeout(uint32_t* milliseconds) {
  const char* const given = std::getenv("FAKE_CANN_OP_TIMEOUT_MS");
  if (given == nullptr) return 507899;
  *milliseconds = static_cast<uint32_t>(std::stoul(given));
  return ACL_SUCCESS;
}

aclError aclrtMemset(void* to, size_t, int32_t value, size_t bytes) {
  cleared = {reinterpret_cast<uint64_t>(to), static_cast<uint64_t>(value), bytes};
  return ACL_SUCCESS;
}

// The last call of aclrtMemset: address, value, bytes. Windows have no memory.
const uint64_t* fake_cann_cleared() { return cleared.data(); }

aclError aclrtCreateStream(aclrtStream* stream) {
  *stream = nullptr;
  return ACL_SUCCESS;
}

aclError aclrtSynchronizeStream(aclrtStream) { return ACL_SUCCESS; }
aclError aclrtDestroyStream(aclrtStream) { return ACL_SUCCESS; }

// HCCL

const char* HcclGetErrorString(HcclResult) { return "an error of HCCL"; }

HcclResult HcclGetRankId(HcclComm, uint32_t* rank) {
  *rank = kRank;
  return HCCL_SUCCESS;
}

HcclResult HcclGetRankSize(HcclComm, uint32_t* size) {
  *size = kSize;
  return HCCL_SUCCESS;
}

HcclResult HcclCommGetHandleWithName(const char* name, HcclComm* comm) {
  *comm = communicator(name);
  return *comm != nullptr ? HCCL_SUCCESS : HCCL_E_PARA;
}

HcclResult HcomGetCommHandleByGroup(const char* name, HcclComm* comm) { return HcclCommGetHandleWithName(name, comm); }

HcclResult HcclGetHcclBuffer(HcclComm, void** address, uint64_t* bytes) { return window(kRank, address, bytes); }

// Windows by IPC: a peer's is known once there is a context.

bool has_context = false;

HcclResult HcclKfcAllocOpArgs(void** args) {
  *args = new int(0);
  return HCCL_SUCCESS;
}

HcclResult HcclKfcFreeOpArgs(void* args) {
  delete static_cast<int*>(args);
  return HCCL_SUCCESS;
}

HcclResult HcclKfcOpArgsSetAlgConfig(void*, char*) { return HCCL_SUCCESS; }

HcclResult HcclKfcOpArgsSetCommEngine(void* args, uint8_t engine) {
  *static_cast<int*>(args) = engine;
  return HCCL_SUCCESS;
}

HcclResult HcclCreateOpResCtx(HcclComm, uint8_t, void* args, void**) {
  has_context = *static_cast<int*>(args) == 4;
  return HCCL_SUCCESS;
}

HcclResult HcclGetRemoteIpcHcclBuf(HcclComm, uint64_t rank, void** address, uint64_t* bytes) {
  return has_context && rank != kRank ? window(rank, address, bytes) : HCCL_E_PARA;
}

// Windows by channels: layer 5 has no link, layer 7 has one of each kind.

HcclResult HcclRankGraphGetLayers(HcclComm, uint32_t** layers, uint32_t* count) {
  static uint32_t known[] = {5, 7};
  *layers = known;
  *count = 2;
  return HCCL_SUCCESS;
}

HcclResult HcclRankGraphGetLinks(HcclComm, uint32_t layer, uint32_t rank, uint32_t peer, CommLink** links,
                                 uint32_t* count) {
  static CommLink known[2];
  known[0].linkAttr.linkProtocol = COMM_PROTOCOL_RESERVED;
  known[1].linkAttr.linkProtocol = COMM_PROTOCOL_UB_MEM;
  known[1].srcEndpointDesc.bytes[0] = static_cast<uint8_t>(rank);
  known[1].dstEndpointDesc.bytes[0] = static_cast<uint8_t>(peer);
  *links = known;
  *count = layer == 7 ? 2 : 0;
  return HCCL_SUCCESS;
}

HcclResult HcclChannelDescInit(HcclChannelDesc* channels, uint32_t count) {
  std::memset(channels, 0xff, count * sizeof(HcclChannelDesc));
  return HCCL_SUCCESS;
}

HcclResult HcclChannelAcquire(HcclComm, CommEngine engine, const HcclChannelDesc* wanted, uint32_t count,
                              ChannelHandle* channels) {
  for (uint32_t i = 0; i < count; ++i) {
    const HcclChannelDesc& channel = wanted[i];
    if (engine != COMM_ENGINE_AIV || channel.channelProtocol != COMM_PROTOCOL_UB_MEM ||
        channel.localEndpoint.bytes[0] != kRank || channel.remoteEndpoint.bytes[0] != channel.remoteRank)
      return HCCL_E_PARA;
    channels[i] = 100 + channel.remoteRank;
  }
  return HCCL_SUCCESS;
}

HcclResult HcclChannelGetHcclBuffer(HcclComm, ChannelHandle channel, void** address, uint64_t* bytes) {
  return window(channel - 100, address, bytes);
}

// Windows out of a context.

HcclResult HcomGetL0TopoTypeEx(const char*, uint32_t* topology, uint32_t) {
  *topology = is_mesh() ? 1 : 2;
  return HCCL_SUCCESS;
}

HcclResult HcclAllocComResourceByTiling(HcclComm, void*, void* tiling, void** context) {
  const auto* request = static_cast<const char*>(tiling);
  uint32_t offset = 0;
  std::memcpy(&offset, request + 8, sizeof(offset));
  if (std::string(request + offset + 16) != "own" || request[offset + 13] != 3) return HCCL_E_PARA;

  // Words: 2 of the workspace, rank and size, bytes, windows; pairs of pointers from byte 2984 on.
  static std::vector<uint64_t> words(512), peers(4 * kSize);
  words[2] = kRank | static_cast<uint64_t>(kSize) << 32;
  words[3] = kWindowBytes;
  for (uint64_t r = 0; r < kSize; ++r) {
    peers[4 * r] = r;
    peers[4 * r + 1] = (r + 1) << 32;
    if (is_mesh()) words[4 + r] = peers[4 * r + 1];
    if (!is_mesh() && r != kRank) words[2984 / 8 + 2 * r + 1] = reinterpret_cast<uint64_t>(&peers[4 * r]);
  }
  if (!is_mesh()) words[4] = peers[4 * kRank + 1];
  *context = words.data();
  return HCCL_SUCCESS;
}

}  // extern "C"
