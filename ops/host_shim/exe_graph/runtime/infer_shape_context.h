#pragma once

#include "exe_graph/runtime/extended_kernel_context.h"

namespace gert {

class InferShapeContext : public ExtendedKernelContext {
 public:
  using ExtendedKernelContext::ExtendedKernelContext;

  const Shape* GetInputShape(size_t index) const { return input(index) ? &input(index)->GetOriginShape() : nullptr; }
  // Without data unless the input is value-dependent and known.
  const Tensor* GetInputTensor(size_t index) const { return input(index); }
  Shape* GetOutputShape(size_t index) { return output(index) ? &output(index)->mutable_shape() : nullptr; }
};

}  // namespace gert
