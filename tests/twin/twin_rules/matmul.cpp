// A matrix product on cube cores, handed over to vector cores that scale it: what test_twin.py compares with NumPy.
#include <string>

#include "kernel_operator.h"
#include "twin.h"

namespace {

using namespace AscendC;

struct Problem {
  uint32_t m, n, k;
  bool transposed;  // b is [n, k], else [k, n]
  int arch;
};

constexpr uint32_t kM = 48, kN = 64, kK = 96;  // of a tile

constexpr uint32_t round_up(uint32_t count, uint32_t to) { return (count + to - 1) / to * to; }

template <HardEvent event>
void order() {
  SetFlag<event>(0);
  WaitFlag<event>(0);
}

template <typename T, typename C, typename U = T>  // of a, c and b
class Matmul {
 public:
  Matmul(const Problem& p, T* a, U* b, C* slots, float* rows, float* columns, float* out) : p_(p) {
    a_.SetGlobalBuffer(a);
    b_.SetGlobalBuffer(b);
    slots_.SetGlobalBuffer(slots + GetBlock() * kM * kN);
    rows_.SetGlobalBuffer(rows);
    columns_.SetGlobalBuffer(columns);
    out_.SetGlobalBuffer(out);
  }

  void multiply() {
    pipe_.InitBuffer(a1_, kM * kK * sizeof(T));
    pipe_.InitBuffer(b1_, kN * kK * sizeof(T));
    pipe_.InitBuffer(a2_, kM * kK * sizeof(T));
    pipe_.InitBuffer(b2_, kN * kK * sizeof(T));
    pipe_.InitBuffer(c_, kM * kN * sizeof(C));
    SetFlag<HardEvent::MTE1_MTE2>(1);
    SetFlag<HardEvent::M_MTE1>(1);
    SetFlag<HardEvent::FIX_M>(1);
    uint32_t done = 0;
    each_tile([&](uint32_t m0, uint32_t n0, uint32_t m, uint32_t n) {
      WaitFlag<HardEvent::FIX_M>(1);
      for (uint32_t k0 = 0; k0 < p_.k; k0 += kK) multiply(m0, n0, k0, m, n, std::min(kK, p_.k - k0));
      order<HardEvent::M_FIX>();
      if (done++ != 0) CrossCoreWaitFlag(1);
      FixpipeParamsV220 params(round_up(n, 16), m, round_up(m, 16), kN, false);
      Fixpipe<C, C, CFG_ROW_MAJOR>(slots_, c_.template Get<C>(), params);
      CrossCoreSetFlag<2, PIPE_FIX>(0);
      SetFlag<HardEvent::FIX_M>(1);
    });
    WaitFlag<HardEvent::MTE1_MTE2>(1);
    WaitFlag<HardEvent::M_MTE1>(1);
    WaitFlag<HardEvent::FIX_M>(1);
    if (done != 0) CrossCoreWaitFlag(1);
  }

  // Each of the two vector cores has every other row.
  void scale() {
    pipe_.InitBuffer(words_, kN * sizeof(C));
    pipe_.InitBuffer(floats_, kN * sizeof(float));
    pipe_.InitBuffer(scales_, kN * sizeof(float));
    pipe_.InitBuffer(row_, 32);
    const LocalTensor<C> words = words_.template Get<C>();
    const LocalTensor<float> floats = floats_.template Get<float>(), scales = scales_.template Get<float>();
    each_tile([&](uint32_t m0, uint32_t n0, uint32_t m, uint32_t n) {
      CrossCoreWaitFlag(0);
      const auto bytes = static_cast<uint32_t>(n * sizeof(float));
      DataCopyPad(scales, columns_[n0], {1, bytes, 0, 0, 0}, {});
      for (uint32_t row = GetSubBlockIdx(); row < m; row += 2) {
        DataCopyPad(words, slots_[row * kN], {1, static_cast<uint32_t>(n * sizeof(C)), 0, 0, 0}, {});
        DataCopyPad(row_.template Get<float>(), rows_[m0 + row], {1, 4, 0, 0, 0}, {});
        order<HardEvent::MTE2_V>();
        order<HardEvent::MTE2_S>();
        if constexpr (std::is_same_v<C, float>)
          Adds(floats, words, 0.0f, n);
        else
          Cast(floats, words, RoundMode::CAST_RINT, n);
        PipeBarrier<PIPE_V>();
        Mul(floats, floats, scales, n);
        PipeBarrier<PIPE_V>();
        Muls(floats, floats, row_.template Get<float>().GetValue(0), n);
        order<HardEvent::V_MTE3>();
        DataCopyPad(out_[(m0 + row) * p_.n + n0], floats, {1, bytes, 0, 0, 0});
        PipeBarrier<PIPE_ALL>();
      }
      PipeBarrier<PIPE_ALL>();
      CrossCoreSetFlag<2, PIPE_MTE2>(1);
    });
  }

 private:
  static int64_t GetBlock() { return GetBlockIdx() / GetTaskRatio(); }

  template <typename F>
  void each_tile(F&& f) {
    uint32_t tile = 0;
    for (uint32_t m0 = 0; m0 < p_.m; m0 += kM)
      for (uint32_t n0 = 0; n0 < p_.n; n0 += kN)
        if (tile++ % GetBlockNum() == GetBlock()) f(m0, n0, std::min(kM, p_.m - m0), std::min(kN, p_.n - n0));
  }

