#include "report.h"

#include <algorithm>

#include "error.h"

namespace twin::kernels {
namespace {

using deep_ep::str;

// Of a core, or of all: sums, and the highest peak.
struct Work {
  Moved mte2, mte3;
  uint64_t unified_buffer_peak = 0, barriers = 0, syncs = 0, events = 0;

  void add(const Counters& counters) {
    for (const Moved& moved : counters.read) mte2 += moved;
    for (const Moved& moved : counters.written) mte3 += moved;
    unified_buffer_peak = std::max(unified_buffer_peak, counters.unified_buffer_peak);
    barriers += counters.barriers;
    syncs += counters.syncs;
    events += counters.events;
  }
};

std::string text(const Moved& moved) {
  return str("{\"bytes\": ", moved.bytes, ", \"transfers\": ", moved.transfers, '}');
}

std::string text(const Work& work) {
  return str("{\"mte2\": ", text(work.mte2), ", \"mte3\": ", text(work.mte3),
             ", \"unified_buffer_peak\": ", work.unified_buffer_peak, ", \"barriers\": ", work.barriers,
             ", \"syncs\": ", work.syncs, ", \"events\": ", work.events, '}');
}

// What all cores have moved from or to parts [first, last] of a rank's window.
Moved moved(const Report& report, std::vector<Moved> Counters::* way, int rank, int first, int last) {
  Moved sum;
  for (const Counters& counters : report.counters)
    for (int part = first; part <= last && !(counters.*way).empty(); ++part)
      sum += (counters.*way)[rank * Windows::kParts + part];
  return sum;
}

}  // namespace

std::string joined(const std::deque<std::string>& values) {
  std::string text;
  for (const std::string& value : values) text += (text.empty() ? "" : ", ") + value;
  return text;
}

std::string describe(const std::string& op, const Settings& settings, const Windows* windows, const Report& report) {
  std::deque<std::string> links, cores;
  for (int rank = 0; windows && rank < windows->size(); ++rank) {
    if (rank == windows->rank()) continue;
    const auto part = [&](std::vector<Moved> Counters::* way, int first, int last) {
      return text(moved(report, way, rank, first, last));
    };
    links.push_back(str("{\"peer\": ", rank, ", \"read\": ", part(&Counters::read, 0, Windows::kSlots),
                        ", \"written\": ", part(&Counters::written, 0, Windows::kSlots),
                        ", \"flags\": ", part(&Counters::written, Windows::kFlags, Windows::kFlags), '}'));
  }
  Work total;
  for (const Counters& counters : report.counters) {
    Work of_core;
    of_core.add(counters);
    total.add(counters);
    cores.push_back(text(of_core));
  }
  return str("{\"op\": \"", op, "\", \"rank\": ", windows ? windows->rank() : 0, ", \"arch\": ", settings.arch,
             ", \"completed\": ", report.stopped ? "false" : "true", ", \"links\": [", joined(links),
             "], \"total\": ", text(total), ", \"cores\": [", joined(cores), "]}");
}

}  // namespace twin::kernels
