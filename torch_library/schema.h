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
inline void define_with_ops(torch::stable::detail::StableLibrary& library, const std::string& name,
                            const std::string& schema) {
  define(library, name, schema);
  library.def((name + ".ops" + schema).c_str());
}

}  // namespace deep_ep
