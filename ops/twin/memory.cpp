// Bytes: the unified buffer, global memory, transfers between them, and who has touched what.
#include <cstdio>

#include "launch.h"

namespace twin {

namespace {

std::string hex(uint64_t value) {
  char text[20];
  std::snprintf(text, sizeof(text), "0x%llx", static_cast<unsigned long long>(value));
  return text;
}

std::string text_of(SpaceId space, uint64_t begin, uint64_t bytes) {
  return std::string(kSpaceNames[space]) + " " + hex(begin) + ".." + hex(begin + bytes);
}

constexpr const char* verb(Kind kind) {
  return kind == Kind::read ? "reads" : kind == Kind::write ? "writes" : kind == Kind::atomic ? "adds to" : "rewrites";
}

constexpr bool conflict(Kind a, Kind b) {
  if (a == Kind::write || b == Kind::write) return true;
  if (a == b) return false;
  return a == Kind::atomic || b == Kind::atomic;  // rule 7; a neighbour and a read do not harm each other
}

}  // namespace

std::string Memory::text(const void* address) const {
  return region.name + "+" + hex(static_cast<const uint8_t*>(address) - begin());
}

template <class Ordered>
const Access* Page::add(const Access& access, Ordered&& ordered) {
  for (size_t i = accesses_.size(); i-- > 0;) {
    Access& earlier = accesses_[i];
    if (earlier.end <= access.begin || access.end <= earlier.begin) continue;
    const bool same_pipe = earlier.core == access.core && earlier.pipe == access.pipe;
    if (earlier.dirty && !same_pipe) {
      if (conflict(earlier.kind, access.kind)) return &earlier;
      continue;
    }
    const bool known = ordered(earlier);
    if (!known && conflict(earlier.kind, access.kind)) return &earlier;
    // What conflicts with `earlier` and follows it unseen will be found to conflict with `access`.
    const bool replaces = access.kind == Kind::write ? known : access.kind == earlier.kind && (known || same_pipe);
    if (!replaces) continue;
    Access tail = earlier;
    tail.begin = access.end;
    earlier.end = std::min(earlier.end, access.begin);
    if (earlier.begin >= earlier.end) {
      earlier = accesses_.back();
      accesses_.pop_back();
    }
    if (tail.begin < tail.end) accesses_.push_back(tail);
  }
  for (Access& earlier : accesses_) {
    const bool same = earlier.core == access.core && earlier.pipe == access.pipe && earlier.kind == access.kind &&
                      earlier.dirty == access.dirty && earlier.number == access.number &&
                      earlier.site.line == access.site.line;
    if (!same || earlier.end != access.begin) continue;
    earlier.end = access.end;
    return nullptr;
  }
  accesses_.push_back(access);
  return nullptr;
}

// ---- Checks.

void Core::check_span(Span span, uint32_t alignment, Site at, Pipe pipe) {
  const uint64_t end = uint64_t{span.begin} + span.bytes;
  const Space& space = spaces_[span.space];
  const auto text = [&] { return text_of(span.space, span.begin, span.bytes); };
  if (end > space.bytes) fail(at, pipe, "accesses " + text() + ", which has " + hex(space.bytes) + " bytes");
  if (end > span.limit) fail(at, pipe, "accesses " + text() + ", beyond its buffer, which ends at " + hex(span.limit));
  if (span.begin % alignment != 0)
    fail(at, pipe, text() + " is not aligned to " + std::to_string(alignment) + " bytes");
}

void Core::check_written(SpaceId space, uint32_t begin, uint32_t bytes, Site at, Pipe pipe) {
  const std::vector<uint8_t>& written = spaces_[space].written;
  const void* hole = std::memchr(written.data() + begin, 0, bytes);
  if (hole == nullptr) return;
  const uint64_t byte = static_cast<const uint8_t*>(hole) - written.data();
  fail(at, pipe, "reads " + text_of(space, begin, bytes) + ", whose byte " + hex(byte) + " has never been written");
}

Memory* Core::memory_of(const void* address, uint64_t bytes, bool write, Site at, Pipe pipe) {
  const auto* begin = static_cast<const uint8_t*>(address);
  if (last_memory_ == nullptr || begin < last_memory_->begin() || begin >= last_memory_->end())
    last_memory_ = launch_.find(address);
  const std::string what = write ? "writes " : "reads ";
  if (last_memory_ == nullptr)
    fail(at, pipe, what + "global memory " + hex(reinterpret_cast<uintptr_t>(address)) + ", which is in no region");
  const Memory& memory = *last_memory_;
  if (bytes > static_cast<uint64_t>(memory.end() - begin))
    fail(at, pipe,
         what + memory.text(address) + ".." + hex(begin - memory.begin() + bytes) + ", which has " +
             hex(memory.region.bytes) + " bytes");
  if (write && !memory.region.writable) fail(at, pipe, "writes " + memory.text(address) + ", which is read only");
  return last_memory_;
}

bool Core::ordered(const Access& earlier, const Access& access, const Clock& after) const {
  if (earlier.core != index_) {
    const SharedKnown& alone = known_alone_[access.pipe];
    return (*known_)[earlier.core][earlier.pipe] >= earlier.number ||
           (alone && (*alone)[earlier.core][earlier.pipe] >= earlier.number);
  }
  if (earlier.pipe == access.pipe && (earlier.pipe == S || earlier.number == access.number)) return true;
  return after[earlier.pipe] >= earlier.number;
}

void Core::fail_race(Site at, const Access& access, const Access& earlier, const std::string& where) {
  std::string text = std::string(verb(access.kind)) + " " + where + ", which ";
  if (earlier.core != index_) text += launch_.name_of(earlier.core) + "'s ";
  text += std::string(kPipeNames[earlier.pipe]) + " " + verb(earlier.kind) + " at " + earlier.site.text();
  text += earlier.dirty ? " and has not cleaned out of its data cache" : ": nothing orders the two";
  fail(at, access.pipe, text);
}

void Core::note(SpaceId space, uint32_t begin, uint32_t bytes, Pipe pipe, uint64_t number, const Clock& after,
                Kind kind, Site at) {
  const uint64_t end = uint64_t{begin} + bytes;
  for (uint64_t from = begin; from < end;) {
    const uint64_t page = from / Page::kBytes, to = std::min(end, (page + 1) * Page::kBytes);
    const Access access{static_cast<uint16_t>(from - page * Page::kBytes),
                        static_cast<uint16_t>(to - page * Page::kBytes),
                        pipe,
                        kind,
                        false,
                        index_,
                        number,
                        at};
    const auto is_ordered = [&](const Access& e) { return ordered(e, access, after); };
    const Access* earlier = spaces_[space].pages[page].add(access, is_ordered);
    if (earlier) fail_race(at, access, *earlier, text_of(space, from, to - from));
    from = to;
  }
}

// Between the ranks and cores that use a window flags order accesses, which the adversary tries instead: in windows a
// core is compared with itself only.
void Core::note(Memory* memory, const uint8_t* address, uint64_t bytes, Pipe pipe, uint64_t number, const Clock& after,
                Kind kind, bool dirty, Site at) {
  const auto begin = reinterpret_cast<uintptr_t>(address);
  const uint64_t end = begin + bytes, own = memory->window() ? (index_ + 1ull) << 56 : 0;
  for (uint64_t from = begin; from < end;) {
    const uint64_t page = from / Page::kBytes, to = std::min(end, (page + 1) * Page::kBytes);
    const Access access{static_cast<uint16_t>(from - page * Page::kBytes),
                        static_cast<uint16_t>(to - page * Page::kBytes),
                        pipe,
                        kind,
                        dirty,
                        index_,
                        number,
                        at};
    Access found{};
    launch_.accesses.with_page(page | own, [&](Page& accesses) {
      const Access* earlier = accesses.add(access, [&](const Access& e) { return ordered(e, access, after); });
      if (earlier) found = *earlier;
    });
    if (found.end) fail_race(at, access, found, memory->text(reinterpret_cast<void*>(from)));
    from = to;
  }
}

void Core::scalar(Span span, bool write, Site at) {
  last_site_ = at;
  if (span.space != UB) fail(at, S, std::string("S has no way to ") + kSpaceNames[span.space]);
  check_span(span, span.bytes, at, S);
  if (adversarial_) note(UB, span.begin, span.bytes, S, issued_[S], clock_of(S), write ? Kind::write : Kind::read, at);
  if (write)
    std::memset(written(UB, span.begin), 1, span.bytes);
  else
    check_written(UB, span.begin, span.bytes, at, S);
}

// ---- Transfers.

void Core::check_atomic(Pipe pipe, Site at) {
  if (!atomic_) return;
  for (const Segment& segment : segments_)
    if (segment.bytes % atomic_element_ != 0 || reinterpret_cast<uintptr_t>(segment.gm) % atomic_element_ != 0)
      fail(at, pipe, "an atomic on part of an element: " + segment.memory->text(segment.gm));
}

void Core::count_transfer(Pipe pipe, const std::vector<Segment>& segments) {
  if (pipe == MTE2) {
    for (const Segment& segment : segments) note_read(segment.gm);
    polled_ = segments[0].gm;
  } else {
    idle_ = 0;
    act();
  }
  std::vector<Moved>& moved = pipe == MTE2 ? counters_.read : counters_.written;
  ++moved[segments[0].memory->index].transfers;
  for (const Segment& segment : segments)
    if (segment.source == Segment::copy) moved[segment.memory->index].bytes += segment.bytes;
}

void Core::transfer(Pipe pipe, Site at) {
  last_site_ = at;
  if (segments_.empty()) return;
  if (pipe != MTE2) check_atomic(pipe, at);
  const bool polling = pipe == MTE2 && polled_ == segments_[0].gm;
  count_transfer(pipe, segments_);
  if (!adversarial_) {
    ++counters_.operations[pipe];
    for (const Segment& segment : segments_) pipe == MTE2 ? move_in(segment, at) : move_out(segment, atomic_, at);
  } else if (pipe == MTE2) {
    read_later(at);
  } else if (segments_[0].memory->window()) {
    send_later(at);
  } else {
    write_later(at);
  }
  if (polling)
    relax();
  else if (adversarial_)
    tick(false);
}

void Core::read_later(Site at) {
  const Clock after = clock_of(MTE2);
  const uint64_t number = issued_[MTE2] + 1;
  for (const Segment& segment : segments_) {
    note(segment.space, segment.ub, segment.bytes, MTE2, number, after, Kind::write, at);
    const uint64_t read = segment.source == Segment::copy ? segment.bytes : 0;
    if (read) note(segment.memory, segment.gm, read, MTE2, number, after, Kind::read, false, at);
  }
  if (segments_[0].memory->window()) split_segments();
  const auto pieces = static_cast<uint32_t>(segments_.size());
  queue_operation(MTE2, at, after, pieces, [this, at, segments = segments_](uint32_t i) { move_in(segments[i], at); });
}

void Core::write_later(Site at) {
  const Clock after = clock_of(MTE3);
  const uint64_t number = issued_[MTE3] + 1;
  const Kind kind = atomic_ ? Kind::atomic : Kind::write;
  for (const Segment& segment : segments_) {
    note(segment.space, segment.ub, segment.bytes, MTE3, number, after, Kind::read, at);
    note(segment.memory, segment.gm, segment.bytes, MTE3, number, after, kind, false, at);
  }
  const auto pieces = static_cast<uint32_t>(segments_.size());
  queue_operation(MTE3, at, after, pieces, [this, at, segments = segments_, atomic = atomic_](uint32_t i) {
    move_out(segments[i], atomic, at);
  });
}

// Rule 8: MTE3 reads the unified buffer, and the link delivers what it has read, block by block.
void Core::send_later(Site at) {
  const Clock after = clock_of(MTE3);
  const uint64_t number = issued_[MTE3] + 1, link_number = issued_[LINK] + 1;
  const Kind kind = atomic_ ? Kind::atomic : Kind::write;
  for (const Segment& segment : segments_) {
    note(segment.space, segment.ub, segment.bytes, MTE3, number, after, Kind::read, at);
    note(segment.memory, segment.gm, segment.bytes, LINK, link_number, after, kind, false, at);
  }
  split_segments();
  uint64_t total = 0;
  for (const Segment& segment : segments_) total += segment.bytes;
  const auto data = std::make_shared<std::vector<uint8_t>>(total);
  auto places = std::make_shared<std::vector<uint64_t>>();  // of segments in data
  total = 0;
  for (const Segment& segment : segments_) {
    places->push_back(total);
    total += segment.bytes;
  }
  Operation& link = queue_operation(LINK, at, after, static_cast<uint32_t>(segments_.size()),
                                    [this, data, places, segments = segments_, atomic = atomic_](uint32_t i) {
                                      deliver(segments[i], atomic, data->data() + (*places)[i]);
                                    });
  link.ready = false;
  queue_operation(MTE3, at, after, 1, [this, at, data, places, segments = segments_, link = &link](uint32_t) {
    for (size_t i = 0; i < segments.size(); ++i) {
      check_written(segments[i].space, segments[i].ub, segments[i].bytes, at, MTE3);
      std::memcpy(data->data() + (*places)[i], memory(segments[i].space, segments[i].ub), segments[i].bytes);
    }
    link->ready = true;
  });
}

// Into parts of aligned blocks.
void Core::split_segments() {
  std::vector<Segment> parts;
  for (Segment segment : segments_) {
    if (segment.source != Segment::copy) {
      parts.push_back(segment);
      continue;
    }
    while (segment.bytes > 0) {
      Segment part = segment;
      const uint64_t room = kLinkBlock - reinterpret_cast<uintptr_t>(segment.gm) % kLinkBlock;
      part.bytes = static_cast<uint32_t>(std::min<uint64_t>(room, segment.bytes));
      parts.push_back(part);
      segment.gm += part.bytes;
      segment.ub += part.bytes;
      segment.bytes -= part.bytes;
    }
  }
  segments_ = std::move(parts);
}

namespace {

// f(gm, offset, bytes) for the parts of aligned blocks of a window, or for all of it.
template <typename F>
void by_block(const Segment& segment, F&& f) {
  for (uint32_t done = 0; done < segment.bytes;) {
    uint8_t* gm = segment.gm + done;
    const uint64_t room = kLinkBlock - reinterpret_cast<uintptr_t>(gm) % kLinkBlock;
    const uint64_t left = segment.bytes - done;
    const auto bytes = static_cast<uint32_t>(segment.memory->window() ? std::min(room, left) : left);
    f(gm, done, bytes);
    done += bytes;
  }
}

void repeat(uint8_t* to, uint32_t bytes, const void* element, uint32_t element_bytes) {
  for (uint32_t i = 0; i < bytes; ++i) to[i] = static_cast<const uint8_t*>(element)[i % element_bytes];
}

}  // namespace

void Core::move_in(const Segment& segment, Site at) {
  uint8_t* to = memory(segment.space, segment.ub);
  if (segment.source == Segment::copy) {
    if (const Memory& memory = *segment.memory; memory.written) {
      const uint64_t offset = segment.gm - memory.begin();
      const void* hole = std::memchr(&memory.written[offset], 0, segment.bytes);
      if (hole)
        fail(at, MTE2,
             "reads " + memory.text(segment.gm) + ", whose byte " +
                 hex(static_cast<const uint8_t*>(hole) - memory.written.get()) + " has never been written");
    }
    by_block(segment, [&](const uint8_t* gm, uint32_t offset, uint32_t bytes) {
      BlockLock lock(launch_, segment.memory, gm);
      std::memcpy(to + offset, gm, bytes);
    });
  } else if (segment.source == Segment::repeat) {
    repeat(to, segment.bytes, segment.gm, segment.element);
  } else if (segment.source == Segment::value) {
    repeat(to, segment.bytes, &segment.pad, segment.element);
  } else {
    for (uint32_t i = 0; i < segment.bytes; ++i) to[i] = static_cast<uint8_t>(random());
  }
  std::memset(written(segment.space, segment.ub), segment.source != Segment::garbage, segment.bytes);
}

void Core::move_out(const Segment& segment, AtomicFunction atomic, Site at) {
  check_written(segment.space, segment.ub, segment.bytes, at, MTE3);
  deliver(segment, atomic, memory(segment.space, segment.ub));
}

void Core::deliver(const Segment& segment, AtomicFunction atomic, const uint8_t* from) {
  by_block(segment, [&](uint8_t* gm, uint32_t offset, uint32_t bytes) {
    BlockLock lock(launch_, segment.memory, gm);
    if (atomic)
      atomic(gm, from + offset, bytes);
    else
      std::memcpy(gm, from + offset, bytes);
  });
  segment.memory->mark_written(segment.gm, segment.bytes);
}

}  // namespace twin
