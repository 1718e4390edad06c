// Cross-core flags (rule 10), and SyncAll of vector and cube cores.
#include <sched.h>

#include <utility>

#include "launch.h"

namespace twin {

SharedKnown joined(const SharedKnown& a, const SharedKnown& b) {
  if (!a || !b || a == b) return a ? a : b;
  Known known(*a);
  for (size_t core = 0; core < known.size(); ++core) known[core].join((*b)[core]);
  return std::make_shared<const Known>(std::move(known));
}

namespace {

// Ids that SyncAll takes.
constexpr bool is_reserved(int id) { return id >= 11 && id <= 14; }

std::string text(int mode, int id) {
  return "cross-core flag " + std::to_string(id) + " of mode " + std::to_string(mode);
}

}  // namespace

// ---- A core.

void Core::check_cross_flag(int mode, Pipe pipe, int id, Site at) {
  const auto refuse = [&](const std::string& why) { fail(at, pipe, text(mode, id) + ": " + why); };
  if (!is_mix()) refuse("a kernel has such flags with KERNEL_TYPE_MIX_AIC_1_2");
  const bool is_mode = mode == 0 || mode == 1 || mode == 2 || (mode == 4 && arch() == 3510);
  if (!is_mode) refuse(arch() == 3510 ? "modes are 0, 1, 2 and 4" : "modes are 0, 1 and 2");
  if (mode == 1 && is_cube_) refuse("mode 1 is one of vector cores");
  if (mode == 4) {
    if ((id >= 0 && id <= 10) || (is_cube_ && id >= 16 && id <= 26)) return;
    refuse(is_cube_ ? "ids of mode 4 are 0 to 10, and 16 to 26 for the second vector core"
                    : "ids of mode 4 are 0 to 10");
  }
  if (id < 0 || id >= 16) refuse("ids are 0 to 15");
  if (is_reserved(id)) refuse("ids 11 to 14 are reserved for SyncAll");
}

void Core::set_cross_flag(int mode, Pipe pipe, int id, Site at) {
  last_site_ = at;
  check_stopped();
  check_cross_flag(mode, pipe, id, at);
  if (pipe == S && mode != 4) fail(at, S, text(mode, id) + ": S sets none");
  if (is_cube_ ? pipe == V || pipe == MTE3 : pipe > LINK)
    fail(at, pipe, text(mode, id) + ": this core has no such pipe");
  ++counters_.events;
  const auto fire = [this, mode, pipe, id, at](const SharedKnown& known) {
    act();
    const std::string wrong = launch_.fire(mode, id, {known, index_, at});
    if (!wrong.empty()) fail(at, pipe, text(mode, id) + ": " + wrong);
  };
  if (!adversarial_) return fire(known_);
  const Clock after = snapshot(pipe, pipe);
  Known known(*joined(known_, known_alone_[pipe]));
  known[index_].join(after);
  queue_operation(CROSS, at, after, 1,
                  [fire, known = std::make_shared<const Known>(std::move(known))](uint32_t) { fire(known); });
  if (pipe == S) ++issued_[S];
  tick(false);
}

void Core::wait_cross_flag(int mode, Pipe pipe, int id, Site at) {
  last_site_ = at;
  check_cross_flag(mode, pipe, id, at);
  wrote_ = true;
  SharedKnown known;
  for (;;) {
    check_stopped();
    // What has been issued goes on, a Set too that the others may wait for.
    const bool block = !has_pending();
    known = launch_.take(index_, mode, id, place_, block);
    if (known) break;
    if (block) fail(at, pipe, "CrossCoreWaitFlag, " + text(mode, id) + ": it waits for ever, as all cores do");
    tick(true);
    sched_yield();
  }
  if (!adversarial_) return;
  const bool all = arch() == 2201 || pipe == S;
  SharedKnown& mine = all ? known_ : known_alone_[pipe];
  mine = joined(mine, known);
  after_[all ? S : pipe].join((*known)[index_]);  // what the others have waited for, and answered
  tick(false);
}

void Core::sync_all_mix(Site at) {
  ++counters_.syncs;
  check_stopped();
  if (!is_mix()) fail(at, S, "SyncAll<false> meets cube cores, which the kernel does not have");
  complete_all();
  auto known = std::make_shared<Known>(*known_);
  (*known)[index_].join(after_[S]);
  known_ = std::move(known);
  meet(launch_.mix_gate, launch_.cores(), at);
}

// ---- The launch.

CrossGroup& Launch::group_of(int core, int mode, int id) {
  const int vectors = vector_cores(), block = core < vectors ? core / 2 : core - vectors;
  const bool is_cube = core >= vectors;
  CrossGroup group{mode, id, {}, {}, id, {}};
  if (mode == 0) {
    for (int i = is_cube ? vectors : 0; i < (is_cube ? cores() : vectors); ++i) group.setters.push_back(i);
    group.waiters = group.setters;
  } else if (mode == 4) {
    const int lane = is_cube ? id / 16 : core % 2, vector = 2 * block + lane;
    group.setters = {core};
    group.waiters = {is_cube ? vector : vectors + block};
    group.waited_id = is_cube ? id % 16 : id + 16 * lane;
  } else {
    group.setters = {2 * block, 2 * block + 1};
    group.waiters = mode == 1 ? group.setters : std::vector{vectors + block};
    if (is_cube) std::swap(group.setters, group.waiters);
  }
  group.fired.resize(group.setters.size());
  return groups_.try_emplace({mode, id, group.setters.front()}, std::move(group)).first->second;
}

std::string Launch::fire(int mode, int id, const Arrival& arrival) {
  std::lock_guard lock(mutex_);
  CrossGroup& group = group_of(arrival.core, mode, id);
  for (int waiter : group.waiters) {
    const CrossCounter& counter = counter_of(waiter, mode, group.waited_id);
    if (!counter.arrived.empty() && counter.mode != mode)
      return name_of(waiter) + " has not waited for all of mode " + std::to_string(counter.mode);
  }
  for (const auto& [key, other] : groups_) {
    if (other.id != id || other.mode == mode || (other.mode == 4) != (mode == 4)) continue;
    for (size_t i = 0; i < other.fired.size(); ++i)
      if (!other.fired[i].empty() &&
          std::find(group.setters.begin(), group.setters.end(), other.setters[i]) != group.setters.end())
        return "half of one of mode " + std::to_string(other.mode) + " is set";
  }
  const auto own = std::find(group.setters.begin(), group.setters.end(), arrival.core) - group.setters.begin();
  group.fired[own].push_back(arrival);
  const std::string full = "the counter is more than " + std::to_string(CrossCounter::kMost);
  if (group.fired[own].size() > CrossCounter::kMost) return full;
  if (std::any_of(group.fired.begin(), group.fired.end(), [](const auto& fired) { return fired.empty(); })) return "";
  Arrival all = arrival;
  for (auto& fired : group.fired) {
    all.known = joined(all.known, fired.front().known);
    fired.pop_front();
  }
  for (int waiter : group.waiters) {
    CrossCounter& counter = counter_of(waiter, mode, group.waited_id);
    counter.mode = mode;
    counter.arrived.push_back(all);
    if (counter.waiting) release(*std::exchange(counter.waiting, nullptr));
    if (counter.arrived.size() > CrossCounter::kMost) return full;
  }
  return "";
}

SharedKnown Launch::take(int core, int mode, int id, Place& place, bool block) {
  std::unique_lock lock(mutex_);
  CrossCounter& counter = counter_of(core, mode, id);
  if (counter.arrived.empty()) {
    if (!block) return nullptr;
    Waiter waiter{place};
    counter.waiting = &waiter;
    wait(lock, waiter, [] { return false; });
    counter.waiting = nullptr;
    if (counter.arrived.empty()) return nullptr;
  }
  const SharedKnown known = counter.arrived.front().known;
  counter.arrived.pop_front();
  return known;
}

void Launch::check_flags() {
  if (stopped()) return;
  const auto left = [&](int core, int mode, int id, const Arrival& arrival, const std::string& what) {
    report("kernel " + kernel + ", " + name_of(core) + ", " + arrival.site.text() + ": " + text(mode, id) + what);
  };
  for (const auto& [key, group] : groups_) {
    for (int waiter : group.waiters)
      if (const CrossCounter& counter = counter_of(waiter, group.mode, group.waited_id); !counter.arrived.empty())
        return left(waiter, counter.mode, group.id, counter.arrived.front(),
                    " is set and never waited for: it is left to the next kernel");
    for (const auto& fired : group.fired)
      if (!fired.empty())
        return left(fired.front().core, group.mode, group.id, fired.front(),
                    " is set by some of the cores only that set it together: it is left to the next kernel");
  }
}

}  // namespace twin
