// The ops whose ranks talk to each other, as windows, flags and messages name them.
#pragma once

#include <cstdint>

namespace deep_ep {

enum class Op : uint32_t {
  dispatch,
  combine,
  dispatch_backward,
  combine_backward,
  combine_backward_weights,
  low_latency_dispatch,
  low_latency_combine,
  notify_dispatch,
  low_latency_dispatch_int8,
  fused_deep_moe,
  dispatch_ffn_combine,
  fused_deep_moe_backward,
  dispatch_int8
};
constexpr int kOps = 13;

constexpr const char* name_of(Op op) {
  constexpr const char* names[kOps] = {"dispatch",
                                       "combine",
                                       "dispatch_backward",
                                       "combine_backward",
                                       "combine_backward (weights)",
                                       "low_latency_dispatch",
                                       "low_latency_combine",
                                       "notify_dispatch",
                                       "low_latency_dispatch_int8",
                                       "fused_deep_moe",
                                       "fused_deep_moe.dispatch_ffn_combine",
                                       "fused_deep_moe_backward",
                                       "dispatch_int8"};
  return names[static_cast<uint32_t>(op)];
}

}  // namespace deep_ep
