// What test_twin.py calls.
#include <cstdio>
#include <cstring>

#include "rules.h"

namespace rules {

World::World() {
  for (uint32_t i = 0; i < kFloats; ++i) in[i] = static_cast<float>(i);
}

std::vector<Rule>& all() {
  static std::vector<Rule> rules;
  return rules;
}

}  // namespace rules

namespace {

std::vector<twin::Region> regions_of(rules::World& w) {
  return {{w.in.data(), sizeof(w.in), "in", true, -1, false},
          {w.out.data(), sizeof(w.out), "out", false, -1, true},
          {w.work.data(), sizeof(w.work), "work", true, -1, true},
          {w.windows[0].data(), sizeof(w.windows[0]), "window of rank 0", true, 0, true},
          {w.windows[1].data(), sizeof(w.windows[1]), "window of rank 1", true, 1, true},
          {w.sync.data(), sizeof(w.sync), "sync", true, -1, true}};
}

twin::Settings settings_of(const rules::Case& expected, int arch, bool adversarial, uint64_t seed) {
  const uint64_t unified_buffer = arch == 2201 ? 192 * 1024 - 256 : 248 * 1024;
  const uint64_t clock_hz = arch == 2201 ? 50'000'000 : 1'000'000'000;
  const bool mix = expected.mix || expected.cube;
  const int launched = mix ? 2 * expected.cores : expected.cores;
  const int vector_cores = expected.vector_cores != 0 ? expected.vector_cores : launched;
  twin::Settings settings{arch,           expected.cores, adversarial,  seed,
                          unified_buffer, clock_hz,       vector_cores, expected.together};
  settings.mix = mix;
  return settings;
}

twin::Report launch(const rules::Rule& rule, rules::World& w, const twin::Settings& settings) {
  return twin::run(settings, rule.name, regions_of(w), [&] {
    if (!rule.expected.cube || twin::Core::current().is_cube()) rule.kernel(w);
  });
}

thread_local std::string text;

}  // namespace

extern "C" {

int twin_rules() { return static_cast<int>(rules::all().size()); }

// name, arch, whether in fast mode, cores, seen, breaks...; separated by newlines
const char* twin_rule(int index) {
  const rules::Rule& rule = rules::all()[index];
  text = rule.name + "\n" + std::to_string(rule.expected.arch) + "\n" + std::to_string(rule.expected.fast) + "\n" +
         std::to_string(rule.expected.seen);
  for (const std::string& part : rule.expected.breaks) text += "\n" + part;
  return text.c_str();
}

// caught line, other line, seen, result, violations...; separated by newlines
const char* twin_run_rule(int index, int arch, bool adversarial, uint64_t seed) {
  const rules::Rule& rule = rules::all()[index];
  auto w = std::make_unique<rules::World>();
  const twin::Settings settings = settings_of(rule.expected, arch, adversarial, seed);
  twin::Report report;
  for (; w->launch < rule.expected.launches; ++w->launch) report = launch(rule, *w, settings);
  const bool result = rule.expected.result == nullptr || !report.violations.empty() || rule.expected.result(*w);
  text = std::to_string(w->caught) + "\n" + std::to_string(w->other) + "\n" + std::to_string(w->seen) + "\n" +
         std::to_string(result);
  for (const std::string& violation : report.violations) text += "\n" + violation;
  return text.c_str();
}

// What a core has done in the rule's kernel: operations of V, MTE2 and MTE3, PipeBarrier, SyncAll, SetFlag, the peak of
// the unified buffer; then for every region bytes and transfers read, bytes and transfers written.
void twin_count(int index, int arch, bool adversarial, int core, uint64_t* counts) {
  const rules::Rule& rule = rules::all()[index];
  auto w = std::make_unique<rules::World>();
  const twin::Report report = launch(rule, *w, settings_of(rule.expected, arch, adversarial, 0));
  const twin::Counters& counters = report.counters[core];
  std::vector<uint64_t> found = {counters.operations[1],      counters.operations[2], counters.operations[3],
                                 counters.barriers,           counters.syncs,         counters.events,
                                 counters.unified_buffer_peak};
  for (size_t i = 0; i < counters.read.size(); ++i) {
    found.insert(found.end(), {counters.read[i].bytes, counters.read[i].transfers});
    found.insert(found.end(), {counters.written[i].bytes, counters.written[i].transfers});
  }
  std::copy(found.begin(), found.end(), counts);
}

// Casts `count` elements of 16-bit or 32-bit types; by name as in the twin's headers.
void twin_cast(const char* from, const char* to, int mode, const void* source, void* destination, int count) {
  using namespace twin;
  const auto rounding = static_cast<RoundMode>(mode);
  const auto cast = [&]<typename From, typename To>(const char* from_name, const char* to_name, From, To) {
    if (std::strcmp(from, from_name) || std::strcmp(to, to_name)) return;
    for (int i = 0; i < count; ++i)
      static_cast<To*>(destination)[i] = convert<To>(static_cast<const From*>(source)[i], rounding);
  };
  cast("float", "half", float{}, half{});
  cast("float", "bfloat16", float{}, bfloat16_t{});
  cast("half", "float", half{}, float{});
  cast("bfloat16", "float", bfloat16_t{}, float{});
  cast("half", "int8", half{}, int8_t{});
  cast("float", "int32", float{}, int32_t{});
  cast("int32", "float", int32_t{}, float{});
}
}
