"""The build for NPUs without CANN: what it says is missing, what it asks of CANN's CMake functions, what is in a wheel,
and what libdeep_ep_kernels.so makes of a call, over a fake CANN (tests/fake_cann) whose aclnn functions have the
signatures that CANN's generator gives the operator definitions. Operator packages are compared with CANN's own.
"""

import ctypes
import functools
import hashlib
import itertools
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import operator_packages
import pytest
from npu import op_definitions
from npu.op_definitions import ROOT
from operator_packages import VECTORS_TOGETHER, Package, references

from tools.twin import native
from tools.twin.interface import TEXT, DeepEpCall, DeepEpKernels, DeepEpTensor, P, kernels_in

MACHINE = platform.machine()
FAKE = ROOT / "tests" / "fake_cann"
LIBRARIES = ("ascendcl", "nnopbase", "hccl")
RANK, SIZE, WINDOW_BYTES = 1, 4, 200 << 20
"""As tests/fake_cann/cann.cpp has them."""


def run(*command: str | Path, cwd: Path, cann: Path | None = None, **environment: str) -> subprocess.CompletedProcess:
    """The command in `cwd`. With `cann`, in the environment that set_env.sh of this toolkit makes. The text of the two
    outputs has no line breaks.
    """
    settings = {name: value for name, value in os.environ.items() if not name.startswith("ASCEND_")} | environment
    if cann is not None:
        settings["ASCEND_HOME_PATH"] = str(cann)
        settings["PATH"] = os.pathsep.join((str(cann / "bin"), settings["PATH"]))
    result = subprocess.run([*map(str, command)], cwd=cwd, env=settings, capture_output=True, text=True)
    result.stdout, result.stderr = (" ".join(text.split()) for text in (result.stdout, result.stderr))
    return result


def copy_of_repository(to: Path, *, kernels: bool = False) -> Path:
    """What a build reads, of the same age; without `kernels`, as if none had been written."""
    to.mkdir()
    for name in ("CMakeLists.txt", "LICENSE", "Makefile", "README.md", "build.sh", "pyproject.toml"):
        shutil.copy2(ROOT / name, to)
    for name in ("cmake", "ops", "src", "torch_library"):
        shutil.copytree(ROOT / name, to / name)
    if not kernels:
        for kernel in to.glob("ops/*/op_kernel/*.cpp"):
            kernel.unlink()
    return to


def operators() -> set[str]:
    """The types that have kernels: what goes into the package."""
    return {op_type for op_type in op_definitions.definitions() if not op_type.startswith("DeepEpFused")}


CONFIGS = {"8.5.0": "ASCConfig.cmake", "9.1.0": "asc-config.cmake"}
"""The CMake package ASC of a version, in lib64/cmake/."""


