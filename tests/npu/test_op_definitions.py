"""The GE operator definitions of ops/ without CANN, against the torch schemas and fakes; what their tilings promise.

T tokens · H hidden · K top-k · E experts · R ranks · L = E/R · N rows · S nodes · W num_worst_tokens ·
M num_max_dispatch_tokens_per_rank.
"""

import ctypes
import dataclasses
import itertools
from typing import Any

import op_definitions
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from op_definitions import Call, Input, Launch, Output, Refused, Soc, Tiling
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

import deep_ep  # noqa: F401  (the torch ops)
from deep_ep.fused_options import FusedOptions
from deep_ep.npu import ge
from tools.twin import model, native
from tools.twin.kernels import A2, A5, VECTOR_CORES

pytestmark = pytest.mark.torch_npu

TORCH_OPS = {
    "DeepEpGetDispatchLayout": "get_dispatch_layout",
    "DeepEpDispatch": "dispatch",
    "DeepEpDispatchExact": "dispatch",
    "DeepEpDispatchInt8": "dispatch_int8",
    "DeepEpDispatchInt8Exact": "dispatch_int8",
    "DeepEpCombine": "combine",
    "DeepEpDispatchBackward": "dispatch_backward",
    "DeepEpCombineBackward": "combine_backward",
    "DeepEpLowLatencyDispatch": "low_latency_dispatch",
    "DeepEpLowLatencyDispatchInt8": "low_latency_dispatch_int8",
    "DeepEpLowLatencyCombine": "low_latency_combine",
    "DeepEpFusedDeepMoe": "fused_deep_moe",
    "DeepEpFusedDeepMoeDispatchFfnCombine": "fused_deep_moe.dispatch_ffn_combine",
    "DeepEpFusedDeepMoeBackward": "fused_deep_moe_backward",
    "DeepEpFusedDeepMoeBackwardDispatchFfnCombine": "fused_deep_moe_backward.dispatch_ffn_combine",
}
CAPACITY = ("DeepEpDispatch", "DeepEpDispatchInt8")
"""Types with num_worst_tokens."""
every_type = pytest.mark.parametrize("op_type", TORCH_OPS)

WITHOUT_KERNEL = {op_type for op_type in TORCH_OPS if op_type.startswith("DeepEpFused")}


def torch_op(op_type: str) -> Any:
    """The op's overload."""
    name, _, overload = TORCH_OPS[op_type].partition(".")
    return getattr(getattr(torch.ops.deep_ep, name), overload or "default")


ROWS = ("float32", "float16", "bfloat16")
"""Dtypes of rows, in the order of the columns."""

WEIGHTS = (*ROWS, "int8")
"""Those of weights that may be int8 as well: then everything else has its columns twice."""

DTYPES = {
    **dict.fromkeys(("x", "recv_x", "combined_x", "grad_x", "grad_out", "grad_recv_x"), ROWS),
    **dict.fromkeys(("topk_weights", "recv_topk_weights", "grad_topk_weights", "grad_recv_topk_weights"), "float32"),
    **dict.fromkeys(("topk_idx", "recv_topk_idx", "num_recv_tokens_per_expert", "num_dropped", "recv_count"), "int64"),
    **dict.fromkeys(("windows", "num_worst_tokens"), "int64"),
    "recv_data": "int8",
    "num_recv_tokens": "int32",
    "recv_scales": "float32",
    **dict.fromkeys(("recv_src_idx", "send_head", "layout_range", "is_token_in_rank"), "int32"),
    **dict.fromkeys(("num_tokens_per_rank", "num_tokens_per_rdma_rank", "num_tokens_per_expert"), "int32"),
    **dict.fromkeys(("grad_gmm1_weight", "grad_gmm2_weight"), ROWS),
    **dict.fromkeys(("rank_prefix_matrix", "channel_prefix_matrix", "recv_channel_prefix_matrix"), "int32"),
}
"""Of every parameter by its name; equal names mean equal things."""


def dtype_of(op_type: str, name: str) -> Any:
    """Of a parameter. What is said of weights and their scales depends on the operator."""
    if name in ("gmm1_weight", "gmm2_weight"):
        return ROWS if "Backward" in op_type else WEIGHTS
    if name in ("gmm1_weight_scale", "gmm2_weight_scale"):
        return "int64" if op_type.endswith("FfnCombine") else "float32"
    return DTYPES[name]


# definitions against schemas


