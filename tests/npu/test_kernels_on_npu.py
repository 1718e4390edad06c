"""NPU tensors into the AscendC kernels: PrivateUse1, torch_npu's task queue and stream, and a launch on the twin, with
the stand-in for CANN underneath. The kernels themselves are tested in test_kernels.py.

H hidden · K top-k · L local experts · E experts · M num_max_dispatch_tokens_per_rank.
"""

import datetime
import os
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch_npu  # noqa: F401
from cann import stand_in
from cases import Case, assert_close, assert_same, make_inputs
from probes import NAMES, expect
from ranks import RankContext, RankPool
from torch import Tensor

import deep_ep
from deep_ep.twin import kernels as twin_kernels
from deep_ep.twin.kernels import A5, Setup, Twin

SIZE = 2
CASE, M = Case((5, 3), H=256, K=2, local_experts=4, dtype=torch.bfloat16, ids="distinct", absent=0.1), 7
E = CASE.E


@pytest.fixture(scope="module")
def npus() -> Iterator[RankPool]:
    twin_kernels.build()
    pool = RankPool(SIZE)
    yield pool
    pool.close()


def make_group(ctx: RankContext, timeout: float = 30.0, num_bytes: int = 1 << 20) -> dist.ProcessGroup:
    """A new one of all ranks, whose kernels are those on the twin. Collective."""
    os.environ["DEEP_EP_KERNELS"] = str(twin_kernels.build())
    torch.npu.set_device(ctx.rank)
    assert deep_ep.npu.load_kernels() == "AscendC twin"
    group = dist.new_group(backend="cpu:gloo,npu:hccl", timeout=datetime.timedelta(seconds=30))
    deep_ep.init(group, num_bytes=num_bytes, timeout=datetime.timedelta(seconds=timeout))
    return group


def close(actual: Tensor, rank: int) -> None:
    wanted = expect(CASE, M)
    assert_close("combined", actual.cpu(), wanted.combined[rank], wanted.tolerances[rank])


def check_buffer(ctx: RankContext, setup: Setup) -> None:
    twin = Twin(twin_kernels.build())
    twin.configure(setup)
    expected, group = expect(CASE, M), make_group(ctx)
    x, ids, weights, y = (t[ctx.rank].npu() for t in (expected.xs, expected.ids, expected.weights, expected.ys))
    buffer = deep_ep.Buffer(group, low_latency_mode=True)
    (data, scales), _, handle, _, _ = buffer.low_latency_dispatch(x, ids, M, E, quant_mode="int8")
    on_host = expected.xs[ctx.rank], expected.ids[ctx.rank]
    (wanted_data, wanted_scales), _, _, _, _ = buffer.low_latency_dispatch(*on_host, M, E, quant_mode="int8")
    assert_same("data", data.cpu(), wanted_data)
    assert_same("scales", scales.cpu(), wanted_scales)
    assert_same("handle", handle.src_info.cpu(), expected.dispatched[ctx.rank][2])
    for _ in range(3):
        stand_in.clear_log()
        rows, count, handle, _, _ = buffer.low_latency_dispatch(x, ids, M, E, use_fp8=False)
        combined, _, _ = buffer.low_latency_combine(y, ids, weights, handle)
        found = rows, count, handle.src_info, handle.layout_range, handle.send_head
        for name, actual, wanted in zip(NAMES, found, expected.dispatched[ctx.rank], strict=True):
            assert actual.device.type == "npu"
            assert_same(name, actual.cpu(), wanted.view(actual.shape))
        close(combined, ctx.rank)
        launched = [line.text for line in stand_in.log("launch") if line.text.startswith("deep_ep")]
        assert launched == ["deep_ep.low_latency_dispatch", "deep_ep.low_latency_combine"]
    deep_ep.npu.check(group)
    assert not twin.take_violations()


@pytest.mark.parametrize("setup", [Setup(cores=3), Setup(cores=2, seed=3), Setup(A5, 4, 4)], ids=str)
def test_low_latency(npus: RankPool, setup: Setup) -> None:
    npus.run(SIZE, check_buffer, setup)


def check_layout(ctx: RankContext) -> None:
    ids, group = expect(CASE, M).ids[ctx.rank], make_group(ctx)
    on_host, on_npu = (deep_ep.get_dispatch_layout(i, E, group=group) for i in (ids, ids.npu()))
    for actual, wanted in zip(on_npu, on_host, strict=True):
        if wanted is not None:
            assert_same("layout", actual.cpu(), wanted)


def test_layout(npus: RankPool) -> None:
    npus.run(SIZE, check_layout)


