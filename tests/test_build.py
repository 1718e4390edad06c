"""The build for NPUs without CANN: what it says is missing, what it asks of CANN's CMake functions, and what
libdeep_ep_kernels.so makes of a call, over a fake CANN (tests/fake_cann) whose aclnn functions have the signatures that
CANN's generator gives the operator definitions."""

import ctypes
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from npu import op_definitions
from npu.op_definitions import ROOT

from deep_ep.twin import native
from deep_ep.twin.interface import TEXT, DeepEpCall, DeepEpKernels, DeepEpTensor, P, kernels_in

MACHINE = platform.machine()
FAKE = ROOT / "tests" / "fake_cann"
LIBRARIES = ("ascendcl", "nnopbase", "hccl")
RANK, SIZE, WINDOW_BYTES = 1, 4, 200 << 20
"""As tests/fake_cann/cann.cpp has them."""

needs_headers = pytest.mark.skipif(
    native.torch_npu_dir() is None, reason="no torch-npu wheel, whose headers npu/aclnn is compiled with"
)


def run(*command: str | Path, cwd: Path, cann: Path | None = None, **environment: str) -> subprocess.CompletedProcess:
    """The command in `cwd`, with ASCEND_HOME_PATH as `cann`; the text of its two outputs has no line breaks."""
    settings = {name: value for name, value in os.environ.items() if not name.startswith("ASCEND_")} | environment
    if cann is not None:
        settings["ASCEND_HOME_PATH"] = str(cann)
    result = subprocess.run([*map(str, command)], cwd=cwd, env=settings, capture_output=True, text=True)
    result.stdout, result.stderr = (" ".join(text.split()) for text in (result.stdout, result.stderr))
    return result


def copy_of_repository(to: Path, *, kernels: bool = False) -> Path:
    """What a build reads; without `kernels`, as if none had been written."""
    to.mkdir()
    for name in ("CMakeLists.txt", "Makefile", "build.sh", "pyproject.toml"):
        shutil.copy(ROOT / name, to)
    for name in ("cmake", "ops", "src", "torch_library"):
        shutil.copytree(ROOT / name, to / name)
    if not kernels:
        for kernel in to.glob("ops/*/op_kernel/*.cpp"):
            kernel.unlink()
    return to


def operators() -> set[str]:
    """The types that have kernels: what goes into the package."""
    return {op_type for op_type in op_definitions.definitions() if not op_type.startswith("DeepEpFused")}


def fake_cann(at: Path, version: str, without: Sequence[str] = ()) -> Path:
    """A toolkit of empty files."""
    files = [
        "include/acl/acl.h",
        "include/aclnn/acl_meta.h",
        *(f"include/hccl/{name}.h" for name in ("hccl", "hccl_res", "hccl_rank_graph")),
        *(f"lib64/lib{name}.so" for name in LIBRARIES),
        "tools/opbuild/op_build",
        "compiler/ccec_compiler/bin/bisheng",
        "compiler/tikcpp/ascendc_kernel_cmake/ASCConfig.cmake",
        f"{MACHINE}-linux/ascend_toolkit_install.info",
    ]
    assert set(without) <= set(files)
    for name in files:
        if name not in without:
            (at / name).parent.mkdir(parents=True, exist_ok=True)
            (at / name).touch()
    info = at / files[-1]
    if info.exists():
        info.write_text(f"package_name=Ascend-cann-toolkit\nversion={version}\narch={MACHINE}\n")
    return at


def op_name(op_type: str) -> str:
    """DeepEpLowLatencyDispatch: low_latency_dispatch."""
    return re.sub("(?!^)([A-Z])", r"_\1", op_type.removeprefix("DeepEp")).lower()


# What is missing


