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
constexpr int64_t kMinBuffers = 2;    // one is filled while another is sent
constexpr int64_t kMaxBuffers = 8;    // enough for transfers of short rows to overlap
constexpr int64_t kMaxIdTokens = 64;  // longer transfers of ids gain nothing
constexpr int64_t kIdBytes = 16;      // per (token, k): id, weight, row

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
  if (work.hidden < 0) return str("the hidden size must be known, got ", work.hidden);
  return {};
}

Split split(int64_t items, int64_t blocks) { return {items / blocks, items % blocks}; }

}  // namespace

std::string make_tiling(const Work& work, const Soc& soc, Tiling* tiling) {
  *tiling = Tiling{};
  if (std::string error = check(work, soc); !error.empty()) return error;
  Tiling& t = *tiling;
  t.work = work;
  t.blocks = std::clamp(std::max(work.tokens, work.rows), int64_t{1}, soc.vector_cores);
  t.tokens = split(work.tokens, t.blocks);
  t.rows = split(work.rows, t.blocks);

  t.table_bytes = align(4 * work.experts, Tiling::kAlignment);
  const int64_t token_ids = align(kIdBytes * work.top_k, Tiling::kAlignment);
  const int64_t per_tile_byte = work.arithmetic ? 2 * 4 / work.element_bytes : 0;  // two fp32 tiles
  const int64_t smallest_tiles = work.hidden == 0 ? 0 : Tiling::kBlockBytes * (kMinBuffers + per_tile_byte);
  const int64_t free = soc.unified_buffer_bytes - Tiling::kTables * t.table_bytes - smallest_tiles;
  if (free < token_ids)
    return str("num_experts = ", work.experts, " with ", work.top_k, " ids per token needs ", token_ids - free,
               " bytes more than the unified buffer has: ", soc.unified_buffer_bytes);
  t.id_tokens = std::clamp(free / 8 / token_ids, int64_t{1}, kMaxIdTokens);
  t.id_bytes = t.id_tokens * token_ids;

  if (work.hidden > 0) {
    const int64_t for_tiles = smallest_tiles + free - t.id_bytes;
    const int64_t largest = for_tiles / (kMinBuffers + per_tile_byte) / Tiling::kBlockBytes * Tiling::kBlockBytes;
    t.row_bytes = work.hidden * work.element_bytes;
    t.row_stride = align(t.row_bytes, Tiling::kBlockBytes);
    t.tile_bytes = align(divide_up(t.row_bytes, divide_up(t.row_bytes, largest)), Tiling::kBlockBytes);
    t.tiles = divide_up(t.row_bytes, t.tile_bytes);
    t.last_tile_bytes = t.row_bytes - (t.tiles - 1) * t.tile_bytes;
    t.buffers = std::min(for_tiles / t.tile_bytes - per_tile_byte, kMaxBuffers);
  }

  t.count_stride = align(4 * work.experts, Tiling::kBlockBytes);
  t.block_counts = 0;
  t.rank_counts = t.block_counts + t.blocks * t.count_stride;
  t.sync = t.rank_counts + work.ranks * t.count_stride;
  t.workspace_bytes = t.sync + align(t.blocks * Tiling::kAlignment, Tiling::kBlockBytes);
  return {};
}

}  // namespace deep_ep
