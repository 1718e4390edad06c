// What a rank attaches to its post (operation.h) to send rows of its tokens to experts: rows [T, H], ids [T, K] and,
// but for low latency, weights [T, K]. Every rank takes what is for its experts.
#pragma once

#include <cstdint>
#include <cstring>

#include "window_layout.h"

namespace deep_ep {

struct AttachedTokens {
  int64_t tokens, top_k;
  uint64_t row_bytes, ids_at, weights_at, bytes;

  AttachedTokens(const Post& post, uint64_t element_size)
      : tokens(post.tokens),
        top_k(post.top_k),
        row_bytes(post.hidden * element_size),
        ids_at(round_up(tokens * row_bytes, kLine)),
        weights_at(ids_at + tokens * top_k * sizeof(int64_t)),
        bytes(weights_at + (post.op == Op::low_latency_dispatch ? 0 : tokens * top_k * sizeof(float))) {}

  void write(std::byte* to, const void* rows, const void* ids, const void* weights) const {
    std::memcpy(to, rows, tokens * row_bytes);
    std::memcpy(to + ids_at, ids, weights_at - ids_at);
    if (bytes > weights_at) std::memcpy(to + weights_at, weights, bytes - weights_at);
  }

  const int64_t* ids(const std::byte* at) const { return reinterpret_cast<const int64_t*>(at + ids_at); }
  const float* weights(const std::byte* at) const { return reinterpret_cast<const float*>(at + weights_at); }
};

}  // namespace deep_ep
