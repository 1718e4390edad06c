// The one way to communicate through the windows of a group.
//
// R ranks · T local tokens · H hidden · K top-k · E experts · N rows.
//
// An operation has three steps. Opening it (`Operation`) publishes a post, and waits for nobody once its turn has come.
// `receive` waits for the posts of all ranks and checks that they fit together; all ranks see the same posts and reach
// the same verdict, so an operation that is rejected is rejected everywhere before a byte of payload moves, and the
// group stays usable. `exchange` then moves rows into slots of the receivers' windows.
#pragma once

#include <chrono>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "exchange.h"
#include "group.h"
#include "phases.h"
#include "pool.h"
#include "window_layout.h"

namespace deep_ep {

// What a rank brings to an operation.
struct Contribution {
  Post post{};
  std::vector<int32_t> words;  // published with the post
  std::string rejected;        // unless empty: why this rank cannot take part
  uint64_t expected = 0;       // bytes of the pool that rows for this rank are expected to need
  uint64_t least = 0;          // bytes of it without which they do not fit for certain
  // Instead, where rows for this rank go is settled: this block of the pool, of 0 bytes for none.
  std::optional<Block> reserved;
  // What this rank has to send, for an operation of little data: `attach` writes these bytes.
  uint64_t attached_bytes = 0;
  std::function<void(std::byte*)> attach;
  // Whether it attaches that even if it is alone, to receive from its attachment what it sends to itself.
  bool attaches_own = false;
};

class Operation {
 public:
  using Check = std::function<std::string(const Operation&)>;

  // Enters `mine.post.op` on the group of `turn`.
  Operation(Turn turn, Contribution mine);

  // The same and `receive`.
  Operation(Turn turn, Contribution mine, const Check& check);

  // Without finish() before it, the operation failed on this rank alone: the group is given up, and peers raise.
  ~Operation();

  // Waits for the posts of all ranks. `check` runs once they are there, may look at all of them, must come to the same
  // result on every rank, and returns what is wrong (or throws Error), or nothing.
  void receive(const Check& check);

  int rank() const { return group_.rank_; }
  int size() const { return group_.size_; }
  const Post& post(int rank) const { return group_.post(rank, sequence_); }
  const int32_t* words(int rank) const { return reinterpret_cast<const int32_t*>(&post(rank) + 1); }

  // Whether this rank has attached what it has to send.
  bool has_attached() const { return post(rank()).attached != 0; }

  // Whether all ranks have attached what they have to send: there is nothing to exchange. A rank need not attach what
  // it sends to itself, and attaches nothing if it is alone.
  bool all_attached() const { return all_attached_; }
  const std::byte* attachment(int rank) const { return group_.attachment(rank, sequence_); }

  // What the time from here on is spent on.
  void enter(Phase phase) { stopwatch_.enter(phase); }

  // A place for num_slots slots of row_bytes + meta_bytes at `rank`. For rows that are kept: the pool block that `rank`
  // offered, with room for `total_rows` rows, or nothing if it is too small. For rows that are consumed:
  // staging, in rounds of chunks if need be, each a multiple of `granularity` slots; throws if not even one fits.
  std::optional<Region> pool_region(int rank, int64_t num_slots, int64_t total_rows, uint64_t row_bytes,
                                    uint64_t meta_bytes) const;
  Region staging_region(int rank, int64_t num_slots, int64_t granularity, uint64_t row_bytes,
                        uint64_t meta_bytes) const;

  // Sends `entries` and receives into regions[rank()]. For each entry `write(entry, meta)` fills the slot's meta and
  // returns the row that is to be copied to it. For each chunk that has arrived, in order, `consume(first_slot,
  // end_slot, rows, metas)`.
  using Write = std::function<const std::byte*(const Entry&, std::byte* meta)>;
  using Consume = std::function<void(int64_t first, int64_t end, std::byte* rows, std::byte* metas)>;
  void exchange(const std::vector<Entry>& entries, const std::vector<Region>& regions, uint64_t row_bytes,
                uint64_t meta_bytes, const Write& write, const Consume& consume);

  // The first `bytes` of the own pool region, given back when the pointer dies.
  std::shared_ptr<std::byte> keep(uint64_t bytes);

  void finish();

  // For what only this rank can know after the checks: gives the group up, tells peers why, and throws.
  [[noreturn]] void fail(const std::string& reason);

 private:
  void send(const Contribution& mine);
  bool attach(const Contribution& mine);
  void wait_for_posts();
  // Runs a step; what it throws ends the operation on this rank, and the later ones of its call.
  template <typename Step>
  void in_step(Step&& step);
  // What such operations have needed of the pool.
  uint64_t& wanted() const { return group_.wanted_[static_cast<int>(op_)]; }
  // Of the pool, for `bytes` of this operation: routing varies, and more where tokens are few.
  static uint64_t with_margin(uint64_t bytes);
  // Ends an operation that peers need nothing more of.
  void end();
  // Gives the group up unless it has ended.
  void abandon();
  // Waits until ready(). `missing(r)`: rank r still owes something; `needed(r)`: nothing can become ready if rank r
  // is gone; `phase` names what is waited for.
  void wait(const char* phase, const std::function<bool()>& ready, const std::function<bool(int)>& missing,
            const std::function<bool(int)>& needed);
  void wait_until(const char* phase, const std::function<bool()>& ready, const std::function<bool(int)>& missing,
                  const std::function<bool(int)>& needed);
  std::string verdict(const Check& check) const;
  [[noreturn]] void give_up(const std::string& reason);
  std::string failure() const;
  std::string prefix() const;

  Turn turn_;
  Group& group_;
  const Op op_;
  uint64_t sequence_ = 0;
  Block offered_;
  mutable uint64_t needed_ = 0;  // bytes of it
  bool open_ = false;
  bool all_attached_ = false;
  std::chrono::steady_clock::time_point begin_;
  Stopwatch stopwatch_{Phase::counts};
};

}  // namespace deep_ep
