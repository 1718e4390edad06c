// The dispatches: a token's row goes once to every rank of its experts, with a record of what it is for; the receiver
// copies it to the row of each expert. The record's numbers count the rows of this source for the expert, over all
// rounds.
#pragma once

#include "messages.h"
#include "rows.h"

namespace deep_ep {

// What a dispatch writes. nullptr: it has no such output.
struct DispatchOutputs {
  GM_ADDR recv_x;
  GM_ADDR recv_scales;
  GM_ADDR recv_topk_idx;
  GM_ADDR recv_topk_weights;
  GM_ADDR recv_count;
  GM_ADDR num_dropped;
  GM_ADDR rank_prefix;
  GM_ADDR channel_prefix;
  GM_ADDR recv_channel_prefix;  // layout_range in low latency
  GM_ADDR recv_src_idx;
  GM_ADDR send_head;
  GM_ADDR shapes;  // of all outputs, where N is not known before; then no row may be dropped
};

// Rows: PlainRows or Int8Rows, which have scales. kIsNormal: with all other outputs.
template <typename Rows, bool kIsNormal>
class Dispatch {
 public:
  __aicore__ Dispatch() {}
  __aicore__ void init(Op op, GM_ADDR x, GM_ADDR topk_idx, GM_ADDR topk_weights, GM_ADDR windows,
                       const DispatchOutputs& outputs, GM_ADDR workspace, const Tiling& tiling) {
    tiling_ = &tiling;
    x_ = x;
    out_ = outputs;
    recv_row_bytes_ = tiling.work.hidden * tiling.work.sent_bytes;
    shared_ = workspace + tiling.shared;
    exchange_.init(pipe_, tiling, windows, workspace, op, outputs.shapes != nullptr);
    counts_.init(pipe_, tiling, workspace, topk_idx);
    send_head_.init(pipe_, tiling, outputs.send_head);
    messages_.init(pipe_, tiling, exchange_, counts_, topk_weights);
    known_.init(pipe_, tiling.chunk_tokens * tiling.work.top_k * kKnownWords);
    const int64_t words = tiling.table_bytes / sizeof(int32_t);
    sent_.init(pipe_, words);
    first_.init(pipe_, words);
    ends_.init(pipe_, words);
    delivered_to_.init(pipe_, words);
    rows_.init(pipe_, tiling);
    local_experts_ = tiling.work.experts / tiling.work.ranks;
  }

  __aicore__ void process() {
    if (!exchange_.has_failed_before()) exchange();
    if (out_.shapes != nullptr && GetBlockIdx() == 0) write_shapes();
  }

 private:
  // Words of known_ per row: its source; then, each aligned, its expert and weight.
  static constexpr int64_t kUnit = Tiling::kAlignment / sizeof(int32_t);
  static constexpr int64_t kExpert = kUnit, kWeight = 2 * kUnit, kKnownWords = 3 * kUnit;
  static constexpr int64_t kSourceBytes = 3 * sizeof(int32_t);

  __aicore__ void exchange() {
    exchange_.begin();
    clear(sent_, tiling_->table_words);
    if constexpr (kIsNormal) clear_columns();
    bool is_first = true;
    do {
      round(is_first);
      is_first = false;
    } while (!exchange_.has_failed() && exchange_.next_round());
    if (!exchange_.has_failed() && out_.shapes == nullptr) clear_rest();
    exchange_.finish();
  }

  __aicore__ void round(bool is_first) {
    if (counts_.count(exchange_)) {
      if (is_first) {  // and all tokens have been counted
        counts_.send(exchange_);
        if constexpr (kIsNormal) describe_sent();
      }
      if (counts_.fit(exchange_)) send();
    }
    exchange_.raise_all(0, counts_.numbers());
    if (!exchange_.all_raised(0)) return;
    if (is_first) arrange();
    if (exchange_.has_failed()) return;
    answer();
    for (Share share(exchange_); share.any();) expand(share);
  }

