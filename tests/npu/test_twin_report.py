"""What the twin counts of launches, and `python -m tools.twin report`.

T tokens of each rank · H hidden · K top-k · E experts · R ranks · S nodes.
"""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints, is_typeddict
from unittest import mock

import pytest
import reference
import torch
from op_definitions import Call, Input, Soc

from tools.twin import __main__ as command
from tools.twin import kernels, native, report
from tools.twin.kernels import A2, A5, Failed, Launch, Moved, Setup, Twin, get_dispatch_layout
from tools.twin.model import align
from tools.twin.report import Options, Report

pytestmark = pytest.mark.torch_npu

NOTHING = Moved(bytes=0, transfers=0)
DISPATCHES = ("dispatch", "dispatch_int8", "low_latency_dispatch", "low_latency_dispatch_int8")


def assert_conforms(value: Any, kind: Any, where: str = "report") -> None:
    """What comes out of JSON has the type, to the last key."""
    if is_typeddict(kind):
        hints = get_type_hints(kind)
        assert value.keys() == hints.keys(), where
        for key, of_key in hints.items():
            assert_conforms(value[key], of_key, f"{where}.{key}")
    elif get_origin(kind) is list:
        for i, item in enumerate(value):
            assert_conforms(item, get_args(kind)[0], f"{where}[{i}]")
    else:
        assert type(value) is (get_origin(kind) or kind), where


# A launch whose every statement is known: get_dispatch_layout of one chunk of tokens per core.


