// Order within a core and between cores, the data cache, and what a core knows of itself.
#pragma once

#include "tensor.h"

namespace AscendC {

using TEventID = int8_t;

enum class HardEvent : uint8_t {
  MTE2_MTE1,
  MTE1_MTE2,
  MTE1_M,
  M_MTE1,
  MTE2_M,
  M_MTE2,
  M_FIX,
  FIX_M,
  MTE1_FIX,
  FIX_MTE1,
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

constexpr twin::Pipe kEventPipes[][2] = {
    {twin::MTE2, twin::MTE1}, {twin::MTE1, twin::MTE2}, {twin::MTE1, twin::M}, {twin::M, twin::MTE1},
    {twin::MTE2, twin::M},    {twin::M, twin::MTE2},    {twin::M, twin::FIX},  {twin::FIX, twin::M},
    {twin::MTE1, twin::FIX},  {twin::FIX, twin::MTE1},  {twin::MTE2, twin::V}, {twin::V, twin::MTE2},
    {twin::MTE3, twin::V},    {twin::V, twin::MTE3},    {twin::V, twin::V},    {twin::MTE3, twin::MTE2},
    {twin::MTE2, twin::MTE3}, {twin::S, twin::V},       {twin::V, twin::S},    {twin::S, twin::MTE2},
    {twin::MTE2, twin::S},    {twin::S, twin::MTE3},    {twin::MTE3, twin::S},
};
constexpr twin::Pipe from_of(HardEvent event) { return kEventPipes[static_cast<int>(event)][0]; }
constexpr twin::Pipe to_of(HardEvent event) { return kEventPipes[static_cast<int>(event)][1]; }

constexpr twin::Pipe pipe_of(pipe_t pipe) {
  switch (pipe) {
    case PIPE_V:
      return twin::V;
    case PIPE_M:
      return twin::M;
    case PIPE_MTE1:
      return twin::MTE1;
    case PIPE_MTE2:
      return twin::MTE2;
    case PIPE_MTE3:
      return twin::MTE3;
    case PIPE_FIX:
      return twin::FIX;
    default:
      return twin::S;
  }
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
  Core& core = Core::current();
  if constexpr (pipe == PIPE_ALL)
    core.barrier_all();
  else
    core.barrier(pipe_of(pipe), at);
}

template <bool isAIVOnly = true>
void SyncAll(Site at = Site::here()) {
  if constexpr (isAIVOnly)
    Core::current().sync_all(at);
  else
    Core::current().sync_all_mix(at);
}

// `workspace`: zeros, 32 bytes per core; `ub`: as many. 0 cores: all.
template <bool isAIVOnly = true>
void SyncAll(const GlobalTensor<int32_t>& workspace, const LocalTensor<int32_t>& ub, int32_t usedCores = 0,
             Site at = Site::here()) {
  static_assert(isAIVOnly, "the twin has soft SyncAll of vector cores only");
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

inline int64_t GetBlockIdx() { return Core::current().block(); }
inline int64_t GetBlockNum() { return Core::current().blocks(); }
inline int64_t GetSubBlockIdx() { return Core::current().is_mix() && ASCEND_IS_AIV ? Core::current().index() % 2 : 0; }
inline int64_t GetTaskRatio() { return Core::current().is_mix() && ASCEND_IS_AIV ? 2 : 1; }
inline int64_t GetSystemCycle() { return Core::current().system_cycle(); }

}  // namespace AscendC
