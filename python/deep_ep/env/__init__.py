"""The environment variables of deep_ep: one table of what they are, and their values.

`deep_ep.init` and Buffer read them when they are called; ops and compiled code never do, since Dynamo has no guards for
them. Calls of a Buffer outside of graphs look again for the two that quantise, which SGLang changes. An argument that
says the same counts instead. An empty value is no value. `python -m deep_ep.env` prints the table as it is in force.
"""

import functools
import os
import sys
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ..ep_strategy import MODES

_SWITCH = ("0", "1")
_POSITIVE = range(1, sys.maxsize)

ROWS = ("expert", "rank")
"""The row contracts, as DEEP_EP_ROWS and Buffer's keyword `rows` name them."""

_MAX_TOKENS_IN_ROUNDS = 131072

TRUE = ("1", "true", "yes", "y")
"""Values of SGLANG_DEEPEP_BF16_DISPATCH that switch it on: those that SGLang knows."""


class Variable(NamedTuple):
    """A line of the table."""

    name: str
    default: str
    """"" is none: the variable does nothing then."""
    allowed: tuple[str, ...] | range | None
    """The values, in any case; or whole numbers; or None for any text."""
    effect: str
    platforms: tuple[str, ...] = ()
    """Where the effect is: of CPU, A2, A3 and A5; everywhere if empty."""
    elsewhere: str = ""
    """What is true on other platforms."""

    @property
    def values(self) -> str:
        """What is allowed, in words."""
        if isinstance(self.allowed, range):
            most = "" if self.allowed.stop == sys.maxsize else f", at most {self.allowed[-1]}"
            return f"a whole number of at least {self.allowed[0]}{most}"
        if self.allowed is None:
            return "any text"
        return f"one of {', '.join(self.allowed)}"


