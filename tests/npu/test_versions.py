"""`import deep_ep` works on CPU whatever is wrong with torch_npu or CANN, and says once what that is."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from cann import stand_in

CODE = """
import sys, warnings
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import deep_ep, torch, torch.distributed as dist
told = [str(w.message) for w in caught if "deep_ep" in str(w.message)]
assert len(told) <= 1, told
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
deep_ep.init()
ids = torch.zeros(2, 1, dtype=torch.int64)
out = deep_ep.dispatch(torch.ones(2, 8), ids, num_experts=1)
assert torch.equal(deep_ep.combine(out.recv_x, out.handle), torch.ones(2, 8))
try:
    deep_ep.npu.backend()
    print("torchair works")
except RuntimeError as error:
    print(error)
dist.destroy_process_group()
print("torch_npu" in sys.modules, told[0] if told else "nothing")
"""


def imported(*, folder: Path | None = None, **environment: str) -> tuple[str, str]:
    """What a new process says of torchair, and what it warned of."""
    settings = {name: value for name, value in os.environ.items() if name != "TORCH_DEVICE_BACKEND_AUTOLOAD"}
    if folder is not None:
        settings["PYTHONPATH"] = str(folder)
    run = subprocess.run([sys.executable, "-c", CODE], env=settings | environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    *_, torchair, warning = run.stdout.splitlines()
    return torchair, warning


def test_all_is_well() -> None:
    assert imported() == ("torchair works", "True nothing")


NOT_LOADED = "deep_ep.npu: torch_npu is not loaded, which has torchair"


@pytest.mark.skipif(not stand_in.in_use(), reason="takes CANN away")
def test_without_cann() -> None:
    torchair, warning = imported(LD_LIBRARY_PATH="")
    assert torchair.startswith(NOT_LOADED)
    assert warning.startswith(
        "False deep_ep: torch_npu is left out, and NPUs with it: CANN is not, or not wholly, where"
    )
    assert "libascendcl.so" in warning and "libge_runner.so" in warning and "set_env.sh" in warning


@pytest.mark.skipif(not stand_in.in_use(), reason="takes part of CANN away")
def test_with_half_of_cann(tmp_path: Path) -> None:
    for library in (stand_in.BUILD / "lib").iterdir():
        if library.name != "libhccl.so":
            (tmp_path / library.name).symlink_to(library)
    torchair, warning = imported(LD_LIBRARY_PATH=str(tmp_path))
    assert torchair.startswith(NOT_LOADED)
    assert "libhccl.so" in warning and "libascendcl.so" not in warning


def test_of_another_version(tmp_path: Path) -> None:
    """A torch_npu that comes first on the path, with the entry point through which torch loads it."""
    (tmp_path / "torch_npu").mkdir()
    (tmp_path / "torch_npu" / "__init__.py").write_text("raise ImportError('of another torch')\n")
    metadata = tmp_path / "torch_npu-2.12.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: torch-npu\nVersion: 2.12.0\n")
    (metadata / "entry_points.txt").write_text("[torch.backends]\ntorch_npu = torch_npu:_autoload\n")
    torchair, warning = imported(folder=tmp_path)
    assert torchair.startswith(NOT_LOADED)
    assert "torch_npu 2.12.0 does not belong to torch 2.13.0+cpu; install torch-npu==2.13.0" in warning


def test_the_user_has_left_it_out() -> None:
    torchair, warning = imported(TORCH_DEVICE_BACKEND_AUTOLOAD="0")
    assert torchair.startswith(NOT_LOADED)
    assert warning == "False nothing"
