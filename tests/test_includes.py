"""Who includes whom: arrows run one way, from a file to those of its own folder or of one below it."""

import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

FLOORS = (
    "src",
    "src/device",
    "src/shm",
    "ops",
    "ops/host_shim",
    "ops/twin",
    "ops/twin/include",
    "ops/common",
    "ops/*",
    "ops/aclnn",
    "ops/twin/kernels",
    "torch_library",
    "torch_library/cpu",
    "torch_library/npu",
    "benchmarks",
    "tests",
)
"""Folders with what is in them, from the lowest to the highest one."""

SEARCHED = (
    "",
    "src",
    "src/device",
    "ops/host_shim",
    "ops/twin",
    "ops/twin/include",
    "ops/common/op_host",
    "ops/common/op_kernel",
    "torch_library",
    "tests/cann",
)
"""Where compilers look, after the folder of the file itself."""

FILES = [
    path
    for folder in ("src", "ops", "torch_library", "benchmarks", "tests")
    for path in sorted((ROOT / folder).rglob("*"))
    if path.suffix in (".cpp", ".h")
]


def floor(name: str) -> int:
    """Of the file with this name below ROOT."""
    for folder in Path(name).parents:
        if str(folder) in FLOORS:
            return FLOORS.index(str(folder))
        if folder.parent == Path("ops"):
            return FLOORS.index("ops/*")
    raise AssertionError(f"{name} is in no folder that has a floor")


def included(path: Path) -> Iterator[str]:
    """The files of ours that it includes, each of which is where just one of the folders has it."""
    for name in re.findall(r'^#include "(.*)"', path.read_text(), re.MULTILINE):
        beside = path.parent / name
        found = {beside} if beside.exists() else {ROOT / folder / name for folder in SEARCHED}
        existing = [os.path.normpath(one.relative_to(ROOT)) for one in found if one.exists()]
        assert len(existing) == 1, f"{path} includes {name}, which is {existing or 'nowhere'}"
        yield existing[0]


def includes() -> dict[str, list[str]]:
    return {str(path.relative_to(ROOT)): list(included(path)) for path in FILES}


def upwards(graph: dict[str, list[str]]) -> list[str]:
    return [f"{one} includes {other}" for one, others in graph.items() for other in others if floor(other) > floor(one)]


def circle(graph: dict[str, list[str]]) -> list[str] | None:
    """Files of which each includes the next one, and the last one the first, if there are such."""
    done: set[str] = set()

    def visit(name: str, way: list[str]) -> list[str] | None:
        if name in way:
            return [*way[way.index(name) :], name]
        if name in done:
            return None
        found = next(filter(None, (visit(other, [*way, name]) for other in graph.get(name, ()))), None)
        done.add(name)
        return found

    return next(filter(None, (visit(name, []) for name in graph)), None)


def test_no_arrow_points_upwards() -> None:
    graph = includes()
    assert sum(map(len, graph.values())) > 150
    assert upwards(graph) == []


def test_there_is_no_circle() -> None:
    assert circle(includes()) is None


@pytest.mark.parametrize(
    ("name", "folder"),
    [
        ("src/error.h", "src"),
        ("src/device/tiling.h", "src/device"),
        ("ops/kernels.h", "ops"),
        ("ops/combine/op_kernel/combine.cpp", "ops/*"),
        ("ops/common/op_kernel/rows.h", "ops/common"),
        ("ops/twin/include/ascendc/copy.h", "ops/twin/include"),
        ("ops/aclnn/windows.h", "ops/aclnn"),
        ("torch_library/npu/launch.h", "torch_library/npu"),
    ],
)
def test_floors(name: str, folder: str) -> None:
    assert FLOORS[floor(name)] == folder


def test_what_the_rules_find() -> None:
    """They see what they are about."""
    up = {"src/device/tiling.h": ["ops/kernels.h", "src/error.h"], "ops/kernels.h": ["src/device/window_map.h"]}
    assert upwards(up) == ["src/device/tiling.h includes ops/kernels.h"]
    assert circle({"a": ["b", "d"], "b": ["c"], "c": ["d", "b"], "d": []}) == ["b", "c", "b"]
    assert circle({"a": ["b", "c"], "b": ["c"], "c": []}) is None
