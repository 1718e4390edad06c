"""What torchair makes of every op, overload and mode: node types, order, inputs, attributes, dtypes and shapes, forward
and backward; and what these graphs compute, operation by operation, is what eager code computes.

T tokens · H hidden · K top-k · E experts · R ranks · L = E/R · N rows · W num_worst_tokens · M
num_max_dispatch_tokens_per_rank · I intermediate size · J = 2I. All sizes differ, so that a shape tells which tensor a
node has got.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import ge_graphs
import pytest
import torch
import torch_npu
from cases import Case, make_inputs
from ge_graphs import HOST_SYNCS, Graph, Node
from ranks import RankContext, RankPool
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from torchair.ge._ge_graph import Data, DataType, GeGraph, default_ge_graph

import deep_ep
from deep_ep import groups
from deep_ep.kernels import torch_npu_ops
from deep_ep.npu.ge import _converters as ge_converters
from deep_ep.strategies import OpsLowLatencyCommStrategy

R, H, K, L, W, M, I = 2, 16, 4, 6, 50, 9, 64
E = R * L
DTYPES = (torch.bfloat16, torch.float32)
ROWS = "rows"  # the dtype of x

ROUTED = {"topk_idx": (torch.int64, "TK"), "topk_weights": (torch.float32, "TK")}
RETURNING = {"recv_src_idx": (torch.int32, "N3"), "send_head": (torch.int32, "TK")}
INPUTS: dict[str, dict[str, Any]] = {
    "DeepEpGetDispatchLayout": {"topk_idx": (torch.int64, "TK")},
    "DeepEpDispatch": {"x": (ROWS, "TH"), **ROUTED, "num_worst_tokens": None, "windows": None},
    "DeepEpDispatchExact": {"x": (ROWS, "TH"), **ROUTED, "windows": None},
    "DeepEpDispatchInt8": {"x": (ROWS, "TH"), **ROUTED, "num_worst_tokens": None, "windows": None},
    "DeepEpDispatchInt8Exact": {"x": (ROWS, "TH"), **ROUTED, "windows": None},
    "DeepEpCombine": {"x": (ROWS, "NH"), **ROUTED, **RETURNING, "windows": None},
    "DeepEpDispatchBackward": {
        "grad_recv_x": (ROWS, "NH"),
        "grad_recv_topk_weights": (torch.float32, "NK"),
        "recv_src_idx": (torch.int32, "N3"),
        "topk_idx": (torch.int64, "TK"),
        "send_head": (torch.int32, "TK"),
        "windows": None,
    },
    "DeepEpCombineBackward": {
        "grad_out": (ROWS, "TH"),
        "x": (ROWS, "NH"),
        **ROUTED,
        **RETURNING,
        "windows": None,
    },
    "DeepEpLowLatencyDispatch": {"x": (ROWS, "TH"), "topk_idx": (torch.int64, "TK"), "windows": None},
    "DeepEpLowLatencyDispatchInt8": {"x": (ROWS, "TH"), "topk_idx": (torch.int64, "TK"), "windows": None},
    "DeepEpLowLatencyCombine": {
        "x": (ROWS, "NH"),
        **ROUTED,
        "recv_src_idx": (torch.int32, "N3"),
        "layout_range": (torch.int32, "E"),
        "send_head": (torch.int32, "TK"),
        "windows": None,
    },
    "DeepEpFusedDeepMoe": {
        "x": (ROWS, "TH"),
        **ROUTED,
        "gmm1_weight": (torch.int8, "LHJ"),
        "gmm1_weight_scale": (torch.float32, "LJ"),
        "gmm2_weight": (torch.int8, "LHI"),
        "gmm2_weight_scale": (torch.float32, "LH"),
        "windows": None,
    },
    "DeepEpFusedDeepMoeDispatchFfnCombine": {
        "x": (ROWS, "TH"),
        **ROUTED,
        "gmm1_weight": (torch.int8, "LHJ"),
        "gmm1_weight_scale": (torch.int64, "LJ"),
        "gmm2_weight": (torch.int8, "LIH"),
        "gmm2_weight_scale": (torch.int64, "LH"),
        "windows": None,
    },
    "DeepEpFusedDeepMoeBackward": {
        "grad_out": (ROWS, "TH"),
        "x": (ROWS, "TH"),
        **ROUTED,
        "gmm1_weight": (ROWS, "LHJ"),
        "gmm2_weight": (ROWS, "LHI"),
        "windows": None,
    },
    "DeepEpFusedDeepMoeBackwardDispatchFfnCombine": {
        "grad_out": (ROWS, "TH"),
        "x": (ROWS, "TH"),
        **ROUTED,
        "gmm1_weight": (ROWS, "LHJ"),
        "gmm2_weight": (ROWS, "LIH"),
        "windows": None,
    },
}
"""By type: the inputs in order, with dtype and shape; None for what no FX node stands for. Those of fused_deep_moe are
for int8.
"""

_OF_LOW_LATENCY = {"num_experts": E, "num_ranks": R, "num_max_dispatch_tokens_per_rank": M, "zero_unused": 1}
ATTRIBUTES = {
    "DeepEpGetDispatchLayout": {"num_experts": E, "num_ranks": R, "num_nodes": 1},
    "DeepEpLowLatencyDispatch": _OF_LOW_LATENCY,
    "DeepEpLowLatencyDispatchInt8": _OF_LOW_LATENCY,
    **{
        f"DeepEpFusedDeepMoe{part}{mode}": {
            "num_experts": E,
            "num_ranks": R,
            "num_max_dispatch_tokens_per_rank": M,
            **({} if part else {"quant_mode": 1}),
        }
        for part in ("", "Backward")
        for mode in ("", "DispatchFfnCombine")
    },
}


@dataclass(frozen=True)
class Sizes:
    """Of a graph: -1 for a symbol."""

    dtype: torch.dtype
    T: int
    N: int
    quant_mode: int = 1

    def of(self, symbols: str) -> list[int]:
        known = {"T": self.T, "N": self.N, "H": H, "K": K, "E": E, "L": L, "I": I, "J": 2 * I, "3": 3, "0": 0}
        return [known[symbol] for symbol in symbols]


def check_node(node: Node, group: str, sizes: Sizes) -> None:
    wanted = INPUTS[node.type]
    attributes = ATTRIBUTES.get(node.type, {"num_experts": E, "num_ranks": R})
    if "quant_mode" in attributes and sizes.quant_mode == 0:
        attributes = attributes | {"quant_mode": 0}
        for gmm in ("gmm1_weight", "gmm2_weight"):
            scale = f"{gmm}_scale"
            wanted = wanted | {gmm: (ROWS, wanted[gmm][1]), scale: (wanted[scale][0], "00")}
    assert list(node.inputs) == list(wanted), node
    for name, what in wanted.items():
        fake = node.input_fakes[name]
        if what is None:
            assert not isinstance(fake, Tensor), (node.type, name, fake)
            continue
        dtype, symbols = what
        assert fake.dtype == (sizes.dtype if dtype is ROWS else dtype), (node.type, name, fake)
        shape = [
            dim if s not in "TN" or sizes.of(s)[0] != -1 else -1 for dim, s in zip(fake.shape, symbols, strict=True)
        ]
        assert shape == sizes.of(symbols), (node.type, name, fake)
        for s, dim in zip(symbols, fake.shape, strict=True):
            assert ge_graphs.is_static(dim) == (sizes.of(s)[0] != -1) or s not in "TN", (node.type, name, fake)
    if "windows" in wanted:
        assert node.inputs["windows"] == ("Data", 0)
        attributes = attributes | {"group": group}
    assert node.attrs == attributes, node


def check_order(graph: Graph, types: list[str]) -> None:
    """The communicating nodes are of these types, and each waits for the one before."""
    assert graph.types == types, graph.types
    for before, node in zip(graph.communicating, graph.communicating[1:], strict=False):
        assert before.type in node.behind, node


def weights_of(rank: int) -> Tensor:
    return torch.randn(H, H, generator=torch.Generator().manual_seed(rank))


def run_and_compare(
    step: Callable[..., Tensor], fn: Callable[..., Tensor], x: Tensor, ids: Tensor, weights: Tensor, w: Tensor
) -> None:
    """fn, compiled, gives what step gives, and the same gradients."""
    leaves = [tensor.clone().requires_grad_() for tensor in (x, weights, w)]
    copies = [tensor.clone().requires_grad_() for tensor in (x, weights, w)]
    out, wanted = fn(leaves[0], ids, leaves[1], leaves[2]), step(copies[0], ids, copies[1], copies[2])
    torch.testing.assert_close(out, wanted)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out.dtype)
    for actual, expected in zip(
        torch.autograd.grad(out, leaves, grad), torch.autograd.grad(wanted, copies, grad), strict=True
    ):
        torch.testing.assert_close(actual, expected)


def inputs_of(rank: int, T: int, dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, ...]:
    case = Case((T, T), H=H, K=K, local_experts=L, dtype=dtype, ids="distinct", seed=seed)
    x, ids, weights, _ = (given[rank] for given in make_inputs(case))
    return x, ids, weights, weights_of(rank).to(dtype)


def issued(group: str, strategy: str) -> int:
    return groups.op_log(group)[1] if strategy == "default" else 0


# Normal mode

FORWARD = {
    ("default", False): ["DeepEpDispatch", "DeepEpCombine"],
    ("default", True): ["DeepEpDispatchExact", "DeepEpCombine"],
    # Slots, rows and weights one way, rows the other.
    ("alltoall", False): ["HcomAllGather", *["HcomAllToAll"] * 4],
    ("alltoall", True): ["HcomAllGather", *["HcomAllToAllV"] * 4],
}
BACKWARD = {
    ("default", False): ["DeepEpCombineBackward", "DeepEpDispatchBackward"],
    ("default", True): ["DeepEpCombineBackward", "DeepEpDispatchBackward"],
    # Gradients and weights one way, products the other; rows and gradients of weights.
    ("alltoall", False): ["HcomAllToAll"] * 5,
    ("alltoall", True): ["HcomAllToAllV"] * 5,
}


def normal_mode(
    ctx: RankContext, strategy: str, exact: bool, dynamic: bool, dtype: torch.dtype, start: bool = False
) -> None:
    group = ctx.prepared_group(strategy).group_name
    dispatch = through_wait(deep_ep.dispatch_start) if start else deep_ep.dispatch
    combine = through_wait(deep_ep.combine_start) if start else deep_ep.combine

    def step(x: Tensor, ids: Tensor, weights: Tensor, w: Tensor) -> Tensor:
        # In capacity mode all rows fit, in a number that depends on T where T is a symbol.
        rows = 0 if exact else R * K * x.shape[0] + 1 if dynamic else W + 10
        out = dispatch(x, ids, weights, num_experts=E, group=group, num_worst_tokens=rows)
        return combine(torch.nn.functional.gelu(out.recv_x @ w), out.handle, group=group)

    fn = ge_graphs.compiled(step, exact=exact, dynamic=dynamic)
    counts = (5, 7, 3) if dynamic else (5,)
    for T in counts:
        before = issued(group, strategy)
        run_and_compare(step, fn, *inputs_of(ctx.rank, T, dtype, seed=T))
        # Each op ran once compiled and once eagerly, combine_backward in two parts, and none while graphs were made.
        assert issued(group, strategy) - before == (10 if strategy == "default" else 0)
    forward, backward = ge_graphs.recorded()  # no more: one graph each for all T

    T, N = (-1 if dynamic else 5), (-1 if exact or dynamic else W + 10)
    check_order(forward, FORWARD[strategy, exact])
    check_order(backward, BACKWARD[strategy, exact])
    for graph in (forward, backward):
        assert ge_graphs.check_outputs(graph) > 5
        for node in graph.of_type(*INPUTS):
            check_node(node, group, Sizes(dtype, T, N))
        for node in graph.of_type("HcomAllToAll", "HcomAllToAllV", "HcomAllGather"):
            check_collective(node, group)
        assert exact or not [node.type for node in graph.nodes if node.type in HOST_SYNCS]
        assert ("Table" in graph.input_kinds) == (strategy == "default")
    assert forward.results[0] == [T, -1 if dynamic else H]
    if strategy == "default":
        first, second = forward.communicating
        assert second.inputs["recv_src_idx"] == (first.type, 8)
        assert second.inputs["send_head"] == (first.type, 9)
        assert first.inputs.get("num_worst_tokens", ("Const", 0))[0] == ("Add" if dynamic and not exact else "Const")


def through_wait(start: Callable[..., deep_ep.Started]) -> Callable[..., Any]:
    return lambda *args, **kwargs: deep_ep.wait(start(*args, **kwargs))


def check_collective(node: Node, group: str) -> None:
    attributes = {"group": group}
    if node.type == "HcomAllGather":
        attributes |= {"rank_size": R, "fusion": 0, "fusion_id": -1}
    assert node.attrs == attributes, node
    if node.type == "HcomAllToAllV":
        names = ["send_data", "send_counts", "send_displacements", "recv_counts", "recv_displacements"]
        assert list(node.inputs) == names
        # Counts are computed in the graph: not one of them is a constant.
        assert not any(node.inputs[name][0] == "Const" for name in names)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("exact", [False, True], ids=["capacity", "exact"])
@pytest.mark.parametrize("strategy", ["default", "alltoall"])
def test_normal_mode(pool: RankPool, strategy: str, exact: bool, dynamic: bool, dtype: torch.dtype) -> None:
    pool.run(R, normal_mode, strategy, exact, dynamic, dtype)


@pytest.mark.parametrize("exact", [False, True], ids=["capacity", "exact"])
@pytest.mark.parametrize("strategy", ["default", "alltoall"])
def test_start_and_wait_leave_no_trace(pool: RankPool, strategy: str, exact: bool) -> None:
    pool.run(R, normal_mode, strategy, exact, False, torch.float32, True)


def uneven(ctx: RankContext, strategy: str, exact: bool) -> None:
    """Ranks with other numbers of tokens, one of them with none."""
    group = ctx.prepared_group(strategy).group_name

    def step(x: Tensor, ids: Tensor, weights: Tensor, w: Tensor) -> Tensor:
        rows = 0 if exact else W
        out = deep_ep.dispatch(x, ids, weights, num_experts=E, group=group, num_worst_tokens=rows)
        return deep_ep.combine(torch.nn.functional.gelu(out.recv_x @ w), out.handle, group=group)

    T = 0 if ctx.rank == 0 else 7
    run_and_compare(step, ge_graphs.compiled(step, exact=exact), *inputs_of(ctx.rank, T, torch.float32))
    forward, backward = ge_graphs.recorded()
    # A rank without tokens takes part in everything.
    assert forward.types == FORWARD[strategy, exact]
    assert backward.types == BACKWARD[strategy, exact]


@pytest.mark.parametrize("exact", [False, True], ids=["capacity", "exact"])
@pytest.mark.parametrize("strategy", ["default", "alltoall"])
def test_a_rank_without_tokens(pool: RankPool, strategy: str, exact: bool) -> None:
    pool.run(R, uneven, strategy, exact)


# Low latency

LOW_LATENCY = {
    "default": (["DeepEpLowLatencyDispatch", "DeepEpLowLatencyCombine"], BACKWARD["default", False]),
    "alltoall": (FORWARD["alltoall", False], BACKWARD["alltoall", False]),
    "ops": (["MoeDistributeDispatchV2", "MoeDistributeCombineV2"], None),
}


def low_latency(ctx: RankContext, strategy: str, dynamic: bool, hooks: bool) -> None:
    group = ctx.prepared_group("alltoall" if strategy == "alltoall" else "default")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DEEP_USE_MODE", "alltoall" if strategy == "alltoall" else "default")
        buffer = deep_ep.Buffer(group, low_latency_strategy=strategy, comm_alg="fullmesh_v2")

    def step(x: Tensor, ids: Tensor, weights: Tensor, w: Tensor) -> Tensor:
        recv_x, _, handle, _, hook = buffer.low_latency_dispatch(x, ids, M, E, use_fp8=False, return_recv_hook=hooks)
        if hooks:
            hook()
        y = torch.nn.functional.gelu(recv_x @ w)
        out, _, hook = buffer.low_latency_combine(y, ids, weights, handle, return_recv_hook=hooks)
        if hooks:
            hook()
        return out

    fn = ge_graphs.compiled(step, dynamic=dynamic)
    for T in (5, 7, 3) if dynamic else (5,):
        given = inputs_of(ctx.rank, T, torch.bfloat16, seed=T)
        if strategy != "ops":
            run_and_compare(step, fn, *given)
            continue
        with torch.no_grad(), pytest.raises(RuntimeError, match="x must be on an NPU"):
            fn(*given)
    forward, *backward = ge_graphs.recorded()
    N = R * M * min(K, L)
    types, backward_types = LOW_LATENCY[strategy]
    check_order(forward, types)
    if backward_types is not None:
        check_order(backward[0], backward_types)
    assert len(backward) == (backward_types is not None)
    for graph in (forward, *backward):
        assert ge_graphs.check_outputs(graph) > 5
        for node in graph.of_type(*INPUTS):
            check_node(node, group.group_name, Sizes(torch.bfloat16, -1 if dynamic else 5, N))
        for node in graph.of_type("HcomAllToAll", "HcomAllGather"):
            check_collective(node, group.group_name)
        assert not [node.type for node in graph.nodes if node.type in HOST_SYNCS]
    if strategy == "ops":
        dispatch, combine = forward.communicating
        check_moe_distribute([dispatch, combine], group.group_name, ctx.rank)
        assert combine.inputs["assist_info_for_combine"] == (dispatch.type, 2)
        assert combine.inputs["ep_send_counts"] == (dispatch.type, 4)


def check_moe_distribute(nodes: list[Node], group: str, rank: int) -> None:
    common = {
        "group_ep": group,
        "ep_world_size": R,
        "ep_rank_id": rank,
        "moe_expert_num": E,
        "group_tp": "",
        "tp_world_size": 0,
        "tp_rank_id": 0,
        "expert_shard_type": 0,
        "shared_expert_num": 1,
        "shared_expert_rank_num": 0,
        "global_bs": R * M,
        "comm_alg": "fullmesh_v2",
        "zero_expert_num": 0,
        "copy_expert_num": 0,
        "const_expert_num": 0,
    }
    bf16 = 27  # GE's number
    for node in nodes:
        assert node.inputs["expert_ids"][0] == "Cast"  # to int32
        if node.type == "MoeDistributeDispatchV2":
            assert node.attrs == common | {"quant_mode": 0, "expert_token_nums_type": 1, "y_dtype": bf16}
            assert list(node.inputs) == ["x", "expert_ids"]
            dtypes = [output.dtype for output in node.outputs]
            assert dtypes == [
                *(torch.bfloat16, torch.float32, torch.int32, torch.int64, torch.int32, torch.int32, torch.float32)
            ]
        else:
            assert node.attrs == common | {"out_dtype": 0, "comm_quant_mode": 0, "group_list_type": 0}
            assert list(node.inputs) == [
                *("expand_x", "expert_ids", "assist_info_for_combine", "ep_send_counts", "expert_scales")
            ]
            assert node.outputs[0].dtype == torch.bfloat16


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("strategy", LOW_LATENCY)
def test_low_latency(pool: RankPool, strategy: str, dynamic: bool) -> None:
    pool.run(R, low_latency, strategy, dynamic, False)


@pytest.mark.parametrize("strategy", LOW_LATENCY)
def test_receive_hooks_leave_no_trace(pool: RankPool, strategy: str) -> None:
    pool.run(R, low_latency, strategy, False, True)


def low_latency_of_all_inputs(ctx: RankContext, comm_alg: str, is_quantised: bool) -> None:
    """What torch_npu's operators take besides: weights, smooth scales, a mask; between servers also what comes back."""
    group = ctx.prepared_group("default")
    smooth_scales = torch.ones(E, H) if is_quantised else None
    buffer = deep_ep.Buffer(group)
    buffer.low_latency_strategy = OpsLowLatencyCommStrategy(buffer.runtime, group, comm_alg, smooth_scales)
    quant_mode = "int8" if is_quantised else "none"

    def step(x: Tensor, ids: Tensor, weights: Tensor, mask: Tensor) -> Tensor:
        rows, _, handle, _, _ = buffer.low_latency_dispatch(
            x, ids, M, E, topk_weights=weights, quant_mode=quant_mode, x_active_mask=mask
        )
        y = (rows[0] * rows[1][:, None]).bfloat16() if is_quantised else rows
        return buffer.low_latency_combine(y, ids, weights, handle)[0]

    x, ids, weights, _ = inputs_of(ctx.rank, 5, torch.bfloat16, seed=5)
    with torch.no_grad(), pytest.raises(RuntimeError, match="x must be on an NPU"):
        ge_graphs.compiled(step)(x, ids, weights, torch.tensor([True] * 3 + [False] * 2))
    (graph,) = ge_graphs.recorded()
    assert ge_graphs.check_outputs(graph) > 5
    dispatch, combine = graph.communicating
    T = M if comm_alg == "hierarchy" else 5  # with padding
    optional = {"scales": (torch.float32, [E, H])} if is_quantised else {}
    assert given_to(dispatch) == {
        "x": (torch.bfloat16, [T, H]),
        "x_active_mask": (torch.bool, [T]),
        "expert_scales": (torch.float32, [T, K]),
        **optional,
    }
    N = R * M * min(K, L)
    assert given_to(combine) == {
        "expand_x": (torch.bfloat16, [N, H]),
        "assist_info_for_combine": (torch.int32, [128 * N]),
        "ep_send_counts": (torch.int32, [E + torch_npu_ops.counts_between_servers(weights, M, K, R)]),
        "expert_scales": (torch.float32, [T, K]),
        "x_active_mask": (torch.bool, [T]),
        "expand_scales": (torch.float32, [N]),
    }
    assert dispatch.inputs["expert_ids"][0] == combine.inputs["expert_ids"][0] == "Cast"  # to int32, without a fake
    from_dispatch = {"assist_info_for_combine": 2, "ep_send_counts": 4, "expand_scales": 6}
    assert {name: combine.inputs[name] for name in from_dispatch} == {
        name: (dispatch.type, output) for name, output in from_dispatch.items()
    }
    assert (dispatch.attrs["quant_mode"], dispatch.attrs["comm_alg"]) == (2 if is_quantised else 0, comm_alg)
    assert dispatch.outputs[0].dtype == (torch.int8 if is_quantised else torch.bfloat16)
    assert combine.attrs["comm_alg"] == comm_alg


