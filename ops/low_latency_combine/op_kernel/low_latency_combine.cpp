// low_latency_combine: the experts' ranks send what they have for a token, unasked, and its rank adds it up.
//
// Some blocks gather, the others push. A row that is the only one of its token at a rank goes as it is, and is weighted
// where it arrives. Of several rows their weighted sum goes, once the token's rank has said which rows and weights they
// are. Each has a place and a mark in the window of the token's rank: the mark follows it, and says that it has
// arrived.
#include "exchange.h"
#include "rows.h"

namespace deep_ep {

template <typename T>
class LowLatencyCombine {
 public:
  __aicore__ LowLatencyCombine() {}

  __aicore__ void init(GM_ADDR x, GM_ADDR topk_idx, GM_ADDR topk_weights, GM_ADDR recv_src_idx, GM_ADDR layout_range,
                       GM_ADDR send_head, GM_ADDR windows, GM_ADDR combined, GM_ADDR workspace, const Tiling& tiling) {
    tiling_ = &tiling;
    x_ = x;
    topk_idx_ = topk_idx;
    topk_weights_ = topk_weights;
    recv_src_idx_ = recv_src_idx;
    layout_range_ = layout_range;
    send_head_ = send_head;
    combined_ = combined;
    exchange_.init(pipe_, tiling, windows, workspace, Op::low_latency_combine);
    places_of_ = PlaceMap::of(tiling);
    const Work& work = tiling.work;
    local_experts_ = work.experts / work.ranks;

    const int64_t blocks = GetBlockNum();
    gatherers_ = blocks / 4 > 0 ? blocks / 4 : 1;
    pushers_ = blocks > gatherers_ ? blocks - gatherers_ : 1;
    gathers_ = GetBlockIdx() < gatherers_;
    pusher_ = blocks > gatherers_ ? GetBlockIdx() - gatherers_ : 0;
    parts_ = pushers_ / common_divisor(pushers_, work.ranks);
    units_ = work.ranks * parts_ / pushers_;

    id_stride_ = align(work.top_k * sizeof(int64_t)) / sizeof(int64_t);
    word_stride_ = align(work.top_k * sizeof(int32_t)) / sizeof(int32_t);
    ask_stride_ = tiling.record_bytes / sizeof(int32_t);
    ranks_.init(pipe_, tiling.chunk_tokens * id_stride_);
    heads_.init(pipe_, tiling.chunk_tokens * word_stride_);
    weights_.init(pipe_, tiling.chunk_tokens * word_stride_);
    asks_.init(pipe_, tiling.chunk_tokens * ask_stride_);
    targets_.init(pipe_, tiling.chunk_tokens);
    places_.init(pipe_, tiling);
    staged_words_ = tiling.chunk_tokens * work.top_k * kStagedWords;
    staged_.init(pipe_, staged_words_);
    ends_.init(pipe_, tiling.table_bytes / sizeof(int32_t));
    const int64_t words = (Tiling::kTables - 1 + 2 * tiling.table_batch) * tiling.table_bytes / sizeof(int32_t);
    const int64_t all = (work.max_tokens + parts_ - 1) / parts_, most = words / kEntryWords / units_;
    of_unit_ = all < most ? all : most;
    entries_.init(pipe_, units_ * of_unit_ * kEntryWords);
    mark_.init(pipe_, kMarkWords);
    rows_.init(pipe_, tiling);
  }

  __aicore__ void process() {
    if (exchange_.has_failed_before()) return;
    exchange_.begin(places_of_.bytes());
    if (gathers_) ask();
    if (pusher_ >= 0) push();
    if (gathers_) gather();
    exchange_.tell();
    all_blocks();
    exchange_.close();
  }

 private:
  static constexpr int64_t kStagedWords = 3 * Tiling::kAlignment / sizeof(int32_t);  // for each (token, k) of a chunk
  static constexpr int64_t kEntryWords = 2, kMarkWords = Tiling::kAlignment / sizeof(int32_t);
  static constexpr int64_t kSourceBytes = 3 * sizeof(int32_t);
  static constexpr int32_t kSeveral = -1;

  __aicore__ static int64_t common_divisor(int64_t a, int64_t b) {
    while (b != 0) {
      const int64_t rest = a % b;
      a = b;
      b = rest;
    }
    return a;
  }

  // What gathers: each of these blocks has every so many-th token.

  __aicore__ Chunk own_tokens() const {
    const int64_t tokens = tiling_->work.tokens, first = GetBlockIdx();
    return {0, first < tokens ? (tokens - first - 1) / gatherers_ + 1 : 0, tiling_->chunk_tokens};
  }
  __aicore__ int64_t token(int64_t own) const { return GetBlockIdx() + own * gatherers_; }