@pytest.mark.parametrize("arch", [A2, A5])
@pytest.mark.parametrize("seed", [None, 1])
def test_a_known_launch(arch: int, seed: int | None) -> None:
    T, K, E, R, S, room = 6, 2, 8, 2, 1, 16 << 10
    twin = Twin(kernels.build())
    twin.configure(Setup(arch, 2, seed, room))
    twin.take_report()  # what other tests have launched in this process
    attrs = {"num_experts": E, "num_ranks": R, "num_nodes": S}
    call = Call("DeepEpGetDispatchLayout", [Input("int64", [T, K])], attrs)
    tiling = call.tile(Soc(2, room), [[R], [S], [E], [T, R]]).tiling
    get_dispatch_layout(twin, torch.arange(T * K).view(T, K) % E, E, R, S)
    results = 4 * (E + R + S)
    # Ids, and words by token and rank, of a chunk; four tables of E + R words, and two batches; words by node.
    chunk = sum(align(tiling.chunk_tokens * size, 32) for size in (K * 8, R * 4))
    peak = chunk + (4 + 2 * tiling.table_batch) * 64 + 32
    cores = [
        {
            "mte2": {"bytes": T // 2 * K * 8, "transfers": 1},  # ids
            # What each core has counted is added to the results, which the first one clears; and whether its tokens
            # go to each rank.
            "mte3": {"bytes": (1 + clears) * results + T // 2 * R * 4, "transfers": (1 + clears) * 3 + 1},
            "unified_buffer_peak": peak,
            "barriers": 5 + clears,
            "syncs": 1,
            "events": 7 + clears,
        }
        for clears in (1, 0)
    ]
    total = {key: sum(core[key] for core in cores) for key in ("barriers", "syncs", "events")}
    total |= {key: {what: sum(core[key][what] for core in cores) for what in NOTHING} for key in ("mte2", "mte3")}
    total["unified_buffer_peak"] = peak
    assert twin.take_report() == [
        {
            **{"op": "get_dispatch_layout", "rank": 0, "arch": arch, "completed": True},
            **{"links": [], "total": total, "cores": cores},
        }
    ]
    assert twin.take_report() == []


def test_traffic_is_that_of_the_report() -> None:
    twin = Twin(kernels.build())
    twin.configure(Setup(A2, 2))
    twin.take_report()
    ids = torch.zeros(6, 1, dtype=torch.int64)
    for _ in range(2):
        get_dispatch_layout(twin, ids, 8, 2, 1)
    # The second core clears nothing; a third one is not there.
    assert twin.take_traffic(3) == ([0, 0], [(2 * 24, 2 * (2 * 44 + 24)), (2 * 24, 2 * (44 + 24)), (0, 0)])
    assert twin.take_traffic(1) == ([0, 0], [(0, 0)])


def test_the_newest_launches_are_kept() -> None:
    twin = Twin(kernels.build())
    twin.configure(Setup(A2, 1))
    for T in range(1002):
        get_dispatch_layout(twin, torch.zeros(T % 9, 1, dtype=torch.int64), 1, 1, 1)
    launches = twin.take_report()
    assert [launch["total"]["mte2"]["bytes"] for launch in launches] == [8 * (T % 9) for T in range(2, 1002)]


def test_a_launch_that_breaks_a_rule_is_not_completed() -> None:
    twin = Twin(kernels.build())
    twin.configure(Setup(A2, 1))
    counts, in_rank = torch.zeros(8, dtype=torch.int32), torch.zeros(3, 2, dtype=torch.int32)
    outputs = [counts[:2], torch.zeros(1, dtype=torch.int32), counts, in_rank]
    with pytest.raises(Failed, match=r"regions num_tokens_per_\w+ and num_tokens_per_\w+ overlap"):
        twin.launch("get_dispatch_layout", "", [torch.zeros(3, 1, dtype=torch.int64)], [8, 2, 1], outputs)
    twin.take_violations()
    assert [launch["completed"] for launch in twin.take_report()] == [False]


# Launches of all ops, on ranks.


def test_links_carry_what_the_routing_implies() -> None:
    for options in (
        Options(tuple(report.OPS), ranks=4, tokens=24, hidden=96, top_k=3, experts=8, cores=3),
        Options(tuple(report.OPS), 2, 9, 200, 2, 6, dtype="float32", arch="A5", cores=2, routing="skewed", seed=5),
    ):
        check_links(options)
    check_links(Options(["combine_backward"], 2, 5, 7168, 2, 4, cores=2), tiles=2)


def check_links(options: Options, tiles: int = 1) -> None:
    """`tiles`: of a row that a token's rank sends."""
    made = json.loads(json.dumps(report.make(options)))
    assert_conforms(made, Report)
    R, K, E = options.ranks, options.top_k, options.experts
    launches: dict[tuple[str, int], Launch] = {(launch["op"], launch["rank"]): launch for launch in made["launches"]}
    assert list(launches) == [(op, rank) for op in options.ops for rank in range(R)]
    # Of each rank's tokens that have an expert of another one, how many of their experts are there.
    shares = [
        [[n for n in (report.route(options, rank)[0] // (E // R) == to).sum(1).tolist() if n > 0] for to in range(R)]
        for rank in range(R)
    ]
    row, flag = options.hidden * torch.finfo(getattr(torch, options.dtype)).bits // 8, 64
    for (op, rank), launch in launches.items():
        # Blocks agree on what they send and on the flags, and meet before flags are raised; those of a dispatch agree
        # on where rows go.
        phases = 1 if op in ("notify_dispatch", *DISPATCHES, "low_latency_combine") else 2
        meets_once = op in ("get_dispatch_layout", "low_latency_combine")
        syncs = 1 if meets_once else 3 * phases + (op in DISPATCHES)
        assert {core["syncs"] for core in launch["cores"]} == {syncs}
        assert launch["completed"]
        others = [peer for peer in range(R) if peer != rank and op != "get_dispatch_layout"]
        assert [link["peer"] for link in launch["links"]] == others
        for link in launch["links"]:
            to, back = shares[rank][link["peer"]], shares[link["peer"]][rank]
            record, row_only = 4 * (1 + 3 * K), 4 * (1 + 2 * K)
            words = [4 * n for n in back]
            sizes = {
                "notify_dispatch": [4 * E],
                "low_latency_dispatch": [4 * E] + len(to) * [row_only, row],
                "low_latency_dispatch_int8": [4 * E] + len(to) * [row_only + 4, options.hidden],
                "low_latency_combine": [8 * (1 + n) for n in to if n > 1] + len(back) * [row, 4],
                "dispatch": [4 * E] + len(to) * [record, row],
                "dispatch_int8": [4 * E] + len(to) * [record + 4, options.hidden],
                "combine": len(to) * [record] + len(back) * [row],
                "dispatch_backward": len(to) * [row_only] + len(back) * [row] + words,
                "combine_backward": len(to) * [record, *tiles * [row // tiles]] + words,
            }[op] + phases * [flag]
            assert link["read"] == NOTHING
            assert link["written"] == Moved(bytes=sum(sizes), transfers=len(sizes)), f"{op}, rank {rank}: {link}"
            marks = len(back) if op == "low_latency_combine" else 0
            assert link["flags"] == Moved(bytes=phases * flag + 4 * marks, transfers=phases + marks)


def test_skewed_routing_gives_one_expert_half_of_the_tokens() -> None:
    for tokens in (1, 8, 33):
        options = Options(["combine"], tokens=tokens, top_k=4, experts=16, routing="skewed")
        ids, weights = zip(*(report.route(options, rank) for rank in range(4)), strict=True)
        for i, w in zip(ids, weights, strict=True):
            assert (i == 0).sum() == (tokens + 1) // 2
            assert all(len(set(token.tolist())) == 4 for token in i)
            torch.testing.assert_close(w.sum(1), torch.ones(tokens))
        assert tokens == 1 or not torch.equal(ids[0], ids[1])


def test_handles_are_those_of_a_dispatch() -> None:
    for ranks, routing in ((1, "uniform"), (2, "skewed"), (4, "uniform")):
        options = Options(["combine"], ranks, 7, 8, 3, 8, routing=routing)
        ids, weights = (
            list(of_ranks) for of_ranks in zip(*(report.route(options, r) for r in range(ranks)), strict=True)
        )
        xs = [torch.zeros(7, 1)] * ranks
        for r in range(ranks):
            rank = report.Rank(options, r, mock.Mock())
            exact = reference.dispatch(xs, ids, weights, 8, [0] * ranks)[r]
            padded = reference.dispatch(xs, ids, weights, 8, [rank.N_low_latency] * ranks)[r]
            layout_range = padded.recv_channel_prefix_matrix.view(-1)
            expected = exact.recv_src_idx, exact.send_head, padded.recv_src_idx, layout_range, padded.send_head
            for made, wanted in zip((*rank.handle, *rank.handle_low_latency), expected, strict=True):
                torch.testing.assert_close(made, wanted, rtol=0, atol=0)


# The command line.


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, cwd=native.root())


def test_the_command_line(tmp_path: Path) -> None:
    file = tmp_path / "report.json"
    small = "--ranks 2 --tokens 5 --hidden 64 --top-k 2 --experts 4 --cores 2 --dtype float16 --arch A5 --seed 3"
    ops = "--ops notify_dispatch low_latency_dispatch --routing skewed"
    ran = run("-m", "tools.twin", "report", *ops.split(), *small.split(), "--json", str(file))
    assert ran.returncode == 0, ran.stderr
    made = json.loads(file.read_text())
    assert_conforms(made, Report)
    given = Options(["notify_dispatch", "low_latency_dispatch"], 2, 5, 64, 2, 4, "float16", "A5", 2, "skewed", 3)
    assert made == report.make(given)
    assert ran.stdout.endswith(report.table(made) + "\n")  # torch_npu may have said something before


def test_the_table() -> None:
    core = {"unified_buffer_peak": 3072, "barriers": 3, "syncs": 2, "events": 5}
    launches = []
    for rank, written in ((0, 2000), (1, 6000)):
        cores = [
            {"mte2": Moved(bytes=n * written, transfers=n), "mte3": Moved(bytes=100, transfers=1), **core}
            for n in (1, 3)
        ]
        total = {"mte2": Moved(bytes=4 * written, transfers=4), "mte3": Moved(bytes=200, transfers=2), **core}
        link = {"peer": 1 - rank, "written": Moved(bytes=written, transfers=7), "flags": Moved(bytes=64, transfers=1)}
        launch = {"op": "combine", "rank": rank, "arch": A2, "completed": True, "total": total, "cores": cores}
        launches.append({**launch, "links": [{**link, "read": NOTHING}]})
    options = {"ranks": 2, "tokens": 1, "hidden": 2, "top_k": 3, "experts": 4, "dtype": "float32", "arch": "A3"}
    made: Any = {"options": {**options, "routing": "uniform", "cores": 9}, "launches": launches}
    assert [" ".join(line.split()) for line in report.table(made).splitlines()] == [
        "2 ranks, T=1 H=2 K=3 E=4 float32, uniform; A3, cores: 9",
        "",
        "combine, cores: 2",
        "bytes number",
        "mean of ranks most mean most",
        "written over links 4,000 6,000 7 7",
        "flags of that 64 64 1 1",
        "read over links 0 0 0 0",
        "MTE2, in 16,000 24,000 4 4",
        "MTE3, out 200 200 2 2",
        "both, average core 8,100 12,100 3 3",
        "both, busiest core 12,100 18,100 4 4",
        "unified buffer, peak 3,072 3,072",
        "PipeBarrier, of a core 3 3",
        "SyncAll, of a core 2 2",
        "SetFlag, of a core 5 5",
        "bytes / transfers rank 0 rank 1",
        "rank 0 writes to - 2,000 / 7",
        "rank 1 writes to 6,000 / 7 -",
    ]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("--ops combine nothing", "ops must be of get_dispatch_layout, .*; got nothing"),
        ("--ops combine combine", "ops must differ, got combine, combine"),
        ("--ops combine --ranks 0", "ranks must be at least 1, got 0"),
        ("--ops combine --seed -1", "seed must be at least 0, got -1"),
        ("--ops combine --tokens many", "argument --tokens: invalid int value: 'many'"),
        ("--ops combine --ranks 3 --experts 8", "experts must be a multiple of ranks, got 8 experts and 3 ranks"),
        ("--ops combine --top-k 9 --experts 8", "top_k must be at most 8, the number of experts, got 9"),
        ("--ops combine --dtype int8", "dtype must be of bfloat16, float16, float32; got int8"),
        ("--ops combine --arch A4", "arch must be of A2, A3, A5; got A4"),
        ("--ops combine --routing odd", "routing must be of uniform, skewed; got odd"),
    ],
)
def test_wrong_arguments(wrong: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        command.main(["report", *wrong.split()])
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error: " in line]
    assert re.search(message, line)


def test_a_launch_that_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="1"):
        command.main(["report", "--ops", "notify_dispatch", "--ranks", "1", "--tokens", "2", "--experts", "80000"])
    assert "the tiling of DeepEpNotifyDispatch refuses the call" in capsys.readouterr().err


def test_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RuntimeError, match="no nothing to build with"):
        native.tool("nothing")
    with monkeypatch.context() as patch:
        patch.setattr(native, "torch_npu_dir", lambda: None)
        with pytest.raises(RuntimeError, match="no torch-npu wheel"):
            kernels.build.__wrapped__()


def test_deep_ep_does_not_import_the_twin() -> None:
    ran = run("-c", "import sys, deep_ep; sys.exit('tools' in sys.modules)")
    assert ran.returncode == 0, ran.stderr
