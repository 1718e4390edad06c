"""Ops on NPU tensors: checks, outputs, the current stream and the task queue, down to a library of kernels. Over the
stand-in for CANN the kernels are host functions on the stream (tests/host_kernels), so results can be compared.

T local tokens · H hidden · K top-k · E experts · R ranks · M num_max_dispatch_tokens_per_rank.
"""

import ast
import os
import subprocess
import sys
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch_npu  # noqa: F401
import torchair
from cann import stand_in
from cases import Case, assert_same, make_inputs
from op_calls import error_of
from ranks import WORLD_SIZE, RankContext, RankPool
from torch import Tensor

import deep_ep
from deep_ep.npu import windows

H, K, L, M = 16, 2, 4, 9


_groups: dict[int, dist.ProcessGroup] = {}


def make_groups(ctx: RankContext) -> None:
    """Groups of all sizes whose ranks have an NPU each, in this rank's process. Collective over all ranks."""
    if not _groups:
        torchair.get_npu_backend()  # before npugraph_ex: each patches torch, and only npugraph_ex looks before
        torch.npu.set_device(ctx.rank)
        for size in range(1, WORLD_SIZE + 1):
            _groups[size] = dist.new_group(list(range(size)), backend="cpu:gloo,npu:hccl")


@pytest.fixture
def npus(pool: RankPool) -> RankPool:
    pool.run(WORLD_SIZE, make_groups)
    return pool


def npu_group(ctx: RankContext) -> dist.ProcessGroup:
    """The group of this run's ranks, prepared for the ops."""
    deep_ep.init(_groups[ctx.size], num_bytes=8 << 20)
    return _groups[ctx.size]


