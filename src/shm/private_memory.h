// Memory of this process alone, for results. What is given back is used again, until nobody has used it for a while.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

namespace deep_ep {

// In huge pages where there are some.
std::shared_ptr<std::byte> private_memory(uint64_t bytes);

// In pages that are in no other memory. There may be anything in them.
std::shared_ptr<std::byte> pages(uint64_t bytes);

struct Part {
  uint64_t begin, end;
};

// Makes memory of `pages` 0, but for the parts, in their order, that are about to be written. That takes neither time
// nor memory, unless memory is locked; what is written may have memory from before.
void clear_but(std::byte* memory, uint64_t bytes, const std::vector<Part>& written);

// Of which all beyond the first `used` bytes are 0. That takes neither time nor memory until somebody touches it,
// unless memory is locked. In the first bytes there may be anything.
std::shared_ptr<std::byte> zeros_behind(uint64_t used, uint64_t bytes);

// Bytes that are kept to be used again.
uint64_t spare_private_memory();

// Whether the process may have so many bytes more.
bool can_map(uint64_t bytes);

}  // namespace deep_ep