@every_type
def test_definition_has_the_names_of_the_schema(op_type: str) -> None:
    schema = torch_op(op_type)._schema
    arguments = {a.name: str(a.type) for a in schema.arguments}
    tensors = [name for name, type in arguments.items() if type == "Tensor"]
    numbers = [name for name, type in arguments.items() if type in ("int", "bool") and name != "num_worst_tokens"]
    attrs = [(name, "VT_INT") for name in numbers]
    if "group" in arguments:
        tensors += ["num_worst_tokens", "windows"] if op_type in CAPACITY else ["windows"]
        more = [(name, "VT_INT") for name in numbers if name not in ("num_experts", "num_ranks")]
        attrs = [("group", "VT_STRING"), ("num_experts", "VT_INT"), ("num_ranks", "VT_INT"), *more]
    assert op_definitions.registered_ir_def(op_type) == (
        "SUCCESS",
        [(name, "required") for name in tensors],
        [(result.name, "required") for result in schema.returns],
        attrs,
    )


def test_no_other_types() -> None:
    assert set(op_definitions.definitions()) == {*TORCH_OPS, "DeepEpNotifyDispatch"}
    assert set(ge._TYPES) == set(TORCH_OPS)  # else torchair runs ops of the others while it compiles
    assert op_definitions.registered_ir_def("DeepEpNothing") == ("ERROR", [], [], [])


def test_an_ir_definition_in_full() -> None:
    assert op_definitions.registered_ir_def("DeepEpLowLatencyDispatch") == (
        "SUCCESS",
        [("x", "required"), ("topk_idx", "required"), ("windows", "required")],
        [(name, "required") for name in ("recv_x", "recv_count", "recv_src_idx", "layout_range", "send_head")],
        [
            ("group", "VT_STRING"),
            ("num_experts", "VT_INT"),
            ("num_ranks", "VT_INT"),
            ("num_max_dispatch_tokens_per_rank", "VT_INT"),
            ("zero_unused", "VT_INT"),
        ],
    )


def test_notify_dispatch() -> None:
    """The operator without a torch op."""
    assert op_definitions.registered_ir_def("DeepEpNotifyDispatch") == (
        "SUCCESS",
        [("topk_idx", "required"), ("windows", "required")],
        [("num_rows", "required")],
        [("group", "VT_STRING"), ("num_experts", "VT_INT"), ("num_ranks", "VT_INT")],
    )
    inputs = [Input("int64", [5, 2]), Input("int64", [10])]
    inferred = op_definitions.infer("DeepEpNotifyDispatch", inputs, {"group": "g", "num_experts": 4, "num_ranks": 2})
    assert inferred == [Output("int64", [1])]


@every_type
def test_parameters(op_type: str) -> None:
    definition = op_definitions.definitions()[op_type]
    params = definition["inputs"] + definition["outputs"]
    has_weights = any(dtype_of(op_type, param["name"]) is WEIGHTS for param in definition["inputs"])
    has_rows = any(isinstance(dtype_of(op_type, param["name"]), tuple) for param in params)
    for param in params:
        dtypes = tuple(op_definitions.NAMES[number] for number in param["dtypes"])
        expected = dtype_of(op_type, param["name"])
        columns = ROWS if isinstance(expected, tuple) else (expected,) * (len(ROWS) if has_rows else 1)
        if has_weights:
            columns += ("int8",) * len(ROWS) if expected is WEIGHTS else columns
        assert dtypes == columns, param["name"]
        assert param["formats"] == [2] * len(columns), param["name"]  # ND
    for param in definition["inputs"]:
        by_value = param["name"] == "num_worst_tokens"
        assert param["value_depend"] == ("optional" if by_value else "ignore")
        assert param["auto_contiguous"] is not by_value
    by_computation = {param["name"] for param in definition["outputs"] if param["shape_depends_on_compute"]}
    outputs = {param["name"] for param in definition["outputs"]}
    assert by_computation == (outputs if op_type.endswith("Exact") else set())
    assert all(attr["required"] for attr in definition["attrs"])


@every_type
def test_socs(op_type: str) -> None:
    settings = {
        "dynamicCompileStatic.flag": "true",
        "dynamicFormat.flag": "false",
        "dynamicRankSupport.flag": "true",
        "dynamicShapeSupport.flag": "true",
        "needCheckSupport.flag": "false",
        "precision_reduce.flag": "false",
        "aclnnSupport.value": "support_aclnn",
        "jitCompile.flag": "static_false",
        "multiKernelSupportDynamicGraph.value": "multi_kernel",
    }
    assert op_definitions.definitions()[op_type]["socs"] == dict.fromkeys(
        ("ascend910b", "ascend910_93", "ascend950"), settings
    )


# inference against fakes


