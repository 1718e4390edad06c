// What lies where in a rank's window on an NPU; device code and host share it. Every rank of a group knows the address
// of every rank's window.
//
//   [ control | status | flags: 2 parities x 2 phases x R | lines of own blocks | marks, even | marks, odd |
//     slots of even launches | slots of odd launches ]
//
// A launch is the next epoch e of its group. Its messages carry e, and lie in the flags and slots of the parity of e. A
// rank sends for e + 2 only after it has got the flags of e + 1 from all ranks, which they send after they have done
// with e: nobody still reads what it overwrites.
//
// Tokens that slots have no room for go in rounds, each an epoch of its own.
//
// R ranks. All offsets are multiples of kBlock.
#pragma once

#include <cstdint>

#include "op.h"
#include "tiling.h"

namespace deep_ep {

struct WindowMap {
  static constexpr int64_t kBlock = Tiling::kBlockBytes;
  static constexpr int64_t kLine = 64;  // of the data cache: a flag has one to itself
  static constexpr int64_t kPhases = 2;
  static constexpr int64_t kBlocks = 128;  // of a rank's launch, at most
  // Of each parity, int32: epochs of what has arrived for one token from one rank. Nothing else is ever written there.
  static constexpr int64_t kMarks = int64_t{1} << 16;
  static constexpr int64_t kParities = 2;

  // Words of the window table before the addresses (ops/kernels.h).
  enum Table { kVersion, kRank, kRanks, kBytes, kDeadline, kHeader = 8 };

  // int64 words of the control line (ControlWord).
  DEEP_EP_DEVICE static constexpr int64_t control() { return 0; }
  // int32 words of the status line (StatusWord), all 0 as long as all is well.
  DEEP_EP_DEVICE static constexpr int64_t status() { return kLine; }

  int64_t ranks;
  int64_t bytes;  // of a window

  DEEP_EP_DEVICE constexpr int64_t flag(int64_t epoch, int64_t phase, int64_t source) const {
    return kBlock + ((epoch % kParities * kPhases + phase) * ranks + source) * kLine;
  }
  DEEP_EP_DEVICE constexpr int64_t lines_begin() const {
    return kBlock + (kParities * kPhases * ranks * kLine + kBlock - 1) / kBlock * kBlock;
  }
  DEEP_EP_DEVICE constexpr int64_t line(int64_t block) const { return lines_begin() + block * kLine; }
  DEEP_EP_DEVICE constexpr int64_t mark(int64_t epoch, int64_t number) const {
    return line(kBlocks) + (epoch % kParities * kMarks + number) * 4;
  }
  DEEP_EP_DEVICE constexpr int64_t slots_begin() const { return line(kBlocks) + kParities * kMarks * 4; }
  // Of a window in which `ranks` have flags, and slots of a block at least.
  DEEP_EP_DEVICE static constexpr int64_t least_bytes(int64_t ranks) {
    return WindowMap{ranks, 0}.slots_begin() + kParities * ranks * kBlock;
  }
  // Bytes of the slots of one parity.
  DEEP_EP_DEVICE constexpr int64_t room() const { return (bytes - slots_begin()) / kParities / kBlock * kBlock; }
  DEEP_EP_DEVICE constexpr int64_t slot(int64_t epoch, int64_t source, int64_t slot_bytes) const {
    return slots_begin() + epoch % kParities * room() + source * slot_bytes;
  }
};

// A slot: what one rank sends to another in an epoch. It has the same size on all ranks.
//
//   [ counts: int32 [E] | records | rows, each with room for the words that answer it ]
//
// Records say what goes with the rows: one per token and rank that it goes to.
struct SlotMap {
  static constexpr int64_t kMaxBytes = int64_t{1} << 32;

  int64_t tokens;   // as many records and rows
  int64_t records;  // offsets, multiples of kBlock
  int64_t rows;
  int64_t bytes;

