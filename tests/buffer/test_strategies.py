"""Strategy objects: DeepEP-Ascend's classes over the ops, a program's own, and which of them a Buffer's calls take."""

import inspect
import os
from functools import partial
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from cases import assert_same
from ranks import RankContext, RankPool
from test_bad_input import error_of
from test_buffer import send
from torch._subclasses.fake_tensor import FakeTensorMode

import deep_ep
from deep_ep import ep_strategy, groups, ops, quantization, strategies
from deep_ep.kernels import torch_npu_ops
from deep_ep.ops import low_latency_combine, low_latency_dispatch

T, H, K, E, M, R = 5, 32, 2, 4, 6, 2

# Methods and arguments in order: sgl-kernel-npu at f425bdf1.
_LAYOUT = "topk_idx num_experts previous_event async_finish allocate_on_comm_stream"
_DISPATCH = (
    "x handle num_tokens_per_rank num_tokens_per_rdma_rank is_token_in_rank num_tokens_per_expert topk_idx "
    "topk_weights expert_alignment num_worst_tokens config previous_event async_finish allocate_on_comm_stream "
    "dispatch_wait_recv_cost_stats quant_mode"
)
_COMBINE = (
    "x handle topk_weights bias config previous_event async_finish allocate_on_comm_stream combine_send_cost_stats"
)
_LL_DISPATCH = (
    "x topk_idx num_max_dispatch_tokens_per_rank num_experts cumulative_local_expert_recv_stats use_fp8 round_scale "
    "use_ue8m0 use_mxfp4 async_finish return_recv_hook topk_weights quant_mode"
)
_LL_COMBINE = "x topk_idx topk_weights handle zero_copy async_finish return_recv_hook out"
METHODS = {
    "NormalEPCommStrategy": {"get_dispatch_layout": _LAYOUT, "dispatch": _DISPATCH, "combine": _COMBINE},
    "LowLatencyEPCommStrategy": {"low_latency_dispatch": _LL_DISPATCH, "low_latency_combine": _LL_COMBINE},
}
CLASSES = {
    "normal": {"default": "DefaultNormalCommStrategy", "alltoall": "AlltoAllNormalCommStrategy"},
    "low_latency": {
        "default": "DefaultLowLatencyCommStrategy",
        "ops": "OpsLowLatencyCommStrategy",
        "alltoall": "AllToAllLowLatencyCommStrategy",
    },
}


def test_names_of_the_peer() -> None:
    for kind, classes in CLASSES.items():
        get = getattr(ep_strategy, f"get_{kind}_strategy")
        module = __import__(f"deep_ep.strategies.{kind}_strategy", fromlist=["_"])
        for name, title in classes.items():
            cls = get(name)
            assert cls is getattr(strategies, title) is getattr(module, title)
            assert list(inspect.signature(cls).parameters)[:2] == ["runtime", "group"]
        with pytest.raises(ValueError, match=f"{kind}_strategy must be one of default, alltoall.*got 'ring'"):
            get("ring")
    for title, methods in METHODS.items():
        abstract = getattr(ep_strategy, title)
        assert abstract.__abstractmethods__ == {"get_name", "get_supported_modes", *methods}
        own = [cls for cls in vars(strategies).values() if isinstance(cls, type) and issubclass(cls, abstract)]
        assert len(own) > 2
        for cls in own:
            for name, arguments in methods.items():
                ours = list(inspect.signature(getattr(cls, name)).parameters)[1:]
                assert ours[: len(arguments.split())] == arguments.split(), (cls, name)
    # Members are their names, as in the peer.
    assert [deep_ep.NormalStrategy.ALLTOALL, deep_ep.LowLatencyStrategy.OPS] == ["alltoall", "ops"]
    assert deep_ep.LowLatencyStrategy.get_all_strategies() == ["default", "alltoall", "ops"]


