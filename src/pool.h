// A best-fit allocator of the part of a window that holds long-lived rows (recv_x). It grows as that is needed.
#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <mutex>

namespace deep_ep {

struct Block {
  uint64_t offset = 0;
  uint64_t bytes = 0;
};

// Offsets and sizes are multiples of kAlignment. Thread-safe: tensors die on any thread.
class Pool {
 public:
  static constexpr uint64_t kAlignment = 64;

  static constexpr uint64_t aligned(uint64_t bytes) { return (bytes + kAlignment - 1) / kAlignment * kAlignment; }

  // Reserves memory for the pool; false if there is none.
  using Reserve = std::function<bool(uint64_t offset, uint64_t bytes)>;

  // Of at most `limit` bytes from `offset` on.
  Pool(uint64_t offset, uint64_t limit, Reserve reserve);

  // The smallest free block of at least `bytes`, taken from the pool: memory that was just given back is in the caches,
  // and mapped. If there is none the pool grows; where it cannot, the largest free block. No block for 0 bytes.
  Block take(uint64_t bytes);

  // Gives back all of `block` beyond its first `bytes`, and returns what is kept.
  Block trim(Block block, uint64_t bytes);

  void give_back(Block block);

 private:
  void insert(Block block);
  void grow(uint64_t bytes);

  const uint64_t limit_;  // where it ends at most
  const Reserve reserve_;
  uint64_t end_;
  std::mutex mutex_;
  std::map<uint64_t, uint64_t> free_;  // offset -> bytes; neighbours are always merged
};

}  // namespace deep_ep
