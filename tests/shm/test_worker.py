"""The thread of a group, which works off what it is given, and who comes before it (src/shm/worker.h)."""

import subprocess
from pathlib import Path

SHM = Path(__file__).parents[2] / "src/shm"

PROGRAM = """
#include <cassert>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "worker.h"

using deep_ep::Worker;

std::mutex mutex;
std::vector<std::pair<int, std::thread::id>> done;

std::shared_ptr<Worker::Task> task(int number, std::shared_future<void> after = {},
                                   std::promise<void>* begun = nullptr) {
  return std::make_shared<Worker::Task>(std::packaged_task<void()>([=] {
    if (begun != nullptr) begun->set_value();
    if (after.valid()) after.wait();
    std::lock_guard lock(mutex);
    done.emplace_back(number, std::this_thread::get_id());
  }));
}

int main() {
  Worker worker;
  std::promise<void> begun, release;
  const auto first = task(1, release.get_future().share(), &begun);
  worker.run(first);
  begun.get_future().wait();
  // The thread is in the first one: whoever wants another one does that, once, and it alone.
  const auto second = task(2), third = task(3), last = task(4);
  const auto held = std::make_shared<int>(0);
  const auto wrong = std::make_shared<Worker::Task>(
      std::packaged_task<void()>([held] { throw std::runtime_error("wrong"); }));
  for (const auto& one : {second, third, wrong, last}) worker.run(one);
  assert(!first->run());
  assert(third->run() && !third->run());
  std::string heard;
  try {
    wrong->run();
  } catch (const std::runtime_error& error) {
    heard = error.what();
  }
  assert(heard == "wrong");
  assert(held.use_count() == 1);  // what it held goes when it is done, not when the thread comes to it
  assert(done.size() == 1 && done[0] == std::pair(3, std::this_thread::get_id()));
  release.set_value();
  std::promise<void> end;
  worker.run(task(5, {}, &end));
  end.get_future().wait();
  while (true) {
    std::lock_guard lock(mutex);
    if (done.size() == 5) break;
  }
  // The others are the thread's, in their order.
  const std::vector<int> order{3, 1, 2, 4, 5};
  for (size_t i = 0; i < order.size(); ++i) {
    assert(done[i].first == order[i]);
    assert((done[i].second == std::this_thread::get_id()) == (i == 0));
  }
}
"""


def test_who_needs_a_task_does_it_if_nobody_has_begun(tmp_path: Path) -> None:
    source, built = tmp_path / "worker.cpp", tmp_path / "worker"
    source.write_text(PROGRAM)
    options = "-std=c++20", f"-I{SHM.parent}", f"-I{SHM}", "-pthread", "-UNDEBUG"
    subprocess.run(["g++", *options, source, SHM / "worker.cpp", "-o", built], check=True)
    subprocess.run([built], check=True)
