// low_latency_combine: brings the rows of low_latency_dispatch back. layout_range is how far each source's rows reach.
#include <algorithm>

#include "definition.h"
#include "device/window_map.h"

namespace ops {

using namespace deep_ep;

class DeepEpLowLatencyCombine : public Operator<DeepEpLowLatencyCombine> {
 public:
  using Operator::Operator;

  static Signature signature() {
    Signature signature =
        communicating({Rows::summed,
                       {{"x", Elements::rows, "NH"}, kTopkIdx, kTopkWeights, kRecvSrcIdx, kLayoutRange, kSendHead},
                       {{"combined_x", Elements::rows, "TH"}},
                       {}});
    signature.max_tokens = max_tokens;
    signature.require = require;
    return signature;
  }

 private:
  // M, of which low_latency_dispatch makes N.
  static int64_t max_tokens(const Sizes& sizes) {
    return sizes['N'] / sizes['R'] / std::max(std::min(sizes['K'], sizes['L']), int64_t{1});
  }

  static void require(Sizes& sizes) {
    if (sizes['N'] < 0 || sizes['K'] < 0) return;
    const int64_t marks = PlaceMap::marks(std::min(sizes['K'], sizes['R']));
    sizes.require(max_tokens(sizes) <= WindowMap::kMarks / marks, "x", "has rows of more tokens than can be marked");
  }
};

OP_ADD(DeepEpLowLatencyCombine);

}  // namespace ops
