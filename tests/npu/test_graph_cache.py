"""Graphs in torchair's cache, which a second process loads, whose communicator has another name."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from cann import stand_in

PROGRAM = """
import sys
sys.path[:0] = {paths!r}
import ge_graphs
import torch, torch.distributed as dist, torchair.inference
import deep_ep
from deep_ep.npu import windows
from torchair.ge._ge_graph import GeGraph

folder, strategy, store = sys.argv[1:]
torch.npu.set_device(0)
dist.init_process_group("cpu:gloo,npu:hccl", rank=0, world_size=1, store=dist.FileStore(store, 1))
buffer = deep_ep.Buffer(dist.group.WORLD, low_latency_strategy=strategy, comm_alg="fullmesh_v1")

# GE's engine cannot be had: what it would load and run is looked at instead.
loaded = []
GeGraph.load = lambda graph, *args, **kwargs: loaded.append(graph)
GeGraph.compile = lambda graph: None
given = []
def run(graph, inputs, *args, **kwargs):
    given.append(inputs)
    return [torch.zeros(4, 16, dtype=torch.bfloat16, device="npu")]
GeGraph.run = run

class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.decode = torchair.inference.cache_compile(self._decode, cache_dir=folder, dynamic=False)

    def _decode(self, x, ids, weights):
        recv_x, _, handle, _, _ = buffer.low_latency_dispatch(x, ids, 8, 4, use_fp8=False)
        return buffer.low_latency_combine(recv_x, ids, weights, handle)[0]

    def __str__(self):
        return "Model"

x = torch.zeros(4, 16, dtype=torch.bfloat16).npu()
ids, weights = torch.zeros(4, 2, dtype=torch.int64).npu(), torch.zeros(4, 2).npu()
with torch.no_grad():
    Model().decode(x, ids, weights)
names = [op.attr[name].s.decode() for op in loaded[-1].op for name in ("group", "group_ep") if name in op.attr]
table = windows.table(dist.group.WORLD.group_name)
has_table = any(tensor.data_ptr() == table.data_ptr() for tensor in given[-1])
print(len(ge_graphs.recorded()), len(set(names)), names[0], windows.communicator(dist.group.WORLD), has_table)
assert "npugraph_ex.npu_fx_compiler" not in sys.modules  # loading it changes how the process takes signals
"""


def run(folder: Path, strategy: str, number: int) -> tuple[int, int, str, str, bool]:
    """Graphs made in a process, names of communicators in the graph that it runs, one of them, that of the process's
    own communicator, and whether the process's window table is among the graph's inputs."""
    tests = Path(__file__).resolve().parents[1]
    program = PROGRAM.format(paths=[str(tests / "npu"), str(tests)])
    arguments = [str(folder / "cache"), strategy, str(folder / f"store {number}")]
    environment = os.environ | {"PYTHONDONTWRITEBYTECODE": "1"}
    process = subprocess.run(
        [sys.executable, "-c", program, *arguments], capture_output=True, text=True, env=environment
    )
    assert process.returncode == 0, process.stderr
    made, names, name, own, has_table = process.stdout.splitlines()[-1].split()
    return int(made), int(names), name, own, has_table == "True"


@pytest.mark.skipif(not stand_in.in_use(), reason="takes the place of GE's engine")
@pytest.mark.parametrize("strategy", ["default", "ops"])
def test_another_process_with_another_name(tmp_path: Path, strategy: str) -> None:
    first = run(tmp_path, strategy, 1)
    second = run(tmp_path, strategy, 2)
    assert (first[0], second[0]) == (1, 0)  # the second process made no graph
    assert first[3] != second[3]
    for _, names, name, own, has_table in (first, second):
        assert names == 1
        assert name == own
        assert has_table == (strategy == "default")
