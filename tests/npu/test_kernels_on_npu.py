"""NPU tensors into the AscendC kernels: PrivateUse1, torch_npu's task queue and stream, and a launch on the twin, with
the stand-in for CANN underneath. The kernels themselves are tested in test_kernels.py.

H hidden · K top-k · L local experts · E experts · M num_max_dispatch_tokens_per_rank.
"""

import ctypes
import datetime
import os
from collections.abc import Iterator
from typing import Any

import kernel_route
import pytest
import reference
import torch
import torch.distributed as dist
import torch_npu  # noqa: F401
from cann import stand_in
from cases import Case, assert_close, assert_same, make_inputs
from probes import NAMES, expect, with_rows_of_note
from ranks import RankContext, RankPool
from torch import Tensor

import deep_ep
from deep_ep import env, quantization
from deep_ep.ops import dispatch_int8
from tools.twin import kernels as twin_kernels
from tools.twin import model
from tools.twin.kernels import A5, Setup, Twin

SIZE = 2
# A window with so little room for slots makes rounds.
SMALL = (1 << 16) + model.LINES + model.MARKS
CASE, M = Case((5, 3), H=256, K=2, local_experts=4, dtype=torch.bfloat16, ids="distinct", absent=0.1), 7
E = CASE.E
NORMAL = Case((40, 23), H=1024, K=2, local_experts=4, dtype=torch.bfloat16, absent=0.1)


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


def step(device: str, group: str, rank: int, worst: int) -> list[Tensor]:
    """A dispatch and a combine, and the gradients of all that have some."""
    given = make_inputs(NORMAL)
    x, ids, weights, factors, grad_out = (given[i][rank].clone().to(device) for i in (0, 1, 2, 2, 0))
    leaves = [x.requires_grad_(), weights.requires_grad_(), factors.requires_grad_()]
    ops, sizes = torch.ops.deep_ep, (NORMAL.E, SIZE)
    rows, recv_ids, recv_weights, *_, src_idx, send_head = ops.dispatch(x, ids, weights, *sizes, worst, group)
    combined = ops.combine(rows, ids, factors, src_idx, send_head, *sizes, group)
    torch.autograd.backward([combined, recv_weights], [grad_out, recv_weights.detach()])
    return [rows.detach(), recv_ids, recv_weights.detach(), combined.detach(), *(leaf.grad for leaf in leaves)]


def check_normal(ctx: RankContext, worst: int) -> None:
    """Launches of normal mode, several of them under way, in the rounds that small windows make of them."""
    group = make_group(ctx, num_bytes=SMALL)
    stand_in.clear_log()
    on_npu = [step("npu", group.group_name, ctx.rank, worst) for _ in range(3)]
    launched = {line.text for line in stand_in.log("launch") if line.text.startswith("deep_ep.")}
    assert launched >= {f"deep_ep.{op}" for op in ("dispatch", "combine", "dispatch_backward", "combine_backward")}
    assert ("deep_ep.notify_dispatch" in launched) == (worst == 0)
    wanted = step("cpu", group.group_name, ctx.rank, worst)
    for found in on_npu:
        for actual, expected in zip(found[:3], wanted[:3], strict=True):
            assert_same("dispatched", actual.cpu(), expected)
        for actual, expected in zip(found[3:], wanted[3:], strict=True):
            torch.testing.assert_close(actual.cpu(), expected, rtol=2e-2, atol=2e-2)
    deep_ep.npu.check(group)


@pytest.mark.parametrize("worst", [0, 100, 30])
def test_normal_mode(npus: RankPool, worst: int) -> None:
    npus.run(SIZE, check_normal, worst)