  // Rows and records of this block's tokens, to the ranks of their experts.
  __aicore__ void send() {
    Numbers& numbers = counts_.numbers();
    const int32_t experts = static_cast<int32_t>(tiling_->work.experts);
    Add(numbers.before().tensor(), numbers.before().tensor(), sent_.tensor(), experts);
    PipeBarrier<PIPE_V>();
    Add(sent_.tensor(), sent_.tensor(), numbers.total().tensor(), experts);
    numbers.begin_again();
    for (Chunk chunk = exchange_.own_tokens(); chunk.any(); chunk.next()) {
      messages_.make(chunk);
      for (int64_t i = 0; i < chunk.count(); ++i) {
        const int32_t scale = rows_.send(x_ + (chunk.first + i) * tiling_->row_bytes, messages_.places(), i);
        if constexpr (Rows::kHasScales) messages_.set_extra(i, scale);
      }
      messages_.send(chunk);
    }
  }

  // The counts of all ranks have arrived, and with them where rows go. Each block finds that out for the experts of
  // some ranks, and tells all: first_ becomes the first row of this rank for each expert; ends_, for each of this
  // rank's experts and each source, where the rows of that source end.
  __aicore__ void arrange() {
    const int64_t experts = tiling_->work.experts;
    const Split split = Split::of(exchange_.ranks(), GetBlockNum());
    const int64_t begin = split.begin(GetBlockIdx()), end = split.end(GetBlockIdx());
    if (begin < end) arrange(begin, end);
    if (!exchange_.agree()) return;
    load(first_.tensor(), shared_, experts);
    load(ends_.tensor(), shared_ + tiling_->count_stride, experts);
    order<HardEvent::MTE2_S>();
    delivered_ = clip(ends_.get(experts - 1), exchange_.rank());
    if (GetBlockIdx() + 1 == GetBlockNum()) describe_received();
  }

  // For the experts of the ranks begin..end-1. Tables begin with theirs.
  __aicore__ void arrange(int64_t begin, int64_t end) {
    const int64_t first = begin * local_experts_, experts = (end - begin) * local_experts_;
    const bool has_own = begin <= exchange_.rank() && exchange_.rank() < end;
    Table& base = counts_.numbers().total();
    Table& next = counts_.numbers().next();
    counts_.receive(exchange_, first, experts);
    for (int64_t rank = begin; rank < end; ++rank) first_row_of_experts(base, (rank - begin) * local_experts_, rank);
    order<HardEvent::S_V>();
    Adds(next.tensor(), base.tensor(), 0, static_cast<int32_t>(experts));
    PipeBarrier<PIPE_V>();
    for (TableReader& reader = counts_.from_all(exchange_, first, experts); reader.any(); reader.next()) {
      const int64_t source = reader.number();
      if (source == exchange_.rank()) Adds(first_.tensor(), next.tensor(), 0, static_cast<int32_t>(experts));
      PipeBarrier<PIPE_V>();
      counts_.add(reader, next, experts);
      if (!kIsNormal && !has_own) continue;
      order<HardEvent::V_S>();
      for (int64_t l = 0; has_own && l < local_experts_; ++l)
        ends_.set(l * exchange_.ranks() + source, next.get((exchange_.rank() - begin) * local_experts_ + l));
      if constexpr (kIsNormal) describe_delivered(source, begin, end - begin, base, next);
      order<HardEvent::S_V>();
    }
    order<HardEvent::V_MTE3>();
    store(shared_ + first * sizeof(int32_t), first_.tensor(), experts);
    if (has_own) store(shared_ + tiling_->count_stride, ends_.tensor(), tiling_->work.experts);
  }

  // From rows per expert to the first row of each expert, of the experts of `rank`, which are in the table from `at`
  // on.
  __aicore__ void first_row_of_experts(Table& table, int64_t at, int64_t rank) {
    int32_t row = 0;
    for (int64_t expert = at; expert < at + local_experts_; ++expert) {
      const int32_t count = table.get(expert);
      table.set(expert, row);
      row += count;
    }
    if (row > exchange_.room(rank) && exchange_.must_fit(rank))
      exchange_.fail(Failure::no_room, rank, 0, exchange_.room(rank), row);
  }

