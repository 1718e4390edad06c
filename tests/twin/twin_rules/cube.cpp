// Rules 11 and 12, the checks of cube cores, and what their instructions compute.
#include "rules.h"

namespace rules {
namespace {

// Memories of a cube core, of 16-bit numbers, as if the last kernel had left them filled: [32, 32] of each.
struct Cube {
  explicit Cube(World& w) : memory(w.tensor<half>(w.in.data())) {
    DataCopy(l1, memory, kCount);
    order<HardEvent::MTE2_MTE1>();
    load(a);
    load(b);
    order<HardEvent::MTE1_M>();
    multiply();
    PipeBarrier<PIPE_ALL>();
  }
  static constexpr uint32_t kCount = 4096, kSide = 32;
  void load(const LocalTensor<half>& to, Site at = Site::here()) {
    LoadData(to, l1, LoadData2DParams(0, 4, 1, 0, 0, false, 0), at);
  }
  void multiply(bool zero = true, uint8_t unit_flag = 0, uint16_t m = kSide, uint16_t n = kSide,
                Site at = Site::here()) {
    Mmad(c, a, b, MmadParams(m, n, kSide, unit_flag, false, zero), at);
  }
  void store(const GlobalTensor<float>& to, uint8_t unit_flag = 0, Site at = Site::here()) {
    FixpipeParamsV220 params(kSide, kSide, kSide, kSide, false);
    params.unitFlag = unit_flag;
    Fixpipe(to, c, params, at);
  }

