"""What CANN's compiler wants of the sources of kernels, and the twin's does not see: device code calls device code
alone, and that is what says `__aicore__`; it has no library."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
KERNELS = sorted((ROOT / "ops").glob("*/op_kernel/*"))
SHARED = [ROOT / "src" / "device" / name for name in ("op.h", "tiling.h", "window_map.h")]
"""Headers of the host that kernels include: DEEP_EP_DEVICE is `__aicore__` in kernels."""

every_source = pytest.mark.parametrize("path", KERNELS, ids=lambda path: path.name)


def code(path: Path) -> str:
    """Without comments, directives and what only the host sees."""
    text = re.sub(r"#ifdef DEEP_EP_HOST\n.*?#endif", "", path.read_text(), flags=re.DOTALL)
    text = re.sub(r"//.*", "", text)
    return re.sub(r"^\s*#(?:[^\n]*\\\n)*[^\n]*", "", text, flags=re.MULTILINE)


def classes(text: str) -> Iterator[tuple[str, str, str]]:
    """class or struct, its name, and its members."""
    for head in re.finditer(r"^(class|struct) (\w+)[^;{]*\{\n", text, re.MULTILINE):
        yield head[1], head[2], text[head.end() : text.index("\n};", head.end())]


def functions(text: str) -> Iterator[str]:
    """The heads of all that have a body."""
    for head in re.finditer(r"[^;{}]*\)(?: const)?(?: : [^;{}]*)?(?=\s*\{)", text):
        words = " ".join(head[0].split())
        is_whole = words.count("(") == words.count(")")  # not the end of a `for`
        if is_whole and not re.search(r"\b(if|for|while|switch)\b", words):
            yield words


@every_source
def test_constructors(path: Path) -> None:
    """An implicit constructor is none of the device's. Aggregates have none, and so nothing that needs one."""
    for kind, name, members in classes(code(path)):
        if kind == "class":
            assert re.search(rf"__aicore__ {name}\(", members), f"class {name} has no constructor that is __aicore__"
        else:
            needs = re.findall(r"^  (?!static)[^\n()]*(?:[={].*;|\bT(?:Pipe|Que\w*|Buf)\b.*;)", members, re.MULTILINE)
            assert not needs, f"struct {name} needs a constructor: {needs}"


@every_source
def test_functions(path: Path) -> None:
    found = list(functions(code(path)))
    assert found
    for head in found:
        assert "__aicore__" in head, head


@pytest.mark.parametrize("path", SHARED, ids=lambda path: path.name)
def test_functions_that_the_host_has_as_well(path: Path) -> None:
    for head in functions(code(path)):
        if "name_of(" not in head:  # of errors, on the host
            assert "DEEP_EP_DEVICE" in head, head


@every_source
def test_no_library(path: Path) -> None:
    """The twin's headers have the standard library, CANN's compiler for kernels has none of it."""
    text = path.read_text()
    known = {"kernel_operator.h", *(header.name for header in (*SHARED, *KERNELS))}
    assert set(re.findall(r"#include (.*)", text)) <= {f'"{name}"' for name in known}
    assert not re.search(r"\bstd::|\bnew\b|\bdelete\b|\bthrow\b|\btry\b|\bvirtual\b", code(path))


@pytest.mark.parametrize("path", SHARED, ids=lambda path: path.name)
def test_no_library_in_what_the_host_has_as_well(path: Path) -> None:
    text = re.sub(r"#define DEEP_EP_HOST\n.*?#endif", "", path.read_text(), flags=re.DOTALL)
    known = {"<cstdint>", *(f'"{header.name}"' for header in SHARED)}
    assert set(re.findall(r"#include (.*)", text)) <= known
    assert "std::" not in code(path)


def test_what_the_rules_find() -> None:
    """They see what they are about."""
    text = "class A {\n  int x = 0;\n\n  void f() {\n    if (x) g();\n  }\n  A(int y) : x(y) {}\n};\n"
    assert [(kind, name) for kind, name, _ in classes(text)] == [("class", "A")]
    assert list(functions(text)) == ["void f()", "A(int y) : x(y)"]
