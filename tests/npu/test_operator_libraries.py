"""Libraries of operator packages over the stand-in for CANN: it has what generated aclnn functions need, those of
packages that CANN has made and those of ours.

The packages come as wheels from the package index that pip is set up with; without one these tests fail.
"""

import ctypes
import os

import pytest
from cann import labels, stand_in
from op_definitions import definitions
from operator_packages import Package, functions_of, info_of, references

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not stand_in.in_use(), reason="the stand-in for CANN is not on LD_LIBRARY_PATH"),
]


def needed(package: Package) -> set[str]:
    return labels.undefined(package.path / "op_api" / "lib" / "libcust_opapi.so")


def generated() -> list[Package]:
    """Those whose aclnn functions are all generated."""
    return [package for package in references() if package.vendor != "custom_transformer"]


@pytest.fixture(scope="module")
def had() -> set[str]:
    return labels.defined(stand_in.BUILD / "lib" / "libascendcl.so")


def test_what_generated_functions_need() -> None:
    """It follows from the definition, to the last symbol."""
    for package in generated():
        expected = [functions_of(operator.info, contiguous=False) for operator in package.operators]
        assert needed(package) == set().union(*expected), package


def test_the_stand_in_has_what_ours_need(had: set[str]) -> None:
    for op_type, definition in definitions().items():
        contiguous = any(param["auto_contiguous"] for param in definition["inputs"])
        assert functions_of(info_of(op_type, definition, "ascend910b"), contiguous=contiguous) <= had


def test_the_stand_in_has_all_that_packages_need_of_libnnopbase(had: set[str]) -> None:
    for package in references():
        assert {name for name in needed(package) if "Nnopbase" in name} <= had, package


def test_libraries_of_cann_load() -> None:
    for package in generated():
        ctypes.CDLL(str(package.path / "op_api" / "lib" / "libcust_opapi.so"), os.RTLD_NOW | os.RTLD_LOCAL)


def test_a_call_says_what_is_missing() -> None:
    (package,) = (one for one in generated() if one.vendor == "segment_sum_csr" and one.soc == "ascend950")
    library = ctypes.CDLL(str(package.path / "op_api" / "lib" / "libcust_opapi.so"))
    stand_in.clear_log()
    tensor, results = ctypes.c_void_p(1), [ctypes.c_uint64(), ctypes.c_void_p()]
    status = library.aclnnSegmentSumCsrGetWorkspaceSize(
        tensor, tensor, ctypes.c_int64(), tensor, *map(ctypes.byref, results)
    )
    assert status != 0
    assert "NnopbaseCreateExecutorSpace" in [line.text for line in stand_in.log("missing")]
