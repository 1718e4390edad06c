// A best-fit allocator of the part of a window that holds long-lived rows (recv_x). It has memory where that is needed.
#pragma once

#include <algorithm>
#include <cstdint>
#include <functional>
#include <map>
#include <mutex>
#include <vector>

namespace deep_ep {

struct Block {
  uint64_t offset = 0;
  uint64_t bytes = 0;
  uint64_t had = 0;  // of these, the first ones that had memory before
};

// Offsets and sizes are multiples of kAlignment. Thread-safe: tensors die on any thread.
class Pool {
 public:
  static constexpr uint64_t kAlignment = 64;
  static constexpr uint64_t kGranule = 64 << 10;  // memory comes and goes in such parts

  static constexpr uint64_t aligned(uint64_t bytes) { return (bytes + kAlignment - 1) / kAlignment * kAlignment; }

  // Gets or gives back the memory of a part of the pool; false if it cannot.
  using Change = std::function<bool(uint64_t offset, uint64_t bytes)>;

  // Of `limit` bytes from `offset` on, all free and without memory. `watch` is called when there is something to sweep.
  Pool(uint64_t offset, uint64_t limit, Change reserve, Change release, std::function<void()> watch);

  // A free block with memory of at least `bytes`: the smallest, since what was just given back is in the caches, and
  // mapped. If there is none memory is reserved for one, or, where no block is that large, for the largest; where that
  // cannot be, the largest block that has memory. No block for 0 bytes, and where not even `least` bytes are free.
  Block take(uint64_t bytes, uint64_t least);

  // Gives back all of `block` beyond its first `bytes`, and returns what is kept.
  Block trim(Block block, uint64_t bytes);

  void give_back(Block block);

  // Gives back, to the system too what it did not have before.
  void undo(Block block);

  // Bytes that are free and have memory.
  uint64_t spare();

  // To the system goes the memory of which no block has had anything since the sweep before the last one. False if
  // there is nothing to watch any more.
  bool sweep();

 private:
  void insert(Block block);
  // The bytes from the beginning of a free block on that have memory.
  uint64_t prefix(const std::pair<const uint64_t, uint64_t>& free) const;
  bool reserve(uint64_t offset, uint64_t bytes);
  // Calls apply(begin, end) for each run of granules in [first, end) for which is(age).
  template <typename Is, typename Apply>
  void runs(uint64_t first, uint64_t end, Is&& is, Apply&& apply);
  void release(uint64_t first, uint64_t end, uint8_t least_age);
  void touch(uint64_t offset, uint64_t bytes);

  uint64_t granule_of(uint64_t offset) const { return (offset - begin_) / kGranule; }
  uint64_t granule_end(uint64_t offset) const { return (offset - begin_ + kGranule - 1) / kGranule; }
  uint64_t begin_of(uint64_t granule) const { return std::min<uint64_t>(begin_ + granule * kGranule, end_); }

  static constexpr uint8_t kUsed = 1;  // the age of a granule that was used since the last sweep
  static constexpr uint8_t kOld = 3;

  const uint64_t begin_, end_;
  const Change reserve_, release_;
  const std::function<void()> watch_;
  std::mutex mutex_;
  bool watched_ = false;
  std::map<uint64_t, uint64_t> free_;  // offset -> bytes; neighbours are always merged
  std::vector<uint8_t> ages_;          // by granule, in sweeps; 0: it has no memory
};

}  // namespace deep_ep
