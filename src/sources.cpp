// Which sources this library was made of.
#include "c_boundary.h"

// DEEP_EP_SOURCES: their digest, from CMakeLists.txt.
DEEP_EP_API const char* deep_ep_sources() noexcept { return DEEP_EP_SOURCES; }
