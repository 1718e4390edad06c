// Rules 1 to 4, and 9: order within a core.
#include "rules.h"

namespace rules {
namespace {

bool copied(const World& w) { return std::equal(w.in.begin(), w.in.begin() + Tensors::kCount, w.out.begin()); }
bool all_are(const World& w, float value) {
  return std::all_of(w.out.begin(), w.out.begin() + Tensors::kCount, [=](float x) { return x == value; });
}

// ---- 1. A pipe starts in order; executions may overlap.

RULE(rule1_vector_after_vector_breaks, .breaks = {", V: reads unified buffer 0x400..", "V writes"}, .arch = 2201) {
  Tensors t;
  OTHER(Adds(t.b, t.a, 1.0f, t.kCount));
  CAUGHT(Adds(t.c, t.b, 1.0f, t.kCount));
}
RULE(rule1_vector_overwrites_vector_breaks, .breaks = {", V: writes unified buffer 0x0..", "V reads"}, .arch = 2201) {
  Tensors t;
  OTHER(Adds(t.b, t.a, 1.0f, t.kCount));
  CAUGHT(Duplicate(t.a, 0.0f, t.kCount));
}
RULE(rule1_vector_after_vector_keeps, .result = [](const World& w) { return all_are(w, 3); }) {
  Tensors t;
  Adds(t.b, t.a, 1.0f, t.kCount);
  PipeBarrier<PIPE_V>();
  Adds(t.c, t.b, 1.0f, t.kCount);
  order<HardEvent::V_MTE3>();
  DataCopy(w.output(), t.c, t.kCount);
}
RULE(rule1_vectors_on_different_data_keep) {
  Tensors t;
  Adds(t.b, t.a, 1.0f, t.kCount);
  Adds(t.c, t.a, 1.0f, t.kCount);
}
RULE(rule1_overlapping_reads_into_buffer_break, .breaks = {", MTE2: writes unified buffer", "MTE2 writes"}) {
  Tensors t;
  OTHER(DataCopy(t.a, w.input(), t.kCount));
  CAUGHT(DataCopy(t.a[8], w.input()[8], 8));
}
RULE(rule1_overlapping_reads_into_buffer_keep) {
  Tensors t;
  DataCopy(t.a, w.input(), t.kCount);
  PipeBarrier<PIPE_MTE2>();
  DataCopy(t.a[8], w.input()[8], 8);
}
RULE(rule1_overlapping_writes_to_memory_break, .breaks = {", MTE3: writes out+0x20", "MTE3 writes"}) {
  Tensors t;
  OTHER(DataCopy(w.output(), t.a, t.kCount));
  CAUGHT(DataCopy(w.output()[8], t.b, 8));
}
RULE(rule1_overlapping_writes_to_memory_keep) {
  Tensors t;
  DataCopy(w.output(), t.a, t.kCount);
  PipeBarrier<PIPE_MTE3>();
  DataCopy(w.output()[8], t.b, 8);
}
RULE(rule1_transfers_of_different_data_keep) {
  Tensors t;
  DataCopy(t.a, w.input(), t.kCount);
  DataCopy(t.b, w.input(), t.kCount);
  DataCopy(w.output(), t.c, 8);
  DataCopy(w.output()[8], t.c, 8);
}
RULE(rule1_barrier_of_another_pipe_breaks, .breaks = {", V: reads unified buffer", "V writes"}, .arch = 2201) {
  Tensors t;
  OTHER(Adds(t.b, t.a, 1.0f, t.kCount));
  PipeBarrier<PIPE_MTE2>();
  CAUGHT(Adds(t.c, t.b, 1.0f, t.kCount));
}
RULE(rule1_barrier_of_scalar_breaks, .breaks = {", S: ", "PIPE_S"}, .fast = true) { CAUGHT(PipeBarrier<PIPE_S>()); }
RULE(rule1_scalar_is_in_order_keeps) {
  Tensors t;
  t.a.SetValue(3, 5.0f);
  w.seen = t.a.GetValue(3) != 5.0f;
}

// ---- 2. Flags.

RULE(rule2_no_flag_breaks, .breaks = {", V: reads unified buffer 0x0..", "MTE2 writes"}) {
  Tensors t;
  OTHER(DataCopy(t.a, w.input(), t.kCount));
  CAUGHT(Adds(t.b, t.a, 0.0f, t.kCount));
}
RULE(rule2_flag_keeps, .result = copied) {
  Tensors t;
  DataCopy(t.a, w.input(), t.kCount);
  order<HardEvent::MTE2_V>();
  Adds(t.b, t.a, 0.0f, t.kCount);
  order<HardEvent::V_MTE3>();
  DataCopy(w.output(), t.b, t.kCount);
}
RULE(rule2_flag_of_another_pipe_breaks, .breaks = {", MTE3: reads unified buffer 0x0..", "MTE2 writes"}) {
  Tensors t;
  OTHER(DataCopy(t.a, w.input(), t.kCount));
  order<HardEvent::MTE2_V>();
  CAUGHT(DataCopy(w.output(), t.a, t.kCount));
}
RULE(rule2_flag_of_the_right_pipe_keeps, .result = copied) {
  Tensors t;
  DataCopy(t.a, w.input(), t.kCount);
  order<HardEvent::MTE2_MTE3>();
  DataCopy(w.output(), t.a, t.kCount);
}
RULE(rule2_flags_in_a_chain_keep, .result = copied) {
  Tensors t;
  DataCopy(t.a, w.input(), t.kCount);
  order<HardEvent::MTE2_V>();
  order<HardEvent::V_MTE3>();
  DataCopy(w.output(), t.a, t.kCount);
}
RULE(rule2_set_too_early_breaks, .breaks = {", V: reads unified buffer 0x400..", "MTE2 writes"}) {
  Tensors t;
  DataCopy(t.a, w.input(), t.kCount);
  SetFlag<HardEvent::MTE2_V>(0);
  OTHER(DataCopy(t.b, w.input(), t.kCount));
  WaitFlag<HardEvent::MTE2_V>(0);
  CAUGHT(Adds(t.c, t.b, 0.0f, t.kCount));
}
RULE(rule2_wait_too_late_breaks, .breaks = {", V: reads unified buffer 0x0..", "MTE2 writes"}) {
  Tensors t;
  OTHER(DataCopy(t.a, w.input(), t.kCount));
  SetFlag<HardEvent::MTE2_V>(0);
  CAUGHT(Adds(t.c, t.a, 0.0f, t.kCount));
  WaitFlag<HardEvent::MTE2_V>(0);
}
RULE(rule2_scalar_reads_too_early_breaks, .breaks = {", S: reads unified buffer 0x4..", "MTE2 writes"}) {
  Tensors t;
  OTHER(DataCopy(t.a, w.input(), t.kCount));
  CAUGHT(t.a.GetValue(1));
}
RULE(rule2_scalar_waits_keeps) {
  Tensors t;
  DataCopy(t.a, w.input(), t.kCount);
  order<HardEvent::MTE2_S>();
  w.seen = t.a.GetValue(1) != 1.0f;
}
RULE(rule2_what_scalar_waited_for_orders_what_it_issues_keeps) {
  Tensors t;
  DataCopy(t.a, w.input(), t.kCount);
  order<HardEvent::MTE2_S>();
  Adds(t.c, t.a, 0.0f, t.kCount);
}
RULE(rule2_set_twice_breaks, .breaks = {", V: ", "V_MTE3", "again"}, .fast = true) {
  OTHER(SetFlag<HardEvent::V_MTE3>(1));
  CAUGHT(SetFlag<HardEvent::V_MTE3>(1));
}
RULE(rule2_other_ids_keep) {
  SetFlag<HardEvent::V_MTE3>(1);
  SetFlag<HardEvent::V_MTE3>(2);
  SetFlag<HardEvent::V_MTE2>(1);
  WaitFlag<HardEvent::V_MTE3>(2);
  WaitFlag<HardEvent::V_MTE3>(1);
  WaitFlag<HardEvent::V_MTE2>(1);
}
RULE(rule2_wait_without_set_breaks, .breaks = {", MTE3: ", "V_MTE3", "not set"}, .fast = true) {
  CAUGHT(WaitFlag<HardEvent::V_MTE3>(1));
}
RULE(rule2_reserved_id_breaks, .breaks = {", V: ", "V_MTE3(6): ids 6 and 7 are reserved"}, .fast = true) {
  CAUGHT(SetFlag<HardEvent::V_MTE3>(6));
}
RULE(rule2_id_out_of_range_breaks, .breaks = {", V: ", "ids are 0 to 7"}, .fast = true) {
  CAUGHT(SetFlag<HardEvent::V_MTE3>(8));
}
RULE(rule2_flag_left_over_breaks, .breaks = {", MTE2: ", "MTE2_V(2)", "never waited for"}, .fast = true) {
  CAUGHT(SetFlag<HardEvent::MTE2_V>(2));
}
RULE(rule2_ids_of_the_pipe_keep) {
  TPipe pipe;
  const TEventID id = pipe.AllocEventID<HardEvent::V_S>();
  w.seen = pipe.FetchEventID(HardEvent::V_S) == id;
  SetFlag<HardEvent::V_S>(id);
  WaitFlag<HardEvent::V_S>(id);
  pipe.ReleaseEventID<HardEvent::V_S>(id);
}
// A queue takes its flags from the same ids.
RULE(rule2_id_that_a_queue_uses_breaks, .breaks = {", MTE2: ", "again before its WaitFlag"}, .fast = true) {
  TPipe pipe;
  TQue<QuePosition::VECIN, 1> queue;
  pipe.InitBuffer(queue, 1, 32);
  LocalTensor<float> a = queue.AllocTensor<float>();
  OTHER(queue.EnQue(a));
  CAUGHT(SetFlag<HardEvent::MTE2_V>(0));
}

// ---- 3. Queues order MTE2, V and MTE3.

RULE(rule3_queues_keep, .result = copied) {
  TPipe pipe;
  TQue<QuePosition::VECIN, 2> in;
  TQue<QuePosition::VECOUT, 2> out;
  pipe.InitBuffer(in, 2, 256);
  pipe.InitBuffer(out, 2, 256);
  for (uint32_t i = 0; i < Tensors::kCount; i += 64) {
    LocalTensor<float> a = in.AllocTensor<float>();
    DataCopy(a, w.input()[i], 64);
    in.EnQue(a);
    a = in.DeQue<float>();
    LocalTensor<float> b = out.AllocTensor<float>();
    Adds(b, a, 0.0f, 64);
    in.FreeTensor(a);
    out.EnQue(b);
    b = out.DeQue<float>();
    DataCopy(w.output()[i], b, 64);
    out.FreeTensor(b);
  }
}
RULE(rule3_without_queueing_breaks, .breaks = {", V: reads unified buffer", "MTE2 writes"}) {
  TPipe pipe;
  TQue<QuePosition::VECIN, 2> in;
  TBuf<> buffer;
  pipe.InitBuffer(in, 2, 256);
  pipe.InitBuffer(buffer, 256);
  LocalTensor<float> a = in.AllocTensor<float>();
  OTHER(DataCopy(a, w.input(), 64));
  CAUGHT(Adds(buffer.Get<float>(), a, 0.0f, 64));
  in.FreeTensor(a);
}
RULE(rule3_reused_without_freeing_breaks, .breaks = {", MTE2: writes unified buffer", "V reads"}) {
  TPipe pipe;
  TQue<QuePosition::VECIN, 1> in;
  TBuf<> buffer;
  pipe.InitBuffer(in, 1, 256);
  pipe.InitBuffer(buffer, 256);
  LocalTensor<float> a = in.AllocTensor<float>();
  DataCopy(a, w.input(), 64);
  in.EnQue(a);
  a = in.DeQue<float>();
  OTHER(Adds(buffer.Get<float>(), a, 0.0f, 64));
  CAUGHT(DataCopy(a, w.input(), 64));
  in.FreeTensor(a);
}
RULE(rule3_scalar_after_queueing_breaks, .breaks = {", S: reads unified buffer", "MTE2 writes"}) {
  TPipe pipe;
  TQue<QuePosition::VECIN, 1> in;
  pipe.InitBuffer(in, 1, 256);
  LocalTensor<float> a = in.AllocTensor<float>();
  OTHER(DataCopy(a, w.input(), 64));
  in.EnQue(a);
  a = in.DeQue<float>();
  CAUGHT(a.GetValue(0));
  in.FreeTensor(a);
}
RULE(rule3_scalar_with_flag_keeps) {
  TPipe pipe;
  TQue<QuePosition::VECIN, 1> in;
  pipe.InitBuffer(in, 1, 256);
  LocalTensor<float> a = in.AllocTensor<float>();
  DataCopy(a, w.input(), 64);
  order<HardEvent::MTE2_S>();
  w.seen = a.GetValue(5) != 5.0f;
  in.FreeTensor(a);
}
RULE(rule3_bound_queue_keeps, .result = copied) {
  TPipe pipe;
  TQueBind<QuePosition::VECIN, QuePosition::VECOUT, 2> queue;
  pipe.InitBuffer(queue, 2, 256);
  for (uint32_t i = 0; i < Tensors::kCount; i += 64) {
    LocalTensor<float> a = queue.AllocTensor<float>();
    DataCopy(a, w.input()[i], 64);
    queue.EnQue(a);
    a = queue.DeQue<float>();
    DataCopy(w.output()[i], a, 64);
    queue.FreeTensor(a);
  }
}
RULE(rule3_vector_on_bound_queue_breaks, .breaks = {", V: reads unified buffer", "MTE2 writes"}) {
  TPipe pipe;
  TQueBind<QuePosition::VECIN, QuePosition::VECOUT, 1> queue;
  pipe.InitBuffer(queue, 1, 256);
  LocalTensor<float> a = queue.AllocTensor<float>();
  OTHER(DataCopy(a, w.input(), 64));
  queue.EnQue(a);
  a = queue.DeQue<float>();
  CAUGHT(Adds(a, a, 1.0f, 64));
  queue.FreeTensor(a);
}

// ---- 4. SetAtomic holds for what is issued after it, however late that executes.

RULE(
    rule4_atomic_mode_is_not_delayed_keeps, .result = [](const World& w) { return w.work[0] == 2 && w.work[8] == 1; }) {
  Tensors t;
  SetAtomicAdd<float>();
  DataCopy(w.workspace(), t.a, 8);
  DataCopy(w.workspace(), t.b, 8);
  SetAtomicNone();
  DataCopy(w.workspace()[8], t.c, 8);
}
RULE(rule4_atomic_mode_left_over_breaks, .breaks = {", MTE3: ", "SetAtomicNone"}, .fast = true) {
  CAUGHT(SetAtomicMax<float>());
}

// ---- 9. Nothing else orders pipes.

RULE(rule9_overwritten_while_sent_breaks, .breaks = {", V: writes unified buffer 0x0..", "MTE3 reads"}) {
  Tensors t;
  OTHER(DataCopy(w.output(), t.a, t.kCount));
  CAUGHT(Duplicate(t.a, 2.0f, t.kCount));
}
RULE(rule9_overwritten_after_sending_keeps, .result = [](const World& w) { return all_are(w, 1); }) {
  Tensors t;
  DataCopy(w.output(), t.a, t.kCount);
  order<HardEvent::MTE3_V>();
  Duplicate(t.a, 2.0f, t.kCount);
}
RULE(rule9_refilled_while_sent_breaks, .breaks = {", MTE2: writes unified buffer 0x0..", "MTE3 reads"}) {
  Tensors t;
  OTHER(DataCopy(w.output(), t.a, t.kCount));
  CAUGHT(DataCopy(t.a, w.input(), t.kCount));
}
RULE(rule9_refilled_after_sending_keeps, .result = [](const World& w) { return all_are(w, 1); }) {
  Tensors t;
  DataCopy(w.output(), t.a, t.kCount);
  order<HardEvent::MTE3_MTE2>();
  DataCopy(t.a, w.input(), t.kCount);
}
RULE(rule9_through_global_memory_breaks, .breaks = {", MTE2: reads out+0x0", "MTE3 writes"}) {
  Tensors t;
  OTHER(DataCopy(w.output(), t.a, t.kCount));
  CAUGHT(DataCopy(t.b, w.output(), t.kCount));
}
RULE(rule9_through_global_memory_keeps) {
  Tensors t;
  DataCopy(w.output(), t.a, t.kCount);
  order<HardEvent::MTE3_MTE2>();
  DataCopy(t.b, w.output(), t.kCount);
}
RULE(rule9_scalar_wrote_what_is_sent_breaks, .breaks = {", MTE3: reads unified buffer", "S writes"}) {
  Tensors t;
  OTHER(t.a.SetValue(0, 7.0f));
  CAUGHT(DataCopy(w.output(), t.a, 8));
}
RULE(rule9_scalar_wrote_what_is_sent_keeps, .result = [](const World& w) { return w.out[0] == 7; }) {
  Tensors t;
  t.a.SetValue(0, 7.0f);
  order<HardEvent::S_MTE3>();
  DataCopy(w.output(), t.a, 8);
}
RULE(rule9_scalar_overwrites_what_is_sent_breaks, .breaks = {", S: writes unified buffer", "MTE3 reads"}) {
  Tensors t;
  OTHER(DataCopy(w.output(), t.a, 8));
  CAUGHT(t.a.SetValue(0, 7.0f));
}
RULE(rule9_scalar_read_what_is_refilled_breaks, .breaks = {", MTE2: writes unified buffer", "S reads"}) {
  Tensors t;
  OTHER(t.a.GetValue(0));
  CAUGHT(DataCopy(t.a, w.input(), 8));
}
RULE(rule9_scalar_read_what_is_refilled_keeps) {
  Tensors t;
  t.a.GetValue(0);
  order<HardEvent::S_MTE2>();
  DataCopy(t.a, w.input(), 8);
}
RULE(rule9_barrier_of_all_keeps) {
  Tensors t;
  t.a.SetValue(0, 7.0f);
  PipeBarrier<PIPE_ALL>();
  DataCopy(w.output(), t.a, 8);
  PipeBarrier<PIPE_ALL>();
  t.a.SetValue(0, 8.0f);
}

}  // namespace
}  // namespace rules
