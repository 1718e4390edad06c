"""What CANN's kernel build derives from an operator's definition, the twin derives as well: a kernel that relies on
anything else does not compile on the twin. In a copy of the sources, in which one thing is changed."""

import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from tools.twin import kernels, native

pytestmark = [
    pytest.mark.torch_npu,
    pytest.mark.slow,  # the definitions have to be built
]

ROOT = native.root()
OP, LAYOUT = "dispatch_backward", "get_dispatch_layout"
DEFINITION = f"ops/{OP}/op_host/{OP}.cpp"
KERNEL = f"kernels/{OP}/op_kernel/{OP}.cpp"
LAYOUT_DEFINITION = f"ops/{LAYOUT}/op_host/{LAYOUT}.cpp"


class Sources(NamedTuple):
    tree: Path
    """ops, src and torch_library as they are; and in `kernels` and `layout`, one kernel each."""

    def build(self, target: str, ops: str) -> Path:
        return native.build_with_torch_npu(
            self.tree / "ops" / "twin" / "kernels",
            self.tree / "build",
            target,
            DEEP_EP_OPS=self.tree / ops,
            CMAKE_CXX_FLAGS_RELEASE="-O0",
        )

    def compile_kernel(self, column: int = 0) -> None:
        self.build(f"CMakeFiles/kernel_{OP}.dir/{OP}_{column}.cpp.o", "kernels")

    def replace(self, path: str, old: str, new: str) -> None:
        text = (self.tree / path).read_text()
        assert old in text, f"{path} has no {old!r}"
        (self.tree / path).write_text(text.replace(old, new))


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Sources:
    at = tmp_path_factory.mktemp("contract")
    for name in ("ops", "src", "torch_library"):
        shutil.copytree(ROOT / name, at / name)
    for folder, op in (("kernels", OP), ("layout", LAYOUT)):
        for name in (op, "common"):
            shutil.copytree(ROOT / "ops" / name / "op_kernel", at / folder / name / "op_kernel")
    return Sources(at)


@pytest.fixture
def sources(copy: Sources) -> Iterator[Sources]:
    texts = {path: (copy.tree / path).read_text() for path in (DEFINITION, KERNEL, LAYOUT_DEFINITION)}
    yield copy
    for path, text in texts.items():
        if (copy.tree / path).read_text() != text:
            (copy.tree / path).write_text(text)


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
    text = (sources.tree / KERNEL).read_text()
    for name, (number, type) in types.items():
        upper = name.upper()
        text += f"static_assert(ORIG_DTYPE_{upper} == {number} && FORMAT_{upper} == FORMAT_ND);\n"
        text += f"static_assert(std::is_same_v<DTYPE_{upper}, {type}>);\n"
        text += f"#if ORIG_DTYPE_{upper} != {number}\n#error of the preprocessor as well\n#endif\n"
    (sources.tree / KERNEL).write_text(text)
    sources.compile_kernel(column)


@pytest.mark.parametrize(
    "call, instead, said",
    [
        (
            "SetScheduleMode(mode)",
            "GetNodeType()",
            "core 1, begins .*: SetScheduleMode.1. is missing",
        ),
        ("SetBlockDim(blocks)", "SetBlockDim(blocks + 1)", "core 3, begins .*: there are 4 blocks, and 3 vector cores"),
    ],
)
def test_blocks_that_cannot_run_together(sources: Sources, tmp_path: Path, call: str, instead: str, said: str) -> None:
    """A tiling that leaves it out, or asks for one block too many."""
    include = '#include "definition.h"'
    shim = '#include "register/op_def_registry.h"'
    sources.replace(LAYOUT_DEFINITION, include, f"{shim}\n#define {call} {instead}\n{include}")
    library = sources.build("deep_ep_twin_kernels", "layout")
    # A process loads a path once.
    twin = kernels.Twin(Path(shutil.copy(library, tmp_path / "kernels.so")))
    twin.configure(kernels.Setup(cores=3))
    with pytest.raises(kernels.Failed, match=said):
        kernels.get_dispatch_layout(twin, torch.zeros(5, 2, dtype=torch.int64), 4, 2, 1)
