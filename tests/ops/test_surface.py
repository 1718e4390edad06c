"""The surface of DeepEP-Ascend's and DeepEP's Buffer, of whose names and arguments none may be missing."""

import inspect
import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import assert_same
from ranks import RankContext, RankPool
from test_bad_input import error_of
from test_buffer import make_buffer, send

import deep_ep
import deep_ep.utils

_DISPATCH = (
    "x handle num_tokens_per_rank num_tokens_per_rdma_rank is_token_in_rank num_tokens_per_expert topk_idx "
    "topk_weights expert_alignment num_worst_tokens config previous_event async_finish allocate_on_comm_stream"
)
_COMBINE = "x handle topk_weights bias config previous_event async_finish allocate_on_comm_stream"
_LINKS = (
    "group num_nvl_bytes num_rdma_bytes low_latency_mode num_qps_per_rank allow_nvlink_for_low_latency_mode allow_mnnvl"
)
_BOTH = {
    "get_dispatch_config": "num_ranks",
    "get_combine_config": "num_ranks",
    "set_num_sms": "new_num_sms",
    "capture": "",
    "get_low_latency_rdma_size_hint": "num_max_dispatch_tokens_per_rank hidden num_ranks num_experts",
    "get_dispatch_layout": "topk_idx num_experts previous_event async_finish allocate_on_comm_stream",
    "clean_low_latency_buffer": "num_max_dispatch_tokens_per_rank hidden num_experts",
    "internode_dispatch": _DISPATCH.replace("num_worst_tokens ", ""),
    "internode_combine": _COMBINE,
}

# The methods of Buffer and their arguments in order: sgl-kernel-npu at f425bdf1, DeepEP at dd758ca (buffers/legacy.py).
BUFFERS = {
    "DeepEP-Ascend": _BOTH
    | {
        "__init__": f"{_LINKS} normal_strategy low_latency_strategy",
        "dispatch": f"{_DISPATCH} dispatch_wait_recv_cost_stats quant_mode",
        "combine": f"{_COMBINE} combine_send_cost_stats",
        "low_latency_dispatch": "x topk_idx num_max_dispatch_tokens_per_rank num_experts "
        "cumulative_local_expert_recv_stats use_fp8 round_scale use_ue8m0 use_mxfp4 async_finish return_recv_hook "
        "topk_weights quant_mode",
        "low_latency_combine": "x topk_idx topk_weights handle zero_copy async_finish return_recv_hook out",
        "fused_deep_moe": "x topk_idx topk_weights gmm1_permuted_weight gmm1_permuted_weight_scale gmm2_weight "
        "gmm2_weight_scale num_max_dispatch_tokens_per_rank num_experts quant_mode fuse_mode profile_enable",
        "begin_profile": "num_profile_skip_launches num_profile_active_launches profile_trace_dir",
        "end_profile": "",
        "get_notify_send_data": "",
        "notify_verify": f"{_DISPATCH} dispatch_wait_recv_cost_stats",
    },
    "DeepEP": _BOTH
    | {
        "__init__": f"{_LINKS} explicitly_destroy enable_shrink comm",
        "destroy": "",
        "is_sm90_compiled": "",
        "get_comm_stream": "",
        "get_local_buffer_tensor": "dtype size offset use_rdma_buffer",
        "dispatch": _DISPATCH,
        "combine": _COMBINE,
        "low_latency_dispatch": "x topk_idx num_max_dispatch_tokens_per_rank num_experts "
        "cumulative_local_expert_recv_stats dispatch_wait_recv_cost_stats use_fp8 round_scale use_ue8m0 async_finish "
        "return_recv_hook",
        "low_latency_combine": "x topk_idx topk_weights handle use_logfmt zero_copy async_finish return_recv_hook out "
        "combine_wait_recv_cost_stats",
        "low_latency_update_mask_buffer": "rank_to_mask mask",
        "low_latency_query_mask_buffer": "mask_status",
        "low_latency_clean_mask_buffer": "",
        "get_next_low_latency_combine_buffer": "handle",
    },
}
# Where the two disagree on the order of arguments, DeepEP-Ascend's counts.
BY_KEYWORD = {("DeepEP", "low_latency_dispatch"): 5, ("DeepEP", "low_latency_combine"): 4}
BY_KEYWORD |= {("DeepEP", "__init__"): 7}
"""How many arguments may be given by position, where that is not all of them."""

