#include "pool.h"

#include <algorithm>

namespace deep_ep {

Pool::Pool(uint64_t offset, uint64_t bytes) { insert({offset, bytes / kAlignment * kAlignment}); }

Block Pool::take(uint64_t bytes) {
  std::lock_guard lock(mutex_);
  const auto fits = [bytes](const auto& block) { return bytes > 0 && block.second >= bytes; };
  const auto best = std::max_element(free_.begin(), free_.end(), [&](const auto& a, const auto& b) {
    if (fits(a) != fits(b)) return fits(b);
    return fits(a) ? a.second > b.second : a.second < b.second;
  });
  if (best == free_.end()) return {};
  const Block block{best->first, best->second};
  free_.erase(best);
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
