#include "tiling.h"

#include <algorithm>
#include <limits>
#include <type_traits>

#include "error.h"

namespace deep_ep {
namespace {

static_assert(std::is_trivial_v<Tiling> && std::is_standard_layout_v<Tiling> && alignof(Tiling) == 8,
              "the host copies it to the device as bytes");

constexpr int64_t kMaxItems = std::numeric_limits<int32_t>::max();
constexpr int64_t kMinBuffers = 2;       // one is filled while another is sent
constexpr int64_t kMaxBuffers = 4;       // enough for transfers to overlap, and a core has 6 events of a kind
constexpr int64_t kMaxChunkTokens = 64;  // longer transfers of ids gain nothing
constexpr int64_t kMaxFlags = 32;

constexpr int64_t divide_up(int64_t value, int64_t unit) { return (value + unit - 1) / unit; }
constexpr int64_t align(int64_t value, int64_t unit) { return divide_up(value, unit) * unit; }

std::string check(const Work& work, const Soc& soc) {
  if (soc.vector_cores < 1) return str("there must be at least 1 vector core, got ", soc.vector_cores);
  if (work.ranks < 1) return str("num_ranks must be at least 1, got ", work.ranks);
  if (work.experts < 1 || work.experts % work.ranks != 0)
    return str("num_experts must be divisible by num_ranks (", work.ranks, "), got ", work.experts);
  if (work.top_k < 1) return str("topk_idx must have at least 1 column, got ", work.top_k);
  if (work.tokens < 0 || work.tokens > kMaxItems / work.top_k)
    return str("topk_idx must have at most ", kMaxItems, " elements, got [", work.tokens, ", ", work.top_k, "]");
  if (work.rows < 0 || work.rows > kMaxItems) return str("there may be at most ", kMaxItems, " rows, got ", work.rows);
  if (work.max_tokens > 0 && work.tokens > work.max_tokens)
    return str("there may be at most ", work.max_tokens, " tokens, got ", work.tokens);
  if (work.hidden < 0) return str("the hidden size must be known, got ", work.hidden);
  return {};
}

bool is_quantised(const Work& work) { return work.sent_bytes < work.element_bytes; }

// Tiles besides the buffers. Arithmetic: results, and two of fp32. Quantised rows: three of fp32 or int32, one of fp16,
// results, and the buffers of arrived rows, both of int8. Where rows are copied besides, buffers for that.
int64_t other_tiles(const Work& work) {
  if (is_quantised(work)) return (3 * 4 + 2 + Tiling::kResults + kMaxBuffers) / work.element_bytes;
  if (!work.arithmetic) return 0;
  return Tiling::kResults + 2 * 4 / work.element_bytes + (work.copied ? kMaxBuffers : 0);
}

// Tables besides those of Numbers: the dispatches' four; for answers, where each rank's are.
int64_t other_tables(const Work& work) {
  if (work.hidden == 0) return 0;
  return work.arithmetic ? work.answers : 4;
}

// What goes with one token of a chunk: ids, weights and rows per k; a record, and where it is from; a place per
// (token, k) and their number, twice; per k kWordsPerPair times 32 bytes for what is known of a row, a word of an
// answer, and a word of the result. For the layout, a word per rank.
int64_t chunk_bytes_per_token(const Work& work, int64_t record_bytes) {
  constexpr int64_t kWordsPerPair = 3;
  const auto words = [](int64_t bytes, int64_t count) { return align(bytes * count, Tiling::kAlignment); };
  return words(8, work.top_k) + 4 * words(4, work.top_k) + record_bytes + words(8, 1) + words(8, 2 * work.top_k + 1) +
         kWordsPerPair * Tiling::kAlignment * work.top_k + (work.nodes > 0 ? words(4, work.ranks) : 0);
}

}  // namespace

std::string make_tiling(const Work& work, const Soc& soc, Tiling* tiling) {
  *tiling = Tiling{};
  if (std::string error = check(work, soc); !error.empty()) return error;
  Tiling& t = *tiling;
  t.work = work;
  t.blocks = std::clamp(std::max(work.tokens, work.rows), int64_t{1}, soc.vector_cores);
  t.tokens = Split::of(work.tokens, t.blocks);

  t.table_ranks = align(4 * work.experts, Tiling::kAlignment) / 4;
  t.table_words = t.table_ranks + work.ranks;
  t.table_bytes = align(std::max(4 * t.table_words, 8 * work.experts / work.ranks), Tiling::kAlignment);
  t.record_bytes = align(4 * (is_quantised(work) + 1 + 3 * work.top_k), Tiling::kAlignment);
  const int64_t per_token = chunk_bytes_per_token(work, t.record_bytes);
  const int64_t other_tiles = deep_ep::other_tiles(work);
  const int64_t smallest_tiles = work.hidden == 0 ? 0 : Tiling::kBlockBytes * (kMinBuffers + other_tiles);
  t.flags = std::clamp(divide_up(work.ranks, 2), int64_t{1}, kMaxFlags);
  const int64_t words = Tiling::kStatusBytes * (2 + soc.vector_cores) + Tiling::kFlagBytes * t.flags +
                        2 * align(4 * work.ranks, Tiling::kAlignment);
  // Two of them are for tables that are read.
  const int64_t tables = Tiling::kTables + other_tables(work) + 2;
  int64_t free = soc.unified_buffer_bytes - words - tables * t.table_bytes - smallest_tiles;
  if (free < per_token)
    return str("num_experts = ", work.experts, " with ", work.top_k, " ids per token needs ", per_token - free,
               " bytes more than the unified buffer has: ", soc.unified_buffer_bytes);
  const int64_t more_tables = (free - per_token) / (work.arithmetic ? 16 : 4) / (2 * t.table_bytes);
  t.table_batch = 1 + std::min(more_tables, std::max(work.ranks, t.blocks) - 1);
  free -= 2 * (t.table_batch - 1) * t.table_bytes;
  t.chunk_tokens = std::clamp(free / 10 / per_token, int64_t{1}, kMaxChunkTokens);

  if (work.hidden > 0) {
    const int64_t for_tiles = smallest_tiles + free - t.chunk_tokens * per_token;
    const int64_t largest = for_tiles / (kMinBuffers + other_tiles) / Tiling::kBlockBytes * Tiling::kBlockBytes;
    t.row_bytes = work.hidden * work.element_bytes;
    t.answer = align(work.hidden * work.sent_bytes, Tiling::kAlignment);
    t.row_stride = align(t.answer + (work.answers ? 4 * work.top_k : 0), Tiling::kBlockBytes);
    t.tile_bytes = align(divide_up(t.row_bytes, divide_up(t.row_bytes, largest)), Tiling::kBlockBytes);
    t.tiles = divide_up(t.row_bytes, t.tile_bytes);
    t.last_tile_bytes = t.row_bytes - (t.tiles - 1) * t.tile_bytes;
    t.buffers = std::min(for_tiles / t.tile_bytes - other_tiles, kMaxBuffers);
  }

  t.count_stride = align(4 * t.table_words, Tiling::kBlockBytes);
  t.failures = 2 * t.blocks * t.count_stride;
  t.shared = t.failures + align(2 * t.blocks * Tiling::kStatusBytes, Tiling::kBlockBytes);
  t.workspace_bytes = t.shared + 2 * t.count_stride;
  return {};
}

}  // namespace deep_ep