def check_packed(ctx: RankContext) -> None:
    """Rows that hold int8 data and a scale, which the host has packed."""
    group, given = make_group(ctx), make_inputs(NORMAL)
    x, ids, weights = (tensors[ctx.rank] for tensors in given[:3])
    data, scales = quantization.quantize(x, "int8")
    packed = quantization.pack(data, scales)
    arguments = NORMAL.E, SIZE, 0, group.group_name
    rows = torch.ops.deep_ep.dispatch(packed.npu(), ids.npu(), weights.npu(), *arguments)[0].cpu()
    wanted = quantization.quantize(reference.dispatch(*given[:3], NORMAL.E, [0, 0])[ctx.rank].recv_x, "int8")
    for name, actual, expected in zip(("data", "scales"), quantization.unpack(rows, data, scales), wanted, strict=True):
        assert_same(name, actual, expected)


def test_packed_rows(npus: RankPool) -> None:
    npus.run(SIZE, check_packed)


def of_note(rank: int) -> Tensor:
    """x of NORMAL, with rows of 0, next to 0, very large, Inf and NaN."""
    return with_rows_of_note(make_inputs(NORMAL).xs[rank])


def same_results(found: Any, wanted: Any, device: str = "npu") -> None:
    """Of Buffer.dispatch on this device and on the CPU, to the bit."""
    assert type(found) is type(wanted)
    if isinstance(found, Tensor):
        assert found.device.type == device
        assert_same("result", found.cpu(), wanted)
    elif isinstance(found, tuple | list):
        for one, other in zip(found, wanted, strict=True):
            same_results(one, other, device)
    else:
        assert found == wanted or isinstance(found, deep_ep.EventOverlap)


def send_int8(buffer: deep_ep.Buffer, device: str, rank: int, form: str = "mode", **options: Any) -> Any:
    """Buffer.dispatch of these rows, which asks for int8 in the form of this name."""
    given = make_inputs(NORMAL)
    x, ids, weights = (one.to(device) for one in (of_note(rank), given.topk_idxs[rank], given.topk_weights[rank]))
    per_rank, _, per_expert, in_rank, _ = buffer.get_dispatch_layout(ids, NORMAL.E)
    results = buffer.dispatch(
        (x, torch.empty(0, dtype=torch.int8, device=device)) if form == "marker" else x,
        topk_idx=ids,
        topk_weights=weights,
        num_tokens_per_rank=per_rank,
        is_token_in_rank=in_rank,
        num_tokens_per_expert=per_expert,
        quant_mode="int8" if form == "mode" else None,
        **options,
    )
    results[-1].current_stream_wait()
    return results


def check_int8(ctx: RankContext, worst: int) -> None:
    """Buffer.dispatch makes int8 of rows in the kernel, in every form that asks for it, as it does around the op on the
    CPU; in the rounds that small windows make of it.
    """
    group = make_group(ctx, num_bytes=SMALL)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DEEP_NORMAL_MODE_USE_INT8_QUANT", "1")
        buffer = deep_ep.Buffer(group)
    wanted = send_int8(buffer, "cpu", ctx.rank, "environment", num_worst_tokens=worst)
    assert wanted[0][0].dtype == torch.int8 and wanted[0][1].isnan().any()
    for form in ("environment", "marker", "mode"):
        stand_in.clear_log()
        found = send_int8(buffer, "npu", ctx.rank, form, num_worst_tokens=worst, async_finish=form == "mode")
        torch.npu.synchronize()
        names = [line.text for line in stand_in.log("launch") if line.text.startswith("deep_ep.")]
        counted = ["deep_ep.notify_dispatch"] * (worst == 0)
        assert names == ["deep_ep.get_dispatch_layout", *counted, "deep_ep.dispatch_int8"], form
        same_results(found, wanted)
    deep_ep.npu.check(group)


@pytest.mark.parametrize("worst", [0, 100, 30])
def test_int8_rows_of_normal_mode(npus: RankPool, worst: int) -> None:
    npus.run(SIZE, check_int8, worst)


