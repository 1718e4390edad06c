"""The documentation: blocks of Python run, commands exist, links lead somewhere, the site has all that is public."""

import enum
import importlib.util
import inspect
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from html.parser import HTMLParser
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import figures
import pytest
import torch
import torch.distributed as dist
from check_site import dead_links
from ranks import WORLD_SIZE, RankContext, RankPool

import deep_ep
from deep_ep import debug, env, npu, quantization, strategies

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
ON_NPUS = {"npu.md"}  # tests/npu/test_npu_docs.py

FENCE = re.compile(r"^```([^`\n]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(page: Path, language: str) -> list[str]:
    return [text for name, text in FENCE.findall(page.read_text()) if name == language]


def run_page(ctx: RankContext, path: str) -> None:
    """The blocks of a page in one namespace. WORLD exists already, and aot_eager saves the minutes of inductor."""
    torch._dynamo.reset()
    name = f"page_{Path(path).stem}"  # Dynamo imports a page where a graph needs its names, and keeps it
    module = sys.modules[name] = ModuleType(name)
    compiled = partial(torch.compile, backend="aot_eager")
    with mock.patch.object(torch, "compile", compiled), mock.patch.object(dist, "init_process_group"):
        for number, block in enumerate(blocks(Path(path), "python")):
            exec(compile(block, f"{path}, block {number}", "exec"), vars(module))
    deep_ep.destroy(dist.group.WORLD)


PYTHON_PAGES = [page for page in PAGES if blocks(page, "python") and page.name not in ON_NPUS]
QUICK = {"README", "sharp_bits"}


@pytest.mark.parametrize(
    "page",
    [pytest.param(page, id=page.stem, marks=[] if page.stem in QUICK else pytest.mark.slow) for page in PYTHON_PAGES],
)
def test_python(pool: RankPool, page: Path) -> None:
    pool.run(WORLD_SIZE, run_page, str(page))


def test_pages_with_python() -> None:
    names = {"README", "from_deep_ep", "sharp_bits", "getting_started"}
    names |= {"hugging_face", "fsdp", "checkpointing", "export", "decode"}
    assert {page.stem for page in PYTHON_PAGES} == names


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_commands(page: Path) -> None:
    makefile = (ROOT / "Makefile").read_text()
    text = page.read_text()
    shell = [re.sub(r"#.*", "", block) for block in blocks(page, "bash")]
    code = "\n".join([*shell, *re.findall(r"`((?:make|python|bash)[^`\n]*)`", text)])
    for targets in re.findall(r"(?:^|[;&] *)make((?: [a-z0-9-]+)+)", code, re.MULTILINE):
        for target in targets.split():
            assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
    for module in re.findall(r"python -m ([\w.]+)", code):
        assert importlib.util.find_spec(module), module
    for file in re.findall(r"(?:python|bash) ([\w/]+\.(?:py|sh))", code):
        assert (ROOT / file).exists(), file


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", FENCE.sub("", page.read_text())):
        if link.startswith("http"):
            continue
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), link
        if anchor:
            titles = re.findall(r"^#+ (.*)$", FENCE.sub("", target.read_text()), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in titles}, link


def test_what_works_is_tested() -> None:
    status = (ROOT / "docs" / "status.md").read_text()
    table = status.split("## Works with", 1)[1].split("\n## ", 1)[0]
    lines = [line.strip("| ").split(" | ") for line in table.splitlines() if line.startswith("|")][2:]
    assert len(lines) > 10
    for what, *_, tests in [*lines, ["to the bit", *re.findall(r"\((`test_.*?`)\)", status)]]:
        named = re.findall(r"`(test_\w+\.py)(?:::(\w+))?`", tests)
        assert named, what
        for file, name in named:
            (path,) = (ROOT / "tests").rglob(file)
            assert not name or f"\ndef {name}(" in path.read_text(), f"{file}::{name}"


def test_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().split()) <= 700


