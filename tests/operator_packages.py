"""Operator packages of CANN: packages that CANN itself has made, as wheels have them, and what it makes of a definition
and of a kernel's source. tests/package/test_operator_packages.py holds the second against the first.

The wheels are read, and nothing of them is kept but a copy in build/.
"""

import fcntl
import json
import platform
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator, Sequence
from functools import cache, cached_property
from pathlib import Path
from typing import Any, NamedTuple

from tools.twin import native

WHEELS = ("fbgemm-ascend==1.5.0", "vllm-ascend==0.23.0")
"""Those of CPython 3.11 for this machine. Both are under the Apache License 2.0."""

FOLDER = native.root() / "build" / "operator_packages"

DTYPES = {
    **{"float32": 0, "float16": 1, "int8": 2, "int32": 3, "uint8": 4, "int16": 6, "int64": 9, "uint64": 10},
    **{"double": 11, "bool": 12, "bfloat16": 27, "int4": 29},
}
"""ge::DataType by CANN's names."""

ZEROS: dict[str, Any] = {"int": 0, "float": 0.0, "bool": False, "str": "", "listInt": []}
"""What a kernel's description has for an attribute without a default."""

CUBE_AND_VECTORS, VECTORS_TOGETHER, VECTORS = (
    f"KERNEL_TYPE_{name}" for name in ("MIX_AIC_1_2", "MIX_AIV_1_0", "AIV_ONLY")
)
TASKS = {CUBE_AND_VECTORS: "1:2", VECTORS_TOGETHER: "0:1", VECTORS: None}
"""Task types by the ratio of cube to vector cores, where cores are scheduled together."""


