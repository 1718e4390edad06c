"""src/proc_stat.h: what a process or a thread does that may end at any time."""

import subprocess
from pathlib import Path

SOURCE = Path(__file__).resolve().parents[2] / "src"

# As of a thread that ends between the two, a folder can be opened and not be read.
PROGRAM = """
#include <unistd.h>

#include <cassert>

#include "proc_stat.h"

int main() {
  assert(deep_ep::ProcStat("/proc/self/stat").state == 'R');
  assert(deep_ep::ProcStat::of_process(getpid()).started != 0);
  for (const char* none : {"/proc/no process/stat", "/proc"}) {
    const deep_ep::ProcStat stat(none);
    assert(stat.state == 0 && stat.started == 0);
  }
}
"""


def test_what_cannot_be_read_is_gone(tmp_path: Path) -> None:
    source, built = tmp_path / "proc_stat.cpp", tmp_path / "proc_stat"
    source.write_text(PROGRAM)
    subprocess.run(["g++", "-std=c++20", f"-I{SOURCE}", "-UNDEBUG", source, "-o", built], check=True)
    subprocess.run([built], check=True)