  GlobalTensor<half> memory;
  LocalTensor<half> l1{TPosition::A1, 0, kCount}, a{TPosition::A2, 0, kCount}, b{TPosition::B2, 0, kCount};
  LocalTensor<float> c{TPosition::CO1, 0, 4096};
};

// ---- 9 and 11. Pipes of a cube core.

RULE(rule11_mte1_without_flag_breaks, .breaks = {", MTE1: reads L1 0x0..", "MTE2 writes"}, .cube = true) {
  Cube q(w);
  OTHER(DataCopy(q.l1, q.memory, q.kCount));
  CAUGHT(q.load(q.a));
}
RULE(rule11_flag_of_another_pipe_breaks, .breaks = {", MTE1: reads L1 0x0..", "MTE2 writes"}, .cube = true) {
  Cube q(w);
  OTHER(DataCopy(q.l1, q.memory, q.kCount));
  order<HardEvent::MTE2_M>();
  CAUGHT(q.load(q.a));
}
RULE(rule11_mte2_overwrites_breaks, .breaks = {", MTE2: writes L1 0x0..", "MTE1 reads"}, .cube = true) {
  Cube q(w);
  OTHER(q.load(q.a));
  CAUGHT(DataCopy(q.l1, q.memory, q.kCount));
}
RULE(rule11_mmad_without_flag_breaks, .breaks = {", M: reads L0A 0x0..", "MTE1 writes"}, .cube = true) {
  Cube q(w);
  OTHER(q.load(q.a));
  CAUGHT(q.multiply());
}
RULE(rule11_mte1_overwrites_breaks, .breaks = {", MTE1: writes L0B 0x0..", "M reads"}, .cube = true) {
  Cube q(w);
  OTHER(q.multiply());
  CAUGHT(q.load(q.b));
}
RULE(rule11_fixpipe_without_flag_breaks, .breaks = {", FIX: reads L0C 0x0..", "M writes"}, .cube = true) {
  Cube q(w);
  OTHER(q.multiply());
  CAUGHT(q.store(w.output()));
}
RULE(rule11_mmad_overwrites_breaks, .breaks = {", M: writes L0C 0x0..", "FIX reads"}, .cube = true) {
  Cube q(w);
  OTHER(q.store(w.output()));
  CAUGHT(q.multiply());
}
RULE(rule11_flags_keep, .cube = true) {
  Cube q(w);
  DataCopy(q.l1, q.memory, q.kCount);
  order<HardEvent::MTE2_MTE1>();
  q.load(q.a);
  q.load(q.b);
  SetFlag<HardEvent::MTE1_MTE2>(0);
  order<HardEvent::MTE1_M>();
  WaitFlag<HardEvent::MTE1_MTE2>(0);
  DataCopy(q.l1, q.memory, q.kCount);
  q.multiply();
  SetFlag<HardEvent::M_MTE1>(0);
  order<HardEvent::M_FIX>();
  order<HardEvent::MTE2_MTE1>();
  WaitFlag<HardEvent::M_MTE1>(0);
  q.load(q.b);
  q.store(w.output());
  order<HardEvent::FIX_M>();
  order<HardEvent::MTE1_M>();
  q.multiply();
}
RULE(rule11_small_mmads_break, .breaks = {", M: writes L0C 0x0..", "M writes"}, .cube = true) {
  Cube q(w);
  OTHER(q.multiply());
  CAUGHT(q.multiply(false));
}
RULE(rule11_small_mmads_keep, .cube = true) {
  Cube q(w);
  q.multiply();
  PipeBarrier<PIPE_M>();
  q.multiply(false);
}
// 2 x 5 fractals of L0C.
RULE(rule11_mmads_of_10_fractals_keep, .cube = true) {
  Cube q(w);
  LoadData(q.b, q.l1, LoadData2DParams(0, 8, 0, 0, 0, false, 0));
  LoadData(q.b[8 * 256], q.l1, LoadData2DParams(0, 2, 0, 0, 0, false, 0));
  order<HardEvent::MTE1_M>();
  for (int i = 0; i < 3; ++i) q.multiply(i == 0, 0, 32, 80);
}
RULE(rule11_overlapping_fixpipes_break, .breaks = {", FIX: writes out+0x0", "FIX writes"}, .cube = true) {
  Cube q(w);
  OTHER(q.store(w.output()));
  CAUGHT(q.store(w.output()));
}
RULE(rule11_overlapping_fixpipes_keep, .cube = true) {
  Cube q(w);
  q.store(w.output());
  PipeBarrier<PIPE_FIX>();
  q.store(w.output());
}
RULE(rule11_flag_with_scalar_breaks, .breaks = {", MTE2: a cube core has no flag MTE2_S"}, .fast = true, .cube = true) {
  CAUGHT(SetFlag<HardEvent::MTE2_S>(0));
}
RULE(rule11_vector_flag_breaks, .breaks = {", V: a cube core has no flag V_MTE2"}, .fast = true, .cube = true) {
  CAUGHT(SetFlag<HardEvent::V_MTE2>(0));
}
RULE(rule11_cube_flag_breaks, .breaks = {", M: a vector core has no flag M_FIX"}, .fast = true) {
  CAUGHT(SetFlag<HardEvent::M_FIX>(0));
}
RULE(rule11_cube_barrier_breaks, .breaks = {", FIX: a vector core has no such pipe"}, .fast = true) {
  CAUGHT(PipeBarrier<PIPE_FIX>());
}
RULE(rule11_vector_barrier_breaks, .breaks = {", V: a cube core has no such pipe"}, .fast = true, .cube = true) {
  CAUGHT(PipeBarrier<PIPE_V>());
}
RULE(rule11_flag_left_over_breaks, .breaks = {", M: flag M_FIX(2) is set and never waited for"}, .fast = true,
     .cube = true) {
  CAUGHT(SetFlag<HardEvent::M_FIX>(2));
}

// ---- 12. unitFlag.

RULE(rule12_unit_flags_keep, .cube = true) {
  Cube q(w);
  for (uint32_t i = 0; i < 3; ++i) {
    q.multiply(true, 2);
    PipeBarrier<PIPE_M>();
    q.multiply(false, 3);
    q.store(w.output()[i * 1024], 3);
  }
}
RULE(rule12_mmad_alone_breaks, .breaks = {", M: unitFlag: no Fixpipe"}, .fast = true, .cube = true) {
  Cube q(w);
  CAUGHT(q.multiply(true, 3));
  order<HardEvent::M_FIX>();
  q.store(w.output());
}
RULE(rule12_fixpipe_alone_breaks, .breaks = {", FIX: unitFlag: it waits for ever"}, .fast = true, .cube = true) {
  Cube q(w);
  q.multiply(true, 2);
  CAUGHT(q.store(w.output(), 3));
}
RULE(rule12_mmad_twice_breaks, .breaks = {", M: unitFlag: it waits for ever for a Fixpipe"}, .fast = true,
     .cube = true) {
  Cube q(w);
  OTHER(q.multiply(true, 3));
  CAUGHT(q.multiply(true, 3));
}
RULE(rule12_other_part_breaks, .breaks = {", FIX: unitFlag: it waits for ever"}, .fast = true, .cube = true) {
  Cube q(w);
  q.multiply(true, 3, 32, 16);
  CAUGHT(q.store(w.output(), 3));
}

// ---- Memories.

RULE(check_cube_capacity_breaks, .breaks = {", S: InitBuffer of 32 bytes at 65536: the L0A has 65536"}, .fast = true,
     .cube = true) {
  TPipe pipe;
  TBuf<TPosition::A2> a, more;
  TBuf<TPosition::B2> b;
  pipe.InitBuffer(a, 64 * 1024);
  pipe.InitBuffer(b, 64 * 1024);
  CAUGHT(pipe.InitBuffer(more, 32));
}
RULE(check_l1_capacity_breaks, .breaks = {", S: InitBuffer of 524288 bytes at 0: the L1 has 524032"}, .arch = 2201,
     .fast = true, .cube = true) {
  TPipe pipe;
  TBuf<TPosition::A1> a;
  CAUGHT(pipe.InitBuffer(a, 512 * 1024));
}
RULE(check_l0c_capacity_breaks, .breaks = {", S: InitBuffer of 262144 bytes at 0: the L0C has 131072"}, .arch = 2201,
     .fast = true, .cube = true) {
  TPipe pipe;
  TBuf<TPosition::CO1> c;
  CAUGHT(pipe.InitBuffer(c, 256 * 1024));
}
RULE(check_l1_of_vector_core_breaks, .breaks = {", MTE2: accesses L1 0x0..0x20, which has 0x0 bytes"}, .fast = true) {
  CAUGHT(DataCopy(LocalTensor<float>(TPosition::A1, 0, 8), w.input(), 8));
}
RULE(check_unified_buffer_of_cube_core_breaks, .breaks = {", MTE2: accesses unified buffer 0x0..0x20, which has 0x0"},
     .fast = true, .cube = true) {
  CAUGHT(DataCopy(LocalTensor<float>(TPosition::VECIN, 0, 8), w.input(), 8));
}
RULE(check_vector_instruction_of_cube_core_breaks, .breaks = {", V: accesses unified buffer"}, .fast = true,
     .cube = true) {
  CAUGHT(Duplicate(LocalTensor<float>(TPosition::VECIN, 0, 8), 1.0f, 8));
}
RULE(check_no_way_to_l0a_breaks, .breaks = {", MTE2: has no way between global memory and L0A"}, .fast = true,
     .cube = true) {
  Cube q(w);
  CAUGHT(DataCopy(q.a, q.memory, 256));
}
RULE(check_no_way_from_l1_breaks, .breaks = {", MTE3: has no way between global memory and L1"}, .fast = true,
     .cube = true) {
  Cube q(w);
  CAUGHT(DataCopy(w.tensor<half>(w.out.data()), q.l1, 256));
}
RULE(check_scalar_in_l1_breaks, .breaks = {", S: S has no way to L1"}, .fast = true, .cube = true) {
  Cube q(w);
  CAUGHT(q.l1.GetValue(0));
}
RULE(check_load_from_l0_breaks, .breaks = {", MTE1: has no way to or from L0A"}, .fast = true, .cube = true) {
  Cube q(w);
  CAUGHT(LoadData(q.b, q.a, LoadData2DParams(0, 1, 0, 0, 0, false, 0)));
}
RULE(check_operands_break, .breaks = {", M: has no way to or from L0B"}, .fast = true, .cube = true) {
  Cube q(w);
  CAUGHT(Mmad(q.c, q.b, q.a, MmadParams(32, 32, 32, 0, false, true)));
}
RULE(check_l0_alignment_breaks, .breaks = {", MTE1: L0A 0x100..0x300 is not aligned to 512"}, .fast = true,
     .cube = true) {
  Cube q(w);
  CAUGHT(LoadData(q.a[128], q.l1, LoadData2DParams(0, 1, 0, 0, 0, false, 0)));
}
RULE(check_l0c_alignment_breaks, .breaks = {", M: L0C 0x200..0x1200 is not aligned to 1024"}, .fast = true,
     .cube = true) {
  Cube q(w);
  CAUGHT(Mmad(q.c[128], q.a, q.b, MmadParams(32, 32, 32, 0, false, true)));
}
RULE(check_fixpipe_alignment_breaks, .breaks = {", FIX: L0C 0x20..", "is not aligned to 64"}, .fast = true,
     .cube = true) {
  Cube q(w);
  CAUGHT(Fixpipe(w.output(), q.c[8], FixpipeParamsV220(16, 16, 32, 16, false)));
}
RULE(check_l1_bounds_break, .breaks = {", MTE1: accesses L1 0x200..0x400, beyond its buffer, which ends at 0x200"},
     .fast = true, .cube = true) {
  Cube q(w);
  TPipe pipe;
  TBuf<TPosition::A1> buffer;
  pipe.InitBuffer(buffer, 512);
  CAUGHT(LoadData(q.a, buffer.Get<half>(), LoadData2DParams(1, 1, 0, 0, 0, false, 0)));
}
RULE(check_product_never_written_breaks, .breaks = {", M: reads L0A", "has never been written"}, .fast = true,
     .cube = true) {
  Cube q(w);
  LoadData(q.a, q.l1[q.kCount], LoadData2DParams(0, 1, 0, 0, 0, false, 0));
  order<HardEvent::MTE1_M>();
  CAUGHT(q.multiply());
  PipeBarrier<PIPE_ALL>();
}
// What fills up the fractals is garbage, which no row or column of the product has.
RULE(check_rows_never_written_keep, .cube = true) {
  Cube q(w);
  LocalTensor<half> part(TPosition::A1, 64 * 1024, 1024);
  DataCopy(part, q.memory, Nd2NzParams(1, 5, 20, 0, 32, 16, 1, 0));
  order<HardEvent::MTE2_MTE1>();
  LoadData(q.a, part, LoadData2DParams(0, 2, 1, 0, 0, false, 0));
  order<HardEvent::MTE1_M>();
  Mmad(q.c, q.a, q.b, MmadParams(5, 32, 32, 0, false, true));
  order<HardEvent::M_FIX>();
  Fixpipe(w.output(), q.c, FixpipeParamsV220(32, 5, 16, 32, false));
}
RULE(check_fixpipe_never_written_breaks, .breaks = {", FIX: reads L0C", "has never been written"}, .fast = true,
     .cube = true) {
  Cube q(w);
  Mmad(q.c, q.a, q.b, MmadParams(5, 32, 32, 0, false, true));
  order<HardEvent::M_FIX>();
  CAUGHT(Fixpipe(w.output(), q.c, FixpipeParamsV220(32, 6, 16, 32, false)));
  PipeBarrier<PIPE_ALL>();
}
RULE(check_sum_never_written_breaks, .breaks = {", M: reads L0C", "has never been written"}, .fast = true,
     .cube = true) {
  Cube q(w);
  CAUGHT(Mmad(q.c[1024], q.a, q.b, MmadParams(32, 32, 32, 0, false, false)));
  PipeBarrier<PIPE_ALL>();
}

// ---- Arguments.

RULE(check_mmad_m_breaks, .breaks = {", M: m is 4096, at most 4095"}, .fast = true, .cube = true) {
  Cube q(w);
  CAUGHT(q.multiply(true, 0, 4096));
}
RULE(check_fp8_breaks, .breaks = {", M: Mmad of fp8 is one of 3510"}, .arch = 2201, .fast = true, .mix = true) {
  if (!Core::current().is_cube() || Core::current().arch() == 3510) return;
  Cube q(w);
  CAUGHT(Mmad(q.c, q.a.ReinterpretCast<fp8_e4m3fn_t>(), q.b.ReinterpretCast<fp8_e5m2_t>(),
              MmadParams(32, 32, 32, 0, false, true)));
}
RULE(check_mmad_of_nothing_keeps, .cube = true) {
  Cube q(w);
  q.multiply(true, 0, 0);
  q.store(w.output());
}
RULE(check_nd2nz_rows_break, .breaks = {", MTE2: nValue is 16385, at most 16384"}, .fast = true, .cube = true) {
  Cube q(w);
  CAUGHT(DataCopy(q.l1, q.memory, Nd2NzParams(1, 16385, 16, 0, 16, 16, 1, 0)));
}
RULE(check_nd2nz_overlap_breaks, .breaks = {", MTE2: what it writes overlaps itself"}, .fast = true, .cube = true) {
  Cube q(w);
  CAUGHT(DataCopy(q.l1, q.memory, Nd2NzParams(1, 17, 32, 0, 32, 16, 1, 0)));
}
RULE(check_nd2nz_bounds_break, .breaks = {", MTE2: reads in+", "which has 0x4000 bytes"}, .fast = true, .cube = true) {
  Cube q(w);
  CAUGHT(DataCopy(q.l1, q.memory[8192 - 16 * 32 + 16], Nd2NzParams(1, 17, 32, 0, 32, 32, 1, 0)));
}
RULE(check_fractals_overlap_breaks, .breaks = {", MTE1: what it writes overlaps itself"}, .fast = true, .cube = true) {
  Cube q(w);
  CAUGHT(LoadDataWithTranspose(q.b.ReinterpretCast<int8_t>(), q.l1.ReinterpretCast<int8_t>(),
                               LoadData2dTransposeParams(0, 2, 1, 0, 0)));
}
RULE(check_transposed_bytes_break, .breaks = {", MTE1: LoadData transposes 16-bit types only"}, .fast = true,
     .cube = true) {
  Cube q(w);
  CAUGHT(LoadData(q.b.ReinterpretCast<int8_t>(), q.l1.ReinterpretCast<int8_t>(),
                  LoadData2DParams(0, 1, 1, 0, 0, true, 0)));
}
RULE(check_transposed_into_l0a_breaks, .breaks = {", MTE1: has no way to or from L0A"}, .arch = 3510, .fast = true,
     .cube = true) {
  Cube q(w);
  CAUGHT(LoadDataWithTranspose(q.a, q.l1, LoadData2dTransposeParams(0, 1, 1, 0, 0)));
}
RULE(check_gap_of_fractals_breaks, .breaks = {", MTE1: dstGap does nothing on 3510"}, .arch = 3510, .fast = true,
     .cube = true) {
  Cube q(w);
  CAUGHT(LoadData(q.b, q.l1, LoadData2DParams(0, 2, 1, 0, 1, false, 0)));
}
RULE(check_fixpipe_columns_break, .breaks = {", FIX: nSize is 24, no multiple of 16"}, .fast = true, .cube = true) {
  Cube q(w);
  CAUGHT(Fixpipe(w.output(), q.c, FixpipeParamsV220(24, 16, 32, 32, false)));
}
RULE(check_fixpipe_rows_break, .breaks = {", FIX: mSize is 8193, at most 8192"}, .arch = 2201, .fast = true,
     .mix = true) {
  if (!Core::current().is_cube() || Core::current().arch() == 3510) return;
  Cube q(w);
  CAUGHT(Fixpipe(w.output(), q.c, FixpipeParamsV220(16, 8193, 8208, 16, false)));
}
RULE(check_fixpipe_stride_breaks, .breaks = {", FIX: srcStride is 16, less than"}, .fast = true, .cube = true) {
  Cube q(w);
  CAUGHT(Fixpipe(w.output(), q.c, FixpipeParamsV220(32, 32, 16, 32, false)));
}
RULE(check_fixpipe_types_break, .breaks = {", FIX: quantPre does not convert"}, .fast = true, .cube = true) {
  Cube q(w);
  CAUGHT(Fixpipe(w.tensor<half>(w.out.data()), q.c, FixpipeParamsV220(32, 32, 32, 32, false)));
}
RULE(check_fixpipe_to_bfloat16_breaks, .breaks = {", FIX: quantPre does not convert"}, .arch = 2201, .fast = true,
     .cube = true) {
  Cube q(w);
  FixpipeParamsV220 params(32, 32, 32, 32, false);
  params.quantPre = QuantMode_t::QS322BF16_PRE;
  CAUGHT(Fixpipe(w.tensor<bfloat16_t>(w.out.data()), q.c.ReinterpretCast<int32_t>(), params));
}
RULE(check_fixpipe_scales_break, .breaks = {", FIX: a scale for each column comes with"}, .fast = true, .cube = true) {
  Cube q(w);
  FixpipeParamsV220 params(32, 32, 32, 32, false);
  params.quantPre = QuantMode_t::VDEQF16;
  CAUGHT(Fixpipe(w.tensor<half>(w.out.data()), q.c.ReinterpretCast<int32_t>(), params));
}
RULE(check_fixpipe_beyond_memory_breaks, .breaks = {", FIX: writes out+0x3fc0..", "which has 0x4000 bytes"},
     .fast = true, .cube = true) {
  Cube q(w);
  CAUGHT(Fixpipe(w.output()[4096 - 32 * 32 + 16], q.c, FixpipeParamsV220(32, 32, 32, 32, false)));
}
RULE(check_fixpipe_to_window_breaks, .breaks = {", FIX: the twin has no Fixpipe to a window"}, .fast = true,
     .cube = true) {
  Cube q(w);
  CAUGHT(q.store(w.window(1)));
}

// ---- What instructions compute.

// Bytes of the world's input as a matrix [rows, 32] of int8.
int product(const World& w, int m, int n) {
  const auto* bytes = reinterpret_cast<const int8_t*>(w.in.data());
  int sum = 0;
  for (int k = 0; k < 32; ++k) sum += bytes[m * 32 + k] * bytes[n * 32 + k];
  return sum;
}

// C [16, 32] = X [:16] X^T, of int8.
LocalTensor<int32_t> products(World& w) {
  const LocalTensor<int8_t> l1(TPosition::A1, 0, 1024), a(TPosition::A2, 0, 512), b(TPosition::B2, 0, 1024);
  const LocalTensor<int32_t> c(TPosition::CO1, 0, 512);
  DataCopy(l1, w.tensor<int8_t>(w.in.data()), 1024);
  order<HardEvent::MTE2_MTE1>();
  LoadData(a, l1, LoadData2DParams(0, 1, 1, 0, 0, false, 0));
  LoadData(b, l1, LoadData2DParams(0, 2, 1, 0, 0, false, 0));
  order<HardEvent::MTE1_M>();
  Mmad(c, a, b, MmadParams(16, 32, 32, 0, false, true));
  order<HardEvent::M_FIX>();
  return c;
}

uint64_t scale_of(int column) {
  const float scale = 1.0f / static_cast<float>(3 + column);
  uint32_t bits;
  std::memcpy(&bits, &scale, sizeof(bits));
  return bits;
}

// The float that the hardware takes: 10 bits of the mantissa.
float used_scale(int column) {
  const auto bits = static_cast<uint32_t>(scale_of(column)) >> 13 << 13;
  float scale;
  std::memcpy(&scale, &bits, sizeof(scale));
  return scale;
}

template <typename T>
bool has_products(const World& w, T (*expected)(int product, int column)) {
  const auto* out = reinterpret_cast<const T*>(w.out.data());
  for (int m = 0; m < 16; ++m)
    for (int n = 0; n < 32; ++n)
      if (const T value = expected(product(w, m, n), n); std::memcmp(&out[m * 32 + n], &value, sizeof(T))) return false;
  return true;
}

RULE(
    fixpipe_without_scale, .cube = true,
    .result = [](const World& w) { return has_products<int32_t>(w, [](int x, int) { return x; }); }) {
  Fixpipe(w.tensor<int32_t>(w.out.data()), products(w), FixpipeParamsV220(32, 16, 16, 32, false));
}
RULE(
    fixpipe_with_a_scale, .cube = true, .result = [](const World& w) {
      return has_products<half>(w, [](int x, int) { return half(static_cast<float>(x) * used_scale(4)); });
    }) {
  FixpipeParamsV220 params(32, 16, 16, 32, false);
  params.quantPre = QuantMode_t::DEQF16;
  params.deqScalar = scale_of(4);
  Fixpipe(w.tensor<half>(w.out.data()), products(w), params);
}
RULE(
    fixpipe_with_scales, .cube = true, .result = [](const World& w) {
      return has_products<half>(w, [](int x, int n) { return half(static_cast<float>(x) * used_scale(n)); });
    }) {
  auto* scales = reinterpret_cast<uint64_t*>(w.work.data());
  for (int i = 0; i < 32; ++i) scales[i] = scale_of(i);
  const LocalTensor<uint64_t> l1(TPosition::C1, 4096, 32);
  DataCopy(l1, w.tensor<uint64_t>(scales), 32);
  FixpipeParamsV220 params(32, 16, 16, 32, false);
  params.quantPre = QuantMode_t::VDEQF16;
  Fixpipe(w.tensor<half>(w.out.data()), products(w), l1, params);
}
RULE(
    fixpipe_to_int8, .cube = true, .result = [](const World& w) {
      return has_products<int8_t>(w, [](int x, int) {
        const float rounded = std::nearbyint(static_cast<float>(x) * used_scale(61)) - 3;
        return static_cast<int8_t>(std::clamp(rounded, -128.0f, 127.0f));
      });
    }) {
  FixpipeParamsV220 params(32, 16, 16, 32, false);
  params.quantPre = QuantMode_t::REQ8;
  params.deqScalar = scale_of(61) | uint64_t{512 - 3} << 37 | uint64_t{1} << 46;
  Fixpipe(w.tensor<int8_t>(w.out.data()), products(w), params);
}
// Nz of float: columns of 16, each [m, 16].
RULE(
    fixpipe_to_nz, .cube = true, .result = [](const World& w) {
      const auto* out = reinterpret_cast<const int32_t*>(w.out.data());
      for (int m = 0; m < 16; ++m)
        for (int n = 0; n < 32; ++n)
          if (out[n / 16 * 512 + m * 16 + n % 16] != product(w, m, n)) return false;
      return true;
    }) {
  Fixpipe<int32_t, int32_t, CFG_NZ>(w.tensor<int32_t>(w.out.data()), products(w),
                                    FixpipeParamsV220(32, 16, 16, 64, false));
}
// The same sum, added up in global memory.
RULE(
    fixpipe_adds, .cube = true, .result = [](const World& w) {
      return reinterpret_cast<const int32_t*>(w.work.data())[35] == 2 * product(w, 1, 3);
    }) {
  const LocalTensor<int32_t> c = products(w);
  SetAtomicAdd<int32_t>();
  for (int i = 0; i < 2; ++i) Fixpipe(w.tensor<int32_t>(w.work.data()), c, FixpipeParamsV220(32, 16, 16, 32, false));
  SetAtomicNone();
}
// A row of A is [k] as it is, not a fractal.
RULE(
    mmad_of_a_row, .cube = true, .result = [](const World& w) {
      const auto* bytes = reinterpret_cast<const int8_t*>(w.in.data());
      int sum = 0;
      for (int k = 0; k < 64; ++k) sum += bytes[k] * bytes[(k / 32 * 16 + 5) * 32 + k % 32];
      return reinterpret_cast<const int32_t*>(w.out.data())[5] == sum;
    }) {
  const LocalTensor<int8_t> l1(TPosition::A1, 0, 1024), a(TPosition::A2, 0, 512), b(TPosition::B2, 0, 1024);
  const LocalTensor<int32_t> c(TPosition::CO1, 0, 256);
  DataCopy(l1, w.tensor<int8_t>(w.in.data()), 1024);
  order<HardEvent::MTE2_MTE1>();
  LoadData(a, l1, LoadData2DParams(0, 1, 1, 0, 0, false, 0));
  LoadData(b, l1, LoadData2DParams(0, 2, 1, 0, 0, false, 0));
  order<HardEvent::MTE1_M>();
  Mmad(c, a, b, MmadParams(1, 16, 64, 0, false, true));
  order<HardEvent::M_FIX>();
  Fixpipe(w.tensor<int32_t>(w.out.data()), c, FixpipeParamsV220(16, 1, 16, 16, false));
}
RULE(
    mmad_saturates, .cube = true,
    .result = [](const World& w) { return reinterpret_cast<const int32_t*>(w.out.data())[7] == INT32_MAX; }) {
  std::fill_n(reinterpret_cast<int8_t*>(w.work.data()), 1024, -128);
  const LocalTensor<int8_t> l1(TPosition::A1, 0, 1024), a(TPosition::A2, 0, 1024), b(TPosition::B2, 0, 32768);
  const LocalTensor<int32_t> c(TPosition::CO1, 0, 256);
  DataCopy(l1, w.tensor<int8_t>(w.work.data()), 1024);
  order<HardEvent::MTE2_MTE1>();
  LoadData(a, l1, LoadData2DParams(0, 2, 1, 0, 0, false, 0));
  LoadData(b, l1, LoadData2DParams(0, 32, 0, 0, 0, false, 0));
  order<HardEvent::MTE1_M>();
  for (int i = 0; i < 150; ++i) {
    Mmad(c, a, b, MmadParams(1, 16, 1024, 0, false, i == 0));
    PipeBarrier<PIPE_M>();
  }
  order<HardEvent::M_FIX>();
  Fixpipe(w.tensor<int32_t>(w.out.data()), c, FixpipeParamsV220(16, 1, 16, 16, false));
}

}  // namespace
}  // namespace rules