def given_to(node: Node) -> dict[str, tuple[torch.dtype, list[int]]]:
    return {name: (fake.dtype, list(fake.shape)) for name, fake in node.input_fakes.items() if fake is not None}


@pytest.mark.parametrize("is_quantised", [False, True], ids=["rows as they are", "int8"])
@pytest.mark.parametrize("comm_alg", ["hierarchy", "fullmesh_v2"])
def test_all_inputs_of_torch_npus_operators(pool: RankPool, comm_alg: str, is_quantised: bool) -> None:
    pool.run(R, low_latency_of_all_inputs, comm_alg, is_quantised)


# Fused


def fused(ctx: RankContext, mode: deep_ep.FuseMode, quant_mode: int, dynamic: bool) -> None:
    """What eager code gives, with one node forward and one backward."""
    group, variant = ctx.prepared_group("default").group_name, "" if mode == 1 else "DispatchFfnCombine"
    generator = torch.Generator().manual_seed(ctx.rank)
    gate_up, down = (torch.randn(L, *shape, generator=generator) / 8 for shape in ((2 * I, H), (H, I)))
    scales: list[Tensor] = []
    if quant_mode:
        (gate_up, *scales), (down, down_scale) = deep_ep.quantize_weight(gate_up), deep_ep.quantize_weight(down)
        scales.append(down_scale)
    w1, s1, w2, s2 = deep_ep.fused_weights(gate_up, down, *scales, fuse_mode=mode)
    limit = M if mode == 1 else R * M * K

    def step(x: Tensor, ids: Tensor, weights: Tensor, w1: Tensor, w2: Tensor) -> tuple[Tensor, Tensor]:
        return deep_ep.fused_deep_moe(
            x, ids, weights, w1, s1, w2, s2, limit, E, quant_mode=quant_mode, fuse_mode=mode, group=group
        )

    fn = ge_graphs.compiled(step, dynamic=dynamic)
    for T in (5, 7, 3) if dynamic else (5,):
        x, ids, weights, _ = inputs_of(ctx.rank, T, torch.float32, seed=T)
        leaves = [tensor.clone().requires_grad_(quant_mode == 0) for tensor in (x, weights, w1, w2)]
        results = []
        for call in (step, fn):
            out, counts = call(leaves[0], ids, *leaves[1:])
            grads = torch.autograd.grad(out.pow(2).sum(), leaves) if quant_mode == 0 else ()
            results.append((out.detach(), counts, *grads))
        for expected, actual in zip(*results, strict=True):
            torch.testing.assert_close(actual, expected)
    graphs = ge_graphs.recorded()
    assert [graph.types for graph in graphs] == [
        [f"DeepEpFusedDeepMoe{part}{variant}"] for part in ("", "Backward")[: 2 - quant_mode]
    ]
    for graph in graphs:
        assert ge_graphs.check_outputs(graph) > 1
        (node,) = graph.communicating
        if mode == 2:
            assert node.attrs.pop("num_max_dispatch_tokens_per_rank") == limit
            node.attrs["num_max_dispatch_tokens_per_rank"] = M
        check_node(node, group, Sizes(torch.float32, -1 if dynamic else 5, 0, quant_mode))


