// How the weights of fused_deep_moe lie: plain arithmetic that its kernels share, and Python through c_api.cpp.
//
// I intermediate size · gmm1 gives 2I columns, first I of gate, then I of up.
#pragma once

#include <cstdint>

#include "tiling.h"

namespace deep_ep {

// In the fuse mode FUSED_DEEP_MOE the columns of gmm1 are permuted, so that a core that holds one tile of them has both
// factors of silu(gate) * up: each tile has kHalf columns of gate and the same ones of up.
struct FusedLayout {
  static constexpr int64_t kTile = 128;
  static constexpr int64_t kHalf = kTile / 2;

  // Where `column` of [gate | up] stands. `columns` is 2I, a multiple of kTile.
  DEEP_EP_DEVICE static constexpr int64_t place(int64_t column, int64_t columns) {
    const int64_t intermediate = columns / 2, up = column / intermediate, i = column % intermediate;
    return i / kHalf * kTile + up * kHalf + i % kHalf;
  }

  // In the fuse mode DISPATCH_FFN_COMBINE a scale is the int64 with the bits of an fp32, as the unit that dequantises
  // what a matrix product leaves reads it.
  DEEP_EP_DEVICE static constexpr int64_t bits_of(float scale) { return __builtin_bit_cast(int32_t, scale); }
  DEEP_EP_DEVICE static constexpr float scale_of(int64_t bits) {
    return __builtin_bit_cast(float, static_cast<int32_t>(bits));
  }
};

static_assert(FusedLayout::place(0, 256) == 0 && FusedLayout::place(128, 256) == 64);
static_assert(FusedLayout::place(64, 256) == 128 && FusedLayout::place(255, 256) == 255);
static_assert(FusedLayout::bits_of(1.0f) == 0x3F800000 && FusedLayout::scale_of(0x3F800000) == 1.0f);

}  // namespace deep_ep
