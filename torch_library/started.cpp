#include "started.h"

#include <future>
#include <map>
#include <mutex>
#include <thread>

namespace deep_ep {
namespace {

struct Started {
  Op op;
  std::future<Results> results;
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

  std::optional<Started> take(int64_t ticket) {
    std::lock_guard lock(mutex);
    auto node = by_ticket.extract(ticket);
    return node ? std::optional(std::move(node.mapped())) : std::nullopt;
  }
};

// Never destroyed: threads and tensors may outlive static destruction.
Registry& registry() {
  static Registry& instance = *new Registry;
  return instance;
}

Tensor ticket_for(Op op, std::future<Results> results) {
  auto number = std::make_unique<int64_t>(registry().put({op, std::move(results)}));
  const auto drop = [](void* memory) {
    const std::unique_ptr<int64_t> number(static_cast<int64_t*>(memory));
    registry().take(*number);
  };
  const auto cpu = torch::stable::Device(torch::headeronly::kCPU);
  Tensor ticket = torch::stable::from_blob(number.get(), {1}, {1}, cpu, ScalarType::Long, drop);
  number.release();
  return ticket;
}

}  // namespace

Tensor start(Op op, Turn turn, std::function<Results(Turn)> body) {
  std::packaged_task<Results(Turn)> task(std::move(body));
  Tensor ticket = ticket_for(op, task.get_future());
  std::thread(std::move(task), std::move(turn)).detach();
  return ticket;
}

Tensor hold(Op op, Results results) {
  std::promise<Results> promise;
  promise.set_value(std::move(results));
  return ticket_for(op, promise.get_future());
}

Results finish(Op op, const Tensor& ticket) {
  Checks checks;
  checks.tensor("started", ticket, {ScalarType::Long}, {1});
  std::optional<Started> started;
  if (checks.passed()) started = registry().take(*ticket.const_data_ptr<int64_t>());
  checks.require(started.has_value(), "started must be what ", name_of(op),
                 "_start returned in this process, and completes one call");
  if (checks.passed())
    checks.require(started->op == op, "started must be what ", name_of(op), "_start returned, got that of ",
                   name_of(started->op), "_start");
  if (!checks.passed()) throw Error(str("deep_ep.", name_of(op), ": ", checks.wrong()));
  return started->results.get();
}

}  // namespace deep_ep
