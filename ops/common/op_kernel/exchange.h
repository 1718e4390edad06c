// A launch among the ranks of its group: its epoch, its slots in the windows, flags that say that a slot is full, and
// the status that says why a launch has failed. src/device/window_map.h has the map of a window.
#pragma once

#include "kernel.h"

namespace deep_ep {

class Exchange {
 public:
  __aicore__ Exchange() {}
  // must_fit: whether rows of this rank must not be dropped.
  __aicore__ void init(TPipe& pipe, const Tiling& tiling, GM_ADDR table, GM_ADDR workspace, Op op,
                       bool must_fit = false) {
    begin_ = GetSystemCycle();
    tiling_ = &tiling;
    must_fit_ = must_fit;
    failures_ = workspace + tiling.failures;
    table_ = global<int64_t>(table);
    rank_ = table_.GetValue(WindowMap::kRank);
    map_ = WindowMap{table_.GetValue(WindowMap::kRanks), table_.GetValue(WindowMap::kBytes)};
    op_ = static_cast<int32_t>(op);
    flags_.init(pipe, tiling.flags * kFlagWords);
    entries_.init(pipe, map_.ranks);
    rooms_.init(pipe, map_.ranks);
    failure_.init(pipe, kStatusWords);
    all_failures_.init(pipe, kStatusWords * GetBlockNum());
    for (int32_t i = 0; i < kStatusWords; ++i) failure_.set(i, 0);
    GlobalTensor<int64_t> control = this->control();
    epoch_ = control.GetValue(kEnded) + 1;
    slots_ = SlotMap::of(tiling, map_);
    end_ = tiling.work.tokens;
  }

  __aicore__ int64_t rank() const { return rank_; }
  __aicore__ int64_t ranks() const { return map_.ranks; }

  // The slot at rank `at` for what `source` sends.
  __aicore__ GM_ADDR slot(int64_t at, int64_t source) { return window(at) + map_.slot(epoch_, source, slots_.bytes); }
  __aicore__ GM_ADDR record(GM_ADDR slot, int64_t number) {
    return slot + slots_.records + number * tiling_->record_bytes;
  }
  __aicore__ GM_ADDR row(GM_ADDR slot, int64_t number) { return slot + slots_.rows + number * tiling_->row_stride; }
  // What answers a record.
  __aicore__ GM_ADDR answer(GM_ADDR slot, int64_t number) { return row(slot, number) + tiling_->answer; }

  __aicore__ int64_t slot_bytes() const { return slots_.bytes; }

  // What lies in place of the slots of rank `at`, and a mark there, which becomes this epoch.
  __aicore__ GM_ADDR place(int64_t at, int64_t offset) { return window(at) + map_.slot(epoch_, 0, 0) + offset; }
  __aicore__ GM_ADDR mark(int64_t at, int64_t number) { return window(at) + map_.mark(epoch_, number); }
  __aicore__ int32_t mark() const { return static_cast<int32_t>(epoch_); }

  // This block's tokens of the round. A round begins with all that are left, in later rounds with at most twice as many
  // as the one before had.
  __aicore__ Chunk own_tokens() const {
    return deep_ep::own_tokens(*tiling_, first_, Split::of(end_ - first_, GetBlockNum()));
  }
  __aicore__ int64_t end() const { return end_; }

  // Whether a slot has room for the entry with this number, and for what the round's tokens have for each rank.
  __aicore__ bool has_room(int64_t number) const { return number < slots_.tokens; }
  __aicore__ bool have_room(Numbers& numbers) const {
    if (end_ - first_ <= slots_.tokens) return true;
    for (int64_t to = 0; to < map_.ranks; ++to)
      if (numbers.tokens_for(to) > slots_.tokens) return false;
    return true;
  }
  // The round ends before the first of the tokens that the blocks say. They meet.
  __aicore__ void end_before(int64_t token) {
    failure_.set(kToken, static_cast<int32_t>(token));
    agree();
    for (int64_t block = 0; block < GetBlockNum(); ++block) {
      const int64_t said = all_failures_.get(block * kStatusWords + kToken);
      end_ = said < end_ ? said : end_;
    }
  }

  // Goes on to the next round if any rank has tokens left. The same on all ranks and blocks.
  __aicore__ bool next_round() {
    if (!any_has_more_) return false;
    const int64_t most = 2 * (end_ - first_), left = tiling_->work.tokens - end_;
    first_ = end_;
    end_ += left < most ? left : most;
    ++epoch_;
    return true;
  }

  // Whether a launch before has failed, after which this one must not run.
  __aicore__ bool has_failed_before() {
    GlobalTensor<int32_t> status = this->status();
    return status.GetValue(kFailure) != 0 && status.GetValue(kLaunch) != mark();
  }

