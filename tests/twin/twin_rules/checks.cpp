// Checks that are always on: memory, buffers and queues, counts.
#include "rules.h"

namespace rules {
namespace {

// ---- The unified buffer.

RULE(check_capacity_breaks, .breaks = {", S: InitBuffer of 65536 bytes at 196224"}, .fast = true) {
  TPipe pipe;
  TBuf<> buffer, more;
  pipe.InitBuffer(buffer, 192 * 1024 - 384);
  CAUGHT(pipe.InitBuffer(more, 65536));
}
RULE(check_meeting_breaks, .breaks = {", S: SyncAll waits for ever in a kernel of"}, .fast = true) {
  KERNEL_TASK_TYPE_DEFAULT(KERNEL_TYPE_AIV_ONLY);
  CAUGHT(SyncAll());
}
RULE(check_meeting_keeps, .cores = 2) {
  KERNEL_TASK_TYPE_DEFAULT(KERNEL_TYPE_MIX_AIV_1_0);
  SyncAll();
}
RULE(check_blocks_breaks, .breaks = {", core 2, begins when others have ended", "3 blocks, and 2 vector cores"},
     .fast = true, .cores = 3, .vector_cores = 2) {}
RULE(check_schedule_breaks, .breaks = {", core 1, begins when others have ended: SetScheduleMode(1) is missing"},
     .fast = true, .cores = 2, .together = false) {}
RULE(check_blocks_keep, .cores = 3, .vector_cores = 4) { SyncAll(); }
RULE(check_schedule_of_one_block_keeps, .together = false) { SyncAll(); }
RULE(check_count_of_0_breaks, .breaks = {", V: count is 0"}, .arch = 3510, .fast = true) {
  Tensors t;
  CAUGHT(Duplicate(t.a, 1.0f, 0));
}
RULE(check_overlap_breaks, .breaks = {", V: what it writes overlaps what it reads"}, .fast = true) {
  Tensors t;
  CAUGHT(Add(t.a, t.a, t.a[8], 9));
}
RULE(check_overlap_keeps) {
  Tensors t;
  Add(t.a, t.a, t.a[8], 8);
}
RULE(check_capacity_keeps) {
  TPipe pipe;
  TBuf<> buffer;
  pipe.InitBuffer(buffer, 192 * 1024 - 256);
}
RULE(check_beyond_its_buffer_breaks, .breaks = {", V: accesses unified buffer 0x20..0x60, beyond its buffer"},
     .fast = true) {
  TPipe pipe;
  TBuf<> a, b;
  pipe.InitBuffer(a, 64);
  pipe.InitBuffer(b, 64);
  CAUGHT(Duplicate(a.Get<float>()[8], 0.0f, 16));
}
RULE(check_scalar_beyond_its_buffer_breaks, .breaks = {", S: accesses unified buffer 0x40..0x44, beyond"},
     .fast = true) {
  TPipe pipe;
  TBuf<> a, b;
  pipe.InitBuffer(a, 64);
  pipe.InitBuffer(b, 64);
  CAUGHT(a.Get<int32_t>().SetValue(16, 0));
}
RULE(check_alignment_breaks, .breaks = {", V: unified buffer 0x4..0x24 is not aligned to 32"}, .fast = true) {
  Tensors t;
  CAUGHT(Duplicate(t.a[1], 0.0f, 8));
}
RULE(check_alignment_of_transfer_breaks, .breaks = {", MTE3: unified buffer 0x10..0x30 is not aligned"}, .fast = true) {
  Tensors t;
  CAUGHT(DataCopy(w.output(), t.a[4], 8));
}
RULE(check_never_written_breaks, .breaks = {", V: reads unified buffer", "byte 0x20 has never been written"},
     .fast = true) {
  Tensors t(false);
  Duplicate(t.a, 0.0f, 8);
  PipeBarrier<PIPE_V>();
  CAUGHT(Adds(t.b, t.a, 1.0f, 16));
  PipeBarrier<PIPE_ALL>();
}
RULE(check_scalar_never_written_breaks, .breaks = {", S: reads unified buffer", "never been written"}, .fast = true) {
  Tensors t(false);
  CAUGHT(t.a.GetValue(0));
}
RULE(check_uninitialised_padding_breaks, .breaks = {", S: reads unified buffer", "never been written"}, .fast = true) {
  Tensors t(false);
  DataCopyPad(t.a, w.input(), {1, 12, 0, 0, 0}, {false, 0, 1, 0.0f});
  order<HardEvent::MTE2_S>();
  CAUGHT(t.a.GetValue(3));
}
RULE(check_padding_keeps) {
  Tensors t(false);
  DataCopyPad(t.a, w.input()[4], {2, 12, 4, 1, 0}, {true, 2, 3, -1.0f});
  order<HardEvent::MTE2_S>();
  const float expected[] = {-1, -1, 4, 5, 6, -1, -1, -1};
  for (int i = 0; i < 8; ++i)
    if (t.a.GetValue(i) != expected[i]) w.seen = true;
  if (t.a.GetValue(18) != 8.0f) w.seen = true;
}

// ---- Global memory.

RULE(check_size_of_transfer_breaks, .breaks = {", MTE2: 20 bytes are no multiple of 32"}, .fast = true) {
  Tensors t;
  CAUGHT(DataCopy(t.a, w.input(), 5));
}
RULE(check_size_of_padded_transfer_keeps, .result = [](const World& w) { return w.out[4] == 1 && w.out[5] == 0; }) {
  Tensors t;
  DataCopyPad(w.output(), t.a, {1, 20, 0, 0, 0});
}
RULE(check_strides_keep, .result = [](const World& w) { return w.out[8] == 16 && w.out[9] == 17 && w.out[2] == 0; }) {
  Tensors t;
  DataCopy(t.a, w.input(), DataCopyParams(2, 1, 1, 0));
  order<HardEvent::MTE2_MTE3>();
  DataCopyPad(w.output(), t.a, {2, 8, 0, 24, 0});
}
RULE(check_end_of_region_breaks, .breaks = {", MTE2: reads in+0x3ff0..0x4010, which has 0x4000 bytes"}, .fast = true) {
  Tensors t;
  CAUGHT(DataCopy(t.a, w.input()[4092], 8));
}
RULE(check_no_region_breaks, .breaks = {", MTE3: writes global memory", "in no region"}, .fast = true) {
  Tensors t;
  CAUGHT(DataCopy(w.tensor(&t), t.a, 8));
}
RULE(check_outside_of_window_breaks, .breaks = {", MTE3: writes window of rank 1+0x3fe0..0x4020"}, .fast = true) {
  Tensors t;
  CAUGHT(DataCopy(w.window(1)[4088], t.a, 16));
}
RULE(check_scalar_outside_breaks, .breaks = {", S: ", "global memory"}, .fast = true) {
  Tensors t;
  CAUGHT(w.tensor(&t).GetValue(0));
}
RULE(check_read_only_breaks, .breaks = {", MTE3: writes in+0x0, which is read only"}, .fast = true) {
  Tensors t;
  CAUGHT(DataCopy(w.input(), t.a, 8));
}
RULE(check_element_read_only_breaks, .breaks = {", S: writes in+0x4, which is read only"}, .fast = true) {
  CAUGHT(w.input()(1) = 0.0f);
}
RULE(check_scalar_read_only_breaks, .breaks = {", S: writes in+0x4, which is read only"}, .fast = true) {
  CAUGHT(w.input().SetValue(1, 0.0f));
}
RULE(check_memory_never_written_breaks, .breaks = {", MTE2: reads out+0x0, whose byte 0x20 has never been written"},
     .fast = true) {
  Tensors t;
  DataCopy(w.output(), t.a, 8);
  order<HardEvent::MTE3_MTE2>();
  CAUGHT(DataCopy(t.a, w.output(), 16));
}
RULE(check_scalar_memory_never_written_breaks, .breaks = {", S: reads out+0x4"}, .fast = true) {
  CAUGHT(w.output().GetValue(1));
}
RULE(check_scalar_memory_written_keeps) {
  w.output().SetValue(1, 3.0f);
  w.seen = w.output().GetValue(1) != 3.0f;
  clean(w.output());
  w.seen = w.seen || w.output().GetValue(1) != 3.0f;
}

// ---- Queues.

RULE(check_no_free_buffer_breaks, .breaks = {", MTE2: AllocTensor"}, .fast = true) {
  TPipe pipe;
  TQue<QuePosition::VECIN, 2> queue;
  pipe.InitBuffer(queue, 2, 32);
  queue.AllocTensor<float>();
  OTHER(queue.AllocTensor<float>());
  CAUGHT(queue.AllocTensor<float>());
}
RULE(check_depth_breaks, .breaks = {", V: EnQue", "depth is 1"}, .fast = true) {
  TPipe pipe;
  TQue<QuePosition::VECOUT, 1> queue;
  pipe.InitBuffer(queue, 2, 32);
  queue.EnQue(queue.AllocTensor<float>());
  CAUGHT(queue.EnQue(queue.AllocTensor<float>()));
}
RULE(check_empty_queue_breaks, .breaks = {", MTE3: DeQue", "empty"}, .fast = true) {
  TPipe pipe;
  TQue<QuePosition::VECOUT, 1> queue;
  pipe.InitBuffer(queue, 2, 32);
  CAUGHT(queue.DeQue<float>());
}
RULE(check_freed_twice_breaks, .breaks = {", V: FreeTensor of a tensor that is free"}, .fast = true) {
  TPipe pipe;
  TQue<QuePosition::VECIN, 1> queue;
  pipe.InitBuffer(queue, 1, 32);
  LocalTensor<float> a = queue.AllocTensor<float>();
  queue.FreeTensor(a);
  CAUGHT(queue.FreeTensor(a));
}
RULE(check_freed_while_queued_breaks, .breaks = {", V: FreeTensor of a tensor that is in the queue"}, .fast = true) {
  TPipe pipe;
  TQue<QuePosition::VECIN, 1> queue;
  pipe.InitBuffer(queue, 1, 32);
  LocalTensor<float> a = queue.AllocTensor<float>();
  queue.EnQue(a);
  CAUGHT(queue.FreeTensor(a));
}
RULE(check_tensor_of_another_queue_breaks, .breaks = {", V: FreeTensor of a tensor of another queue"}, .fast = true) {
  TPipe pipe;
  TQue<QuePosition::VECIN, 1> queue, other;
  pipe.InitBuffer(queue, 1, 32);
  pipe.InitBuffer(other, 1, 32);
  LocalTensor<float> a = queue.AllocTensor<float>();
  CAUGHT(other.FreeTensor(a));
}
RULE(check_left_in_queue_breaks, .breaks = {", V: ", "left in the queue"}, .fast = true) {
  TPipe pipe;
  TQue<QuePosition::VECIN, 1> queue;
  pipe.InitBuffer(queue, 1, 32);
  LocalTensor<float> a = queue.AllocTensor<float>();
  CAUGHT(queue.EnQue(a));
}
RULE(check_never_freed_breaks, .breaks = {", MTE2: ", "left allocated"}, .fast = true) {
  TPipe pipe;
  TQue<QuePosition::VECIN, 1> queue;
  pipe.InitBuffer(queue, 1, 32);
  CAUGHT(queue.AllocTensor<float>());
}
RULE(check_no_buffers_breaks, .breaks = {", S: ", "InitBuffer is missing"}, .fast = true) {
  TPipe pipe;
  TQue<QuePosition::VECIN, 1> queue;
  CAUGHT(queue.AllocTensor<float>());
}
RULE(check_second_pipe_breaks, .breaks = {", S: ", "a TPipe already"}, .fast = true) {
  TPipe pipe;
  w.caught = __LINE__ + 1;
  TPipe second;
}
RULE(check_reset_keeps) {
  TPipe pipe;
  for (int i = 0; i < 3; ++i) {
    TQue<QuePosition::VECIN, 1> queue;
    pipe.InitBuffer(queue, 1, 128 * 1024);
    LocalTensor<float> a = queue.AllocTensor<float>();
    DataCopy(a, w.input(), 8);
    queue.FreeTensor(a);
    pipe.Reset();
    PipeBarrier<PIPE_ALL>();
  }
}

// ---- Counts and types.

RULE(check_block_count_breaks, .breaks = {", MTE2: blockCount is 4096"}, .fast = true) {
  Tensors t;
  CAUGHT(DataCopyPad(t.a, w.input(), {4096, 4, 0, 0, 0}, {}));
}
RULE(check_repeat_breaks, .breaks = {", V: repeatTime is 256"}, .fast = true) {
  Tensors t;
  CAUGHT(WholeReduceSum(t.b, t.a, 64, 256, 1, 1, 8));
}
RULE(check_mask_breaks, .breaks = {", V: mask is 65"}, .fast = true) {
  Tensors t;
  CAUGHT(WholeReduceSum(t.b, t.a, 65, 1, 1, 1, 8));
}
RULE(check_compared_bytes_break, .breaks = {", V: 32 bytes to compare"}, .fast = true) {
  Tensors t;
  CAUGHT(CompareScalar(t.b.ReinterpretCast<uint8_t>(), t.a, 0.0f, CMPMODE::GT, 8));
}
RULE(check_cast_mode_breaks, .breaks = {", V: no Cast", "on 3510"}, .arch = 3510, .fast = true) {
  Tensors t;
  Cast(t.b.ReinterpretCast<half>(), t.a, RoundMode::CAST_NONE, 64);
  PipeBarrier<PIPE_V>();
  CAUGHT(Cast(t.c.ReinterpretCast<int8_t>(), t.b.ReinterpretCast<half>(), RoundMode::CAST_NONE, 64));
}
RULE(check_atomic_part_breaks, .breaks = {", MTE3: an atomic on part of an element"}, .fast = true) {
  Tensors t;
  SetAtomicAdd<float>();
  CAUGHT(DataCopyPad(w.workspace<int8_t>(), t.a.ReinterpretCast<int8_t>(), {1, 3, 0, 0, 0}));
}

// ---- What instructions compute.

RULE(vector_instructions, .result = [](const World& w) { return w.out[0] == 1; }) {
  Tensors t;
  TBuf<> more;
  t.pipe.InitBuffer(more, 8192);
  LocalTensor<float> d = more.Get<float>(512), shared = more.Get<float>()[1024];
  LocalTensor<uint8_t> bits = more.Get<float>()[1536].ReinterpretCast<uint8_t>();
  LocalTensor<uint32_t> offsets = more.Get<float>()[1600].ReinterpretCast<uint32_t>();
  bool right = true;
  const auto check = [&](const auto& x, int i, float value) {
    PipeBarrier<PIPE_ALL>();
    right = right && static_cast<float>(x.GetValue(i)) == value;
    PipeBarrier<PIPE_ALL>();
  };
  CreateVecIndex(t.a, 0.0f, t.kCount);
  check(t.a, 77, 77);
  Muls(t.b, t.a, -2.0f, t.kCount);
  check(t.b, 10, -20);
  Abs(t.b, t.b, t.kCount);
  check(t.b, 10, 20);
  Axpy(t.b, t.a, 3.0f, t.kCount);
  check(t.b, 10, 50);
  MulAddDst(t.b, t.a, t.a, t.kCount);
  check(t.b, 10, 150);
  Div(t.c, t.b, t.a, t.kCount);
  check(t.c, 10, 15);
  Maxs(t.c, t.a, 100.0f, t.kCount);
  check(t.c, 10, 100);
  ReduceMax(d, t.a, shared, t.kCount, true);
  check(d, 0, 255);
  check(d.ReinterpretCast<uint32_t>(), 1, 255);
  ReduceSum(d, t.a, shared, t.kCount);
  check(d, 0, 255 * 128);
  WholeReduceSum(d, t.a, 64, 4, 1, 1, 8);
  check(d, 1, (64 + 127) * 32);
  WholeReduceMax(d, t.a, 64, 4, 1, 1, 8, ReduceOrder::ORDER_ONLY_VALUE);
  check(d, 2, 191);
  BlockReduceMax(d, t.a, 4, 64, 1, 1, 8);
  check(d, 9, 79);
  CompareScalar(bits, t.a, 5.0f, CMPMODE::LT, 128);
  check(bits, 0, 31);
  check(bits, 1, 0);
  Select(d, bits, t.a, 9.0f, SELMODE::VSEL_TENSOR_SCALAR_MODE, 128);
  check(d, 4, 4);
  check(d, 5, 9);
  Brcb(d, t.a, 2, {1, 8});
  check(d, 8 * 9 + 3, 9);
  for (int i = 0; i < 8; ++i) offsets.SetValue(i, (7 - i) * 4);
  PipeBarrier<PIPE_ALL>();
  Gather(d, t.a, offsets, 40, 8);
  check(d, 2, 15);
  ShiftLeft(d.ReinterpretCast<int32_t>(), offsets.ReinterpretCast<int32_t>(), 2, 8);
  check(d.ReinterpretCast<int32_t>(), 0, 112);
  Cast(d.ReinterpretCast<bfloat16_t>(), t.a, RoundMode::CAST_RINT, t.kCount);
  PipeBarrier<PIPE_V>();
  Cast(t.b, d.ReinterpretCast<bfloat16_t>(), RoundMode::CAST_NONE, t.kCount);
  check(t.b, 255, 255);
  t.c.SetValue(0, right ? 1.0f : 0.0f);
  PipeBarrier<PIPE_ALL>();
  DataCopy(w.output(), t.c, 8);
}

// 10^5 scalar accesses, as much as a kernel makes: test_twin.py's time limit is the test.
RULE(scalar_accesses) {
  Tensors t;
  LocalTensor<int32_t> a = t.a.ReinterpretCast<int32_t>();
  for (int i = 0; i < 50'000; ++i) a.SetValue(i * 7 % t.kCount, a.GetValue(i * 13 % t.kCount) + 1);
}

// ---- Counters.

RULE(counted_by_region_keeps, .cores = 2) {
  Tensors t;
  const uint32_t core = GetBlockIdx();
  const auto blocks = static_cast<uint16_t>(2 + core);
  DataCopyPad(t.a, w.input(), {blocks, 20, 12, 0, 0}, {false, 0, 0, 0.0f});
  DataCopy(t.b, w.window(0), 8);
  DataCopy(t.b[8], w.window(0)[8], 8);
  order<HardEvent::MTE2_MTE3>();
  DataCopyPad(w.workspace()[core * 64], t.a, {blocks, 20, 0, 0, 0});
  DataCopy(w.window(1)[core * 1024], t.c, 256);
  DataCopy(w.window(1)[core * 1024 + 256], t.c, 16);
  PipeBarrier<PIPE_ALL>();
  SyncAll();
}

}  // namespace
}  // namespace rules
