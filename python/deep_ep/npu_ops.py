"""The `.ops` overloads: low latency through torch_npu's own MoE operators, MoeDistributeDispatchV2 and CombineV2.

T local tokens · H hidden · K top-k · E experts · R ranks · L = E/R local experts · M num_max_dispatch_tokens_per_rank.

Shapes are those of torch_npu's own meta functions; nothing here has run on an NPU.
"""

from typing import Any, cast

import torch
from torch import Tensor
from torch.distributed import distributed_c10d

from .npu import ge

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


def low_latency_dispatch(
    x: Tensor,
    topk_idx: Tensor,
    num_max_dispatch_tokens_per_rank: int,
    num_experts: int,
    num_ranks: int,
    group: str,
    comm_alg: str,
) -> tuple[Tensor, ...]:
    operator = _operator("low_latency_dispatch", "npu_moe_distribute_dispatch_v2", x)
    recv_x, _, assist_info, recv_count, recv_counts, *_ = operator(
        x,
        topk_idx.int(),
        **_group_arguments(group, num_experts, num_ranks),
        global_bs=num_max_dispatch_tokens_per_rank * num_ranks,
        expert_token_nums_type=1,
        comm_alg=comm_alg,
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
    operator = _operator("low_latency_combine", "npu_moe_distribute_combine_v2", x)
    return operator(
        x,
        topk_idx.int(),
        recv_src_idx,
        layout_range,
        topk_weights,
        **_group_arguments(group, num_experts, num_ranks),
        global_bs=x.shape[0] // min(topk_idx.shape[1], num_experts // num_ranks),
        comm_alg=comm_alg,
    )


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


def convert_dispatch(
    x: Any,
    topk_idx: Any,
    num_max_dispatch_tokens_per_rank: int,
    num_experts: int,
    num_ranks: int,
    group: str,
    comm_alg: str,
) -> Any:
    """MoeDistributeDispatchV2."""
    from torchair._ge_concrete_graph import ge_apis
    from torchair._ge_concrete_graph.ge_ir_pb2 import DataType as ProtoType
    from torchair.ge import Const, DataType

    out = _converter("npu_moe_distribute_dispatch_v2")(
        x,
        _ids(topk_idx),
        **_group_attributes(group, num_experts, num_ranks),
        global_bs=num_max_dispatch_tokens_per_rank * num_ranks,
        expert_token_nums_type=1,
        comm_alg=comm_alg,
    )
    # Results that are not used here get no dtype from torchair.
    out.tp_recv_count.desc.dtype, out.expand_scales.desc.dtype = ProtoType.DT_INT32, ProtoType.DT_FLOAT
    ge.put_in_order(out.expand_x)
    send_head = ge_apis.Fill(ge_apis.Shape(topk_idx), Const(-1, dtype=DataType.DT_INT32))
    return out.expand_x, out.expert_token_nums, out.expand_idx, out.ep_recv_count, send_head


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
    """MoeDistributeCombineV2."""
    combined = _converter("npu_moe_distribute_combine_v2")(
        x,
        _ids(topk_idx),
        recv_src_idx,
        layout_range,
        topk_weights,
        **_group_attributes(group, num_experts, num_ranks),
        global_bs=x.meta.shape[0] // min(topk_idx.meta.shape[1], num_experts // num_ranks),
        comm_alg=comm_alg,
    )
    ge.put_in_order(combined)
    return combined