@dataclasses.dataclass(frozen=True)
class Sizes:
    T: int
    H: int
    K: int
    L: int
    R: int
    N: int
    S: int
    M: int

    @property
    def E(self) -> int:
        return self.L * self.R

    @property
    def width(self) -> int:
        """I."""
        return 64 * self.S

    @property
    def quant_mode(self) -> int:
        return self.T % 2

    def shape_of(self, name: str, op_type: str) -> list[int]:
        """Of an input of any op but `x`, which is [T, H] or [N, H]."""
        T, H, K, N, L = self.T, self.H, self.K, self.N, self.L
        return {
            "gmm1_weight": [L, H, 2 * self.width],
            "gmm2_weight": [L, self.width, H] if op_type.endswith("FfnCombine") else [L, H, self.width],
            "gmm1_weight_scale": [L, 2 * self.width] if self.quant_mode else [0, 0],
            "gmm2_weight_scale": [L, H] if self.quant_mode else [0, 0],
            **{name: [T, K] for name in ("topk_idx", "topk_weights", "send_head")},
            "grad_out": [T, H],
            "grad_recv_x": [N, H],
            "grad_recv_topk_weights": [N, K],
            "recv_src_idx": [N, 3],
            "layout_range": [self.E],
            "num_worst_tokens": [],
            "windows": [self.R + 1],
        }[name]

    def numbers(self) -> dict[str, int | str]:
        return {
            "group": "a group",
            "num_experts": self.E,
            "num_ranks": self.R,
            "num_nodes": self.S,
            "quant_mode": self.quant_mode,
            "num_max_dispatch_tokens_per_rank": self.M,
            "zero_unused": self.T % 2,
        }


@st.composite
def sizes(draw: st.DrawFn) -> Sizes:
    S = draw(st.integers(1, 4))
    T = draw(st.integers(0, 40))
    return Sizes(
        T=T,
        H=draw(st.integers(1, 70)),
        K=draw(st.integers(1, 9)),
        L=draw(st.integers(1, 9)),
        R=S * draw(st.integers(1, 8)),
        N=draw(st.integers(1, 200)),
        S=S,
        M=draw(st.integers(max(T, 1), 50)),
    )


def arguments(op_type: str, s: Sizes, rows: str) -> tuple[list[Input], dict[str, int | str]]:
    """A correct call. `x` is [T, H] where tokens are sent, [N, H] where rows come back."""
    definition = op_definitions.definitions()[op_type]
    x = [s.T if "Dispatch" in op_type or "Fused" in op_type else s.N, s.H]
    inputs = []
    for param in definition["inputs"]:
        name = param["name"]
        dtype = dtype_of(op_type, name)
        if dtype is WEIGHTS and s.quant_mode:
            dtype = "int8"
        elif isinstance(dtype, tuple):
            dtype = rows
        shape = x if name == "x" else s.shape_of(name, op_type)
        inputs.append(Input(dtype, shape, s.N if name == "num_worst_tokens" else None))
    return inputs, {attr["name"]: s.numbers()[attr["name"]] for attr in definition["attrs"]}


def fake_results(op_type: str, inputs: list[Input], attrs: dict[str, int | str]) -> list[Output]:
    """What the fake of the torch op makes of the same call; -1 for a dimension that depends on data."""
    op = torch_op(op_type)
    names = [param["name"] for param in op_definitions.definitions()[op_type]["inputs"]]
    with FakeTensorMode(shape_env=ShapeEnv()):
        given: dict[str, Any] = {"num_worst_tokens": 0, "comm_alg": "", "strategy": "default", **attrs}
        given |= FusedOptions()._asdict()
        for name, (dtype, shape, value) in zip(names, inputs, strict=True):
            given[name] = torch.empty(shape, dtype=getattr(torch, dtype)) if value is None else value
        given["zero_unused"] = bool(attrs.get("zero_unused"))
        results = op(**{a.name: given[a.name] for a in op._schema.arguments})
    results = results if isinstance(results, tuple) else (results,)
    return [
        Output(str(t.dtype).removeprefix("torch."), [n if isinstance(n, int) else -1 for n in t.shape]) for t in results
    ]


@every_type
@given(s=sizes(), rows=st.sampled_from(ROWS))
def test_inference_matches_the_fake(op_type: str, s: Sizes, rows: str) -> None:
    inputs, attrs = arguments(op_type, s, rows)
    assert op_definitions.infer(op_type, inputs, attrs) == fake_results(op_type, inputs, attrs)


SIZES = Sizes(T=5, H=32, K=3, L=2, R=4, N=17, S=2, M=6)


