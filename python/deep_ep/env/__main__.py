"""python -m deep_ep.env: the environment variables in force, and what they mean on this machine.

Exits with 1 if a value is wrong, and names it.
"""

import sys
import textwrap

import torch

from ..npu.platform import platform, soc_name
from ..npu.windows import load_kernels
from . import NOT_READ, VARIABLES, errors, given, value


def main() -> int:
    here = platform()
    print(f"torch {torch.__version__}, {_machine()}\n")
    for name, variable in VARIABLES.items():
        text = given(name)
        try:
            in_force = value(name) or "not set"
        except ValueError:
            in_force = f"{text}, which is wrong"
        print(f"{name} = {in_force} ({'environment' if text else 'default'})")
        acts = not variable.platforms or (here or "CPU") in variable.platforms
        _explain(variable.effect if acts else f"No effect on this machine. {variable.elsewhere}")
    for name, instead in NOT_READ.items():
        if text := given(name):
            print(f"{name} = {text} (environment)")
            _explain(f"Not read: {instead}.")
    wrong = errors(here)
    for error in wrong:
        print(f"error: {error}", file=sys.stderr)
    return 1 if wrong else 0


def _machine() -> str:
    name = soc_name()
    if name is None:
        return "no NPU: everything runs on the CPU"
    try:
        kernels = load_kernels() or "there are none: only the strategies alltoall and ops work on the NPU"
    except RuntimeError as error:
        kernels = str(error)
    return f"NPU {name} ({platform() or 'not a platform of this library'}), kernels: {kernels}"


def _explain(text: str) -> None:
    print(textwrap.fill(text, 110, initial_indent="    ", subsequent_indent="    "))


if __name__ == "__main__":
    sys.exit(main())
