// What Python needs of what kernels and host share (python/deep_ep/weights.py, npu/windows.py), through ctypes.
#include "c_boundary.h"
#include "fused_layout.h"
#include "window_map.h"

// The layout of fused_deep_moe's weights (fused_layout.h).
DEEP_EP_API int64_t deep_ep_fused_tile() noexcept { return deep_ep::FusedLayout::kTile; }

DEEP_EP_API void deep_ep_fused_places(int64_t columns, int64_t* places) noexcept {
  for (int64_t column = 0; column < columns; ++column) places[column] = deep_ep::FusedLayout::place(column, columns);
}

DEEP_EP_API int64_t deep_ep_fused_bits_of(float scale) noexcept { return deep_ep::FusedLayout::bits_of(scale); }

DEEP_EP_API float deep_ep_fused_scale_of(int64_t bits) noexcept { return deep_ep::FusedLayout::scale_of(bits); }

// Without which a window on an NPU can hold no launch.
DEEP_EP_API int64_t deep_ep_npu_least_bytes(int64_t ranks) noexcept { return deep_ep::WindowMap::least_bytes(ranks); }