  // Something is wrong, as far as this block can see; the first failure counts. The others hear of it by `agree`.
  __aicore__ void fail(Failure failure, int64_t peer, int64_t phase, int64_t expected, int64_t got) {
    if (has_failed()) return;
    failure_.set(kFailure, static_cast<int32_t>(failure));
    failure_.set(kLaunch, static_cast<int32_t>(epoch_));
    failure_.set(kPeer, static_cast<int32_t>(peer));
    failure_.set(kPhase, static_cast<int32_t>(phase));
    failure_.set(kExpected, static_cast<int32_t>(expected));
    failure_.set(kGot, static_cast<int32_t>(got));
    failure_.set(kOp, op_);
  }
  __aicore__ bool has_failed() { return failure_.get(kFailure) != 0; }
  // Whether this block has failed, or knows that another one of the rank has, which says what it was.
  __aicore__ bool refuses() { return refuses_ || has_failed(); }

  // Waits for all blocks, as all_blocks does. False if one of them has failed: then all have.
  __aicore__ bool agree() {
    // The next round has another place: some blocks may still be reading in this one.
    GM_ADDR round = failures_ + rounds_++ % 2 * GetBlockNum() * kStatusBytes;
    order<HardEvent::S_MTE3>();
    store(round + GetBlockIdx() * kStatusBytes, failure_.tensor(), kStatusWords);
    all_blocks();
    load(all_failures_.tensor(), round, kStatusWords * GetBlockNum());
    order<HardEvent::MTE2_S>();
    for (int64_t block = 0; block < GetBlockNum() && !has_failed(); ++block)
      for (int64_t i = 0; i < kStatusWords; ++i) failure_.set(i, all_failures_.get(block * kStatusWords + i));
    return !has_failed();
  }

  // The launch begins. What is wrong with it so far, the others hear of by `agree`, or by `post`.
  __aicore__ void begin() { begin(map_.ranks * slots_.bytes); }
  // With so many bytes in each window.
  __aicore__ void begin(int64_t bytes) {
    if (GetBlockIdx() == 0) {
      GlobalTensor<int64_t> control = this->control();
      const int64_t begun = control.GetValue(kBegun);
      if (begun + 1 != epoch_) fail(Failure::aborted, rank_, 0, epoch_ - 1, begun);
      control.SetValue(kBegun, epoch_);
      refresh(control);
    }
    constexpr int64_t kUnit = 1024;  // as a word of 32 bits holds it
    if (bytes > map_.room()) fail(Failure::too_small, rank_, 0, (bytes + kUnit - 1) / kUnit, map_.room() / kUnit);
  }

  // Waits until all ranks have raised their flags, each block for some of them. False: the launch has failed.
  __aicore__ bool all_raised(int64_t phase) {
    for (int64_t source = GetBlockIdx(); source < map_.ranks; source += GetBlockNum())
      if (!wait(phase, source)) break;
    if (!agree()) return false;
    if (phase == 0) read_flags();
    return true;
  }

  // What the ranks have said with their first flags of the round: how many entries are in their slots, how many rows
  // they have memory for, and whether they may drop none.
  __aicore__ int64_t entries(int64_t source) { return entries_.get(source); }
  __aicore__ int32_t room(int64_t source) {
    const int32_t room = rooms_.get(source);
    return room < 0 ? -1 - room : room;
  }
  __aicore__ bool must_fit(int64_t source) { return rooms_.get(source) < 0; }

  // All blocks have written what they have for their peers: each tells some of them that their slots are full, with as
  // many entries as it has tokens for them, or that this rank has failed.
  __aicore__ void raise_all(int64_t phase, Numbers& numbers) {
    all_blocks();
    raise_some(phase, GetBlockIdx(), GetBlockNum(), &numbers);
  }

  // Tells every so many-th rank, from `to` on. Without numbers of how many entries is not said.
  __aicore__ void raise_some(int64_t phase, int64_t to, int64_t step, Numbers* numbers) {
    while (to < map_.ranks) {
      const int64_t first = to;
      for (int64_t i = 0; i < tiling_->flags && to < map_.ranks; ++i, to += step)
        make_flag(i * kFlagWords, numbers != nullptr ? numbers->tokens_for(to) : 0);
      order<HardEvent::S_MTE3>();
      for (int64_t i = 0, at = first; at < to; ++i, at += step) raise(phase, at, i * kFlagWords);
      order<HardEvent::MTE3_S>();  // the next flags are made in their place
    }
  }

  // Blocks that do not meet say in lines of their rank's window what the rank's first flags have to wait for.

