"""What a Buffer and its strategies know of their group: DeepEP-Ascend's `buffer.runtime`."""

from collections.abc import Callable, Sequence
from typing import Any, TypeGuard

import torch
from torch import Tensor

from .. import env, profile, quantization
from ..collective import Ops
from ..ep_strategy import MODES, EPCommStrategy, LowLatencyStrategy, NormalStrategy, one_of
from ..groups import GroupInfo, platform_of, prepare
from ..process_groups import Group, process_group
from . import notify
from .expert_rows import ExpertRows
from .rank_rows import RankRows
from .rows import RowContract

_GRADIENTS_GET_LOST = torch.__version__ < "2.12"
"""In torch 2.11, what a compiled autograd.Function returns has no gradient if it was written to. So graphs write the
results of a call, at its wait."""

RANKS_OF_A2_SERVER = 8


class Runtime:
    """The group, and how its calls are to be made, as the environment says where no argument does.

    Args:
        group: as in Buffer.
        rows, straight_through, comm_alg: as in Buffer.
        num_bytes: of the windows, as in `deep_ep.init`.
    """

    def __init__(
        self,
        group: Group,
        rows: str | None = None,
        straight_through: bool = False,
        comm_alg: str | None = None,
        num_bytes: int | None = None,
    ) -> None:
        self.group = process_group(group)
        self.rank = self.group.rank()
        self.size = self.group.size()
        self.rows = env.value("DEEP_EP_ROWS") if rows is None else one_of("rows", rows, env.ROWS)
        self.running_counts = env.value("MOE_EXPERT_TOKEN_NUMS_TYPE") == "0"
        rounds = env.rounds()
        self._has_int8 = env.value("DEEP_NORMAL_MODE_USE_INT8_QUANT")
        self._has_bf16 = env.value("SGLANG_DEEPEP_BF16_DISPATCH")
        self._layout: tuple[Tensor, int, int] | None = None
        self.shared_ranks = int(env.value("MOE_SHARED_EXPERT_RANK_NUM"))
        if self.shared_ranks >= self.size:
            raise ValueError(
                f"the environment variable MOE_SHARED_EXPERT_RANK_NUM must be less than the {self.size} ranks of the "
                f"group; got {self.shared_ranks}"
            )
        self.straight_through = straight_through
        self.comm_alg = env.comm_alg(platform_of(self.group)) or None if comm_alg is None else comm_alg
        """None: that of DeepEP-Ascend's strategy ops, which is hierarchy."""
        self.num_bytes = num_bytes
        self.is_destroyed = False
        self._info: GroupInfo | None = None
        for name in env.WITHOUT_EFFECT:
            env.value(name)
        links = env.value("HCCL_INTRA_PCIE_ENABLE"), env.value("HCCL_INTRA_ROCE_ENABLE")
        has_servers = platform_of(self.group) == "A2" or (platform_of(self.group) is None and links == ("1", "0"))
        self._num_servers = max(1, self.size // RANKS_OF_A2_SERVER) if has_servers else 1
        self.contract = self._contract(rounds)
        self.rounds = self.contract.rounds

    def _contract(self, rounds: env.Rounds) -> RowContract:
        if self.rows == "rank":
            return RankRows(rounds, self.rank)
        return ExpertRows(rounds, self.running_counts, spans_servers=self._num_servers > 1)

    def prepare(
        self, normal: NormalStrategy | None, low_latency: LowLatencyStrategy | None, comm_alg: str | None = None
    ) -> GroupInfo:
        """The group with what these strategies communicate with; None: the one that there is, or the other's.

        Collective unless the group has been prepared with them here. RuntimeError: as `deep_ep.init`. ValueError:
        low latency has no ranks for shared experts.
        """
        takes_shared = low_latency is LowLatencyStrategy.OPS and self.contract.is_of_ascend
        if self.shared_ranks and low_latency is not None and not takes_shared:
            raise ValueError(
                "the environment variable MOE_SHARED_EXPERT_RANK_NUM must be 0 unless low latency has the strategy ops "
                f'under rows="expert"; got {self.shared_ranks} with {low_latency.value} under rows="{self.rows}"'
            )
        before = self._info
        if before is None:
            normal = normal or next(one for one, other in MODES.values() if other is low_latency)
            low_latency = low_latency or next(other for one, other in MODES.values() if one is normal)
        else:
            normal, low_latency = normal or before.normal, low_latency or before.low_latency
        if comm_alg is None:
            comm_alg = self.comm_alg
        if comm_alg is None:
            comm_alg = "hierarchy" if low_latency is LowLatencyStrategy.OPS else ""
        same = before is not None and (normal, low_latency) == (before.normal, before.low_latency)
        if before is not None and same and comm_alg in ("", before.comm_alg):
            return before
        info = prepare(self.group, self.num_bytes, normal, low_latency, None, comm_alg, chooses=False)
        if before is None:
            self._info = info
        return info

    @property
    def quant_mode(self) -> str:
        """That of `dispatch` where nothing else says it."""
        return "int8" if env.latest("DEEP_NORMAL_MODE_USE_INT8_QUANT", self._has_int8) == "1" else "none"

    @property
    def bf16_low_latency(self) -> bool:
        """Whether `low_latency_dispatch` sends rows as they are where quant_mode does not say it."""
        return env.latest("SGLANG_DEEPEP_BF16_DISPATCH", self._has_bf16) in env.TRUE

    def low_latency_mode(self, quant_mode: str | None, use_fp8: bool, use_ue8m0: bool, use_mxfp4: bool) -> str:
        """One of quantization.MODES: quant_mode, or what the flags of `low_latency_dispatch` mean."""
        as_they_are = self.bf16_low_latency or not (use_fp8 or use_mxfp4)
        if quant_mode is None:
            quantised = "mx_fp4_e2m1" if use_mxfp4 else self.contract.fp8_mode(use_ue8m0)
            quant_mode = "none" if as_they_are else quantised
        return quantization.check_mode(quant_mode)

    def check(self) -> None:
        """RuntimeError: after `Buffer.destroy`."""
        if self.is_destroyed:
            raise RuntimeError("deep_ep: this Buffer was destroyed; make another one")

    def keep_layout(self, topk_idx: Tensor, num_experts: int) -> None:
        """For get_notify_send_data; nothing in compiled code."""
        if not torch.compiler.is_compiling():
            kept = topk_idx.clone() if topk_idx.is_inference() else topk_idx
            self._layout = kept, 0 if kept.is_inference() else kept._version, num_experts

    def get_notify_send_data(self) -> Tensor:
        """As `Buffer.get_notify_send_data`."""
        self.check()
        if self._layout is None:
            raise RuntimeError(
                "deep_ep: get_notify_send_data: call get_dispatch_layout first, outside of compiled code"
            )
        topk_idx, version, num_experts = self._layout
        if not topk_idx.is_inference() and topk_idx._version != version:
            raise RuntimeError("deep_ep: get_notify_send_data: topk_idx has been written to since get_dispatch_layout")
        return notify.send_data(topk_idx, num_experts, self.size)

    def begin_profile(
        self, num_profile_skip_launches: int, num_profile_active_launches: int, profile_trace_dir: str | None = ""
    ) -> None:
        """As `Buffer.begin_profile`."""
        profile.begin(self.group, num_profile_skip_launches, num_profile_active_launches, profile_trace_dir)

    def end_profile(self) -> None:
        """As `Buffer.end_profile`."""
        profile.end(self.group)

    def strategy(self, argument: str, given: Any, get: Callable[[str], type[Any]], methods: tuple[str, ...]) -> Any:
        """The strategy that is given for `argument` of Buffer: an object, a class or a name.

        ValueError: it has not these methods, or is of another group or of other rows.
        """
        self.check()
        if isinstance(given, str):
            given = get(given)
        if isinstance(given, type):
            make: Any = given.of_buffer if issubclass(given, OfOps) else given
            given = make(runtime=self, group=self.group)
        for method in methods:
            if not callable(getattr(given, method, None)):
                raise ValueError(f"{argument} must be a strategy, or the name of one; got {given!r} without {method}")
        if getattr(given, "group", self.group) is not self.group:
            raise ValueError(
                f"{argument} must be of the group '{self.group.group_name}', got one of '{given.group.group_name}'"
            )
        if is_of_ops(given) and given.runtime.rows != self.rows:
            raise ValueError(f'{argument} must have rows="{self.rows}", got one with rows="{given.runtime.rows}"')
        return given

    def is_available(self) -> bool:
        """Whether calls may be made."""
        return not self.is_destroyed

    def get_num_rdma_ranks(self) -> int:
        """How many servers the group spans as DeepEP-Ascend counts: of 8 ranks each on A2, or on a CPU in the
        environment of A2 (HCCL_INTRA_PCIE_ENABLE=1, HCCL_INTRA_ROCE_ENABLE=0); 1 elsewhere.
        """
        return self._num_servers

    def get_rdma_rank(self) -> int:
        """The server of this rank, by the same count; its rank where there is one server, as in DeepEP-Ascend."""
        return self.rank if self._num_servers == 1 else self.rank // RANKS_OF_A2_SERVER


def is_of_ops(strategy: Any) -> TypeGuard["OfOps"]:
    """Whether the strategy is over the ops of this library."""
    return getattr(strategy, "_is_of_ops", False)  # isinstance takes longer, for classes with abstract methods


class OfOps(EPCommStrategy):
    """What the strategies of this library have in common: the ops' overload that they call. Making one is collective.

    Args:
        runtime: that of a Buffer; None for what the environment says.
        group: that of the runtime, of which it may be left out.

    Raises:
        ValueError: runtime is none, or of another group. RuntimeError: as `deep_ep.init`.
    """

    overload: NormalStrategy | LowLatencyStrategy
    _is_of_ops = True

    def __init__(self, runtime: Runtime | None = None, group: Group = None) -> None:
        if runtime is None:
            runtime = Runtime(group)
        elif not isinstance(runtime, Runtime):
            raise ValueError(f"runtime must be buffer.runtime or None, got {type(runtime).__name__}")
        elif group is not None and process_group(group) is not runtime.group:
            raise ValueError(
                f"group must be that of the runtime, '{runtime.group.group_name}'; "
                f"got '{process_group(group).group_name}'"
            )
        super().__init__(runtime.group)
        self.runtime = runtime
        self.contract = runtime.contract
        self._straight_through = runtime.straight_through
        self.info = self._prepare()

    def _prepare(self) -> GroupInfo:
        if isinstance(self.overload, NormalStrategy):
            return self.runtime.prepare(self.overload, None)
        return self.runtime.prepare(None, self.overload)

    @classmethod
    def of_buffer(cls, runtime: Runtime, group: Group) -> "OfOps":
        """That of a Buffer which was given the name of this class."""
        return cls(runtime=runtime, group=group)

    def get_name(self) -> str:
        return self.overload.value

    def _live(self) -> GroupInfo:
        self.runtime.check()
        return self.info

    def _overlaps(self, is_asked: bool) -> bool:
        """Whether a call goes on when it returns."""
        return is_asked and self.contract.goes_on and not (_GRADIENTS_GET_LOST and torch.compiler.is_compiling())


def ops_of_dispatch(given: dict[str, Any]) -> Sequence[str]:
    """Of `dispatch` of a strategy over ops, for `collective`."""
    return given["self"].contract.ops_of_dispatch(given)


def ops_of_combine(given: dict[str, Any]) -> Sequence[str]:
    """Of `combine` of a strategy over ops, for `collective`."""
    return given["self"].contract.ops_of_combine(given)


def of_strategy(attribute: str, ops: str | Ops) -> Ops:
    """The same of a call of a Buffer, whose attribute is a strategy that may be over ops."""

    def ops_of(given: dict[str, Any]) -> Sequence[str]:
        strategy = getattr(given["self"], attribute)
        if not is_of_ops(strategy):
            return ()
        return (ops,) if isinstance(ops, str) else ops(given | {"self": strategy})

    return ops_of