@pytest.mark.parametrize(
    ("mode", "quant_mode", "dynamic"),
    [(1, 0, True), (1, 1, False), (2, 0, False), (2, 1, True)],
)
def test_fused(pool: RankPool, mode: int, quant_mode: int, dynamic: bool) -> None:
    pool.run(R, fused, deep_ep.FuseMode(mode), quant_mode, dynamic)


def fused_alltoall(ctx: RankContext) -> str:
    """The converter says what to do instead."""
    group, x = ctx.prepared_group("alltoall").group_name, torch.ones(2, H)
    weights = deep_ep.fused_weights(torch.ones(L, 2 * I, H), torch.ones(L, H, I))

    def step(x: Tensor) -> Tensor:
        ids, w = torch.zeros(2, 1, dtype=torch.int64), torch.ones(2, 1)
        return deep_ep.fused_deep_moe(x, ids, w, *weights, M, E, quant_mode=0, group=group)[0]

    with pytest.raises(Exception, match="under the strategy default only") as error:
        ge_graphs.compiled(step)(x)
    return str(error.value)


def fused_on_npu(ctx: RankContext) -> str:
    """What is missing is named before a graph is made, or anything sent."""
    data, scale = torch.ones(L, 2 * I, H, dtype=torch.int8), torch.ones(L, 2 * I)
    weights = deep_ep.fused_weights(data, data[:, :H, :1].repeat(1, 1, I), scale, scale[:, :H])
    group = ctx.prepared_group("default").group_name
    given = torch.ones(2, H), torch.zeros(2, 1, dtype=torch.int64), torch.ones(2, 1), *weights
    x, *rest = (tensor.npu() for tensor in given)
    with pytest.raises(RuntimeError, match="quant_mode 1 on npu needs an AscendC kernel for fused_deep_moe"):
        deep_ep.fused_deep_moe(x, *rest, M, E, group=group)
    with default_ge_graph(GeGraph(name="fused")):
        node = Data(index=0, dtype=DataType.DT_FLOAT, shape=[2, H], placement="NPU", node_name="x")
    node.set_meta(x)
    with pytest.raises(RuntimeError) as error:
        ge_converters[torch.ops.deep_ep.fused_deep_moe.default](node, *rest, M, E, R, 1, group, "default")
    return str(error.value)


