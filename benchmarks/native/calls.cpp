// Dispatch and combine as programs in C++ call them: deep_ep's ops through torch's dispatcher, and gloo as frameworks
// use it. One call from Python for any number of operations in a row.
#include <ATen/ATen.h>
#include <ATen/core/dispatch/Dispatcher.h>

#include <string>
#include <torch/csrc/distributed/c10d/GroupRegistry.hpp>
#include <torch/csrc/distributed/c10d/ProcessGroup.hpp>
#include <tuple>
#include <utility>
#include <vector>

namespace {

using at::Tensor;
using Counts = std::vector<int64_t>;

// T local tokens · H hidden · K top-k · E experts · R ranks · L = E/R local experts · N rows of recv_x.
struct Sizes {
  int64_t tokens, hidden, top_k, experts, ranks;
  at::ScalarType dtype;
  std::string group;
};

}  // namespace

// What is called, with the result of its newest operation.
struct Calls {
  explicit Calls(Sizes sizes) : s(std::move(sizes)) {}
  virtual ~Calls() = default;
  // recv_x [N, H], of x [T, H], ids and weights [T, K].
  virtual Tensor dispatch(const Tensor& x, const Tensor& ids, const Tensor& weights) = 0;
  // [T, H], of y [N, H] and what the newest dispatch has returned.
  virtual Tensor combine(const Tensor& y, const Tensor& ids, const Tensor& weights) = 0;

  template <typename Operation>
  void* repeat(int64_t times, const Operation& operation) {
    for (int64_t i = 0; i < times; ++i) {
      result = Tensor();  // gives memory back before the next call
      result = operation();
    }
    return result.mutable_data_ptr();
  }

  const Sizes s;
  Tensor result;
};

