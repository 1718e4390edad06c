#include "started.h"

#include <chrono>
#include <cstdint>
#include <cstring>
#include <map>
#include <memory>
#include <mutex>
#include <optional>

#include "interrupt.h"
#include "per_process.h"

namespace deep_ep {
namespace {

struct Started {
  std::string name;  // of the op, as wait gets it
  Op op;
  std::shared_ptr<Worker::Task> task;  // that will have its results
  std::shared_future<Results> results;
  std::weak_ptr<Group> group;
  Results early;  // of `results`, before they are there
};

// Tickets hold a number, not an address: code that copies a ticket and drops it must not lead astray.
struct Registry {
  std::mutex mutex;
  int64_t newest = 0;
  std::map<int64_t, Started> by_ticket;

  int64_t put(Started started) {
    std::lock_guard lock(mutex);
    by_ticket.emplace(++newest, std::move(started));
    return newest;
  }

  std::optional<Started> find(int64_t ticket) {
    std::lock_guard lock(mutex);
    const auto found = by_ticket.find(ticket);
    return found == by_ticket.end() ? std::nullopt : std::optional(found->second);
  }

  void remove(int64_t ticket) {
    decltype(by_ticket)::node_type removed;  // its tensors are destroyed after the lock is released
    std::lock_guard lock(mutex);
    removed = by_ticket.extract(ticket);
  }
};

Registry& registry() { return PerProcess<Registry>::get(); }

// The number is a floating-point one because autograd carries it: the gradient of a ticket is the ticket of the
// backward call (python/deep_ep/ops/wait.py).
Tensor ticket_for(Started started) {
  auto number = std::make_unique<double>(static_cast<double>(registry().put(std::move(started))));
  const auto drop = [](void* memory) {
    const std::unique_ptr<double> number(static_cast<double*>(memory));
    registry().remove(static_cast<int64_t>(*number));
  };
  const auto cpu = torch::stable::Device(torch::headeronly::kCPU);
  Tensor ticket = torch::stable::from_blob(number.get(), {1}, {1}, cpu, ScalarType::Double, drop);
  number.release();
  return ticket;
}

// What wait gives for a ticket of 0, if `op` can have such a one: a call that nobody has waited for has no gradient,
// and graphs make that a zero.
std::optional<Results> nothing_started(const std::string& op, const std::vector<Tensor>& arguments) {
  const auto zeros = [&](Shape shape, const Tensor& like, ScalarType dtype) { return new_zeros(like, shape, dtype); };
  if (arguments.size() != 2) return std::nullopt;
  const Tensor &rows = arguments[0], &slots = arguments[1];
  if (op == name_of(Op::dispatch_backward))
    return Results{zeros({slots.size(0), rows.size(1)}, rows, rows.scalar_type()),
                   zeros(slots.sizes(), rows, ScalarType::Float)};
  if (op == name_of(Op::combine_backward))
    return Results{zeros(rows.sizes(), rows, rows.scalar_type()), zeros(slots.sizes(), rows, ScalarType::Float)};
  return std::nullopt;
}

int64_t number_of(const Tensor& ticket) { return static_cast<int64_t>(*ticket.const_data_ptr<double>()); }

bool is_nothing(const Tensor& ticket) {
  return Checks().tensor("ticket", ticket, {ScalarType::Double}, {1}).passed() && number_of(ticket) == 0;
}

// The call of `op` that gave the ticket; throws, for the op `caller`, if there is none.
Started find(const char* caller, const Tensor& ticket, const std::string& op) {
  Checks checks;
  checks.tensor("ticket", ticket, {ScalarType::Double}, {1});
  std::optional<Started> started;
  if (checks.passed()) started = registry().find(number_of(ticket));
  checks.require(started.has_value(), "ticket must be what ", op,
                 "_start returned in this process, and is good for one wait");
  if (checks.passed())
    checks.require(started->name == op, "ticket must be what ", op, "_start returned, got that of ", started->name,
                   "_start");
  if (!checks.passed()) throw Error(str("deep_ep.", caller, ": ", checks.wrong()));
  return *started;
}

// Waits for them, or has them at once where the thread of the group has not begun: to wake that takes longer than small
// calls do. The program may be interrupted there, which gives the group up.
const Results& results_of(const Started& started) {
  if (started.task) started.task->run();
  while (started.results.wait_for(std::chrono::milliseconds(kHealthMilliseconds)) == std::future_status::timeout)
    if (const auto group = started.group.lock()) group->check_interrupt(started.op);
  return started.results.get();
}

// Makes values out of nothing: all bytes are 0xFF, a NaN in every format.
void spoil(const Results& results) {
  for (const Tensor& tensor : results)
    if (tensor.numel() > 0) std::memset(tensor.mutable_data_ptr(), 0xFF, tensor.numel() * tensor.element_size());
}

void fail(std::promise<Results>& promise, const Results& early, std::exception_ptr error) {
  spoil(early);
  promise.set_exception(std::move(error));
}

}  // namespace

std::mutex& start_order() {
  struct Order {
    std::mutex mutex;
  };
  return PerProcess<Order>::get().mutex;
}

Tensor start(Op op, Turn turn, Results early, std::unique_ptr<Steps> steps, const char* name) {
  const std::shared_ptr<Group> group = turn.shared_group();
  if (group->spoils()) spoil(early);
  ThreadCalls& calls = ThreadCalls::mine();
  ThreadCalls of_call{.failed = calls.failed, .form = calls.form, .gradient = calls.take_gradient()};
  std::promise<Results> promise;
  Started started{name, op, nullptr, promise.get_future(), group, early};
  std::optional<Turn> unsent(std::move(turn));
  std::exception_ptr error;
  if (unsent->has_come() && steps->sends_at_once()) {
    std::swap(calls, of_call);
    try {
      steps->send(*std::exchange(unsent, std::nullopt));
    } catch (...) {
      error = std::current_exception();
    }
    std::swap(calls, of_call);
  }
  const bool is_sent = !unsent;
  auto run = [op, early = std::move(early), of_call = std::move(of_call), promise = std::move(promise),
              unsent = std::move(unsent), steps = std::move(steps), error = std::move(error)]() mutable {
    const ThreadCalls of_thread = std::exchange(ThreadCalls::mine(), std::move(of_call));
    Results results;
    try {
      if (error) std::rethrow_exception(error);
      if (unsent) steps->send(*std::exchange(unsent, std::nullopt));
      results = steps->receive();
    } catch (...) {
      error = std::current_exception();
    }
    steps->end();
    ThreadCalls::mine() = of_thread;
    try {
      if (error) std::rethrow_exception(error);
      promise.set_value(std::move(results));
    } catch (const Interrupted&) {
      fail(promise, early, std::make_exception_ptr(Error(str("deep_ep.", name_of(op), ": it was interrupted"))));
      throw;  // where the signal was meant to
    } catch (...) {
      fail(promise, early, std::current_exception());
    }
  };
  started.task = std::make_shared<Worker::Task>(std::packaged_task<void()>(std::move(run)));
  std::shared_ptr<Worker::Task> task = started.task;
  Tensor ticket = ticket_for(std::move(started));
  if (is_sent)
    group->worker().leave(std::move(task));
  else
    group->worker().run(std::move(task));
  ++calls.entered;
  calls.completed = true;
  return ticket;
}

Tensor start_call(QueuedCall call, const char* name) {
  std::promise<Results> promise;
  promise.set_value(call.results);
  return ticket_for({name, call.op, nullptr, promise.get_future(), {}, std::move(call.results)});
}

Results wait(Tensor ticket, GroupName op_name, std::vector<Tensor> arguments, int64_t /* num_experts */,
             int64_t /* num_ranks */, int64_t /* num_max */, GroupName /* group */) {
  const std::string& op = op_name.value;
  if (is_nothing(ticket))
    if (auto nothing = nothing_started(op, arguments)) return *nothing;
  const Started started = find("wait", ticket, op);
  registry().remove(number_of(ticket));
  return results_of(started);
}

Results arriving(Tensor ticket, GroupName op_name, std::vector<Tensor> /* arguments */, int64_t /* num_experts */,
                 int64_t /* num_ranks */, int64_t /* num_max */, GroupName /* group */) {
  const Started started = find("arriving", ticket, op_name.value);
  return started.early.empty() ? results_of(started) : started.early;
}

}  // namespace deep_ep

STABLE_TORCH_LIBRARY_IMPL(deep_ep, CPU, library) {
  library.impl("wait", TORCH_BOX(&deep_ep::wait));
  library.impl("arriving", TORCH_BOX(&deep_ep::arriving));
}

STABLE_TORCH_LIBRARY_IMPL(deep_ep, PrivateUse1, library) {
  library.impl("wait", TORCH_BOX(&deep_ep::wait));
  library.impl("arriving", TORCH_BOX(&deep_ep::arriving));
}
