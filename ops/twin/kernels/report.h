// What a launch has done, as JSON: Launch of tools/twin/kernels.py.
#pragma once

#include <deque>
#include <string>

#include "windows.h"

namespace twin::kernels {

// `windows`: of the launch's group, whose regions come first in the launch; nullptr if it has none.
std::string describe(const std::string& op, const Settings& settings, const Windows* windows, const Report& report);

std::string joined(const std::deque<std::string>& values);

}  // namespace twin::kernels