def test_fused_on_an_npu(pool: RankPool) -> None:
    for message in pool.run(R, fused_on_npu):
        assert "has no AscendC kernel yet (ops/fused_deep_moe/op_kernel)" in message


def test_fused_converts_under_default_only(pool: RankPool) -> None:
    for message in pool.run(R, fused_alltoall):
        assert "call dispatch, the experts and combine one by one" in message


def layout(ctx: RankContext, strategy: str, dynamic: bool) -> None:
    group = ctx.prepared_group(strategy).group_name

    def step(ids: Tensor) -> tuple[Tensor, ...]:
        per_rank, _, per_expert, in_rank = deep_ep.get_dispatch_layout(ids, E, group=group)
        return per_rank, per_expert, in_rank

    fn = ge_graphs.compiled(step, dynamic=dynamic)
    for T in (5, 7) if dynamic else (5,):
        ids = inputs_of(ctx.rank, T, torch.float32)[1]
        for actual, expected in zip(fn(ids), step(ids), strict=True):
            assert torch.equal(actual, expected)
    (graph,) = ge_graphs.recorded()
    (node,) = graph.of_type("DeepEpGetDispatchLayout")
    check_node(node, group, Sizes(torch.float32, -1 if dynamic else 5, 0))
    assert ge_graphs.check_outputs(graph) >= 3
    assert graph.communicating == []


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("strategy", ["default", "alltoall"])
def test_layout(pool: RankPool, strategy: str, dynamic: bool) -> None:
    pool.run(R, layout, strategy, dynamic)


