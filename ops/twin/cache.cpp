// The data cache of a core, which scalar accesses to global memory go through (rule 6): lines of 64 bytes that hold
// what memory held when they were filled, and that are written back whole, neighbours included.
#include "launch.h"

namespace twin {

namespace {

constexpr size_t kLines = 512;

uint8_t* line_begin(const void* address) {
  return reinterpret_cast<uint8_t*>(reinterpret_cast<uintptr_t>(address) / kLine * kLine);
}

// Bytes [begin, begin + bytes) of a line, as bits.
uint64_t bits(uint64_t begin, uint64_t bytes) { return (bytes == kLine ? ~0ull : (1ull << bytes) - 1) << begin; }

// The bytes of a line that belong to `memory`: what lies beside it is not touched.
uint64_t bits_of(const uint8_t* line, const Memory& memory) {
  const uint8_t* begin = std::max<const uint8_t*>(line, memory.begin());
  const uint8_t* end = std::min<const uint8_t*>(line + kLine, memory.end());
  return bits(begin - line, end - begin);
}

// f(begin, bytes) for each run of set bits.
template <typename F>
void runs(uint64_t mask, F&& f) {
  while (mask != 0) {
    const int begin = __builtin_ctzll(mask);
    const uint64_t rest = ~(mask >> begin);
    const int bytes = rest == 0 ? 64 - begin : std::min(64 - begin, __builtin_ctzll(rest));
    f(begin, bytes);
    mask &= ~bits(begin, bytes);
  }
}

}  // namespace

void Core::fill(uint8_t* address, Line* line) {
  BlockLock lock(launch_, line->memory, std::max(address, line->memory->begin()));
  runs(bits_of(address, *line->memory) & ~line->held,
       [&](int begin, int bytes) { std::memcpy(&line->data[begin], address + begin, bytes); });
  line->held |= bits_of(address, *line->memory);
}

void Core::write_back(uint8_t* address, Line* line) {
  if (line->dirty) act();
  BlockLock lock(launch_, line->memory, std::max(address, line->memory->begin()));
  runs(line->held, [&](int begin, int bytes) { std::memcpy(address + begin, &line->data[begin], bytes); });
  runs(line->dirty, [&](int begin, int bytes) { line->memory->mark_written(address + begin, bytes); });
  line->dirty = 0;
  if (line->memory->window() && !pending_[LINK].empty()) let_peers_look();
}

// One line, at any time in adversarial mode; `must`: when the cache is full.
void Core::evict(bool must) {
  if (lines_.empty()) return;
  auto victim = lines_.begin();
  if (!must) std::advance(victim, random() % lines_.size());
  if (victim->second.dirty) write_back(victim->first, &victim->second);
  lines_.erase(victim);
}

Line& Core::line_of(uint8_t* address, Memory* memory) {
  auto found = lines_.find(address);
  if (found == lines_.end()) {
    if (lines_.size() >= kLines) evict(true);
    found = lines_.try_emplace(address).first;
    found->second.memory = memory;
  }
  // A line that lies across two regions holds the bytes of one at a time.
  if (found->second.memory != memory) {
    if (found->second.dirty) write_back(address, &found->second);
    found->second.held = 0;
    found->second.memory = memory;
  }
  if (bits_of(address, *memory) & ~found->second.held) fill(address, &found->second);
  return found->second;
}

// Of a line of a window, bytes that were never invalidated may be those that a launch before has left in the cache.
void Core::check_fresh(uint8_t* line, uint64_t wanted, const void* address, Memory* memory, Site at) {
  if (!memory->window() || all_fresh_) return;
  const auto found = fresh_.find(line);
  if (found != fresh_.end() && (found->second & wanted) == wanted) return;
  fail(at, S,
       "the cache may have the line of " + memory->text(address) +
           " as a launch before has left it: DataCacheCleanAndInvalid is missing");
}

void Core::load(const void* address, void* value, uint32_t bytes, Site at) {
  last_site_ = at;
  check_stopped();
  Memory* memory = memory_of(address, bytes, false, at, S);
  const auto* begin = static_cast<const uint8_t*>(address);
  uint8_t* line_address = line_begin(address);
  if (reinterpret_cast<uintptr_t>(address) % bytes != 0) fail(at, S, memory->text(address) + " is not aligned");
  const uint64_t wanted = bits(begin - line_address, bytes);
  check_fresh(line_address, wanted, address, memory, at);
  if (adversarial_) {
    note(memory, begin, bytes, S, issued_[S], clock_of(S), Kind::read, false, at);
    if (random() % 32 == 0) evict(false);
    tick(true);
  }
  if (adversarial_ && memory->window() && line_address + kLine < memory->end() && random() % 8 == 0)
    line_of(line_address + kLine, memory);
  note_read(address);
  Line& line = line_of(line_address, memory);
  if (memory->written && (line.dirty & wanted) != wanted &&
      std::memchr(&memory->written[begin - memory->begin()], 0, bytes))
    fail(at, S, "reads " + memory->text(address) + ", which has never been written");
  std::memcpy(value, &line.data[begin - line_address], bytes);
}

void Core::store(void* address, const void* value, uint32_t bytes, Site at) {
  last_site_ = at;
  check_stopped();
  idle_ = 0;
  act();
  Memory* memory = memory_of(address, bytes, true, at, S);
  auto* begin = static_cast<uint8_t*>(address);
  uint8_t* line_address = line_begin(address);
  if (reinterpret_cast<uintptr_t>(address) % bytes != 0) fail(at, S, memory->text(address) + " is not aligned");
  check_fresh(line_address, bits_of(line_address, *memory), address, memory, at);
  const uint64_t written = bits(begin - line_address, bytes);
  if (adversarial_) {
    note_line(line_address, memory, written, true, at);
    if (random() % 32 == 0) evict(false);
  }
  Line& line = line_of(line_address, memory);
  std::memcpy(&line.data[begin - line_address], value, bytes);
  line.dirty |= written;
  Unclean& unclean = unclean_[line_address];
  unclean.mask |= written;
  unclean.site = at;
}

void Core::note_line(uint8_t* address, Memory* memory, uint64_t written, bool dirty, Site at) {
  const Clock after = clock_of(S);
  const auto note_runs = [&](uint64_t mask, Kind kind) {
    runs(mask,
         [&](int begin, int bytes) { note(memory, address + begin, bytes, S, issued_[S], after, kind, dirty, at); });
  };
  note_runs(written, Kind::write);
  // The rest of a line is noted when its first byte becomes dirty, and when it is cleaned.
  if (!dirty || !unclean_.contains(address)) note_runs(bits_of(address, *memory) & ~written, Kind::neighbour);
}

// Bytes `mask` of a line: documented is that an address within a line stands for the bytes from there on.
void Core::clean_line(uint8_t* address, uint64_t mask, Site at) {
  fresh_[address] |= mask;
  if (auto found = lines_.find(address); found != lines_.end()) {
    Line& line = found->second;
    Line part = line;
    part.held &= mask;
    part.dirty &= mask;
    if (part.dirty) write_back(address, &part);
    line.held &= ~mask;
    line.dirty &= ~mask;
    if (line.held == 0) lines_.erase(found);
  }
  auto found = unclean_.find(address);
  if (found == unclean_.end() || !(found->second.mask & mask)) return;
  const uint64_t written = found->second.mask & mask;
  Memory* memory = launch_.find(address + __builtin_ctzll(written));
  if (adversarial_) note_line(address, memory, written, false, at);
  found->second.mask &= ~mask;
  if (found->second.mask == 0) unclean_.erase(found);
}

void Core::clean(void* address, bool all, Site at) {
  last_site_ = at;
  if (all) {
    while (!lines_.empty()) clean_line(lines_.begin()->first, ~0ull, at);
    while (!unclean_.empty()) clean_line(unclean_.begin()->first, ~0ull, at);
    all_fresh_ = true;
    relax();
    return;
  }
  memory_of(address, 1, false, at, S);
  uint8_t* line = line_begin(address);
  const uint64_t offset = static_cast<uint8_t*>(address) - line;
  clean_line(line, bits(offset, kLine - offset), at);
  if (polled_ == line) {
    relax();
  } else {
    polled_ = line;
    check_stopped();
    if (adversarial_) tick(true);
  }
}

}  // namespace twin
