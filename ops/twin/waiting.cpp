#include "waiting.h"

#include <dirent.h>
#include <unistd.h>

#include <algorithm>
#include <stdexcept>
#include <string>

#include "proc_stat.h"

namespace twin {

namespace {

using deep_ep::ProcStat;

constexpr uint64_t kFirstStep = 1, kLastStep = uint64_t{1} << 45, kLook = 10'000;  // microseconds
constexpr uint32_t kNapsPerLook = 100;

std::string folder_of(pid_t process) { return "/proc/" + std::to_string(process); }

}  // namespace

Process Process::own() { return {getpid(), ProcStat::of_process(getpid()).started}; }

bool Process::has_ended() const {
  if (started == 0) return false;  // there is no /proc
  const ProcStat stat = ProcStat::of_process(id);
  return stat.state == 0 || stat.state == 'Z' || stat.state == 'X' || stat.started != started;
}

bool Process::sleeps() const {
  const std::string folder = folder_of(id) + "/task";
  DIR* const threads = opendir(folder.c_str());
  if (threads == nullptr) return false;
  bool sleeps = true;
  while (const dirent* thread = readdir(threads)) {
    if (thread->d_name[0] == '.') continue;
    const char state = ProcStat(folder + "/" + thread->d_name + "/stat").state;
    sleeps = sleeps && (state == 'S' || state == 0);
  }
  closedir(threads);
  return sleeps;
}

void enter(const Group& group) {
  Presence& own = group.ranks[group.rank];
  const Process process = Process::own();
  own.process = process.id;
  own.started = process.started;
}

void leave(const Group& group) {
  group.ranks[group.rank].gone = 1;
  Ranks(group).begin_round();
}

void Ranks::begin_launch() {
  ++group_.ranks[group_.rank].launches;
  begin_round();
}

void Ranks::end_launch() {
  --group_.ranks[group_.rank].launches;
  begin_round();
}

std::atomic<uint64_t>* Ranks::take_place() {
  for (std::atomic<uint64_t>& place : group_.ranks[group_.rank].cores) {
    uint64_t free = kNoCore;
    if (place.compare_exchange_strong(free, kGoesOn)) return &place;
  }
  throw std::runtime_error("a rank has places for " + std::to_string(Presence::kMostCores) + " cores");
}

void Ranks::begin_round() {
  group_.shared->step = 0;
  ++group_.shared->round;
}

bool Ranks::has_ended(int rank) const { return rank != group_.rank && group_.ranks[rank].of().has_ended(); }

// A core that has waited in this round did so from its beginning, since one that goes on and then waits begins another.
// If all have, nothing that one of them has done was unknown to the others when they looked.
Ranks::Waiting Ranks::waiting(uint64_t round) const {
  Waiting found = Waiting::all;
  for (int rank = 0; rank < group_.size; ++rank) {
    const Presence& presence = group_.ranks[rank];
    if (presence.gone.load()) continue;
    if (presence.launches.load() == 0) {
      found = Waiting::cores;
      continue;
    }
    bool has_cores = false;  // else the launch is about to end
    for (const std::atomic<uint64_t>& place : presence.cores) {
      const uint64_t state = place.load();
      if (state == kNoCore) continue;
      if (state != kMeets && state != kFirstRound + round) return Waiting::not_all;
      has_cores = true;
    }
    if (!has_cores) return Waiting::not_all;
  }
  return found;
}

void Ranks::pass(uint64_t round) {
  Shared& shared = *group_.shared;
  if (waiting(round) != Waiting::all || !shared.round.compare_exchange_strong(round, round + 1)) return;
  const uint64_t step = std::clamp(2 * shared.step.load(), kFirstStep, kLastStep);
  shared.step = step;
  shared.microseconds += step;
}

void Ranks::look(uint64_t round) {
  bool sleep = true, is_first = true;
  for (int rank = 0; rank < group_.size; ++rank) {
    Presence& presence = group_.ranks[rank];
    if (rank == group_.rank || presence.gone.load()) continue;
    const Process process = presence.of();
    if (process.has_ended()) {
      presence.gone = 1;
      begin_round();
      return;
    }
    if (presence.launches.load() == 0)
      sleep = sleep && process.sleeps();
    else
      is_first = is_first && rank > group_.rank;
  }
  // One rank does it, so that time passes once.
  if (!is_first || !sleep || waiting(round) != Waiting::cores) return;
  if (group_.shared->round.compare_exchange_strong(round, round + 1)) group_.shared->microseconds += kLook;
}

bool Ranks::is_first_to_wait(const std::atomic<uint64_t>* place) const {
  const auto& cores = group_.ranks[group_.rank].cores;
  return place ==
         std::find_if(std::begin(cores), std::end(cores), [](const auto& c) { return c.load() >= kFirstRound; });
}

void Place::meets() {
  set(kMeets);
  ranks_.begin_round();
}

void Place::ends() {
  set(kNoCore);
  state_ = nullptr;
  ranks_.begin_round();
}

void Place::waits() {
  if (waits_) {
    state_->store(kFirstRound + round_);
    ranks_.pass(round_);
  } else {
    waits_ = true;
    ranks_.begin_round();
  }
  round_ = ranks_.round();
}

void Place::sleeps() {
  if (++naps_ % kNapsPerLook == 0 && ranks_.is_first_to_wait(state_)) ranks_.look(round_);
}

}  // namespace twin
