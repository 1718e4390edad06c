// The combines and the backward ops: the token's rank says by records which rows it means, and the experts' rank
// answers each record.
//
//                      with a record    is answered by
//   combine                             the sum of the token's rows, weighted
//   dispatch_backward                   their sum, and of each row the gradient of its weight
//   combine_backward   a row            of each row the product with it
//
// Rows of an answer are of T; other words are fp32, for each k that is at the answering rank, in order. The token's
// rank sums up what the ranks send.
#pragma once

#include "messages.h"
#include "rows.h"

namespace deep_ep {

enum class Trip { combine, dispatch_backward, combine_backward };

// nullptr: the op has no such tensor.
struct RoundTripTensors {
  GM_ADDR rows;          // [T, H]: what goes with records
  GM_ADDR x;             // [N, H]
  GM_ADDR recv_weights;  // [N, K]: of dispatch_backward
  GM_ADDR topk_idx;
  GM_ADDR topk_weights;
  GM_ADDR recv_src_idx;
  GM_ADDR send_head;
  GM_ADDR grad_x;    // [N, H]: an output of combine_backward
  GM_ADDR combined;  // [T, H], an output
  GM_ADDR answers;   // [T, K], an output
};

template <typename T, Trip kTrip>
class RoundTrip {
 public:
  __aicore__ RoundTrip() {}
  __aicore__ void init(Op op, const RoundTripTensors& tensors, GM_ADDR windows, GM_ADDR workspace,
                       const Tiling& tiling) {
    tiling_ = &tiling;
    tensors_ = tensors;
    exchange_.init(pipe_, tiling, windows, workspace, op);
    counts_.init(pipe_, tiling, workspace, tensors.topk_idx, tensors.send_head);
    messages_.init(pipe_, tiling, exchange_, counts_, tensors.topk_weights);
    rows_.init(pipe_, tiling);
    if constexpr (kSendsRows) copier_.init(pipe_, tiling);
    if constexpr (kAnswersWords) {
      answer_words_ = align(tiling.work.top_k * sizeof(float)) / sizeof(float);
      loose_.init(pipe_, tiling.chunk_tokens * tiling.work.top_k * kLane);
      answers_.init(pipe_, tiling.chunk_tokens * answer_words_);
      results_.init(pipe_, tiling, tensors.answers);
      place_of_.init(pipe_, tiling.table_bytes / sizeof(int32_t));
    }
  }

  __aicore__ void process() {
    if (exchange_.has_failed_before()) return;
    exchange_.begin();
    if constexpr (kSendsRows) clear_unused();
    do round();
    while (!exchange_.has_failed() && exchange_.next_round());
    exchange_.finish();
  }

 private:
  enum Phase { kAsked, kAnswered };
  static constexpr bool kHasWeights = kTrip != Trip::dispatch_backward, kSendsRows = kTrip == Trip::combine_backward;
  static constexpr bool kAnswersWords = kTrip != Trip::combine;
  static constexpr int32_t kLane = RowMath<T>::kLane;
  static constexpr int64_t kSourceBytes = 3 * sizeof(int32_t);

  __aicore__ void round() {
    if (counts_.count(exchange_) && counts_.fit(exchange_)) ask();
    exchange_.raise_all(kAsked, counts_.numbers());
    if (exchange_.all_raised(kAsked))
      for (Share share(exchange_); share.any();) answer(share);
    const bool agreed = exchange_.agree();
    exchange_.raise_all(kAnswered, counts_.numbers());
    if (agreed && exchange_.all_raised(kAnswered)) gather();
  }

  __aicore__ void ask() {
    counts_.numbers().begin_again();
    for (Chunk chunk = exchange_.own_tokens(); chunk.any(); chunk.next()) {
      messages_.make(chunk);
      if constexpr (kSendsRows)
        for (int64_t i = 0; i < chunk.count(); ++i)
          copier_.copy(tensors_.rows + (chunk.first + i) * tiling_->row_bytes, messages_.places(), i);
      messages_.send(chunk);
    }
  }