  // Ranks, rows and weights of a chunk's tokens.
  __aicore__ void read(const Chunk& chunk) {
    const Work& work = tiling_->work;
    const int64_t K = work.top_k, first = token(chunk.first) * K, step = gatherers_ * K;
    order<HardEvent::S_MTE2>();
    load_rows(ranks_.tensor(), topk_idx_ + first * sizeof(int64_t), step * sizeof(int64_t), chunk.count(), K);
    load_rows(heads_.tensor(), send_head_ + first * sizeof(int32_t), step * sizeof(int32_t), chunk.count(), K);
    load_rows(weights_.tensor(), topk_weights_ + first * sizeof(float), step * sizeof(float), chunk.count(), K);
    order<HardEvent::MTE2_S>();
    for (int64_t i = 0; i < chunk.count(); ++i)
      for (int64_t k = 0; k < K; ++k) {
        const int64_t id = ranks_.get(i * id_stride_ + k), head = heads_.get(i * word_stride_ + k);
        if (id < -1 || id >= work.experts)
          exchange_.fail(Failure::bad_id, exchange_.rank(), 0, work.experts, id);
        else if (id >= 0 && head >= work.rows)
          exchange_.fail(Failure::bad_row, exchange_.rank(), 0, work.rows, head);
        ranks_.set(i * id_stride_ + k, id < 0 || head < 0 || exchange_.has_failed() ? -1 : id / local_experts_);
      }
  }

  __aicore__ int64_t rank_of(int64_t i, int64_t k) { return ranks_.get(i * id_stride_ + k); }
  // How many of the token's rows are at the rank of row k, if that is the first of them; else 0.
  __aicore__ int64_t rows_with(int64_t i, int64_t k) {
    const int64_t rank = rank_of(i, k);
    if (rank < 0) return 0;
    int64_t count = 0;
    for (int64_t other = 0; other < tiling_->work.top_k; ++other) {
      if (rank_of(i, other) != rank) continue;
      if (other < k) return 0;
      ++count;
    }
    return count;
  }

  // Says of which rows the weighted sum is wanted. Then peers hear that this rank has begun, or that it has failed.
  __aicore__ void ask() {
    for (Chunk chunk = own_tokens(); chunk.any(); chunk.next()) {
      read(chunk);
      int64_t asks = 0;
      for (int64_t i = 0; i < chunk.count(); ++i)
        for (int64_t k = 0; k < tiling_->work.top_k; ++k) {
          if (rows_with(i, k) < 2) continue;
          make_ask(asks, i, k, token(chunk.first + i));
          if (++asks < tiling_->chunk_tokens) continue;
          send(asks);
          asks = 0;
        }
      send(asks);
    }
    exchange_.post();
    exchange_.hear(gatherers_);
    exchange_.raise_some(0, GetBlockIdx(), gatherers_, nullptr);
  }

  // An ask: how many rows, the first k, and of each the row and the bits of the weight.
  __aicore__ void make_ask(int64_t at, int64_t i, int64_t k, int64_t token) {
    const int64_t rank = rank_of(i, k), first = at * ask_stride_;
    int64_t rows = 0;
    for (int64_t other = k; other < tiling_->work.top_k; ++other) {
      if (rank_of(i, other) != rank) continue;
      asks_.set(first + 2 + 2 * rows, heads_.get(i * word_stride_ + other));
      asks_.set(first + 3 + 2 * rows, bits_of(weights_.get(i * word_stride_ + other)));
      ++rows;
    }
    asks_.set(first, static_cast<int32_t>(rows));
    asks_.set(first + 1, static_cast<int32_t>(k));
    targets_.set(at, reinterpret_cast<int64_t>(exchange_.place(rank, places_of_.ask(exchange_.rank(), token))));
  }
  __aicore__ void send(int64_t asks) {
    order<HardEvent::S_MTE3>();
    for (int64_t at = 0; at < asks; ++at)
      store(reinterpret_cast<GM_ADDR>(targets_.get(at)), asks_.tensor()[static_cast<uint32_t>(at * ask_stride_)],
            2 + 2 * asks_.get(at * ask_stride_));
    order<HardEvent::MTE3_S>();
  }

