import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from patience import Watch
from ranks import RankPool

from tools.twin import native

# Examples per property. The first two always draw the same examples; "long" draws new ones, and prints how to
# reproduce a failure.
settings.register_profile(
    "default", max_examples=200, derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.register_profile("quick", settings.get_profile("default"), max_examples=20)
settings.register_profile(
    "long", settings.get_profile("default"), max_examples=5000, derandomize=False, print_blob=True
)


# Inductor without what takes it long and matters here least: worker processes, and vector units, for which it compiles
# and runs a program per kind. Every process that a test starts has these, however late it loads inductor.
QUICK_INDUCTOR = {"TORCHINDUCTOR_COMPILE_THREADS": "1", "TORCHINDUCTOR_VEC_ISA_OK": "0"}


# They import for seconds, and all of their tests are slow.
SLOW_MODULES = ("test_huggingface.py", "test_megatron.py", "test_training.py")


def is_quick(config: pytest.Config) -> bool:
    return "not slow" in config.getoption("markexpr")


def is_worker(config: pytest.Config) -> bool:
    """Whether this is a process that pytest-xdist has started, and not the one that started it."""
    return hasattr(config, "workerinput")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--complete",
        action="store_true",
        help="tests fail, and are not skipped, that need a torch-npu wheel and have none",
    )


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("torch_npu") and native.torch_npu_dir() is None:
        stop = pytest.fail if item.config.getoption("--complete") else pytest.skip
        stop(
            "no torch-npu wheel, whose headers ops/ is compiled with: make test installs one in .venv-npu, and "
            "TORCH_NPU_DIR may name another"
        )


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    return (is_quick(config) and collection_path.name in SLOW_MODULES) or None


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(Watch())
    tier = "quick" if is_quick(config) else "default"
    settings.load_profile(os.environ.get("DEEP_EP_HYPOTHESIS_PROFILE", tier))
    os.environ.update(QUICK_INDUCTOR)
    if not is_worker(config):
        # The on-disk caches of torch.compile do not see that an op's fake or backward changed.
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = tempfile.mkdtemp(prefix="deep_ep-inductor-")


def pytest_unconfigure(config: pytest.Config) -> None:
    if not is_worker(config):
        shutil.rmtree(os.environ.pop("TORCHINDUCTOR_CACHE_DIR"), ignore_errors=True)


@pytest.fixture(scope="session")
def pool() -> Iterator[RankPool]:
    pool = RankPool()
    yield pool
    pool.close()
