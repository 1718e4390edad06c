import os
import shutil
import tempfile
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, settings
from ranks import RankPool

# Examples per property. The first two always draw the same examples; "long" draws new ones, and prints how to
# reproduce a failure.
settings.register_profile(
    "default", max_examples=200, derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.register_profile("quick", settings.get_profile("default"), max_examples=20)
settings.register_profile(
    "long", settings.get_profile("default"), max_examples=5000, derandomize=False, print_blob=True
)


def pytest_configure(config: pytest.Config) -> None:
    tier = "quick" if "not slow" in config.getoption("markexpr") else "default"
    settings.load_profile(os.environ.get("DEEP_EP_HYPOTHESIS_PROFILE", tier))
    # The on-disk caches of torch.compile do not see that an op's fake or backward changed.
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = tempfile.mkdtemp(prefix="deep_ep-inductor-")


def pytest_unconfigure() -> None:
    shutil.rmtree(os.environ.pop("TORCHINDUCTOR_CACHE_DIR"), ignore_errors=True)


@pytest.fixture(scope="session")
def pool() -> Iterator[RankPool]:
    pool = RankPool()
    yield pool
    pool.close()
