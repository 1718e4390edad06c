"""torch.compile's on-disk caches never serve a graph of another strategy, another number of ranks or other formulas.

Every case has processes of its own, forks of one that has imported torch and nothing of deep_ep; all share one cache
directory, and the first one repeated must hit it, or the tests would show nothing.
"""

import itertools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch
from ranks import RankContext, RankPool
from torch.compiler import config as compiler_config

import deep_ep
from deep_ep import _compile

PROGRAM = """
import json, multiprocessing, os, sys
sys.meta_path[:] = [finder for finder in sys.meta_path if "ScikitBuild" not in type(finder).__name__]
sys.path.insert(0, sys.argv[1])

import torch
import torch._inductor.compile_fx
import torch.distributed as dist

def run(rank, mode, num_ranks, path):
    os.environ["DEEP_USE_MODE"] = mode
    import deep_ep
    from deep_ep import groups

    assert deep_ep.__file__.startswith(sys.argv[1])
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(path, num_ranks), rank=rank, world_size=num_ranks)
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

fork = multiprocessing.get_context("fork")
for line in sys.stdin:
    mode, num_ranks, path = json.loads(line)
    ranks = [fork.Process(target=run, args=(rank, mode, num_ranks, path)) for rank in range(num_ranks)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join()
    if any(process.exitcode for process in ranks):
        sys.exit("a rank has failed")
"""


@pytest.mark.slow
def test_caches(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    package = tmp_path / "site" / "deep_ep"
    for folder in map(Path, deep_ep.__path__):
        shutil.copytree(folder, package, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__"))

    environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache"), "GLOO_SOCKET_IFNAME": "lo"}
    errors = tmp_path / "errors"
    with (
        errors.open("w") as stderr,
        subprocess.Popen(
            [sys.executable, str(program), str(package.parent)],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
        ) as process,
    ):
        numbers = itertools.count()

        def run(mode: str, num_ranks: int) -> dict[str, float]:
            process.stdin.write(json.dumps([mode, num_ranks, str(tmp_path / f"store-{next(numbers)}")]) + "\n")
            process.stdin.flush()
            line = process.stdout.readline()
            assert line, errors.read_text()
            return json.loads(line)

        assert run("default", 1) == {"sum": 16.0, "grad": 0.5, "hits": 0, "native": 5}
        assert run("default", 1) == {"sum": 16.0, "grad": 0.5, "hits": 1, "native": 5}
        assert run("alltoall", 1) == {"sum": 16.0, "grad": 0.5, "hits": 0, "native": 0}
        assert run("default", 2) == {"sum": 16.0, "grad": 0.5, "hits": 0, "native": 5}

        formula = package / "ops" / "dispatch.py"
        text = formula.read_text()
        assert "return grad_x, None" in text
        formula.write_text(text.replace("return grad_x, None", "return 2 * grad_x, None"))
        assert run("default", 1) == {"sum": 16.0, "grad": 1.0, "hits": 0, "native": 5}


def look_up(ctx: RankContext) -> tuple[int, int]:
    """Compiles one function anew. Returns how many graphs came from the cache of AOTAutograd, and from inductor's."""
    group = ctx.prepared_group("default").group_name

    def step(x: torch.Tensor) -> torch.Tensor:
        out = deep_ep.dispatch(x, torch.zeros(5, 1, dtype=torch.int64), num_experts=1, group=group)
        return deep_ep.combine(out.recv_x, out.handle, group=group)

    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    x = torch.ones(5, 3)
    assert torch.equal(torch.compile(step, fullgraph=True)(x), x)
    counters = torch._dynamo.utils.counters
    return counters["aot_autograd"]["autograd_cache_hit"], counters["inductor"]["fxgraph_cache_hit"]


def check_tags_of_the_user(ctx: RankContext) -> None:
    def check() -> None:
        assert look_up(ctx) == (0, 0)
        assert look_up(ctx)[0] == 1
        with mock.patch.object(_compile, "python_digest", lambda: "another version"):
            assert look_up(ctx) == (0, 0)

    assert compiler_config.cache_key_tag == ""
    check()
    with compiler_config.patch(cache_key_tag="patched"):
        check()
    compiler_config.cache_key_tag = "set"
    try:
        check()
    finally:
        compiler_config.cache_key_tag = ""


@pytest.mark.slow
def test_tags_of_the_user(pool: RankPool) -> None:
    pool.run(1, check_tags_of_the_user)