def check_int8_layouts(ctx: RankContext, rows: str) -> None:
    """The kernel under all that Buffer adds to an op, for which the stand-in has no operators on an NPU."""
    plain = deep_ep.Buffer(ctx.prepared_group("default"), rows=rows)
    forms: list[dict[str, Any]] = [{}, {"num_worst_tokens": 30}, {"num_worst_tokens": 100, "expert_alignment": 8}]
    wanted = [send_int8(plain, "cpu", ctx.rank, **form) for form in forms]
    x = of_note(ctx.rank)
    of_handles = [plain.dispatch(x, handle=results[4], quant_mode="int8") for results in wanted]
    twin = kernel_route.open_route(ctx.rank)
    try:
        buffer = deep_ep.Buffer(dist.new_group(backend=kernel_route.BACKEND), rows=rows)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(dispatch_int8, "is_for", lambda info, x: True)
            for form, results, of_handle in zip(forms, wanted, of_handles, strict=True):
                stand_in.clear_log()
                found = send_int8(buffer, "cpu", ctx.rank, **form)
                same_results(found, results, "cpu")
                same_results(buffer.dispatch(x, handle=found[4], quant_mode="int8"), of_handle, "cpu")
                assert [line.text for line in stand_in.log("launch")].count("deep_ep.dispatch_int8") == 2
        assert not twin.take_violations()
    finally:
        kernel_route.close_route()


@pytest.mark.parametrize("rows", ["expert", "rank"])
def test_int8_rows_of_every_layout(npus: RankPool, rows: str) -> None:
    npus.run(SIZE, check_int8_layouts, rows)


def check_int8_op(ctx: RankContext) -> None:
    """The gradient of weights, and what is wrong with x."""
    group, given = make_group(ctx), make_inputs(NORMAL)
    ids, weights = (given[i][ctx.rank] for i in (1, 2))
    found = []
    for device in ("npu", "cpu"):
        x, leaf = of_note(ctx.rank).to(device), weights.to(device).requires_grad_()
        for worst in (0, 30):
            arguments = ids.to(device), leaf, NORMAL.E, SIZE, worst, group.group_name
            out = torch.ops.deep_ep.dispatch_int8(x, *arguments)
            assert [one.requires_grad for one in out] == [n == 3 for n in range(11)]
            factors = (torch.arange(out[3].numel()).view(out[3].shape) % 7).float().to(device)
            found.append(torch.autograd.grad(out[3], leaf, factors)[0].cpu())
            said = error_of(torch.ops.deep_ep.dispatch_int8, x.clone().requires_grad_(), *arguments)
            assert said == "deep_ep.dispatch_int8: x requires a gradient, which rows of int8 do not have"
    for on_npu, on_cpu in zip(found[:2], found[2:], strict=True):
        assert_same("grad_topk_weights", on_npu, on_cpu)
    with pytest.raises(RuntimeError, match="x must be"):
        torch.ops.deep_ep.dispatch_int8(x.long().npu(), *arguments)
    deep_ep.npu.check(group)


def test_int8_rows_have_gradients_of_weights(npus: RankPool) -> None:
    npus.run(SIZE, check_int8_op)


def check_int8_captured(ctx: RankContext) -> None:
    group, given = make_group(ctx, num_bytes=SMALL), make_inputs(NORMAL)
    first = of_note(ctx.rank)
    x, ids, weights = first.npu(), given.topk_idxs[ctx.rank].npu(), given.topk_weights[ctx.rank].npu()

    def step() -> tuple[Tensor, ...]:
        return torch.ops.deep_ep.dispatch_int8(x, ids, weights, NORMAL.E, SIZE, 100, group.group_name)

    step()
    torch.npu.synchronize()
    graph = torch.npu.NPUGraph()
    with torch.npu.graph(graph):
        out = step()
    for tokens in (first.flip(1), first):
        x.copy_(tokens)
        torch.npu.synchronize()
        graph.replay()
        torch.npu.synchronize()
        on_host = tokens, given.topk_idxs[ctx.rank], given.topk_weights[ctx.rank]
        wanted = torch.ops.deep_ep.dispatch_int8(*on_host, NORMAL.E, SIZE, 100, group.group_name)
        for actual, expected in zip(out, wanted, strict=True):
            assert_same("replayed", actual.cpu(), expected)
    deep_ep.npu.check(group)