def test_inferred_outputs_of_dispatch() -> None:
    """In full, as both sides of the comparison with fakes might be wrong alike."""
    inputs, attrs = arguments("DeepEpDispatch", SIZES, "bfloat16")
    capacity = [
        Output("bfloat16", [17, 32]),
        Output("int64", [17, 3]),
        Output("float32", [17, 3]),
        Output("int64", [2]),
        Output("int64", []),
        Output("int32", [4, 4]),
        Output("int32", [4, 2]),
        Output("int32", [2, 4]),
        Output("int32", [17, 3]),
        Output("int32", [5, 3]),
    ]
    assert op_definitions.infer("DeepEpDispatch", inputs, attrs) == capacity
    # aclnn makes an array of a value: [1].
    inputs[3] = Input("int64", [1], 17)
    assert op_definitions.infer("DeepEpDispatch", inputs, attrs) == capacity


def test_value_that_is_not_known() -> None:
    inputs, attrs = arguments("DeepEpDispatch", SIZES, "bfloat16")
    inputs[3] = Input("int64", [])
    outputs = op_definitions.infer("DeepEpDispatch", inputs, attrs)
    inputs, attrs = arguments("DeepEpDispatchExact", SIZES, "bfloat16")
    assert outputs == op_definitions.infer("DeepEpDispatchExact", inputs, attrs)
    assert [output.shape[0] if output.shape else None for output in outputs] == [-1, -1, -1, 2, None, 4, 4, 2, -1, 5]


@given(s=sizes(), op_type=st.sampled_from(list(TORCH_OPS)), data=st.data())
def test_unknown_dimensions(s: Sizes, op_type: str, data: st.DataObject) -> None:
    """What is hidden makes outputs unknown, never wrong; hiding it in one input only leaves them known from another."""
    inputs, attrs = arguments(op_type, s, "float16")
    expected = op_definitions.infer(op_type, inputs, attrs)

    def hide(shape: list[int]) -> list[int]:
        if data.draw(st.booleans()):
            return [-2]
        return [-1 if data.draw(st.booleans()) else n for n in shape]

    hidden = [i._replace(shape=hide(list(i.shape))) for i in inputs]
    for actual, full in zip(op_definitions.infer(op_type, hidden, attrs), expected, strict=True):
        assert actual.dtype == full.dtype
        assert len(actual.shape) == len(full.shape)
        assert all(a in (-1, n) for a, n in zip(actual.shape, full.shape, strict=True))


@pytest.mark.parametrize("unknown", [[-1, -1], [-2]])
def test_tokens_are_known_from_any_input(unknown: list[int]) -> None:
    inputs, attrs = arguments("DeepEpDispatch", SIZES, "float32")
    full = op_definitions.infer("DeepEpDispatch", inputs, attrs)
    inputs[1] = inputs[1]._replace(shape=unknown)
    assert op_definitions.infer("DeepEpDispatch", inputs, attrs) == full
    inputs[2] = inputs[2]._replace(shape=unknown)
    without_k = op_definitions.infer("DeepEpDispatch", inputs, attrs)
    assert [without_k[i].shape for i in (0, 1, 9)] == [[17, 32], [17, -1], [5, -1]]
    inputs[0] = inputs[0]._replace(shape=unknown)
    without_any = op_definitions.infer("DeepEpDispatch", inputs, attrs)
    assert [without_any[i].shape for i in (0, 1, 9)] == [[17, -1], [17, -1], [-1, -1]]


def test_range_of_exact_dispatch() -> None:
    inputs, attrs = arguments("DeepEpDispatchExact", SIZES, "bfloat16")
    unknown = op_definitions.infer("DeepEpDispatchExact", inputs, attrs)
    least, most = Call("DeepEpDispatchExact", inputs, attrs).infer_range()
    rows = SIZES.R * SIZES.T * SIZES.K  # every rank sends all of its tokens K times
    for number, outputs in ((0, least), (rows, most)):
        expected = [[number if n == -1 else n for n in output.shape] for output in unknown]
        assert [output.shape for output in outputs] == expected


