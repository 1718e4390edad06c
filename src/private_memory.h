// Memory of this process alone, for results.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>

namespace deep_ep {

// In huge pages where there are some. What is given back is used again for as many bytes.
std::shared_ptr<std::byte> private_memory(uint64_t bytes);

// Of which all beyond the first `used` bytes are 0. That takes neither time nor memory until somebody touches it. What
// is given back is used again, with what was in its first bytes.
std::shared_ptr<std::byte> zeros_behind(uint64_t used, uint64_t bytes);

}  // namespace deep_ep
