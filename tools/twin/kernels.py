"""The AscendC kernels of ops/ on the twin, called directly: tensors of the host, no streams."""

import ctypes
import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypedDict

import torch
from torch import Tensor

from . import native
from .interface import DTYPES, TEXT, DeepEpCall, DeepEpTensor, P, kernels_in

POISON = {torch.int8: 77, torch.int32: -123456, torch.int64: -123456}
"""What outputs have before a launch; NaN where they can."""

A2, A5 = 2201, 3510  # A3 is as A2
ARCHS = (A2, A5)
VECTOR_CORES = {A2: (40, 48), A5: (56, 64, 72)}
"""Of a rank: SoCs of one generation differ, and each is asked."""


class Failed(Exception):
    """A function of the interface has said so; of a launch, that it has broken a rule."""


class Setup(NamedTuple):
    """How the twin runs launches. A seed is for the adversary; None: in order."""

    arch: int = A2
    cores: int = 3
    """Vector cores of the SoC. A launch with more blocks is refused."""
    seed: int | None = None
    unified_buffer: int = 0
    """Bytes; 0: as much as the architecture has. With less, rows go in more tiles and tokens in more chunks."""


class Moved(TypedDict):
    """Between global memory, windows included, and unified buffers."""

    bytes: int
    """Without what pads a block in the unified buffer."""
    transfers: int
    """DataCopy and DataCopyPad, each of which is one, however many blocks it has."""


class Link(TypedDict):
    """Between a rank and the window of another one."""

    peer: int
    read: Moved
    """By this rank, out of the peer's window."""
    written: Moved
    """By this rank, to the peer's window, with flags."""
    flags: Moved
    """Of what is written, that to where the peer's flags lie: a transfer of 64 bytes raises one flag."""


class Work(TypedDict):
    """Of a core; of a launch, the sum over its cores and the highest peak."""

    mte2: Moved
    """Into unified buffers, from anywhere."""
    mte3: Moved
    """Out of unified buffers, to anywhere."""
    unified_buffer_peak: int
    """Bytes that buffers of a core have taken at a time."""
    barriers: int
    """Calls of PipeBarrier."""
    syncs: int
    """Calls of SyncAll."""
    events: int
    """Calls of SetFlag, those in queues included."""


class Launch(TypedDict):
    """A launch on one rank, as the twin reports it: ops/twin/kernels/report.cpp."""

    op: str
    rank: int
    """0 where the op has no group."""
    arch: int
    completed: bool
    """False if it was ended because it, or one on another rank, had broken a rule."""
    links: list[Link]
    """By peer; none where the op has no group."""
    total: Work
    cores: list[Work]


@functools.cache
def build(ops: Path | None = None, name: str = "kernels") -> Path:
    """The library with the kernels that lie in `ops`, the checkout's without it, in a build folder of this name."""
    root = native.root()
    source, folder = root / "ops" / "twin" / "kernels", root / "build" / "twin" / name
    return native.build_with_torch_npu(source, folder, "deep_ep_twin_kernels", DEEP_EP_OPS=ops or root / "ops")


class Twin:
    """A library of kernels on the twin."""

    def __init__(self, path: Path) -> None:
        self._library = ctypes.CDLL(str(path))
        self._library.deep_ep_twin_take_violations.restype = TEXT
        self._library.deep_ep_twin_take_report.restype = TEXT
        self.kernels = kernels_in(self._library)

    def configure(self, setup: Setup) -> None:
        seed = -1 if setup.seed is None else setup.seed
        self._library.deep_ep_twin_configure(
            setup.arch, setup.cores, ctypes.c_int64(seed), ctypes.c_uint64(setup.unified_buffer)
        )

    def mutate(self, number: int) -> None:
        """Chooses a fault, in a library of mutants."""
        self._library.deep_ep_twin_mutant(number)

    def take_report(self) -> list[Launch]:
        """What launches have done since the last call, the newest 1000 of them at most, in their order."""
        return json.loads(self._library.deep_ep_twin_take_report())

    def take_traffic(self, cores: int = 0) -> tuple[list[int], list[tuple[int, int]]]:
        """Of that, bytes: read and written over links; and in all, by core."""
        launches = self.take_report()
        links = [link for launch in launches for link in launch["links"]]
        over_links = [sum(link["read"]["bytes"] for link in links), sum(link["written"]["bytes"] for link in links)]
        moved = [(0, 0)] * cores
        for launch in launches:
            for i, core in enumerate(launch["cores"][:cores]):
                moved[i] = moved[i][0] + core["mte2"]["bytes"], moved[i][1] + core["mte3"]["bytes"]
        return over_links, moved

    def take_violations(self) -> list[str]:
        return self._library.deep_ep_twin_take_violations().decode().splitlines()

    def launch(
        self, op: str, group: str, inputs: Sequence[Tensor], integers: Sequence[int], outputs: Sequence[Tensor]
    ) -> None:
        """One launch, to its end. `inputs` without the window table."""
        call = DeepEpCall(
            op.encode(),
            group.encode(),
            len(inputs),
            len(outputs),
            len(integers),
            _tensors(inputs),
            _tensors(outputs),
            (ctypes.c_int64 * len(integers))(*integers),
        )
        plan, size = P(), ctypes.c_uint64()
        self.checked(self.kernels.prepare, ctypes.byref(call), ctypes.byref(plan), ctypes.byref(size))
        workspace = torch.empty(size.value, dtype=torch.uint8)
        self.checked(self.kernels.launch, plan, workspace.data_ptr(), None)

    def checked(self, function: Any, *arguments: Any) -> None:
        error = ctypes.create_string_buffer(512)
        if function(*arguments, error):
            raise Failed(error.value.decode())


