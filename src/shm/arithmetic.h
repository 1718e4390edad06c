// Arithmetic on rows of bf16, fp16 and fp32, in fp32: sums run sequentially in k, products and sums are rounded
// separately (no fused multiply-add), and results are rounded once, to nearest even.
#pragma once

#include <cstdint>

namespace deep_ep {

enum class DType : int64_t { f32, f16, bf16 };

constexpr const char* name_of(DType dtype) {
  constexpr const char* names[] = {"torch.float32", "torch.float16", "torch.bfloat16"};
  return names[static_cast<int64_t>(dtype)];
}

constexpr uint64_t bytes_of(DType dtype) { return dtype == DType::f32 ? 4 : 2; }

// The rows of a sum, and their weights.
struct Terms {
  const void* const* rows;
  const float* weights;
  int64_t count;
};

// out[h] = sum over k < count of weights[k] * rows[k][h]; 0 if count is 0. The rows of `next`, of which a sum comes
// next, are fetched meanwhile.
void weighted_sum(DType dtype, void* out, const Terms& terms, const Terms& next, int64_t hidden);

// row[h] = weight * row[h]; returns the sum over h of row[h] * other[h], of the row before it was scaled.
float dot_and_scale(DType dtype, void* row, const void* other, float weight, int64_t hidden);

}  // namespace deep_ep
