// Defines an op with its overloads, which share one schema. The overload without a name comes first: a call
// that names no overload takes the one that was defined first.
#pragma once

#include <torch/csrc/stable/library.h>

#include <string>

namespace deep_ep {

// `schema` is everything behind the name: "(arguments) -> results".
inline void define(torch::stable::detail::StableLibrary& library, const std::string& name, const std::string& schema) {
  library.def((name + schema).c_str());
  library.def((name + ".alltoall" + schema).c_str());
}

// With `.ops` as well. All overloads of an op have one schema: torch 2.13 aborts when a process ends if they differ.
//
// `<name>_start(arguments)` begins such a call and returns a ticket, int64 [1]; the op with the same arguments and the
// ticket as `started` completes it. Without `started` the op is the whole call.
inline void define_low_latency(torch::stable::detail::StableLibrary& library, const std::string& name,
                               const std::string& arguments, const std::string& results) {
  const auto define_all = [&](const std::string& name, const std::string& schema) {
    define(library, name, schema);
    library.def((name + ".ops" + schema).c_str());
  };
  define_all(name, "(" + arguments + ", Tensor? started) -> (" + results + ")");
  define_all(name + "_start", "(" + arguments + ") -> Tensor started");
}

}  // namespace deep_ep
