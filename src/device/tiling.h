// How a kernel's work is split over vector cores and passes through the unified buffer: plain arithmetic that the
// operator definitions (ops/), the twin and the kernels share.
//
// T tokens · H hidden · K top-k · E experts · R ranks · L = E/R local experts · N expert rows ·
// M num_max_dispatch_tokens_per_rank.
#pragma once

#include <cstdint>

// CANN's compiler for kernels takes no <string>, and wants to know what kernels call.
#if defined(__CCE_AICORE__) || defined(__NPU_ARCH__)
#define DEEP_EP_DEVICE __aicore__
#else
#define DEEP_EP_DEVICE
#define DEEP_EP_HOST
#include <string>
#endif

namespace deep_ep {

// What the platform says of the SoC. Peers may have other numbers: nothing that they read may depend on these.
struct Soc {
  int64_t vector_cores;          // of this rank
  int64_t unified_buffer_bytes;  // of a core, as far as kernels may use it
};

// A launch, in numbers.
struct Work {
  int64_t tokens;         // T
  int64_t max_tokens;     // M, of any rank; 0: rows go in no slots
  int64_t hidden;         // H; 0: no rows are moved
  int64_t top_k;          // K
  int64_t experts;        // E
  int64_t ranks;          // R
  int64_t nodes;          // S; 0: of no interest
  int64_t rows;           // N; in exact mode the most that may arrive
  int64_t element_bytes;  // of a row's elements: 2 or 4
  int64_t sent_bytes;     // of the same on their way: 1 if they are quantised
  int64_t copied;         // 1: rows are copied as they are
  int64_t arithmetic;     // 1: rows are weighted, summed up or multiplied in fp32
  int64_t answers;        // 1: each record is answered with up to K words
  int64_t zero_unused;    // 1: rows that hold nothing become 0
};

// Items 0..n-1 in consecutive parts, one per block, that differ by at most one item; the longer ones come first.
struct Split {
  int64_t size;    // items of a block,
  int64_t longer;  // and one more for so many blocks

  DEEP_EP_DEVICE static constexpr Split of(int64_t items, int64_t blocks) { return {items / blocks, items % blocks}; }
  DEEP_EP_DEVICE constexpr int64_t begin(int64_t block) const {
    return block * size + (block < longer ? block : longer);
  }
  DEEP_EP_DEVICE constexpr int64_t end(int64_t block) const { return begin(block + 1); }
};

// What a kernel gets. A row of H elements goes through `buffers` buffers of the unified buffer in `tiles` pieces of
// tile_bytes; the last piece has last_tile_bytes.
//
//   unified buffer: [ flags, a mark, the status of each block | tables | what goes with a chunk of tokens |
//                     buffers x tile | more tiles and tables, as it says in tiling.cpp ]
//   workspace:      [ counts of each block, twice | status of each block, twice | tables of all blocks ]
struct Tiling {
  static constexpr int64_t kBlockBytes = 512;  // the unit in which remote writes arrive, and what is fast to move
  static constexpr int64_t kAlignment = 32;    // of everything in the unified buffer
  static constexpr int64_t kTables = 4;        // int32 [E], then [R] each, or int64 [L]
  static constexpr int64_t kResults = 2;       // tiles: one is filled while another is sent
  static constexpr int64_t kStatusBytes = 32;  // what a block says if it fails
  static constexpr int64_t kFlagBytes = 64;

  Work work;
  int64_t blocks;
  Split tokens;  // over blocks

  int64_t row_bytes;        // H elements, without padding
  int64_t row_stride;       // of rows in slots, with what answers them: a multiple of kBlockBytes
  int64_t answer;           // where in it the answer begins: a multiple of kAlignment
  int64_t tile_bytes;       // a multiple of kBlockBytes
  int64_t last_tile_bytes;  // without padding
  int64_t tiles;
  int64_t buffers;  // at least 2: one is filled while another is sent

  int64_t table_ranks;   // where in a table the ranks begin: a multiple of kAlignment bytes
  int64_t table_words;   // experts and ranks
  int64_t table_bytes;   // of one table
  int64_t table_batch;   // tables that are read at a time
  int64_t chunk_tokens;  // tokens whose ids, records and the like are in the unified buffer at a time
  int64_t record_bytes;  // int32: a scale, the token, and three words per k; a multiple of kAlignment

  int64_t count_stride;  // of a block's counts, a table
  int64_t flags;         // that are raised at a time, and half of those that are read
  int64_t failures;      // offsets in the workspace
  int64_t shared;        // two tables
  int64_t workspace_bytes;
};

#ifdef DEEP_EP_HOST
// Fills `tiling`. Returns what does not fit, or nothing: kTables tables of E + R and a chunk of one token must leave
// room for the smallest tiles, which bounds E and K; H has no bound. What fits also fits with a smaller E, K or H, and
// with more unified buffer.
std::string make_tiling(const Work& work, const Soc& soc, Tiling* tiling);
#endif

}  // namespace deep_ep