def test_int8_rows_captured(npus: RankPool) -> None:
    npus.run(SIZE, check_int8_captured)


def check_capture(ctx: RankContext) -> None:
    """A graph's launches are new launches at every replay, with epochs of their own."""
    expected, group = expect(CASE, M), make_group(ctx)
    x, ids, weights, y = (t[ctx.rank].npu() for t in (expected.xs, expected.ids, expected.weights, expected.ys))
    ops, name = torch.ops.deep_ep, group.group_name

    def step() -> tuple[Any, Tensor]:
        out = ops.low_latency_dispatch(x, ids, M, E, SIZE, name, "")
        return out, ops.low_latency_combine(y, ids, weights, *out[2:], E, SIZE, name, "")

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
        torch.npu.synchronize()
        said = error_of(deep_ep.npu.check, group)
        assert said == (
            "deep_ep.low_latency_dispatch on rank 0, launch 1, phase 0, failed at rank 1: it did not answer in time: "
            "expected launch, and the newest one seen of it: 1, 0"
        )
    dist.barrier(group=ctx.group)
    deep_ep.init(group, num_bytes=1 << 20, timeout=datetime.timedelta(seconds=30))
    rows = buffer.low_latency_dispatch(x, ids, M, E, use_fp8=False)[0]
    assert_same("after a failure", rows.cpu(), expected.dispatched[ctx.rank][0])
    deep_ep.npu.check(group)


def test_a_rank_that_is_late(npus: RankPool) -> None:
    npus.run(SIZE, check_late)


def bad_id_said(op: str, number: int, launch: int, rank: int) -> str:
    """What the status says of a launch of the op with this number, in which rank 1 has an id that is no expert's."""
    return f"deep_ep.{op} on rank {rank}, launch {launch}, phase 0, failed at rank 1: " + (
        f"topk_idx holds an id that is neither -1 nor a number of an expert: number of experts, id: {E}, {E}"
        if rank == 1
        else f"it refuses this launch, and its own status says why: own op, its answer: {number}, -1"
    )


HEARD = (
    "a launch before has failed, and what it was to give, and those after it, is not defined; call "
    "deep_ep.init(group) on all ranks before the next one. "
)


def ids_with_a_bad_one(rank: int) -> Tensor:
    ids = expect(CASE, M).ids[rank].clone()
    if rank == 1:
        ids[0, 0] = E
    return ids


def check_heard(ctx: RankContext) -> None:
    """A call after a launch that has failed raises, and nobody has asked."""
    expected, group = expect(CASE, M), make_group(ctx)
    ops, name = torch.ops.deep_ep, group.group_name
    x, ids, weights, y = (t[ctx.rank].npu() for t in (expected.xs, expected.ids, expected.weights, expected.ys))
    ops.low_latency_dispatch(x, ids, M, E, SIZE, name, "")
    out = ops.low_latency_dispatch(x, ids_with_a_bad_one(ctx.rank).npu(), M, E, SIZE, name, "")
    torch.npu.synchronize()
    said = bad_id_said("low_latency_dispatch", 5, 2, ctx.rank)
    stand_in.clear_log()
    for op, call, *arguments in (
        ("low_latency_combine", ops.low_latency_combine, y, ids, weights, *out[2:], E, SIZE, name, ""),
        ("low_latency_dispatch", ops.low_latency_dispatch_start, x, ids, M, E, SIZE, name, ""),
        ("dispatch", ops.dispatch, x, ids, weights, E, SIZE, 10, name),
    ):
        assert error_of(call, *arguments) == f"deep_ep.{op}: {HEARD}{said}"
    assert not stand_in.log("launch") and not stand_in.log("sync"), "a call that raises waits for nothing"
    assert error_of(deep_ep.npu.check, group) == error_of(deep_ep.npu.table, name) == said
    deep_ep.init(group, num_bytes=1 << 20)
    rows = ops.low_latency_dispatch(x, ids, M, E, SIZE, name, "")[0]
    assert_same("after a failure", rows.cpu(), expected.dispatched[ctx.rank][0])
    deep_ep.npu.check(group)


