// Copies of rows into other ranks' memory.
#pragma once

#include <cstddef>
#include <cstdint>

namespace deep_ep {

// What the caches hold of memory that was just written, for all processes of this host together: at most the last-level
// cache, of which a virtual machine may have only the part that goes with its cores.
uint64_t cached_bytes();

using CopyRow = void(std::byte* to, const std::byte* from, uint64_t bytes);

// memcpy; or, past the caches, a copy that does not read the lines that it writes: twice as fast where they are not in
// the caches, and several times slower where they are. Call copies_done() before others are told.
CopyRow* copy_row(bool past_caches);
void copies_done(bool past_caches);

}  // namespace deep_ep