# Backends, strategies, checkpoints


def by_name(ctx: RankContext) -> str:
    """torch.compile(backend="npu") takes the converters; exact row counts are refused with what to do."""
    group = ctx.prepared_group("default").group_name
    ge_graphs.compiled(lambda x: x)  # nothing is compiled yet
    torch_npu.dynamo._global_npu_backend["npu"] = ge_graphs.npu_backend(exact=False)
    x, ids, weights, _ = inputs_of(ctx.rank, 5, torch.float32)

    def step(x: Tensor, rows: int) -> Tensor:
        out = deep_ep.dispatch(x, ids, weights, num_experts=E, group=group, num_worst_tokens=rows)
        return deep_ep.combine(out.recv_x, out.handle, group=group)

    fn = torch.compile(step, backend="npu", fullgraph=True)
    torch.testing.assert_close(fn(x, W), step(x, W))
    (graph,) = ge_graphs.recorded()
    assert graph.types == FORWARD["default", False]
    with pytest.raises(Exception, match="num_worst_tokens") as error:
        fn(x, 0)
    return str(error.value)


def test_the_backend_by_its_name(pool: RankPool) -> None:
    for message in pool.run(1, by_name):
        assert "pass num_worst_tokens" in message
        assert "deep_ep.npu.backend()" in message


