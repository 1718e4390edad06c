"""The `.ops` overloads: low latency through torch_npu's own MoE operators, MoeDistributeDispatchV2 and CombineV2.

T local tokens · H hidden · K top-k · E experts · R ranks · L = E/R local experts · M num_max_dispatch_tokens_per_rank.

Shapes are those of torch_npu's own meta functions; nothing here has run on an NPU.
"""

from typing import Any, cast

import torch
from torch import Tensor
from torch.distributed import distributed_c10d

from ..npu import ge
from ..npu.platform import platform

COMM_ALGS = ("hierarchy", "fullmesh_v1", "fullmesh_v2", "ccu")
"""How the operators may send: what torch_npu calls comm_alg. "" leaves the choice to it."""


def check_comm_alg(comm_alg: str) -> str | None:
    """What is wrong with comm_alg, or None."""
    if comm_alg and comm_alg not in COMM_ALGS:
        return f"comm_alg must be one of {', '.join(COMM_ALGS)}, or empty; got {comm_alg!r}"
    return None


def check_x(x: Tensor) -> str | None:
    """What is wrong with x, or None: torch_npu's operators know two dtypes."""
    if x.dtype not in (torch.bfloat16, torch.float16):
        return f"x must be torch.bfloat16 or torch.float16 for the overload .ops, got {x.dtype}"
    return None


def dispatch_operator(x: Tensor) -> Any:
    return _operator("low_latency_dispatch", "npu_moe_distribute_dispatch_v2", x)


def combine_operator(x: Tensor) -> Any:
    return _operator("low_latency_combine", "npu_moe_distribute_combine_v2", x)


def _operator(op: str, name: str, x: Tensor) -> Any:
    if error := missing(x):
        raise RuntimeError(f"deep_ep.{op}.ops: {error}; use the strategy default or alltoall (DEEP_USE_MODE) instead")
    return getattr(torch.ops.npu, name)


def missing(x: Tensor) -> str | None:
    """What this machine or tensor lacks for the `.ops` overloads, or None."""
    if not hasattr(torch.ops.npu, "npu_moe_distribute_dispatch_v2"):
        return "torch_npu is not loaded: the strategy ops calls torch_npu's npu_moe_distribute_dispatch_v2/combine_v2"
    if x.device.type != "npu":
        return f"x must be on an NPU, got {x.device}"
    return check_x(x)


def _group_arguments(group: str, num_experts: int, num_ranks: int) -> dict[str, Any]:
    pg = cast(Any, distributed_c10d)._resolve_process_group(group)
    backend = pg._get_backend(torch.device("npu"))
    return {
        "group_ep": backend.get_hccl_comm_name(pg.rank()),
        "ep_world_size": num_ranks,
        "ep_rank_id": pg.rank(),
        "moe_expert_num": num_experts,
    }