def fake_cann(at: Path, version: str, without: Sequence[str] = (), *, links: bool = True) -> Path:
    """A toolkit of empty files, laid out like one of this version: most of it is in a folder of the machine, to which
    there are links. There are installations without those of headers and libraries.
    """
    config = CONFIGS.get(version, CONFIGS["9.1.0"])
    files = [
        "include/acl/acl.h",
        "include/aclnn/acl_meta.h",
        *(f"include/hccl/{name}.h" for name in ("hccl", "hccl_res", "hccl_rank_graph")),
        *(f"lib64/lib{name}.so" for name in LIBRARIES),
        f"lib64/cmake/{config}",
        "tikcpp/ascendc_kernel_cmake/functions.cmake",
        "ccec_compiler/bin/bisheng",
        "ascend_toolkit_install.info",
    ]
    home = at / f"{MACHINE}-linux"
    (at / "compiler").mkdir(parents=True)
    for link in (*(("include", "lib64") if links else ()), "compiler/tikcpp", "compiler/ccec_compiler"):
        folder = home / Path(link).name
        folder.mkdir(parents=True)
        (at / link).symlink_to(folder)
    others = ["compiler/version.info", "tools/opbuild/op_build"]
    assert set(without) <= {*files, *others}
    for folder, names in ((home, files), (at, others)):
        for name in names:
            if name not in without:
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                (folder / name).touch()
    for name, text in (
        ("compiler/version.info", f"Version={version}\n"),
        (f"{MACHINE}-linux/ascend_toolkit_install.info", f"package_name=Ascend-cann-toolkit\nversion={version}\n"),
    ):
        if (at / name).exists():
            (at / name).write_text(text)
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
    looked = f"looked for include/acl/acl.h and {MACHINE}-linux/include/acl/acl.h in {nowhere} (ASCEND_HOME_PATH)"
    for cann, said in (
        (nowhere, f"CANN's toolkit is missing: {looked}"),
        (fake_cann(tmp_path / "cann", "9.1.0", without=[part]), f"is incomplete: the generator of operators: {part}."),
    ):
        result = run("bash", tree / "build.sh", "-a", *arguments, cwd=tmp_path, cann=cann)
        assert result.returncode == 1 and said in result.stderr, result.stderr
        assert result.stdout == "" and sorted(tree.rglob("*")) == before
    by_cmake = run("bash", tree / "cmake" / "find_cann.sh", soc, cwd=tmp_path, cann=nowhere)
    assert by_cmake.returncode == 1 and "CANN's toolkit is missing" in by_cmake.stderr


@pytest.mark.skipif(Path("/usr/local/Ascend").exists(), reason="this machine may have CANN")
def test_usual_places_are_named(tmp_path: Path) -> None:
    result = run("bash", ROOT / "build.sh", "-a", "deepep", cwd=tmp_path, HOME="/home/of me")
    assert result.returncode == 1
    assert (
        "in /usr/local/Ascend/cann, /usr/local/Ascend/ascend-toolkit/latest, /usr/local/Ascend/latest, "
        "/home/of me/Ascend/cann, /home/of me/Ascend/ascend-toolkit/latest, /home/of me/Ascend/latest, and "
        "ASCEND_HOME_PATH is not set. Install CANN 8.5 or 9"
    ) in result.stderr


def test_what_runs_for_a_usual_place(tmp_path: Path) -> None:
    """It has the environment of set_env.sh, in the folder of the toolkit or beside it. Everything else has its own."""
    folder = tmp_path / "ascend-toolkit" / "latest"
    folder.mkdir(parents=True)
    command = ("bash", ROOT / "cmake" / "in_cann.sh", folder, "bash", "-c", 'echo "$ASCEND_HOME_PATH $SOURCED"')

    def told(cann: Path | None = None) -> str:
        return run(*command, cwd=tmp_path, cann=cann, SOURCED="nothing").stdout

    assert told() == f"{folder} nothing"
    (folder.parent / "set_env.sh").write_text("export SOURCED=beside ASCEND_HOME_PATH=/elsewhere\n")
    assert told() == f"{folder} beside"
    (folder / "set_env.sh").write_text("export SOURCED=inside\n")
    assert told() == f"{folder} inside"
    assert told(tmp_path) == f"{folder} nothing"


