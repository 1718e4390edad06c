// The tensor [rows, H] that an operation receives into: memory of the own window's pool when there is room, private
// memory otherwise.
#pragma once

#include <cstring>
#include <optional>

#include "arguments.h"
#include "copy.h"

namespace deep_ep {

class RecvRows {
 public:
  // Decides for every rank where its rows of `like`'s dtype and hidden size go. delivered(r) rows arrive at rank r, in
  // a tensor of total(r) rows.
  template <typename Delivered, typename Total>
  void place(const Operation& op, const Tensor& like, uint64_t meta_bytes, Delivered&& delivered, Total&& total) {
    row_bytes_ = like.size(1) * like.element_size();
    for (int r = 0; r < op.size(); ++r) {
      const auto pooled = op.pool_region(r, delivered(r), total(r), row_bytes_, meta_bytes);
      if (r == op.rank()) pooled_ = pooled.has_value() && total(r) > 0;
      regions_.push_back(pooled ? *pooled : op.staging_region(r, delivered(r), 1, row_bytes_, meta_bytes));
    }
    rows_ = total(op.rank());
  }

  const std::vector<Region>& regions() const { return regions_; }
  uint64_t row_bytes() const { return row_bytes_; }

  // Private memory is made before rows arrive, window memory needs none.
  void allocate(const Tensor& like) {
    if (!pooled_) private_ = tensor_at(private_memory(rows_ * row_bytes_), like);
  }

  // Where row `first` of a chunk that arrived at `chunk` now lies for good.
  std::byte* settle(int64_t first, int64_t end, std::byte* chunk) {
    if (pooled_) return chunk;
    std::byte* to = static_cast<std::byte*>(private_->mutable_data_ptr()) + first * row_bytes_;
    std::memcpy(to, chunk, (end - first) * row_bytes_);
    return to;
  }

  // The tensor, once all rows have arrived; rows from `delivered` on are set to 0.
  Tensor take(Operation& op, const Tensor& like, int64_t delivered) {
    if (pooled_) {
      private_ = tensor_at(op.keep(rows_ * row_bytes_), like);
    }
    std::memset(static_cast<std::byte*>(private_->mutable_data_ptr()) + delivered * row_bytes_, 0,
                (rows_ - delivered) * row_bytes_);
    return *private_;
  }

 private:
  Tensor tensor_at(std::shared_ptr<std::byte> memory, const Tensor& like) const {
    return torch::stable::from_blob(memory.get(), {rows_, like.size(1)}, {like.size(1), 1}, like.device(),
                                    like.scalar_type(), [memory](void*) {});
  }

  std::vector<Region> regions_;
  uint64_t row_bytes_ = 0;
  int64_t rows_ = 0;
  bool pooled_ = false;
  std::optional<Tensor> private_;
};

}  // namespace deep_ep