  // This block has come so far, with all that it has sent, or has failed.
  __aicore__ void post() {
    tell();
    GlobalTensor<int32_t> line = own_lines<int32_t>(map_.line(GetBlockIdx()));
    line.SetValue(kPostFailed, has_failed());
    line.SetValue(kPosted, static_cast<int32_t>(epoch_));
    refresh(line);
  }
  // Waits for the others of the first blocks. If one has failed, this rank refuses the launch.
  __aicore__ void hear(int64_t blocks) {
    for (int64_t block = 0; block < blocks && !refuses_; ++block) {
      if (block == GetBlockIdx()) continue;
      GlobalTensor<int32_t> line = own_lines<int32_t>(map_.line(block));
      refuses_ = !is_current(line, kPosted, rank_, 0, Unless::late) || line.GetValue(kPostFailed) != 0;
    }
  }
  // Waits until a rank has raised its flag. False: this rank refuses the launch.
  __aicore__ bool has_raised(int64_t phase, int64_t source) { return wait(phase, source); }
  // The same for every so many-th rank.
  __aicore__ bool have_raised(int64_t phase, int64_t source, int64_t step) {
    for (; source < map_.ranks && !refuses_; source += step)
      if (!wait(phase, source)) break;
    return !refuses();
  }
  // The marks of one token, from the first of them on, as they are now.
  __aicore__ GlobalTensor<int32_t> marks(int64_t first, int64_t count) {
    return own_lines<int32_t>(map_.mark(epoch_, first), count * sizeof(int32_t));
  }
  // Waits until `rank` has sent what it marks so. False: the launch has failed, in this block or in another.
  __aicore__ bool is_marked(GlobalTensor<int32_t> mark, int64_t rank) {
    return is_current(mark, 0, rank, 1, Unless::told);
  }
  // What is wrong in this block is the status of the rank, which the others look at while they wait.
  __aicore__ void tell() {
    if (!has_failed() || is_told()) return;
    order<HardEvent::S_MTE3>();
    store(window(rank_) + WindowMap::status(), failure_.tensor(), kStatusWords);
  }

  // The launch has come to its end, about which all blocks agree.
  __aicore__ void finish() {
    if (GetBlockIdx() != 0) return;
    if (has_failed()) {
      GlobalTensor<int32_t> status = this->status();
      for (int32_t i = 0; i < kStatusWords; ++i) status.SetValue(i, failure_.get(i));
      refresh(status);
    }
    close();
  }
  __aicore__ void close() {
    if (GetBlockIdx() != 0) return;
    GlobalTensor<int64_t> control = this->control();
    control.SetValue(kEnded, epoch_);
    control.SetValue(kBegun, epoch_);  // of the last round
    refresh(control);
  }

 private:
  __aicore__ bool has_more() const { return end_ < tiling_->work.tokens; }

  static constexpr int32_t kRefused = -1;  // in the place of the op
  static constexpr int64_t kStatusBytes = Tiling::kStatusBytes;
  static_assert(kStatusBytes == kStatusWords * sizeof(int32_t));

  __aicore__ GM_ADDR window(int64_t rank) {
    return reinterpret_cast<GM_ADDR>(table_.GetValue(WindowMap::kHeader + rank));
  }

  // A flag in flags_, from a word on.
  __aicore__ void make_flag(int64_t at, int64_t entries) {
    const Work& work = tiling_->work;
    for (int64_t i = 0; i < kFlagWords; ++i) flags_.set(at + i, 0);
    flags_.set(at + kEpoch, static_cast<int32_t>(epoch_));
    flags_.set(at + kEntries, static_cast<int32_t>(entries));
    flags_.set(at + kFlagOp, refuses() ? kRefused : op_);
    flags_.set(at + kHidden, static_cast<int32_t>(work.hidden));
    flags_.set(at + kTopK, static_cast<int32_t>(work.top_k));
    flags_.set(at + kExperts, static_cast<int32_t>(work.experts));
    flags_.set(at + kMaxTokens, static_cast<int32_t>(work.max_tokens));
    flags_.set(at + kElementBytes, static_cast<int32_t>(work.element_bytes));
    flags_.set(at + kMore, has_more());
    flags_.set(at + kRoom, static_cast<int32_t>(must_fit_ ? -1 - work.rows : work.rows));
  }
  __aicore__ void raise(int64_t phase, int64_t to, int64_t at) {
    GM_ADDR flag = window(to) + map_.flag(epoch_, phase, rank_);
    DataCopy(global<int32_t>(flag), flags_.tensor()[static_cast<uint32_t>(at)], kFlagWords);
  }

  // The first words of all flags, by MTE2: one after the other, each would have to be waited for.
  __aicore__ void read_flags() {
    any_has_more_ = false;
    const int64_t most = tiling_->flags * kFlagWords / kPeerWords;
    for (int64_t first = 0; first < map_.ranks; first += most) {
      const int64_t rest = map_.ranks - first, count = rest < most ? rest : most;
      order<HardEvent::S_MTE2>();
      load_rows(flags_.tensor(), window(rank_) + map_.flag(epoch_, 0, first), WindowMap::kLine, count, kPeerWords);
      order<HardEvent::MTE2_S>();
      for (int64_t i = 0; i < count; ++i) {
        entries_.set(first + i, flags_.get(i * kPeerWords + kEntries));
        rooms_.set(first + i, flags_.get(i * kPeerWords + kRoom));
        any_has_more_ = any_has_more_ || flags_.get(i * kPeerWords + kMore) != 0;
      }
    }
  }