  // What has been asked for, to the windows of those who ask.
  __aicore__ void answer(Share& share) {
    order<HardEvent::S_MTE2>();
    const int64_t count = messages_.load(share);
    Places& places = messages_.places();
    if constexpr (kSendsRows) clear_products(count);
    for (int64_t i = 0; i < count; ++i) {
      find_rows(i);
      if constexpr (kSendsRows)
        rows_.multiply(exchange_.row(arrived(i), messages_.number(i)), places, i, tensors_.x, tensors_.grad_x,
                       products(i));
      else
        rows_.template sum<kHasWeights>(places, i, exchange_.row(asker(i), messages_.number(i)));
    }
    if constexpr (kSendsRows) add_up_products(count);
    if constexpr (kTrip == Trip::dispatch_backward) load_recv_weights(count);
    if constexpr (kAnswersWords) {
      order<HardEvent::S_MTE3>();
      for (int64_t i = 0; i < count; ++i)
        if (places.count(i) > 0)
          store(exchange_.answer(asker(i), messages_.number(i)),
                answers_.tensor()[static_cast<uint32_t>(i * answer_words_)], places.count(i));
      order<HardEvent::MTE3_S>();
    }
  }

  // The slot that the record has come to, and that for its answer.
  __aicore__ GM_ADDR arrived(int64_t i) { return exchange_.slot(exchange_.rank(), messages_.source(i)); }
  __aicore__ GM_ADDR asker(int64_t i) { return exchange_.slot(messages_.source(i), exchange_.rank()); }

  // places(): the rows that the record is about. Of combine_backward their offsets.
  __aicore__ void find_rows(int64_t i) {
    Places& places = messages_.places();
    places.clear(i);
    for (int64_t k = 0; k < tiling_->work.top_k; ++k) {
      if (messages_.local_expert(i, k) < 0) continue;
      const int64_t row = messages_.row(i, k);
      if (row >= tiling_->work.rows) {
        exchange_.fail(Failure::bad_row, messages_.source(i), kAsked, tiling_->work.rows, row);
        continue;
      }
      GM_ADDR base = kSendsRows ? nullptr : tensors_.x;
      const int64_t with = kHasWeights ? messages_.weight(i, k) : row * tiling_->work.top_k + k;
      places.add(i, base + row * tiling_->row_bytes, with);
    }
  }

  // kLane words for each row of a record: their sum is the gradient of its weight.
  __aicore__ LocalTensor<float> products(int64_t i) {
    return loose_.tensor()[static_cast<uint32_t>(i * tiling_->work.top_k * kLane)];
  }
  __aicore__ void clear_products(int64_t count) {
    Duplicate(loose_.tensor(), 0.0f, static_cast<int32_t>(count * tiling_->work.top_k * kLane));
  }
  __aicore__ void add_up_products(int64_t count) {
    order<HardEvent::V_S>();
    for (int64_t i = 0; i < count; ++i)
      for (int64_t n = 0; n < messages_.places().count(i); ++n) {
        float sum = 0;
        for (int64_t lane = 0; lane < kLane; ++lane)
          sum += products(i).GetValue(static_cast<uint32_t>(n * kLane + lane));
        answers_.set(i * answer_words_ + n, sum);
      }
  }

  // The gradients of weights, one word each, to the answers.
  __aicore__ void load_recv_weights(int64_t count) {
    Places& places = messages_.places();
    int64_t at = 0;
    for (int64_t i = 0; i < count; ++i)
      for (int64_t n = 0; n < places.count(i); ++n, at += kLane)
        load(loose_.tensor()[static_cast<uint32_t>(at)], tensors_.recv_weights + places.with(i, n) * sizeof(float), 1);
    order<HardEvent::MTE2_S>();
    at = 0;
    for (int64_t i = 0; i < count; ++i)
      for (int64_t n = 0; n < places.count(i); ++n, at += kLane) answers_.set(i * answer_words_ + n, loose_.get(at));
  }

