// Received rows that lie in blocks, one for each local expert, of as many rows as it may get. Rows that have not come
// are 0, and take neither time nor memory.
#pragma once

#include <cstring>

#include "arguments.h"
#include "shm/private_memory.h"

namespace deep_ep {

struct Blocks {
  std::vector<Tensor> parts;  // a row is made of two, or is one: then there are none
  int64_t size = 0;           // rows of an expert
  int64_t count = 0;          // experts
};

class BlockRows {
 public:
  // Rows like those of `x`.
  BlockRows(const Blocks& blocks, const Tensor& x) : rows_(blocks.size * blocks.count) {
    for (const Tensor& like : blocks.parts.empty() ? std::vector{x} : blocks.parts) {
      const uint64_t row_bytes = row_bytes_of(like);
      parts_.push_back({pages(rows_ * row_bytes), row_bytes, {}});
      const Shape shape = like.sizes();
      std::vector<int64_t> sizes{blocks.count, blocks.size}, strides;
      sizes.insert(sizes.end(), shape.begin() + 1, shape.end());
      for (int64_t i = static_cast<int64_t>(sizes.size()) - 1, stride = 1; i >= 0; stride *= sizes[i--])
        strides.insert(strides.begin(), stride);
      parts_.back().tensor = torch::stable::from_blob(parts_.back().memory.get(), sizes, strides, x.device(),
                                                      like.scalar_type(), [memory = parts_.back().memory](void*) {});
    }
  }

  // Makes all rows 0 but those at `places`, in their order, which are about to be put there. Until then there may be
  // anything.
  void clear_but(const std::vector<int64_t>& places) {
    std::vector<deep_ep::Part> written;
    for (const Part& part : parts_) {
      written.clear();
      for (const int64_t place : places) {
        const uint64_t begin = place * part.row_bytes;
        if (!written.empty() && written.back().end == begin)
          written.back().end += part.row_bytes;
        else
          written.push_back({begin, begin + part.row_bytes});
      }
      deep_ep::clear_but(part.memory.get(), rows_ * part.row_bytes, written);
    }
  }

  void put(int64_t place, const std::byte* row) {
    for (const Part& part : parts_) {
      std::memcpy(part.memory.get() + place * part.row_bytes, row, part.row_bytes);
      row += part.row_bytes;
    }
  }

  const Tensor& rows() const { return parts_.front().tensor; }
  // The second part, or a tensor of no elements.
  Tensor scales() const { return parts_.size() > 1 ? parts_[1].tensor : empty_tensor(rows(), {0}); }

 private:
  struct Part {
    std::shared_ptr<std::byte> memory;
    uint64_t row_bytes;
    Tensor tensor;
  };

  int64_t rows_;
  std::vector<Part> parts_;
};

}  // namespace deep_ep
