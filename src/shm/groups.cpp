#include "groups.h"

#include <map>
#include <mutex>
#include <utility>

#include "error.h"
#include "per_process.h"
#include "thread_calls.h"

namespace deep_ep {
namespace groups {
namespace {

struct Registry {
  std::mutex mutex;
  std::map<std::string, std::shared_ptr<Group>> by_name;

  std::shared_ptr<Group> find(const std::string& name) {
    std::lock_guard lock(mutex);
    const auto found = by_name.find(name);
    return found == by_name.end() ? nullptr : found->second;
  }
};

Registry& registry() { return PerProcess<Registry>::get(); }

Make& make() {
  static Make& instance = *new Make;
  return instance;
}

// If that fails it fails on all ranks, as an operation would that all have entered.
void make_windows(const char* op, const std::string& name) {
  ThreadCalls& calls = ThreadCalls::mine();
  const ThreadCalls before = calls;
  ++calls.entered;
  calls.completed = false;
  if (const std::string wrong = make()(op, name); !wrong.empty()) throw Error(wrong);
  calls = before;
}

}  // namespace

void put(const std::string& name, std::shared_ptr<Group> group) {
  std::lock_guard lock(registry().mutex);
  registry().by_name[name].swap(group);
}

void set_make(Make function) { make() = std::move(function); }

std::shared_ptr<Group> get(const char* op, const std::string& name) {
  std::shared_ptr<Group> found = registry().find(name);
  if (!found && make()) {
    make_windows(op, name);
    found = registry().find(name);
  }
  if (!found && PerProcess<Registry>::forked())
    throw Error(str("deep_ep.", op, ": this process was forked from a rank and has no part in its group '", name,
                    "'; call the op in the rank itself, or make a group of such processes"));
  if (!found)
    throw Error(str("deep_ep.", op, ": there are no windows for the group '", name,
                    "' on this rank; call deep_ep.init(group) or make a deep_ep.Buffer first"));
  return found;
}

void remove(const std::string& name, const Group* group) {
  std::shared_ptr<Group> removed;  // destroyed after the lock is released
  std::lock_guard lock(registry().mutex);
  const auto found = registry().by_name.find(name);
  if (found == registry().by_name.end() || found->second.get() != group) return;
  removed = std::move(found->second);
  registry().by_name.erase(found);
}

}  // namespace groups
}  // namespace deep_ep
