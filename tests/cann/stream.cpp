// Streams and events.
#include "stream.h"

#include <chrono>
#include <map>
#include <set>
#include <thread>

namespace cann {
namespace {

using Clock = std::chrono::steady_clock;

// A new one at each recording, so that what already waits goes on waiting for the one it means.
struct Record {
  Point point;
  Clock::time_point time;
};

struct Event {
  std::shared_ptr<Record> record;  // nullptr: not recorded
};

struct State {
  Handles<Stream> streams;
  Handles<Event> events;
  std::mutex mutex;
  std::set<std::shared_ptr<Stream>> all;
  std::map<int, std::shared_ptr<Stream>> defaults;  // by device
};

auto& state = *new State;

// With the mutex held.
std::shared_ptr<Stream> make_stream() {
  void* const handle = new_handle();
  const int number = static_cast<int>(reinterpret_cast<intptr_t>(handle));
  const auto queue = std::make_shared<Queue>(number);
  const auto stream = std::make_shared<Stream>(Stream{number, current_device(), queue, queue});
  state.streams.add(handle, stream);
  state.all.insert(stream);
  return stream;
}

// The queue of a stream that is not captured.
Queue& queue_of(const Stream& stream) {
  std::unique_lock lock(capture_mutex());
  const auto target = stream.target;
  lock.unlock();
  check_is_not_captured(*target);
  return *stream.own;
}

aclError synchronise_stream(const char* name, aclrtStream handle) {
  return call(name, [=] {
    const auto stream = get_stream(handle);
    note("sync", stream->number, name);
    Queue& queue = queue_of(*stream);
    queue.run_to(queue.end());
    check_tasks();
  });
}

aclError synchronise_device(const char* name) {
  note("sync", 0, name);
  return call(name, [] {
    check_nothing_is_captured();
    drain(current_device());
    check_tasks();
  });
}

// The record of an event that the host asks for; nullptr if there is none.
std::shared_ptr<Record> get_record(aclrtEvent handle) {
  const auto event = state.events.get(handle);
  std::unique_lock lock(capture_mutex());
  const auto record = event->record;
  lock.unlock();
  if (record) {
    check_is_not_captured(*record->point.queue);
  }
  return record;
}

Clock::time_point get_time(aclrtEvent handle) {
  const auto record = get_record(handle);
  if (!record || !record->point.is_reached()) {
    throw Error{ACL_ERROR_RT_EVENT_NOT_COMPLETE, "an event has not happened"};
  }
  return record->time;
}

void remove_stream(aclrtStream handle) {
  const std::lock_guard lock(state.mutex);
  state.all.erase(state.streams.remove(handle));
}

}  // namespace

std::mutex& capture_mutex() {
  static auto* mutex = new std::mutex;
  return *mutex;
}

std::shared_ptr<Stream> get_stream(aclrtStream handle) {
  if (handle != nullptr) {
    return state.streams.get(handle);
  }
  const std::lock_guard lock(state.mutex);
  auto& stream = state.defaults[current_device()];
  return stream ? stream : stream = make_stream();
}

Point launch(aclrtStream handle, const Task& task) {
  const auto stream = get_stream(handle);
  if (handle == nullptr) {
    check_nothing_is_captured();
  }
  const std::lock_guard lock(capture_mutex());
  return {stream->target, stream->target->push(task)};
}

void launch_and_wait(aclrtStream handle, const Task& task) {
  const auto stream = get_stream(handle);
  note("sync", stream->number, task.name);
  queue_of(*stream);
  launch(handle, task).run();
}

void drain(int device) {
  std::unique_lock lock(state.mutex);
  const auto all = state.all;
  lock.unlock();
  for (const auto& stream : all) {
    if (device == -1 || stream->device == device) {
      stream->own->run_to(stream->own->end());
    }
  }
}

}  // namespace cann

using namespace cann;

