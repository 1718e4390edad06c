// The tensor [rows, H] that an operation receives into: memory of the own window's pool when there is room, private
// memory otherwise.
#pragma once

#include <cstring>
#include <optional>

#include "arguments.h"
#include "private_memory.h"

namespace deep_ep {

class RecvRows {
 public:
  // Decides for every rank where its rows of `like`'s dtype and hidden size go. delivered(r) rows arrive at rank r, in
  // a tensor of total(r) rows.
  template <typename Delivered, typename Total>
  void place(const Operation& op, const Tensor& like, uint64_t meta_bytes, Delivered&& delivered, Total&& total) {
    row_bytes_ = like.size(1) * like.element_size();
    rows_ = total(op.rank());
    delivered_ = delivered(op.rank());
    const auto pooled = [&](int r) { return op.pool_region(r, delivered(r), total(r), row_bytes_, meta_bytes); };
    pooled_ = pooled(op.rank()).has_value() && rows_ > 0;
    if (op.all_attached()) return;
    for (int r = 0; r < op.size(); ++r) {
      const auto region = pooled(r);
      regions_.push_back(region ? *region : op.staging_region(r, delivered(r), 1, row_bytes_, meta_bytes));
    }
  }

  const std::vector<Region>& regions() const { return regions_; }
  uint64_t row_bytes() const { return row_bytes_; }

  // Before rows arrive. Those that were attached are written to rows() by this rank itself.
  void allocate(Operation& op) {
    const uint64_t used = delivered_ * row_bytes_, bytes = rows_ * row_bytes_;
    try {
      if (op.all_attached() && bytes - used >= kManyZeros)
        memory_ = zeros_behind(used, bytes);
      else if (!pooled_)
        memory_ = private_memory(bytes);
      else if (op.all_attached())
        memory_ = op.keep(bytes);
    } catch (const Error& error) {
      op.fail(error.what());
    }
  }

  std::byte* rows() const { return memory_.get(); }

  // Where row `first` of a chunk that arrived at `chunk` now lies for good.
  std::byte* settle(int64_t first, int64_t end, std::byte* chunk) {
    if (!memory_) return chunk;
    std::byte* to = rows() + first * row_bytes_;
    std::memcpy(to, chunk, (end - first) * row_bytes_);
    return to;
  }

  // The tensor, once all rows have arrived; the rows behind them are set to 0.
  Tensor take(Operation& op, const Tensor& like) {
    const uint64_t used = delivered_ * row_bytes_, bytes = rows_ * row_bytes_;
    if (!memory_) memory_ = op.keep(bytes);
    if (!op.all_attached() || bytes - used < kManyZeros) std::memset(rows() + used, 0, bytes - used);
    std::byte* const rows = this->rows();
    return torch::stable::from_blob(rows, {rows_, like.size(1)}, {like.size(1), 1}, like.device(), like.scalar_type(),
                                    [memory = std::move(memory_)](void*) {});
  }

 private:
  // From here on it takes less time to map memory than to write it.
  static constexpr uint64_t kManyZeros = 32 << 10;

  std::vector<Region> regions_;
  uint64_t row_bytes_ = 0;
  int64_t rows_ = 0;
  int64_t delivered_ = 0;
  bool pooled_ = false;
  std::shared_ptr<std::byte> memory_;  // none yet: rows arrive in the pool
};

}  // namespace deep_ep
