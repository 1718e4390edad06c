"""The environment: what each variable does, and what a wrong value of it says."""

import logging
import os
import subprocess
import sys
from typing import Any
from unittest import mock

import pytest
import torch
from ranks import STRATEGIES, RankContext, RankPool
from test_bad_input import error_of
from test_buffer import make_buffer, send

import deep_ep
from deep_ep import env
from deep_ep.buffer import call_log
from deep_ep.env.__main__ import main
from deep_ep.npu.platform import platform

T, H, K, M = 3, 32, 2, 4

WRONG = {
    "DEEP_USE_MODE": ("error", "one of default, alltoall, ops"),
    "DEEP_EP_ROWS": ("token", "one of expert, rank"),
    "DEEP_NORMAL_MODE_USE_INT8_QUANT": ("2", "one of 0, 1"),
    "SGLANG_DEEPEP_BF16_DISPATCH": ("on", "one of 0, 1, false, true, no, yes, n, y"),
    "MOE_EXPERT_TOKEN_NUMS_TYPE": ("2", "one of 0, 1"),
    "DEEPEP_NORMAL_LONG_SEQ_ROUND": ("257", "a whole number of at least 1, at most 256"),
    "DEEPEP_NORMAL_LONG_SEQ_PER_ROUND_TOKENS": ("31", "a whole number of at least 32, at most 8192"),
    "DEEPEP_NORMAL_COMBINE_ENABLE_LONG_SEQ": ("2", "one of 0, 1"),
    "MOE_ENABLE_TOPK_NEG_ONE": ("yes", "one of 0, 1"),
    "MOE_SHARED_EXPERT_RANK_NUM": ("-1", "a whole number of at least 0"),
    "DEEPEP_HCCL_BUFFSIZE": ("-1", "a whole number of at least 1"),
    "HCCL_BUFFSIZE": ("0", "a whole number of at least 1"),
    "HCCL_INTRA_PCIE_ENABLE": ("on", "one of 0, 1"),
    "HCCL_INTRA_ROCE_ENABLE": ("-1", "one of 0, 1"),
    "MOE_ENABLE_CCU": ("on", "one of 0, 1"),
    "DEEP_EP_KERNEL_TIMEOUT": ("0.5", "a whole number of at least 1, at most 1000000"),
}
"""A wrong value of each variable that has one everywhere, and what is allowed."""


def in_environment(**variables: str) -> Any:
    return mock.patch.dict(os.environ, variables)


def inputs() -> tuple[torch.Tensor, torch.Tensor]:
    """x [T, H] and ids of two experts, on one rank."""
    return torch.arange(T * H).view(T, H).float() - 50, torch.tensor([[0, 1]] * T)


def check_wrong_values(ctx: RankContext) -> list[tuple[str, str]]:
    group, errors = ctx.prepared_group("default"), []
    # Nothing collective happens before the error: rank 1 does not take part.
    if ctx.rank == 0:
        for name, (value, _) in WRONG.items():
            with in_environment(**{name: value}):
                errors.append(error_of(deep_ep.Buffer, group))
        with in_environment(HCCL_INTRA_PCIE_ENABLE="1", HCCL_INTRA_ROCE_ENABLE="1"):
            errors.append(error_of(deep_ep.Buffer, group))
        errors.append(error_of(deep_ep.Buffer, group, rows="token"))
        errors.append(error_of(deep_ep.Buffer, group, normal_strategy="ops"))
    deep_ep.Buffer(group)
    return errors


def test_wrong_values(pool: RankPool) -> None:
    errors, _ = pool.run(2, check_wrong_values)
    for (name, (value, allowed)), (kind, message) in zip(WRONG.items(), errors, strict=False):
        assert kind == "ValueError"
        assert message.startswith(f"the environment variable {name} must be {allowed}")
        assert message.endswith(f"got {value!r}")
    assert "HCCL_INTRA_PCIE_ENABLE=1 and HCCL_INTRA_ROCE_ENABLE=1 contradict each other" in errors[-3][1]
    assert errors[-2] == ("ValueError", "rows must be one of expert, rank; got 'token'")
    assert errors[-1] == ("ValueError", "normal_strategy must be one of default, alltoall; got 'ops'")


def test_the_table() -> None:
    no_wrong_value_on_cpu = {"HCCL_OP_EXPANSION_MODE", "DEEP_EP_KERNELS", "DEBUG_MODE"}
    assert WRONG.keys() == env.VARIABLES.keys() - no_wrong_value_on_cpu
    for name, variable in env.VARIABLES.items():
        with in_environment(**{name: ""}):
            assert env.value(name) == variable.default


