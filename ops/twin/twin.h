// The twin: runs AscendC kernels on the host. ops/twin/include has AscendC's device API, so that the source of a kernel
// is compiled unchanged; `run` executes it, with checks, and in adversarial mode with everything delayed and reordered
// that the programming model leaves open.
//
// "Rule n" in the twin's sources is rule n of the ordering rules that are listed in core.h.
#pragma once

#include <array>
#include <atomic>
#include <cstdint>
#include <functional>
#include <string>
#include <vector>

namespace twin {

// Global memory that a kernel may touch. Regions do not overlap. Processes that map the same window map it at the same
// offset from 512-byte boundaries.
struct Region {
  void* base;
  uint64_t bytes;
  std::string name;
  bool initialised;  // false: reading a byte that this launch has not written is a violation
  int rank;          // -1: memory of this rank alone; else the rank whose window it is, this rank's own included
  bool writable;
};

// What processes that map the same windows have in common, in shared memory that starts as zeros.
struct Shared {
  static constexpr uint32_t kLocks = 1024;
  // Of 512-byte blocks of windows (rule 8: an aligned block never tears): 0, or the rank that holds it, plus 1.
  std::atomic<uint32_t> locks[kLocks];
  std::atomic<uint32_t> stopped;       // a violation on one of them ends the launches of all
  std::atomic<uint64_t> microseconds;  // that have passed
  std::atomic<uint64_t> round, step;   // of waiting.h
};

struct Presence;  // of a rank, in waiting.h

// The ranks that map the same windows.
struct Group {
  Shared* shared;
  Presence* ranks;
  int size;
  int rank;  // this one
};

// This rank is there, and is of this process.
void enter(const Group& group);
// It comes to no launch any more: whoever waits for it finds that it is late.
void leave(const Group& group);

// What AscendC itself has of every workspace, in front of the kernel's part.
constexpr uint64_t kSystemWorkspaceBytes = 16 << 20;

struct Settings {
  int arch;   // 2201 or 3510
  int cores;  // that run the launch: its blocks
  bool adversarial;
  uint64_t seed;  // of the adversary
  uint64_t unified_buffer_bytes;
  uint64_t clock_hz;             // of GetSystemCycle
  int vector_cores;              // that the SoC has
  bool together;                 // all blocks start at the same time: SetScheduleMode(1)
  const Group* group = nullptr;  // nullptr: no other rank takes part
  bool mix = false;              // KERNEL_TYPE_MIX_AIC_1_2: a block is a cube core and two vector cores
};

// Between the unified buffer and global memory. A transfer is one DataCopy or DataCopyPad, however many blocks it has;
// padding is not counted.
struct Moved {
  uint64_t bytes = 0, transfers = 0;
  void operator+=(const Moved& other) {
    bytes += other.bytes;
    transfers += other.transfers;
  }
};

struct Counters {
  std::array<uint64_t, 9> operations{};  // by Pipe (core.h); of the link in adversarial mode
  std::vector<Moved> read;               // by region: by MTE2. A transfer counts where it begins
  std::vector<Moved> written;            // by region: by MTE3
  uint64_t barriers = 0;                 // PipeBarrier
  uint64_t syncs = 0;                    // SyncAll
  uint64_t events = 0;                   // SetFlag, those of queues included
  uint64_t unified_buffer_peak = 0;      // bytes
};

struct Report {
  std::vector<std::string> violations;  // the first of each core; empty: the kernel kept all rules
  bool stopped = false;                 // it has not come to its end: a violation, here or on another rank
  std::vector<Counters> counters;       // by core
};

// Blocks that begin when others have ended are refused: these may wait for them.
//
// Runs `body` once per core, each on a thread of its own; returns when all have ended. With `mix` these are the vector
// cores, two to a block, and behind them the cube cores: so they are numbered in the report. A violation ends its
// core's program, and the other cores where they next synchronise or poll. Any number of runs may be under way in a
// process.
Report run(const Settings& settings, const std::string& kernel, const std::vector<Region>& regions,
           const std::function<void()>& body);

}  // namespace twin