namespace {

template <typename Signature>
c10::TypedOperatorHandle<Signature> op(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

class DeepEP : public Calls {
 public:
  using Calls::Calls;

  Tensor dispatch(const Tensor& x, const Tensor& ids, const Tensor& weights) override {
    using Results = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;
    static const auto call =
        op<Results(const Tensor&, const Tensor&, const Tensor&, int64_t, int64_t, c10::SymInt, c10::string_view)>(
            "deep_ep::dispatch");
    Results results = call.call(x, ids, weights, s.experts, s.ranks, 0, s.group);
    recv_src_idx_ = std::move(std::get<8>(results));
    send_head_ = std::move(std::get<9>(results));
    return std::move(std::get<0>(results));
  }

  Tensor combine(const Tensor& y, const Tensor& ids, const Tensor& weights) override {
    static const auto call = op<Tensor(const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&,
                                       int64_t, int64_t, c10::string_view)>("deep_ep::combine");
    return call.call(y, ids, weights, recv_src_idx_, send_head_, s.experts, s.ranks, s.group);
  }

 private:
  Tensor recv_src_idx_, send_head_;
};

// With room for M = T tokens per rank.
class DeepEPLowLatency : public Calls {
 public:
  using Calls::Calls;

  Tensor dispatch(const Tensor& x, const Tensor& ids, const Tensor&) override {
    static const auto call = op<std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>(
        const Tensor&, const Tensor&, int64_t, int64_t, int64_t, c10::string_view, c10::string_view, bool)>(
        "deep_ep::low_latency_dispatch");
    auto [recv_x, recv_count, recv_src_idx, layout_range, send_head] =
        call.call(x, ids, s.tokens, s.experts, s.ranks, s.group, "", /*zero_unused=*/false);
    recv_src_idx_ = std::move(recv_src_idx);
    layout_range_ = std::move(layout_range);
    send_head_ = std::move(send_head);
    return std::move(recv_x);
  }

  Tensor combine(const Tensor& y, const Tensor& ids, const Tensor& weights) override {
    static const auto call =
        op<Tensor(const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&, int64_t,
                  int64_t, c10::string_view, c10::string_view)>("deep_ep::low_latency_combine");
    return call.call(y, ids, weights, recv_src_idx_, layout_range_, send_head_, s.experts, s.ranks, s.group, "");
  }

 private:
  Tensor recv_src_idx_, layout_range_, send_head_;
};

// GlooDispatcher of dispatchers.py, which says what it is, line by line.
class Gloo : public Calls {
 public:
  explicit Gloo(Sizes sizes) : Calls(std::move(sizes)), group_(c10d::resolve_process_group(s.group)) {}

  Tensor dispatch(const Tensor& x, const Tensor& ids, const Tensor& weights) override {
    const int64_t R = s.ranks, L = s.experts / R;
    const Tensor send_counts = at::bincount(ids.flatten(), {}, s.experts).view({R, L});
    recv_counts_ = at::empty_like(send_counts);
    exchange(recv_counts_, send_counts, {}, {});
    send_splits_ = counts(send_counts.sum(1));
    recv_splits_ = counts(recv_counts_.sum(1));

    order_ = at::argsort(ids.flatten(), /*stable=*/true, -1, false);
    const Tensor rows = x.index_select(0, at::floor_divide(order_, s.top_k));
    const Tensor row_weights = weights.flatten().index_select(0, order_);

    Tensor recv_x = all_to_all(rows, send_splits_, recv_splits_);
    recv_weights_ = all_to_all(row_weights, send_splits_, recv_splits_);
    if (L > 1) {
      const Counts sizes = counts(recv_counts_.flatten());
      recv_x = reorder_chunks(recv_x, sizes, R, L);
      recv_weights_ = reorder_chunks(recv_weights_, sizes, R, L);
    }
    return recv_x;
  }

  Tensor combine(const Tensor& y, const Tensor&, const Tensor& weights) override {
    const int64_t R = s.ranks, L = s.experts / R;
    const Tensor by_rank = L > 1 ? reorder_chunks(y, counts(recv_counts_.t().flatten()), L, R) : y;
    const Tensor rows = all_to_all(by_rank, recv_splits_, send_splits_);
    Tensor by_token = at::empty_like(rows);
    by_token.index_put_({order_}, rows);
    const Tensor terms = by_token.view({s.tokens, s.top_k, s.hidden}).to(at::kFloat);
    return at::bmm(weights.unsqueeze(1), terms).squeeze(1).to(s.dtype);
  }

 private:
  static Counts counts(const Tensor& tensor) {
    const Tensor values = tensor.contiguous();
    return {values.const_data_ptr<int64_t>(), values.const_data_ptr<int64_t>() + values.numel()};
  }

  // Chunks in the order of [major, minor], into that of [minor, major].
  static Tensor reorder_chunks(const Tensor& rows, const Counts& sizes, int64_t major, int64_t minor) {
    const std::vector<Tensor> chunks = rows.split_with_sizes(sizes);
    std::vector<Tensor> ordered;
    for (int64_t i = 0; i < minor; ++i)
      for (int64_t j = 0; j < major; ++j) ordered.push_back(chunks[j * minor + i]);
    return at::cat(ordered);
  }

  void exchange(Tensor& received, Tensor sent, Counts recv_splits, Counts send_splits) const {
    group_->alltoall_base(received, sent, recv_splits, send_splits)->wait();
  }

  Tensor all_to_all(const Tensor& rows, const Counts& send_splits, const Counts& recv_splits) const {
    std::vector<int64_t> shape = rows.sizes().vec();
    shape[0] = 0;
    for (const int64_t count : recv_splits) shape[0] += count;
    Tensor received = rows.new_empty(shape);
    exchange(received, rows.contiguous(), recv_splits, send_splits);
    return received;
  }

  const c10::intrusive_ptr<c10d::ProcessGroup> group_;
  Tensor order_, recv_counts_, recv_weights_;
  Counts send_splits_, recv_splits_;
};

// Tensors over memory of the caller.
struct Arguments {
  Arguments(const Sizes& s, const void* rows, int64_t num_rows, const int64_t* ids, const float* weights)
      : rows(tensor(rows, num_rows, s.hidden, s.dtype)),
        ids(tensor(ids, s.tokens, s.top_k, at::kLong)),
        weights(tensor(weights, s.tokens, s.top_k, at::kFloat)) {}

  const Tensor rows, ids, weights;

 private:
  static Tensor tensor(const void* data, int64_t rows, int64_t columns, at::ScalarType dtype) {
    return at::from_blob(const_cast<void*>(data), {rows, columns}, at::TensorOptions().dtype(dtype));
  }
};

}  // namespace

extern "C" {

// what: 0: deep_ep, 1: deep_ep's low latency, 2: gloo. dtype: 0: fp32, 1: fp16, 2: bf16.
Calls* calls_make(int64_t what, int64_t tokens, int64_t hidden, int64_t top_k, int64_t experts, int64_t ranks,
                  int64_t dtype, const char* group) {
  constexpr at::ScalarType types[] = {at::kFloat, at::kHalf, at::kBFloat16};
  Sizes sizes{tokens, hidden, top_k, experts, ranks, types[dtype], group};
  if (what == 0) return new DeepEP(std::move(sizes));
  if (what == 1) return new DeepEPLowLatency(std::move(sizes));
  return new Gloo(std::move(sizes));
}

void calls_drop(Calls* calls) { delete calls; }

// `times` operations in a row. Returns recv_x, which lives until the next call, of num_rows rows. x is [T, H], ids and
// weights are [T, K].
void* calls_dispatch(Calls* c, const void* x, const int64_t* ids, const float* weights, int64_t times,
                     int64_t* num_rows) {
  const c10::InferenceMode as_for_decoding;
  const Arguments arguments(c->s, x, c->s.tokens, ids, weights);
  void* const rows = c->repeat(times, [&] { return c->dispatch(arguments.rows, arguments.ids, arguments.weights); });
  *num_rows = c->result.size(0);
  return rows;
}

// `times` operations in a row. Returns [T, H], which lives until the next call. y is [num_rows, H].
void* calls_combine(Calls* c, const void* y, int64_t num_rows, const int64_t* ids, const float* weights,
                    int64_t times) {
  const c10::InferenceMode as_for_decoding;
  const Arguments arguments(c->s, y, num_rows, ids, weights);
  return c->repeat(times, [&] { return c->combine(arguments.rows, arguments.ids, arguments.weights); });
}
}
