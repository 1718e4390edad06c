// Capturing streams into graphs, and replaying them.
//
// Where CANN's documents leave it open, the rules are those of CUDA graphs: what waits for something captured joins the
// capture; what is captured cannot wait for something that is not; all that joined must be waited for before the end.
#include <algorithm>
#include <thread>
#include <utility>
#include <vector>

#include "stream.h"

namespace cann {
namespace {

struct Graph {
  // What one stream brought into the graph. The first lane is that of the stream the capture began on.
  struct Lane {
    std::shared_ptr<Stream> stream;
    std::shared_ptr<Queue> queue;
    uint64_t joined = 0;  // the last position that something in the graph waits for
  };

  const aclmdlRI handle;
  const aclmdlRICaptureMode mode;
  const std::thread::id thread;
  bool is_open = true;
  bool is_valid = true;
  std::vector<Lane> lanes{};
  std::mutex replay{};  // replays of one graph take turns
};

struct State {
  Handles<Graph> graphs;
  std::vector<std::shared_ptr<Graph>> open;
};

auto& state = *new State;
thread_local aclmdlRICaptureMode thread_mode = ACL_MODEL_RI_CAPTURE_MODE_GLOBAL;

[[noreturn]] void spoil(Graph& graph, int code, const char* reason) {
  graph.is_valid = graph.is_valid && !graph.is_open;
  throw Error{code, reason};
}

bool forbids_unsafe(const Graph& graph) {
  if (graph.mode == ACL_MODEL_RI_CAPTURE_MODE_RELAXED || thread_mode == ACL_MODEL_RI_CAPTURE_MODE_RELAXED) {
    return false;
  }
  const bool is_for_all = graph.mode == ACL_MODEL_RI_CAPTURE_MODE_GLOBAL;
  return graph.thread == std::this_thread::get_id() || (is_for_all && thread_mode == ACL_MODEL_RI_CAPTURE_MODE_GLOBAL);
}

void add_lane(Graph& graph, const std::shared_ptr<Stream>& stream) {
  stream->target = std::make_shared<Queue>(stream->number, graph.handle);
  graph.lanes.push_back({stream, stream->target});
}

void close(const std::shared_ptr<Graph>& graph) {
  graph->is_open = false;
  std::erase(state.open, graph);
  for (const Graph::Lane& lane : graph->lanes) {
    lane.stream->target = lane.stream->own;
  }
}

void check_is_complete(const Graph& graph) {
  if (!graph.is_valid) {
    throw Error{ACL_ERROR_RT_STREAM_CAPTURE_INVALIDATED, "a forbidden call has spoiled the capture"};
  }
  if (!std::all_of(graph.lanes.begin() + 1, graph.lanes.end(),
                   [](const Graph::Lane& lane) { return lane.joined == lane.queue->end(); })) {
    throw Error{ACL_ERROR_RT_STREAM_UNJOINED, "nothing waits for the end of a stream that joined the capture"};
  }
}

void replay(Graph& graph) {
  const std::lock_guard lock(graph.replay);
  for (const Graph::Lane& lane : graph.lanes) {
    lane.queue->rewind();
  }
  graph.lanes[0].queue->run_to(graph.lanes[0].queue->end());  // which waits for the other lanes: they have joined
}

}  // namespace

void check_is_safe() {
  const std::lock_guard lock(capture_mutex());
  for (const auto& graph : state.open) {
    if (forbids_unsafe(*graph)) {
      spoil(*graph, ACL_ERROR_RT_CAPTURE_MODE_NOT_SUPPORT, "the mode of a capture forbids it");
    }
  }
}

void check_nothing_is_captured() {
  const std::lock_guard lock(capture_mutex());
  for (const auto& graph : state.open) {
    if (graph->lanes[0].stream->device == current_device()) {
      spoil(*graph, ACL_ERROR_RT_STREAM_CAPTURE_IMPLICIT, "a stream of the device is being captured");
    }
  }
}

void check_is_not_captured(const Queue& queue) {
  const std::lock_guard lock(capture_mutex());
  if (const auto graph = queue.graph != nullptr ? state.graphs.get(queue.graph) : nullptr) {
    spoil(*graph, ACL_ERROR_RT_STREAM_CAPTURED, "this is part of a captured graph");
  }
}

void wait_for(const std::shared_ptr<Stream>& stream, const Point& point) {
  const auto from = point.queue->graph != nullptr ? state.graphs.get(point.queue->graph) : nullptr;
  if (const auto to = state.graphs.find(stream->target->graph); to != from) {
    if (to) {
      spoil(*to, ACL_ERROR_RT_CAPTURE_DEPENDENCY, "a captured stream waits for what is not in its graph");
    }
    if (!from->is_open) {
      spoil(*from, ACL_ERROR_RT_EVENT_CAPTURED, "the event is part of a captured graph");
    }
    add_lane(*from, stream);
  }
  if (from) {
    for (Graph::Lane& lane : from->lanes) {
      lane.joined = lane.queue == point.queue ? std::max(lane.joined, point.position) : lane.joined;
    }
  }
  stream->target->push({"aclrtStreamWaitEvent", [point] { point.run(); }});
}

}  // namespace cann

