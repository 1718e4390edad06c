// Rule 10: flags between cube and vector cores, and blocks that have both.
#include "rules.h"

namespace rules {
namespace {

constexpr uint32_t kFloats = 256;  // [16, 16]

// L0C of a cube core, filled.
LocalTensor<float> filled(World& w) {
  const LocalTensor<half> l1(TPosition::A1, 0, kFloats), a(TPosition::A2, 0, kFloats), b(TPosition::B2, 0, kFloats);
  const LocalTensor<float> c(TPosition::CO1, 0, kFloats);
  DataCopy(l1, w.tensor<half>(w.in.data()), kFloats);
  order<HardEvent::MTE2_MTE1>();
  LoadData(a, l1, LoadData2DParams(0, 1, 1, 0, 0, false, 0));
  LoadData(b, l1, LoadData2DParams(0, 1, 1, 0, 0, false, 0));
  order<HardEvent::MTE1_M>();
  Mmad(c, a, b, MmadParams(16, 16, 16, 0, false, true));
  PipeBarrier<PIPE_ALL>();
  return c;
}

void store(World& w, const LocalTensor<float>& c, Site at = Site::here()) {
  Fixpipe(w.workspace(), c, FixpipeParamsV220(16, 16, 16, 16, false), at);
}

bool is_3510() { return Core::current().arch() == 3510; }

RULE(rule10_flag_keeps, .mix = true) {
  if ASCEND_IS_AIC {
    store(w, filled(w));
    CrossCoreSetFlag<2, PIPE_FIX>(0);
    return;
  }
  Tensors t;
  CrossCoreWaitFlag<2, PIPE_MTE2>(0);
  DataCopy(t.a, w.workspace(), kFloats);
}
RULE(rule10_flag_after_another_pipe_breaks, .breaks = {", MTE2: reads work+0x0", "cube core 0's FIX writes"},
     .mix = true) {
  if ASCEND_IS_AIC {
    const LocalTensor<float> c = filled(w);
    OTHER(store(w, c));
    CrossCoreSetFlag<2, PIPE_M>(0);
    return;
  }
  Tensors t;
  CrossCoreWaitFlag(0);
  CAUGHT(DataCopy(t.a, w.workspace(), kFloats));
}
RULE(rule10_wait_of_another_pipe_breaks, .breaks = {", MTE2: reads work+0x0", "cube core 0's FIX writes"}, .arch = 3510,
     .mix = true) {
  if ASCEND_IS_AIC {
    const LocalTensor<float> c = filled(w);
    OTHER(store(w, c));
    CrossCoreSetFlag<2, PIPE_FIX>(0);
    return;
  }
  Tensors t;
  CrossCoreWaitFlag<2, PIPE_V>(0);
  CAUGHT(DataCopy(t.a, w.workspace(), kFloats));
}
RULE(rule10_wait_told_to_another_pipe_keeps, .mix = true) {
  if ASCEND_IS_AIC {
    store(w, filled(w));
    CrossCoreSetFlag<2, PIPE_FIX>(0);
    return;
  }
  Tensors t;
  CrossCoreWaitFlag<2, PIPE_V>(0);
  order<HardEvent::V_MTE2>();
  DataCopy(t.a, w.workspace(), kFloats);
}
RULE(rule10_answer_after_another_pipe_breaks, .breaks = {", FIX: writes work+0x0", "MTE2 reads"}, .mix = true) {
  if ASCEND_IS_AIC {
    const LocalTensor<float> c = filled(w);
    CrossCoreWaitFlag(1);
    CAUGHT(store(w, c));
    return;
  }
  Tensors t;
  OTHER(DataCopy(t.a, w.workspace(), kFloats));
  CrossCoreSetFlag<2, PIPE_V>(1);
}
RULE(rule10_answer_keeps, .mix = true) {
  if ASCEND_IS_AIC {
    const LocalTensor<float> c = filled(w);
    for (int i = 0; i < 3; ++i) {
      CrossCoreWaitFlag(1);
      store(w, c);
      CrossCoreSetFlag<2, PIPE_FIX>(0);
    }
    return;
  }
  Tensors t;
  for (int i = 0; i < 3; ++i) {
    CrossCoreSetFlag<2, PIPE_MTE2>(1);
    CrossCoreWaitFlag(0);
    DataCopy(t.a, w.workspace(), kFloats);
    PipeBarrier<PIPE_MTE2>();
  }
}
// The cube core waits for both vector cores.
RULE(rule10_half_a_pair_breaks, .breaks = {"cross-core flag 1 of mode 2 is set by some of the cores only"},
     .fast = true, .mix = true) {
  if ASCEND_IS_AIV
    if (GetSubBlockIdx() == 0) CAUGHT(CrossCoreSetFlag<2, PIPE_MTE3>(1));
}
RULE(rule10_all_cube_cores_keep, .cores = 3, .cube = true) {
  if (GetBlockIdx() == 2) store(w, filled(w));
  CrossCoreSetFlag<0, PIPE_FIX>(3);
  CrossCoreWaitFlag(3);
  if (GetBlockIdx() != 0) return;
  DataCopy(LocalTensor<float>(TPosition::A1, 0, kFloats), w.workspace(), kFloats);
}
RULE(rule10_all_vector_cores_keep, .cores = 2, .mix = true) {
  if ASCEND_IS_AIC
    return;
  Tensors t;
  if (GetBlockIdx() == 3) DataCopy(w.workspace(), t.a, kFloats);
  CrossCoreSetFlag<0, PIPE_MTE3>(3);
  CrossCoreWaitFlag(3);
  if (GetBlockIdx() != 0) return;
  DataCopy(t.b, w.workspace(), kFloats);
}
RULE(rule10_both_vector_cores_keep, .cores = 2, .mix = true) {
  if ASCEND_IS_AIC
    return;
  Tensors t;
  const uint32_t block = GetBlockIdx() / 2;
  if (GetSubBlockIdx() == 1) DataCopy(w.workspace()[block * kFloats], t.a, kFloats);
  CrossCoreSetFlag<1, PIPE_MTE3>(4);
  CrossCoreWaitFlag(4);
  if (GetSubBlockIdx() == 1) return;
  DataCopy(t.b, w.workspace()[block * kFloats], kFloats);
}
RULE(rule10_one_vector_core_keeps, .mix = true) {
  if (!is_3510()) return;
  if ASCEND_IS_AIC {
    store(w, filled(w));
    CrossCoreSetFlag<4, PIPE_FIX>(2);
    CrossCoreSetFlag<4, PIPE_FIX>(18);
    CrossCoreWaitFlag<4, PIPE_S>(5);
    CrossCoreWaitFlag<4, PIPE_S>(21);
    return;
  }
  Tensors t;
  CrossCoreWaitFlag<4, PIPE_MTE2>(2);
  DataCopy(t.a, w.workspace(), kFloats);
  CrossCoreSetFlag<4, PIPE_MTE2>(5);
}
RULE(rule10_mode_4_breaks, .breaks = {", FIX: cross-core flag 2 of mode 4: modes are 0, 1 and 2"}, .arch = 2201,
     .fast = true, .mix = true) {
  if (!Core::current().is_cube() || is_3510()) return;
  CAUGHT(CrossCoreSetFlag<4, PIPE_FIX>(2));
}
RULE(rule10_counter_breaks, .breaks = {", FIX: cross-core flag 0 of mode 2: the counter is more than 15"}, .fast = true,
     .cube = true) {
  for (int i = 0; i < 16; ++i) CAUGHT(CrossCoreSetFlag<2, PIPE_FIX>(0));
}
RULE(rule10_counter_keeps, .mix = true) {
  for (int i = 0; i < 15; ++i)
    if ASCEND_IS_AIC
      CrossCoreSetFlag<2, PIPE_FIX>(0);
  for (int i = 0; i < 15; ++i)
    if ASCEND_IS_AIV
      CrossCoreWaitFlag(0);
}
RULE(rule10_never_waited_for_breaks, .breaks = {"cross-core flag 7 of mode 2 is set and never waited for"},
     .fast = true, .mix = true) {
  if ASCEND_IS_AIC
    CAUGHT(CrossCoreSetFlag<2, PIPE_FIX>(7));
}
RULE(rule10_modes_mixed_break, .breaks = {", MTE3: cross-core flag 3 of mode "}, .fast = true, .mix = true) {
  if ASCEND_IS_AIC
    return;
  CAUGHT(CrossCoreSetFlag<0, PIPE_MTE3>(3), CrossCoreSetFlag<1, PIPE_MTE3>(3));
}
RULE(rule10_modes_one_by_one_keep, .mix = true) {
  if ASCEND_IS_AIC
    return;
  CrossCoreSetFlag<0, PIPE_MTE3>(3);
  CrossCoreWaitFlag(3);
  CrossCoreSetFlag<1, PIPE_MTE3>(4);
  CrossCoreWaitFlag(4);
  CrossCoreSetFlag<1, PIPE_MTE3>(3);
  CrossCoreWaitFlag(3);
}
RULE(rule10_reserved_id_breaks, .breaks = {", V: cross-core flag 12 of mode 2: ids 11 to 14 are reserved"},
     .fast = true, .mix = true) {
  if ASCEND_IS_AIC
    return;
  CAUGHT(CrossCoreSetFlag<2, PIPE_V>(12));
}
RULE(rule10_id_breaks, .breaks = {", V: cross-core flag 16 of mode 2: ids are 0 to 15"}, .fast = true, .mix = true) {
  if ASCEND_IS_AIC
    return;
  CAUGHT(CrossCoreSetFlag<2, PIPE_V>(16));
}
RULE(rule10_scalar_breaks, .breaks = {", S: cross-core flag 0 of mode 2: S sets none"}, .fast = true, .mix = true) {
  if ASCEND_IS_AIC
    return;
  CAUGHT(CrossCoreSetFlag<2, PIPE_S>(0));
}
RULE(rule10_pipe_of_vector_cores_breaks, .breaks = {", V: cross-core flag 0 of mode 2: this core has no such pipe"},
     .fast = true, .cube = true) {
  CAUGHT(CrossCoreSetFlag<2, PIPE_V>(0));
}
RULE(rule10_without_cube_cores_breaks, .breaks = {", V: cross-core flag 0 of mode 1: a kernel has such flags"},
     .fast = true, .cores = 2) {
  CAUGHT(CrossCoreSetFlag<1, PIPE_V>(0));
}
RULE(rule10_waits_for_ever_breaks, .breaks = {", S: CrossCoreWaitFlag, cross-core flag 2 of mode 0: it waits for ever"},
     .fast = true, .mix = true) {
  if ASCEND_IS_AIC
    CAUGHT(CrossCoreWaitFlag(2));
}
RULE(rule10_all_wait_breaks, .breaks = {"waits for ever"}, .fast = true, .mix = true) {
  // Who notices is the last of them.
  CAUGHT(Core::current().is_cube() ? CrossCoreWaitFlag(2) : SyncAll());
}
// Time passes for one that polls while the others wait for it.
RULE(rule10_others_wait_keeps, .mix = true, .seen = Case::kAlways) {
  if ASCEND_IS_AIC {
    CrossCoreWaitFlag(2);
    return;
  }
  if (GetSubBlockIdx() == 0) w.seen = !wait([] { return false; }, int64_t{1} << 40);
  CrossCoreSetFlag<2, PIPE_V>(2);
}

// ---- SyncAll, and what a core knows of itself.

RULE(sync_all_of_both_kinds_keeps, .cores = 2, .mix = true) {
  if ASCEND_IS_AIC {
    if (GetBlockIdx() == 1) store(w, filled(w));
    SyncAll<false>();
    return;
  }
  Tensors t;
  SyncAll<false>();
  DataCopy(t.a, w.workspace(), kFloats);
}
RULE(sync_all_of_vector_cores_breaks, .breaks = {", MTE2: reads work+0x0", "cube core 0's FIX writes"}, .mix = true) {
  if ASCEND_IS_AIC {
    const LocalTensor<float> c = filled(w);
    OTHER(store(w, c));
    CrossCoreSetFlag<2, PIPE_M>(0);
    return;
  }
  Tensors t;
  CrossCoreWaitFlag(0);
  SyncAll();
  CAUGHT(DataCopy(t.a, w.workspace(), kFloats));
}
RULE(sync_all_on_cube_core_breaks, .breaks = {", S: SyncAll<true> is one of vector cores"}, .fast = true, .mix = true) {
  if ASCEND_IS_AIC
    CAUGHT(SyncAll());
}
RULE(sync_all_without_cube_cores_breaks, .breaks = {", S: SyncAll<false> meets cube cores"}, .fast = true) {
  CAUGHT(SyncAll<false>());
}
RULE(check_kernel_type_breaks, .breaks = {", S: KERNEL_TYPE_MIX_AIC_1_2: the launch has no cube cores"}, .fast = true) {
  CAUGHT(KERNEL_TASK_TYPE_DEFAULT(KERNEL_TYPE_MIX_AIC_1_2));
}
RULE(check_cube_blocks_break, .breaks = {", core 2, begins when others have ended", "3 blocks, and 2 cube cores"},
     .fast = true, .cores = 3, .mix = true, .vector_cores = 4) {}
RULE(indices_of_cores_keep, .cores = 3, .mix = true) {
  KERNEL_TASK_TYPE_DEFAULT(KERNEL_TYPE_MIX_AIC_1_2);
  if (GetBlockNum() != 3) w.seen = true;
  if ASCEND_IS_AIC
    if (GetTaskRatio() != 1 || GetBlockIdx() >= 3) w.seen = true;
  if ASCEND_IS_AIV
    if (GetTaskRatio() != 2 || GetBlockIdx() >= 6 || GetSubBlockIdx() != GetBlockIdx() % 2) w.seen = true;
}

}  // namespace
}  // namespace rules