  // Adds up what arrives, token by token, while the rest is on its way.
  __aicore__ void gather() {
    if (!exchange_.have_raised(0, GetBlockIdx(), gatherers_)) return;
    for (Chunk chunk = own_tokens(); chunk.any(); chunk.next()) {
      read(chunk);
      for (int64_t i = 0; i < chunk.count(); ++i) {
        const int64_t token = this->token(chunk.first + i);
        const GlobalTensor<int32_t> marks = exchange_.marks(places_of_.mark(token, 0), places_of_.places);
        places_.clear(i);
        for (int64_t k = 0; k < tiling_->work.top_k; ++k) {
          const int64_t rows = rows_with(i, k);
          if (rows == 0) continue;
          const int64_t place = places_of_.place(k, rank_of(i, k));
          if (!exchange_.is_marked(marks[static_cast<uint64_t>(place)], rank_of(i, k))) return;
          places_.add(i, exchange_.place(exchange_.rank(), places_of_.row(token, place)),
                      bits_of(rows == 1 ? weights_.get(i * word_stride_ + k) : 1.0f));
        }
        rows_.template sum<true>(places_, i, combined_ + token * tiling_->row_bytes);
      }
    }
  }

  // What pushes: each of these blocks has some tokens, every parts_-th, of some sources: its units.

  __aicore__ int64_t number_of(int64_t unit) const { return pusher_ + unit * pushers_; }
  __aicore__ int64_t source_of(int64_t unit) const { return (exchange_.rank() + number_of(unit)) % exchange_.ranks(); }
  __aicore__ int64_t part_of(int64_t unit) const { return number_of(unit) / exchange_.ranks(); }

  __aicore__ void push() {
    const Work& work = tiling_->work;
    if (exchange_.refuses()) return;
    load(ends_.tensor(), layout_range_, work.experts);
    mark_.set(0, exchange_.mark());  // what is loaded, computed and sent before the first mark follows it
    order<HardEvent::MTE2_S>();
    if (ends_.get(work.experts - 1) > work.rows) {
      exchange_.fail(Failure::bad_row, exchange_.rank(), 0, work.rows, ends_.get(work.experts - 1));
      return;
    }
    const int64_t all = (work.max_tokens + parts_ - 1) / parts_;
    for (first_ = 0; first_ < all && !exchange_.refuses(); first_ += of_unit_) {
      find();
      send_rows();
      send_sums();
    }
  }

  // Where a block has come to in the rows of its sources: a pair of a unit and a local expert, and rows of that.
  struct Position {
    int64_t pair, done;
  };

  // entries_: for each of some tokens of each unit, where its row is, and which k; 0 if there is none, kSeveral if
  // there are several.
  __aicore__ void find() {
    order<HardEvent::S_V>();
    Duplicate(entries_.tensor(), 0, static_cast<int32_t>(units_ * of_unit_ * kEntryWords));
    order<HardEvent::V_S>();
    for (Position at{0, 0}; at.pair < units_ * local_experts_;) {
      Position staged = at;
      order<HardEvent::S_MTE2>();
      walk<true>(at);
      order<HardEvent::MTE2_S>();
      walk<false>(staged);
    }
  }

  // Loads of recv_src_idx as much as there is room for, or looks at what has been loaded.
  template <bool kLoads>
  __aicore__ void walk(Position& at) {
    for (int64_t word = 0; at.pair < units_ * local_experts_ && word < staged_words_;) {
      const int64_t unit = at.pair / local_experts_, expert = at.pair % local_experts_;
      const int64_t end = expert * exchange_.ranks() + source_of(unit);
      const int64_t row = (end > 0 ? ends_.get(end - 1) : 0) + at.done, left = ends_.get(end) - row;
      const int64_t most = (staged_words_ - word) / 3, count = left < most ? (left > 0 ? left : 0) : most;
      if constexpr (kLoads) {
        if (count > 0)
          load(staged_.tensor()[static_cast<uint32_t>(word)], recv_src_idx_ + row * kSourceBytes, count * 3);
      } else {
        for (int64_t i = 0; i < count; ++i)
          note(unit, row + i, staged_.get(word + 3 * i + 1), staged_.get(word + 3 * i + 2));
      }
      word += align(count * kSourceBytes) / sizeof(int32_t);
      at = count < left ? Position{at.pair, at.done + count} : Position{at.pair + 1, 0};
    }
  }

  __aicore__ void note(int64_t unit, int64_t row, int64_t token, int32_t k) {
    if (token % parts_ != part_of(unit)) return;
    const int64_t nth = token / parts_ - first_;
    if (nth < 0 || nth >= of_unit_) return;
    const int64_t entry = entry_of(unit, nth);
    entries_.set(entry + 1, k);
    entries_.set(entry, entries_.get(entry) == 0 ? static_cast<int32_t>(row) + 1 : kSeveral);
  }
  __aicore__ int64_t entry_of(int64_t unit, int64_t nth) const { return (unit * of_unit_ + nth) * kEntryWords; }
  __aicore__ int64_t token_of(int64_t unit, int64_t nth) const { return part_of(unit) + (first_ + nth) * parts_; }