def changing_strategy(ctx: RankContext) -> None:
    group = ctx.prepared_group("default")
    x, ids, weights, _ = inputs_of(ctx.rank, 5, torch.float32)

    def step(x: Tensor) -> Tensor:
        out = deep_ep.dispatch(x, ids, weights, num_experts=E, group=group, num_worst_tokens=W)
        return deep_ep.combine(out.recv_x, out.handle, group=group)

    fn = ge_graphs.compiled(step)
    try:
        for strategy in ("default", "alltoall", "default"):
            deep_ep.destroy(group)
            deep_ep.init(group, strategy=strategy)
            torch.testing.assert_close(fn(x), step(x))
            graphs = [graph.types for graph in ge_graphs.recorded()]
            assert graphs in ([FORWARD[strategy, False]], [])  # of a strategy that was there before, none
            assert graphs or strategy == "default"
    finally:
        deep_ep.destroy(group)
        deep_ep.init(group, strategy="default")


def test_another_strategy_is_another_graph(pool: RankPool) -> None:
    pool.run(R, changing_strategy)


def checkpointed(ctx: RankContext, exact: bool) -> None:
    group = ctx.prepared_group("default").group_name

    def layer(x: Tensor, ids: Tensor, weights: Tensor, w: Tensor) -> Tensor:
        rows = 0 if exact else W + 10
        out = deep_ep.dispatch(x, ids, weights, num_experts=E, group=group, num_worst_tokens=rows)
        return deep_ep.combine(torch.nn.functional.gelu(out.recv_x @ w), out.handle, group=group)

    def step(x: Tensor, ids: Tensor, weights: Tensor, w: Tensor) -> Tensor:
        return checkpoint(layer, x, ids, weights, w, use_reentrant=False)

    torch._dynamo.reset()
    ge_graphs.recorded()
    fn = torch.compile(step, backend=ge_graphs.npu_backend(exact=True), fullgraph=True)
    run_and_compare(layer, fn, *inputs_of(ctx.rank, 5, torch.float32))
    forward, backward = ge_graphs.recorded()
    assert forward.types == FORWARD["default", exact]
    # Dispatch is done again, for the rows that were not kept; combine's result is not needed.
    assert backward.types == [FORWARD["default", exact][0], *BACKWARD["default", exact]]