  DEEP_EP_DEVICE static constexpr SlotMap of(const Tiling& tiling, int64_t tokens) {
    const int64_t records = align(tiling.work.experts * 4);
    const int64_t rows = records + align(tokens * tiling.record_bytes);
    return {tokens, records, rows, rows + tokens * tiling.row_stride};
  }
  // Of M tokens; without M, of as many as the windows have room for.
  DEEP_EP_DEVICE static constexpr SlotMap of(const Tiling& tiling, const WindowMap& map) {
    if (tiling.work.max_tokens > 0) return of(tiling, tiling.work.max_tokens);
    const int64_t room = map.room() / map.ranks / WindowMap::kBlock * WindowMap::kBlock;
    // Kernels step from slot to slot in one transfer, whose stride has 32 bits.
    const int64_t most = room < kMaxBytes ? room : kMaxBytes;
    const int64_t tokens = (most - of(tiling, 0).bytes - WindowMap::kBlock) / (tiling.record_bytes + tiling.row_stride);
    return of(tiling, tokens > 0 ? tokens : 1);
  }

 private:
  DEEP_EP_DEVICE static constexpr int64_t align(int64_t bytes) {
    return (bytes + WindowMap::kBlock - 1) / WindowMap::kBlock * WindowMap::kBlock;
  }
};

// What low_latency_combine has in place of slots:
//
//   [ for each token of this rank its places, rows | for each source and token: what is asked for ]
//
// A token has a place for each k, or for each rank if these are fewer, and as many marks, in lines of its own.
struct PlaceMap {
  static constexpr int64_t kWords = WindowMap::kLine / 4;  // of a line

  int64_t ranks;
  int64_t tokens;
  int64_t places;
  int64_t row_stride;
  int64_t ask_stride;

  DEEP_EP_DEVICE static constexpr PlaceMap of(const Tiling& tiling) {
    const Work& work = tiling.work;
    return {work.ranks, work.max_tokens, work.top_k < work.ranks ? work.top_k : work.ranks, tiling.row_stride,
            tiling.record_bytes};
  }
  // For what `rank` sends, with k the first of its rows.
  DEEP_EP_DEVICE constexpr int64_t place(int64_t k, int64_t rank) const { return places < ranks ? k : rank; }
  DEEP_EP_DEVICE static constexpr int64_t marks(int64_t places) { return (places + kWords - 1) / kWords * kWords; }
  DEEP_EP_DEVICE constexpr int64_t mark(int64_t token, int64_t place) const { return token * marks(places) + place; }
  DEEP_EP_DEVICE constexpr int64_t row(int64_t token, int64_t place) const {
    return (token * places + place) * row_stride;
  }
  DEEP_EP_DEVICE constexpr int64_t ask(int64_t source, int64_t token) const {
    return tokens * places * row_stride + (source * tokens + token) * ask_stride;
  }
  DEEP_EP_DEVICE constexpr int64_t bytes() const { return ask(ranks, 0); }
};

// The control line, int64: the epoch of the newest launch that has ended, and of the newest one that has begun. They
// are equal between launches, unless one was aborted.
enum ControlWord { kEnded, kBegun };

// A block's line, int32: the epoch in which it has posted, and whether it has failed.
enum LineWord { kPosted, kPostFailed };

// Why a launch has failed: the first word of the status.
enum class Failure : int32_t {
  none,
  late,       // a peer has not raised its flag by the deadline
  ahead,      // a peer is in a later launch: one of this rank's was lost
  different,  // a peer's launch is of another op, or has other sizes
  refused,    // a peer has found something wrong with its arguments
  bad_id,     // topk_idx of this rank holds an id that is neither -1 nor 0 to E-1
  bad_row,    // a peer asks for a row that x does not have
  too_small,  // the window has no room for the slots of this launch
  aborted,    // the launch before has not come to its end on this rank
  no_room,    // more rows arrive at a rank than it has memory for, and it may drop none
};

// The status line, int32. It stays as it is, and later launches of the group end at once. kToken: what blocks tell each
// other while all is well.
enum StatusWord { kFailure, kLaunch, kPeer, kPhase, kExpected, kGot, kOp, kToken, kStatusWords };

// The words of a flag, int32. A rank compares all that describes the launch: ranks whose launches do not fit together
// fail alike.
enum FlagWord {
  kEpoch,
  kEntries,
  kMore,           // whether the rank has tokens for a further round
  kRoom,           // N of the rank; -1-N: it may drop none
  kPeerWords = 8,  // the first ones differ from rank to rank
  kFlagOp = kPeerWords,
  kHidden,
  kTopK,
  kExperts,
  kMaxTokens,
  kElementBytes,
  kFlagWords = 16
};

}  // namespace deep_ep
