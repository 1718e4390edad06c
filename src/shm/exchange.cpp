#include "exchange.h"

#include <algorithm>
#include <numeric>
#include <span>

#include "copy.h"
#include "error.h"
#include "operation.h"

namespace deep_ep {
namespace {

// Entries by the chunk that their slots are in; within a chunk they keep their order.
class Chunks {
 public:
  Chunks(const std::vector<Entry>& entries, const std::vector<Region>& regions) : sorted_(entries.size()) {
    int64_t chunks = 0;
    for (const Region& region : regions) chunks = std::max(chunks, region.num_chunks());
    ends_.resize(chunks + 1);
    const auto chunk_of = [&](const Entry& entry) { return entry.slot / regions[entry.dest].slots_per_chunk; };
    for (const Entry& entry : entries) {
      if (entry.slot >= regions[entry.dest].num_slots)
        throw Error(str("slot ", entry.slot, " of rank ", entry.dest, " is out of range; is the handle intact?"));
      ++ends_[chunk_of(entry) + 1];
    }
    std::partial_sum(ends_.begin(), ends_.end(), ends_.begin());
    std::vector<size_t> next(ends_);
    for (const Entry& entry : entries) sorted_[next[chunk_of(entry)]++] = entry;
  }

  int64_t count() const { return static_cast<int64_t>(ends_.size()) - 1; }

  std::span<const Entry> of(int64_t chunk) const {
    return {sorted_.data() + ends_[chunk], sorted_.data() + ends_[chunk + 1]};
  }