  // Rows that `rank` has no memory for are dropped.
  __aicore__ int32_t clip(int32_t row, int64_t rank) {
    const int32_t room = exchange_.room(rank);
    return row < room ? row : room;
  }

  // Which row each (token, k) has got, if it was not one too many.
  __aicore__ void answer() {
    Numbers& numbers = counts_.numbers();
    Add(numbers.next().tensor(), numbers.before().tensor(), first_.tensor(),
        static_cast<int32_t>(tiling_->work.experts));
    order<HardEvent::V_S>();
    for (Chunk chunk = exchange_.own_tokens(); chunk.any(); chunk.next()) {
      counts_.read(chunk);
      order<HardEvent::MTE2_S>();
      for (int64_t i = 0; i < chunk.count(); ++i)
        for (int64_t k = 0; k < tiling_->work.top_k; ++k) {
          const int32_t expert = counts_.expert(i, k);
          const int32_t row = expert < 0 ? -1 : numbers.of_expert(expert);
          send_head_.set(i, k, expert >= 0 && row < exchange_.room(numbers.rank_of(expert)) ? row : -1);
        }
      order<HardEvent::S_MTE3>();
      send_head_.store(chunk);
      order<HardEvent::MTE3_S>();
    }
  }

  __aicore__ void expand(Share& share) {
    const int64_t count = messages_.load(share);
    Places& places = messages_.places();
    for (int64_t i = 0; i < count; ++i) {
      const int64_t source = messages_.source(i);
      places.clear(i);
      for (int64_t k = 0; k < tiling_->work.top_k; ++k) {
        const int64_t l = messages_.local_expert(i, k);
        if (l < 0) continue;
        const int64_t at = l * exchange_.ranks() + source, row = (at > 0 ? ends_.get(at - 1) : 0) + messages_.row(i, k);
        if (row >= tiling_->work.rows) continue;
        const int64_t words = known_of(i, places.count(i));
        known_.set(words, static_cast<int32_t>(source));
        known_.set(words + 1, messages_.token(i));
        known_.set(words + 2, static_cast<int32_t>(k));
        if constexpr (kIsNormal) {
          known_.set(words + kExpert, static_cast<int32_t>(l));
          known_.set(words + kExpert + 1, 0);  // of int64
          known_.set(words + kWeight, messages_.weight(i, k));
        }
        places.add(i, out_.recv_x + row * recv_row_bytes_, row);
      }
    }
    order<HardEvent::S_MTE3>();
    for (int64_t i = 0; i < count; ++i) {
      for (int64_t n = 0; n < places.count(i); ++n) {
        const int64_t row = places.with(i, n);
        describe_row(row, known_of(i, n));
        if constexpr (Rows::kHasScales) store(out_.recv_scales + row * sizeof(float), messages_.extra(i), 1);
      }
      GM_ADDR slot = exchange_.slot(exchange_.rank(), messages_.source(i));
      rows_.copy(exchange_.row(slot, messages_.number(i)), places, i);
    }
    order<HardEvent::MTE3_S>();
  }

  __aicore__ int64_t known_of(int64_t i, int64_t n) const { return (i * tiling_->work.top_k + n) * kKnownWords; }
  __aicore__ LocalTensor<int32_t> known(int64_t words) { return known_.tensor()[static_cast<uint32_t>(words)]; }

  __aicore__ void describe_row(int64_t row, int64_t words) {
    store(out_.recv_src_idx + row * kSourceBytes, known(words), 3);
    if constexpr (kIsNormal) {
      const int64_t at = row * tiling_->work.top_k + known_.get(words + 2);
      store(out_.recv_topk_idx + at * sizeof(int64_t), known(words + kExpert), 2);
      store(out_.recv_topk_weights + at * sizeof(float), known(words + kWeight), 1);
    }
  }

