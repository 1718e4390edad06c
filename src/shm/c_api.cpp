// What Python needs to make and drop groups (python/deep_ep/windows.py), through ctypes: no op, so invisible to
// dispatch modes and graphs. Functions that can fail return nullptr or nonzero then, and fill `error` (c_boundary.h).
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <exception>
#include <memory>
#include <string>
#include <utility>

#include "c_boundary.h"
#include "error.h"
#include "group.h"
#include "groups.h"
#include "host_memory.h"
#include "idle.h"
#include "interrupt.h"
#include "operation.h"
#include "thread_calls.h"
#include "worker.h"

using deep_ep::Group;

namespace {

using Handle = std::shared_ptr<Group>;

// Why the last call on this thread failed, where that was a signal.
thread_local std::exception_ptr interrupted;

template <typename Body>
int guarded(char* error, Body&& body) noexcept {
  interrupted = nullptr;
  return deep_ep::guarded(error, [&] {
    try {
      body();
    } catch (const deep_ep::Interrupted&) {
      interrupted = std::current_exception();
      throw;
    }
  });
}

}  // namespace

// If the last call failed because of a signal, raises what the signal's handler raised. Needs the interpreter's lock.
DEEP_EP_API void deep_ep_raise_interrupt() noexcept {
  try {
    if (interrupted) std::rethrow_exception(std::exchange(interrupted, nullptr));
  } catch (const deep_ep::Interrupted& e) {
    e.set_error();
  }
}

DEEP_EP_API void* deep_ep_group_create(int rank, int size, uint64_t bytes, int64_t timeout_ms, char* error) noexcept {
  Handle* handle = nullptr;
  guarded(error, [&] {
    handle = new Handle(std::make_shared<Group>(rank, size, bytes, std::chrono::milliseconds(timeout_ms)));
  });
  return handle;
}

DEEP_EP_API int deep_ep_group_fd(void* handle) noexcept { return (*static_cast<Handle*>(handle))->fd(); }

DEEP_EP_API int deep_ep_group_usable(void* handle) noexcept { return (*static_cast<Handle*>(handle))->usable(); }

// Whether the operations that have been issued have ended, for which it waits so long.
DEEP_EP_API int deep_ep_group_join(void* handle, int64_t time_ms) noexcept {
  return (*static_cast<Handle*>(handle))->join(std::chrono::milliseconds(time_ms));
}

DEEP_EP_API uint64_t deep_ep_group_bytes(void* handle) noexcept { return (*static_cast<Handle*>(handle))->bytes(); }

DEEP_EP_API int deep_ep_group_connect(void* handle, const int64_t* pids, const int64_t* fds, const uint64_t* bytes,
                                      char* error) noexcept {
  return guarded(error, [&] { (*static_cast<Handle*>(handle))->connect(pids, fds, bytes); });
}

// The ops on the group `name` use these windows from now on.
DEEP_EP_API void deep_ep_group_publish(void* handle, const char* name) noexcept {
  const Handle& group = *static_cast<Handle*>(handle);
  deep_ep::groups::put(name, group);
}

// What this process may still take (host_memory.h), as files below `root` say it: available and total bytes of the
// host and of the scarcest cgroup, if one has a limit, whose name goes to `cgroup`, which has kErrorBytes, too.
DEEP_EP_API int deep_ep_host_memory(const char* root, uint64_t* bytes, char* cgroup, char* error) noexcept {
  return guarded(error, [&] {
    const deep_ep::HostMemory memory = deep_ep::host_memory(root);
    bytes[0] = memory.host.available;
    bytes[1] = memory.host.total;
    if (!memory.cgroup) return;
    bytes[2] = memory.cgroup->available;
    bytes[3] = memory.cgroup->total;
    std::snprintf(cgroup, deep_ep::kErrorBytes, "%s", memory.cgroup->owner.c_str());
  });
}

// A function of Python that makes windows (groups::Make), of which the caller keeps a reference.
DEEP_EP_API void deep_ep_make_windows_by(void* function) noexcept {
  deep_ep::groups::set_make(
      [function](const char* op, const std::string& name) { return deep_ep::call_python(function, op, name.c_str()); });
}

// Gives back what memory is due to go back to the system, now and not when the time has come.
DEEP_EP_API void deep_ep_sweep() noexcept { deep_ep::sweep(); }

// The process is about to exit.
DEEP_EP_API void deep_ep_exit() noexcept { deep_ep::keep_tasks(); }

// From here on, results of calls that go on look like none until they have come.
DEEP_EP_API void deep_ep_group_spoil(void* handle) noexcept { (*static_cast<Handle*>(handle))->set_spoils(); }

// Codes of the newest operations, oldest first, into ops[capacity]; returns how many were ever issued.
DEEP_EP_API uint64_t deep_ep_group_log(void* handle, uint32_t* ops, uint64_t capacity) noexcept {
  uint64_t issued;
  const auto log = (*static_cast<Handle*>(handle))->log(capacity, &issued);
  for (size_t i = 0; i < log.size(); ++i) ops[i] = static_cast<uint32_t>(log[i]);
  return issued;
}

