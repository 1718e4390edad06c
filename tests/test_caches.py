"""torch.compile's on-disk caches never serve a graph of another strategy, another number of ranks or other formulas.

Every case is a process of its own; all share one cache directory, and the first one repeated must hit it, or the tests
would show nothing.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import deep_ep

PROGRAM = """
import json, os, sys
package, num_ranks = sys.argv[1], int(sys.argv[2])
sys.meta_path[:] = [finder for finder in sys.meta_path if "ScikitBuild" not in type(finder).__name__]
sys.path.insert(0, package)

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import deep_ep
from deep_ep import groups

def run(rank, store_port):
    torch.set_num_threads(1)
    store = dist.TCPStore("127.0.0.1", store_port, is_master=False)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=num_ranks)
    mode = os.environ["DEEP_USE_MODE"]
    deep_ep.init()
    group = dist.group.WORLD.group_name

    @torch.compile(fullgraph=True, dynamic=False)
    def step(x, weights, ids):
        out = deep_ep.dispatch(x, ids, weights, num_experts=num_ranks, group=group)
        return deep_ep.combine(out.recv_x, out.handle, group=group)  # no kernel that would need a C++ compiler

    x = torch.ones(4, 8, requires_grad=True)
    weights = torch.full((4, 1), 0.5, requires_grad=True)
    ids = torch.arange(4).unsqueeze(1) % num_ranks
    combined = step(x, weights, ids)
    combined.backward(torch.ones_like(x))
    if rank == 0:
        hits = torch._dynamo.utils.counters["aot_autograd"]["autograd_cache_hit"]
        native = groups.op_log()[1] if mode == "default" else 0
        print(json.dumps({"sum": combined.sum().item(), "grad": x.grad.mean().item(), "hits": hits, "native": native}))
    dist.barrier()
    dist.destroy_process_group()

if __name__ == "__main__":
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    if num_ranks == 1:
        run(0, store.port)
    else:
        mp.spawn(run, (store.port,), num_ranks)
"""


@pytest.mark.slow
def test_caches(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    package = tmp_path / "site" / "deep_ep"
    for folder in map(Path, deep_ep.__path__):
        shutil.copytree(folder, package, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__"))

    def run(mode: str, num_ranks: int) -> dict[str, float]:
        environment = os.environ | {
            "DEEP_USE_MODE": mode,
            "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache"),
            "GLOO_SOCKET_IFNAME": "lo",
        }
        command = [sys.executable, str(program), str(package.parent), str(num_ranks)]
        result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
        assert result.returncode == 0, result.stderr
        return json.loads(result.stdout)

    assert run("default", 1) == {"sum": 16.0, "grad": 0.5, "hits": 0, "native": 5}
    assert run("default", 1) == {"sum": 16.0, "grad": 0.5, "hits": 1, "native": 5}
    assert run("alltoall", 1) == {"sum": 16.0, "grad": 0.5, "hits": 0, "native": 0}
    assert run("default", 2) == {"sum": 16.0, "grad": 0.5, "hits": 0, "native": 5}

    formula = package / "ops" / "dispatch.py"
    text = formula.read_text()
    assert "return grad_x, None" in text
    formula.write_text(text.replace("return grad_x, None", "return 2 * grad_x, None"))
    assert run("default", 1) == {"sum": 16.0, "grad": 1.0, "hits": 0, "native": 5}
