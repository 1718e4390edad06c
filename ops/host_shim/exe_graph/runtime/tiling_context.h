#pragma once

#include "exe_graph/runtime/extended_kernel_context.h"

namespace fe {

// What platform_ascendc::PlatformAscendC reads.
struct PlatFormInfos {
  uint32_t vector_cores;
  uint64_t unified_buffer_bytes;
};

}  // namespace fe

namespace gert {

// The tensors are those of the node; what the tiling function sets is read from the public members, the shim's own.
class TilingContext : public ExtendedKernelContext {
 public:
  static constexpr size_t kMaxTilingBytes = 2048;  // what CANN reserves unless a registration asks for more

  TilingContext(Node* node, fe::PlatFormInfos* platform) : ExtendedKernelContext(node), platform_(platform) {}

  const StorageShape* GetInputShape(size_t index) const {
    return input(index) ? &input(index)->storage_shape() : nullptr;
  }
  const StorageShape* GetOutputShape(size_t index) const {
    return output(index) ? &output(index)->storage_shape() : nullptr;
  }
  fe::PlatFormInfos* GetPlatformInfo() const { return platform_; }

  template <typename T>
  T* GetTilingData() {
    if (sizeof(T) > kMaxTilingBytes) return nullptr;
    tiling_bytes = sizeof(T);
    return reinterpret_cast<T*>(tiling);
  }
  size_t* GetWorkspaceSizes(size_t count) {
    workspaces.resize(count);
    return workspaces.data();
  }
  ge::graphStatus SetBlockDim(uint32_t blocks) {
    block_dim = blocks;
    return ge::GRAPH_SUCCESS;
  }
  ge::graphStatus SetScheduleMode(uint32_t mode) {
    schedule_mode = mode;
    return ge::GRAPH_SUCCESS;
  }

  alignas(8) unsigned char tiling[kMaxTilingBytes] = {};
  size_t tiling_bytes = 0;
  std::vector<size_t> workspaces;
  uint32_t block_dim = 0;
  uint32_t schedule_mode = 0;

 private:
  fe::PlatFormInfos* platform_;
};

}  // namespace gert