def counts_between_servers(topk_weights: Any, M: int, K: int, R: int) -> int:
    """How many numbers the counts of a dispatch have besides one for each (local expert, source rank)."""
    return 0 if topk_weights is None or platform() == "A5" else M * R * 2 * K * (R // 8)


def dispatch(
    operator: Any,
    x: Tensor,
    topk_idx: Tensor,
    topk_weights: Tensor | None,
    smooth_scales: Tensor | None,
    x_active_mask: Tensor | None,
    num_max_dispatch_tokens_per_rank: int,
    num_experts: int,
    num_ranks: int,
    num_shared_ranks: int,
    is_shared: bool,
    group: str,
    comm_alg: str,
) -> tuple[Tensor, ...]:
    recv_x, recv_scales, assist_info, recv_count, recv_counts, _, expand_scales = operator(
        x,
        topk_idx.int(),
        **_group_arguments(group, num_experts, num_ranks),
        **_dispatch_arguments(topk_weights, smooth_scales, x_active_mask),
        **_arguments(num_max_dispatch_tokens_per_rank, num_ranks, num_shared_ranks, comm_alg),
    )
    return recv_x, recv_scales, recv_count, assist_info, recv_counts, expand_scales


def _arguments(M: int, num_ranks: int, num_shared_ranks: int, comm_alg: str) -> dict[str, Any]:
    """Of both operators, in eager calls and in graphs. Shared ranks have one expert, the same on all of them."""
    shared = {"shared_expert_num": 1, "shared_expert_rank_num": num_shared_ranks}
    return {"global_bs": M * num_ranks, "comm_alg": comm_alg} | shared


def _dispatch_arguments(topk_weights: Any, smooth_scales: Any, x_active_mask: Any) -> dict[str, Any]:
    """Of dispatch besides. quant_mode 2 is int8 with one scale per row."""
    tensors = {"scales": smooth_scales, "x_active_mask": x_active_mask, "expert_scales": topk_weights}
    return tensors | {"quant_mode": 0 if smooth_scales is None else 2, "expert_token_nums_type": 1}


def combine(
    operator: Any,
    x: Tensor,
    topk_idx: Tensor,
    topk_weights: Tensor,
    assist_info: Tensor,
    layout_range: Tensor,
    expand_scales: Tensor | None,
    x_active_mask: Tensor | None,
    num_max_dispatch_tokens_per_rank: int,
    num_experts: int,
    num_ranks: int,
    num_shared_ranks: int,
    is_shared: bool,
    group: str,
    comm_alg: str,
) -> Tensor:
    return operator(
        x,
        topk_idx.int(),
        assist_info,
        layout_range,
        topk_weights,
        **_group_arguments(group, num_experts, num_ranks),
        x_active_mask=x_active_mask,
        expand_scales=expand_scales,
        **_arguments(num_max_dispatch_tokens_per_rank, num_ranks, num_shared_ranks, comm_alg),
    )


def low_latency_dispatch(
    x: Tensor,
    topk_idx: Tensor,
    num_max_dispatch_tokens_per_rank: int,
    num_experts: int,
    num_ranks: int,
    group: str,
    comm_alg: str,
    zero_unused: bool = True,
) -> tuple[Tensor, ...]:
    sizes = num_max_dispatch_tokens_per_rank, num_experts, num_ranks
    recv_x, _, recv_count, assist_info, recv_counts, _ = dispatch(
        dispatch_operator(x), x, topk_idx, None, None, None, *sizes, 0, False, group, comm_alg
    )
    return recv_x, recv_count, assist_info, recv_counts, torch.full_like(topk_idx, -1, dtype=torch.int32)


def low_latency_combine(
    x: Tensor,
    topk_idx: Tensor,
    topk_weights: Tensor,
    recv_src_idx: Tensor,
    layout_range: Tensor,
    send_head: Tensor,
    num_experts: int,
    num_ranks: int,
    group: str,
    comm_alg: str,
) -> Tensor:
    M = _max_tokens(x, topk_idx, num_experts, num_ranks)
    sizes = M, num_experts, num_ranks
    tensors = x, topk_idx, topk_weights, recv_src_idx, layout_range, None, None
    return combine(combine_operator(x), *tensors, *sizes, 0, False, group, comm_alg)


def _max_tokens(x: Any, topk_idx: Any, num_experts: int, num_ranks: int) -> int:
    """M, of tensors with these shapes."""
    return x.shape[0] // min(topk_idx.shape[1], num_experts // num_ranks) // num_ranks


def _converter(name: str) -> Any:
    from torchair._ge_concrete_graph.fx2ge_converter import get_or_auto_gen_converter

    return get_or_auto_gen_converter(getattr(torch.ops.npu, name).default)


def _ids(topk_idx: Any) -> Any:
    from torchair._ge_concrete_graph import ge_apis
    from torchair.ge import DataType

    return ge_apis.Cast(topk_idx, dst_type=DataType.DT_INT32)


def _group_attributes(group: str, num_experts: int, num_ranks: int) -> dict[str, Any]:
    return {
        "group_ep": ge.communicator(group),
        "ep_world_size": num_ranks,
        "ep_rank_id": ge.process_group(group).rank(),
        "moe_expert_num": num_experts,
    }


def convert_full_dispatch(
    x: Any,
    topk_idx: Any,
    topk_weights: Any,
    smooth_scales: Any,
    x_active_mask: Any,
    num_max_dispatch_tokens_per_rank: int,
    num_experts: int,
    num_ranks: int,
    num_shared_ranks: int,
    is_shared: bool,
    group: str,
    comm_alg: str,
) -> Any:
    """MoeDistributeDispatchV2."""
    from torchair._ge_concrete_graph.ge_ir_pb2 import DataType as ProtoType

    out = _converter("npu_moe_distribute_dispatch_v2")(
        x,
        _ids(topk_idx),
        **_group_attributes(group, num_experts, num_ranks),
        **_dispatch_arguments(topk_weights, smooth_scales, x_active_mask),
        **_arguments(num_max_dispatch_tokens_per_rank, num_ranks, num_shared_ranks, comm_alg),
    )
    # Results that are not used get no dtype from torchair.
    out.tp_recv_count.desc.dtype, out.expand_scales.desc.dtype = ProtoType.DT_INT32, ProtoType.DT_FLOAT
    ge.put_in_order(out.expand_x)
    results = out.expand_x, out.dynamic_scales, out.expert_token_nums, out.expand_idx
    return *results, out.ep_recv_count, out.expand_scales


def convert_dispatch(
    x: Any,
    topk_idx: Any,
    num_max_dispatch_tokens_per_rank: int,
    num_experts: int,
    num_ranks: int,
    group: str,
    comm_alg: str,
    zero_unused: bool = True,
) -> Any:
    """The same without what functions do not give."""
    from torchair._ge_concrete_graph import ge_apis
    from torchair.ge import Const, DataType

    sizes = num_max_dispatch_tokens_per_rank, num_experts, num_ranks
    recv_x, _, recv_count, assist_info, recv_counts, _ = convert_full_dispatch(
        x, topk_idx, None, None, None, *sizes, 0, False, group, comm_alg
    )
    send_head = ge_apis.Fill(ge_apis.Shape(topk_idx), Const(-1, dtype=DataType.DT_INT32))
    return recv_x, recv_count, assist_info, recv_counts, send_head


def convert_full_combine(
    x: Any,
    topk_idx: Any,
    topk_weights: Any,
    assist_info: Any,
    layout_range: Any,
    expand_scales: Any,
    x_active_mask: Any,
    num_max_dispatch_tokens_per_rank: int,
    num_experts: int,
    num_ranks: int,
    num_shared_ranks: int,
    is_shared: bool,
    group: str,
    comm_alg: str,
) -> Any:
    """MoeDistributeCombineV2."""
    combined = _converter("npu_moe_distribute_combine_v2")(
        x,
        _ids(topk_idx),
        assist_info,
        layout_range,
        topk_weights,
        **_group_attributes(group, num_experts, num_ranks),
        x_active_mask=x_active_mask,
        expand_scales=expand_scales,
        **_arguments(num_max_dispatch_tokens_per_rank, num_ranks, num_shared_ranks, comm_alg),
    )
    ge.put_in_order(combined)
    return combined


def convert_combine(
    x: Any,
    topk_idx: Any,
    topk_weights: Any,
    recv_src_idx: Any,
    layout_range: Any,
    send_head: Any,
    num_experts: int,
    num_ranks: int,
    group: str,
    comm_alg: str,
) -> Any:
    """The same without what functions do not give."""
    sizes = _max_tokens(x.meta, topk_idx.meta, num_experts, num_ranks), num_experts, num_ranks
    tensors = x, topk_idx, topk_weights, recv_src_idx, layout_range, None, None
    return convert_full_combine(*tensors, *sizes, 0, False, group, comm_alg)