def check_count_fails(ctx: RankContext) -> None:
    """The host waits for the count of exact mode, and does not take what a launch has left that has failed."""
    expected, group = expect(CASE, M), make_group(ctx)
    x, weights = (t[ctx.rank].npu() for t in (expected.xs, expected.weights))
    arguments = x, ids_with_a_bad_one(ctx.rank).npu(), weights, E, SIZE, 0, group.group_name
    said = error_of(torch.ops.deep_ep.dispatch, *arguments)
    assert said == f"deep_ep.dispatch: {HEARD}" + bad_id_said("notify_dispatch", 7, 1, ctx.rank)


def check_replay_fails(ctx: RankContext) -> None:
    """A replay says nothing; the next call does."""
    expected, group = expect(CASE, M), make_group(ctx)
    ops, name = torch.ops.deep_ep, group.group_name
    x, ids = expected.xs[ctx.rank].npu(), expected.ids[ctx.rank].npu()

    def step() -> Any:
        return ops.low_latency_dispatch(x, ids, M, E, SIZE, name, "")

    step()
    torch.npu.synchronize()
    graph = torch.npu.NPUGraph()
    with torch.npu.graph(graph):
        step()
    ids.copy_(ids_with_a_bad_one(ctx.rank))
    for _ in range(2):
        graph.replay()
        torch.npu.synchronize()
    said = bad_id_said("low_latency_dispatch", 5, 2, ctx.rank)
    assert error_of(step) == f"deep_ep.low_latency_dispatch: {HEARD}{said}"


@pytest.mark.parametrize(
    "check", [check_heard, check_count_fails, check_replay_fails], ids=lambda check: check.__name__
)
def test_a_failure_is_heard(npus: RankPool, check: Any) -> None:
    npus.run(SIZE, check)


def check_patience(ctx: RankContext) -> None:
    """Kernels wait for as long as they are told to, and less than the device lets them."""
    op_timeout = ctypes.c_uint32()
    Twin(twin_kernels.build()).configure(Setup())
    torch.npu.set_device(ctx.rank)
    torch.empty(1, device="npu")
    assert ctypes.CDLL("libascendcl.so").aclrtGetOpExecuteTimeout(ctypes.byref(op_timeout)) == 0
    default = int(env.VARIABLES["DEEP_EP_KERNEL_TIMEOUT"].default)
    assert 0 < 1000 * default < 0.9 * op_timeout.value

    def seconds(group: dist.ProcessGroup) -> float:
        return deep_ep.npu.table(group.group_name)[4].item() / 50_000_000

    half_an_hour = 1800.0
    assert seconds(make_group(ctx, half_an_hour)) == default
    assert seconds(make_group(ctx, 2.5)) == 2.5
    os.environ["DEEP_EP_KERNEL_TIMEOUT"] = "7"
    try:
        group = make_group(ctx, half_an_hour)
        assert seconds(group) == 7
        os.environ["DEEP_EP_KERNEL_TIMEOUT"] = "0"
        with pytest.raises(ValueError, match="DEEP_EP_KERNEL_TIMEOUT must be a whole number of at least 1"):
            deep_ep.init(group)
    finally:
        del os.environ["DEEP_EP_KERNEL_TIMEOUT"]
    deep_ep.npu.check(group)


def test_how_long_kernels_wait(npus: RankPool) -> None:
    npus.run(SIZE, check_patience)
