"""What CANN's kernel build derives from an operator's definition, the twin derives as well: a kernel that relies on
anything else does not compile on the twin. In a copy of the sources, in which one thing is changed."""

import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from deep_ep.twin import native

pytestmark = [
    pytest.mark.skipif(
        native.torch_npu_dir() is None, reason="no torch-npu wheel, whose headers ops/ is compiled with"
    ),
    pytest.mark.slow,  # the definitions have to be built
]

ROOT = native.root()
OP = "dispatch_backward"
DEFINITION = f"ops/{OP}/op_host/{OP}.cpp"
KERNEL = f"ops/{OP}/op_kernel/{OP}.cpp"


class Sources(NamedTuple):
    tree: Path
    build: Path

    def compile(self, target: str) -> None:
        native.build_with_torch_npu(
            self.tree / "ops" / "twin" / "kernels",
            self.build,
            target,
            CMAKE_CXX_FLAGS_RELWITHDEBINFO="-O0",
        )

    def compile_kernel(self, column: int = 0) -> None:
        self.compile(f"CMakeFiles/kernel_{OP}.dir/{OP}_{column}.cpp.o")

    def replace(self, path: str, old: str, new: str) -> None:
        text = (ROOT / path).read_text()
        assert old in text, f"{path} has no {old!r}"
        (self.tree / path).write_text(text.replace(old, new))


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Sources:
    at = tmp_path_factory.mktemp("contract")
    for name in ("ops", "src", "torch_library"):
        shutil.copytree(ROOT / name, at / name)
    return Sources(at, at / "build")


@pytest.fixture
def sources(copy: Sources) -> Iterator[Sources]:
    yield copy
    for path in (DEFINITION, KERNEL):
        shutil.copy(ROOT / path, copy.tree / path)


class Change(NamedTuple):
    old: str
    new: str
    said: str
    path: str = KERNEL


CHANGES = {
    # Of a parameter's name, with and without the kernel's argument.
    "parameter": Change(
        '"grad_recv_x"',
        '"grad_rows"',
        f"argument 0 of deep_ep_{OP} is grad_recv_x, and grad_rows by the definition",
        DEFINITION,
    ),
    "argument": Change("GM_ADDR grad_recv_x", "GM_ADDR x", "argument 0 of .* is x, and grad_recv_x by the definition"),
    "order": Change("GM_ADDR topk_idx,", "GM_ADDR send_head,", "argument 3 of .* is send_head, and topk_idx by"),
    "type": Change(
        "DeepEpDispatchBackward", "DeepEpReverse", "no operator DeepEpDispatchBackward is defined", DEFINITION
    ),
    "entry": Change(f"deep_ep_{OP}(", "deep_ep_reverse(", f"there is no function deep_ep_{OP}"),
    # What a definition with a parameter x would give.
    "macro": Change("DTYPE_GRAD_RECV_X", "DTYPE_X", "DTYPE_X. was not declared"),
    "tiling": Change("GM_ADDR tiling_data)", "GM_ADDR tiling_data, GM_ADDR more)", "too few arguments to function"),
    # The wrapper has called it.
    "workspace": Change("windows, workspace,", "windows, GetUserWorkspace(workspace),", "GetUserWorkspace. was not"),
    # What is the host's.
    "function": Change("{nullptr, grad_recv_x", "(make_tiling({}, {}, nullptr), {nullptr", "make_tiling. was not"),
    "header": Change('#include "round_trip.h"', '#include "definition.h"', "definition.h: No such file"),
    "standard": Change(
        "{nullptr, grad_recv_x", "deep_ep::RoundTripTensors{.rows = nullptr, .x = grad_recv_x", "only available with"
    ),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_kernel_that_relies_on_something_else(sources: Sources, change: Change) -> None:
    sources.replace(change.path, change.old, change.new)
    with pytest.raises(RuntimeError, match=re.compile(change.said)):
        sources.compile_kernel()


@pytest.mark.parametrize("column, dtype, rows", [(0, "DT_FLOAT", "float"), (2, "DT_BF16", "bfloat16_t")])
def test_what_a_kernel_may_rely_on(sources: Sources, column: int, dtype: str, rows: str) -> None:
    """The macros of all parameters, in each column."""
    types = {
        **dict.fromkeys(("grad_recv_x", "grad_x"), (dtype, rows)),
        **dict.fromkeys(("grad_recv_topk_weights", "grad_topk_weights"), ("DT_FLOAT", "float")),
        **dict.fromkeys(("recv_src_idx", "send_head"), ("DT_INT32", "int32_t")),
        **dict.fromkeys(("topk_idx", "windows"), ("DT_INT64", "int64_t")),
    }
    text = (ROOT / KERNEL).read_text()
    for name, (number, type) in types.items():
        upper = name.upper()
        text += f"static_assert(ORIG_DTYPE_{upper} == {number} && FORMAT_{upper} == FORMAT_ND);\n"
        text += f"static_assert(std::is_same_v<DTYPE_{upper}, {type}>);\n"
        text += f"#if ORIG_DTYPE_{upper} != {number}\n#error of the preprocessor as well\n#endif\n"
    (sources.tree / KERNEL).write_text(text)
    sources.compile_kernel(column)