@pytest.mark.parametrize(
    "arguments, soc",
    [(("deepep",), "ascend910_93"), (("deepep2",), "ascend910b"), (("deepep", "Ascend950"), "ascend950")],
)
def test_build_script_stops_before_it_makes_anything(tmp_path: Path, arguments: Sequence[str], soc: str) -> None:
    tree = copy_of_repository(tmp_path / "tree")
    before = sorted(tree.rglob("*"))
    nowhere, part = tmp_path / "nowhere", "tools/opbuild/op_build"
    for cann, said in (
        (nowhere, f"CANN's toolkit is missing: looked for include/acl/acl.h in {nowhere} (ASCEND_HOME_PATH)"),
        (fake_cann(tmp_path / "cann", "9.1.0", without=[part]), f"is incomplete: the generator of operators: {part}."),
    ):
        result = run("bash", tree / "build.sh", "-a", *arguments, cwd=tmp_path, cann=cann)
        assert result.returncode == 1 and said in result.stderr, result.stderr
        assert result.stdout == "" and sorted(tree.rglob("*")) == before
    by_cmake = run("bash", tree / "cmake" / "find_cann.sh", soc, cwd=tmp_path, cann=nowhere)
    assert by_cmake.returncode == 1 and "CANN's toolkit is missing" in by_cmake.stderr


@pytest.mark.skipif(Path("/usr/local/Ascend").exists(), reason="this machine may have CANN")
def test_usual_places_are_named(tmp_path: Path) -> None:
    result = run("bash", ROOT / "build.sh", "-a", "deepep", cwd=tmp_path)
    assert result.returncode == 1
    assert (
        "in /usr/local/Ascend/ascend-toolkit/latest /usr/local/Ascend/latest /usr/local/Ascend/cann, and "
        "ASCEND_HOME_PATH is not set. Install CANN 8.5 or 9"
    ) in result.stderr


@pytest.mark.parametrize("arguments", [("-a", "deepep3"), ("-a", "deepep2", "Ascend950"), ("deepep",)])
def test_unknown_arguments(tmp_path: Path, arguments: Sequence[str]) -> None:
    result = run("bash", ROOT / "build.sh", *arguments, cwd=tmp_path)
    assert result.returncode == 2
    assert f"unknown arguments '{' '.join(arguments)}'; known: -a cpu | deepep (A3)" in result.stderr


class Refusal(NamedTuple):
    version: str
    said: str
    soc: str = "ascend910_93"
    without: Sequence[str] = ()


@pytest.mark.parametrize(
    "refusal",
    [
        Refusal("7.0.RC1", "is version 7.0, supported are 8.5 and 9."),
        Refusal("8.2.RC1", "is version 8.2, supported are 8.5 and 9."),
        Refusal("8.5.0", "is version 8.5.0, A5 (ascend950) needs version 9.", soc="ascend950"),
        Refusal("9.0.0", "DEEP_EP_SOC must be ascend910b (A2), ascend910_93 (A3) or ascend950 (A5), got 'x'", soc="x"),
        Refusal(
            "9.0.0",
            "CANN 9.0.0 at {cann} is incomplete: the kernel compiler: tools/bisheng_compiler/bin/bisheng or "
            "tools/ccec_compiler/bin/bisheng or compiler/ccec_compiler/bin/bisheng or "
            f"{MACHINE}-linux/ccec_compiler/bin/bisheng or bin/bisheng; the header of aclnn: "
            "include/aclnn/acl_meta.h; libhccl: lib64/libhccl.so; the headers of HCCL's channels: "
            "include/hccl/hccl_res.h; the CMake package ASC: compiler/tikcpp/ascendc_kernel_cmake/ASCConfig.cmake",
            soc="ascend950",
            without=(
                "compiler/ccec_compiler/bin/bisheng",
                "include/aclnn/acl_meta.h",
                "lib64/libhccl.so",
                "include/hccl/hccl_res.h",
                "compiler/tikcpp/ascendc_kernel_cmake/ASCConfig.cmake",
            ),
        ),
        Refusal(
            "8.5.0",
            f"is not one for {MACHINE}: {{cann}}/{MACHINE}-linux/ascend_toolkit_install.info does not exist.",
            without=(f"{MACHINE}-linux/ascend_toolkit_install.info",),
        ),
        Refusal(
            "8.5.1",
            "CANN 8.5.1 is at {cann}, but this version of deep_ep has no AscendC kernels yet: "
            "ops/combine/op_kernel/combine.cpp",
        ),
        Refusal("9.1.0", "ops/dispatch/op_kernel/dispatch_exact.cpp", soc="ascend950"),
    ],
)
def test_cmake_stops(tmp_path: Path, refusal: Refusal) -> None:
    tree = copy_of_repository(tmp_path / "tree")
    cann = fake_cann(tmp_path / "cann", refusal.version, refusal.without)
    result = configure(tree, tmp_path / "build", cann, refusal.soc)
    assert result.returncode != 0
    assert refusal.said.format(cann=cann) in result.stderr, result.stderr