  // Rows that are alone.
  __aicore__ void send_rows() {
    for (int64_t nth = 0; nth < of_unit_; ++nth)
      for (int64_t unit = 0; unit < units_; ++unit) {
        const int64_t row = entries_.get(entry_of(unit, nth)) - 1;
        if (row < 0) continue;
        places_.clear(0);
        places_.add(0, x_ + row * tiling_->row_bytes, bits_of(1.0f));
        send_row(0, source_of(unit), token_of(unit, nth), entries_.get(entry_of(unit, nth) + 1));
      }
  }

  // Sums, as their ranks have asked for them.
  __aicore__ void send_sums() {
    int64_t asks = 0;
    for (int64_t nth = 0; nth < of_unit_; ++nth)
      for (int64_t unit = 0; unit < units_; ++unit) {
        if (entries_.get(entry_of(unit, nth)) != kSeveral) continue;
        const int64_t source = source_of(unit), token = token_of(unit, nth);
        if (!exchange_.has_raised(0, source)) return;
        if (asks == 0) order<HardEvent::S_MTE2>();
        load(asks_.tensor()[static_cast<uint32_t>(asks * ask_stride_)],
             exchange_.place(exchange_.rank(), places_of_.ask(source, token)), 2 + 2 * tiling_->work.top_k);
        targets_.set(asks, source << 32 | token);
        if (++asks < tiling_->chunk_tokens) continue;
        answer(asks);
        asks = 0;
      }
    answer(asks);
  }
  __aicore__ void answer(int64_t asks) {
    if (asks == 0) return;
    order<HardEvent::MTE2_S>();
    for (int64_t at = 0; at < asks; ++at) {
      const int64_t first = at * ask_stride_, source = targets_.get(at) >> 32, token = targets_.get(at) & 0xffffffff;
      places_.clear(at);
      for (int64_t i = 0; i < asks_.get(first); ++i) {
        const int64_t row = asks_.get(first + 2 + 2 * i);
        if (row >= tiling_->work.rows) {
          exchange_.fail(Failure::bad_row, source, 0, tiling_->work.rows, row);
          return;
        }
        places_.add(at, x_ + row * tiling_->row_bytes, asks_.get(first + 3 + 2 * i));
      }
      send_row(at, source, token, asks_.get(first + 1));
    }
  }

  // The sum of an item's places, and behind it its mark.
  __aicore__ void send_row(int64_t item, int64_t to, int64_t token, int64_t k) {
    const int64_t place = places_of_.place(k, exchange_.rank());
    rows_.template sum<true>(places_, item, exchange_.place(to, places_of_.row(token, place)));
    PipeBarrier<PIPE_MTE3>();
    store(exchange_.mark(to, places_of_.mark(token, place)), mark_.tensor(), 1);
  }

  const Tiling* tiling_ = nullptr;
  GM_ADDR x_ = nullptr;
  GM_ADDR topk_idx_ = nullptr;
  GM_ADDR topk_weights_ = nullptr;
  GM_ADDR recv_src_idx_ = nullptr;
  GM_ADDR layout_range_ = nullptr;
  GM_ADDR send_head_ = nullptr;
  GM_ADDR combined_ = nullptr;
  PlaceMap places_of_{};
  int64_t local_experts_ = 1;
  int64_t gatherers_ = 1, pushers_ = 1, pusher_ = 0, parts_ = 1, units_ = 1;  // units_: of a block
  int64_t of_unit_ = 1, first_ = 0;  // tokens of a unit that are found at a time, and the first of them
  int64_t id_stride_ = 0, word_stride_ = 0, ask_stride_ = 0, staged_words_ = 0;
  bool gathers_ = false;
  TPipe pipe_;
  Exchange exchange_;
  Array<int64_t> ranks_;  // of (token, k), -1: none
  Array<int32_t> heads_;
  Array<float> weights_;
  Array<int32_t> asks_;
  Array<int64_t> targets_;  // of asks: where they go, or where they are from
  Places places_;
  Array<int32_t> staged_, entries_, mark_;
  Table ends_;  // layout_range
  RowMath<T> rows_;
};

}  // namespace deep_ep

extern "C" __global__ __aicore__ void deep_ep_low_latency_combine(GM_ADDR x, GM_ADDR topk_idx, GM_ADDR topk_weights,
                                                                  GM_ADDR recv_src_idx, GM_ADDR layout_range,
                                                                  GM_ADDR send_head, GM_ADDR windows,
                                                                  GM_ADDR combined_x, GM_ADDR workspace,
                                                                  GM_ADDR tiling_data) {
  DEEP_EP_KERNEL(tiling, tiling_data);
  deep_ep::LowLatencyCombine<DTYPE_X> op;
  op.init(x, topk_idx, topk_weights, recv_src_idx, layout_range, send_head, windows, combined_x, workspace, tiling);
  op.process();
}