  void multiply(uint32_t m0, uint32_t n0, uint32_t k0, uint32_t m, uint32_t n, uint32_t k) {
    constexpr uint32_t kC0 = 32 / sizeof(T), kFractal = 16 * kC0;
    const uint32_t ms = round_up(m, 16) / 16, ns = round_up(n, 16) / 16, ks = round_up(k, kC0) / kC0;
    const LocalTensor<T> a1 = a1_.template Get<T>(), a2 = a2_.template Get<T>();
    const LocalTensor<U> b1 = b1_.template Get<U>(), b2 = b2_.template Get<U>();
    WaitFlag<HardEvent::MTE1_MTE2>(1);
    DataCopy(a1, a_[m0 * p_.k + k0], nd2nz(m, k, p_.k, ms * 16));
    if (p_.transposed)
      DataCopy(b1, b_[n0 * p_.k + k0], nd2nz(n, k, p_.k, ns * 16));
    else
      DataCopy(b1, b_[k0 * p_.n + n0], nd2nz(k, n, p_.n, ks * kC0));
    order<HardEvent::MTE2_MTE1>();
    WaitFlag<HardEvent::M_MTE1>(1);
    if (p_.arch == 3510) {
      LoadData(a2, a1, LoadData2DParams(0, ms * ks, 1, 0, 0, false, 0));
    } else {
      for (uint32_t i = 0; i < ms; ++i)
        LoadData(a2[i * ks * kFractal], a1, LoadData2DParams(i, ks, ms, 0, 0, false, 0));
    }
    if (p_.transposed) {
      LoadData(b2, b1, LoadData2DParams(0, ns * ks, 1, 0, 0, false, 0));
    } else if constexpr (sizeof(U) == 2) {
      for (uint32_t i = 0; i < ks; ++i) LoadData(b2[i * ns * kFractal], b1, LoadData2DParams(i, ns, ks, 0, 0, true, 0));
    } else {
      for (uint32_t i = 0; i < ns / 2; ++i)
        LoadDataWithTranspose(b2[i * 2 * kFractal], b1, LoadData2dTransposeParams(i * ks, ks, 1, ns - 1, 0));
    }
    SetFlag<HardEvent::MTE1_MTE2>(1);
    order<HardEvent::MTE1_M>();
    MmadParams params(m, n, k, 0, false, k0 == 0);
    Mmad(c_.template Get<C>(), a2, b2, params);
    PipeBarrier<PIPE_M>();
    SetFlag<HardEvent::M_MTE1>(1);
  }

  static Nd2NzParams nd2nz(uint32_t rows, uint32_t columns, uint32_t stride, uint32_t all_rows) {
    return Nd2NzParams(1, rows, columns, 0, stride, all_rows, 1, 0);
  }

  Problem p_;
  TPipe pipe_;
  TBuf<TPosition::A1> a1_;
  TBuf<TPosition::B1> b1_;
  TBuf<TPosition::A2> a2_;
  TBuf<TPosition::B2> b2_;
  TBuf<TPosition::CO1> c_;
  TBuf<> words_, floats_, scales_, row_;
  GlobalTensor<T> a_;
  GlobalTensor<U> b_;
  GlobalTensor<C> slots_;
  GlobalTensor<float> rows_, columns_, out_;
};

template <typename T, typename C, typename U = T>
void run(const Problem& p, void* a, void* b, void* slots, float* rows, float* columns, float* out) {
  KERNEL_TASK_TYPE_DEFAULT(KERNEL_TYPE_MIX_AIC_1_2);
  Matmul<T, C, U> matmul(p, static_cast<T*>(a), static_cast<U*>(b), static_cast<C*>(slots), rows, columns, out);
  if ASCEND_IS_AIC
    matmul.multiply();
  if ASCEND_IS_AIV
    matmul.scale();
}

}  // namespace

// a [m, k], b [n, k] or [k, n], of int8, half or bfloat16, or of fp8_e4m3fn and fp8_e5m2; fp32 scales rows [m] and
// columns [n]; fp32 out [m, n]. With `seed` below 0 in fast mode. Returns the first violation.
extern "C" const char* twin_matmul(const char* type, int arch, int64_t seed, int cores, int m, int n, int k,
                                   int transposed, void* a, void* b, float* rows, float* columns, float* out) {
  static thread_local std::string text;
  const std::string name = type;
  const Problem p{static_cast<uint32_t>(m), static_cast<uint32_t>(n), static_cast<uint32_t>(k), transposed != 0, arch};
  const uint64_t element = name == "int8" || name == "fp8_e4m3fn" ? 1 : 2, size = sizeof(float);
  std::vector<float> slots(cores * kM * kN);
  const std::vector<twin::Region> regions = {{a, m * k * element, "a", true, -1, false},
                                             {b, n * k * element, "b", true, -1, false},
                                             {slots.data(), slots.size() * size, "slots", false, -1, true},
                                             {rows, m * size, "rows", true, -1, false},
                                             {columns, n * size, "columns", true, -1, false},
                                             {out, m * n * size, "out", false, -1, true}};
  twin::Settings settings{arch, cores, seed >= 0, static_cast<uint64_t>(seed), 190 * 1024, 50'000'000, 2 * cores, true};
  settings.mix = true;
  const twin::Report report = twin::run(settings, "matmul", regions, [&] {
    if (name == "int8")
      run<int8_t, int32_t>(p, a, b, slots.data(), rows, columns, out);
    else if (name == "fp8_e4m3fn")
      run<fp8_e4m3fn_t, float, fp8_e5m2_t>(p, a, b, slots.data(), rows, columns, out);
    else if (name == "half")
      run<half, float>(p, a, b, slots.data(), rows, columns, out);
    else
      run<bfloat16_t, float>(p, a, b, slots.data(), rows, columns, out);
  });
  text = report.violations.empty() ? "" : report.violations[0];
  return text.c_str();
}
