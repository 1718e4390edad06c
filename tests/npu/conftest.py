import os
from collections.abc import Iterator

import pytest
from cann import stand_in
from ranks import RankPool

from tools.twin import kernels

if stand_in.in_use():
    # The ranks inherit it.
    os.environ.setdefault("DEEP_EP_KERNELS", str(stand_in.BUILD / "lib" / "libhost_kernels.so"))


@pytest.fixture(scope="module")
def ranks() -> Iterator[RankPool]:
    """Up to 8, for kernels on the twin: they have no process group."""
    kernels.build()
    pool = RankPool(8, init=False)
    yield pool
    pool.close()
