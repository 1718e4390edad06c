"""The documentation: blocks of Python run, commands exist, links lead somewhere, docs/api.md is what is in the code."""

import importlib.util
import re
import subprocess
import sys
from functools import partial
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from ranks import WORLD_SIZE, RankContext, RankPool

import deep_ep

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
ON_NPUS = {"npu.md"}  # tests/npu/test_npu_docs.py

FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(page: Path, language: str) -> list[str]:
    return [text for name, text in FENCE.findall(page.read_text()) if name == language]


def run_page(ctx: RankContext, path: str) -> None:
    """The blocks of a page in one namespace. WORLD exists already, and aot_eager saves the minutes of inductor."""
    torch._dynamo.reset()
    names: dict[str, object] = {"__name__": "page"}
    compiled = partial(torch.compile, backend="aot_eager")
    with mock.patch.object(torch, "compile", compiled), mock.patch.object(dist, "init_process_group"):
        for number, block in enumerate(blocks(Path(path), "python")):
            exec(compile(block, f"{path}, block {number}", "exec"), names)
    deep_ep.destroy(dist.group.WORLD)


PYTHON_PAGES = [page for page in PAGES if blocks(page, "python") and page.name not in ON_NPUS]


@pytest.mark.parametrize("page", PYTHON_PAGES, ids=lambda page: page.stem)
def test_python(pool: RankPool, page: Path) -> None:
    pool.run(WORLD_SIZE, run_page, str(page))


def test_pages_with_python() -> None:
    assert {page.name for page in PYTHON_PAGES} == {"README.md", "from_deep_ep.md", "sharp_bits.md"}


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


@pytest.mark.slow
def test_api_page_is_up_to_date() -> None:
    command = [sys.executable, "docs/make_api.py", "--check"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