@pytest.mark.parametrize("exact", [False, True], ids=["capacity", "exact"])
def test_checkpointing(pool: RankPool, exact: bool) -> None:
    pool.run(R, checkpointed, exact)


def unused(ctx: RankContext) -> None:
    """Nobody uses combine's result: it stays, as on the other ranks."""
    group = ctx.prepared_group("default").group_name
    x, ids, weights, _ = inputs_of(ctx.rank, 5, torch.float32)

    def step(x: Tensor) -> Tensor:
        out = deep_ep.dispatch(x, ids, weights, num_experts=E, group=group, num_worst_tokens=W)
        deep_ep.combine(out.recv_x, out.handle, group=group)
        return out.recv_x + 1

    ge_graphs.compiled(step)(x)
    (graph,) = ge_graphs.recorded()
    assert graph.types == FORWARD["default", False]
    (output,) = graph.of_type("NetOutput")
    assert "DeepEpCombine" in output.behind  # GE drops what NetOutput does not need


def test_unused_results_do_not_remove_an_op(pool: RankPool) -> None:
    pool.run(R, unused)


def captured(ctx: RankContext, low_latency: bool) -> None:
    """`.alltoall` for the backend that captures kernels: the same parts, and nothing that waits for the device."""
    ge_graphs.npu_backend(exact=False)  # torchair must be first: each patches torch, and only npugraph_ex looks before
    import npugraph_ex

    torch._dynamo.reset()
    group = ctx.prepared_group("alltoall").group_name
    x, ids, weights, _ = inputs_of(ctx.rank, 5, torch.float32)
    seen: list[str] = []
    config = npugraph_ex.CompilerConfig()
    config.force_eager = True
    config.post_grad_custom_pre_pass = lambda module, *_: seen.extend(str(node.target) for node in module.graph.nodes)

    def step(x: Tensor) -> Tensor:
        if low_latency:
            received = deep_ep.low_latency_dispatch(x, ids, M, E, group=group)
            return deep_ep.low_latency_combine(received.recv_x, ids, weights, received.handle, group=group)
        out = deep_ep.dispatch(x, ids, weights, num_experts=E, group=group, num_worst_tokens=W)
        return deep_ep.combine(out.recv_x, out.handle, group=group)

    backend = npugraph_ex.get_npu_backend(compiler_config=config)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(step, backend=backend, fullgraph=True)(x), step(x))
    collectives = [name for name in seen if name.startswith("deep_ep.")]
    assert collectives == ["deep_ep._all_gather.default", *["deep_ep._all_to_all.default"] * 4], seen
    assert not [name for name in seen if "_local_scalar_dense" in name or "nonzero" in name]


@pytest.mark.parametrize("low_latency", [False, True], ids=["capacity", "low latency"])
def test_alltoall_can_be_captured(pool: RankPool, low_latency: bool) -> None:
    pool.run(R, captured, low_latency)
