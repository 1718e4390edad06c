// The interface of ops/kernels.h on the twin. A launch is prepared by the definition of its operator, as
// CANN does it, and run with the cores of this process.
#include <dlfcn.h>

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <deque>
#include <map>
#include <memory>
#include <mutex>

#include "error.h"
#include "ops/kernel_library.h"
#include "register/op_def_registry.h"
#include "registry.h"
#include "report.h"
#include "twin.h"
#include "windows.h"

namespace twin::kernels {

std::vector<Kernel>& all() {
  static std::vector<Kernel> kernels;
  return kernels;
}

namespace {

using deep_ep::definition_name;
using deep_ep::Error;
using deep_ep::guarded;
using deep_ep::str;
using deep_ep::WindowMap;

struct Arch {
  uint64_t unified_buffer_bytes, clock_hz;
};

// What a kernel may use of a core's unified buffer, and the clock of GetSystemCycle.
Arch facts_of(int arch) {
  return arch == 3510 ? Arch{248 << 10, 1'000'000'000} : Arch{(192 << 10) - 256 - 8192, 50'000'000};
}

constexpr size_t kMostReports = 1000;
constexpr uint64_t kShapeBytes = 9 * 8;  // of an output whose shape depends on the computation

struct State {
  std::mutex mutex;
  Settings settings{2201, 0, false, 0, facts_of(2201).unified_buffer_bytes, facts_of(2201).clock_hz, 8, false};
  std::map<std::string, std::shared_ptr<Windows>> windows;  // by group
  std::vector<std::string> violations;
  std::deque<std::string> reports;  // of the newest launches
};

State& state() {
  static State& instance = *new State;
  return instance;
}

// The column of the op's definition that has these tensors.
const Kernel& find(const std::string& op, const gert::Node& node) {
  const auto is_as = [](const Kernel& kernel, const std::vector<gert::Tensor>& tensors, size_t first) {
    for (size_t i = 0; i < tensors.size(); ++i)
      if (kernel.dtypes[first + i] != tensors[i].GetDataType()) return false;
    return true;
  };
  for (const Kernel& kernel : all())
    if (kernel.op == op && is_as(kernel, node.inputs, 0) && is_as(kernel, node.outputs, node.inputs.size()))
      return kernel;
  throw Error(str("the definition of ", node.type, " has no column with the dtypes of this call"));
}

uint64_t bytes_of(const DeepEpTensor& tensor) {
  uint64_t bytes = tensor.dtype == ge::DT_INT64                                    ? 8
                   : tensor.dtype == ge::DT_FLOAT16 || tensor.dtype == ge::DT_BF16 ? 2
                   : tensor.dtype == ge::DT_INT8 || tensor.dtype == ge::DT_UINT8   ? 1
                                                                                   : 4;
  for (int32_t i = 0; i < tensor.num_dims; ++i) bytes *= static_cast<uint64_t>(tensor.sizes[i]);
  return bytes;
}

gert::Tensor describe(const DeepEpTensor& tensor) {
  gert::Shape shape;
  for (int32_t i = 0; i < tensor.num_dims; ++i) shape.AppendDim(tensor.sizes[i]);
  return {shape, static_cast<ge::DataType>(tensor.dtype), {}};
}

struct Plan {
  const Kernel* kernel = nullptr;
  std::string group;
  std::vector<uint8_t*> arguments;  // without workspace and tiling
  std::vector<Region> regions;      // of the arguments
  int64_t value = 0;                // of the input that is a number
  std::vector<uint64_t> tiling;
  uint64_t workspace_bytes = 0;
  Settings settings{};
  uint8_t* workspace = nullptr;

  void add(const DeepEpTensor& tensor, const char* name, bool is_output) {
    arguments.push_back(static_cast<uint8_t*>(tensor.data));
    if (bytes_of(tensor) > 0) regions.push_back({tensor.data, bytes_of(tensor), name, !is_output, -1, is_output});
  }
};

std::unique_ptr<Plan> plan(const DeepEpCall& call) {
  if (std::none_of(all().begin(), all().end(), [&](const Kernel& kernel) { return kernel.op == call.op; }))
    throw Error("there is no AscendC kernel for this op yet; the strategy alltoall needs none");
  ops::OpDef& definition = ops::OpDefFactory::definitions().at(definition_name(call.op));
  auto plan = std::make_unique<Plan>();
  plan->group = call.group;
  {
    std::lock_guard lock(state().mutex);
    plan->settings = state().settings;
  }

  gert::Node node{definition_name(call.op), {}, {}, {}};
  int32_t given = 0, num_integers = call.num_integers;
  for (const ops::OpParamDef& input : definition.inputs()) {
    const bool is_number = input.value_depend() != ops::IGNORE;
    if (is_number) plan->value = call.integers[--num_integers];
    if (!is_number && given == call.num_inputs) throw Error(str(call.op, " needs more inputs than ", given));
    const DeepEpTensor tensor = is_number ? DeepEpTensor{&plan->value, ge::DT_INT64, 0, {}} : call.inputs[given++];
    node.inputs.push_back(describe(tensor));
    plan->add(tensor, input.name().c_str(), false);
  }
  // Where a shape depends on the computation, one more output tells those of all outputs.
  const auto& outputs = definition.outputs();
  const bool has_shapes = std::any_of(outputs.begin(), outputs.end(),
                                      [](const ops::OpParamDef& output) { return output.shape_depends_on_compute(); });
  const auto num_outputs = static_cast<int32_t>(outputs.size());
  if (given != call.num_inputs || call.num_outputs != num_outputs + has_shapes)
    throw Error(str(call.op, " has ", given, " inputs and ", num_outputs + has_shapes, " outputs, got ",
                    call.num_inputs, " and ", call.num_outputs));
  for (int32_t i = 0; i < num_outputs; ++i) {
    node.outputs.push_back(describe(call.outputs[i]));
    plan->add(call.outputs[i], outputs[i].name().c_str(), true);
  }
  if (has_shapes) {
    const DeepEpTensor& shapes = call.outputs[num_outputs];
    if (bytes_of(shapes) != static_cast<uint64_t>(num_outputs) * kShapeBytes)
      throw Error(
          str("the shapes of ", call.op, " need ", num_outputs * kShapeBytes, " bytes, got ", bytes_of(shapes)));
    plan->add(shapes, "shapes", true);
  }
  plan->kernel = &find(call.op, node);
  if (!plan->group.empty()) node.attrs.values().emplace_back(plan->group);
  for (int32_t i = 0; i < num_integers; ++i) node.attrs.values().emplace_back(call.integers[i]);

  fe::PlatFormInfos platform{static_cast<uint32_t>(plan->settings.vector_cores), plan->settings.unified_buffer_bytes};
  gert::TilingContext context(&node, &platform);
  if (definition.AICore().GetTiling()(&context) != ge::GRAPH_SUCCESS)
    throw Error(str("the tiling of ", node.type, " refuses the call; the message above says why"));
  plan->tiling.resize((context.tiling_bytes + 7) / 8);
  std::memcpy(plan->tiling.data(), context.tiling, context.tiling_bytes);
  plan->workspace_bytes = context.workspaces[0];
  plan->settings.cores = static_cast<int>(context.block_dim);
  plan->settings.together = context.schedule_mode == 1;
  return plan;
}

const int32_t* status_of(const uint8_t* window) {
  return reinterpret_cast<const int32_t*>(window + WindowMap::status());
}

Report execute(Plan& plan) {
  std::shared_ptr<Windows> windows;
  if (!plan.group.empty()) {
    std::lock_guard lock(state().mutex);
    const auto found = state().windows.find(plan.group);
    if (found == state().windows.end()) throw Error(str("the windows of group ", plan.group, " have been closed"));
    windows = found->second;
  }
  std::vector<Region> regions;
  if (windows) regions = windows->regions();  // first, as `describe` has them
  regions.insert(regions.end(), plan.regions.begin(), plan.regions.end());
  regions.push_back({plan.workspace + kSystemWorkspaceBytes, plan.workspace_bytes - kSystemWorkspaceBytes, "workspace",
                     false, -1, true});
  regions.push_back({plan.tiling.data(), plan.tiling.size() * sizeof(uint64_t), "tiling", true, -1, false});
  const Group group = windows ? windows->group() : Group{};
  if (windows) plan.settings.group = &group;

  std::vector<uint8_t*> arguments = plan.arguments;
  arguments.push_back(plan.workspace);
  arguments.push_back(reinterpret_cast<uint8_t*>(plan.tiling.data()));
  Report report = run(plan.settings, plan.kernel->op, regions, [&] { plan.kernel->call(arguments.data()); });

  // A rank whose launch has failed sends nothing any more.
  if (windows && status_of(windows->window(windows->rank()))[deep_ep::kFailure] != 0) leave(group);

  std::lock_guard lock(state().mutex);
  state().reports.push_back(describe(plan.kernel->op, plan.settings, windows.get(), report));
  if (state().reports.size() > kMostReports) state().reports.pop_front();
  for (std::string& violation : report.violations) {
    if (windows) violation = str("rank ", windows->rank(), ": ", violation);
    std::fprintf(stderr, "%s\n", violation.c_str());
    state().violations.push_back(violation);
  }
  return report;
}

int open_windows(const char* group, const char* communicator, int32_t rank, int32_t size, uint64_t bytes,
                 int64_t timeout_ms, int64_t* table, char* error) noexcept {
  return guarded(error, [&] {
    auto windows = std::make_shared<Windows>(communicator, rank, size, bytes, timeout_ms);
    std::lock_guard lock(state().mutex);
    std::vector<uint64_t> addresses;
    for (int r = 0; r < size; ++r) addresses.push_back(reinterpret_cast<uintptr_t>(windows->window(r)));
    deep_ep::fill_table(table, rank, addresses, bytes, timeout_ms,
                        static_cast<int64_t>(state().settings.clock_hz / 1000));
    state().windows[group] = std::move(windows);
  });
}

void close_windows(const char* group) noexcept {
  std::lock_guard lock(state().mutex);
  state().windows.erase(group);
}

int read_status(const int64_t* table, int32_t* status, char*) noexcept {
  const auto* window = reinterpret_cast<const uint8_t*>(table[WindowMap::kHeader + table[WindowMap::kRank]]);
  std::memcpy(status, status_of(window), DEEP_EP_STATUS_WORDS * sizeof(int32_t));
  return 0;
}

int prepare(const DeepEpCall* call, void** planned, uint64_t* workspace_bytes, char* error) noexcept {
  return guarded(error, [&] {
    std::unique_ptr<Plan> made = plan(*call);
    *workspace_bytes = made->workspace_bytes;
    *planned = made.release();
  });
}

// Over the stand-in for CANN a launch is a task of the stream. A captured one runs once for every replay, so plans live
// on.
void run_task(void* planned) noexcept {
  char error[DEEP_EP_TEXT_BYTES];
  if (guarded(error, [&] { execute(*static_cast<Plan*>(planned)); })) std::fprintf(stderr, "deep_ep twin: %s\n", error);
}

void* stand_in_function(const char* name) {
  void* const library = dlopen("libascendcl.so", RTLD_NOLOAD | RTLD_LAZY);
  return library != nullptr ? dlsym(library, name) : nullptr;
}

// Without a stream the launch is executed at once, and a violation is an error.
int launch(void* planned, void* workspace, void* stream, char* error) noexcept {
  return guarded(error, [&] {
    auto* const plan = static_cast<Plan*>(planned);
    plan->workspace = static_cast<uint8_t*>(workspace);
    if (stream == nullptr) {
      const Report report = execute(*std::unique_ptr<Plan>(plan));
      if (!report.violations.empty()) throw Error(report.violations.front());
      if (report.stopped) throw Error("another rank has broken a rule");
      return;
    }
    using Launch = int(void*, const char*, void (*)(void*), void*);
    static const auto put = reinterpret_cast<Launch*>(stand_in_function("cann_stand_in_launch"));
    if (put == nullptr) throw Error("the twin runs on streams of the stand-in for CANN alone (tests/cann)");
    const int status = put(stream, str("deep_ep.", plan->kernel->op).c_str(), &run_task, plan);
    if (status != 0) throw Error(str("the stand-in refused the launch: ", status));
  });
}

void discard(void* planned) noexcept { delete static_cast<Plan*>(planned); }

}  // namespace
}  // namespace twin::kernels

using namespace twin::kernels;

DEEP_EP_API const DeepEpKernels* deep_ep_kernels(void) noexcept {
  static const DeepEpKernels kernels = {
      DEEP_EP_KERNELS_VERSION, "AscendC twin", open_windows, close_windows, read_status, prepare, launch, discard};
  return &kernels;
}

// How launches that are prepared from now on run: on 2201 or 3510, a SoC with so many vector cores, in adversarial mode
// with this seed if it is not negative, with less unified buffer than there is if that is not 0. Windows that are
// opened from now on have this architecture's deadlines.
DEEP_EP_API void deep_ep_twin_configure(int32_t arch, int32_t vector_cores, int64_t seed,
                                        uint64_t unified_buffer_bytes) noexcept {
  std::lock_guard lock(state().mutex);
  const Arch facts = facts_of(arch);
  state().settings = {arch,
                      0,
                      seed >= 0,
                      static_cast<uint64_t>(std::max(seed, int64_t{0})),
                      unified_buffer_bytes != 0 ? unified_buffer_bytes : facts.unified_buffer_bytes,
                      facts.clock_hz,
                      vector_cores,
                      false};
}

// The violations since the last call, one to a line. Valid until the next call.
DEEP_EP_API const char* deep_ep_twin_take_violations() noexcept {
  static std::string text;
  std::lock_guard lock(state().mutex);
  text.clear();
  for (const std::string& violation : state().violations) text += violation + '\n';
  state().violations.clear();
  return text.c_str();
}

// What launches have done since the last call, kMostReports of them at most, as a list in JSON: Launch of
// tools/twin/kernels.py. Valid until the next call.
DEEP_EP_API const char* deep_ep_twin_take_report() noexcept {
  static std::string text;
  std::lock_guard lock(state().mutex);
  text = '[' + joined(state().reports) + ']';
  state().reports.clear();
  return text.c_str();
}
