// What libraries of kernels (kernels.h) have in common.
#pragma once

#include <algorithm>
#include <cctype>
#include <cstdint>
#include <string>
#include <vector>

#include "c_boundary.h"
#include "device/window_map.h"
#include "kernels.h"

namespace deep_ep {

// The operator of a torch op, low_latency_dispatch's being DeepEpLowLatencyDispatch.
inline std::string definition_name(const std::string& op) {
  std::string name = "DeepEp";
  bool is_first = true;
  for (char c : op) {
    if (c != '_') name += is_first ? static_cast<char>(std::toupper(c)) : c;
    is_first = c == '_';
  }
  return name;
}

// windows: their addresses, by rank. cycles_per_ms: of the clock that kernels read.
inline void fill_table(int64_t* table, int32_t rank, const std::vector<uint64_t>& windows, uint64_t bytes,
                       int64_t timeout_ms, int64_t cycles_per_ms) {
  std::fill_n(table, DEEP_EP_TABLE_HEADER, 0);
  table[WindowMap::kVersion] = DEEP_EP_KERNELS_VERSION;
  table[WindowMap::kRank] = rank;
  table[WindowMap::kRanks] = static_cast<int64_t>(windows.size());
  table[WindowMap::kBytes] = static_cast<int64_t>(bytes);
  table[WindowMap::kDeadline] = timeout_ms * cycles_per_ms;
  std::copy(windows.begin(), windows.end(), table + WindowMap::kHeader);
}

static_assert(kErrorBytes == DEEP_EP_TEXT_BYTES);

}  // namespace deep_ep
