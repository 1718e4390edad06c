import ctypes
import os
from collections.abc import Iterator

import op_definitions
import pytest
from cann import stand_in
from ranks import RankPool
from xdist import is_xdist_worker

from tools.twin import kernels, native

if stand_in.in_use():
    # The ranks inherit it.
    os.environ.setdefault("DEEP_EP_KERNELS", str(stand_in.BUILD / "lib" / "libhost_kernels.so"))


# In every process that has used an NPU a thread of torch_npu's asks every microsecond whether there is something to
# free. The kernel may let whatever this process starts sleep a millisecond longer than it asks for.
PR_SET_TIMERSLACK = 29
ctypes.CDLL(None).prctl(PR_SET_TIMERSLACK, ctypes.c_ulong(1_000_000), 0, 0, 0)


def pytest_sessionstart(session: pytest.Session) -> None:
    """Builds what most tests need before there are workers: one that waits for another's build seems to hang."""
    if not is_xdist_worker(session) and native.torch_npu_dir() is not None:
        kernels.build()
        op_definitions.build()


@pytest.fixture(scope="module")
def ranks() -> Iterator[RankPool]:
    """Up to 8, for kernels on the twin: they have no process group."""
    kernels.build()
    pool = RankPool(8, init=False)
    yield pool
    pool.close()
