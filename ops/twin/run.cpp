// A launch: its cores as threads, where they meet, and what it reports.
#include <sched.h>
#include <sys/prctl.h>

#include <thread>

#include "launch.h"

namespace twin {

namespace {

thread_local Core* this_core = nullptr;

}  // namespace

Core& Core::current() { return *this_core; }

Launch::Launch(const Settings& settings, const Group& group, const std::string& kernel,
               const std::vector<Region>& regions)
    : settings(settings),
      kernel(kernel),
      num_regions(regions.size()),
      group(group),
      ended_(cores()),
      live_(cores()),
      counters_(settings.mix ? cores() * (kIds + kIdsOfMode4) : 0) {
  report_.counters.resize(cores());
  for (int core = 0; core < cores(); ++core) places.emplace_back(ranks);
  ranks.begin_launch();
  for (const Region& region : regions) {
    if (region.bytes == 0) continue;
    std::unique_ptr<uint8_t[]> written;
    if (!region.initialised) written.reset(new uint8_t[region.bytes]());
    memories_.push_back({region, static_cast<size_t>(&region - regions.data()), std::move(written)});
  }
  std::sort(memories_.begin(), memories_.end(), [](const Memory& a, const Memory& b) { return a.begin() < b.begin(); });
  for (size_t i = 1; i < memories_.size(); ++i)
    if (memories_[i - 1].end() > memories_[i].begin())
      report("kernel " + kernel + ": regions " + memories_[i - 1].region.name + " and " + memories_[i].region.name +
             " overlap");
}

Launch::~Launch() { ranks.end_launch(); }

Memory* Launch::find(const void* address) {
  const auto* byte = static_cast<const uint8_t*>(address);
  auto next = std::upper_bound(memories_.begin(), memories_.end(), byte,
                               [](const uint8_t* a, const Memory& memory) { return a < memory.begin(); });
  if (next == memories_.begin() || byte >= (--next)->end()) return nullptr;
  return &*next;
}

void Launch::report(const std::string& violation) {
  std::lock_guard lock(mutex_);
  report_.violations.push_back(violation);
  stopped_ = true;
  group.shared->stopped = 1;
  changed_.notify_all();
}

void Launch::end(Core& core) {
  std::lock_guard lock(mutex_);
  ended_[core.index()] = true;
  --live_;
  places[core.index()].ends();
  report_.counters[core.index()] = core.counters_;
  changed_.notify_all();
}

Gate& Launch::gate_of(const void* workspace) {
  std::lock_guard lock(mutex_);
  return soft_gates_[workspace];
}

std::string Launch::name_of(int core) const {
  const bool is_cube = core >= vector_cores();
  return (is_cube ? "cube core " : "core ") + std::to_string(is_cube ? core - vector_cores() : core);
}

void Launch::release(Waiter& waiter) {
  if (stopped()) return;  // it may wait no more
  waiter.released = true;
  --waiting_;
  waiter.place.meets_no_more();
  changed_.notify_all();
}

int Launch::meet(Gate& gate, int cores, Place& place, SharedKnown* known) {
  std::unique_lock lock(mutex_);
  gate.joined.resize(this->cores());
  for (int core = 0; core < this->cores(); ++core) gate.joined[core].join((**known)[core]);
  if (++gate.arrived == cores) {
    gate.arrived = 0;
    gate.known = std::make_shared<const Known>(gate.joined);
    for (Waiter* waiting : gate.waiting) release(*waiting);
    gate.waiting.clear();
  } else {
    Waiter waiter{place};
    gate.waiting.push_back(&waiter);
    const auto ended = [&] {
      const auto found = std::find(ended_.begin(), ended_.begin() + cores, true);
      return found == ended_.begin() + cores ? kAllWait : static_cast<int>(found - ended_.begin());
    };
    wait(lock, waiter, [&] { return ended() != kAllWait; });
    if (!waiter.released) return ended();
  }
  *known = gate.known;
  return kAllMet;
}

BlockLock::BlockLock(const Launch& launch, const Memory* memory, const uint8_t* address) {
  if (!memory->window()) return;
  // The same number in all processes.
  const uint64_t block =
      (reinterpret_cast<uintptr_t>(address) / kLinkBlock) - (reinterpret_cast<uintptr_t>(memory->begin()) / kLinkBlock);
  lock_ = &launch.group.shared->locks[(block * 31 + static_cast<uint64_t>(memory->region.rank) * 257) % Shared::kLocks];
  const uint32_t own = launch.group.rank + 1;
  uint32_t holder = 0;
  for (uint32_t tries = 1; !lock_->compare_exchange_weak(holder, own, std::memory_order_acquire); ++tries) {
    // A process that died while it held the lock must not stop the others.
    if (tries % 1024 != 0 || holder == 0 || !launch.ranks.has_ended(static_cast<int>(holder) - 1)) holder = 0;
    sched_yield();
  }
}

BlockLock::~BlockLock() {
  if (lock_) lock_->store(0, std::memory_order_release);
}

Report run(const Settings& settings, const std::string& kernel, const std::vector<Region>& regions,
           const std::function<void()>& body) {
  Shared shared{};
  Presence presence{};
  const Group alone{&shared, &presence, 1, 0};
  Launch launch(settings, settings.group != nullptr ? *settings.group : alone, kernel, regions);
  const auto refuse = [&](int block, const std::string& why) {
    launch.report("kernel " + kernel + ", core " + std::to_string(block) + ", begins when others have ended: " + why);
  };
  const int room = settings.mix ? settings.vector_cores / 2 : settings.vector_cores;
  if (settings.cores > room)
    refuse(room, "there are " + std::to_string(settings.cores) + " blocks, and " + std::to_string(room) +
                     (settings.mix ? " cube cores" : " vector cores"));
  else if (settings.cores > 1 && !settings.together)
    refuse(1, "SetScheduleMode(1) is missing");
  if (launch.stopped()) return launch.take_report();
  std::vector<std::thread> threads;
  for (int index = 0; index < launch.cores(); ++index) {
    threads.emplace_back([&launch, &body, index] {
      prctl(PR_SET_TIMERSLACK, 50'000);  // whatever the process has: a nap of Core::relax is as long as it says
      Core core(launch, index);
      this_core = &core;
      try {
        body();
        core.finish();
      } catch (const Violation&) {
      } catch (const Stopped&) {
      } catch (const std::exception& error) {
        launch.report("kernel " + launch.kernel + ", " + launch.name_of(index) + ": " + error.what());
      }
      launch.end(core);
      this_core = nullptr;
    });
  }
  for (std::thread& thread : threads) thread.join();
  launch.check_flags();
  return launch.take_report();
}

}  // namespace twin