  // Before rows are described: no expert and no weight in any column. All blocks meet in between.
  __aicore__ void clear_columns() {
    const Split split = Split::of(tiling_->work.rows, GetBlockNum());
    const int64_t first = split.begin(GetBlockIdx()) * tiling_->work.top_k;
    const int64_t count = split.end(GetBlockIdx()) * tiling_->work.top_k - first;
    rows_.fill(out_.recv_topk_idx + first * sizeof(int64_t), count * sizeof(int64_t), -1);
    rows_.fill(out_.recv_topk_weights + first * sizeof(float), count * sizeof(float), 0);
  }

  // Rows that hold nothing, each block its share of them.
  __aicore__ void clear_rest() {
    const Split split = Split::of(tiling_->work.rows - delivered_, GetBlockNum());
    const int64_t first = delivered_ + split.begin(GetBlockIdx());
    const int64_t count = split.end(GetBlockIdx()) - split.begin(GetBlockIdx());
    rows_.fill(out_.recv_src_idx + first * kSourceBytes, count * kSourceBytes, -1);
    if (!tiling_->work.zero_unused) return;
    rows_.fill(out_.recv_x + first * recv_row_bytes_, count * recv_row_bytes_, 0);
    if constexpr (Rows::kHasScales) rows_.fill(out_.recv_scales + first * sizeof(float), count * sizeof(float), 0);
  }

  // channel_prefix_matrix: rows of this rank for the experts of each rank, running.
  __aicore__ void describe_sent() {
    if (GetBlockIdx() != 0) return;
    Table& sums = counts_.numbers().next();
    int32_t sum = 0;
    for (int64_t expert = 0; expert < tiling_->work.experts; ++expert) {
      sum = (expert % local_experts_ == 0 ? 0 : sum) + counts_.numbers().total().get(expert);
      sums.set(expert, sum);
    }
    write(out_.channel_prefix, sums.tensor(), tiling_->work.experts);
  }

  // Of some ranks' columns of rank_prefix_matrix the row of `source`: rows that ranks up to it deliver to each of them,
  // of which those for an expert begin at `base` and end at `next`. As many rows as there is room for go together.
  __aicore__ void describe_delivered(int64_t source, int64_t first, int64_t ranks, Table& base, Table& next) {
    const int64_t words = align(ranks * sizeof(int32_t)) / sizeof(int32_t);
    const int64_t most = tiling_->table_bytes / sizeof(int32_t) / words, at = source % most;
    for (int64_t rank = 0; rank < ranks; ++rank) {
      int32_t sum = 0;
      for (int64_t expert = rank * local_experts_; expert < (rank + 1) * local_experts_; ++expert)
        sum += clip(next.get(expert), first + rank) - clip(base.get(expert), first + rank);
      delivered_to_.set(at * words + rank, sum);
    }
    if (at + 1 < most && source + 1 < exchange_.ranks()) return;
    const int64_t R = exchange_.ranks();
    order<HardEvent::S_MTE3>();
    store_rows(out_.rank_prefix + ((source - at) * R + first) * sizeof(int32_t), R * sizeof(int32_t),
               delivered_to_.tensor(), at + 1, ranks);
    order<HardEvent::MTE3_S>();
  }

  // recv_channel_prefix_matrix or layout_range, the rows of each expert, and how many were dropped.
  __aicore__ void describe_received() {
    const int64_t R = exchange_.ranks();
    LocalTensor<int64_t> counts = counts_.numbers().next().tensor().ReinterpretCast<int64_t>();
    int64_t begin = 0;
    for (int64_t l = 0; l < local_experts_; ++l) {
      const int64_t end = clip(ends_.get((l + 1) * R - 1), exchange_.rank());
      counts.SetValue(static_cast<uint32_t>(l), end - begin);
      begin = end;
    }
    write(out_.recv_channel_prefix, ends_.tensor(), local_experts_ * R);
    write(out_.recv_count, counts, local_experts_);
    if constexpr (kIsNormal) {
      counts.SetValue(0, ends_.get(local_experts_ * R - 1) - delivered_);
      write(out_.num_dropped, counts, 1);
    }
  }