def check_strategies(ctx: RankContext) -> None:
    with in_environment(DEEP_USE_MODE="AllToAll"):
        info = deep_ep.Buffer(ctx.group)._info
        assert (info.normal.value, info.low_latency.value) == ("alltoall", "alltoall")
        info = deep_ep.Buffer(ctx.group, normal_strategy=deep_ep.NormalStrategy.DEFAULT, num_nvl_bytes=1 << 20)._info
        assert (info.normal.value, info.low_latency.value) == ("default", "alltoall")
        # Windows are made for the one strategy of the two that needs them.
        deep_ep.destroy(ctx.group)
        buffer = deep_ep.Buffer(ctx.group, low_latency_strategy="default", num_nvl_bytes=1 << 20)
        assert (buffer._info.normal.value, buffer._info.low_latency.value) == ("alltoall", "default")
        x, ids = inputs()
        rows, _, handle, *_ = buffer.low_latency_dispatch(x, ids, M, 2, use_fp8=False)
        out, *_ = buffer.low_latency_combine(rows, ids, torch.ones(T, K), handle)
        assert torch.equal(out, 2 * x)
    deep_ep.destroy(ctx.group)


def test_strategies(pool: RankPool) -> None:
    pool.run(1, check_strategies)


def check_low_latency_modes(ctx: RankContext) -> None:
    x, ids = inputs()

    def sent(buffer: deep_ep.Buffer, **options: Any) -> Any:
        rows = buffer.low_latency_dispatch(x, ids, M, 2, **options)[0]
        return rows if isinstance(rows, torch.Tensor) else rows[0].dtype

    plain = make_buffer(ctx, "default")
    assert sent(plain) == torch.int8
    assert sent(plain, use_ue8m0=True) == torch.float8_e4m3fn
    assert sent(plain, use_fp8=False, use_mxfp4=True) == torch.float4_e2m1fn_x2
    for value in ("1", "True"):
        unquantised = make_buffer(ctx, "default", SGLANG_DEEPEP_BF16_DISPATCH=value)
        for options in ({}, {"use_ue8m0": True}, {"use_mxfp4": True}):
            assert torch.equal(sent(unquantised, **options)[:T], x)
        assert sent(unquantised, quant_mode="int8") == torch.int8
    assert sent(make_buffer(ctx, "default", SGLANG_DEEPEP_BF16_DISPATCH="false")) == torch.int8


def check_changes(ctx: RankContext) -> None:
    """As SGLang has it: a draft model that is not quantised makes its calls between two assignments to os.environ."""
    x, ids = inputs()
    draft = {"DEEP_NORMAL_MODE_USE_INT8_QUANT": "0", "SGLANG_DEEPEP_BF16_DISPATCH": "1"}
    base = {"DEEP_NORMAL_MODE_USE_INT8_QUANT": "1", "SGLANG_DEEPEP_BF16_DISPATCH": "0"}
    buffer = make_buffer(ctx, "default", DEEP_NORMAL_MODE_USE_INT8_QUANT="1")

    def quantised() -> list[bool]:
        rows = [send(buffer, x, ids, 2)[0], buffer.low_latency_dispatch(x, ids, M, 2)[0]]
        return [isinstance(one, tuple) for one in rows]

    assert quantised() == [True, True]
    for variables, wanted in ((draft, False), (base, True), (draft, False)):
        with in_environment(**variables):
            assert quantised() == [wanted] * 2
    assert quantised() == [True, True]  # as when it was made
    with in_environment(DEEP_NORMAL_MODE_USE_INT8_QUANT="yes"):
        assert "DEEP_NORMAL_MODE_USE_INT8_QUANT must be one of 0, 1" in error_of(quantised)[1]
    # A graph keeps what was in force when the Buffer was made: nothing would tell it.
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: send(buffer, x, ids, 2)[0], backend="aot_eager", fullgraph=True)
    with in_environment(**draft):
        assert isinstance(compiled(x), tuple)


def test_changes(pool: RankPool) -> None:
    pool.run(1, check_changes)


def test_low_latency_modes(pool: RankPool) -> None:
    pool.run(1, check_low_latency_modes)


def check_window_sizes(ctx: RankContext) -> list[tuple[str, str]]:
    def num_bytes(**options: Any) -> int:
        deep_ep.Buffer(ctx.group, **options)
        return deep_ep.groups._parts[ctx.group.group_name]["cpu"].num_bytes

    with in_environment(HCCL_BUFFSIZE="3"):
        assert num_bytes(num_nvl_bytes=1 << 20) == 1 << 20
        assert num_bytes() == 3 << 20
        with in_environment(DEEPEP_HCCL_BUFFSIZE="4"):
            assert num_bytes() == 4 << 20
        deep_ep.destroy(ctx.group)
        assert num_bytes() == 3 << 20
        # 4 MiB for a rank with a window of 3: in rounds.
        x = torch.full((1 << 10, 1 << 11), float(ctx.rank)).bfloat16()
        out = deep_ep.dispatch(x, torch.arange(1 << 10).unsqueeze(1) % 2, num_experts=2, group=ctx.group)
        assert torch.equal(out.recv_x, torch.cat([torch.full_like(x, r)[::2] for r in range(2)]))
    assert num_bytes() == 3 << 20
    with in_environment(HCCL_BUFFSIZE=str(1 << 30)):
        error = error_of(deep_ep.Buffer, ctx.group)
    deep_ep.destroy(ctx.group)
    return [error]


