// A best-fit allocator of the part of a window that holds long-lived rows (recv_x).
#pragma once

#include <cstdint>
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

  Pool(uint64_t offset, uint64_t bytes);

  // The smallest free block of at least `bytes`, taken from the pool: memory that was just given back is in the caches,
  // and mapped. If there is none, or 0 bytes are asked for, the largest one; 0 bytes when nothing is free.
  Block take(uint64_t bytes);

  // Gives back all of `block` beyond its first `bytes`, and returns what is kept.
  Block trim(Block block, uint64_t bytes);

  void give_back(Block block);

 private:
  void insert(Block block);

  std::mutex mutex_;
  std::map<uint64_t, uint64_t> free_;  // offset -> bytes; neighbours are always merged
};

}  // namespace deep_ep
