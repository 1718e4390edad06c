// The tensor [rows, H] that an operation receives into: memory of the own window's pool when there is room, private
// memory otherwise.
#pragma once

#include <cstring>
#include <optional>

#include "arguments.h"
#include "blocks.h"
#include "shm/operation.h"
#include "shm/private_memory.h"

namespace deep_ep {

class RecvRows {
 public:
  // Rows behind those that arrive: 0, anything, or NaN.
  enum class Unused { zero, any, spoiled };

  // Rows arrive elsewhere, to be copied into blocks.
  void make_blocks(const Blocks& blocks, const Tensor& like) { blocks_.emplace(blocks, like); }
  BlockRows& blocks() { return *blocks_; }
  // Where row n of those that arrive belongs, in blocks.
  void set_places(std::vector<int64_t> places) {
    blocks_->clear_but(places);
    places_ = std::move(places);
  }

  // For an operation that begins later: the tensor of as many rows, to which they will come. `sparse`: few of them may.
  Tensor make_early(const Group& group, const Tensor& like, int64_t rows, uint64_t meta_bytes, bool sparse) {
    rows_ = rows;
    const uint64_t bytes = rows * like.size(1) * like.element_size();
    if (sparse && bytes >= kManyZeros) {
      memory_ = zeros_behind(0, bytes);
      zero_behind_ = !group.spoils();
    } else if (auto taken = group.reserve(Pool::aligned(bytes) + rows * meta_bytes)) {
      memory_ = std::move(taken->memory);
      reserved_ = taken->block;
    } else {
      memory_ = private_memory(bytes);
    }
    early_ = tensor(like);
    return *early_;
  }

  // What the rank brings to the operation, of the pool.
  std::optional<Block> reserved() const { return early_ || blocks_ ? std::optional(reserved_) : std::nullopt; }

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
    if (early_ || blocks_) return;
    const uint64_t used = delivered_ * row_bytes_, bytes = rows_ * row_bytes_;
    zero_behind_ = op.all_attached() && bytes - used >= kManyZeros;
    try {
      if (zero_behind_)
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

  // Row n has arrived at `row`, and is copied to where it belongs.
  void put(int64_t n, const std::byte* row) {
    if (blocks_)
      blocks_->put(places_[n], row);
    else
      std::memcpy(rows() + n * row_bytes_, row, row_bytes_);
  }

  // Rows first..end-1 have arrived at `chunk`. Where the first of them now lies for good, unless rows are in blocks.
  std::byte* settle(int64_t first, int64_t end, std::byte* chunk) {
    if (blocks_) {
      for (int64_t n = first; n < end; ++n, chunk += row_bytes_) put(n, chunk);
      return nullptr;
    }
    std::byte* to = memory_ ? rows() + first * row_bytes_ : chunk;
    if (to != chunk) std::memcpy(to, chunk, (end - first) * row_bytes_);
    return to;
  }

  // The tensor, once all rows have arrived; the rows behind them are as `unused` says.
  Tensor take(Operation& op, const Tensor& like, Unused unused) {
    if (blocks_) return blocks_->rows();
    const uint64_t used = delivered_ * row_bytes_, bytes = rows_ * row_bytes_;
    if (!memory_) memory_ = op.keep(bytes);
    if (unused == Unused::spoiled)
      std::memset(rows() + used, 0xFF, bytes - used);
    else if (unused == Unused::zero && !zero_behind_)
      std::memset(rows() + used, 0, bytes - used);
    return early_ ? *early_ : tensor(like);
  }

 private:
  Tensor tensor(const Tensor& like) const {
    return torch::stable::from_blob(rows(), {rows_, like.size(1)}, {like.size(1), 1}, like.device(), like.scalar_type(),
                                    [memory = memory_](void*) {});
  }

  // From here on it takes less time to map memory than to write it.
  static constexpr uint64_t kManyZeros = 32 << 10;

  std::vector<Region> regions_;
  uint64_t row_bytes_ = 0;
  int64_t rows_ = 0;
  int64_t delivered_ = 0;
  bool pooled_ = false;
  bool zero_behind_ = false;  // the rows behind those that arrive are 0 already
  std::optional<BlockRows> blocks_;
  std::vector<int64_t> places_;
  std::optional<Tensor> early_;
  Block reserved_;
  std::shared_ptr<std::byte> memory_;  // none yet: rows arrive in the pool
};

}  // namespace deep_ep
