// Rules 5 to 8: cores, the data cache, atomics, and windows of other ranks.
#include "rules.h"

namespace rules {
namespace {

// ---- 5. SyncAll.

RULE(rule5_cores_without_sync_break, .breaks = {"work+0x0", ": nothing orders"}, .cores = 2) {
  Tensors t;
  if (GetBlockIdx() == 0)
    DataCopy(w.workspace(), t.a, 8);
  else
    DataCopy(t.b, w.workspace(), 8);
}
RULE(rule5_cores_with_sync_keep, .cores = 2) {
  Tensors t;
  if (GetBlockIdx() == 0) DataCopy(w.workspace(), t.a, 8);
  SyncAll();
  if (GetBlockIdx() == 0) return;
  DataCopy(t.b, w.workspace(), 8);
  order<HardEvent::MTE2_S>();
  w.seen = t.b.GetValue(0) != 1.0f;
}
RULE(rule5_read_before_sync_breaks, .breaks = {", MTE3: writes work+0x0", "core 1's MTE2 reads"}, .arch = 3510,
     .cores = 2) {
  Tensors t;
  if (GetBlockIdx() == 1) OTHER(DataCopy(t.a, w.workspace(), 8));
  SyncAll();
  if (GetBlockIdx() == 0) CAUGHT(DataCopy(w.workspace(), t.a, 8));
}
RULE(rule5_read_before_barrier_and_sync_keeps, .cores = 2) {
  Tensors t;
  if (GetBlockIdx() == 1) DataCopy(t.a, w.workspace(), 8);
  PipeBarrier<PIPE_ALL>();
  SyncAll();
  if (GetBlockIdx() == 0) DataCopy(w.workspace(), t.a, 8);
}
RULE(rule5_sync_does_not_clean_the_cache_breaks,
     .breaks = {", MTE2: reads work+0x0", "core 0's S writes", "data cache"}, .cores = 2) {
  Tensors t;
  if (GetBlockIdx() == 0) OTHER(w.workspace().SetValue(0, 1.0f));
  PipeBarrier<PIPE_ALL>();
  SyncAll();
  if (GetBlockIdx() == 1) CAUGHT(DataCopy(t.b, w.workspace(), 8));
  SyncAll();
  clean(w.workspace());
}
RULE(rule5_cleaned_before_sync_keeps, .cores = 2) {
  Tensors t;
  if (GetBlockIdx() == 0) {
    w.workspace().SetValue(0, 1.0f);
    clean(w.workspace());
  }
  SyncAll();
  if (GetBlockIdx() == 0) return;
  DataCopy(t.b, w.workspace(), 8);
  order<HardEvent::MTE2_S>();
  w.seen = t.b.GetValue(0) != 1.0f;
}
RULE(rule5_core_ends_without_sync_breaks, .breaks = {", S: ", "core 1 has ended"}, .fast = true, .cores = 2) {
  if (GetBlockIdx() == 0) CAUGHT(SyncAll());
}
RULE(rule5_many_cores_keep, .cores = 48, .result = [](const World& w) { return w.work[0] == 48 * 20; }) {
  Tensors t;
  for (int i = 0; i < 20; ++i) {
    SetAtomicAdd<float>();
    DataCopy(w.workspace(), t.a, 8);
    SetAtomicNone();
    SyncAll();
  }
}
RULE(rule5_soft_sync_keeps, .cores = 4) {
  Tensors t;
  TBuf<> own;
  t.pipe.InitBuffer(own, 4 * 32);
  for (int i = 0; i < 3; ++i) {
    if (GetBlockIdx() == i) Adds(t.a, t.a, 1.0f, 8);
    order<HardEvent::V_MTE3>();
    if (GetBlockIdx() == i) DataCopy(w.workspace(), t.a, 8);
    SyncAll(w.tensor<int32_t>(w.sync.data()), own.Get<int32_t>());
    DataCopy(t.b, w.workspace(), 8);
    order<HardEvent::MTE2_S>();
    if (t.b.GetValue(0) != 2.0f) w.seen = true;
    SyncAll(w.tensor<int32_t>(w.sync.data()), own.Get<int32_t>());
  }
}
RULE(rule5_soft_sync_of_some_cores_keeps, .cores = 4) {
  Tensors t;
  TBuf<> own;
  t.pipe.InitBuffer(own, 4 * 32);
  if (GetBlockIdx() >= 2) return;
  if (GetBlockIdx() == 1) DataCopy(w.workspace(), t.a, 8);
  SyncAll(w.tensor<int32_t>(w.sync.data()), own.Get<int32_t>(), 2);
  DataCopy(t.b, w.workspace(), 8);
}
RULE(rule5_soft_sync_without_zeros_breaks, .breaks = {", MTE2: ", "was not zeroed: work+0x"}, .fast = true,
     .cores = 2) {
  TPipe pipe;
  TBuf<> own;
  pipe.InitBuffer(own, 2 * 32);
  w.work.fill(3);
  CAUGHT(SyncAll(w.tensor<int32_t>(w.work.data()), own.Get<int32_t>()));
}
RULE(rule5_soft_sync_without_room_breaks, .breaks = {", S: ", "32 bytes per core"}, .fast = true, .cores = 2) {
  TPipe pipe;
  TBuf<> own;
  pipe.InitBuffer(own, 32);
  CAUGHT(SyncAll(w.tensor<int32_t>(w.sync.data()), own.Get<int32_t>()));
}

// ---- 6. The data cache.

RULE(rule6_dirty_at_the_end_breaks, .breaks = {", S: SetValue of work+0x8 is left"}, .fast = true) {
  CAUGHT(w.workspace().SetValue(2, 1.0f));
}
RULE(rule6_cleaned_keeps, .result = [](const World& w) { return w.work[2] == 1; }) {
  w.workspace().SetValue(2, 1.0f);
  clean(w.workspace());
}
RULE(rule6_all_cleaned_keeps, .result = [](const World& w) { return w.work[2] == 1 && w.work[100] == 2; }) {
  w.workspace().SetValue(2, 1.0f);
  w.workspace()(100) = 2.0f;
  DataCacheCleanAndInvalid<float, CacheLine::ENTIRE_DATA_CACHE, DcciDst::CACHELINE_OUT>(w.workspace());
}
// An address within a line stands for the bytes from there on.
RULE(rule6_cleaned_from_the_middle_breaks, .breaks = {", S: SetValue of work+0x8 is left"}, .fast = true) {
  CAUGHT(w.workspace().SetValue(2, 1.0f));
  clean(w.workspace()[8]);
}
RULE(rule6_shared_line_breaks, .breaks = {"writes work+0x", "and has not cleaned"}, .cores = 2) {
  w.workspace().SetValue(GetBlockIdx(), 1.0f);
  SyncAll();
  clean(w.workspace());
}
// Core 0 has a line in its cache, core 1 changes the other half of it, core 0 writes the whole line back. Returns
// whether what core 1 wrote is lost.
bool write_both_halves(World& w, const GlobalTensor<float>& line) {
  Tensors t;
  if (GetBlockIdx() == 0) clean(line);
  if (GetBlockIdx() == 0) OTHER(line.SetValue(0, 1.0f));
  SyncAll();
  if (GetBlockIdx() == 1) CAUGHT(DataCopy(line[8], t.a, 8));
  PipeBarrier<PIPE_ALL>();
  SyncAll();
  if (GetBlockIdx() == 0) clean(line);
  SyncAll();
  if (GetBlockIdx() == 0) return false;
  clean(line[8]);
  return line.GetValue(8) == 0;
}
RULE(rule6_neighbours_are_clobbered, .cores = 2, .seen = Case::kSometimes) {
  if (write_both_halves(w, w.window(0))) w.seen = true;
}
RULE(rule6_neighbours_of_a_dirty_line_break, .breaks = {", MTE3: writes work+0x20", "core 0's S rewrites"},
     .cores = 2) {
  write_both_halves(w, w.workspace());
}
RULE(
    rule6_lines_of_their_own_keep, .cores = 2,
    .result = [](const World& w) { return w.work[0] == 1 && w.work[16] == 1; }) {
  w.workspace().SetValue(GetBlockIdx() * 16, 1.0f);
  clean(w.workspace()[GetBlockIdx() * 16]);
}
RULE(rule6_neighbours_that_are_read_keep, .cores = 2) {
  Tensors t;
  if (GetBlockIdx() == 0) {
    w.workspace().SetValue(0, 1.0f);
    clean(w.workspace());
  } else {
    DataCopy(t.a, w.workspace()[8], 8);
  }
}
RULE(rule6_not_invalidated_is_stale, .cores = 2, .seen = Case::kSometimes) {
  Tensors t;
  if (GetBlockIdx() == 1) w.workspace().GetValue(0);
  SyncAll();
  if (GetBlockIdx() == 0) DataCopy(w.workspace(), t.a, 8);
  SyncAll();
  if (GetBlockIdx() == 1 && w.workspace().GetValue(0) == 0) w.seen = true;
}
RULE(rule6_invalidated_is_fresh, .cores = 2) {
  Tensors t;
  if (GetBlockIdx() == 1) w.workspace().GetValue(0);
  SyncAll();
  if (GetBlockIdx() == 0) DataCopy(w.workspace(), t.a, 8);
  SyncAll();
  if (GetBlockIdx() == 0) return;
  clean(w.workspace());
  if (w.workspace().GetValue(0) == 0) w.seen = true;
}
// And perhaps the second one.
void read_first_line(World& w) {
  clean(w.window(0)[16]);
  clean(w.window(0));
  w.window(0).GetValue(0);
}
RULE(rule6_line_that_came_unasked_is_stale, .cores = 2, .seen = Case::kSometimes) {
  Tensors t;
  if (GetBlockIdx() == 1) read_first_line(w);
  SyncAll();
  if (GetBlockIdx() == 0) DataCopy(w.window(0)[16], t.a, 8);
  if (GetBlockIdx() == 0) PipeBarrier<PIPE_ALL>();
  SyncAll();
  if (GetBlockIdx() == 1 && w.window(0).GetValue(16) == 0) w.seen = true;
}
RULE(rule6_line_that_came_unasked_is_invalidated, .cores = 2) {
  Tensors t;
  if (GetBlockIdx() == 1) read_first_line(w);
  SyncAll();
  if (GetBlockIdx() == 0) DataCopy(w.window(0)[16], t.a, 8);
  if (GetBlockIdx() == 0) PipeBarrier<PIPE_ALL>();
  SyncAll();
  if (GetBlockIdx() == 0) return;
  clean(w.window(0)[16]);
  if (w.window(0).GetValue(16) == 0) w.seen = true;
}
// What the launch before has read there, of other windows perhaps.
RULE(rule6_line_of_the_launch_before_breaks,
     .breaks = {", S: the cache may have the line of window of rank 0+0x40 as a launch before has left it"},
     .fast = true) {
  CAUGHT(w.window(0).GetValue(16));
}
RULE(rule6_word_before_what_was_invalidated_breaks, .breaks = {", S: the cache may have the line of", "+0x1c"},
     .fast = true) {
  clean(w.window(0)[8]);
  w.window(0).GetValue(8);
  CAUGHT(w.window(0).GetValue(7));
}
// Eviction would write back the words before, as they were once.
RULE(rule6_write_to_part_of_an_old_line_breaks, .breaks = {", S: the cache may have the line of", "+0x20"},
     .fast = true) {
  clean(w.window(0)[8]);
  CAUGHT(w.window(0).SetValue(8, 1.0f));
}
RULE(rule6_line_of_the_launch_before_is_invalidated, .launches = 2) {
  w.windows[0][0] = static_cast<float>(w.launch);  // by a peer
  clean(w.window(0));
  if (w.window(0).GetValue(0) != static_cast<float>(w.launch)) w.seen = true;
}
RULE(rule6_evicted_line_is_written_back, .cores = 2, .seen = Case::kSometimes) {
  DataCacheCleanAndInvalid<float, CacheLine::ENTIRE_DATA_CACHE, DcciDst::CACHELINE_OUT>(w.window(0));
  if (GetBlockIdx() == 0) {
    w.window(0).SetValue(0, 1.0f);
    for (int i = 0; i < 200; ++i) w.window(0).GetValue(1024 + i * 16);
  }
  SyncAll();
  if (GetBlockIdx() == 1 && w.window(0).GetValue(0) == 1.0f) w.seen = true;
  SyncAll();
  if (GetBlockIdx() == 0) clean(w.window(0));
}
RULE(rule6_transfer_past_the_cache_breaks, .breaks = {", MTE2: reads work+0x0", "S writes", "data cache"}) {
  Tensors t;
  OTHER(w.workspace().SetValue(0, 1.0f));
  order<HardEvent::S_MTE2>();
  CAUGHT(DataCopy(t.a, w.workspace(), 8));
  clean(w.workspace());
}
RULE(rule6_cleaned_without_fence_breaks, .breaks = {", MTE2: reads work+0x0", "S writes"}) {
  Tensors t;
  w.workspace().SetValue(0, 1.0f);
  OTHER(clean(w.workspace()), w.other = 0);  // in rules.h
  CAUGHT(DataCopy(t.a, w.workspace(), 8));
}
RULE(rule6_cleaned_with_fence_keeps) {
  Tensors t;
  w.workspace().SetValue(0, 1.0f);
  clean(w.workspace());
  order<HardEvent::S_MTE2>();
  DataCopy(t.a, w.workspace(), 8);
  order<HardEvent::MTE2_S>();
  w.seen = t.a.GetValue(0) != 1.0f;
}

// ---- 7. Atomics.

RULE(rule7_atomics_of_cores_keep, .cores = 8, .result = [](const World& w) { return w.work[5] == 8; }) {
  Tensors t;
  SetAtomicAdd<float>();
  DataCopy(w.workspace(), t.a, t.kCount);
  SetAtomicNone();
}
RULE(rule7_atomic_maximum_keeps, .cores = 4, .result = [](const World& w) { return w.work[5] == 4; }) {
  Tensors t;
  Duplicate(t.b, static_cast<float>(GetBlockIdx() + 1), t.kCount);
  order<HardEvent::V_MTE3>();
  SetAtomicMax<float>();
  DataCopy(w.workspace(), t.b, t.kCount);
  SetAtomicNone();
}
RULE(rule7_atomic_beside_a_plain_write_breaks, .breaks = {", MTE3: adds to work+0x0", "MTE3 writes"}) {
  Tensors t;
  OTHER(DataCopy(w.workspace(), t.a, 8));
  SetAtomicAdd<float>();
  CAUGHT(DataCopy(w.workspace(), t.a, 8));
  SetAtomicNone();
}
RULE(rule7_atomic_after_a_plain_write_keeps, .result = [](const World& w) { return w.work[0] == 2; }) {
  Tensors t;
  DataCopy(w.workspace(), t.a, 8);
  PipeBarrier<PIPE_MTE3>();
  SetAtomicAdd<float>();
  DataCopy(w.workspace(), t.a, 8);
  SetAtomicNone();
}

// ---- 8. Windows. Core 0 sends 8 blocks of ones and then a flag to rank 1's window, where core 1, as if it were rank
// 1, polls for the flag and looks at what is there.

constexpr uint32_t kFlag = 2048;  // in floats

template <typename Between>
void send(World& w, Between between) {
  Tensors t;
  GlobalTensor<float> window = w.window(1);
  for (int i = 0; i < 4; ++i) DataCopy(window[i * t.kCount], t.a, t.kCount);
  between(t);
  DataCopy(window[kFlag], t.a, 8);
}

void receive(World& w) {
  GlobalTensor<float> window = w.window(1);
  wait([&] {
    clean(window[kFlag]);
    return window.GetValue(kFlag) != 0;
  });
  for (int i = 0; i < 8; ++i) {
    clean(window[i * 128]);
    if (window.GetValue(i * 128) == 0) w.seen = true;
  }
}

template <typename Between>
void send_and_receive(World& w, Between between) {
  if (GetBlockIdx() == 0)
    send(w, between);
  else
    receive(w);
}

RULE(rule8_flag_overtakes_data, .cores = 2, .seen = Case::kSometimes) {
  send_and_receive(w, [](Tensors&) {});
}
RULE(rule8_flag_after_barrier_of_mte3_keeps, .cores = 2) {
  send_and_receive(w, [](Tensors&) { PipeBarrier<PIPE_MTE3>(); });
}
RULE(rule8_flag_after_barrier_of_all_keeps, .cores = 2) {
  send_and_receive(w, [](Tensors&) { PipeBarrier<PIPE_ALL>(); });
}
RULE(rule8_flag_after_scalar_wait_keeps, .cores = 2) {
  send_and_receive(w, [](Tensors&) { order<HardEvent::MTE3_S>(); });
}
// MTE3 has read the unified buffer; that is all that this flag says.
RULE(rule8_flag_after_wait_of_vector_overtakes_data, .cores = 2, .seen = Case::kSometimes) {
  send_and_receive(w, [](Tensors& t) {
    order<HardEvent::MTE3_V>();
    Adds(t.a, t.a, 1.0f, t.kCount);
    order<HardEvent::V_MTE3>();
  });
}
RULE(rule8_scalar_flag_overtakes_data, .cores = 2, .seen = Case::kSometimes) {
  if (GetBlockIdx() == 1) return receive(w);
  Tensors t;
  for (int i = 0; i < 4; ++i) DataCopy(w.window(1)[i * t.kCount], t.a, t.kCount);
  clean(w.window(1)[kFlag]);
  w.window(1).SetValue(kFlag, 1.0f);
  clean(w.window(1)[kFlag]);
}
RULE(rule8_scalar_flag_after_wait_keeps, .cores = 2) {
  if (GetBlockIdx() == 1) return receive(w);
  Tensors t;
  for (int i = 0; i < 4; ++i) DataCopy(w.window(1)[i * t.kCount], t.a, t.kCount);
  order<HardEvent::MTE3_S>();
  clean(w.window(1)[kFlag]);
  w.window(1).SetValue(kFlag, 1.0f);
  clean(w.window(1)[kFlag]);
}
RULE(rule8_buffer_is_free_after_flag_keeps, .cores = 1, .result = [](const World& w) { return w.windows[1][0] == 1; }) {
  Tensors t;
  DataCopy(w.window(1), t.a, t.kCount);
  order<HardEvent::MTE3_V>();
  Duplicate(t.a, 2.0f, t.kCount);
}
RULE(rule8_overlapping_sends_break, .breaks = {", link: writes window of rank 1+0x0", "link writes"}) {
  Tensors t;
  OTHER(DataCopy(w.window(1), t.a, 8));
  CAUGHT(DataCopy(w.window(1), t.b, 8));
}
RULE(rule8_sync_is_not_enough, .arch = 3510, .cores = 2, .seen = Case::kSometimes) {
  Tensors t;
  if (GetBlockIdx() == 0) DataCopy(w.window(1), t.a, t.kCount);
  SyncAll();
  if (GetBlockIdx() == 0) return;
  clean(w.window(1));
  if (w.window(1).GetValue(0) == 0) w.seen = true;
}
RULE(rule8_barrier_and_sync_keep, .cores = 2) {
  Tensors t;
  if (GetBlockIdx() == 0) DataCopy(w.window(1), t.a, t.kCount);
  PipeBarrier<PIPE_ALL>();
  SyncAll();
  if (GetBlockIdx() == 0) return;
  clean(w.window(1));
  if (w.window(1).GetValue(0) == 0) w.seen = true;
}

// 480 bytes of data and 32 of flag in one transfer, polled by MTE2.
void poll_block(World& w, uint32_t begin) {
  Tensors t;
  GlobalTensor<float> window = w.window(1);
  for (int round = 1; round <= 20; ++round) {
    wait([&] {
      DataCopy(t.a, window[begin], 128);
      order<HardEvent::MTE2_S>();
      const bool has_come = t.a.GetValue(127) >= round;
      order<HardEvent::S_MTE2>();
      return has_come;
    });
    for (int i = 0; i < 128; ++i)
      if (t.a.GetValue(i) < round) w.seen = true;
    order<HardEvent::S_MTE2>();
  }
}

void send_block(World& w, uint32_t begin) {
  Tensors t;
  for (int round = 1; round <= 20; ++round) {
    Duplicate(t.a, static_cast<float>(round), 128);
    order<HardEvent::V_MTE3>();
    DataCopy(w.window(1)[begin], t.a, 128);
    PipeBarrier<PIPE_MTE3>();
    order<HardEvent::MTE3_V>();
  }
}

RULE(rule8_aligned_block_never_tears, .cores = 2) {
  if (GetBlockIdx() == 0)
    send_block(w, 256);
  else
    poll_block(w, 256);
}
RULE(rule8_block_off_alignment_tears, .cores = 2, .seen = Case::kSometimes) {
  if (GetBlockIdx() == 0)
    send_block(w, 256 + 64);
  else
    poll_block(w, 256 + 64);
}

}  // namespace
}  // namespace rules
