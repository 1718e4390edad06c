// Which groups this process is in.
#pragma once

#include <functional>
#include <memory>
#include <string>

#include "group.h"

namespace deep_ep {

// Groups by name, as torch.distributed names them. A name that comes back replaces the group it had.
namespace groups {
void put(const std::string& name, std::shared_ptr<Group> group);
// Throws Error if there is none of this name, and `make` makes none.
std::shared_ptr<Group> get(const char* op, const std::string& name);
// What makes the windows of a group whose first operation on this rank is `op`, if it has windows to be made:
// collective. Returns what is wrong, or nothing.
using Make = std::function<std::string(const char* op, const std::string& name)>;
void set_make(Make make);
// Forgets `group` if it is still the one of this name.
void remove(const std::string& name, const Group* group);
}  // namespace groups

}  // namespace deep_ep