  // As GE reads them: for every output, in order, the number of dimensions and 8 sizes. Bit 31 of the number: these
  // words have 64 bits.
  __aicore__ void write_shapes() {
    constexpr int64_t kWide = int64_t{1} << 31, kWords = 9, kOutputs = 11, kScales = 1;
    const int64_t N = exchange_.has_failed() ? 0 : delivered_, H = tiling_->work.hidden, K = tiling_->work.top_k;
    const int64_t R = exchange_.ranks(), L = local_experts_;
    const int64_t shapes[kOutputs][3] = {{2, N, H},
                                         {1, N, 0},
                                         {2, N, K},
                                         {2, N, K},
                                         {1, L, 0},
                                         {0, 0, 0},
                                         {2, R, R},
                                         {2, R, L},
                                         {2, L, R},
                                         {2, N, 3},
                                         {2, tiling_->work.tokens, K}};
    GM_ADDR to = out_.shapes;
    LocalTensor<int64_t> shape = known_.tensor().ReinterpretCast<int64_t>();
    for (uint32_t i = 0; i < kWords; ++i) shape.SetValue(i, 0);
    for (int64_t i = 0; i < kOutputs; ++i) {
      if (i == kScales && !Rows::kHasScales) continue;
      shape.SetValue(0, kWide | shapes[i][0]);
      shape.SetValue(1, shapes[i][1]);
      shape.SetValue(2, shapes[i][2]);
      write(to, shape, kWords);
      to += kWords * sizeof(int64_t);
    }
  }

  // What S has written; it may write there again.
  template <typename T>
  __aicore__ void write(GM_ADDR to, const LocalTensor<T>& from, int64_t count) {
    order<HardEvent::S_MTE3>();
    store(to, from, count);
    order<HardEvent::MTE3_S>();
  }

  const Tiling* tiling_ = nullptr;
  GM_ADDR x_ = nullptr;
  GM_ADDR shared_ = nullptr;  // tables of all blocks
  DispatchOutputs out_{};
  int64_t recv_row_bytes_ = 0;
  int64_t local_experts_ = 1, delivered_ = 0;
  TPipe pipe_;
  Exchange exchange_;
  Counts counts_;
  TokenValues<int32_t> send_head_;
  Messages<kIsNormal, Rows::kHasScales> messages_;
  Array<int32_t> known_;
  Table sent_;          // by expert: rows of this rank in earlier rounds, and of this one
  Table first_;         // by expert: the first row of this rank
  Table ends_;          // by this rank's experts and the sources: the end of their rows
  Table delivered_to_;  // by sources and some ranks: rows that they deliver, in one transfer
  Rows rows_;
};

template <typename Rows>
__aicore__ inline void normal_dispatch(Op op, GM_ADDR x, GM_ADDR topk_idx, GM_ADDR topk_weights, GM_ADDR windows,
                                       const DispatchOutputs& outputs, GM_ADDR workspace, const Tiling& tiling) {
  Dispatch<Rows, true> dispatch;
  dispatch.init(op, x, topk_idx, topk_weights, windows, outputs, workspace, tiling);
  dispatch.process();
}

template <typename Rows>
__aicore__ inline void low_latency_dispatch(Op op, GM_ADDR x, GM_ADDR topk_idx, GM_ADDR windows, GM_ADDR recv_x,
                                            GM_ADDR recv_scales, GM_ADDR recv_count, GM_ADDR recv_src_idx,
                                            GM_ADDR layout_range, GM_ADDR send_head, GM_ADDR workspace,
                                            const Tiling& tiling) {
  DispatchOutputs outputs{};
  outputs.recv_x = recv_x;
  outputs.recv_scales = recv_scales;
  outputs.recv_count = recv_count;
  outputs.recv_src_idx = recv_src_idx;
  outputs.recv_channel_prefix = layout_range;
  outputs.send_head = send_head;
  Dispatch<Rows, false> dispatch;
  dispatch.init(op, x, topk_idx, nullptr, windows, outputs, workspace, tiling);
  dispatch.process();
}

}  // namespace deep_ep
