// Device memory.
#pragma once

#include <cstddef>

namespace cann {

// Throws unless the range keeps inside the live allocation that it starts in. One of the device must start in one.
void check_range(const void* address, size_t bytes, bool is_device);

}  // namespace cann
