// Rows on their way: which ones, and where at their receivers they lie. What moves them is Operation::exchange.
#pragma once

#include <cstdint>

namespace deep_ep {

// Where the rows that a rank receives in one operation lie: slots 0..num_slots-1, in chunks. Chunk c lies in
// buffer c % num_buffers; within a chunk, all rows come first, then all metas.
struct Region {
  uint64_t offset = 0;
  uint64_t metas = 0;  // of the first buffer, relative to offset
  uint64_t stride = 0;
  int64_t num_slots = 0;
  int64_t slots_per_chunk = 1;
  int num_buffers = 1;

  int64_t num_chunks() const { return (num_slots + slots_per_chunk - 1) / slots_per_chunk; }
  uint64_t chunk(int64_t index) const { return offset + (index % num_buffers) * stride; }
};

// One row to send: from source row `row` to `slot` of rank `dest`.
struct Entry {
  int32_t dest;
  int32_t slot;
  int32_t row;
};

}  // namespace deep_ep
