// Cube cores: how Mmad and Fixpipe follow each other, and their transfers (rules 11 and 12).
#include "launch.h"

namespace twin {

template <typename F>
void Core::by_unit(Span c, F&& f) {
  units_.resize(spaces_[L0C].bytes / kUnit);
  for (uint64_t unit = c.begin / kUnit; unit * kUnit < uint64_t{c.begin} + c.bytes; ++unit) f(units_[unit]);
}

void Core::tell(Unit& unit, bool full, Pipe pipe, Site at) {
  unit.full = full;
  unit.told[pipe] = issued_[pipe] + 1;
  unit.site = at;
}

Clock Core::begin_mmad(Span c, int unit_flag, bool in_order, Site at) {
  Clock after;
  if (in_order) after[M] = issued_[M];
  if (unit_flag == 0) return after;
  by_unit(c, [&](Unit& unit) {
    if (unit.full)
      fail(at, M, "unitFlag: it waits for ever for a Fixpipe of what the Mmad at " + unit.site.text() + " has done");
    after.join(unit.told);
    if (unit_flag == 3) tell(unit, true, M, at);
  });
  return after;
}

Clock Core::begin_fixpipe(Span c, int unit_flag, Site at) {
  Clock after;
  if (unit_flag == 0) return after;
  by_unit(c, [&](Unit& unit) {
    if (!unit.full) fail(at, FIX, "unitFlag: it waits for ever for an Mmad of the same part of L0C with unitFlag 3");
    after.join(unit.told);
    if (unit_flag == 3) tell(unit, false, FIX, at);
  });
  return after;
}

void Core::check_fractals(std::vector<uint32_t>& begins, uint32_t bytes, Site at, Pipe pipe) {
  std::sort(begins.begin(), begins.end());
  for (size_t i = 1; i < begins.size(); ++i)
    if (begins[i] - begins[i - 1] < bytes) fail(at, pipe, "what it writes overlaps itself, in no defined order");
}

void Core::transfer_pieces(const std::vector<Segment>& whole, Site at) {
  last_site_ = at;
  count_transfer(MTE2, whole);
  if (!adversarial_) {
    ++counters_.operations[MTE2];
    for (const Segment& segment : segments_) move_in(segment, at);
    return;
  }
  const Clock after = clock_of(MTE2);
  for (const Segment& segment : whole)
    note(segment.memory, segment.gm, segment.bytes, MTE2, issued_[MTE2] + 1, after, Kind::read, false, at);
  // Neighbouring pieces of L1 as one.
  std::vector<std::pair<uint32_t, uint32_t>> parts;
  for (const Segment& segment : segments_) parts.emplace_back(segment.ub, segment.bytes);
  std::sort(parts.begin(), parts.end());
  for (size_t i = 0; i < parts.size();) {
    const uint32_t begin = parts[i].first;
    uint32_t end = begin;
    for (; i < parts.size() && parts[i].first == end; ++i) end += parts[i].second;
    note(L1, begin, end - begin, MTE2, issued_[MTE2] + 1, after, Kind::write, at);
  }
  queue_operation(MTE2, at, after, 1, [this, at, segments = segments_](uint32_t) {
    for (const Segment& segment : segments) move_in(segment, at);
  });
  tick(false);
}

void Core::write_rows(const Clock& more, Site at, const std::vector<Use>& uses,
                      std::function<void(std::vector<uint8_t>&)> effect) {
  last_site_ = at;
  for (const Use& use : uses) check_span(use.span, use.alignment, at, FIX);
  check_atomic(FIX, at);
  uint64_t bytes = 0;
  for (const Segment& segment : segments_) {
    bytes += segment.bytes;
    if (segment.memory->window()) fail(at, FIX, "the twin has no Fixpipe to a window");
  }
  count_transfer(FIX, segments_);
  const auto execute = [this, bytes, effect = std::move(effect), segments = segments_, atomic = atomic_](uint32_t) {
    std::vector<uint8_t> rows(bytes);
    effect(rows);
    const uint8_t* from = rows.data();
    for (const Segment& segment : segments) {
      deliver(segment, atomic, from);
      from += segment.bytes;
    }
  };
  if (!adversarial_) {
    ++counters_.operations[FIX];
    return execute(0);
  }
  Clock after = clock_of(FIX);
  after.join(more);
  const uint64_t number = issued_[FIX] + 1;
  for (const Use& use : uses) note(use.span.space, use.span.begin, use.span.bytes, FIX, number, after, Kind::read, at);
  for (const Segment& segment : segments_)
    note(segment.memory, segment.gm, segment.bytes, FIX, number, after, atomic_ ? Kind::atomic : Kind::write, false,
         at);
  queue_operation(FIX, at, after, 1, execute);
  tick(false);
}

}  // namespace twin
