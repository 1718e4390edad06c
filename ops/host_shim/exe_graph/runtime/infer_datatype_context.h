#pragma once

#include "exe_graph/runtime/extended_kernel_context.h"

namespace gert {

class InferDataTypeContext : public ExtendedKernelContext {
 public:
  using ExtendedKernelContext::ExtendedKernelContext;

  ge::DataType GetInputDataType(size_t index) const {
    return input(index) ? input(index)->GetDataType() : ge::DT_UNDEFINED;
  }
  ge::graphStatus SetOutputDataType(size_t index, ge::DataType dtype) {
    if (!output(index)) return ge::GRAPH_FAILED;
    output(index)->set_dtype(dtype);
    return ge::GRAPH_SUCCESS;
  }
};

}  // namespace gert