def test_window_sizes(pool: RankPool) -> None:
    for [(kind, message)] in pool.run(2, check_window_sizes):
        assert kind == "RuntimeError"
        assert f"windows of {1 << 50} bytes are wanted" in message
        assert "HCCL_BUFFSIZE" in message


@pytest.mark.parametrize(
    "links, comm_alg", [(("1", "0"), "hierarchy"), (("0", "1"), ""), (("1", ""), ""), (("", "0"), "")]
)
def test_links_of_a_server(links: tuple[str, str], comm_alg: str) -> None:
    with in_environment(HCCL_INTRA_PCIE_ENABLE=links[0], HCCL_INTRA_ROCE_ENABLE=links[1]):
        assert env.comm_alg("A2") == comm_alg
        assert [env.comm_alg(other) for other in ("A3", "A5", None)] == [""] * 3


def test_ccu() -> None:
    with in_environment(MOE_ENABLE_CCU="1"):
        assert [env.comm_alg(one) for one in ("A2", "A3", "A5", None)] == ["", "ccu", "ccu", ""]
    with in_environment(MOE_ENABLE_CCU="0"):
        assert [env.comm_alg(one) for one in ("A3", "A5")] == [""] * 2


ROUNDS = {"DEEPEP_NORMAL_LONG_SEQ_ROUND": "3", "DEEPEP_NORMAL_LONG_SEQ_PER_ROUND_TOKENS": "32"}


def check_rounds(ctx: RankContext, strategy: str) -> list[tuple[str, str]]:
    buffer, plain = make_buffer(ctx, strategy, **ROUNDS), make_buffer(ctx, strategy)
    E = 6

    def layer(x: torch.Tensor, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        per_rank, _, per_expert, in_rank, _ = buffer.get_dispatch_layout(ids, E)
        given = {"num_tokens_per_rank": per_rank, "is_token_in_rank": in_rank, "num_tokens_per_expert": per_expert}
        rows, *_, handle, _ = buffer.dispatch(x, topk_idx=ids, **given)
        return per_expert, buffer.combine(rows, handle)[0]

    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True, dynamic=True)
    for T in (96, 40, 0):  # all rounds, two of them, none
        ids = (torch.arange(T * K).view(T, K) * (ctx.rank + 1)) % (E + 1) - 1
        x = torch.ones(T, H)
        wanted = torch.tensor([int((ids[r * 32 : r * 32 + 32] == e).sum()) for r in range(3) for e in range(E)])
        for fn in (layer, compiled) if T else (layer,):
            per_expert, out = fn(x, ids)
            assert per_expert.dtype == torch.int32 and torch.equal(per_expert, wanted.int())
            assert torch.equal(out, x * (ids >= 0).sum(1, keepdim=True))
        assert torch.equal(plain.get_dispatch_layout(ids, E)[2], wanted.view(3, E).sum(0).int())
    by_rank = make_buffer(ctx, strategy, DEEP_EP_ROWS="rank", **ROUNDS)
    assert by_rank.get_dispatch_layout(ids, E)[2].shape == (E,)
    ids = torch.zeros(97, K, dtype=torch.int64)
    per_rank, _, per_expert, in_rank, _ = plain.get_dispatch_layout(ids, 4)
    given = {"num_tokens_per_rank": per_rank, "is_token_in_rank": in_rank, "num_tokens_per_expert": per_expert}
    errors = [error_of(buffer.get_dispatch_layout, ids, E)]
    errors.append(error_of(lambda: buffer.dispatch(torch.ones(97, H), topk_idx=ids, **given)))
    for variables in ({"DEEPEP_NORMAL_LONG_SEQ_ROUND": "3"}, dict.fromkeys(ROUNDS, "256") | {list(ROUNDS)[1]: "513"}):
        with in_environment(**variables):
            errors.append(error_of(deep_ep.Buffer, ctx.group))
    return errors


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_rounds(pool: RankPool, strategy: str) -> None:
    names = "DEEPEP_NORMAL_LONG_SEQ_ROUND", "DEEPEP_NORMAL_LONG_SEQ_PER_ROUND_TOKENS"
    for errors in pool.run(2, check_rounds, strategy):
        assert [kind for kind, _ in errors] == ["ValueError"] * 4
        assert (
            errors[0][1].startswith("topk_idx must have at most 96 tokens, 3 rounds of 32") and "got 97" in errors[0][1]
        )
        assert errors[1][1].startswith("num_tokens_per_expert must have the shape [rounds·E], with 3 rounds")
        assert f"{names[0]} and {names[1]} must be set together" in errors[2][1]
        assert errors[3][1].endswith(f"{names[0]} times {names[1]} must be at most 131072; got 256 times 513")