WRONG = [
    ("DeepEpDispatch", "topk_idx", [6, 3], "topk_idx: T is 6 here and 5 elsewhere"),
    ("DeepEpDispatch", "x", [5], "x: must have 2 dimensions, got 1"),
    ("DeepEpDispatch", "topk_weights", [5, 4], "topk_weights: K is 4 here and 3 elsewhere"),
    ("DeepEpCombine", "recv_src_idx", [17, 2], "recv_src_idx: 3 is 2 here and 3 elsewhere"),
    ("DeepEpCombine", "send_head", [4, 3], "send_head: T is 4 here and 5 elsewhere"),
    ("DeepEpCombineBackward", "grad_out", [5, 31], "x: H is 32 here and 31 elsewhere"),
    ("DeepEpLowLatencyCombine", "layout_range", [9], "layout_range: E is 9 here and 8 elsewhere"),
    ("DeepEpLowLatencyDispatch", "num_experts", 9, "num_experts: must be divisible by num_ranks"),
    ("DeepEpLowLatencyDispatch", "num_ranks", 0, "num_ranks: must be at least 1"),
    (
        "DeepEpLowLatencyDispatch",
        "num_max_dispatch_tokens_per_rank",
        4,
        "x: has more tokens than num_max_dispatch_tokens_per_rank",
    ),
    (
        "DeepEpLowLatencyDispatch",
        "num_max_dispatch_tokens_per_rank",
        2**28,
        "num_max_dispatch_tokens_per_rank: makes more than 2147483647 rows",
    ),
    ("DeepEpDispatch", "num_worst_tokens", 0, "num_worst_tokens: must be 1 to 2147483647"),
    (
        "DeepEpFusedDeepMoe",
        "num_max_dispatch_tokens_per_rank",
        4,
        "x: has more tokens than num_max_dispatch_tokens_per_rank",
    ),
    (
        "DeepEpFusedDeepMoe",
        "gmm1_weight",
        [2, 32, 128],
        "gmm1_weight: must have twice as many columns as gmm2_weight has rows",
    ),
    ("DeepEpFusedDeepMoeDispatchFfnCombine", "gmm1_weight", [2, 31, 256], "gmm1_weight: H is 31 here and 32 elsewhere"),
    ("DeepEpFusedDeepMoeBackward", "gmm2_weight", [2, 128, 32], "gmm2_weight: H is 128 here and 32 elsewhere"),
    (
        "DeepEpFusedDeepMoeBackwardDispatchFfnCombine",
        "gmm2_weight",
        [3, 128, 32],
        "gmm2_weight: L is 3 here and 2 elsewhere",
    ),
]


@pytest.mark.parametrize(("op_type", "name", "given", "message"), WRONG)
def test_what_does_not_fit_is_refused(
    op_type: str, name: str, given: Any, message: str, capfd: pytest.CaptureFixture[str]
) -> None:
    inputs, attrs = arguments(op_type, SIZES, "bfloat16")
    names = [param["name"] for param in op_definitions.definitions()[op_type]["inputs"]]
    if name in attrs:
        attrs[name] = given
    elif name == "num_worst_tokens":
        inputs[names.index(name)] = Input("int64", [], given)
    else:
        inputs[names.index(name)] = inputs[names.index(name)]._replace(shape=given)
    with pytest.raises(Refused):
        op_definitions.infer(op_type, inputs, attrs)
    assert capfd.readouterr().err == f"{op_type}: {message}\n"


def test_rows_of_two_dtypes_are_refused(capfd: pytest.CaptureFixture[str]) -> None:
    inputs, attrs = arguments("DeepEpCombineBackward", SIZES, "bfloat16")
    inputs[1] = inputs[1]._replace(dtype="float16")
    with pytest.raises(Refused):
        op_definitions.infer("DeepEpCombineBackward", inputs, attrs)
    assert capfd.readouterr().err == "DeepEpCombineBackward: x: all rows of a call have one dtype\n"


def test_columns_stand_in_whole_tiles(capfd: pytest.CaptureFixture[str]) -> None:
    inputs, attrs = arguments("DeepEpFusedDeepMoe", SIZES, "bfloat16")
    inputs[3], inputs[5] = inputs[3]._replace(shape=[2, 32, 200]), inputs[5]._replace(shape=[2, 32, 100])
    with pytest.raises(Refused):
        op_definitions.infer("DeepEpFusedDeepMoe", inputs, attrs)
    assert capfd.readouterr().err == "DeepEpFusedDeepMoe: gmm1_weight: must have a multiple of 128 columns\n"


# tilings

SOCS = {
    "ascend910b": Soc(48, 192 * 1024 - 256 - 8192),
    "ascend910_93": Soc(48, 192 * 1024 - 256 - 8192),
    "ascend950": Soc(64, 248 * 1024),
}
every_soc = pytest.mark.parametrize(
    "soc",
    [
        Soc(cores, SOCS[cann].unified_buffer_bytes)
        for cann, arch in (("ascend910b", A2), ("ascend950", A5))
        for cores in VECTOR_CORES[arch]
    ],
    ids=str,
)

SUMS = ("DeepEpCombine", "DeepEpDispatchBackward", "DeepEpCombineBackward", "DeepEpLowLatencyCombine")
ANSWERS = ("DeepEpDispatchBackward", "DeepEpCombineBackward")


