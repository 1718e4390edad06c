"""What CANN makes of a definition and of a kernel, as operator_packages.py has it, against packages that CANN has made.

The wheels come from the package index that pip is set up with; without one these tests fail.
"""

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
from operator_packages import (
    CUBE_AND_VECTORS,
    VECTORS,
    VECTORS_TOGETHER,
    Operator,
    columns_of,
    parameter_bytes,
    params_of,
    references,
    scheduling_of,
    snake_case,
    support_of,
    task_of,
)

pytestmark = pytest.mark.slow


def operators() -> list[Operator]:
    return [operator for package in references() for operator in package.operators]


def test_what_there_is() -> None:
    assert {package.soc for package in references()} == {"ascend910b", "ascend910_93", "ascend950"}
    assert len(references()) > 50 and len(operators()) > 80


def test_names() -> None:
    for operator in operators():
        for key in ("opFile", "opInterface"):
            assert operator.info[key]["value"] == snake_case(operator.type)


def described(support: dict[str, Any], expected: dict[str, Any]) -> dict[str, Any]:
    """Of supportInfo, what support_of() says something of; an attribute's default may be anything."""
    attrs = support.get("attrs", [])
    if len(attrs) == len(expected["attrs"]):
        attrs = [{key: attr[key] for key in named} for attr, named in zip(attrs, expected["attrs"], strict=True)]
    return {key: support.get(key, []) for key in expected} | {"attrs": attrs}


def test_a_kernel_per_column() -> None:
    """The columns of a definition are all different. Each has its kernel, which is found by what support_of() says."""
    compared = 0
    for operator in operators():
        columns = columns_of(operator.info)
        assert len(set(columns)) == len(columns)
        params = params_of(operator.info, "input") + params_of(operator.info, "output")
        if any(param["paramType"] == "dynamic" or set(param["format"].split(",")) != {"ND"} for param in params):
            continue
        expected = [support_of(operator.type, operator.info, column) for column in range(len(columns))]
        for kernel in operator.kernels:
            support = kernel["supportInfo"]
            assert any(described(support, column) == column for column in expected), kernel["filePath"]
            compared += 1
        if len(operator.kernels) != len(columns):  # only where a definition says which columns share a kernel
            assert len(operator.kernels) < len(columns) and operator.type in {
                "CausalConv1d",
                "DequantSwigluQuant",
                "MoeGatingTopKHash",
            }
    assert compared > 600


def test_task_types() -> None:
    """What a kernel says of its cores is what its description has, for each SoC."""
    seen = set()
    for package in references():
        for operator in package.operators:
            task = task_of(operator.source)
            if task is None:
                continue
            seen.add((task, package.soc))
            for kernel in operator.kernels:
                expected = scheduling_of(task, kernel["kernelList"])
                assert {key: kernel.get(key) for key in expected} == expected, kernel["filePath"]
    assert seen >= {
        *((VECTORS, soc) for soc in ("ascend910b", "ascend910_93", "ascend950")),
        *((VECTORS_TOGETHER, soc) for soc in ("ascend910b", "ascend950")),
        (CUBE_AND_VECTORS, "ascend910b"),
    }


def test_cores_that_meet_are_scheduled_together() -> None:
    """No kernel that calls SyncAll is one whose cores start as they please."""
    met = [kernel for operator in operators() if "SyncAll(" in operator.source for kernel in operator.kernels]
    assert len(met) > 50
    assert {(kernel["coreType"], kernel["intercoreSync"]) for kernel in met} == {("MIX", 1)}


def test_arguments() -> None:
    """A kernel has one argument per parameter, and the workspace; the tiling is handed over as it is."""
    for operator in operators():
        number = len(params_of(operator.info, "input") + params_of(operator.info, "output"))
        for kernel in operator.kernels:
            assert kernel["parameters"] == [None] * (number + 1)
            assert kernel["workspace"] == {"num": 1, "size": [-1], "type": [0]}


def test_bytes_of_tilings(tmp_path: Path) -> None:
    """Of kernels whose tiling is a structure of numbers: how many bytes CANN takes for it."""
    compared = 0
    for operator in operators():
        for name in re.findall(r"REGISTER_TILING_DEFAULT\((?:\w+::)*(\w+)\)", operator.source):
            text = re.search(rf"struct {name}\s*\{{[^{{}}]*\}};", operator.source)
            if text is None or re.search(r"^\s*(?!u?int(?:32|64)_t|struct)\w+ \w+;", text[0], re.MULTILINE):
                continue
            source = tmp_path / "size.cpp"
            main = f'int main() {{ std::printf("%zu", sizeof({name})); }}'
            source.write_text(f"#include <cstdint>\n#include <cstdio>\n{text[0]}\n{main}\n")
            subprocess.run(["g++", str(source), "-o", str(tmp_path / "size")], check=True)
            size = int(subprocess.run([tmp_path / "size"], check=True, capture_output=True, text=True).stdout)
            assert {kernel["opParaSize"] for kernel in operator.kernels} == {parameter_bytes(size)}, name
            compared += 1
    assert compared >= 3
