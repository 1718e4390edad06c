// A5 with CANN 9: a channel to every peer over a link that memory instructions reach through.
#include <hccl/hccl_rank_graph.h>
#include <hccl/hccl_res.h>

#include "windows.h"

// Its header has moved between versions.
extern "C" HcclResult HcomGetCommHandleByGroup(const char* name, HcclComm* comm);

namespace deep_ep::aclnn {
namespace {

constexpr uint32_t kNotifies = 3;  // of a channel; kernels use none, HCCL's own for vector cores have as many

// What HCCL returns is valid until the next question to it.
CommLink find_link(HcclComm comm, uint32_t rank, uint32_t peer) {
  uint32_t* layers = nullptr;
  uint32_t num_layers = 0;
  check(HcclRankGraphGetLayers(comm, &layers, &num_layers), "HcclRankGraphGetLayers");
  const std::vector<uint32_t> known(layers, layers + num_layers);
  for (uint32_t layer : known) {
    CommLink* links = nullptr;
    uint32_t num_links = 0;
    check(HcclRankGraphGetLinks(comm, layer, rank, peer, &links, &num_links), "HcclRankGraphGetLinks");
    for (uint32_t i = 0; i < num_links; ++i)
      if (links[i].linkAttr.linkProtocol == COMM_PROTOCOL_UB_MEM) return links[i];
  }
  throw Error(str("no link from rank ", rank, " to rank ", peer, " gives access to its memory"));
}

}  // namespace

std::vector<Window> find_windows(const std::string& communicator, uint32_t rank, uint32_t size) {
  HcclComm comm = nullptr;
  check(HcomGetCommHandleByGroup(communicator.c_str(), &comm), "HcomGetCommHandleByGroup");
  check_ranks(comm, rank, size);

  std::vector<HcclChannelDesc> wanted(size - 1);
  check(HcclChannelDescInit(wanted.data(), size - 1), "HcclChannelDescInit");
  for (uint32_t i = 0; i < size - 1; ++i) {
    HcclChannelDesc& channel = wanted[i];
    channel.remoteRank = i < rank ? i : i + 1;
    const CommLink link = find_link(comm, rank, channel.remoteRank);
    channel.channelProtocol = COMM_PROTOCOL_UB_MEM;
    channel.localEndpoint = link.srcEndpointDesc;
    channel.remoteEndpoint = link.dstEndpointDesc;
    channel.notifyNum = kNotifies;
  }
  std::vector<ChannelHandle> channels(size - 1);
  if (size > 1)
    check(HcclChannelAcquire(comm, COMM_ENGINE_AIV, wanted.data(), size - 1, channels.data()), "HcclChannelAcquire");

  std::vector<Window> windows;
  for (uint32_t r = 0; r < size; ++r) {
    void* address = nullptr;
    uint64_t bytes = 0;
    if (r == rank)
      check(HcclGetHcclBuffer(comm, &address, &bytes), "HcclGetHcclBuffer");
    else
      check(HcclChannelGetHcclBuffer(comm, channels[r < rank ? r : r - 1], &address, &bytes),
            "HcclChannelGetHcclBuffer");
    windows.push_back({reinterpret_cast<uint64_t>(address), bytes});
  }
  return windows;
}

}  // namespace deep_ep::aclnn