def configure(tree: Path, build: Path, cann: Path, soc: str, **environment: str) -> subprocess.CompletedProcess:
    return run(
        *(native.tool("cmake"), "-S", tree, "-B", build, "-G", "Ninja"),
        *(f"-DCMAKE_MAKE_PROGRAM={native.tool('ninja')}", f"-DPython_EXECUTABLE={sys.executable}"),
        *("-DDEEP_EP_NPU=ON", f"-DDEEP_EP_SOC={soc}"),
        cwd=tree,
        cann=cann,
        **environment,
    )


# What is built, over a fake CANN


class Built(NamedTuple):
    package: Path
    """deep_ep/ of a wheel, as far as it is of NPUs."""
    calls: str
    """What CANN's CMake functions were called with, a line per call."""


def parameters(op_type: str) -> list[tuple[str, str]]:
    """Of the aclnn function: type and name of each, as op_build generates them from the definition."""
    definition = op_definitions.definitions()[op_type]
    inputs = [
        ("const aclTensor*" if one["value_depend"] == "ignore" else "const aclIntArray*", one["name"])
        for one in definition["inputs"]
    ]
    attrs = [("char*" if one["kind"] == "VT_STRING" else "int64_t", one["name"]) for one in definition["attrs"]]
    outputs = [("const aclTensor*", one["name"]) for one in definition["outputs"]]
    return [*inputs, *attrs, *outputs]


def opapi_source() -> str:
    """aclnn functions that write down their arguments. 13 experts are refused."""
    parts = ['#include "cann.h"', 'extern "C" {', "#pragma GCC visibility push(default)"]
    parts += ["static std::string launched;", "const char* fake_cann_launched() { return launched.c_str(); }"]
    for op_type in op_definitions.definitions():
        names = parameters(op_type)
        declared = "".join(f"{kind} {name}, " for kind, name in names)
        written = "".join(f'*made += "{name} " + described({name}) + "\\n";\n' for _, name in names)
        refused = "num_experts == 13" if any(name == "num_experts" for _, name in names) else "false"
        parts.append(f"""
int aclnn{op_type}GetWorkspaceSize({declared}uint64_t* bytes, aclOpExecutor** executor) {{
  if ({refused}) return 561103;
  auto* made = new std::string("{op_type}\\n");
  {written}
  *bytes = 4096;
  *executor = reinterpret_cast<aclOpExecutor*>(made);
  return 0;
}}
int aclnn{op_type}(void* workspace, uint64_t bytes, aclOpExecutor* executor, void* stream) {{
  auto* made = reinterpret_cast<std::string*>(executor);
  launched = *made;
  delete made;
  for (void* pointer : {{workspace, reinterpret_cast<void*>(bytes), stream}})
    launched += std::to_string(reinterpret_cast<uint64_t>(pointer)) + " ";
  return workspace == nullptr;
}}""")
    return "\n".join([*parts, "}"])


