// Virtual time (waiting.h): what never comes is late at once, and what comes is not, however long it takes. `seen` is
// that something was late.
#include "rules.h"

namespace rules {
namespace {

void work(World& w) {
  Tensors t;
  for (int i = 0; i < 5'000; ++i) {
    Adds(t.a, t.a, 1.0f, t.kCount);
    PipeBarrier<PIPE_V>();
  }
  order<HardEvent::V_MTE3>();
  DataCopy(w.window(1), t.a, t.kCount);
  order<HardEvent::MTE3_S>();
}

bool comes(World& w, int64_t cycles, uint32_t at = 0) {
  GlobalTensor<float> window = w.window(1);
  return wait(
      [&] {
        clean(window[at]);
        return window.GetValue(at) != 0;
      },
      cycles);
}

constexpr int64_t kForEver = int64_t{1} << 58;  // cycles
constexpr uint32_t kAnswer = 1024;              // in floats

RULE(waiting_for_nobody_is_late, .seen = Case::kAlways) { w.seen = !comes(w, kForEver); }
RULE(waiting_beside_cores_that_wait_is_late, .cores = 4, .seen = Case::kAlways) {
  if (!comes(w, kForEver)) w.seen = true;
}
RULE(waiting_beside_cores_in_sync_is_late, .cores = 4, .seen = Case::kAlways) {
  if (GetBlockIdx() == 0) w.seen = !comes(w, kForEver);
  SyncAll();
}
RULE(waiting_beside_cores_that_have_ended_is_late, .cores = 4, .seen = Case::kAlways) {
  if (GetBlockIdx() == 0) w.seen = !comes(w, kForEver);
}
RULE(waiting_by_mte2_is_late, .seen = Case::kAlways) {
  Tensors t;
  w.seen = !wait(
      [&] {
        DataCopy(t.a, w.window(1), 128);
        order<HardEvent::MTE2_S>();
        const bool has_come = t.a.GetValue(0) != 0;
        order<HardEvent::S_MTE2>();
        return has_come;
      },
      kForEver);
}
RULE(waiting_for_time_alone_ends) {
  wait([] { return false; }, kForEver);
}
RULE(waiting_for_one_at_work_keeps, .cores = 2) {
  if (GetBlockIdx() == 1) return work(w);
  w.seen = !comes(w, 0);
}
RULE(waiting_for_one_at_work_beside_sync_keeps, .cores = 4) {
  if (GetBlockIdx() == 1) work(w);
  if (GetBlockIdx() == 0) w.seen = !comes(w, 0);
  SyncAll();
}
// Core 3 waits for core 2, and so on.
RULE(waiting_in_a_row_keeps, .cores = 4) {
  const auto index = static_cast<uint32_t>(GetBlockIdx());
  if (index == 0) return work(w);
  if (!comes(w, 0, index == 1 ? 0 : index * kAnswer - kAnswer)) w.seen = true;
  clean(w.window(1)[index * kAnswer]);
  w.window(1).SetValue(index * kAnswer, 1.0f);
  clean(w.window(1)[index * kAnswer]);
}
// Both wait, time and again, each for what the other writes before it waits.
RULE(waiting_for_each_other_keeps, .cores = 2) {
  const auto own = static_cast<uint32_t>(GetBlockIdx()) * kAnswer, other = kAnswer - own;
  GlobalTensor<float> window = w.window(1);
  clean(window[own]);
  for (int i = 1; i <= 200; ++i) {
    window.SetValue(own, static_cast<float>(i));
    clean(window[own]);
    const bool has_come = wait(
        [&] {
          clean(window[other]);
          return window.GetValue(other) >= static_cast<float>(i);
        },
        0);
    if (!has_come) w.seen = true;
  }
}

}  // namespace
}  // namespace rules