  // What has come back for this block's tokens.
  __aicore__ void gather() {
    Numbers& numbers = counts_.numbers();
    Places& places = messages_.places();
    numbers.begin_again();
    for (Chunk chunk = exchange_.own_tokens(); chunk.any(); chunk.next()) {
      order<HardEvent::S_MTE2>();
      counts_.read(chunk);
      order<HardEvent::MTE2_S>();
      for (int64_t i = 0; i < chunk.count(); ++i) {
        numbers.next_token();
        places.clear(i);
        for (int64_t k = 0; k < tiling_->work.top_k; ++k) {
          const int32_t expert = counts_.expert(i, k), rank = expert < 0 ? -1 : numbers.rank_of(expert);
          if (rank >= 0 && numbers.is_new(rank)) {
            GM_ADDR slot = exchange_.slot(exchange_.rank(), rank);
            if constexpr (kAnswersWords) place_of_.set(rank, static_cast<int32_t>(places.count(i)));
            places.add(i, exchange_.row(slot, numbers.of_rank(rank)));
          }
          if constexpr (kAnswersWords) {
            // For now, which of the places it is.
            const int32_t place = rank < 0 ? -1 : place_of_.get(rank);
            results_.set(i, k, place);
            if (rank >= 0) places.set_with(i, place, places.with(i, place) + 1);
          }
        }
        if constexpr (!kSendsRows)
          rows_.template sum<false>(places, i, tensors_.combined + (chunk.first + i) * tiling_->row_bytes);
      }
      if constexpr (kAnswersWords) gather_words(chunk);
    }
  }

  // Each place has with it how many words there are.
  __aicore__ void gather_words(const Chunk& chunk) {
    Places& places = messages_.places();
    for (int64_t i = 0; i < chunk.count(); ++i) {
      int64_t at = i * tiling_->work.top_k * kLane;
      for (int64_t n = 0; n < places.count(i); ++n) {
        const int64_t count = places.with(i, n);
        load(loose_.tensor()[static_cast<uint32_t>(at)], places.place(i, n) + tiling_->answer, count);
        places.set_with(i, n, at);
        at += (count + kLane - 1) / kLane * kLane;
      }
    }
    order<HardEvent::MTE2_S>();
    for (int64_t i = 0; i < chunk.count(); ++i)
      for (int64_t k = 0; k < tiling_->work.top_k; ++k) {
        const int32_t place = results_.get(i, k);
        if (place >= 0) places.set_with(i, place, places.with(i, place) + 1);
        results_.set(i, k, place < 0 ? 0 : bits_of(loose_.get(places.with(i, place) - 1)));
      }
    order<HardEvent::S_MTE3>();
    results_.store(chunk);
    order<HardEvent::MTE3_S>();
  }

  // Rows that hold nothing have no gradient.
  __aicore__ void clear_unused() {
    const Split split = Split::of(tiling_->work.rows, GetBlockNum());
    LocalTensor<int32_t> sources = loose_.tensor().template ReinterpretCast<int32_t>();
    Chunk chunk{split.begin(GetBlockIdx()), split.end(GetBlockIdx()), tiling_->chunk_tokens * tiling_->work.top_k};
    for (; chunk.any(); chunk.next()) {
      order<HardEvent::S_MTE2>();
      load(sources, tensors_.recv_src_idx + chunk.first * kSourceBytes, chunk.count() * 3);
      order<HardEvent::MTE2_S>();
      for (int64_t i = 0, unused = 0; i <= chunk.count(); ++i) {
        if (i < chunk.count() && sources.GetValue(static_cast<uint32_t>(3 * i)) < 0) {
          ++unused;
          continue;
        }
        GM_ADDR first = tensors_.grad_x + (chunk.first + i - unused) * tiling_->row_bytes;
        copier_.fill(first, unused * tiling_->row_bytes, 0);
        unused = 0;
      }
    }
  }

  const Tiling* tiling_ = nullptr;
  RoundTripTensors tensors_{};
  int64_t answer_words_ = 0;
  TPipe pipe_;
  Exchange exchange_;
  Counts counts_;
  Messages<kHasWeights> messages_;
  RowMath<T> rows_;
  RowCopier copier_;
  Array<float> loose_;            // words of answers, each or each rank's aligned
  Array<float> answers_;          // of a chunk
  TokenValues<int32_t> results_;  // bits of numbers
  Table place_of_;                // by rank: which of a token's places it is
};

template <typename T, Trip kTrip>
__aicore__ inline void round_trip(Op op, const RoundTripTensors& tensors, GM_ADDR windows, GM_ADDR workspace,
                                  const Tiling& tiling) {
  RoundTrip<T, kTrip> trip;
  trip.init(op, tensors, windows, workspace, tiling);
  trip.process();
}

}  // namespace deep_ep