def inputs(rank: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    ids = (torch.arange(T * K).view(T, K) + rank) % E
    x = (torch.arange(T * H).view(T, H) % 64 + rank).bfloat16()
    return x, ids, torch.ones(T, K)


def normal_layer(buffer: deep_ep.Buffer, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    rows, *_, handle, _ = send(buffer, x, ids, E, topk_weights=weights, num_worst_tokens=R * T * K)
    return buffer.combine(rows, handle)[0]


def low_latency_layer(buffer: deep_ep.Buffer, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> Any:
    rows, _, handle, *_ = buffer.low_latency_dispatch(x, ids, M, E, use_fp8=False)
    return buffer.low_latency_combine(rows, ids, weights, handle)[0]


def check_way(layer: Any, group: dist.ProcessGroup, name: str) -> None:
    """What the windows have seen tells by which strategy a call went."""
    x, ids, weights = inputs(group.rank())
    since = groups.op_log(group)[1]
    assert_same(name, layer(x, ids, weights), K * x)
    assert len(groups.op_log(group, since)[0]) == (2 if name == "default" else 0), name


def switch(ctx: RankContext) -> None:
    torch._dynamo.reset()
    group = ctx.prepared_group("default")
    x, ids, weights = inputs(ctx.rank)
    buffer = deep_ep.Buffer(group, 0, 0, False, 12, True, False, "default", "alltoall")
    assert (buffer.normal_strategy.get_name(), buffer.low_latency_strategy.get_name()) == ("default", "alltoall")
    for attribute, layer in (("normal_strategy", normal_layer), ("low_latency_strategy", low_latency_layer)):
        get = getattr(ep_strategy, f"get_{attribute}")
        made = get("alltoall")(runtime=buffer.runtime, group=group)
        for given in (made, "default", deep_ep.NormalStrategy.ALLTOALL, get("default")):
            setattr(buffer, attribute, given)
            check_way(partial(layer, buffer), group, getattr(buffer, attribute).get_name())
        assert getattr(buffer, attribute).get_name() == "default"
    compiled = torch.compile(partial(normal_layer, buffer), backend="aot_eager", fullgraph=True)
    for name in ("default", "alltoall", "default"):
        buffer.normal_strategy = name
        check_way(compiled, group, name)

    # What cannot be one is refused, and changes nothing.
    other, before = ctx.prepared_group("alltoall"), buffer.normal_strategy
    foreign = strategies.AlltoAllNormalCommStrategy(group=other)
    by_rank = deep_ep.Buffer(group, rows="rank").normal_strategy
    for given, text in (
        ("ops", "normal_strategy must be one of default, alltoall"),
        (None, "normal_strategy must be a strategy, or the name of one; got None without get_dispatch_layout"),
        (buffer.low_latency_strategy, "without get_dispatch_layout"),
        (foreign, "normal_strategy must be of the group"),
        (by_rank, 'must have rows="expert", got one with rows="rank"'),
    ):
        kind, message = error_of(setattr, buffer, "normal_strategy", given)
        assert kind == "ValueError" and text in message, message
    assert buffer.normal_strategy is before
    for arguments, text in (((buffer, group), "runtime must be"), ((buffer.runtime, other), "group must be")):
        assert text in error_of(strategies.DefaultNormalCommStrategy, *arguments)[1]
    assert_same("afterwards", normal_layer(buffer, x, ids, weights), K * x)


def test_an_assigned_strategy_is_taken(pool: RankPool) -> None:
    pool.run(R, switch)


class Doubling(ep_strategy.NormalEPCommStrategy):
    """A program's: it sends twice x. Signatures are the abstract ones, which have hardly a default."""

    def __init__(self, runtime: Any, group: dist.ProcessGroup) -> None:
        super().__init__(group)
        self.inner = strategies.DefaultNormalCommStrategy(runtime, group)

    def get_name(self) -> str:
        return "doubling"

    def get_supported_modes(self) -> list[str]:
        return ["normal"]

    def get_dispatch_layout(self, *args: Any, **kwargs: Any) -> Any:
        return self.inner.get_dispatch_layout(*args, **kwargs)

    def dispatch(
        self,
        x: Any,
        handle: Any,
        num_tokens_per_rank: Any,
        num_tokens_per_rdma_rank: Any,
        is_token_in_rank: Any,
        num_tokens_per_expert: Any,
        topk_idx: Any,
        topk_weights: Any,
        expert_alignment: Any,
        num_worst_tokens: Any,
        config: Any,
        previous_event: Any,
        async_finish: Any,
        allocate_on_comm_stream: Any,
        dispatch_wait_recv_cost_stats: Any,
        quant_mode: Any = None,
    ) -> Any:
        assert isinstance(config, deep_ep.Config)
        layout = num_tokens_per_rank, num_tokens_per_rdma_rank, is_token_in_rank, num_tokens_per_expert
        return self.inner.dispatch(
            x * 2, handle, *layout, topk_idx, topk_weights, expert_alignment, num_worst_tokens, config
        )

    def combine(
        self,
        x: Any,
        handle: Any,
        topk_weights: Any,
        bias: Any,
        config: Any,
        previous_event: Any,
        async_finish: Any,
        allocate_on_comm_stream: Any,
        combine_send_cost_stats: Any,
    ) -> Any:
        return self.inner.combine(x, handle, topk_weights, bias, config)


class Gathering(ep_strategy.LowLatencyEPCommStrategy):
    """A program's, by torch.distributed alone: every rank gets everything; handle and rows are what it likes."""

    def __init__(self, runtime: Any, group: dist.ProcessGroup) -> None:
        super().__init__(group)

    def get_name(self) -> str:
        return "gathering"

    def get_supported_modes(self) -> list[str]:
        return ["low_latency"]

    def low_latency_dispatch(
        self,
        x: Any,
        topk_idx: Any,
        num_max_dispatch_tokens_per_rank: Any,
        num_experts: Any,
        cumulative_local_expert_recv_stats: Any,
        use_fp8: Any,
        round_scale: Any,
        use_ue8m0: Any,
        use_mxfp4: Any,
        async_finish: Any,
        return_recv_hook: Any,
        topk_weights: Any,
        quant_mode: Any,
    ) -> Any:
        if self.rank == 1 and num_max_dispatch_tokens_per_rank == 0:
            raise KeyError("not here")
        rows = [torch.empty_like(x) for _ in range(self.group_size)]
        dist.all_gather(rows, x, group=self.group)
        return torch.cat(rows), quant_mode, {"T": len(x)}, None, None

    def low_latency_combine(
        self,
        x: Any,
        topk_idx: Any,
        topk_weights: Any,
        handle: Any,
        zero_copy: Any,
        async_finish: Any,
        return_recv_hook: Any,
        out: Any,
    ) -> Any:
        first = self.rank * handle["T"]
        return x[first : first + handle["T"]] * topk_weights.sum(1, keepdim=True).to(x.dtype), None, None


def own(ctx: RankContext) -> None:
    torch._dynamo.reset()
    registered = dict(ep_strategy._normal), dict(ep_strategy._low_latency)
    try:
        assert ep_strategy.register_normal_strategy("doubling")(Doubling) is Doubling
        strategies.register_low_latency_strategy("gathering")(Gathering)
        buffer = deep_ep.Buffer(
            ctx.prepared_group("default"), normal_strategy="doubling", low_latency_strategy="gathering"
        )
    finally:
        ep_strategy._normal.update(registered[0])
        for now, before in zip((ep_strategy._normal, ep_strategy._low_latency), registered, strict=True):
            now.clear()
            now.update(before)
    x, ids, weights = inputs(ctx.rank)
    assert (type(buffer.normal_strategy), type(buffer.low_latency_strategy)) == (Doubling, Gathering)
    layer = partial(normal_layer, buffer)
    assert_same("eager", layer(x, ids, weights), 2 * K * x)
    leaf = x.clone().requires_grad_()
    out = torch.compile(layer, backend="aot_eager", fullgraph=True)(leaf, ids, weights)
    assert_same("compiled", out, 2 * K * x)
    out.sum().backward()
    assert_same("grad", leaf.grad, torch.full_like(x, 2 * K))

    rows, mode, handle, *_ = buffer.low_latency_dispatch(x, ids, M, E)  # flags as quant_mode, as in the peer
    assert mode == "int8"
    assert_same("combined", buffer.low_latency_combine(rows, ids, weights, handle)[0], K * x)
    assert buffer.low_latency_dispatch(x, ids, M, E, use_fp8=False)[1] is None

    # What a program's own does on one rank alone is not taken for a call of the ops; what it calls of them is told.
    if ctx.rank == 1:
        assert error_of(buffer.low_latency_dispatch, x, ids, 0, E)[0] == "KeyError"
        assert error_of(buffer.low_latency_dispatch, x, ids, M, E, later=True)[0] == "TypeError"
        assert error_of(buffer.low_latency_dispatch, x, ids, M, E, dispatch_wait_recv_cost_stats=ids)[0] == "TypeError"
    kind, message = error_of(layer, x, ids, weights[:, : K - ctx.rank])
    assert kind == "RuntimeError" and "rank 1: topk_weights must have" in message, message
    assert_same("afterwards", layer(x, ids, weights), 2 * K * x)


def test_a_program_has_a_strategy_of_its_own(pool: RankPool) -> None:
    pool.run(R, own)


def capacity(ctx: RankContext) -> None:
    """Expert l of rank q from row (l·R + q)·M on, behind the class; what the name gives a Buffer is as default."""
    torch._dynamo.reset()
    group = ctx.prepared_group("default")
    L = E // R
    x, ids, weights = inputs(ctx.rank)
    packed = deep_ep.Buffer(group, low_latency_strategy="alltoall")
    default = deep_ep.Buffer(group, low_latency_strategy="default")
    buffer = deep_ep.Buffer(group)
    buffer.low_latency_strategy = strategies.AllToAllLowLatencyCommStrategy(runtime=buffer.runtime, group=group)

    wanted, source = torch.zeros(L * R * M, H, dtype=x.dtype), torch.full((L * R * M, 3), -1, dtype=torch.int32)
    received = torch.zeros(L, dtype=torch.int32)
    for q in range(R):
        x_of_q, ids_of_q, _ = inputs(q)
        for l in range(L):
            t, k = (ids_of_q == ctx.rank * L + l).nonzero(as_tuple=True)
            first = (l * R + q) * M
            wanted[first : first + len(t)] = x_of_q[t]
            source[first : first + len(t)] = torch.stack([torch.full_like(t, q), t, k], 1).int()
            received[l] += len(t)
    stats = torch.zeros_like(received)
    rows, counts, handle, *_ = buffer.low_latency_dispatch(
        x, ids, M, E, use_fp8=False, cumulative_local_expert_recv_stats=stats
    )
    assert_same("rows", rows, wanted)
    assert_same("src_info", handle[0], source)
    assert counts.tolist() == [R * M] * L and handle["recv_count"] is counts
    assert (handle[2], handle[3], handle[4]) == (M, H, E)
    assert_same("stats", stats, received)
    assert buffer.get_next_low_latency_combine_buffer(handle).shape == rows.shape
    spoiled = torch.where(source[:, :1] < 0, torch.nan, rows)
    assert_same("combined", buffer.low_latency_combine(spoiled, ids, weights, handle)[0], K * x)
    kind, message = error_of(buffer.low_latency_combine, rows[1:], ids, weights, handle)
    assert kind == "ValueError" and "x must have the shape [L·R·M, H]" in message

    for mode in ("int8", "mx_fp8_e4m3"):
        (data, scales), *_ = buffer.low_latency_dispatch(x, ids, M, E, quant_mode=mode)
        (of_packed, scales_of_packed), *_ = packed.low_latency_dispatch(x, ids, M, E, quant_mode=mode)
        used = source[:, 0] >= 0
        n = int(used.sum())
        assert_same(mode, data.view(torch.int8)[used], of_packed.view(torch.int8)[:n])
        by_row = scales.view(torch.uint8).view(len(data), -1)
        by_packed_row = scales_of_packed.view(torch.uint8).view(len(of_packed), -1)
        assert_same("scales", by_row[used], by_packed_row[:n])
        assert scales.dim() == 1

    leaf = x.clone().requires_grad_()
    out = torch.compile(partial(low_latency_layer, buffer), backend="aot_eager", fullgraph=True)(leaf, ids, weights)
    assert_same("compiled", out, K * x)
    out.sum().backward()
    assert_same("grad", leaf.grad, torch.full_like(x, K))
    for mine, of_default in zip(
        packed.low_latency_dispatch(x, ids, M, E, use_fp8=False)[:2],
        default.low_latency_dispatch(x, ids, M, E, use_fp8=False)[:2],
        strict=True,
    ):
        assert_same("by name", mine, of_default)


def test_capacity_of_alltoall(pool: RankPool) -> None:
    pool.run(R, capacity)


# The strategy ops, over a stand-in for torch_npu's operators


class Operators:
    """What torch_npu's operators are called with, and their results by the ops of the strategy default."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.info = groups.info_of(group)
        self.group = group
        self.calls: list[dict[str, Any]] = []

    def __call__(self, op: str, name: str, x: torch.Tensor) -> Any:
        return {"npu_moe_distribute_dispatch_v2": self.dispatch, "npu_moe_distribute_combine_v2": self.combine}[name]

    def dispatch(self, x: torch.Tensor, expert_ids: torch.Tensor, **given: Any) -> tuple[torch.Tensor, ...]:
        self.calls.append({"T": len(x), "dtype": expert_ids.dtype} | given)
        mask, smooth, weights = given["x_active_mask"], given["scales"], given["expert_scales"]
        ids = expert_ids.long()
        if mask is not None:
            ids = ids.where(mask if mask.dim() == 2 else mask.unsqueeze(1), -1)
        out = low_latency_dispatch.call(self.info, x, ids, given["global_bs"] // R, E)
        self.handle, self.ids = out.handle, ids
        source = out.handle.src_info
        rows, used = out.recv_x, source[:, 0] >= 0
        scales, expand_scales = torch.empty(len(rows)), torch.empty(0)
        if weights is not None:
            of_all = [torch.empty_like(weights) for _ in range(R)]
            dist.all_gather(of_all, weights, group=self.group)
            q, t, k = source.long().clamp(min=0).unbind(1)
            expand_scales = torch.stack(of_all)[q, t, k].where(used, 0)
        if smooth is not None:
            expert = torch.repeat_interleave(torch.arange(E // R), out.recv_count) + self.group.rank() * E // R
            smoothed = rows.clone()
            smoothed[: len(expert)] *= smooth[expert].to(rows.dtype)
            rows, scales = quantization.quantize(smoothed, "int8", low_latency=True)
        assist_info = torch.cat([source, source.new_zeros(len(source), 125)], 1).flatten()
        return rows, scales, assist_info, out.recv_count, out.handle.layout_range, torch.empty(0), expand_scales

    def combine(
        self,
        x: torch.Tensor,
        expert_ids: torch.Tensor,
        assist_info: torch.Tensor,
        counts: torch.Tensor,
        weights: torch.Tensor,
        **given: Any,
    ) -> torch.Tensor:
        given |= {"assist_info": assist_info, "counts": counts, "weights": weights}
        self.calls.append({"T": len(expert_ids)} | given)
        combined = low_latency_combine.call(self.info, x, self.ids, weights, self.handle)
        mask = given["x_active_mask"]
        return combined if mask is None else combined.where(mask.unsqueeze(1), torch.nan)  # undefined there


def by_operators(ctx: RankContext) -> None:
    torch._dynamo.reset()
    group = ctx.prepared_group("default")
    x, ids, weights = inputs(ctx.rank)
    weights = torch.linspace(0.5, 2, T * K).view(T, K).bfloat16().float()
    default = deep_ep.Buffer(group)
    wanted, wanted_counts, *_ = default.low_latency_dispatch(x, ids, M, E, use_fp8=False)
    of_default = default.low_latency_dispatch(x, ids, M, E, use_fp8=False)[2]
    total = default.low_latency_combine(wanted, ids, weights, of_default)[0]
    operators = Operators(group)
    by_group = {"ep_world_size": R, "ep_rank_id": ctx.rank, "moe_expert_num": E}
    with (
        mock.patch.object(torch_npu_ops, "_operator", operators),
        mock.patch.object(torch_npu_ops, "_group_arguments", lambda *_: by_group),
    ):
        # The peer's comm_alg, which wants as many tokens on all ranks, and their weights.
        buffer = deep_ep.Buffer(group, low_latency_strategy="ops")
        assert buffer.low_latency_strategy.comm_alg == "hierarchy"
        stats = torch.zeros(E // R, dtype=torch.int32)
        rows, counts, handle, event, hook = buffer.low_latency_dispatch(
            *(x, ids, M, E),
            use_fp8=False,
            topk_weights=weights,
            cumulative_local_expert_recv_stats=stats,
            async_finish=True,
        )
        event.current_stream_wait()
        hook()
        assert_same("rows", rows, wanted)
        assert_same("counts", counts, wanted_counts)
        assert_same("stats", stats, wanted_counts.int())
        (call,) = operators.calls
        assert (call["T"], call["dtype"], call["comm_alg"], call["quant_mode"]) == (M, torch.int32, "hierarchy", 0)
        assert call["global_bs"] == R * M and call["x_active_mask"].tolist() == [True] * T + [False] * (M - T)
        assert_same("expert_scales", call["expert_scales"][:T], weights)
        assert len(handle) == 10 and (handle[2], handle[3], handle[4]) == (M, H, E)
        for place, name in ((7, "x_active_mask"), (9, "expert_scales")):
            assert_same(name, handle[place], call[name])
        assert handle["expand_scales"].shape == (len(rows),) and handle["recv_count"] is counts
        into = torch.empty(T, H, dtype=x.dtype)
        combined, _, hook = buffer.low_latency_combine(rows, ids, weights, tuple(handle), out=into)
        hook()
        assert combined is into or combined.data_ptr() == into.data_ptr()
        assert_same("combined", combined, total)
        *_, call = operators.calls
        assert (call["T"], call["comm_alg"]) == (M, "hierarchy")
        for name, place in (("assist_info", 0), ("counts", 1), ("expand_scales", 6), ("x_active_mask", 7)):
            assert_same(name, call[name], handle[place])
        kind, message = error_of(buffer.low_latency_dispatch, x, ids, M, E, use_fp8=False)
        assert kind == "ValueError" and "topk_weights is missing: comm_alg hierarchy" in message

        # Rows that are quantised here, and an own mask; nothing is padded.
        buffer.low_latency_strategy = strategies.OpsLowLatencyCommStrategy(buffer.runtime, group, "fullmesh_v2")
        mask = torch.arange(T) < 3
        strategy = buffer.low_latency_strategy
        own = strategy.low_latency_dispatch(x, ids.int(), M, E, x_active_mask=mask, use_fp8=False)
        *_, call = operators.calls
        assert (call["T"], call["comm_alg"], call["x_active_mask"] is mask) == (T, "fullmesh_v2", True)
        combined = buffer.low_latency_combine(own[0], ids, weights.bfloat16(), own[2])[0]
        assert_same("masked", combined, total.where(mask.unsqueeze(1), 0))
        (data, scales), *_ = buffer.low_latency_dispatch(x, ids, M, E)
        (of_default, scales_of_default), *_ = default.low_latency_dispatch(x, ids, M, E)
        assert_same("data", data, of_default)
        assert_same("scales", scales, scales_of_default)

        # Smooth scales make the operators quantise.
        smooth = torch.full((E, H), 2.0)
        smoothing = strategies.OpsLowLatencyCommStrategy(buffer.runtime, group, "ccu", smooth)
        buffer.low_latency_strategy = smoothing
        (data, scales), *_ = buffer.low_latency_dispatch(x, ids, M, E)
        *_, call = operators.calls
        assert (call["quant_mode"], call["scales"] is smooth) == (2, True)
        n = int(wanted_counts.sum())
        torch.testing.assert_close(quantization.dequantize(data, scales)[:n], 2 * wanted[:n].float(), rtol=0.02, atol=1)
        kind, message = error_of(buffer.low_latency_dispatch, x, ids, M, E, quant_mode="mx_fp8_e4m3")
        assert kind == "ValueError" and "smooth_scales are for" in message

        buffer.low_latency_strategy = "ops"

        def layer(x: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
            rows, _, handle, *_ = buffer.low_latency_dispatch(x, ids, M, E, use_fp8=False, topk_weights=weights)
            return buffer.low_latency_combine(rows, ids, weights, handle)[0]

        compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
        assert_same("compiled", compiled(x, weights), total)
        assert error_of(layer, x, weights.clone().requires_grad_())[0] == "RuntimeError"
    assert "comm_alg must be one of" in error_of(strategies.OpsLowLatencyCommStrategy, buffer.runtime, group, "ring")[1]


def test_what_torch_npus_operators_get(pool: RankPool) -> None:
    pool.run(R, by_operators)


class SharedOperators:
    """torch_npu's operators with one shared expert on the first rank, for few tokens, by objects that go around."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group, self.rank, self.calls = group, group.rank(), []

    def __call__(self, op: str, name: str, x: torch.Tensor) -> Any:
        return {"npu_moe_distribute_dispatch_v2": self.dispatch, "npu_moe_distribute_combine_v2": self.combine}[name]

    def _of_all(self, mine: Any) -> list[Any]:
        everyone = [None] * R
        dist.all_gather_object(everyone, mine, group=self.group)
        return everyone

    def dispatch(self, x: torch.Tensor, expert_ids: torch.Tensor, **given: Any) -> tuple[torch.Tensor, ...]:
        self.calls.append(given)
        everyone, counts, rows, source = self._of_all((x, expert_ids)), [], [], []
        local = [None] if self.rank == 0 else range(E)
        for expert in local:
            before = len(rows)
            for q, (tokens, ids) in enumerate(everyone):
                for t in range(len(tokens)):
                    for k in [K] if expert is None else (ids[t] == expert).nonzero()[:, 0].tolist():
                        rows.append(tokens[t])
                        source.append([q, t, k])
            counts.append(len(rows) - before)
        N = M * R if self.rank == 0 else M * R * K
        recv_x, assist_info = x.new_zeros(N, x.shape[1]), torch.full((N, 128), -1, dtype=torch.int32)
        recv_x[: len(rows)] = torch.stack(rows)
        assist_info[: len(rows), :3] = torch.tensor(source)
        running = torch.zeros(R * len(counts), dtype=torch.int32)
        return recv_x, torch.empty(N), assist_info.view(-1), torch.tensor(counts), running, None, torch.empty(0)

    def combine(
        self, x: torch.Tensor, expert_ids: torch.Tensor, assist_info: torch.Tensor, *more: Any, **given: Any
    ) -> torch.Tensor:
        self.calls.append(given)
        weights = torch.cat([more[1], torch.ones(len(expert_ids), 1)], 1)
        out = torch.zeros(len(expert_ids), x.shape[1])
        for rows, info in self._of_all((x, assist_info.view(-1, 128)[:, :3])):
            for row, (q, t, k) in zip(rows, info.tolist(), strict=True):
                if q == self.rank:
                    out[t] += weights[t, k] * row.float()
        return out.to(x.dtype)


def by_shared_ranks(ctx: RankContext) -> None:
    group = ctx.prepared_group("default")
    x, ids, weights = inputs(ctx.rank)
    operators = SharedOperators(group)
    by_group = {"ep_world_size": R, "ep_rank_id": ctx.rank, "moe_expert_num": E}
    with (
        mock.patch.object(torch_npu_ops, "_operator", operators),
        mock.patch.object(torch_npu_ops, "_group_arguments", lambda *_: by_group),
        mock.patch.dict(os.environ, MOE_SHARED_EXPERT_RANK_NUM="1"),
    ):
        buffer = deep_ep.Buffer(group, low_latency_strategy="ops", comm_alg="fullmesh_v1")
        rows, counts, handle, *_ = buffer.low_latency_dispatch(x, ids, M, E, use_fp8=False)
        assert rows.shape == ((R * M if ctx.rank == 0 else R * M * K), H)
        assert counts.shape == (1 if ctx.rank == 0 else E,)
        out, *_ = buffer.low_latency_combine(2 * rows, ids, weights, handle)
        wanted = 2 * x.float() * (1 + (weights * (ids >= 0)).sum(1, keepdim=True))
        torch.testing.assert_close(out.float(), wanted, rtol=0.02, atol=0.02)
        for call in operators.calls:
            assert (call["shared_expert_num"], call["shared_expert_rank_num"]) == (1, 1)
        # What graphs are made with.
        with FakeTensorMode(allow_non_fake_inputs=True):
            shared = ops.moe_distribute_dispatch.Shared(1, ctx.rank == 0)
            fakes = ops.moe_distribute_dispatch.call(buffer._info, x, ids, None, None, None, M, E, shared)
        assert (fakes.recv_x.shape, fakes.recv_count.shape) == (rows.shape, counts.shape)
        assert (fakes.assist_info.shape, fakes.layout_range.shape) == (handle[0].shape, handle[1].shape)
        for options in ({}, {"low_latency_strategy": "alltoall"}, {"low_latency_strategy": "ops", "rows": "rank"}):
            kind, text = error_of(lambda options=options: deep_ep.Buffer(group, **options))
            assert kind == "ValueError" and "MOE_SHARED_EXPERT_RANK_NUM must be 0 unless" in text
        with mock.patch.dict(os.environ, MOE_SHARED_EXPERT_RANK_NUM=str(R)):
            text = error_of(lambda: deep_ep.Buffer(group, low_latency_strategy="ops"))[1]
        assert f"must be less than the {R} ranks of the group; got {R}" in text
    # The environment says comm_alg where no argument does.
    with (
        mock.patch("deep_ep.buffer.runtime.platform_of", return_value="A3"),
        mock.patch.dict(os.environ, MOE_ENABLE_CCU="1"),
    ):
        assert deep_ep.Buffer(group, low_latency_strategy="ops").low_latency_strategy.comm_alg == "ccu"


def test_ranks_for_a_shared_expert(pool: RankPool) -> None:
    pool.run(R, by_shared_ranks)