VARIABLES = {
    variable.name: variable
    for variable in (
        Variable(
            "DEEP_USE_MODE",
            "default",
            tuple(MODES),
            "The strategy: default is this library's kernels, alltoall is torch.distributed, ops is torch_npu's "
            "operators for low latency and default otherwise.",
        ),
        Variable(
            "DEEP_EP_ROWS",
            "expert",
            ROWS,
            "What a row of a Buffer is: one per (token, expert), as in DeepEP-Ascend, or one per (token, rank), as in "
            "DeepEP.",
        ),
        Variable(
            "DEEP_NORMAL_MODE_USE_INT8_QUANT",
            "0",
            _SWITCH,
            "1: Buffer.dispatch without quant_mode and without a handle sends int8 rows with scales. Calls outside of "
            "graphs go by what it is then, if it is set.",
        ),
        Variable(
            "SGLANG_DEEPEP_BF16_DISPATCH",
            "0",
            ("0", "1", "false", "true", "no", "yes", "n", "y"),
            "1: Buffer.low_latency_dispatch without quant_mode sends rows as they are, whatever use_fp8 and use_mxfp4 "
            "say. Calls outside of graphs go by what it is then, if it is set.",
        ),
        Variable(
            "MOE_EXPERT_TOKEN_NUMS_TYPE",
            "1",
            _SWITCH,
            'Under rows="expert", what Buffer.dispatch lists per local expert: 1 the rows, 0 running sums of them. Low '
            'latency and rows="rank" have counts in either case.',
        ),
        Variable(
            "DEEPEP_NORMAL_LONG_SEQ_ROUND",
            "1",
            range(1, 257),
            'Under rows="expert", num_tokens_per_expert of Buffer.get_dispatch_layout and dispatch is int32 [rounds * '
            "E], for so many rounds of DEEPEP_NORMAL_LONG_SEQ_PER_ROUND_TOKENS tokens, which is all that T may be if "
            "there is more than one. What travels does not depend on it. Both are set, or none.",
        ),
        Variable(
            "DEEPEP_NORMAL_LONG_SEQ_PER_ROUND_TOKENS",
            "8192",
            range(32, 8193),
            "See DEEPEP_NORMAL_LONG_SEQ_ROUND. The product of both must be at most 131072.",
        ),
        Variable(
            "DEEPEP_NORMAL_COMBINE_ENABLE_LONG_SEQ",
            "0",
            _SWITCH,
            "No effect: what is larger than the windows goes in rounds by itself, in combine as in dispatch.",
        ),
        Variable(
            "MOE_ENABLE_TOPK_NEG_ONE",
            "0",
            _SWITCH,
            "No effect: an id of -1 is no expert, with either value.",
        ),
        Variable(
            "MOE_SHARED_EXPERT_RANK_NUM",
            "0",
            range(sys.maxsize),
            'In low latency of a Buffer with the strategy ops and rows="expert", so many ranks, the first ones, have a '
            "shared expert and no other: E experts are spread over the rest, and every token goes to one of the first "
            "as well. In other Buffers it must be 0: a shared expert is a module on every rank, or "
            "shared_weights of fused_deep_moe.",
        ),
        Variable(
            "DEEPEP_HCCL_BUFFSIZE",
            "",
            _POSITIVE,
            "What HCCL_BUFFSIZE is to this library, if it is set; HCCL reads the other.",
        ),
        Variable(
            "HCCL_BUFFSIZE",
            "",
            _POSITIVE,
            "Most MiB of each rank's window where no argument (num_bytes, num_nvl_bytes, num_rdma_bytes) says it. "
            "Messages that are larger go in rounds. If not set: on a CPU windows grow to a rank's share in half of the "
            "host's memory, on NPUs they have 256 MiB. HCCL reads it, too, with a default of 200, for all "
            "communicators but those of the windows.",
        ),
        Variable(
            "HCCL_INTRA_PCIE_ENABLE",
            "",
            _SWITCH,
            "1, with HCCL_INTRA_ROCE_ENABLE=0: the strategy ops sends in two steps, within servers and between them: "
            "comm_alg is hierarchy where it is not given. 1 in both is refused: HCCL takes one link.",
            ("A2",),
            "HCCL reads it; comm_alg is as given. On a CPU, 1 with HCCL_INTRA_ROCE_ENABLE=0 counts servers of 8 ranks, "
            "as on A2: handles have 9 tensors where there are several.",
        ),
        Variable(
            "HCCL_INTRA_ROCE_ENABLE",
            "",
            _SWITCH,
            "0, with HCCL_INTRA_PCIE_ENABLE=1: see there.",
            ("A2",),
            "See there.",
        ),
        Variable(
            "MOE_ENABLE_CCU",
            "0",
            _SWITCH,
            "1: comm_alg of the strategy ops is ccu where it is not given.",
            ("A3", "A5"),
            "comm_alg is as given.",
        ),
        Variable(
            "HCCL_OP_EXPANSION_MODE",
            "",
            None,
            "Must not be set: any value is refused for groups with an NPU.",
            ("A2",),
            "HCCL reads it for its own collectives, those of the strategy alltoall among them; kernels of this library "
            "do not.",
        ),
        Variable(
            "DEBUG_MODE",
            "OFF",
            None,
            "ON: every call of a Buffer's methods outside of compiled code is logged at DEBUG by the logger deep_ep: "
            "shapes, dtypes and numbers, no values of tensors. Other programs have a variable of this name: with any "
            "other value it does nothing here.",
        ),
        Variable(
            "DEEP_EP_KERNELS",
            "",
            None,
            "A library of kernels for NPUs to load instead of the one in the package.",
            ("A2", "A3", "A5"),
            "Nothing is loaded from it.",
        ),
        Variable(
            "DEEP_EP_KERNEL_TIMEOUT",
            "480",
            range(1, 1_000_001),
            "Seconds after which a launch of a kernel ends although a peer has not come, and fails: read when windows "
            "on NPUs are made. A shorter timeout of the group or of deep_ep.init counts instead, and so do nine tenths "
            "of the device's own limit for operators, 547 s unless torch_npu.npu.set_op_timeout_ms says otherwise.",
            ("A2", "A3", "A5"),
            "Ops on CPU tensors wait for as long as the timeout of the group or of deep_ep.init says.",
        ),
    )
}
"""Every variable that this library reads for its users, by name."""

WITHOUT_EFFECT = ("DEEPEP_NORMAL_COMBINE_ENABLE_LONG_SEQ", "MOE_ENABLE_TOPK_NEG_ONE")
"""Those that are checked only."""

NOT_READ = {
    "DEEP_NORMAL_MODE": "DEEP_USE_MODE chooses the strategy",
    "DEEP_LOW_LATENCY_MODE": "DEEP_USE_MODE or Buffer(low_latency_strategy=...) chooses the strategy",
}
"""Variables that other releases of DeepEP-Ascend read, and what there is here instead."""