def test_expansion_mode() -> None:
    with in_environment(HCCL_OP_EXPANSION_MODE="AIV"):
        with pytest.raises(ValueError, match="HCCL_OP_EXPANSION_MODE must not be set on A2; got 'AIV'"):
            env.comm_alg("A2")
        assert [env.comm_alg(other) for other in ("A3", "A5", None)] == [""] * 3


@pytest.mark.parametrize(
    "soc, wanted", [("Ascend910B3", "A2"), ("Ascend910_9391", "A3"), ("Ascend950PR_9589", "A5"), ("Ascend310P3", None)]
)
def test_platform(soc: str, wanted: str | None) -> None:
    assert platform() is None
    npu = mock.Mock(is_available=lambda: True, get_device_name=lambda: soc)
    with mock.patch.object(torch, "npu", npu, create=True):
        assert platform() == wanted


def logged(buffer: deep_ep.Buffer, fn: Any) -> list[str]:
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    call_log.logger.addHandler(handler)
    try:
        fn()
    finally:
        call_log.logger.removeHandler(handler)
    return lines


def check_call_log(ctx: RankContext) -> None:
    x, ids = inputs()
    # Anybody's shell may have a DEBUG_MODE.
    for value in ("", "OFF", "1", "true", "verbose"):
        quiet = make_buffer(ctx, "default", DEBUG_MODE=value)
        assert not {"dispatch", "combine"} & vars(quiet).keys()
    buffer = make_buffer(ctx, "default", DEBUG_MODE="on")

    def layer(x: torch.Tensor) -> torch.Tensor:
        rows, *_, handle, _ = send(buffer, x, ids, 2)
        return buffer.combine(rows, handle)[0]

    lines = logged(buffer, lambda: layer(x))
    where = f"[rank 0 of 1, group {ctx.prepared_group('default').group_name}]"
    assert lines[0] == f"{where} get_dispatch_layout(topk_idx=int64[3, 2], num_experts=2)"
    assert lines[1].startswith(f"{where} get_dispatch_layout -> (int32[1], None, int32[2], int32[3, 1], EventOverlap")
    assert lines[2].startswith(f"{where} dispatch(x=float32[3, 32], num_tokens_per_rank=int32[1], ")
    assert lines[3].startswith(f"{where} dispatch -> (float32[6, 32], int64[6, 2], float32[6, 2], list of 2, (int32[")
    assert lines[5].startswith(f"{where} combine -> (float32[3, 32], None, ")
    assert len(lines) == 6

    torch._dynamo.reset()
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    assert logged(buffer, lambda: torch.testing.assert_close(compiled(x), 2 * x, rtol=0, atol=0)) == []
    ctx.unprepare("default")


def test_call_log(pool: RankPool) -> None:
    pool.run(1, check_call_log)


def test_report(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    for name in (*env.VARIABLES, *env.NOT_READ):
        monkeypatch.delenv(name, raising=False)
    assert main() == 0
    printed = capsys.readouterr().out
    assert "no NPU: everything runs on the CPU" in printed
    assert "HCCL_BUFFSIZE = not set (default)" in printed
    assert "DEEP_EP_KERNELS = not set (default)\n    No effect on this machine. Nothing is loaded from it." in printed
    monkeypatch.setenv("DEBUG_MODE", "1")
    assert main() == 0
    assert "DEBUG_MODE = 1 (environment)" in capsys.readouterr().out
    for name, (value, _) in WRONG.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("DEEP_NORMAL_MODE", "alltoall")
    assert main() == 1
    printed, wrong = capsys.readouterr()
    assert "DEEP_USE_MODE = error, which is wrong (environment)" in printed
    assert "DEEP_NORMAL_MODE = alltoall (environment)\n    Not read: DEEP_USE_MODE chooses" in printed
    assert [line.split()[4] for line in wrong.splitlines()] == list(WRONG)


@pytest.mark.slow
def test_report_is_a_program() -> None:
    command = [sys.executable, "-m", "deep_ep.env"]
    run = subprocess.run(command, env=os.environ | {"DEEP_EP_ROWS": "rank"}, capture_output=True, text=True)
    assert (run.returncode, run.stderr) == (0, "")
    assert "DEEP_EP_ROWS = rank (environment)" in run.stdout
