"""Finds what a torch-npu wheel leaves to CANN: symbols and libraries.

`python labels.py TORCH_NPU_DIR labels.inc` writes a line `label NAME` for every symbol (labels.S says what a label is)
and prints the names of the libraries, without lib and .so. It needs nm and readelf, which come with the compiler.

Functions that torch_npu looks up by name at run time get no label: it is made for versions of CANN that lack some, and
says which one it does not find.
"""

import ctypes
import re
import subprocess
import sys
from pathlib import Path


def lines_of(*command: str | Path) -> list[str]:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()


def undefined(library: Path) -> set[str]:
    """The symbols that `library` needs. It can do without weak ones; versioned ones are those of libc and libstdc++."""
    symbols = (line.split() for line in lines_of("nm", "-D", "--undefined-only", library))
    return {name for kind, name in symbols if kind == "U" and "@" not in name}


def defined(library: Path) -> set[str]:
    return {line.split()[-1].partition("@")[0] for line in lines_of("nm", "-D", "--defined-only", library)}


def needed(library: Path) -> set[str]:
    found = (re.search(r"\(NEEDED\).*\[(.*)\]", line) for line in lines_of("readelf", "-d", library))
    return {match[1] for match in found if match}


def main(torch_npu: Path, output: Path) -> None:
    wheel = sorted(torch_npu.rglob("*.so"))
    known = [*wheel, *(torch_npu.parent / "torch" / "lib").glob("*.so")]
    symbols = set().union(*map(undefined, wheel)) - set().union(*map(defined, known))
    python = ctypes.CDLL(None)  # the interpreter, and libc without a version
    output.write_text("".join(f"label {name}\n" for name in sorted(symbols) if not hasattr(python, name)))
    # Those of the system have a version in their names.
    libraries = set().union(*map(needed, wheel)) - {library.name for library in known}
    print(*sorted(match[1] for name in libraries if (match := re.fullmatch(r"lib(\w+)\.so", name))), sep=";")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
