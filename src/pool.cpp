#include "pool.h"

#include <algorithm>

namespace deep_ep {

Pool::Pool(uint64_t offset, uint64_t bytes) { insert({offset, bytes / kAlignment * kAlignment}); }

Block Pool::take_largest() {
  std::lock_guard lock(mutex_);
  const auto largest =
      std::max_element(free_.begin(), free_.end(), [](auto& a, auto& b) { return a.second < b.second; });
  if (largest == free_.end()) return {};
  const Block block{largest->first, largest->second};
  free_.erase(largest);
  return block;
}

Block Pool::trim(Block block, uint64_t bytes) {
  const uint64_t kept = std::min(aligned(bytes), block.bytes);
  give_back({block.offset + kept, block.bytes - kept});
  return {block.offset, kept};
}

void Pool::give_back(Block block) {
  std::lock_guard lock(mutex_);
  insert(block);
}

void Pool::insert(Block block) {
  if (block.bytes == 0) return;
  auto next = free_.lower_bound(block.offset);
  if (next != free_.end() && block.offset + block.bytes == next->first) {
    block.bytes += next->second;
    next = free_.erase(next);
  }
  if (next != free_.begin()) {
    const auto previous = std::prev(next);
    if (previous->first + previous->second == block.offset) {
      previous->second += block.bytes;
      return;
    }
  }
  free_.emplace(block.offset, block.bytes);
}

}  // namespace deep_ep
