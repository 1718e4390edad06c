#include "pool.h"

#include <algorithm>
#include <utility>

namespace deep_ep {

Pool::Pool(uint64_t offset, uint64_t limit, Reserve reserve)
    : limit_((offset + limit) / kAlignment * kAlignment), reserve_(std::move(reserve)), end_(offset) {}

Block Pool::take(uint64_t bytes) {
  std::lock_guard lock(mutex_);
  if (bytes == 0) return {};
  const auto fits = [bytes](const auto& block) { return block.second >= bytes; };
  if (std::none_of(free_.begin(), free_.end(), fits)) grow(aligned(bytes));
  const auto best = std::max_element(free_.begin(), free_.end(), [&](const auto& a, const auto& b) {
    if (fits(a) != fits(b)) return fits(b);
    return fits(a) ? a.second > b.second : a.second < b.second;
  });
  if (best == free_.end()) return {};
  const Block block{best->first, best->second};
  free_.erase(best);
  return block;
}

// So that the last block is free and has `bytes`, or as many as there can be.
void Pool::grow(uint64_t bytes) {
  const auto last = free_.empty() ? free_.end() : std::prev(free_.end());
  const uint64_t begin = last != free_.end() && last->first + last->second == end_ ? last->first : end_;
  const uint64_t end = std::min(begin + bytes, limit_);
  if (end <= end_ || !reserve_(end_, end - end_)) return;
  insert({end_, end - end_});
  end_ = end;
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
