"""The calls of SGLang's DeepEP dispatcher for NPUs: what it asks of Buffer's signatures, and its order of calls."""

import inspect
from typing import Any

import pytest
import torch
from cases import assert_same
from ranks import STRATEGIES, RankContext, RankPool

import deep_ep
from deep_ep import quantization

M, H, K, E = 16, 64, 3, 8
QUANT_MODES = {"bf16": "bf16", "int8": "int8", "mxfp8": "mx_fp8_e4m3", "mxfp4": "mx_fp4_e2m1"}
TOLERANCE = {"bf16": 0.01, "int8": 0.02, "mxfp8": 0.05, "mxfp4": 0.2}


def test_signatures() -> None:
    # It gives quant_mode where dispatch has it, and use_mxfp4 where low_latency_dispatch does; nothing is collected.
    dispatch = inspect.signature(deep_ep.Buffer.dispatch).parameters
    low_latency = inspect.signature(deep_ep.Buffer.low_latency_dispatch).parameters
    assert "quant_mode" in dispatch and not {"use_fp8", "use_mxfp4", "use_mxfp8"} <= dispatch.keys()
    assert {"use_fp8", "use_mxfp4", "topk_weights"} <= low_latency.keys()
    for parameters in (dispatch, low_latency):
        assert not any(one.kind is one.VAR_KEYWORD for one in parameters.values())


def sizes(group: Any) -> tuple[int, int]:
    Buffer, R = deep_ep.Buffer, group.size()
    configs = Buffer.get_dispatch_config(R), Buffer.get_combine_config(R)
    nvl = max(config.get_nvl_buffer_size_hint(2 * H, R) for config in configs)
    rdma = max(config.get_rdma_buffer_size_hint(2 * H, R) for config in configs)
    return nvl, max(rdma, Buffer.get_low_latency_rdma_size_hint(M, H, R, E))


def check_dispatcher(ctx: RankContext, strategy: str) -> None:
    group = ctx.prepared_group(strategy)
    options = {"low_latency_mode": True, "num_qps_per_rank": max(deep_ep.Buffer.num_sms, E // 2), "allow_mnnvl": False}
    strategies = {"normal_strategy": strategy, "low_latency_strategy": strategy}
    buffer = deep_ep.Buffer(group, *sizes(group), **options, **strategies)
    generator = torch.Generator().manual_seed(ctx.rank)
    for T, is_async, has_hook, (name, mode) in (
        (T, *flags, one)
        for T, flags in ((9 - 2 * ctx.rank, (False, False)), (9 * (1 - ctx.rank), (True, True)))
        for one in QUANT_MODES.items()
    ):
        x = torch.randn(T, H, generator=generator).bfloat16()
        w, ids = torch.rand(T, E, generator=generator).softmax(-1).topk(K)
        ids = ids.to(torch.int32).to(torch.int64)
        ids[:1, 1] = -1
        wanted = 2 * x.float() * (w * (ids >= 0)).sum(1, keepdim=True)

        # Prefill.
        event = buffer.capture() if is_async else None
        per_rank, per_rdma_rank, per_expert, in_rank, event = buffer.get_dispatch_layout(
            ids, E, previous_event=event, async_finish=is_async, allocate_on_comm_stream=event is not None
        )
        rows, row_ids, row_weights, counts, handle, after = buffer.dispatch(
            x,
            topk_idx=ids,
            topk_weights=w,
            num_tokens_per_rank=per_rank,
            num_tokens_per_rdma_rank=per_rdma_rank,
            is_token_in_rank=in_rank,
            num_tokens_per_expert=per_expert,
            previous_event=event,
            async_finish=is_async,
            allocate_on_comm_stream=(event is not None) and is_async,
            expert_alignment=1,
            config=None,
            quant_mode=mode,
        )
        if is_async:
            after.current_stream_wait()
        assert sum(counts) == len(row_ids) == len(row_weights)
        plain = quantization.dequantize(*rows).bfloat16() if isinstance(rows, tuple) else rows
        event = buffer.capture() if is_async else None
        out, _, after = buffer.combine(
            2 * plain,
            handle,
            async_finish=is_async,
            previous_event=event,
            allocate_on_comm_stream=event is not None,
            config=None,
        )
        if is_async:
            after.current_stream_wait()

        # Decode.
        buffer.clean_low_latency_buffer(M, H, E)
        flags = {"use_fp8": name == "int8", "use_mxfp4": name == "mxfp4"}
        if name == "int8":
            flags |= {"round_scale": False, "use_ue8m0": False}
        waits = {"async_finish": not has_hook, "return_recv_hook": has_hook}
        packed, masked, low_handle, after, hook = buffer.low_latency_dispatch(
            x, ids, M, E, topk_weights=w, **flags, **waits
        )
        hook() if has_hook else after.current_stream_wait()
        assert masked.tolist() == list(counts)
        low = quantization.dequantize(*packed).bfloat16() if isinstance(packed, tuple) else packed
        decoded, after, hook = buffer.low_latency_combine(
            x=2 * low, topk_idx=ids, topk_weights=w, handle=low_handle, **waits
        )
        hook() if has_hook else after.current_stream_wait()
        for result in (out, decoded):
            assert result.shape == x.shape and result.dtype == x.dtype
            assert (result.float() - wanted).norm() <= TOLERANCE[name] * wanted.norm()
        if name == "bf16":
            assert_same("decode and prefill", decoded, out)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_dispatcher(pool: RankPool, strategy: str) -> None:
    pool.run(2, check_dispatcher, strategy)