def _tensors(tensors: Sequence[Tensor]) -> Any:
    described = []
    for tensor in tensors:
        assert tensor.is_contiguous()
        described.append(
            DeepEpTensor(tensor.data_ptr(), DTYPES[tensor.dtype], tensor.dim(), (ctypes.c_int64 * 2)(*tensor.shape))
        )
    return (DeepEpTensor * len(described))(*described)


class Group:
    """The windows of a rank's group on the twin, and calls of the ops on it. Collective."""

    def __init__(
        self, twin: Twin, key: str, rank: int, size: int, num_bytes: int, timeout_ms: int, name: str | None = None
    ) -> None:
        """`key` is the same on all ranks. `name`: where a process has several of them, each needs one of its own."""
        self.twin, self.name, self.rank, self.size = twin, name or key, rank, size
        self.table = torch.empty(8 + size, dtype=torch.int64)
        twin.checked(
            twin.kernels.open_windows,
            *(self.name.encode(), key.encode(), rank, size, num_bytes, timeout_ms, self.table.data_ptr()),
        )

    def close(self) -> None:
        self.twin.kernels.close_windows(self.name.encode())

    def __enter__(self) -> "Group":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def status(self) -> list[int]:
        words = torch.empty(8, dtype=torch.int32)
        self.twin.checked(self.twin.kernels.read_status, self.table.data_ptr(), words.data_ptr())
        return words.tolist()

    def launch(self, op: str, inputs: Sequence[Tensor], integers: Sequence[int], outputs: Sequence[Tensor]) -> None:
        self.twin.launch(op, self.name, [*inputs, self.table], integers, outputs)

    def notify_dispatch(self, topk_idx: Tensor, num_experts: int) -> Tensor:
        num_rows = torch.full((1,), -7)
        self.launch("notify_dispatch", [topk_idx], [num_experts, self.size], [num_rows])
        return num_rows

    def low_latency_dispatch(
        self, x: Tensor, topk_idx: Tensor, num_max: int, num_experts: int, zero_unused: bool = False
    ) -> list[Tensor]:
        sizes = num_max, num_experts, zero_unused
        return self._low_latency_dispatch("low_latency_dispatch", (x.dtype,), x, topk_idx, *sizes)

    def low_latency_dispatch_int8(
        self, x: Tensor, topk_idx: Tensor, num_max: int, num_experts: int, zero_unused: bool = False
    ) -> list[Tensor]:
        rows, sizes = (torch.int8, torch.float32), (num_max, num_experts, zero_unused)
        return self._low_latency_dispatch("low_latency_dispatch_int8", rows, x, topk_idx, *sizes)

    def _low_latency_dispatch(
        self,
        op: str,
        rows: Sequence[torch.dtype],
        x: Tensor,
        topk_idx: Tensor,
        num_max: int,
        num_experts: int,
        zero_unused: bool,
    ) -> list[Tensor]:
        """`rows`: dtypes of data, and of scales where there are some."""
        L = num_experts // self.size
        N = self.size * num_max * min(topk_idx.shape[1], L)
        outputs = _poisoned_rows(N, x.shape[1], rows)
        outputs += [
            _poisoned(L, dtype=torch.int64),
            _poisoned(N, 3, dtype=torch.int32),
            _poisoned(num_experts, dtype=torch.int32),
            _poisoned(*topk_idx.shape, dtype=torch.int32),
        ]
        self.launch(op, [x, topk_idx], [num_experts, self.size, num_max, zero_unused], outputs)
        return outputs

    def low_latency_combine(
        self, y: Tensor, topk_idx: Tensor, topk_weights: Tensor, handle: Sequence[Tensor], num_experts: int
    ) -> Tensor:
        """`handle`: recv_src_idx, layout_range, send_head."""
        return self.combine(y, topk_idx, topk_weights, handle, num_experts, "low_latency_combine")

    def combine(
        self,
        y: Tensor,
        topk_idx: Tensor,
        topk_weights: Tensor,
        handle: Sequence[Tensor],
        num_experts: int,
        op: str = "combine",
    ) -> Tensor:
        """`handle`: recv_src_idx, send_head."""
        combined = _poisoned(topk_idx.shape[0], y.shape[1], dtype=y.dtype)
        self.launch(op, [y, topk_idx, topk_weights, *handle], [num_experts, self.size], [combined])
        return combined

    def dispatch(
        self,
        x: Tensor,
        topk_idx: Tensor,
        topk_weights: Tensor,
        num_rows: int,
        num_experts: int,
        shapes: Tensor | None = None,
    ) -> list[Tensor]:
        """`num_rows`: N. With `shapes`, int64 [10, 9], exact mode of graphs, which fills it."""
        return self._dispatch("dispatch", (x.dtype,), x, topk_idx, topk_weights, num_rows, num_experts, shapes)

    def dispatch_int8(
        self,
        x: Tensor,
        topk_idx: Tensor,
        topk_weights: Tensor,
        num_rows: int,
        num_experts: int,
        shapes: Tensor | None = None,
    ) -> list[Tensor]:
        """The same; `shapes` is int64 [11, 9]."""
        rows = torch.int8, torch.float32
        return self._dispatch("dispatch_int8", rows, x, topk_idx, topk_weights, num_rows, num_experts, shapes)

    def _dispatch(
        self,
        op: str,
        rows: Sequence[torch.dtype],
        x: Tensor,
        topk_idx: Tensor,
        topk_weights: Tensor,
        num_rows: int,
        num_experts: int,
        shapes: Tensor | None,
    ) -> list[Tensor]:
        """`rows` as in `_low_latency_dispatch`."""
        (T, K), R, L, N = topk_idx.shape, self.size, num_experts // self.size, num_rows
        outputs = _poisoned_rows(N, x.shape[1], rows)
        outputs += [
            _poisoned(N, K, dtype=torch.int64),
            _poisoned(N, K, dtype=torch.float32),
            _poisoned(L, dtype=torch.int64),
            _poisoned(dtype=torch.int64),
            _poisoned(R, R, dtype=torch.int32),
            _poisoned(R, L, dtype=torch.int32),
            _poisoned(L, R, dtype=torch.int32),
            _poisoned(N, 3, dtype=torch.int32),
            _poisoned(T, K, dtype=torch.int32),
        ]
        inputs = [x, topk_idx, topk_weights]
        if shapes is None:
            self.launch(op, inputs, [num_experts, R, N], outputs)
        else:
            self.launch(f"{op}_exact", inputs, [num_experts, R], [*outputs, shapes])
        return outputs

    def dispatch_backward(
        self, grad_x: Tensor, grad_weights: Tensor, topk_idx: Tensor, handle: Sequence[Tensor], num_experts: int
    ) -> list[Tensor]:
        """The gradients of recv_x and recv_topk_weights to those of x and topk_weights. `handle` as for combine."""
        src_idx, send_head = handle
        outputs = [
            _poisoned(topk_idx.shape[0], grad_x.shape[1], dtype=grad_x.dtype),
            _poisoned(*topk_idx.shape, dtype=torch.float32),
        ]
        inputs = [grad_x, grad_weights, src_idx, topk_idx, send_head]
        self.launch("dispatch_backward", inputs, [num_experts, self.size], outputs)
        return outputs

    def combine_backward(
        self,
        grad_out: Tensor,
        y: Tensor,
        topk_idx: Tensor,
        topk_weights: Tensor,
        handle: Sequence[Tensor],
        num_experts: int,
    ) -> list[Tensor]:
        """The gradient of combine's result to those of y and topk_weights. `handle` as for combine."""
        outputs = [_poisoned(*y.shape, dtype=y.dtype), _poisoned(*topk_idx.shape, dtype=torch.float32)]
        inputs = [grad_out, y, topk_idx, topk_weights, *handle]
        self.launch("combine_backward", inputs, [num_experts, self.size], outputs)
        return outputs


def _poisoned(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.full(shape, float("nan") if dtype.is_floating_point else POISON[dtype], dtype=dtype)


def _poisoned_rows(num_rows: int, hidden: int, dtypes: Sequence[torch.dtype]) -> list[Tensor]:
    """Data [N, H], and scales [N] where there is a dtype of some."""
    shapes = (num_rows, hidden), (num_rows,)
    return [_poisoned(*shape, dtype=dtype) for shape, dtype in zip(shapes, dtypes, strict=False)]


def get_dispatch_layout(twin: Twin, topk_idx: Tensor, num_experts: int, num_ranks: int, num_nodes: int) -> list[Tensor]:
    shapes = ((num_ranks,), (num_nodes,), (num_experts,), (topk_idx.shape[0], num_ranks))
    outputs = [_poisoned(*shape, dtype=torch.int32) for shape in shapes]
    twin.launch("get_dispatch_layout", "", [topk_idx], [num_experts, num_ranks, num_nodes], outputs)
    return outputs
