// What an operator takes and gives, as a table that reads like its documentation: its definition, its inferences and
// its tiling all come from it (definition.h).
//
// T tokens · H hidden · K top-k · E experts · R ranks · L = E/R local experts · N expert rows · S nodes ·
// W num_worst_tokens · M num_max_dispatch_tokens_per_rank · I intermediate size · J = 2I.
#pragma once

#include <cstdint>
#include <utility>
#include <vector>

namespace deep_ep {

class Sizes;

// rows: fp32, fp16 or bf16, the same in all tensors of a call; weights: the same, or int8.
enum class Elements { rows, weights, f32, i8, i32, i64 };

struct TensorDef {
  const char* name;
  Elements elements;
  // One symbol per dimension: a letter stands for one size in all shapes of a call, a digit for itself. "*" is any
  // shape. "=W" is a scalar whose value is the size W.
  const char* shape;
};

// What comes from the router, and what dispatch gives for the way back.
inline constexpr TensorDef kTopkIdx{"topk_idx", Elements::i64, "TK"};
inline constexpr TensorDef kTopkWeights{"topk_weights", Elements::f32, "TK"};
inline constexpr TensorDef kRecvSrcIdx{"recv_src_idx", Elements::i32, "N3"};
inline constexpr TensorDef kSendHead{"send_head", Elements::i32, "TK"};
inline constexpr TensorDef kLayoutRange{"layout_range", Elements::i32, "E"};

struct AttrDef {
  const char* name;
  char symbol;  // of the size that it gives; kNumber: it is a number, but no size; 0: it is a string

  static constexpr char kNumber = '#';
};

// 1: rows that hold nothing become 0; 0: they hold anything. Without the attribute they become 0.
inline constexpr AttrDef kZeroUnused{"zero_unused", AttrDef::kNumber};

// What the kernel does with rows. Sums are in fp32, with weights or without; rows that are multiplied with others are
// copied first.
enum class Rows { copied, quantised, summed, multiplied, none };

struct Signature {
  Rows rows;
  std::vector<TensorDef> inputs;
  std::vector<TensorDef> outputs;
  std::vector<AttrDef> attrs;
  // The size N of outputs, where no input has it; -1 as long as it is not known. May also require something of sizes.
  int64_t (*num_rows)(Sizes& sizes) = nullptr;
  // For kernels that alone know N: what it is at most. The shapes of outputs then depend on the computation.
  int64_t (*most_rows)(const Sizes& sizes) = nullptr;
  // For kernels that send rows into slots for as many tokens: M.
  int64_t (*max_tokens)(const Sizes& sizes) = nullptr;
  // Whether each (token, k) brings back a number besides rows.
  bool answers = false;
  // What else sizes must be; -1 for those that are not known.
  void (*require)(Sizes& sizes) = nullptr;
  // false: there is a definition, for graphs, and no kernel yet.
  bool has_kernel = true;
};

// An operator in which ranks talk to each other. The window table is an ordinary input, built once per group. The other
// way, OpDef::MC2().HcclGroup("group"), allocates at every launch, needs a task generator in sunk graphs, and does not
// exist on every SoC. `group` only says whose table it is: a cached graph that runs under another communicator's name
// has this attribute refreshed.
inline Signature communicating(Signature signature) {
  signature.inputs.push_back({"windows", Elements::i64, "*"});
  std::vector<AttrDef> attrs = {{"group", 0}, {"num_experts", 'E'}, {"num_ranks", 'R'}};
  attrs.insert(attrs.end(), signature.attrs.begin(), signature.attrs.end());
  signature.attrs = std::move(attrs);
  return signature;
}

}  // namespace deep_ep