CONFIG = {
    "num_sms": 20,
    "num_max_nvl_chunked_send_tokens": 6,
    "num_max_nvl_chunked_recv_tokens": 256,
    "num_max_rdma_chunked_send_tokens": 6,
    "num_max_rdma_chunked_recv_tokens": 256,
}
ATTRIBUTES = ("group", "rank", "group_size", "num_nvl_bytes", "num_rdma_bytes", "low_latency_mode", "num_sms")
ATTRIBUTES += ("runtime", "explicitly_destroy", "enable_shrink", "normal_strategy", "low_latency_strategy")
EXPORTS = ["Buffer", "Config", "EventHandle", "EventOverlap", "FuseMode", "LowLatencyStrategy", "NormalStrategy"]
EXPORTS += ["topk_idx_t"]


@pytest.mark.parametrize("peer", BUFFERS)
def test_methods(peer: str) -> None:
    for name, arguments in BUFFERS[peer].items():
        parameters = inspect.signature(getattr(deep_ep.Buffer, name)).parameters
        ours = [name for name in parameters if name != "self"]
        if ours == ["args", "kwargs"]:
            continue
        wanted = arguments.split()
        assert not set(wanted) - set(ours), name
        by_position = BY_KEYWORD.get((peer, name), len(wanted))
        assert ours[:by_position] == wanted[:by_position], name


def test_no_module_has_the_name_of_a_function() -> None:
    """Else `import deep_ep.<name>` puts the module where the function was."""
    functions = {name for name in deep_ep.__all__ if inspect.isfunction(getattr(deep_ep, name))}
    modules = {path.stem for folder in deep_ep.__path__ for path in Path(folder).iterdir()}
    assert len(functions) > 10 and "weights" in modules
    assert not functions & modules


def test_other_names() -> None:
    for name in EXPORTS:
        assert name in deep_ep.__all__
    assert deep_ep.utils.EventOverlap is deep_ep.EventOverlap
    assert deep_ep.utils.EventHandle is deep_ep.EventHandle
    assert deep_ep.buffer.FuseMode is deep_ep.FuseMode
    assert deep_ep.groups.op_log is deep_ep.debug.op_log
    assert deep_ep.groups.phases is deep_ep.debug.phases
    for name in ("AlignedHandle", "Buffer", "Config", "EventHandle", "EventOverlap", "InternodeHandle", "RankHandle"):
        assert getattr(deep_ep.buffer, name) is getattr(deep_ep, name)
    assert deep_ep.groups.process_group is deep_ep.process_groups.process_group
    config = inspect.signature(deep_ep.Config).parameters
    assert {name: parameter.default for name, parameter in config.items()} == CONFIG


