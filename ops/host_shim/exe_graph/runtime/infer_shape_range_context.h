#pragma once

#include "exe_graph/runtime/extended_kernel_context.h"

namespace gert {

// The ranges of the inputs are their shapes: the runtime asks when all shapes are known.
class InferShapeRangeContext : public ExtendedKernelContext {
 public:
  // `min` has the outputs that are as small as they can be; those of `max` are as large as they can be.
  InferShapeRangeContext(Node* min, Node* max) : ExtendedKernelContext(max) {
    for (Tensor& tensor : max->inputs) inputs_.emplace_back(&tensor.mutable_shape(), &tensor.mutable_shape());
    for (size_t i = 0; i < max->outputs.size(); ++i)
      outputs_.emplace_back(&min->outputs[i].mutable_shape(), &max->outputs[i].mutable_shape());
  }

  const Range<Shape>* GetInputShapeRange(size_t index) const {
    return index < inputs_.size() ? &inputs_[index] : nullptr;
  }
  Range<Shape>* GetOutputShapeRange(size_t index) { return index < outputs_.size() ? &outputs_[index] : nullptr; }

 private:
  std::vector<Range<Shape>> inputs_, outputs_;
};

}  // namespace gert
