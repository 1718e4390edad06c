// Order within a core and between cores, the data cache, and what a core knows of itself.
#pragma once

#include "tensor.h"

namespace AscendC {

using TEventID = int8_t;

enum class HardEvent : uint8_t {
  MTE2_V,
  V_MTE2,
  MTE3_V,
  V_MTE3,
  V_V,
  MTE3_MTE2,
  MTE2_MTE3,
  S_V,
  V_S,
  S_MTE2,
  MTE2_S,
  S_MTE3,
  MTE3_S,
};

constexpr twin::Pipe from_of(HardEvent event) {
  constexpr twin::Pipe kFrom[] = {twin::MTE2, twin::V, twin::MTE3, twin::V,    twin::V, twin::MTE3, twin::MTE2,
                                  twin::S,    twin::V, twin::S,    twin::MTE2, twin::S, twin::MTE3};
  return kFrom[static_cast<int>(event)];
}
constexpr twin::Pipe to_of(HardEvent event) {
  constexpr twin::Pipe kTo[] = {twin::V, twin::MTE2, twin::V,    twin::MTE3, twin::V,    twin::MTE2, twin::MTE3,
                                twin::V, twin::S,    twin::MTE2, twin::S,    twin::MTE3, twin::S};
  return kTo[static_cast<int>(event)];
}

template <HardEvent event>
void SetFlag(int32_t id, Site at = Site::here()) {
  Core::current().set_flag(from_of(event), to_of(event), id, at);
}

template <HardEvent event>
void WaitFlag(int32_t id, Site at = Site::here()) {
  Core::current().wait_flag(from_of(event), to_of(event), id, at);
}

template <pipe_t pipe>
void PipeBarrier(Site at = Site::here()) {
  static_assert(pipe != PIPE_M && pipe != PIPE_MTE1, "the twin has no cube unit");
  Core& core = Core::current();
  if constexpr (pipe == PIPE_ALL)
    core.barrier_all();
  else
    core.barrier(pipe == PIPE_S ? twin::S : pipe == PIPE_V ? twin::V : pipe == PIPE_MTE2 ? twin::MTE2 : twin::MTE3, at);
}

template <bool isAIVOnly = true>
void SyncAll(Site at = Site::here()) {
  static_assert(isAIVOnly, "the twin has no cube unit");
  Core::current().sync_all(at);
}

// `workspace`: zeros, 32 bytes per core; `ub`: as many. 0 cores: all.
template <bool isAIVOnly = true>
void SyncAll(const GlobalTensor<int32_t>& workspace, const LocalTensor<int32_t>& ub, int32_t usedCores = 0,
             Site at = Site::here()) {
  static_assert(isAIVOnly, "the twin has no cube unit");
  Core::current().sync_all(workspace.GetPhyAddr(0), ub.span(0, ub.GetSize()), usedCores, at);
}

enum class CacheLine : uint64_t { SINGLE_CACHE_LINE = 0, ENTIRE_DATA_CACHE };
enum class DcciDst : uint64_t { CACHELINE_ALL = 0, CACHELINE_UB, CACHELINE_OUT, CACHELINE_ATOMIC };

template <typename T, CacheLine extent, DcciDst destination = DcciDst::CACHELINE_OUT>
void DataCacheCleanAndInvalid(const GlobalTensor<T>& tensor, Site at = Site::here()) {
  static_assert(destination == DcciDst::CACHELINE_OUT || destination == DcciDst::CACHELINE_ALL,
                "the twin's data cache is one of global memory");
  Core::current().clean(tensor.GetPhyAddr(0), extent == CacheLine::ENTIRE_DATA_CACHE, at);
}

inline int64_t GetBlockIdx() { return Core::current().index(); }
inline int64_t GetBlockNum() { return Core::current().cores(); }
inline int64_t GetSystemCycle() { return Core::current().system_cycle(); }

}  // namespace AscendC