def inputs_of(ctx: RankContext, tokens: tuple[int, ...], dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    case = Case(tokens, H=H, K=K, local_experts=L, dtype=dtype, ids="distinct")
    return tuple(given[ctx.rank] for given in make_inputs(case)[:3])


def on_npu(tensor: Tensor) -> Tensor:
    return tensor.npu()


def on_cpu(tensor: Tensor) -> Tensor:
    return tensor.clone()


def random(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def normal_mode(
    ctx: RankContext, to: Any, tokens: tuple[int, ...], W: int, dtype: torch.dtype, start: bool = False
) -> list[Tensor]:
    """Results and gradients of dispatch and combine, on the CPU. No operator but deep_ep's is needed. With `start`,
    in two steps."""
    dispatch, combine = deep_ep.dispatch, deep_ep.combine
    if start:
        dispatch = lambda *args, **kwargs: deep_ep.wait(deep_ep.dispatch_start(*args, **kwargs))  # noqa: E731
        combine = lambda *args, **kwargs: deep_ep.wait(deep_ep.combine_start(*args, **kwargs))  # noqa: E731
    group, E = npu_group(ctx), ctx.size * L
    x, ids, weights = (to(tensor) for tensor in inputs_of(ctx, tokens, dtype))
    x.requires_grad_()
    weights.requires_grad_()
    out = dispatch(x, ids, weights, num_experts=E, group=group, num_worst_tokens=W)
    N, T = out.recv_x.shape[0], x.shape[0]
    grads = to(random(N, H, seed=1, dtype=dtype)), to(random(N, K, seed=2))
    found = torch.autograd.grad([out.recv_x, out.recv_topk_weights], [x, weights], grads)
    y = to(random(N, H, seed=3, dtype=dtype)).requires_grad_()
    leaf = to(weights.detach().cpu()).requires_grad_()
    combined = combine(y, out.handle._replace(topk_weights=leaf), group=group)
    found += torch.autograd.grad(combined, [y, leaf], to(random(T, H, seed=4, dtype=dtype)))
    results = [out.recv_x, out.recv_topk_idx, out.recv_topk_weights, out.num_recv_tokens_per_expert, out.num_dropped]
    return [tensor.detach().cpu() for tensor in (*results, *out.handle, combined, *found)]


def check_normal_mode(
    ctx: RankContext, tokens: tuple[int, ...], W: int, dtype: torch.dtype, start: bool = False
) -> None:
    actual = normal_mode(ctx, on_npu, tokens, W, dtype, start)
    expected = normal_mode(ctx, on_cpu, tokens, W, dtype)
    for i, (a, b) in enumerate(zip(actual, expected, strict=True)):
        assert_same(f"result {i}", a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("W", [0, 7, 64], ids=["exact", "drops", "capacity"])
def test_normal_mode(npus: RankPool, W: int, dtype: torch.dtype) -> None:
    npus.run(2, check_normal_mode, (5, 3), W, dtype)


@pytest.mark.parametrize("W", [0, 7], ids=["exact", "drops"])
def test_normal_mode_in_two_steps(npus: RankPool, W: int) -> None:
    npus.run(2, check_normal_mode, (5, 3), W, torch.bfloat16, True)


def test_ranks_without_tokens(npus: RankPool) -> None:
    npus.run(4, check_normal_mode, (0, 5, 0, 2), 0, torch.float32)


def low_latency(ctx: RankContext, x: Tensor, ids: Tensor, weights: Tensor, start: bool) -> list[Tensor]:
    """By the ops; with `start`, in two steps."""
    name, E = npu_group(ctx).group_name, ctx.size * L
    ops = torch.ops.deep_ep
    if not start:
        out = ops.low_latency_dispatch(x, ids, M, E, ctx.size, name, "")
        return [*out, ops.low_latency_combine(out[0], ids, weights, *out[2:], E, ctx.size, name, "")]
    ticket = ops.low_latency_dispatch_start(x, ids, M, E, ctx.size, name, "")
    out = ops.wait(ticket, "low_latency_dispatch", [x, ids], E, ctx.size, M, name)
    rows = [out[0], ids, weights, *out[2:]]
    ticket = ops.low_latency_combine_start(*rows, E, ctx.size, name, "")
    return [*out, *ops.wait(ticket, "low_latency_combine", rows, E, ctx.size, 0, name)]


def check_low_latency(ctx: RankContext, start: bool) -> None:
    given = inputs_of(ctx, (5, 0), torch.bfloat16)
    expected = low_latency(ctx, *given, False)
    for actual, wanted in zip(low_latency(ctx, *(t.npu() for t in given), start), expected, strict=True):
        assert actual.device.type == "npu"
        assert_same("on NPU", actual.cpu(), wanted)
    ids, E = given[1], ctx.size * L
    on_host = deep_ep.get_dispatch_layout(ids, E, group=npu_group(ctx))
    for actual, wanted in zip(deep_ep.get_dispatch_layout(ids.npu(), E, group=npu_group(ctx)), on_host, strict=True):
        if wanted is not None:
            assert_same("layout", actual.cpu(), wanted)


@pytest.mark.parametrize("start", [False, True], ids=["whole", "in two steps"])
def test_low_latency(npus: RankPool, start: bool) -> None:
    npus.run(2, check_low_latency, start)


def check_streams(ctx: RankContext) -> None:
    """Kernels go to the current stream, behind what is there, and the host waits for nothing but exact row counts."""
    group, E = npu_group(ctx), ctx.size * L
    x, ids, weights = (tensor.npu() for tensor in inputs_of(ctx, (5, 3)))
    stream = torch.npu.Stream()
    stream.wait_stream(torch.npu.current_stream())
    torch.npu.synchronize()
    stand_in.clear_log()
    with torch.npu.stream(stream):
        late = x.clone()
        late.copy_(random(*x.shape, seed=5).pin_memory(), non_blocking=True)
        out = deep_ep.dispatch(late, ids, weights, num_experts=E, group=group, num_worst_tokens=32)
        combined = deep_ep.combine(out.recv_x, out.handle, group=group)
        handle = stream.npu_stream  # empties torch_npu's own queue
    assert stand_in.log("sync") == []
    assert not [line for line in stand_in.log("run") if "deep_ep" in line.text]
    launched = [(line.stream, line.text) for line in stand_in.log("launch") if "deep_ep" in line.text]
    assert launched == [(handle, f"deep_ep.{op}") for op in ("dispatch", "get_dispatch_layout", "combine")]
    stream.synchronize()
    mine = random(*x.shape, seed=5)
    assert_same("combined_x", combined.cpu(), reference_of(ctx, mine, ids.cpu(), weights.cpu()))
    stand_in.clear_log()
    deep_ep.dispatch(x, ids, weights, num_experts=E, group=group)
    assert len(stand_in.log("sync")) > 0


def reference_of(ctx: RankContext, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    out = deep_ep.dispatch(x, ids, weights, num_experts=ctx.size * L, group=npu_group(ctx), num_worst_tokens=32)
    return deep_ep.combine(out.recv_x, out.handle, group=npu_group(ctx))


@pytest.mark.skipif(not stand_in.in_use(), reason="reads the log of the stand-in for CANN")
def test_streams(npus: RankPool) -> None:
    npus.run(2, check_streams)


def check_capture(ctx: RankContext) -> None:
    """A decode step is captured once and replayed: no host synchronisation, no allocation, the right rows."""
    given = inputs_of(ctx, (5, 3), torch.bfloat16)
    x, ids, weights = (tensor.npu() for tensor in given)
    low_latency(ctx, x, ids, weights, False)  # what is made at the first call is not part of the graph
    torch.npu.synchronize()
    graph = torch.npu.NPUGraph()
    stand_in.clear_log()
    with torch.npu.graph(graph):
        out = low_latency(ctx, x, ids, weights, False)
    captured = [line.text for line in stand_in.log("launch") if "deep_ep" in line.text]
    assert captured == ["deep_ep.low_latency_dispatch", "deep_ep.low_latency_combine"]
    for seed in range(3):
        rows = random(*x.shape, seed=seed, dtype=torch.bfloat16)
        x.copy_(rows)
        torch.npu.synchronize()
        stand_in.clear_log()
        graph.replay()
        assert torch.npu.current_stream().npu_stream
        assert stand_in.log("sync") == stand_in.log("malloc") == []
        torch.npu.synchronize()
        for actual, wanted in zip(out, low_latency(ctx, rows, *given[1:], False), strict=True):
            assert_same("replayed", actual.cpu(), wanted)


def check_capturing_backend(ctx: RankContext) -> None:
    """A decode loop through torch.compile(backend="npugraph_ex"): captured once, replayed for every step."""
    torch._dynamo.reset()
    buffer = deep_ep.Buffer(npu_group(ctx), low_latency_mode=True)
    x, ids, weights = inputs_of(ctx, (5, 3), torch.bfloat16)
    E = ctx.size * L

    def step(x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        recv_x, _, handle, _, _ = buffer.low_latency_dispatch(x, ids, M, E, use_fp8=False)
        return buffer.low_latency_combine(recv_x, ids, weights, handle)[0]

    decode = torch.compile(step, backend="npugraph_ex", fullgraph=True, dynamic=False)
    given = ids.npu(), weights.npu()
    for token in range(4):
        rows = random(*x.shape, seed=token, dtype=torch.bfloat16)
        on_device = rows.npu()
        torch.npu.synchronize()
        stand_in.clear_log()
        out = decode(on_device, *given)
        launched = [line.text for line in stand_in.log("launch") if "deep_ep" in line.text]
        # The first call captures; from then on nothing is launched, waited for or allocated op by op.
        assert launched == (["deep_ep.low_latency_dispatch", "deep_ep.low_latency_combine"] if token == 0 else [])
        if token > 0:
            assert torch.npu.current_stream().npu_stream
            assert stand_in.log("sync") == stand_in.log("malloc") == []
        assert_same("decoded", out.cpu(), step(rows, ids, weights))


@pytest.mark.skipif(not stand_in.in_use(), reason="reads the log of the stand-in for CANN")
def test_a_decode_loop_is_captured(npus: RankPool) -> None:
    npus.run(2, check_capturing_backend)


def check_captured_training(ctx: RankContext) -> None:
    """Dispatch and its gradient, captured, in capacity mode: the gradients of all results are given."""
    torch._dynamo.reset()
    group, E, W = npu_group(ctx), ctx.size * L, 32
    x, ids, weights = inputs_of(ctx, (5, 3))

    def step(x: Tensor, ids: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        out = deep_ep.dispatch(x, ids, weights, num_experts=E, group=group, num_worst_tokens=W)
        return out.recv_x, out.recv_topk_weights

    train = torch.compile(step, backend="npugraph_ex", fullgraph=True, dynamic=False)
    grads = random(W, H, seed=1), random(W, K, seed=2)
    for seed in range(3):
        rows = random(*x.shape, seed=seed)
        results = []
        for fn, to in ((train, on_npu), (step, on_cpu)):
            leaves = [to(tensor).requires_grad_() for tensor in (rows, weights)]
            out = fn(leaves[0], to(ids), leaves[1])
            found = torch.autograd.grad(out, leaves, [to(grad) for grad in grads])
            results.append([tensor.detach().cpu() for tensor in (*out, *found)])
        for actual, wanted in zip(*results, strict=True):
            assert_same("captured", actual, wanted)


def test_training_is_captured(npus: RankPool) -> None:
    npus.run(2, check_captured_training)


def check_exact_capture(ctx: RankContext) -> tuple[str, str]:
    x, ids, weights = (tensor.npu() for tensor in inputs_of(ctx, (5, 3)))
    group = npu_group(ctx)

    def capture() -> None:
        with torch.npu.graph(torch.npu.NPUGraph()):
            deep_ep.dispatch(x, ids, weights, num_experts=ctx.size * L, group=group)

    error = error_of(capture)
    torch.npu.set_stream(torch.npu.default_stream())  # where a failed capture leaves torch_npu on its stream
    torch.npu.synchronize()
    return error


@pytest.mark.skipif(not stand_in.in_use(), reason="reads the log of the stand-in for CANN")
def test_capture(npus: RankPool) -> None:
    npus.run(2, check_capture)


def test_exact_row_counts_cannot_be_captured(npus: RankPool) -> None:
    for kind, message in npus.run(2, check_exact_capture):
        assert kind == "RuntimeError" and "a captured graph cannot wait for; pass num_worst_tokens" in message


def check_table(ctx: RankContext) -> list[int]:
    return windows.table(npu_group(ctx).group_name).cpu().tolist()


def test_the_window_table(npus: RankPool) -> None:
    for rank, words in enumerate(npus.run(2, check_table)):
        assert len(words) == windows.table_words(2)
        assert words[1:4] == [rank, 2, 8 << 20]


def wrong_calls(ctx: RankContext) -> list[tuple[str, str]]:
    group = npu_group(ctx)
    x, ids, weights = (tensor.npu() for tensor in inputs_of(ctx, (5,)))
    E = ctx.size * L
    dispatch = torch.ops.deep_ep.dispatch.default
    out = dispatch(x, ids, weights, E, 1, 32, group.group_name)
    combine = torch.ops.deep_ep.combine.default
    return [
        error_of(dispatch, x, ids.cpu(), weights, E, 1, 32, group.group_name),
        error_of(dispatch, x, ids, weights, E, 2, 32, group.group_name),
        error_of(dispatch, x, ids, weights, E, 1, 32, "no group"),
        error_of(combine, out[0][1:].clone(), ids, weights, out[8], out[9], E, 1, group.group_name),
        error_of(torch.ops.deep_ep.get_dispatch_layout.default, ids, 3, 2, 1),
    ]


def test_wrong_arguments(npus: RankPool) -> None:
    says = (
        "deep_ep.dispatch: topk_idx must be on the NPU",
        "deep_ep.dispatch: num_ranks must be the size of the group, 1, got 2",
        "there are no windows on the NPU for the group 'no group'",
        "deep_ep.combine: recv_src_idx must have the shape [31, 3], got [32, 3]",
        "num_experts (3) must be divisible by num_ranks (2)",
    )
    (errors,) = npus.run(1, wrong_calls)
    for (kind, message), text in zip(errors, says, strict=True):
        assert kind == "RuntimeError" and text in message, message


def python(code: str, **environment: str) -> str:
    """What a process prints, the last line of it."""
    run = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **environment}, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    return run.stdout.splitlines()[-1]


LAYOUT = """
import torch, torch_npu, deep_ep
try:
    torch.ops.deep_ep.get_dispatch_layout(torch.zeros(2, 2, dtype=torch.int64).npu(), 4, 2, 1)
except RuntimeError as error:
    print(str(error).splitlines()[0])
"""


def test_without_kernels_the_error_says_how_to_get_them() -> None:
    message = python(LAYOUT, DEEP_EP_KERNELS="")
    assert "this installation has no kernels for the NPU" in message
    assert "bash build.sh -a deepep" in message


def test_a_launch_without_memory_leaves_no_plan() -> None:
    """The workspace, which is asked for when the launch has been planned, is more than any device has."""
    code = """
import ctypes, deep_ep, os, torch, torch_npu
deep_ep.npu.load_kernels()
ids = torch.zeros(2, 2, dtype=torch.int64).npu()
try:
    torch.ops.deep_ep.get_dispatch_layout(ids, 4, 2, 1)
except RuntimeError as error:
    refused = "memory" in str(error)
print(refused, ctypes.CDLL(os.environ["DEEP_EP_KERNELS"]).host_kernels_discarded())
"""
    assert python(code, HOST_KERNELS_WORKSPACE_BYTES=str(1 << 50)) == "True 1"


def test_a_library_that_is_none_is_named() -> None:
    code = """
import deep_ep
try:
    deep_ep.npu.load_kernels()
except RuntimeError as error:
    print(error)
"""
    message = python(code, DEEP_EP_KERNELS="/no/such/kernels.so")
    assert "the NPU kernels in /no/such/kernels.so cannot be used" in message


ENVIRONMENT = """
import contextlib, io, os
import torch, torch_npu, torch.distributed as dist, deep_ep
from deep_ep.env.__main__ import main

torch.npu.set_device(0)
dist.init_process_group("cpu:gloo,npu:hccl", rank=0, world_size=1, store=dist.HashStore())


def chosen(**wishes):
    deep_ep.destroy()
    return deep_ep.init(**wishes).comm_alg


out = [chosen(), chosen(comm_alg="fullmesh_v1")]
os.environ["HCCL_OP_EXPANSION_MODE"] = "AIV"
try:
    out.append(chosen())
except ValueError as error:
    out.append(str(error))
with contextlib.redirect_stdout(io.StringIO()) as report:
    out.append(main())
print([*out, report.getvalue().splitlines()[0].split(", ", 1)[1]])
"""


@pytest.mark.parametrize(
    "soc, comm_alg, told, report",
    [("Ascend910B3", "hierarchy", "HCCL_OP_EXPANSION_MODE must not be set on A2", 1), ("Ascend910_9391", "", "", 0)],
)
def test_variables_of_hccl(soc: str, comm_alg: str, told: str, report: int) -> None:
    links = {"HCCL_INTRA_PCIE_ENABLE": "1", "HCCL_INTRA_ROCE_ENABLE": "0"}
    *out, machine = ast.literal_eval(python(ENVIRONMENT, CANN_STAND_IN_SOC=soc, **links))
    error = f"the environment variable {told}; got 'AIV'" if told else comm_alg
    assert out == [comm_alg, "fullmesh_v1", error, report]
    assert machine == f"NPU {soc} ({'A2' if report else 'A3'}), kernels: host kernels for tests"


def check_comm_stream(ctx: RankContext) -> None:
    buffer, stream = deep_ep.Buffer(npu_group(ctx)), torch.npu.Stream()
    with torch.npu.stream(stream):
        assert buffer.get_comm_stream() == stream


def test_comm_stream(npus: RankPool) -> None:
    npus.run(2, check_comm_stream)


def check_fakes(ctx: RankContext) -> None:
    """Fakes and autograd of NPU tensors, compiled: aot_eager runs the same kernels."""
    torch._dynamo.reset()
    group, E = npu_group(ctx), ctx.size * L
    x, ids, weights = (tensor.npu() for tensor in inputs_of(ctx, (5, 3)))

    def step(x: Tensor, ids: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        out = deep_ep.dispatch(x, ids, weights, num_experts=E, group=group, num_worst_tokens=64)
        return out.recv_x, deep_ep.combine(out.recv_x, out.handle, group=group)

    recv_x, combined = torch.compile(step, backend="aot_eager", fullgraph=True)(x, ids, weights)
    for actual, wanted in zip((recv_x, combined), step(x.cpu(), ids.cpu(), weights.cpu()), strict=True):
        assert actual.device.type == "npu"
        assert_same("compiled", actual.cpu(), wanted)


def test_fakes_of_npu_tensors(npus: RankPool) -> None:
    npus.run(2, check_fakes)
