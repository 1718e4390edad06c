// The ids of this rank's tokens, and the exchange of how many rows each rank has for each expert.
#pragma once

#include "exchange.h"

namespace deep_ep {

class Counts {
 public:
  __aicore__ Counts() {}
  // With send_head, what has no row counts as if it had no id.
  __aicore__ void init(TPipe& pipe, const Tiling& tiling, GM_ADDR workspace, GM_ADDR topk_idx,
                       GM_ADDR send_head = nullptr) {
    tiling_ = &tiling;
    ids_.init(pipe, tiling, topk_idx);
    has_rows_ = send_head != nullptr;
    if (has_rows_) rows_.init(pipe, tiling, send_head);
    numbers_.init(pipe, tiling, workspace);
  }

  __aicore__ Numbers& numbers() { return numbers_; }

  // A pass over the tokens goes on to a chunk, by MTE2. What the scalar unit has read of the one before must be ordered
  // before.
  __aicore__ void read(const Chunk& chunk) {
    ids_.load(chunk);
    if (has_rows_) rows_.load(chunk);
  }
  // The expert of (token i of the chunk, k), or -1.
  __aicore__ int32_t expert(int64_t i, int64_t k) {
    return has_rows_ && row(i, k) < 0 ? -1 : static_cast<int32_t>(ids_.get(i, k));
  }
  // The row at the expert's rank, if there is send_head; else the number of the next row for the expert.
  __aicore__ int32_t row_for(int32_t expert, int64_t i, int64_t k) {
    return has_rows_ ? row(i, k) : numbers_.of_expert(expert);
  }

  // Counts what this block's tokens have for experts and ranks, and that of all blocks. False if the launch has failed.
  __aicore__ bool count(Exchange& exchange) {
    numbers_.begin();
    walk(exchange);
    numbers_.publish();
    const bool agreed = exchange.agree();
    numbers_.gather();
    return agreed;
  }

  // The round, which has been counted, ends before the first token that a slot has no room for, and is counted anew.
  __aicore__ bool fit(Exchange& exchange) {
    if (exchange.have_room(numbers_)) return true;
    numbers_.begin_again();
    exchange.end_before(walk(exchange));
    return count(exchange);
  }

  // Each block sends this rank's counts to some ranks.
  __aicore__ void send(Exchange& exchange) {
    for (int64_t to = GetBlockIdx(); to < exchange.ranks(); to += GetBlockNum())
      store(exchange.slot(to, exchange.rank()), numbers_.total().tensor(), tiling_->work.experts);
  }

  // The counts of all ranks have arrived. numbers().total() begins with the sums of those of some experts from now on.
  __aicore__ void receive(Exchange& exchange, int64_t first, int64_t experts) {
    clear(numbers_.total(), experts);
    for (TableReader& reader = from_all(exchange, first, experts); reader.any(); reader.next())
      add(reader, numbers_.total(), experts);
    order<HardEvent::V_S>();
  }
  // Goes through them, by source.
  __aicore__ TableReader& from_all(Exchange& exchange, int64_t first, int64_t experts) {
    GM_ADDR counts = exchange.slot(exchange.rank(), 0) + first * sizeof(int32_t);
    numbers_.reader().begin(counts, exchange.slot_bytes(), exchange.ranks(), experts);
    return numbers_.reader();
  }
  __aicore__ void add(TableReader& reader, Table& table, int64_t experts) {
    Add(table.tensor(), table.tensor(), reader.row(), static_cast<int32_t>(experts));
    PipeBarrier<PIPE_V>();
  }

 private:
  __aicore__ int32_t row(int64_t i, int64_t k) { return rows_.get(i, k); }

  // A pass over this block's tokens of the round. Returns the first that a slot has no room for, or the round's end.
  __aicore__ int64_t walk(Exchange& exchange) {
    int64_t end = exchange.end();
    for (Chunk chunk = exchange.own_tokens(); chunk.any(); chunk.next()) {
      order<HardEvent::S_MTE2>();
      read(chunk);
      order<HardEvent::MTE2_S>();
      for (int64_t i = 0; i < chunk.count(); ++i) {
        numbers_.next_token();
        for (int64_t k = 0; k < tiling_->work.top_k; ++k)
          if ((!has_rows_ || row(i, k) >= 0) && !number(ids_.get(i, k), exchange) && chunk.first + i < end)
            end = chunk.first + i;
      }
    }
    return end;
  }
  // False if a slot has no room for the token.
  __aicore__ bool number(int64_t id, Exchange& exchange) {
    if (id < -1 || id >= tiling_->work.experts)
      exchange.fail(Failure::bad_id, exchange.rank(), 0, tiling_->work.experts, id);
    if (id < 0 || id >= tiling_->work.experts) return true;
    const int32_t expert = static_cast<int32_t>(id), rank = numbers_.rank_of(expert);
    numbers_.of_expert(expert);
    return !numbers_.is_new(rank) || exchange.has_room(numbers_.of_rank(rank));
  }

  const Tiling* tiling_ = nullptr;
  bool has_rows_ = false;
  TokenValues<int64_t> ids_;
  TokenValues<int32_t> rows_;
  Numbers numbers_;
};

}  // namespace deep_ep
