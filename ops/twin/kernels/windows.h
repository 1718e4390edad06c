// Windows of the ranks of a host, which are processes: one piece of shared memory per communicator.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "twin.h"

namespace twin::kernels {

class Windows {
 public:
  // Collective: waits for the other ranks, of which it looks for at most timeout_ms times, a millisecond apart. Every
  // window is full of zeros.
  //
  // std::runtime_error: no memory, or a rank has not come.
  Windows(const std::string& communicator, int rank, int size, uint64_t bytes, int64_t timeout_ms);
  // Whoever waits for this rank finds that it is late.
  ~Windows();
  Windows(const Windows&) = delete;
  Windows& operator=(const Windows&) = delete;

  int rank() const { return rank_; }
  int size() const { return size_; }
  uint64_t bytes() const { return bytes_; }
  uint8_t* window(int rank) const;
  // Of all ranks. A window is kParts regions, so that what goes to each is counted apart; part p of the window of rank
  // r is region r * kParts + p.
  enum Part { kControl, kFlags, kSlots, kParts };
  std::vector<Region> regions() const;
  Group group() const;

 private:
  struct Header;
  static uint64_t header_bytes(int size);

  int rank_, size_;
  uint64_t bytes_;
  uint64_t mapped_bytes_ = 0;
  void* base_ = nullptr;
};

}  // namespace twin::kernels