def check_combine(ctx: RankContext) -> None:
    """Of normal mode: rows that were dispatched on the host, in the rounds that small windows make of it."""
    case = Case((40, 23), H=1024, K=2, local_experts=4, dtype=torch.bfloat16, absent=0.1)
    group = make_group(ctx, num_bytes=1 << 16)
    x, ids, weights, _ = (given[ctx.rank] for given in make_inputs(case))
    out = deep_ep.dispatch(x, ids, weights, num_experts=case.E, group=group)
    call = ids, weights, out.handle.recv_src_idx, out.handle.send_head
    sizes = case.E, SIZE, group.group_name
    combined = torch.ops.deep_ep.combine(out.recv_x.npu(), *(t.npu() for t in call), *sizes)
    wanted = torch.ops.deep_ep.combine(out.recv_x, *call, *sizes)
    torch.testing.assert_close(combined.cpu(), wanted, rtol=2e-2, atol=2e-2)
    deep_ep.npu.check(group)


def test_combine(npus: RankPool) -> None:
    npus.run(SIZE, check_combine)


def check_capture(ctx: RankContext) -> None:
    """A graph's launches are new launches at every replay, with epochs of their own."""
    expected, group = expect(CASE, M), make_group(ctx)
    x, ids, weights, y = (t[ctx.rank].npu() for t in (expected.xs, expected.ids, expected.weights, expected.ys))
    ops, name = torch.ops.deep_ep, group.group_name

    def step() -> tuple[Any, Tensor]:
        out = ops.low_latency_dispatch(x, ids, M, E, SIZE, name, "", None)
        return out, ops.low_latency_combine(y, ids, weights, *out[2:], E, SIZE, name, "", None)

    step()
    torch.npu.synchronize()
    graph = torch.npu.NPUGraph()
    with torch.npu.graph(graph):
        out, combined = step()
    for factor in (2, 4, 1):
        x.copy_(expected.xs[ctx.rank] * factor)
        y.copy_(expected.ys[ctx.rank] * factor)
        torch.npu.synchronize()
        graph.replay()
        torch.npu.synchronize()
        rows, *handle = expected.dispatched[ctx.rank]
        for actual, wanted in zip(out, (rows * factor, *handle), strict=True):
            assert_same("replayed", actual.cpu(), wanted)
        close(combined.cpu() / factor, ctx.rank)
    deep_ep.npu.check(group)


def test_captured(npus: RankPool) -> None:
    npus.run(SIZE, check_capture)


def error_of(call: Any, *arguments: Any) -> str:
    with pytest.raises(RuntimeError) as caught:
        call(*arguments)
    return str(caught.value)


def check_late(ctx: RankContext) -> None:
    """A peer that comes late: what is said, and that the group can be used again."""
    expected, group = expect(CASE, M), make_group(ctx, timeout=0.5)
    x, ids = expected.xs[ctx.rank].npu(), expected.ids[ctx.rank].npu()
    buffer = deep_ep.Buffer(group, low_latency_mode=True)
    if ctx.rank == 0:
        buffer.low_latency_dispatch(x, ids, M, E, use_fp8=False)
        begin = time.monotonic()
        torch.npu.synchronize()
        assert 0.4 < time.monotonic() - begin < 20
        said = error_of(deep_ep.npu.check, group)
        assert said == (
            "deep_ep.low_latency_dispatch, launch 1, phase 0, failed at rank 1: it did not answer in time: expected "
            "launch, and the newest one seen of it: 1, 0"
        )
    dist.barrier(group=ctx.group)
    deep_ep.init(group, num_bytes=1 << 20, timeout=datetime.timedelta(seconds=30))
    rows = buffer.low_latency_dispatch(x, ids, M, E, use_fp8=False)[0]
    assert_same("after a failure", rows.cpu(), expected.dispatched[ctx.rank][0])
    deep_ep.npu.check(group)


def test_a_rank_that_is_late(npus: RankPool) -> None:
    npus.run(SIZE, check_late)


def check_bad_id(ctx: RankContext) -> None:
    expected, group = expect(CASE, M), make_group(ctx)
    x, ids = expected.xs[ctx.rank].npu(), expected.ids[ctx.rank].clone()
    if ctx.rank == 1:
        ids[0, 0] = E
    torch.ops.deep_ep.low_latency_dispatch(x, ids.npu(), M, E, SIZE, group.group_name, "", None)
    torch.npu.synchronize()
    assert error_of(deep_ep.npu.check, group) == (
        "deep_ep.low_latency_dispatch, launch 1, phase 0, failed at rank 1: "
        + (
            f"topk_idx holds an id that is neither -1 nor a number of an expert: number of experts, id: {E}, {E}"
            if ctx.rank == 1
            else "it refuses this launch, and its own status says why: own op, its answer: 5, -1"
        )
    )


def test_an_id_that_is_no_experts(npus: RankPool) -> None:
    npus.run(SIZE, check_bad_id)


def check_missing(ctx: RankContext) -> None:
    expected, group = expect(CASE, M), make_group(ctx)
    x, ids, weights = (t[ctx.rank].npu() for t in (expected.xs, expected.ids, expected.weights))
    said = error_of(lambda: deep_ep.dispatch(x, ids, weights, num_experts=E, group=group, num_worst_tokens=9))
    assert "there is no AscendC kernel for this op yet; the strategy alltoall needs none" in said


def test_an_op_without_a_kernel(npus: RankPool) -> None:
    npus.run(SIZE, check_missing)