@pytest.fixture(scope="module")
def toolkit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A toolkit against which npu/aclnn compiles and links."""
    at = fake_cann(tmp_path_factory.mktemp("cann"), "9.1.0")
    torch_npu = native.torch_npu_dir()
    assert torch_npu is not None
    shutil.rmtree(at / "include")
    shutil.copytree(torch_npu / "include" / "acl", at / "include" / "acl")
    shutil.copytree(torch_npu / "include" / "third_party" / "hccl", at / "include" / "third_party" / "hccl")
    shutil.copytree(at / "include" / "third_party" / "hccl" / "inc" / "hccl", at / "include" / "hccl")
    shutil.copytree(ROOT / "torch_library" / "npu" / "aclnn" / "host_shim", at / "include", dirs_exist_ok=True)
    shutil.copy(FAKE / "ASCConfig.cmake", at / "compiler" / "tikcpp" / "ascendc_kernel_cmake")
    library = at / "lib64" / f"lib{LIBRARIES[0]}.so"
    options = ("-std=c++20", "-shared", "-fPIC", "-I", at / "include", f"-Wl,-soname,{library.name}")
    made = run("g++", *options, FAKE / "cann.cpp", "-o", library, cwd=at)
    assert made.returncode == 0, made.stderr
    for name in LIBRARIES[1:]:
        (at / "lib64" / f"lib{name}.so").unlink()
        (at / "lib64" / f"lib{name}.so").symlink_to(library.name)
    return at


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return copy_of_repository(tmp_path_factory.mktemp("repository") / "tree", kernels=True)


def build(tree: Path, at: Path, toolkit: Path, version: str, soc: str, targets: Sequence[str]) -> Path:
    info = toolkit / f"{MACHINE}-linux" / "ascend_toolkit_install.info"
    info.write_text(f"version={version}\n")
    opapi = at / "opapi.cpp"
    opapi.write_text(opapi_source())
    environment = {"OPAPI": str(opapi), "CPLUS_INCLUDE_PATH": os.pathsep.join((str(FAKE), str(toolkit / "include")))}
    made = configure(tree, at / "build", toolkit, soc, **environment)
    assert made.returncode == 0, made.stderr
    cmake = native.tool("cmake")
    made = run(cmake, "--build", at / "build", "--target", *targets, cwd=tree, cann=toolkit, **environment)
    assert made.returncode == 0, made.stdout + made.stderr
    return at / "build"


@pytest.fixture(scope="module")
def built(tree: Path, toolkit: Path, tmp_path_factory: pytest.TempPathFactory) -> Built:
    at = tmp_path_factory.mktemp("built")
    folder = build(tree, at, toolkit, "9.1.0", "ascend910_93", ["deep_ep_operators", "deep_ep_kernels"])
    cmake = native.tool("cmake")
    made = run(cmake, "--install", folder, "--component", "npu", "--prefix", at / "wheel", cwd=tree)
    assert made.returncode == 0, made.stderr
    return Built(at / "wheel" / "deep_ep", (folder / "operators" / "calls.txt").read_text())


@needs_headers
@pytest.mark.slow
def test_what_goes_into_the_wheel(built: Built) -> None:
    files = {str(path.relative_to(built.package)) for path in built.package.rglob("*") if path.is_file()}
    assert files == {"libdeep_ep_kernels.so", "opp/vendors/deep_ep/op_api/lib/libcust_opapi.so"}


@needs_headers
@pytest.mark.slow
def test_operator_package(tree: Path, built: Built) -> None:
    calls = {name: [] for name in re.findall(r"^\w+", built.calls, re.MULTILINE)}
    for line in built.calls.splitlines():
        name, *arguments = line.split(" ")
        calls[name].append(arguments)
    ((package, *_),) = calls["npu_op_package"]
    assert package == "deep_ep"
    ((*generated,),) = calls["npu_op_code_gen"]
    definitions = {str(path) for path in tree.glob("ops/*/op_host/*.cpp") if not path.name.startswith("fused")}
    assert definitions == {source for source in generated if "/op_host/" in source and source.endswith(".cpp")}
    assert "-DDEEP_EP_CANN_MAJOR=9" in generated
    assert any(source.endswith("src/tiling.cpp") for source in generated)
    assert [arguments[:2] for arguments in calls["npu_op_library"]] == [
        ["cust_opapi", "ACLNN"],
        ["cust_op_proto", "GRAPH"],
        ["cust_optiling", "TILING"],
    ]
    kernels = {}
    for _, _, op_type, _, folder, _, file in calls["npu_op_kernel_sources"]:
        kernels[op_type] = f"{folder}/{file}"
        assert (tree / "ops" / folder / file).exists()
    assert kernels.keys() == operators()
    assert kernels["DeepEpDispatchExact"] == "dispatch/op_kernel/dispatch_exact.cpp"
    ((_, scope, _, *options),) = calls["npu_op_kernel_options"]
    assert scope == "ALL" and "--cce-auto-sync=off" in options
    added = set(calls["npu_op_package_add"][0])
    assert added == {"deep_ep", "LIBRARY", "cust_optiling", "cust_opapi", "cust_op_proto", "ascendc_kernels"}


# libdeep_ep_kernels.so


def kernels_of(library: Path, toolkit: Path) -> DeepEpKernels:
    ctypes.CDLL(str(toolkit / "lib64" / f"lib{LIBRARIES[0]}.so"))  # found by its name then, as if by LD_LIBRARY_PATH
    return kernels_in(ctypes.CDLL(str(library)))


def tensors(names: Sequence[str], first: int) -> tuple[Any, list[str]]:
    """A tensor per name, no two alike, and what becomes of each; the last one is a scalar."""
    made, described = [], []
    for i, name in enumerate(names):
        sizes = [] if i == len(names) - 1 else [first + i, 3][: 1 + i % 2]
        dtype = (0, 1, 3, 9, 27)[i % 5]
        made.append(DeepEpTensor(1000 + first + i, dtype, len(sizes), tuple(sizes)))
        described.append(f"{name} tensor {dtype} {sizes} {[3, 1][-len(sizes) :] if sizes else []} {1000 + first + i}")
    return (DeepEpTensor * len(made))(*made), described


def call_of(op_type: str, num_experts: int = 8) -> tuple[DeepEpCall, list[str]]:
    """A call as torch_library/npu/launch.cpp makes it, and what the aclnn function must be given."""
    definition = op_definitions.definitions()[op_type]
    inputs, outputs, attrs = ([one["name"] for one in definition[kind]] for kind in ("inputs", "outputs", "attrs"))
    numbers = [name for name in attrs if name != "group"]
    values = [num_experts, *range(21, 20 + len(numbers))]
    given_inputs, input_lines = tensors([name for name in inputs if name != "num_worst_tokens"], 2)
    given_outputs, output_lines = tensors(outputs, 102)
    attr_lines = ["group text g"] * ("group" in attrs)
    attr_lines += [f"{name} number {value}" for name, value in zip(numbers, values, strict=True)]
    if "num_worst_tokens" in inputs:
        input_lines.insert(inputs.index("num_worst_tokens"), "num_worst_tokens numbers [77]")
        values.append(77)
    call = DeepEpCall(
        op_name(op_type).encode(),
        b"g" if "group" in attrs else b"",
        len(given_inputs),
        len(given_outputs),
        len(values),
        given_inputs,
        given_outputs,
        (ctypes.c_int64 * len(values))(*values),
    )
    return call, [op_type, *input_lines, *attr_lines, *output_lines]


@needs_headers
@pytest.mark.slow
def test_arguments_arrive_in_the_order_of_the_definition(toolkit: Path, built: Built) -> None:
    kernels = kernels_of(built.package / "libdeep_ep_kernels.so", toolkit)
    assert (kernels.version, kernels.name) == (1, b"AscendC ascend910_93")
    opapi = ctypes.CDLL(str(next(built.package.rglob("libcust_opapi.so"))))
    opapi.fake_cann_launched.restype = TEXT
    error = ctypes.create_string_buffer(512)
    # In exact mode, which is of graphs alone, the eager op gives DeepEpDispatch the number of rows.
    for op_type in operators() - {"DeepEpDispatchExact"}:
        call, expected = call_of(op_type)
        plan, size = P(), ctypes.c_uint64()
        assert kernels.prepare(call, plan, size, error) == 0, error.value
        assert size.value == 4096
        ctypes.memset(call.inputs, 0, ctypes.sizeof(DeepEpTensor) * call.num_inputs)  # it need not outlive prepare
        assert kernels.launch(plan, P(555), P(666), error) == 0, error.value
        assert opapi.fake_cann_launched().decode().splitlines() == [*expected, "555 4096 666 "]


@needs_headers
@pytest.mark.slow
def test_errors_of_calls(toolkit: Path, built: Built) -> None:
    kernels = kernels_of(built.package / "libdeep_ep_kernels.so", toolkit)
    error = ctypes.create_string_buffer(512)
    plan, size = P(), ctypes.c_uint64()
    call, _ = call_of("DeepEpCombine", num_experts=13)
    assert kernels.prepare(call, plan, size, error) != 0
    said = "aclnnDeepEpCombineGetWorkspaceSize failed: 561103: EZ9999: what CANN says"
    assert error.value.decode() == said
    call.op = b"no_such_op"
    assert kernels.prepare(call, plan, size, error) != 0
    assert error.value == b"the operator package has no function aclnnDeepEpNoSuchOp"
    call, _ = call_of("DeepEpCombine")
    assert kernels.prepare(call, plan, size, error) == 0
    assert kernels.launch(plan, None, None, error) != 0
    assert error.value == b"aclnnDeepEpCombine failed: 1: EZ9999: what CANN says"


@needs_headers
@pytest.mark.slow
@pytest.mark.parametrize(
    "version, soc, mesh",
    [
        ("9.1.0", "ascend910_93", False),
        ("9.1.0", "ascend950", False),
        ("8.5.0", "ascend910b", True),
        ("8.5.0", "ascend910_93", False),
    ],
)
def test_window_table(
    tree: Path, toolkit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: str, soc: str, mesh: bool
) -> None:
    if mesh:
        monkeypatch.setenv("FAKE_CANN_MESH", "1")
    folder = build(tree, tmp_path, toolkit, version, soc, ["deep_ep_kernels"])
    kernels = kernels_of(folder / "libdeep_ep_kernels.so", toolkit)
    cann = ctypes.CDLL(f"lib{LIBRARIES[0]}.so")
    table = (ctypes.c_int64 * (8 + SIZE))(*[-1] * (8 + SIZE))
    error = ctypes.create_string_buffer(512)

    def opened(communicator: bytes, size: int, num_bytes: int, timeout_ms: int = 2000) -> str:
        status = kernels.open_windows(b"g", communicator, RANK, size, num_bytes, timeout_ms, table, error)
        return error.value.decode() if status else ""

    assert opened(b"own", SIZE, 1 << 20) == ""
    cycles = 1_000_000 if soc == "ascend950" else 50_000
    assert table[:] == [1, RANK, SIZE, 1 << 20, 2000 * cycles, 0, 0, 0, *((r + 1) << 32 for r in range(SIZE))]
    # A kernel ends before the device ends it.
    for device, patience in ((None, 492_300), ("547000", 492_300), ("20000", 18_000), ("5400000", 1_800_000)):
        if device is not None:
            monkeypatch.setenv("FAKE_CANN_OP_TIMEOUT_MS", device)
        assert opened(b"own", SIZE, 1 << 20, 1_800_000) == ""
        assert table[4] == patience * cycles
    cann.fake_cann_cleared.restype = ctypes.POINTER(ctypes.c_uint64)
    flags = 512 + 2 * 2 * SIZE * 64
    assert cann.fake_cann_cleared()[:3] == [(RANK + 1) << 32, 0, flags]
    said = opened(b"own", SIZE, WINDOW_BYTES + 1)
    assert said == (
        f"HCCL's buffer has {WINDOW_BYTES} bytes on rank 0, and {WINDOW_BYTES + 1} are needed: "
        "set HCCL_BUFFSIZE to at least 201 (MB) on all ranks"
    )
    assert opened(b"own", 2, 1) == f"the communicator has rank {RANK} of {SIZE} here, the group has {RANK} of 2"
    assert "failed: an error of HCCL" in opened(b"another", SIZE, 1)
    kernels.close_windows(b"g")
