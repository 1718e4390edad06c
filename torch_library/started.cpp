#include "started.h"

#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <optional>

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

// The number is a floating-point one because autograd carries it: the gradient of a ticket is the ticket of the
// backward call (python/deep_ep/ops/wait.py).
Tensor ticket_for(Op op, std::future<Results> results) {
  auto number = std::make_unique<double>(static_cast<double>(registry().put({op, std::move(results)})));
  const auto drop = [](void* memory) {
    const std::unique_ptr<double> number(static_cast<double*>(memory));
    registry().take(static_cast<int64_t>(*number));
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

}  // namespace

Tensor start(Op op, Turn turn, std::packaged_task<Results(Turn)> body) {
  Tensor ticket = ticket_for(op, body.get_future());
  Worker& worker = turn.group().worker();
  worker.run(Worker::Task([body = std::move(body), turn = std::move(turn)]() mutable { body(std::move(turn)); }));
  return ticket;
}

Tensor hold(Op op, Results results) {
  std::promise<Results> promise;
  promise.set_value(std::move(results));
  return ticket_for(op, promise.get_future());
}

Results wait(Tensor ticket, GroupName op_name, std::vector<Tensor> arguments, int64_t /* num_experts */,
             int64_t /* num_ranks */, int64_t /* num_max */, GroupName /* group */) {
  const std::string& op = op_name.value;
  Checks checks;
  checks.tensor("ticket", ticket, {ScalarType::Double}, {1});
  std::optional<Started> started;
  if (checks.passed()) {
    const auto number = static_cast<int64_t>(*ticket.const_data_ptr<double>());
    if (auto nothing = number == 0 ? nothing_started(op, arguments) : std::nullopt) return *nothing;
    started = registry().take(number);
  }
  checks.require(started.has_value(), "ticket must be what ", op,
                 "_start returned in this process, and is good for one wait");
  if (checks.passed())
    checks.require(name_of(started->op) == op, "ticket must be what ", op, "_start returned, got that of ",
                   name_of(started->op), "_start");
  if (!checks.passed()) throw Error(str("deep_ep.wait: ", checks.wrong()));
  return started->results.get();
}

}  // namespace deep_ep