def given(name: str) -> str | None:
    """What the environment says, unchecked; None if it is not set or empty."""
    return os.environ.get(name) or None


def value(name: str) -> str:
    """What is in force: the default, or what the environment says, spelled as in the table.

    ValueError: it is not allowed.
    """
    variable, text = VARIABLES[name], given(name)
    if text is None:
        return variable.default
    if isinstance(variable.allowed, range):
        if text.isdecimal() and int(text) in variable.allowed:
            return text
    else:
        for choice in variable.allowed or (text,):
            if choice.lower() == text.lower():
                return choice
    raise ValueError(f"the environment variable {name} must be {variable.values}; got {text!r}")


def latest(name: str, otherwise: str) -> str:
    """What is in force now, outside of graphs, if the environment says something; or what was when a Buffer was made.

    SGLang changes these variables from call to call, for draft models.
    """
    return otherwise if torch.compiler.is_compiling() or given(name) is None else value(name)


def window_bytes() -> int | None:
    """DEEPEP_HCCL_BUFFSIZE or HCCL_BUFFSIZE in bytes, if one of them is set."""
    sizes = [value("DEEPEP_HCCL_BUFFSIZE"), value("HCCL_BUFFSIZE")]
    return int(sizes[0] or sizes[1] or 0) << 20 or None


class Rounds(NamedTuple):
    """In how many rounds tokens are counted, and how many tokens a round has at most."""

    number: int
    tokens: int

    def num_experts(self, num_tokens_per_expert: Tensor) -> int:
        """E, of the counts of all rounds. ValueError: they have another shape than [rounds·E]."""
        n = num_tokens_per_expert.numel()
        if num_tokens_per_expert.dim() != 1 or n % self.number:
            raise ValueError(
                f"num_tokens_per_expert must have the shape [rounds·E], with {self.number} rounds (of "
                f"DEEPEP_NORMAL_LONG_SEQ_ROUND), got {list(num_tokens_per_expert.shape)}"
            )
        return n // self.number


def rounds() -> Rounds:
    """What DEEPEP_NORMAL_LONG_SEQ_* say. ValueError: one of the two is missing, or their product is too large."""
    names = "DEEPEP_NORMAL_LONG_SEQ_ROUND", "DEEPEP_NORMAL_LONG_SEQ_PER_ROUND_TOKENS"
    found = Rounds(*(int(value(name)) for name in names))
    texts = [given(name) for name in names]
    if None in texts and texts != [None, None]:
        raise ValueError(f"the environment variables {' and '.join(names)} must be set together; got {texts}")
    if found.number * found.tokens > _MAX_TOKENS_IN_ROUNDS:
        raise ValueError(
            f"the environment variables {' times '.join(names)} must be at most {_MAX_TOKENS_IN_ROUNDS}; got "
            f"{found.number} times {found.tokens}"
        )
    return found


def comm_alg(platform: str | None) -> str:
    """What HCCL's variables and MOE_ENABLE_CCU mean for comm_alg on A2, A3, A5 or, if None, where there is no NPU.

    ValueError: they contradict each other or may not be set.
    """
    links = value("HCCL_INTRA_PCIE_ENABLE"), value("HCCL_INTRA_ROCE_ENABLE")
    if links == ("1", "1"):
        raise ValueError(
            "the environment variables HCCL_INTRA_PCIE_ENABLE=1 and HCCL_INTRA_ROCE_ENABLE=1 contradict each other: "
            "HCCL takes one link within a server; set one of them to 0"
        )
    ccu = value("MOE_ENABLE_CCU") == "1"
    if platform in ("A3", "A5"):
        return "ccu" if ccu else ""
    if platform != "A2":
        return ""
    if mode := given("HCCL_OP_EXPANSION_MODE"):
        raise ValueError(f"the environment variable HCCL_OP_EXPANSION_MODE must not be set on A2; got {mode!r}")
    return "hierarchy" if links == ("1", "0") else ""


def errors(platform: str | None) -> list[str]:
    """Everything that is wrong with the environment on that platform."""
    found = []
    checks: list[Callable[[], object]] = [functools.partial(value, name) for name in VARIABLES]
    checks += [rounds, functools.partial(comm_alg, platform)]
    for check in checks:
        try:
            check()
        except ValueError as error:
            if str(error) not in found:
                found.append(str(error))
    return found
