// CANN's questions to the hardware, answered from the fe::PlatFormInfos that the tiling context was given.
#pragma once

#include "exe_graph/runtime/tiling_context.h"

namespace platform_ascendc {

enum class CoreMemType { L0_A = 0, L0_B = 1, L0_C = 2, L1 = 3, L2 = 4, UB = 5, HBM = 6 };

class PlatformAscendC {
 public:
  explicit PlatformAscendC(fe::PlatFormInfos* platform) : platform_(platform) {}

  uint32_t GetCoreNumAiv() const { return platform_->vector_cores; }
  void GetCoreMemSize(const CoreMemType& type, uint64_t& size) const {
    size = type == CoreMemType::UB ? platform_->unified_buffer_bytes : 0;
  }
  // What AscendC itself wants of every workspace, in front of the operator's own part.
  uint32_t GetLibApiWorkSpaceSize() const { return 16 << 20; }

 private:
  fe::PlatFormInfos* platform_;
};

}  // namespace platform_ascendc
