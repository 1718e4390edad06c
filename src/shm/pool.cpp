#include "pool.h"

#include <algorithm>
#include <cstring>
#include <utility>

namespace deep_ep {

Pool::Pool(uint64_t offset, uint64_t limit, Change reserve, Change release, std::function<void()> watch)
    : begin_(offset),
      end_((offset + limit) / kAlignment * kAlignment),
      reserve_(std::move(reserve)),
      release_(std::move(release)),
      watch_(std::move(watch)),
      ages_(granule_end(end_)) {
  insert({begin_, end_ - begin_});
}

Block Pool::take(uint64_t bytes, uint64_t least) {
  std::lock_guard lock(mutex_);
  struct Candidate {
    uint64_t offset = 0, bytes = 0, prefix = 0;
  };
  Candidate best, widest;
  uint64_t largest = 0;
  for (const auto& block : free_) largest = std::max(largest, block.second);
  if (bytes == 0 || largest < std::max<uint64_t>(least, 1)) return {};
  bytes = std::min(aligned(bytes), largest);
  for (const auto& block : free_) {
    const Candidate candidate{block.first, block.second, prefix(block)};
    const bool fits = candidate.prefix >= bytes;
    if (fits ? best.prefix < bytes || candidate.prefix < best.prefix : candidate.prefix > best.prefix) best = candidate;
    if (candidate.bytes >= bytes && (widest.bytes == 0 || candidate.prefix > widest.prefix)) widest = candidate;
  }
  uint64_t had = best.prefix;
  if (best.prefix < bytes && reserve(widest.offset, bytes)) {
    best = widest;
    had = std::exchange(best.prefix, prefix({best.offset, best.bytes}));
  }
  if (best.prefix == 0) return {};
  free_.erase(best.offset);
  insert({best.offset + best.prefix, best.bytes - best.prefix});
  touch(best.offset, std::min(bytes, best.prefix));
  return {best.offset, best.prefix, had};
}

uint64_t Pool::prefix(const std::pair<const uint64_t, uint64_t>& free) const {
  const uint64_t first = granule_of(free.first), end = granule_end(free.first + free.second);
  const void* const hole = std::memchr(ages_.data() + first, 0, end - first);
  if (hole == nullptr) return free.second;
  const uint64_t at = begin_of(static_cast<const uint8_t*>(hole) - ages_.data());
  return at > free.first ? at - free.first : 0;
}

template <typename Is, typename Apply>
void Pool::runs(uint64_t first, uint64_t end, Is&& is, Apply&& apply) {
  for (uint64_t at = first; at < end; ++at) {
    if (!is(ages_[at])) continue;
    const uint64_t begin = at;
    while (at < end && is(ages_[at])) ++at;
    apply(begin, at);
  }
}

bool Pool::reserve(uint64_t offset, uint64_t bytes) {
  bool done = true;
  runs(
      granule_of(offset), granule_end(offset + bytes), [](uint8_t age) { return age == 0; },
      [&](uint64_t first, uint64_t end) {
        done = done && reserve_(begin_of(first), begin_of(end) - begin_of(first));
        if (done) std::fill(ages_.begin() + first, ages_.begin() + end, kUsed);
      });
  if (!watched_) {
    watched_ = true;
    watch_();
  }
  return done;
}

void Pool::release(uint64_t first, uint64_t end, uint8_t least_age) {
  runs(
      first, end, [&](uint8_t age) { return age >= least_age; },
      [&](uint64_t first, uint64_t end) {
        const bool done = release_(begin_of(first), begin_of(end) - begin_of(first));
        std::fill(ages_.begin() + first, ages_.begin() + end, done ? 0 : kUsed);
      });
}

void Pool::touch(uint64_t offset, uint64_t bytes) {
  std::fill(ages_.begin() + granule_of(offset), ages_.begin() + granule_end(offset + bytes), kUsed);
}

Block Pool::trim(Block block, uint64_t bytes) {
  const uint64_t kept = std::min(aligned(bytes), block.bytes);
  std::lock_guard lock(mutex_);
  insert({block.offset + kept, block.bytes - kept});
  touch(block.offset, kept);
  return {block.offset, kept};
}

void Pool::give_back(Block block) {
  std::lock_guard lock(mutex_);
  insert(block);
}

void Pool::undo(Block block) {
  std::lock_guard lock(mutex_);
  insert(block);
  if (block.bytes > block.had)
    release(granule_end(block.offset + block.had), granule_of(block.offset + block.bytes), kUsed);
}

uint64_t Pool::spare() {
  std::lock_guard lock(mutex_);
  uint64_t bytes = 0;
  for (const auto& [offset, size] : free_)
    runs(
        granule_end(offset), granule_of(offset + size), [](uint8_t age) { return age > 0; },
        [&](uint64_t first, uint64_t end) { bytes += (end - first) * kGranule; });
  return bytes;
}

bool Pool::sweep() {
  std::lock_guard lock(mutex_);
  uint64_t used = 0;  // granules from here to the next free block are in use
  const auto renew = [&](uint64_t end) {
    for (; used < end; ++used) ages_[used] = std::min(ages_[used], kUsed);
  };
  for (const auto& [offset, bytes] : free_) {
    const uint64_t first = granule_end(offset),
                   end = offset + bytes == end_ ? ages_.size() : granule_of(offset + bytes);
    renew(first);
    if (first >= end) continue;
    for (uint64_t at = first; at < end; ++at) ages_[at] += ages_[at] > 0;
    release(first, end, kOld);
    used = end;
  }
  renew(ages_.size());
  return watched_ = std::any_of(ages_.begin(), ages_.end(), [](uint8_t age) { return age > 0; });
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