extern "C" {

aclError aclrtCreateStreamWithConfig(aclrtStream* stream, uint32_t, uint32_t) {
  const std::lock_guard lock(state.mutex);
  *stream = reinterpret_cast<aclrtStream>(intptr_t{make_stream()->number});
  return ACL_SUCCESS;
}

aclError aclrtCreateStream(aclrtStream* stream) { return aclrtCreateStreamWithConfig(stream, 0, 0); }

aclError aclrtDestroyStream(aclrtStream handle) {
  return call(__func__, [=] {
    const auto stream = get_stream(handle);
    stream->own->run_to(stream->own->end());
    remove_stream(handle);
  });
}

aclError aclrtDestroyStreamForce(aclrtStream handle) {
  return call(__func__, [=] {
    get_stream(handle)->own->abandon();
    remove_stream(handle);
  });
}

aclError aclrtSynchronizeStream(aclrtStream stream) { return synchronise_stream(__func__, stream); }

aclError aclrtSynchronizeStreamWithTimeout(aclrtStream stream, int32_t) { return synchronise_stream(__func__, stream); }

aclError aclrtSynchronizeDevice() { return synchronise_device(__func__); }

aclError aclrtSynchronizeDeviceWithTimeout(int32_t) { return synchronise_device(__func__); }

aclError aclrtStreamQuery(aclrtStream handle, aclrtStreamStatus* status) {
  return call(__func__, [=] {
    const auto stream = get_stream(handle);
    Queue& queue = queue_of(*stream);
    const uint64_t end = queue.end();
    *status = queue.has_reached(end) ? ACL_STREAM_STATUS_COMPLETE : ACL_STREAM_STATUS_NOT_READY;
    queue.poll(end);
  });
}

aclError aclrtCreateEventWithFlag(aclrtEvent* handle, uint32_t flags) {
  return call(__func__, [=] {
    if (flags & (ACL_EVENT_EXTERNAL | ACL_EVENT_IPC)) {
      throw Error{ACL_ERROR_RT_FEATURE_NOT_SUPPORT, "the stand-in has no external and no IPC events"};
    }
    *handle = new_handle();
    state.events.add(*handle, std::make_shared<Event>());
  });
}

aclError aclrtCreateEventExWithFlag(aclrtEvent* handle, uint32_t flags) {
  return aclrtCreateEventWithFlag(handle, flags);
}

aclError aclrtDestroyEvent(aclrtEvent handle) {
  return call(__func__, [=] { state.events.remove(handle); });
}

aclError aclrtRecordEvent(aclrtEvent handle, aclrtStream stream) {
  return call(__func__, [=] {
    const auto event = state.events.get(handle);
    const auto record = std::make_shared<Record>();
    record->point = launch(stream, {"aclrtRecordEvent", [record] { record->time = Clock::now(); }});
    const std::lock_guard lock(capture_mutex());
    event->record = record;
  });
}

aclError aclrtStreamWaitEvent(aclrtStream handle, aclrtEvent event_handle) {
  return call(__func__, [=] {
    const auto stream = get_stream(handle);
    const auto event = state.events.get(event_handle);
    const std::lock_guard lock(capture_mutex());
    if (event->record) {
      wait_for(stream, event->record->point);
    }
  });
}

aclError aclrtSynchronizeEvent(aclrtEvent event) {
  note("sync", 0, __func__);
  return call(__func__, [=] {
    if (const auto record = get_record(event)) {
      record->point.run();
    }
    check_tasks();
  });
}

aclError aclrtQueryEventStatus(aclrtEvent event, aclrtEventRecordedStatus* status) {
  return call(__func__, [=] {
    *status = ACL_EVENT_RECORDED_STATUS_COMPLETE;
    const auto record = get_record(event);
    if (record && !record->point.is_reached()) {
      *status = ACL_EVENT_RECORDED_STATUS_NOT_READY;
      record->point.queue->poll(record->point.position);
    }
  });
}

aclError aclrtEventElapsedTime(float* milliseconds, aclrtEvent start, aclrtEvent end) {
  return call(__func__, [=] {
    *milliseconds = std::chrono::duration<float, std::milli>(get_time(end) - get_time(start)).count();
  });
}

aclError cann_stand_in_launch(aclrtStream stream, const char* name, void (*function)(void*), void* argument) {
  return call(name, [=] { launch(stream, {name, [=] { function(argument); }}); });
}

aclError aclrtLaunchHostFunc(aclrtStream stream, aclrtHostFunc function, void* argument) {
  return cann_stand_in_launch(stream, __func__, function, argument);
}

aclError aclrtLaunchCallback(aclrtCallback function, void* argument, aclrtCallbackBlockType, aclrtStream stream) {
  return cann_stand_in_launch(stream, __func__, function, argument);
}

// A callback runs on the thread that makes its stream go on: a thread that offers to run callbacks gets none.
aclError aclrtSubscribeReport(uint64_t, aclrtStream) { return ACL_SUCCESS; }

aclError aclrtUnSubscribeReport(uint64_t, aclrtStream) { return ACL_SUCCESS; }

aclError aclrtProcessReport(int32_t milliseconds) {
  std::this_thread::sleep_for(std::chrono::milliseconds(milliseconds));
  return ACL_ERROR_RT_REPORT_TIMEOUT;
}
}
