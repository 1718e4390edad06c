// What lies where in a rank's window. Every rank of a group maps the windows of all ranks.
//
//   [ Control, which begins with a Mark | done[R] | posts[2] | attachments[2] | staging | pool ]
//
// R ranks. `posts` are what the owner publishes at the start of an operation, one for even and one for odd sequence
// numbers: a rank posts n+2 only after all ranks have posted n+1, so nobody still reads n. `staging` takes
// rows that are consumed within the operation; `pool` holds rows that outlive it (recv_x).
// `attachments` go with posts: what there is to send, where that is little.
//
// The owner has reserved all but the attachments and the pool from the start; these as far as they were needed so far.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <string>

#include "bell.h"
#include "device/op.h"

namespace deep_ep {

constexpr uint64_t kLine = 64;
constexpr uint64_t kPage = 4096;  // a unit of sizes, whatever the pages of the machine are
constexpr uint64_t kHugePage = 2 << 20;
constexpr uint64_t kMinWindowBytes = 1 << 20;
constexpr int kTextBytes = 512;
constexpr uint64_t kAttachmentBytes = 2 << 20;
// In two buffers of which one is written while the other one is read: what the caches of a core hold.
constexpr uint64_t kStagingBytes = 4 << 20;

// Into kTextBytes.
inline void copy_text(char* to, const std::string& text) {
  const size_t size = std::min<size_t>(text.size(), kTextBytes - 1);
  std::memcpy(to, text.data(), size);
  to[size] = '\0';
}

constexpr uint64_t round_up(uint64_t value, uint64_t unit) { return (value + unit - 1) / unit * unit; }

// What a rank says of itself when it enters an operation.
struct Post {
  Op op;
  uint32_t rejected;  // 1: `text` says why this rank cannot take part; the operation fails on all ranks
  uint32_t attached;  // 1: what this rank has to send is in its attachment
  int64_t tokens;     // T
  int64_t hidden;     // H
  int64_t top_k;      // K
  int64_t experts;    // E
  int64_t dtype;
  int64_t gradient;      // ThreadCalls::gradient
  int64_t rows;          // of the tensor that receives expert rows; dispatch: W, 0 in exact mode
  uint64_t pool_offset;  // the pool block that this rank offers for rows of this operation
  uint64_t pool_bytes;
  // Where much memory is wanted, what this rank has seen: bytes that the host and the rank's cgroup, which has an id,
  // can give, and that it has to spare.
  uint64_t of_host;
  uint64_t of_cgroup;
  uint64_t cgroup;  // 0: none that has a limit
  uint64_t spare;
  char text[kTextBytes];  // if not rejected: the form of the call (ThreadCalls), or nothing
};

// What a window begins with, in every version of what lies in it.
struct Mark {
  static constexpr uint64_t kMagic = 0x776f646e69775045;  // "EPwindow"
  // Another one with every change of what ranks read in each other's windows.
  static constexpr uint32_t kVersion = 1;

  uint64_t magic;
  uint32_t version;
};

enum class State : uint32_t { open, closed, broken };

struct alignas(kLine) Control {
  Mark mark;  // from before peers open the window
  alignas(kLine) Bell bell;
  std::atomic<State> state;
  char reason[kTextBytes];                        // valid once state is broken
  alignas(kLine) std::atomic<uint64_t> sequence;  // of the newest post
  alignas(kLine) std::atomic<uint64_t> credit;    // Progress of chunks that senders may write
};

// How far something got within the operation `sequence`. Values of earlier operations compare smaller.
struct Progress {
  static constexpr uint64_t kAll = (1u << 24) - 1;
  static constexpr uint64_t encode(uint64_t sequence, uint64_t chunks) { return sequence << 24 | chunks; }
  static constexpr uint64_t chunks(uint64_t value, uint64_t sequence) {
    return value >> 24 == sequence ? value & kAll : 0;
  }
};

struct alignas(kLine) Done {
  std::atomic<uint64_t> progress;  // chunks that one source has delivered in full
};

struct WindowLayout {
  uint64_t done, posts, post_stride, attachments, staging, staging_bytes, pool, pool_bytes;

  // `bytes` is the most that staging and pool may have; `max_words` bounds the 32-bit words that follow a post.
  static constexpr WindowLayout of(int num_ranks, uint64_t max_words, uint64_t bytes) {
    WindowLayout at{};
    at.done = round_up(sizeof(Control), kLine);
    at.posts = at.done + num_ranks * sizeof(Done);
    at.post_stride = round_up(sizeof(Post) + 4 * max_words, kLine);
    at.attachments = round_up(at.posts + 2 * at.post_stride, kPage);
    at.staging = round_up(at.attachments + 2 * kAttachmentBytes, kHugePage);
    at.staging_bytes = round_up(std::min(bytes * 3 / 8, kStagingBytes), kPage);
    at.pool = round_up(at.staging + at.staging_bytes, kHugePage);
    at.pool_bytes = round_up(bytes - at.staging_bytes, kPage);
    return at;
  }

  constexpr uint64_t total() const { return pool + pool_bytes; }
};

}  // namespace deep_ep