 private:
  std::vector<Entry> sorted_;
  std::vector<size_t> ends_;
};

}  // namespace

std::optional<Region> Operation::pool_region(int rank, int64_t num_slots, int64_t total_rows, uint64_t row_bytes,
                                             uint64_t meta_bytes) const {
  Region region;
  region.offset = post(rank).pool_offset;
  region.metas = Pool::aligned(total_rows * row_bytes);
  const uint64_t needed = region.metas + num_slots * meta_bytes;
  if (rank == this->rank()) needed_ = std::max(needed_, needed);
  if (needed > post(rank).pool_bytes) return std::nullopt;
  region.num_slots = num_slots;
  region.slots_per_chunk = std::max<int64_t>(num_slots, 1);
  return region;
}

Region Operation::staging_region(int rank, int64_t num_slots, int64_t granularity, uint64_t row_bytes,
                                 uint64_t meta_bytes) const {
  const WindowLayout& at = group_.peers_[rank].at;
  const uint64_t slot_bytes = row_bytes + meta_bytes;
  Region region;
  region.offset = at.staging;
  region.num_slots = num_slots;
  region.slots_per_chunk = std::max<int64_t>(num_slots, 1);
  if (num_slots * slot_bytes + kLine > at.staging_bytes) {
    region.num_buffers = 2;
    region.stride = at.staging_bytes / 2;
    region.slots_per_chunk = (region.stride - kLine) / slot_bytes / granularity * granularity;
    if (region.slots_per_chunk == 0)
      throw Error(str("the window of rank ", rank, " is too small: ", granularity, " rows of ", slot_bytes,
                      " bytes do not fit into half of its staging memory (", region.stride,
                      " bytes); ask for more with num_nvl_bytes, num_bytes or HCCL_BUFFSIZE"));
  }
  region.metas = round_up(region.slots_per_chunk * row_bytes, kLine);
  return region;
}

void Operation::exchange(const std::vector<Entry>& entries, const std::vector<Region>& regions, uint64_t row_bytes,
                         uint64_t meta_bytes, const Write& write, const Consume& consume) {
  const Chunks pending(entries, regions);
  const Region& mine = regions[rank()];
  std::vector<int64_t> sent(size(), 0);     // chunks delivered in full, by destination
  std::vector<int64_t> allowed(size(), 0);  // chunks that may be written, by destination
  int64_t consumed = 0;
  Control& own = group_.control(rank());
  // A rank that receives nothing is done at once, and so are its senders.
  const auto source_done = [&](int r) {
    return Progress::chunks(group_.done(rank(), r).load(std::memory_order_acquire), sequence_);
  };
  const auto chunk_arrived = [&] {
    for (int r = 0; r < size(); ++r)
      if (static_cast<int64_t>(source_done(r)) <= consumed) return false;
    return true;
  };
  const auto may_send = [&] {
    bool more = false;
    for (int d = 0; d < size(); ++d) {
      const uint64_t credit = Progress::chunks(group_.control(d).credit.load(std::memory_order_acquire), sequence_);
      allowed[d] = std::min<int64_t>(regions[d].num_chunks(), regions[d].num_buffers + credit);
      more |= allowed[d] > sent[d];
    }
    return more;
  };
  uint64_t bytes = 0;  // of all ranks
  for (const Region& region : regions)
    bytes += std::min(region.num_slots, region.num_buffers * region.slots_per_chunk) * row_bytes;
  const bool past_caches = bytes > cached_bytes();
  CopyRow* const copy = copy_row(past_caches);
  const auto push = [&] {
    int64_t first = pending.count(), end = 0;
    for (int d = 0; d < size(); ++d)
      if (sent[d] < allowed[d]) {
        first = std::min(first, sent[d]);
        end = std::max(end, allowed[d]);
      }
    for (int64_t chunk = first; chunk < end; ++chunk)
      for (const Entry& entry : pending.of(chunk)) {
        if (chunk < sent[entry.dest] || chunk >= allowed[entry.dest]) continue;
        const Region& region = regions[entry.dest];
        const int64_t slot = entry.slot - chunk * region.slots_per_chunk;
        std::byte* base = group_.address(entry.dest, region.chunk(chunk));
        copy(base + slot * row_bytes, write(entry, base + region.metas + slot * meta_bytes), row_bytes);
      }
    copies_done(past_caches);
  };
  const auto report = [&](int d) {
    const bool all = sent[d] == regions[d].num_chunks();
    group_.done(d, rank()).store(Progress::encode(sequence_, all ? Progress::kAll : sent[d]),
                                 std::memory_order_release);
    group_.control(d).bell.ring();
  };

  for (int d = 0; d < size(); ++d)
    if (regions[d].num_chunks() == 0) report(d);
  while (true) {
    if (may_send()) {
      stopwatch_.enter(Phase::copy);
      push();
      for (int d = 0; d < size(); ++d)
        if (sent[d] < allowed[d]) {
          sent[d] = allowed[d];
          report(d);
        }
    }
    while (consumed < mine.num_chunks() && chunk_arrived()) {
      const int64_t first = consumed * mine.slots_per_chunk;
      std::byte* rows = group_.address(rank(), mine.chunk(consumed));
      stopwatch_.enter(Phase::reduce);
      consume(first, std::min(first + mine.slots_per_chunk, mine.num_slots), rows, rows + mine.metas);
      own.credit.store(Progress::encode(sequence_, ++consumed), std::memory_order_release);
      if (mine.num_chunks() > mine.num_buffers) group_.ring_all();
    }
    const auto unsent = [&](int d) { return sent[d] < regions[d].num_chunks(); };
    const auto missing = [&](int r) {
      return unsent(r) || (consumed < mine.num_chunks() && static_cast<int64_t>(source_done(r)) <= consumed);
    };
    const bool all_sent = [&] {
      for (int d = 0; d < size(); ++d)
        if (unsent(d)) return false;
      return true;
    }();
    if (all_sent && consumed == mine.num_chunks()) {
      stopwatch_.enter(Phase::finish);
      return;
    }
    wait(
        consumed < mine.num_chunks() ? "to send its rows" : "to take rows",
        [&] { return may_send() || (consumed < mine.num_chunks() && chunk_arrived()); }, missing, missing);
  }
}

}  // namespace deep_ep