@cache
def wheel(requirement: str) -> Path:
    """The folder of a wheel, with its operator packages. It comes from the package index that pip is set up with; an
    error of pip's is an error here.
    """
    name = requirement.partition("==")[0]
    folder = FOLDER / name
    FOLDER.mkdir(parents=True, exist_ok=True)
    with open(FOLDER / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if folder.exists():
            return folder
        scratch = FOLDER / "scratch"
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir()
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
        command += ["--python-version", "3.11", "--implementation", "cp", "--abi", "cp311"]
        command += ["--platform", f"manylinux_2_34_{platform.machine()}", "--dest", str(scratch), requirement]
        result = subprocess.run(command, capture_output=True, text=True)
        if result.returncode:
            raise RuntimeError(f"{' '.join(command)} failed:\n{result.stdout}{result.stderr}")
        (archive,) = scratch.glob("*.whl")
        with zipfile.ZipFile(archive) as files:
            files.extractall(scratch, [file for file in files.namelist() if "/vendors/" in file])
        archive.unlink()
        scratch.rename(folder)
    return folder


@cache
def references() -> list["Package"]:
    """The packages of all wheels."""
    found = [path for requirement in WHEELS for path in sorted(wheel(requirement).rglob("vendors/*")) if path.is_dir()]
    return [Package(path) for path in found]


class Operator(NamedTuple):
    """Of a package, for one SoC."""

    type: str
    info: dict[str, dict[str, str]]
    """What aic-<soc>-ops-info.json says of it."""
    kernels: list[dict[str, Any]]
    """The .json of each kernel."""
    source: str
    """Its kernel with all of the package that it includes; empty where none is called like it."""


class Package:
    """An operator package in the folder `path`, which is called like the vendor."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.vendor = path.name

    def __repr__(self) -> str:
        return str(self.path)

    @property
    def tbe(self) -> Path:
        return self.path / "op_impl" / "ai_core" / "tbe"

    @property
    def sources(self) -> Path:
        return self.tbe / f"{self.vendor}_impl"

    @cached_property
    def soc(self) -> str:
        (path,) = (self.tbe / "config").iterdir()
        return path.name

    @cached_property
    def operators(self) -> list[Operator]:
        infos = json.loads((self.tbe / "config" / self.soc / f"aic-{self.soc}-ops-info.json").read_text())
        return [
            Operator(op_type, info, list(self._kernels(info["opFile"]["value"])), self._source(info["opFile"]["value"]))
            for op_type, info in infos.items()
        ]

    def _kernels(self, file: str) -> Iterator[dict[str, Any]]:
        for path in sorted((self.tbe / "kernel" / self.soc / file).glob("*.json")):
            assert path.with_suffix(".o").is_file()
            if not path.stem.endswith("_relocatable"):  # another form of one that is there
                yield json.loads(path.read_text())

    def _source(self, file: str) -> str:
        paths = [path for path in self.sources.rglob("*.cpp") if file in (path.stem, f"deep_ep_{path.stem}")]
        return with_includes(paths)

    def unresolved_includes(self) -> set[str]:
        """What the sources include that is not in the package: headers of CANN."""
        files = [path for path in self.sources.rglob("*") if path.suffix in (".cpp", ".h")]
        named = [(path.parent, name) for path in files for name in includes(path.read_text(errors="replace"))]
        return {name for folder, name in named if not (folder / name).is_file()}

    def tree(self) -> set[str]:
        """Its files, with a word in capitals for what has the name of a vendor, operator, kernel, SoC or machine. The
        sources of kernels are one entry.
        """
        files = {operator.info["opFile"]["value"] for operator in self.operators}
        types = {operator.type for operator in self.operators}
        of_soc = {self.soc: "SOC", f"aic-{self.soc}-ops-info": "aic-SOC-ops-info", platform.machine(): "MACHINE"}
        of_op = {**dict.fromkeys(files, "OPERATOR"), f"{self.vendor}_impl": "VENDOR_impl", **of_soc}

        def word(part: str) -> str:
            stem, dot, suffix = part.partition(".")
            if kernel := re.fullmatch(r"(\w+)_[0-9a-f]{32}(_relocatable)?", stem):
                stem = "KERNEL" if kernel[1] in types else stem
            elif stem.startswith("aclnn_"):
                stem = "aclnn_OPERATOR"
            return of_op.get(stem, stem) + dot + suffix

        found = set()
        for path in self.path.rglob("*"):
            parts = path.relative_to(self.path).parts
            if path.is_dir():
                continue
            if f"{self.vendor}_impl" in parts and path.suffix != ".py":
                parts = (*parts[: parts.index(f"{self.vendor}_impl") + 1], "SOURCES")
            found.add("/".join(map(word, parts)))
        return found


def includes(text: str) -> list[str]:
    return re.findall(r'^\s*#\s*include\s*"([^"]+)"', text, re.MULTILINE)


def with_includes(paths: Sequence[Path], folders: Sequence[Path] = ()) -> str:
    """The texts of files and of what they include, found beside the file that includes it or in `folders`."""
    pending, texts = [path.resolve() for path in paths], {}
    while pending:
        path = pending.pop()
        if path not in texts:
            texts[path] = path.read_text(errors="replace")
            found = [folder / name for name in includes(texts[path]) for folder in (path.parent, *folders)]
            pending += [file.resolve() for file in found if file.is_file()]
    return "\n".join(texts.values())


# What CANN makes of a definition


def snake_case(op_type: str) -> str:
    """DeepEpDispatchExact: deep_ep_dispatch_exact, the name of its function in the kernel and of its folder."""
    return re.sub("(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", op_type).lower()


def info_of(op_type: str, definition: dict[str, Any], soc: str) -> dict[str, dict[str, str]]:
    """What its generator writes into aic-<soc>-ops-info.json. `definition` is one of npu.op_definitions."""
    names = {number: name for name, number in DTYPES.items()}
    assert all({2} == set(param["formats"]) for param in definition["inputs"] + definition["outputs"])
    info: dict[str, dict[str, str]] = {
        **{name: {"value": snake_case(op_type)} for name in ("opFile", "opInterface")},
        "prebuildPattern": {"value": "Opaque"},
        "coreType": {"value": "AiCore"},
    }
    for kind in ("input", "output"):
        for index, param in enumerate(definition[f"{kind}s"]):
            info[f"{kind}{index}"] = {
                "name": param["name"],
                "dtype": ",".join(names[number] for number in param["dtypes"]),
                "format": ",".join("ND" for _ in param["formats"]),
                "shape": "all",
                "paramType": param["type"],
                **({"valueDepend": param["value_depend"]} if param["value_depend"] != "ignore" else {}),
                **({"outputShapeDependOnCompute": "true"} if param["shape_depends_on_compute"] else {}),
            }
    for attr in definition["attrs"]:
        kind = {"VT_INT": "int", "VT_STRING": "str"}[attr["kind"]]
        info[f"attr_{attr['name']}"] = {"type": kind, "value": "all", "paramType": "required"}
        assert attr["required"]
    info["attr"] = {"list": ",".join(attr["name"] for attr in definition["attrs"])}
    for setting, value in definition["socs"][soc].items():
        name, key = setting.split(".")
        info.setdefault(name, {})[key] = value
    return info


def params_of(info: dict[str, dict[str, str]], kind: str) -> list[dict[str, str]]:
    """Its inputs or its outputs."""
    numbered = [(int(match[1]), info[key]) for key in info if (match := re.fullmatch(kind + r"(\d+)", key))]
    return [param for _, param in sorted(numbered, key=lambda pair: pair[0])]


def columns_of(info: dict[str, dict[str, str]]) -> list[tuple[str, ...]]:
    """The dtypes and formats of all parameters, once per combination that the operator supports."""
    params = params_of(info, "input") + params_of(info, "output")
    return list(zip(*(param[key].split(",") for param in params for key in ("dtype", "format")), strict=True))


def support_of(op_type: str, info: dict[str, dict[str, str]], column: int) -> dict[str, Any]:
    """Of the kernel for a column: supportInfo, by which CANN finds it."""
    described: dict[str, Any] = {}
    for kind in ("input", "output"):
        described[f"{kind}s"] = [
            {
                "name": param["name"],
                "index": index,
                "dtype": param["dtype"].split(",")[column],
                "format": param["format"].split(",")[column],
                "paramType": param["paramType"],
                "shape": [-2],
                "format_match_mode": "FormatAgnostic",
            }
            for index, param in enumerate(params_of(info, kind))
        ]
    names = [name for name in info.get("attr", {}).get("list", "").split(",") if name]
    attrs = [(name, info[f"attr_{name}"]) for name in names]
    described["attrs"] = [
        {
            "name": name,
            "dtype": snake_case(attr["type"]),
            **({"value": ZEROS[attr["type"]]} if attr["paramType"] == "required" else {}),
        }
        for name, attr in attrs
    ]
    described["simplifiedKey"] = [
        "/".join(
            [
                f"{op_type}/d={deterministic},p={precise}",
                *(
                    f"{DTYPES[param['dtype']]},2"
                    for param in described["inputs"] + described["outputs"]
                    if param["paramType"] == "required"
                ),
            ]
        )
        for deterministic in (0, 1)
        for precise in (1, 0)
    ]
    return described


# What CANN makes of a kernel's source


def task_of(source: str) -> str | None:
    """The task type that a kernel gives itself, if it is one for all of its tilings."""
    (*types,) = set(re.findall(r"KERNEL_TASK_TYPE(?:_DEFAULT)?\(.*?(KERNEL_TYPE_\w+)\)", source))
    return types[0] if len(types) == 1 and types[0] in TASKS else None


def scheduling_of(task: str, kernels: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Of the kernel's .json: which cores it is launched on, and whether they wait for each other. `kernels` are those
    of kernelList, one per key of a tiling.
    """
    ratio = TASKS[task]
    if ratio is None:
        return {
            "coreType": "VectorCore",
            "core_type": "AIV",
            "intercoreSync": 0,
            "magic": "RT_DEV_BINARY_MAGIC_ELF_AIVEC",
            "kernelList": [{"kernelName": kernel["kernelName"]} for kernel in kernels],
        }
    return {
        "coreType": "MIX",
        "intercoreSync": 1,
        "magic": "RT_DEV_BINARY_MAGIC_ELF",
        "taskRation": "tilingKey",
        "kernelList": [
            {
                "tilingKey": int(kernel["kernelName"].rpartition("_")[2]),
                "kernelType": "MIX_AIC",
                "crossCoreSync": 1,
                "taskRation": ratio,
                "kernelName": kernel["kernelName"],
            }
            for kernel in kernels
        ],
    }


def parameter_bytes(tiling_bytes: int) -> int:
    """opParaSize, for a tiling that is a plain structure."""
    return tiling_bytes + 8


def description_of(name: str, info: dict[str, dict[str, str]], column: int, task: str, tiling_bytes: int) -> dict:
    """The .json of a kernel `name` with one tiling key, 0, but for what only a compiler knows."""
    op_type = name.rpartition("_")[0]
    file = info["opFile"]["value"]
    outputs = params_of(info, "output")
    return {
        "binFileName": name,
        "binFileSuffix": ".o",
        "blockDim": -1,
        "kernelName": name,
        "memoryStamping": [],
        "opParaSize": parameter_bytes(tiling_bytes),
        "parameters": [None] * (len(params_of(info, "input")) + len(outputs) + 1),
        "workspace": {"num": 1, "size": [-1], "type": [0]},
        **scheduling_of(task, [{"kernelName": f"{name}_0"}]),
        "optionalInputMode": "gen_placeholder",
        **({"optionalOutputMode": "gen_placeholder"} if outputs else {}),
        "supportSuperKernel": 1,
        "compileInfo": {},
        "supportInfo": support_of(op_type, info, column),
        "filePath": f"{file}/{name}.json",
    }


def functions_of(info: dict[str, dict[str, str]], *, contiguous: bool) -> set[str]:
    """What the generated aclnn functions of an operator need of CANN's libnnopbase. `contiguous`: the definition says
    of inputs that they must be.
    """
    needed = {f"Nnopbase{name}" for name in ("CreateExecutorSpace", "GetExecutor", "AddTilingId", "AddSupportList")}
    needed |= {f"Nnopbase{name}" for name in ("RunForWorkspace", "RunWithWorkspace", "MsprofSysTime", "ReportApiInfo")}
    needed.add("_Z14NnopbaseOpLogEiPKc")
    for kind in ("Input", "Output"):
        for param in params_of(info, kind.lower()):
            how = "Dynamic" if param["paramType"] == "dynamic" else "IntArray" if "valueDepend" in param else ""
            needed.add(f"NnopbaseAdd{how}{kind}")
    for name, attr in info.items():
        if name.startswith("attr_"):
            needed.add("NnopbaseAddIntArrayAttr" if attr["type"] == "listInt" else "NnopbaseAddAttrWithDtype")
    if contiguous:
        for what in ("UnContiguousTensors", "RefUnContiguousTensors", "UnContExecutor", "ViewCopyExecutor", "ApiFunc"):
            needed.add(f"NnopbaseGet{what}")
        for what in ("SetUnContExecutor", "SetViewCopyExecutor", "ReleaseRefContiguousTensors"):
            needed.add(f"Nnopbase{what}")
    return needed