def test_a_path_with_a_space(tmp_path: Path) -> None:
    """CANN's own functions cannot build there."""
    tree = copy_of_repository(tmp_path / "the tree", kernels=True)
    cann = fake_cann(tmp_path / "cann", "9.1.0")
    said = "CANN's CMake functions cannot build in a folder with a space in its path"
    by_script = run("bash", tree / "build.sh", "-a", "deepep", cwd=tmp_path, cann=cann)
    assert by_script.returncode == 1 and by_script.stderr == f"{said}: {tree}."
    by_cmake = configure(ROOT, tmp_path / "the build", cann, "ascend910_93")
    assert by_cmake.returncode != 0 and f"{said}: {tmp_path / 'the build'}" in by_cmake.stderr


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
            f"include/aclnn/acl_meta.h or {MACHINE}-linux/include/aclnn/acl_meta.h; the header of HCCL's channels: "
            f"include/hccl/hccl_res.h or {MACHINE}-linux/include/hccl/hccl_res.h; libhccl: lib64/libhccl.so or "
            f"{MACHINE}-linux/lib64/libhccl.so; the CMake package ASC: lib64/cmake/asc-config.cmake or "
            f"lib64/cmake/ASCConfig.cmake or {MACHINE}-linux/lib64/cmake/asc-config.cmake or "
            f"{MACHINE}-linux/lib64/cmake/ASCConfig.cmake or "
            "compiler/tikcpp/ascendc_kernel_cmake/asc-config.cmake or "
            "compiler/tikcpp/ascendc_kernel_cmake/ASCConfig.cmake or "
            f"{MACHINE}-linux/tikcpp/ascendc_kernel_cmake/asc-config.cmake or "
            f"{MACHINE}-linux/tikcpp/ascendc_kernel_cmake/ASCConfig.cmake. Install",
            soc="ascend950",
            without=(
                "ccec_compiler/bin/bisheng",
                "include/aclnn/acl_meta.h",
                "lib64/libhccl.so",
                "include/hccl/hccl_res.h",
                "lib64/cmake/asc-config.cmake",
            ),
        ),
        Refusal(
            "8.5.0",
            f"is not one for {MACHINE}: {{cann}}/{MACHINE}-linux/ascend_toolkit_install.info does not exist.",
            without=("ascend_toolkit_install.info",),
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


def generate(at: Path, soc: str) -> Path:
    """What CANN's generator and its compiler of kernels make of ops/ besides libraries, as far as anything is known of
    it (operator_packages.py); binaries are empty.
    """
    infos, entries = {}, {}
    for op_type in operators():
        info = operator_packages.info_of(op_type, op_definitions.definitions()[op_type], soc)
        file, infos[op_type], entries[op_type] = info["opFile"]["value"], info, []
        (kernel,) = ROOT.glob(f"ops/*/op_kernel/{op_name(op_type)}.cpp")
        task = operator_packages.task_of(
            operator_packages.with_includes([kernel], [ROOT / "ops" / "common" / "op_kernel", ROOT / "src"])
        )
        assert task is not None
        folder = at / "compiled" / op_type / file
        folder.mkdir(parents=True)
        for column in range(len(operator_packages.columns_of(info))):
            name = f"{op_type}_{hashlib.md5(f'{op_type} {column}'.encode()).hexdigest()}"
            described = operator_packages.description_of(name, info, column, task, ctypes.sizeof(op_definitions.Tiling))
            (folder / f"{name}.json").write_text(json.dumps(described))
            (folder / f"{name}.o").touch()
            entries[op_type].append({"binPath": f"{soc}/{file}/{name}.o", "jsonPath": f"{soc}/{file}/{name}.json"})
    texts = {
        "aclnn_deep_ep.cpp": opapi_source(),
        "op_proto.cc": "",
        "op_proto.h": "",
        f"config/{soc}/aic-{soc}-ops-info.json": json.dumps(infos),
        f"kernel/config/{soc}/binary_info_config.json": json.dumps(
            {op_type: {"binaryList": binaries} for op_type, binaries in entries.items()}
        ),
        "npu_supported_ops.json": json.dumps({op_type: {"isGray": False, "isHeavy": False} for op_type in infos}),
    }
    for op_type, binaries in entries.items():
        file = operator_packages.snake_case(op_type)
        texts[f"kernel/config/{soc}/{file}.json"] = json.dumps({"binList": binaries})
        texts[f"dynamic/{file}.py"] = texts[f"aclnn_{file}.h"] = ""
    for name, text in texts.items():
        (at / name).parent.mkdir(parents=True, exist_ok=True)
        (at / name).write_text(text)
    return at


class Build(NamedTuple):
    """One way to have CANN, and one SoC."""

    version: str
    soc: str
    place: str
    """Of the toolkit; one in Ascend/cann is found in the home folder, all others by ASCEND_HOME_PATH."""
    links: bool = True
    mesh: bool = False

    def __str__(self) -> str:
        return f"{self.version}-{self.soc}"

    @property
    def arguments(self) -> list[str]:
        known = {"ascend910_93": "deepep", "ascend910b": "deepep2", "ascend950": "deepep Ascend950"}
        return known[self.soc].split()

    @property
    def label(self) -> str:
        return {"ascend910_93": "a3", "ascend910b": "a2", "ascend950": "a5"}[self.soc]


BUILDS = (
    Build("8.5.0", "ascend910b", "cann", mesh=True),
    Build("8.5.0", "ascend910_93", "CANN 8.5"),
    Build("9.1.0", "ascend910b", "cann", links=False),
    Build("9.1.0", "ascend910_93", "Ascend/cann"),
    Build("9.1.0", "ascend950", "CANN 9"),
)
NAMED, SPACED_85, UNLINKED, AT_HOME, SPACED_9 = BUILDS
every_build = pytest.mark.parametrize("build", BUILDS, ids=str)


class Wheel(NamedTuple):
    name: str
    package: Path
    """deep_ep/ in it."""
    calls: str
    """What CANN's CMake functions were called with, a line per call."""

    @property
    def operators(self) -> Package:
        return Package(self.package / "opp" / "vendors" / "deep_ep")


@pytest.fixture(scope="module")
def cann_library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The fake toolkit's only library, loaded as if by LD_LIBRARY_PATH."""
    library = tmp_path_factory.mktemp("library") / f"lib{LIBRARIES[0]}.so"
    headers = library.parent / "include"
    headers.mkdir()
    headers_of_cann(headers)
    options = ("-std=c++20", "-shared", "-fPIC", "-I", headers, f"-Wl,-soname,{library.name}")
    made = run("g++", *options, FAKE / "cann.cpp", "-o", library, cwd=library.parent)
    assert made.returncode == 0, made.stderr
    ctypes.CDLL(str(library))
    return library


def headers_of_cann(at: Path) -> None:
    """Those that ops/aclnn includes: of ACL and HCCL as a torch-npu wheel has them, and what it lacks."""
    torch_npu = native.torch_npu_dir()
    assert torch_npu is not None
    for name in ("acl", "third_party"):
        (at / name).symlink_to(torch_npu / "include" / name)
    shutil.copytree(torch_npu / "include" / "third_party" / "hccl" / "inc" / "hccl", at / "hccl")
    shutil.copytree(ROOT / "ops" / "aclnn" / "host_shim", at, dirs_exist_ok=True)


def toolkit(at: Path, build: Build, library: Path) -> Path:
    """A toolkit against which ops/aclnn compiles and links."""
    cann = fake_cann(at / build.place, build.version, links=build.links)
    home = cann / f"{MACHINE}-linux"
    shutil.rmtree(home / "include")
    (home / "include").mkdir()
    headers_of_cann(home / "include")
    shutil.copy(FAKE / CONFIGS[build.version], home / "lib64" / "cmake")
    shutil.copy(FAKE / "functions.cmake", home / "tikcpp" / "ascendc_kernel_cmake")
    shutil.copy(FAKE / "version_info.sh", cann / "tools")
    shutil.copy(FAKE / "set_env.sh", cann)
    (cann / "bin").mkdir()
    shutil.copy(FAKE / "asc_opc", cann / "bin")
    for name in LIBRARIES:
        (home / "lib64" / f"lib{name}.so").unlink()
        (home / "lib64" / f"lib{name}.so").symlink_to(library)
    return cann


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The repository, with the environment that make has set up. What is for CPUs is empty, to save time."""
    tree = copy_of_repository(tmp_path_factory.mktemp("repository") / "tree", kernels=True)
    shutil.copytree(ROOT / "python", tree / "python", ignore=shutil.ignore_patterns("__pycache__"))
    for source in (*tree.glob("src/**/*.cpp"), *tree.glob("torch_library/**/*.cpp")):
        if source.name != "tiling.cpp":
            source.write_text("")
    (tree / ".venv").symlink_to(ROOT / ".venv")
    return tree


@pytest.fixture(scope="module")
def wheel(tree: Path, cann_library: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[Build], Wheel]:
    """What build.sh makes, each once."""
    made: dict[Build, Wheel] = {}

    def wheel(build: Build) -> Wheel:
        if build not in made:
            at = tmp_path_factory.mktemp("built")
            cann = toolkit(at, build, cann_library)
            environment = {
                "FAKE_CANN_GENERATED": str(generate(at / "generated", build.soc)),
                "CPLUS_INCLUDE_PATH": os.pathsep.join((str(FAKE), str(cann / f"{MACHINE}-linux" / "include"))),
            }
            if build is AT_HOME:
                environment["HOME"] = str(at)
            named = None if build is AT_HOME else cann
            before = tree / "build" / build.soc / "wheel" / "operator_package" / "packages" / "vendors" / "deep_ep"
            before.mkdir(parents=True, exist_ok=True)
            (before / "of_another_version").touch()
            result = run("bash", tree / "build.sh", "-a", *build.arguments, cwd=at, cann=named, **environment)
            assert result.returncode == 0, result.stdout + result.stderr
            (file,) = (tree / "output").glob("*.whl")
            with zipfile.ZipFile(file) as archive:
                archive.extractall(at / "wheel")
            calls = tree / "build" / build.soc / "wheel" / "operators" / "calls.txt"
            made[build] = Wheel(file.name, at / "wheel" / "deep_ep", calls.read_text())
        return made[build]

    return wheel


def over_fake_cann(test: Callable[..., None]) -> Callable[..., None]:
    has_environment = (ROOT / ".venv" / ".stamps" / "setup").exists()
    marks = (
        pytest.mark.slow,
        pytest.mark.torch_npu,
        pytest.mark.skipif(not has_environment, reason="no .venv that make has set up"),
    )
    return functools.reduce(lambda test, mark: mark(test), marks, test)


@over_fake_cann
@every_build
def test_wheel(wheel: Callable[[Build], Wheel], build: Build) -> None:
    """build.sh ends with one, wherever CANN is and however it is laid out."""
    made = wheel(build)
    assert made.name == f"deep_ep-0.1.0+{build.label}-py3-none-linux_{MACHINE}.whl"
    assert {path.name for path in made.package.glob("*.so")} == {"libdeep_ep.so", "libdeep_ep_kernels.so"}
    assert kernels_in(ctypes.CDLL(str(made.package / "libdeep_ep_kernels.so"))).name == f"AscendC {build.soc}".encode()
    assert (made.operators.path / "version.info").read_text() == f"custom_opp_compiler_version={build.version}\n"
    assert made.operators.soc == build.soc
    assert (made.operators.tbe / "op_tiling" / "liboptiling.so").read_bytes()[:4] == b"\x7fELF"


@over_fake_cann
@every_build
def test_the_package_is_laid_out_as_by_cann(wheel: Callable[[Build], Wheel], build: Build) -> None:
    """Every file of packages that CANN has made has its place in ours, but for parsers of TensorFlow's graphs."""
    trees = [package.tree() for package in references() if package.vendor != "custom_transformer"]
    (expected,) = set(map(frozenset, trees))
    assert wheel(build).operators.tree() == expected - {"framework/tensorflow/libcust_tf_parsers.so"}


@over_fake_cann
def test_wrappers_of_kernels_have_their_options_and_no_path_of_the_build(wheel: Callable[[Build], Wheel]) -> None:
    made = wheel(SPACED_9)
    wrappers = list((made.operators.tbe / "deep_ep_impl" / "dynamic").glob("*.py"))
    assert len(wrappers) == len(operators())
    assert {path.read_text() for path in wrappers} == {
        "    custom_all_compile_options = {'__ALLSOC__': ['--cce-auto-sync=off']},\n"
    }


@over_fake_cann
def test_the_package_has_what_all_packages_have(wheel: Callable[[Build], Wheel]) -> None:
    assert wheel(SPACED_9).operators.tree() >= frozenset.intersection(*(frozenset(one.tree()) for one in references()))


@over_fake_cann
def test_sources_in_the_package_are_whole(wheel: Callable[[Build], Wheel]) -> None:
    """What they include is in the package, or one of CANN's headers, which those of others do not bring either."""
    needed = wheel(SPACED_9).operators.unresolved_includes()
    assert needed == {"kernel_operator.h"}
    assert sum(needed <= package.unresolved_includes() for package in references()) > 40


@over_fake_cann
def test_what_cann_is_told_of_operators(wheel: Callable[[Build], Wheel]) -> None:
    """All that our definitions set has a name that CANN knows."""

    def names(info: dict[str, dict[str, str]]) -> set[tuple[str, str]]:
        return {(re.sub(r"\d+$|^attr_.*", "", name), key) for name, setting in info.items() for key in setting}

    ours = [operator.info for operator in wheel(SPACED_9).operators.operators]
    theirs = [operator.info for package in references() for operator in package.operators]
    assert set().union(*map(names, ours)) <= set().union(*map(names, theirs))
    for info in ours:
        columns = operator_packages.columns_of(info)
        assert len(set(columns)) == len(columns)


@over_fake_cann
@every_build
def test_descriptions_of_kernels(wheel: Callable[[Build], Wheel], build: Build) -> None:
    """The .json of each kernel has what CANN wrote for kernels like ours: on vector cores alone, which meet."""
    theirs = [
        kernel
        for package in references()
        for operator in package.operators
        if operator_packages.task_of(operator.source) == VECTORS_TOGETHER
        for kernel in operator.kernels
        if "dynamicParamMode" not in kernel  # of parameters that are lists
    ]
    assert len(theirs) >= 10
    own = {"binFileName", "kernelName", "opParaSize", "parameters", "kernelList", "supportInfo", "filePath"}
    ours = [(operator, kernel) for operator in wheel(build).operators.operators for kernel in operator.kernels]
    assert {operator.type for operator, _ in ours} == operators()
    for operator, kernel in ours:
        assert operator_packages.task_of(operator.source) == VECTORS_TOGETHER
        for other in theirs:
            assert kernel.keys() == other.keys() - {"sha256"}
            assert {key: kernel[key] for key in kernel.keys() - own} == {key: other[key] for key in kernel.keys() - own}
            assert kernel["supportInfo"].keys() <= other["supportInfo"].keys()
            ours_of_list, theirs_of_list = kernel["kernelList"][0], other["kernelList"][0]
            for key in ("kernelType", "crossCoreSync", "taskRation"):
                assert ours_of_list[key] == theirs_of_list[key]
        assert kernel["opParaSize"] == ctypes.sizeof(op_definitions.Tiling) + 8
        names = op_definitions.definitions()[operator.type]
        assert len(kernel["parameters"]) == len(names["inputs"]) + len(names["outputs"]) + 1


@over_fake_cann
def test_set_env(wheel: Callable[[Build], Wheel]) -> None:
    """The package's own script tells CANN where it is, wherever that is."""
    package = wheel(SPACED_9).operators.path
    tell = f'source "{package}/bin/set_env.bash"; printf "%s|%s" "$ASCEND_CUSTOM_OPP_PATH" "$LD_LIBRARY_PATH"'
    for known, expected in (("", str(package)), ("/other", f"{package}:/other")):
        settings = {"ASCEND_CUSTOM_OPP_PATH": known, "LD_LIBRARY_PATH": "/libraries"}
        told = subprocess.run(["bash", "-euc", tell], env=settings, capture_output=True, text=True)
        assert told.stdout == f"{expected}|/libraries", told.stderr


@over_fake_cann
def test_operator_package(tree: Path, wheel: Callable[[Build], Wheel]) -> None:
    calls = {name: [] for name in re.findall(r"^\w+", wheel(AT_HOME).calls, re.MULTILINE)}
    for line in wheel(AT_HOME).calls.splitlines():
        name, *arguments = line.split(" ")
        calls[name].append(arguments)
    source = tree / "build" / AT_HOME.soc / "source"
    ((package, *_),) = calls["npu_op_package"]
    assert package == "deep_ep"
    ((*generated,),) = calls["npu_op_code_gen"]
    definitions = {str(path) for path in source.glob("ops/*/op_host/*.cpp") if not path.name.startswith("fused")}
    assert definitions == {name for name in generated if "/op_host/" in name and name.endswith(".cpp")}
    assert "-DDEEP_EP_CANN_MAJOR=9" in generated
    assert any(name.endswith("src/device/tiling.cpp") for name in generated)
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


def kernels_of(wheel: Wheel) -> DeepEpKernels:
    return kernels_in(ctypes.CDLL(str(wheel.package / "libdeep_ep_kernels.so")))


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


@over_fake_cann
def test_arguments_arrive_in_the_order_of_the_definition(wheel: Callable[[Build], Wheel]) -> None:
    kernels = kernels_of(wheel(AT_HOME))
    assert (kernels.version, kernels.name) == (2, b"AscendC ascend910_93")
    opapi = ctypes.CDLL(str(next(wheel(AT_HOME).package.rglob("libcust_opapi.so"))))
    opapi.fake_cann_launched.restype = TEXT
    error = ctypes.create_string_buffer(512)
    # Those in exact mode are of graphs alone: eager ops give the number of rows.
    for op_type in {one for one in operators() if not one.endswith("Exact")}:
        call, expected = call_of(op_type)
        plan, size = P(), ctypes.c_uint64()
        assert kernels.prepare(call, plan, size, error) == 0, error.value
        assert size.value == 4096
        ctypes.memset(call.inputs, 0, ctypes.sizeof(DeepEpTensor) * call.num_inputs)  # it need not outlive prepare
        assert kernels.launch(plan, P(555), P(666), error) == 0, error.value
        assert opapi.fake_cann_launched().decode().splitlines() == [*expected, "555 4096 666 "]


@over_fake_cann
def test_errors_of_calls(wheel: Callable[[Build], Wheel]) -> None:
    kernels = kernels_of(wheel(AT_HOME))
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


@over_fake_cann
def test_a_plan_that_is_not_launched_leaves_nothing_behind(wheel: Callable[[Build], Wheel]) -> None:
    kernels = kernels_of(wheel(AT_HOME))
    destroyed = ctypes.CDLL(f"lib{LIBRARIES[0]}.so").fake_cann_destroyed
    error, plan, size = ctypes.create_string_buffer(512), P(), ctypes.c_uint64()
    before = destroyed()
    for is_launched in (True, False):
        assert kernels.prepare(call_of("DeepEpCombine")[0], plan, size, error) == 0, error.value
        if is_launched:
            assert kernels.launch(plan, P(555), P(666), error) == 0, error.value
        else:
            kernels.discard(plan)
        assert destroyed() == before + (not is_launched)


REQUEST = {
    **{"version": 0, "count": 4, "offsets": 8, "debug_mode": 40, "prepare_position": 41, "queues": 42, "blocks": 44},
    **{"device": 46, "reserved": 47, "skip_local_copy": 64, "skip_window_copy": 65, "step": 66, "kind_version": 67},
    **{"more_reserved": 68, "engine": 77, "source_dtype": 78, "destination_dtype": 79, "communicator": 80},
    **{"algorithm": 208, "kind": 336, "reduction": 340, "last_reserved": 344, "": 64 + 512},
}
"""HCCL's Mc2InitTilingInner, of 64 bytes, and its Mc2CcTilingInner, of 512: where each member begins, and the end."""


@over_fake_cann
def test_request_of_windows_is_laid_out_as_hccl_reads_it(tmp_path: Path) -> None:
    text = f'#include "{ROOT}/ops/aclnn/windows_tiling.cpp"\nusing deep_ep::aclnn::Request;\n'
    for member, at in REQUEST.items():
        found = f"offsetof(Request, {member})" if member else "sizeof(Request)"
        text += f'static_assert({found} == {at}, "{member or "size"}");\n'
    # Members without a name in the table would lie between others.
    members = list(REQUEST)
    for member, following in itertools.pairwise(members):
        end = f"offsetof(Request, {following})" if following else "sizeof(Request)"
        text += f'static_assert(offsetof(Request, {member}) + sizeof(Request::{member}) == {end}, "{member}");\n'
    source = tmp_path / "request.cpp"
    source.write_text(text)
    torch_npu = native.torch_npu_dir()
    assert torch_npu is not None
    include = torch_npu / "include"
    folders = [ROOT, ROOT / "src", ROOT / "ops" / "aclnn" / "host_shim"]
    folders += [include, include / "third_party" / "acl" / "inc", include / "third_party" / "hccl" / "inc"]
    made = run("g++", "-std=c++20", "-fsyntax-only", *(f"-I{folder}" for folder in folders), source, cwd=tmp_path)
    assert made.returncode == 0, made.stderr


@over_fake_cann
@pytest.mark.parametrize("build", [AT_HOME, SPACED_9, NAMED, SPACED_85], ids=str)
def test_window_table(wheel: Callable[[Build], Wheel], monkeypatch: pytest.MonkeyPatch, build: Build) -> None:
    if build.mesh:
        monkeypatch.setenv("FAKE_CANN_MESH", "1")
    kernels = kernels_of(wheel(build))
    cann = ctypes.CDLL(f"lib{LIBRARIES[0]}.so")
    table = (ctypes.c_int64 * (8 + SIZE))(*[-1] * (8 + SIZE))
    error = ctypes.create_string_buffer(512)

    def opened(communicator: bytes, size: int, num_bytes: int, timeout_ms: int = 2000) -> str:
        status = kernels.open_windows(b"g", communicator, RANK, size, num_bytes, timeout_ms, table, error)
        return error.value.decode() if status else ""

    assert opened(b"own", SIZE, 1 << 20) == ""
    cycles = 1_000_000 if build.soc == "ascend950" else 50_000
    assert table[:] == [2, RANK, SIZE, 1 << 20, 2000 * cycles, 0, 0, 0, *((r + 1) << 32 for r in range(SIZE))]
    # A kernel ends before the device ends it.
    for device, patience in ((None, 492_300), ("547000", 492_300), ("20000", 18_000), ("5400000", 1_800_000)):
        if device is not None:
            monkeypatch.setenv("FAKE_CANN_OP_TIMEOUT_MS", device)
        assert opened(b"own", SIZE, 1 << 20, 1_800_000) == ""
        assert table[4] == patience * cycles
    cann.fake_cann_cleared.restype = ctypes.POINTER(ctypes.c_uint64)
    lines, marks = 128 * 64, 2 * (1 << 16) * 4
    before_slots = 512 + 2 * 2 * SIZE * 64 + lines + marks
    assert cann.fake_cann_cleared()[:3] == [(RANK + 1) << 32, 0, before_slots]
    said = opened(b"own", SIZE, WINDOW_BYTES + 1)
    assert said == (
        f"HCCL's buffer has {WINDOW_BYTES} bytes on rank 0, and {WINDOW_BYTES + 1} are needed: "
        "set HCCL_BUFFSIZE to at least 201 (MB) on all ranks"
    )
    assert opened(b"own", 2, 1) == f"the communicator has rank {RANK} of {SIZE} here, the group has {RANK} of 2"
    assert "failed: an error of HCCL" in opened(b"another", SIZE, 1)
    kernels.close_windows(b"g")