  __aicore__ bool is_told() {
    GlobalTensor<int32_t> status = this->status();
    return status.GetValue(kFailure) != 0;
  }

  __aicore__ GlobalTensor<int64_t> control() { return own_lines<int64_t>(WindowMap::control()); }
  __aicore__ GlobalTensor<int32_t> status() { return own_lines<int32_t>(WindowMap::status()); }

  // What the scalar unit reads or writes in this rank's window, as it is now. The cache may have it from a launch
  // before, and from other windows in the same place, whose epochs were the same.
  template <typename T>
  __aicore__ GlobalTensor<T> own_lines(int64_t offset, int64_t bytes = WindowMap::kLine) {
    GM_ADDR begin = window(rank_) + offset;
    for (int64_t line = 0; line < bytes; line += WindowMap::kLine) {
      GlobalTensor<T> part = global<T>(begin + line);
      refresh(part);
    }
    return global<T>(begin);
  }

  // Writes back what the scalar unit has written to a line, and lets it read the line anew.
  template <typename T>
  __aicore__ void refresh(GlobalTensor<T>& line) {
    DataCacheCleanAndInvalid<T, CacheLine::SINGLE_CACHE_LINE, DcciDst::CACHELINE_OUT>(line);
  }

  // What ends a wait, besides the deadline: another block of this rank has failed; the peer is in a later launch, which
  // flags can tell, as each launch raises them all.
  enum class Unless { late, told, ahead };

  // Looks at a word of a line of this rank's until it is the epoch. False: it has not become so, and the launch has
  // failed, for which `peer` is to blame unless it is told.
  __aicore__ bool is_current(GlobalTensor<int32_t> line, int32_t word, int64_t peer, int64_t phase, Unless unless) {
    const int32_t expected = mark();
    const int64_t deadline = table_.GetValue(WindowMap::kDeadline);
    int32_t got = 0;
    for (; (got = line.GetValue(word)) != expected; refresh(line)) {
      if (unless == Unless::told && is_told()) return false;
      // Epochs wrap around in a word.
      const bool is_ahead = unless == Unless::ahead &&
                            static_cast<int32_t>(static_cast<uint32_t>(got) - static_cast<uint32_t>(expected)) > 0;
      if (!is_ahead && GetSystemCycle() - begin_ <= deadline) continue;
      fail(is_ahead ? Failure::ahead : Failure::late, peer, phase, expected, got);
      return false;
    }
    return true;
  }

  __aicore__ bool wait(int64_t phase, int64_t source) {
    GlobalTensor<int32_t> flag = own_lines<int32_t>(map_.flag(epoch_, phase, source));
    if (!is_current(flag, kEpoch, source, phase, Unless::ahead)) return false;
    const Work& work = tiling_->work;
    return matches(flag, kFlagOp, op_, phase, source) && matches(flag, kHidden, work.hidden, phase, source) &&
           matches(flag, kTopK, work.top_k, phase, source) && matches(flag, kExperts, work.experts, phase, source) &&
           matches(flag, kMaxTokens, work.max_tokens, phase, source) &&
           matches(flag, kElementBytes, work.element_bytes, phase, source);
  }

  __aicore__ bool matches(GlobalTensor<int32_t>& flag, int32_t word, int64_t own, int64_t phase, int64_t source) {
    const int32_t got = flag.GetValue(word);
    if (got == own) return true;
    const bool refused = word == kFlagOp && got == kRefused;
    if (refused && source == rank_)
      refuses_ = true;
    else
      fail(refused ? Failure::refused : Failure::different, source, phase, own, got);
    return false;
  }

  const Tiling* tiling_ = nullptr;
  GlobalTensor<int64_t> table_;
  WindowMap map_{};
  SlotMap slots_{};
  int64_t first_ = 0, end_ = 0;  // tokens of the round
  int64_t begin_ = 0;            // of the launch, in cycles
  int64_t rank_ = 0, epoch_ = 0, rounds_ = 0;
  int32_t op_ = 0;
  bool must_fit_ = false, any_has_more_ = false, refuses_ = false;
  GM_ADDR failures_ = nullptr;  // of all blocks
  Array<int32_t> failure_, all_failures_;
  Array<int32_t> flags_;            // some at a time
  Array<int32_t> entries_, rooms_;  // by rank
};

}  // namespace deep_ep