@st.composite
def large_sizes(draw: st.DrawFn) -> Sizes:
    """Up to the sizes of large deployments."""
    S = draw(st.sampled_from((1, 2, 4)))
    R = S * draw(st.integers(1, 96))
    return Sizes(
        T=draw(st.one_of(st.integers(0, 64), st.integers(0, 131072))),
        H=draw(st.one_of(st.integers(1, 64), st.integers(1, 40000), st.sampled_from((1024, 4096, 7168, 8192)))),
        K=draw(st.integers(1, 16)),
        L=draw(st.integers(1, max(1, 1024 // R))),
        R=R,
        N=draw(st.one_of(st.integers(1, 64), st.integers(1, 2**21))),
        S=S,
        M=131072,
    )


def launch(op_type: str, s: Sizes, rows: str, soc: Soc) -> Launch:
    inputs, attrs = arguments(op_type, s, rows)
    call = Call(op_type, inputs, attrs)
    return call.tile(soc, [[s.N if n == -1 else n for n in output.shape] for output in call.infer()])


@pytest.mark.parametrize("op_type", sorted(WITHOUT_KERNEL))
def test_operators_without_a_kernel_say_so(op_type: str, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(Refused):
        launch(op_type, SIZES, "bfloat16", SOCS["ascend910_93"])
    assert capfd.readouterr().err == f"{op_type}: this version has no kernel for this operator\n"
    folder = native.root() / "ops" / TORCH_OPS[op_type].partition(".")[0]
    assert (folder / "op_host").is_dir() and not (folder / "op_kernel").exists()


SLOTS = ("DeepEpLowLatencyDispatch", "DeepEpLowLatencyDispatchInt8", "DeepEpLowLatencyCombine")


def tables(t: Tiling) -> int:
    """Four for counting, and two batches that are read; the dispatches have four more, the backward ops one."""
    others = 0 if t.work.hidden == 0 else t.work.answers if t.work.arithmetic else 4
    return 4 + 2 * t.table_batch + others


def align(size: int, unit: int = 32) -> int:
    return -(-size // unit) * unit


def bytes_of_exchange(t: Tiling) -> int:
    """A mark, a status, the status of each block, some flags, and two words of each rank."""
    return 32 * (2 + t.blocks) + 64 * t.flags + 2 * align(4 * t.work.ranks)


def bytes_of_chunk(t: Tiling) -> int:
    """What kernels may keep of a chunk of tokens: ids, weights, rows, answers, what comes of them, a record and
    whose it is, places, what is known of rows, and ranks."""
    K, R = t.work.top_k, t.work.ranks if t.work.nodes else 0
    per_k = (8 * K, 4 * K, 4 * K, align(4 * K), 4 * K, 8, 8 * (2 * K + 1), 3 * 32 * K, 4 * R)
    return sum(align(t.chunk_tokens * size) for size in per_k) + t.chunk_tokens * t.record_bytes


def is_quantised(t: Tiling) -> bool:
    return t.work.sent_bytes < t.work.element_bytes


def bytes_of_tiles(t: Tiling) -> int:
    if is_quantised(t):
        # fp32 values, their bits, the largest; fp16; two results and four arrived pieces in int8.
        return t.buffers * t.tile_bytes + t.tile_bytes // t.work.element_bytes * (3 * 4 + 2 + 2 + 4)
    fp32_tiles = 2 * t.tile_bytes // t.work.element_bytes * 4 if t.work.arithmetic else 0
    results = 2 * t.tile_bytes if t.work.arithmetic else 0
    copies = 4 * t.tile_bytes if t.work.arithmetic and t.work.copied else 0
    return t.buffers * t.tile_bytes + results + fp32_tiles + copies


@every_soc
@given(
    s=large_sizes(),
    rows=st.sampled_from(ROWS),
    op_type=st.sampled_from([op for op in TORCH_OPS if op not in WITHOUT_KERNEL]),
)
def test_tiling(soc: Soc, s: Sizes, rows: str, op_type: str) -> None:
    if op_type in SLOTS:
        s = dataclasses.replace(s, T=s.T % 513, M=512)
        s = dataclasses.replace(s, N=s.R * s.M * min(s.K, s.L))
    block_dim, schedule_mode, workspaces, t = launch(op_type, s, rows, soc)
    moves_rows = op_type != "DeepEpGetDispatchLayout"
    N, H = (s.N, s.H) if moves_rows else (0, 0)

    assert (t.work.tokens, t.work.top_k, t.work.experts, t.work.ranks) == (s.T, s.K, s.E, s.R)
    assert (t.work.rows, t.work.hidden, t.work.arithmetic) == (N, H, op_type in SUMS)
    is_copied = moves_rows and not is_quantised(t) and (op_type not in SUMS or op_type == "DeepEpCombineBackward")
    assert (t.work.copied, t.work.answers) == (is_copied, op_type in ANSWERS)
    clears = s.T % 2 if op_type.startswith("DeepEpLowLatencyDispatch") else moves_rows
    assert t.work.zero_unused == clears
    assert t.work.max_tokens == (512 if op_type in SLOTS else 0)
    assert t.work.nodes == (s.S if op_type == "DeepEpGetDispatchLayout" else 0)

    # Blocks: no more than cores, none without work, all tokens once, balanced.
    assert block_dim == t.blocks == min(soc.vector_cores, max(s.T, N, 1))
    assert schedule_mode == 1
    parts = [t.tokens.part(block) for block in range(t.blocks)]
    assert parts[0].start == 0
    assert all(a.stop == b.start for a, b in itertools.pairwise(parts))
    assert parts[-1].stop == s.T
    assert max(map(len, parts)) - min(map(len, parts)) <= 1

    # Unified buffer: everything aligned, and all of it together fits.
    assert t.table_ranks >= s.E and t.table_ranks % 8 == 0
    assert t.table_words == t.table_ranks + s.R
    assert t.table_bytes >= max(4 * t.table_words, 8 * s.L)
    assert 1 <= t.chunk_tokens <= 64
    assert t.record_bytes == align(4 * (is_quantised(t) + 1 + 3 * s.K))
    assert t.table_bytes % 32 == t.tile_bytes % 512 == 0
    assert t.flags == min(32, max(1, (s.R + 1) // 2))
    assert 1 <= t.table_batch <= max(s.R, t.blocks)
    part = 16 if t.work.arithmetic else 4
    assert t.table_batch == 1 or 2 * (t.table_batch - 1) * t.table_bytes <= soc.unified_buffer_bytes // part
    used = bytes_of_exchange(t) + tables(t) * t.table_bytes + bytes_of_chunk(t)
    if moves_rows:
        element = 4 if rows == "float32" else 2
        sent = 1 if "DispatchInt8" in op_type else element
        assert (t.work.element_bytes, t.work.sent_bytes) == (element, sent)
        assert t.row_bytes == H * element
        assert t.answer == align(H * sent)
        assert t.row_stride == align(t.answer + (4 * s.K if op_type in ANSWERS else 0), 512)
        assert (t.tiles - 1) * t.tile_bytes + t.last_tile_bytes == t.row_bytes
        assert 0 < t.last_tile_bytes <= t.tile_bytes
        assert 2 <= t.buffers <= 4
        # As few tiles as can be, with two buffers each, up to what aligns the parts of a chunk and idle cores have.
        per_tile = bytes_of_tiles(t) // t.tile_bytes - t.buffers + 2
        free = soc.unified_buffer_bytes - used
        largest, least = (size // per_tile // 512 * 512 for size in (free, free - 32 * (7 * t.chunk_tokens + 64)))
        assert -(-t.row_bytes // largest) <= t.tiles <= -(-t.row_bytes // max(512, least))
        used += bytes_of_tiles(t)
    else:
        assert (t.tiles, t.buffers, t.tile_bytes) == (0, 0, 0)
    assert used <= soc.unified_buffer_bytes

    # Workspace: areas behind each other, each on a boundary of 512 bytes.
    assert t.count_stride >= 4 * t.table_words
    assert t.failures >= t.blocks * t.count_stride
    assert t.shared >= t.failures + 2 * 32 * t.blocks
    assert t.workspace_bytes >= t.shared + 2 * 4 * s.E
    assert all(at % 512 == 0 for at in (t.count_stride, t.failures, t.shared))
    assert workspaces == [(16 << 20) + t.workspace_bytes]  # AscendC's own part is in front


def test_a_tiling_in_full() -> None:
    """Low-latency combine of 7168 bf16 elements on A3: a row fits as a whole."""
    s = Sizes(T=128, H=7168, K=8, L=32, R=8, N=8 * 128 * 8, S=1, M=128)
    t = launch("DeepEpLowLatencyCombine", s, "bfloat16", SOCS["ascend910_93"]).tiling
    expected = {
        "blocks": 48,
        "row_bytes": 14336,
        "row_stride": 14336,
        "tile_bytes": 14336,
        "last_tile_bytes": 14336,
        "tiles": 1,
        "buffers": 4,
        "table_ranks": 256,
        "table_words": 264,
        "table_bytes": 1056,
        "table_batch": 6,
        "chunk_tokens": 12,
        "record_bytes": 128,
        "count_stride": 1536,
        "flags": 4,
        "failures": 2 * 48 * 1536,
        "shared": 2 * 48 * 1536 + 48 * 64,
        "workspace_bytes": 2 * 48 * 1536 + 48 * 64 + 2 * 1536,
    }
    assert {name: getattr(t, name) for name in expected} == expected
    assert (t.tokens.size, t.tokens.longer) == (2, 32)


@pytest.mark.parametrize(("name", "cann"), [("A2", "ascend910b"), ("A3", "ascend910_93"), ("A5", "ascend950")])
def test_the_model_of_time_has_the_tilings(name: str, cann: str) -> None:
    soc = model.SOCS[name]
    assert Soc(soc.cores, soc.unified_buffer) == SOCS[cann]
    for op_type, op in TORCH_OPS.items():
        for R in model.EPS if op in model.OPS else ():
            of_model = model.sizes(op, soc, R)
            s = Sizes(T=of_model.T, H=of_model.H, K=of_model.K, L=of_model.L, R=R, N=of_model.T * 8, S=1, M=of_model.T)
            if op in model.LOW_LATENCY:
                s = dataclasses.replace(s, N=of_model.low_latency_rows)
            t = launch(op_type, s, "bfloat16", SOCS[cann]).tiling
            pieces = model.Pieces.of(of_model, model.OPS[op].rows)
            assert (t.blocks, t.table_batch, t.chunk_tokens) == (of_model.blocks, *pieces), (op_type, R)


@pytest.mark.parametrize("op_type", ["DeepEpDispatch", "DeepEpCombine"])
@every_soc
def test_limits_of_the_peer_fit(op_type: str, soc: Soc) -> None:
    """DeepEP-Ascend's largest sizes: 131072 tokens, H 8192, top-16 of 1024 experts, over 384 ranks (here 512)."""
    s = Sizes(T=131072, H=8192, K=16, L=2, R=512, N=2**21, S=1, M=1)
    assert launch(op_type, s, "bfloat16", soc).tiling.tiles == 1


def fits(op_type: str, s: Sizes, rows: str, soc: Soc) -> bool:
    try:
        launch(op_type, s, rows, soc)
    except Refused:
        return False
    return True


@given(
    E=st.integers(1, 40000),
    K=st.integers(1, 40000),
    H=st.integers(1, 9000),
    soc=st.sampled_from(list(SOCS.values())),
    op_type=st.sampled_from(["DeepEpGetDispatchLayout", "DeepEpDispatch", "DeepEpCombine"]),
    data=st.data(),
)
def test_what_fits_also_fits_with_less(E: int, K: int, H: int, soc: Soc, op_type: str, data: st.DataObject) -> None:
    s = Sizes(T=7, H=H, K=K, L=E, R=1, N=9, S=1, M=7)
    less = dataclasses.replace(
        s, L=data.draw(st.integers(1, E)), K=data.draw(st.integers(1, K)), H=data.draw(st.integers(1, H))
    )
    more = soc._replace(unified_buffer_bytes=soc.unified_buffer_bytes + data.draw(st.integers(0, 65536)))
    if fits(op_type, s, "float16", soc):
        assert fits(op_type, less, "float16", more)


def test_more_experts_than_fit(capfd: pytest.CaptureFixture[str]) -> None:
    """A2: six tables of int32 [E] and [R] have to fit the unified buffer, with eight tiles and a token at least."""
    soc = SOCS["ascend910b"]
    per_token = 32 + 4 * 32 + 32 + 32 + 64 + 3 * 64
    free = soc.unified_buffer_bytes - 32 * (2 + 48) - 64 - 2 * 32 - 8 * 512 - per_token
    most = free // 6 // 32 * 32 // 8  # with one rank, a table has 8 bytes per expert
    s = Sizes(T=7, H=4096, K=2, L=most, R=1, N=9, S=1, M=7)
    assert launch("DeepEpCombine", s, "bfloat16", soc).tiling.tile_bytes >= 512
    with pytest.raises(Refused):
        launch("DeepEpCombine", dataclasses.replace(s, L=most + 4), "bfloat16", soc)
    missing = 6 * 8 * (most + 4) - free
    assert capfd.readouterr().err == (
        f"DeepEpCombine: num_experts = {most + 4} with 2 ids per token needs {missing} bytes more than the unified "
        f"buffer has: {soc.unified_buffer_bytes}\n"
    )


def test_layout_of_the_tiling() -> None:
    """The device reads it at these offsets: 64-bit fields without holes."""
    assert ctypes.sizeof(Tiling) == 8 * (14 + 1 + 2 + 7 + 6 + 5)
    assert Tiling.row_bytes.offset == 8 * 17