def check_surface(ctx: RankContext) -> dict[str, tuple[str, str]]:
    buffer = make_buffer(ctx, "default")
    for name in ATTRIBUTES:
        assert hasattr(buffer, name), name
    assert buffer.is_sm90_compiled() is False
    x, ids = torch.arange(24.0).view(3, 8), torch.tensor([[0, 1], [1, 2], [3, -1]])
    rows, *_, handle, _ = send(buffer, x, ids, 4)
    per_rank, _, per_expert, in_rank, _ = buffer.get_dispatch_layout(ids, 4)
    layout = {"num_tokens_per_rank": per_rank, "is_token_in_rank": in_rank, "num_tokens_per_expert": per_expert}
    assert_same("internode_dispatch", buffer.internode_dispatch(x, **layout, topk_idx=ids)[0], rows)
    assert_same("internode_combine", buffer.internode_combine(rows, handle)[0], x * torch.tensor([[2], [2], [1]]))

    low, *_, packed, _, _ = buffer.low_latency_dispatch(x, ids, 3, 4, use_fp8=False)
    stats = torch.zeros(ctx.size, dtype=torch.int64)
    buffer.low_latency_dispatch(x, ids, 3, 4, use_fp8=False, dispatch_wait_recv_cost_stats=stats)
    first = stats.clone()
    options: dict[str, Any] = {"use_logfmt": True, "combine_wait_recv_cost_stats": stats}
    assert_same(
        "combine",
        buffer.low_latency_combine(low, ids, torch.ones(3, 2), packed, **options)[0],
        buffer.combine(rows, handle)[0],
    )
    for counted in (first, stats - first):
        assert counted[ctx.rank] == 0
        assert (counted[1 - ctx.rank] > 0).all()

    mask = torch.ones(ctx.size, dtype=torch.int32)
    buffer.low_latency_update_mask_buffer(1, False)
    buffer.low_latency_clean_mask_buffer()
    buffer.low_latency_query_mask_buffer(mask)
    assert not mask.any()
    group = ctx.prepared_group("default")
    return {
        "wait with the event": error_of(buffer.get_comm_stream),
        "no raw buffer": error_of(buffer.get_local_buffer_tensor, torch.uint8),
        "rank 1 cannot be masked": error_of(buffer.low_latency_update_mask_buffer, 1, True),
        "mask_status must be torch.int32": error_of(buffer.low_latency_query_mask_buffer, mask.long()),
        "enable_shrink must be False": error_of(deep_ep.Buffer, group, enable_shrink=True),
        "group must be a ProcessGroup, and comm None": error_of(deep_ep.Buffer, None, comm=object()),
        "combine_wait_recv_cost_stats must be": error_of(
            buffer.low_latency_combine, low, ids, torch.ones(3, 2), packed, combine_wait_recv_cost_stats=mask.float()
        ),
    }


def test_surface(pool: RankPool) -> None:
    for errors in pool.run(2, check_surface):
        for text, (kind, message) in errors.items():
            assert kind in ("RuntimeError", "ValueError")
            assert text in message


def check_destroy(ctx: RankContext) -> tuple[str, str]:
    group = ctx.prepared_group("default")
    with deep_ep.Buffer(group, explicitly_destroy=True) as buffer:
        ids = torch.zeros(1, 1, dtype=torch.int64)
        send(buffer, torch.ones(1, 8), ids, 2)
    error = error_of(buffer.get_dispatch_layout, ids, 2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        deep_ep.Buffer(group, explicitly_destroy=True).destroy()
        deep_ep.Buffer(group)
        del buffer
    line = inspect.currentframe().f_lineno + 1
    buffer = deep_ep.Buffer(group, explicitly_destroy=True)
    expected = f"a Buffer of the group '{group.group_name}' .* went without destroy"
    with pytest.warns(RuntimeWarning, match=expected) as warned:
        del buffer
    # It names the line that made the Buffer: where one goes is the garbage collector's.
    assert [(one.filename, one.lineno) for one in warned] == [(__file__, line)]
    return error


def test_destroy(pool: RankPool) -> None:
    assert pool.run(2, check_destroy) == [("RuntimeError", "deep_ep: this Buffer was destroyed; make another one")] * 2


def test_torch_npu_is_left_out_at_the_import(tmp_path: Path) -> None:
    """The warning names the line of the program that imports deep_ep."""
    metadata = tmp_path / "torch_npu-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: torch-npu\nVersion: 1.0\n")
    program = tmp_path / "program.py"
    program.write_text("\n\nimport deep_ep\n")
    settings = {name: value for name, value in os.environ.items() if name != "TORCH_DEVICE_BACKEND_AUTOLOAD"}
    run = subprocess.run([sys.executable, program], env=settings, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert f"{program}:3: RuntimeWarning: deep_ep: torch_npu is left out" in run.stderr