using namespace cann;

extern "C" {

aclError aclmdlRICaptureBegin(aclrtStream handle, aclmdlRICaptureMode mode) {
  return call(__func__, [=] {
    const auto stream = get_stream(handle);
    const std::lock_guard lock(capture_mutex());
    if (handle == nullptr || stream->target != stream->own) {
      throw Error{ACL_ERROR_RT_STREAM_CAPTURED, "the stream is the default one, or is being captured"};
    }
    const auto graph = std::make_shared<Graph>(new_handle(), mode, std::this_thread::get_id());
    add_lane(*graph, stream);
    state.graphs.add(graph->handle, graph);
    state.open.push_back(graph);
  });
}

aclError aclmdlRICaptureGetInfo(aclrtStream handle, aclmdlRICaptureStatus* status, aclmdlRI* model) {
  return call(__func__, [=] {
    const auto stream = get_stream(handle);
    const std::lock_guard lock(capture_mutex());
    *model = stream->target->graph;
    const auto graph = state.graphs.find(*model);
    *status = !graph            ? ACL_MODEL_RI_CAPTURE_STATUS_NONE
              : graph->is_valid ? ACL_MODEL_RI_CAPTURE_STATUS_ACTIVE
                                : ACL_MODEL_RI_CAPTURE_STATUS_INVALIDATED;
  });
}

aclError aclmdlRICaptureEnd(aclrtStream handle, aclmdlRI* model) {
  return call(__func__, [=] {
    const auto stream = get_stream(handle);
    const std::lock_guard lock(capture_mutex());
    const auto graph = state.graphs.find(stream->target->graph);
    if (!graph || graph->lanes[0].stream != stream) {
      throw Error{ACL_ERROR_RT_STREAM_CAPTURE_UNMATCHED, "no capture began on this stream"};
    }
    if (graph->mode != ACL_MODEL_RI_CAPTURE_MODE_RELAXED && graph->thread != std::this_thread::get_id()) {
      throw Error{ACL_ERROR_RT_STREAM_CAPTURE_WRONG_THREAD, "the capture began on another thread"};
    }
    close(graph);
    *model = nullptr;
    state.graphs.remove(graph->handle);
    check_is_complete(*graph);
    state.graphs.add(graph->handle, graph);
    *model = graph->handle;
  });
}

aclError aclmdlRICaptureThreadExchangeMode(aclmdlRICaptureMode* mode) {
  std::swap(*mode, thread_mode);
  return ACL_SUCCESS;
}

aclError aclmdlRIExecuteAsync(aclmdlRI model, aclrtStream stream) {
  return call(__func__, [=] {
    const auto graph = state.graphs.get(model);
    launch(stream, {"aclmdlRIExecuteAsync", [graph] { replay(*graph); }});
  });
}

aclError aclmdlRIDestroy(aclmdlRI model) {
  return call(__func__, [=] { state.graphs.remove(model); });
}
}
