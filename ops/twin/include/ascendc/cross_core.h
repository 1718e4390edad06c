// Flags between cube and vector cores of a kernel with KERNEL_TYPE_MIX_AIC_1_2 (rule 10).
#pragma once

#include "sync.h"

namespace AscendC {

template <uint8_t modeId, pipe_t pipe>
void CrossCoreSetFlag(uint16_t id, Site at = Site::here()) {
  static_assert(pipe != PIPE_ALL, "a flag follows one pipe");
  Core::current().set_cross_flag(modeId, pipe_of(pipe), id, at);
}

template <uint8_t modeId = 0, pipe_t pipe = PIPE_S>
void CrossCoreWaitFlag(uint16_t id, Site at = Site::here()) {
  static_assert(pipe != PIPE_ALL, "a flag holds one pipe");
  Core::current().wait_cross_flag(modeId, pipe_of(pipe), id, at);
}

}  // namespace AscendC