// Nanoseconds that the finished operations of this kind have spent in each phase, into nanoseconds[kPhases]; returns
// how many they were.
DEEP_EP_API uint64_t deep_ep_group_phases(void* handle, uint32_t op, int64_t* nanoseconds) noexcept {
  uint64_t finished;
  const auto spent = (*static_cast<Handle*>(handle))->spent(static_cast<deep_ep::Op>(op), &finished);
  std::copy(spent.begin(), spent.end(), nanoseconds);
  return finished;
}

// From here on the operations that finish are kept, so many at most.
DEEP_EP_API void deep_ep_group_trace(void* handle, uint64_t limit) noexcept {
  (*static_cast<Handle*>(handle))->trace(limit);
}

// Ends that. Of each of them, in the order in which they ran: its code, begin and end in nanoseconds of the steady
// clock, T, H, K, E and the nanoseconds of each phase, into numbers[limit * (7 + kPhases)]. Returns how many they were.
DEEP_EP_API uint64_t deep_ep_group_traced(void* handle, int64_t* numbers) noexcept {
  const auto traced = (*static_cast<Handle*>(handle))->traced();
  for (const auto& one : traced) {
    for (const int64_t number :
         {static_cast<int64_t>(one.op), one.begin, one.end, one.tokens, one.hidden, one.top_k, one.experts})
      *numbers++ = number;
    numbers = std::copy(one.spent.begin(), one.spent.end(), numbers);
  }
  return traced.size();
}

// An operation in which nothing moves: all ranks of the group `name` agree on `op`, or all fail. `sizes` has H, K, E, a
// DType, num_max_dispatch_tokens_per_rank and quant_mode; `rejected`, unless empty, says why this rank cannot take
// part.
DEEP_EP_API int deep_ep_group_agree(const char* name, uint32_t op, const int64_t* sizes, const char* rejected,
                                    char* error) noexcept {
  return guarded(error, [&] {
    deep_ep::Contribution mine;
    mine.post.op = static_cast<deep_ep::Op>(op);
    mine.post.hidden = sizes[0];
    mine.post.top_k = sizes[1];
    mine.post.experts = sizes[2];
    mine.post.dtype = sizes[3];
    mine.post.rows = sizes[4];
    mine.words = {static_cast<int32_t>(sizes[5])};
    mine.rejected = rejected;
    const auto check = [](const deep_ep::Operation& op) {
      const auto differ = [](const char* what, int r, int64_t first, int64_t other) {
        return deep_ep::str(what, " must be the same on all ranks: rank 0 has ", first, ", rank ", r, " has ", other);
      };
      for (int r = 1; r < op.size(); ++r) {
        if (op.post(r).rows != op.post(0).rows)
          return differ("num_max_dispatch_tokens_per_rank", r, op.post(0).rows, op.post(r).rows);
        if (*op.words(r) != *op.words(0)) return differ("quant_mode", r, *op.words(0), *op.words(r));
      }
      return std::string();
    };
    deep_ep::Operation(deep_ep::groups::get(deep_ep::name_of(mine.post.op), name), std::move(mine), check).finish();
  });
}

// From here on, until it ends, this thread makes one call: of its operations, those after one that was left to the
// thread of a group and failed there are not entered. `gradient`: ThreadCalls::gradient_of_call. Returns as
// deep_ep_call_entered.
DEEP_EP_API uint64_t deep_ep_call_begin(int64_t gradient) noexcept {
  auto& calls = deep_ep::ThreadCalls::mine();
  calls.failed = std::make_shared<std::string>();
  calls.form.clear();
  calls.gradient_of_call = gradient;
  return 2 * calls.entered + calls.completed;
}

DEEP_EP_API void deep_ep_call_end() noexcept {
  auto& calls = deep_ep::ThreadCalls::mine();
  calls.failed.reset();
  calls.form.clear();
  calls.gradient_of_call = 0;
}

// How many operations this thread has entered, doubled; and 1 more unless the newest of them has failed.
DEEP_EP_API uint64_t deep_ep_call_entered() noexcept {
  const auto& calls = deep_ep::ThreadCalls::mine();
  return 2 * calls.entered + calls.completed;
}

// What ranks must have in common in the call that this thread makes, in words.
DEEP_EP_API void deep_ep_call_form(const char* form) noexcept { deep_ep::ThreadCalls::mine().form = form; }

// ThreadCalls::gradient.
DEEP_EP_API void deep_ep_call_gradient(int64_t gradient) noexcept { deep_ep::ThreadCalls::mine().gradient = gradient; }

// Frees the handle; the group goes with the last operation and the registry entry under `name`, if it is its own.
DEEP_EP_API void deep_ep_group_destroy(void* handle, const char* name) noexcept {
  auto* group = static_cast<Handle*>(handle);
  deep_ep::groups::remove(name, group->get());
  delete group;
}