def test_figures_are_up_to_date(tmp_path: Path) -> None:
    figures.main(tmp_path)
    drawn = {path.name: path.read_text() for path in tmp_path.iterdir()}
    assert drawn == {path.name: path.read_text() for path in (ROOT / "docs" / "figures").iterdir()}


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built without a warning."""
    built = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "sphinx", "-q", "-E", "-W", "--keep-going", "-b", "html", "docs", built]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (run.returncode, run.stderr) == (0, "")
    return built


class Entries(HTMLParser):
    """The entries of an API page: the texts of signature and description by anchor."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.texts: dict[str, list[str]] = {}
        self._lists: list[tuple[str, int]] = []  # that are open: their entry and which of its texts
        self.feed(page.read_text())

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        if tag == "dl":
            self._lists.append(("", 0))
        elif tag == "dt" and (anchor := dict(attributes).get("id")):
            self.texts[anchor] = ["", ""]
            self._lists[-1] = (anchor, 0)
        elif tag == "dd":
            self._lists[-1] = (self._lists[-1][0], 1)

    def handle_endtag(self, tag: str) -> None:
        if tag == "dl":
            self._lists.pop()

    def handle_data(self, text: str) -> None:
        for anchor, part in self._lists:
            if anchor:
                self.texts[anchor][part] += text


def plain(text: str) -> str:
    """Without white space and marks of code, which pages set in their own way."""
    return re.sub(r"[\s`*]", "", text)


def public() -> Iterator[tuple[str, Any]]:
    """Functions and classes that users are promised, and the methods of these classes, by name."""
    for module in (deep_ep, strategies, npu):
        for name in module.__all__:
            value = getattr(module, name)
            if inspect.isroutine(value):
                yield f"{module.__name__}.{name}", value
            elif inspect.isclass(value):
                yield f"{module.__name__}.{name}", value
                for member in dir(value) if value is deep_ep.Buffer else vars(value):
                    if not member.startswith("_") and inspect.isroutine(getattr(value, member)):
                        yield f"{module.__name__}.{name}.{member}", getattr(value, member)
    for function in (quantization.quantize, quantization.dequantize, debug.phases, debug.op_log):
        yield f"{function.__module__}.{function.__name__}", function


@pytest.mark.slow
def test_api_is_complete(site: Path) -> None:
    entries = {**Entries(site / "api.html").texts, **Entries(site / "buffer.html").texts}
    for name, value in public():
        signature, description = (plain(text) for text in entries[name])
        if inspect.isroutine(value):
            for parameter in inspect.signature(value).parameters.values():
                assert parameter.name == "self" or re.search(rf"\W\*?{parameter.name}\W", signature), (name, parameter)
                if parameter.annotation is not parameter.empty:
                    assert f"{parameter.name}:" in signature, (name, parameter)
                if parameter.default is not parameter.empty and not isinstance(parameter.default, enum.Enum):
                    assert f"={parameter.default!r}" in signature, (name, parameter)
        documented = inspect.getdoc(value)
        assert documented, name
        assert plain(documented.split("\n\n")[0]) in description, name


@pytest.mark.slow
def test_ops_are_complete(site: Path) -> None:
    entries = Entries(site / "ops.html").texts
    ops = {name.removeprefix("deep_ep::") for name in torch._C._dispatch_get_all_op_names() if "deep_ep::" in name}
    for op in sorted(ops):
        if not op.startswith("_"):
            name, _, overload = op.partition(".")
            text = entries[f"torch.ops.deep_ep.{name}"][1]
            assert f".{overload or 'default'}" in text
            schema = str(getattr(torch.ops.deep_ep, name).default._schema).removeprefix("deep_ep::")
            assert plain(schema) in plain(text)
            assert text.split("Overloads")[0].strip(), name


@pytest.mark.slow
def test_environment_is_complete(site: Path) -> None:
    entries = Entries(site / "environment.html").texts
    for variable in env.VARIABLES.values():
        text = plain(entries[f"envvar-{variable.name}"][1])
        for part in (variable.effect, variable.values, variable.default, variable.elsewhere, *variable.platforms):
            assert plain(part) in text
    for name in env.NOT_READ:
        assert name in (site / "environment.html").read_text()


@pytest.mark.slow
def test_links_of_the_site(site: Path) -> None:
    assert dead_links(site) == []
