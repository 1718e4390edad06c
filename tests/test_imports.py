"""Imports of the package run one way: no circle, and no way from a folder up to a higher one."""

import ast
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1] / "python" / "deep_ep"
FOLDERS = ("env", "npu", "kernels", "ops", "buffer", "strategies")
"""From low to high. A module beside them belongs to none, and may not lead from one up to another either."""

Graph = dict[str, set[str]]


def modules(package: Path) -> dict[str, Path]:
    """The files of a package, by the modules' names; the package itself is ""."""
    named = {}
    for path in package.rglob("*.py"):
        parts = path.relative_to(package).with_suffix("").parts
        named[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return named


def imports(package: Path) -> Graph:
    """By module: what it imports of its package, wherever in the file, with the folders that this loads as well."""
    files = modules(package)
    graph: Graph = {}
    for name, path in files.items():
        folder = name if path.name == "__init__.py" else name.rpartition(".")[0]
        found = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                found |= {one.name.removeprefix(package.name).lstrip(".") for one in node.names if _is_of(package, one)}
            elif isinstance(node, ast.ImportFrom):
                parts = folder.split(".") if folder else []
                where = parts[: len(parts) - node.level + 1] if node.level else []
                if node.level == 0 and (node.module or "").split(".")[0] != package.name:
                    continue
                module = node.module or ""
                where += (module if node.level else module.removeprefix(package.name).lstrip(".")).split(".")
                origin = ".".join(filter(None, where))
                for one in node.names:
                    inner = f"{origin}.{one.name}".lstrip(".")
                    found.add(inner if inner in files else origin)
        loaded = {".".join(one.split(".")[:n]) for one in found for n in range(1, one.count(".") + 2)}
        own = {".".join(name.split(".")[:n]) for n in range(1, name.count(".") + 2)}
        graph[name] = (loaded & files.keys()) - own | (found & {""})
    return graph


def _is_of(package: Path, name: ast.alias) -> bool:
    return name.name.split(".")[0] == package.name


def reached(graph: Graph, start: str) -> set[str]:
    """What is imported with `start`, by whatever way."""
    known: set[str] = set()
    new = set(graph[start])
    while new:
        known |= new
        new = {following for one in new for following in graph[one]} - known
    return known


def circles(graph: Graph) -> list[str]:
    return sorted(name for name in graph if name in reached(graph, name))


def upward(graph: Graph, folders: tuple[str, ...]) -> list[tuple[str, str]]:
    """Modules of a folder, with what they reach in a higher one."""

    def height(name: str) -> int:
        folder = name.split(".")[0]
        if name.endswith(".__main__"):  # a program, which nothing imports
            return len(folders)
        return folders.index(folder) if folder in folders else -1

    lead = [(name, one) for name in graph if height(name) >= 0 for one in reached(graph, name)]
    return sorted((name, one) for name, one in lead if height(one) > height(name))


def test_no_circle() -> None:
    assert circles(imports(PACKAGE)) == []


def test_no_way_up() -> None:
    graph = imports(PACKAGE)
    folders = {path.name for path in PACKAGE.iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert folders <= set(FOLDERS)
    assert upward(graph, FOLDERS) == []


def test_what_is_found(tmp_path: Path) -> None:
    package = tmp_path / "house"
    files = {
        "__init__": "from .roof import tile",
        "roof/__init__": "",
        "roof/tile": "from .. import stair\nfrom ..cellar.wine import bottle",
        "cellar/__init__": "",
        "cellar/wine": "def bottle():\n    import house.stair",
        "stair": "from .roof import tile as upper",
    }
    for name, text in files.items():
        (package / name).parent.mkdir(parents=True, exist_ok=True)
        (package / f"{name}.py").write_text(text)
    graph = imports(package)
    assert graph["roof.tile"] == {"stair", "cellar", "cellar.wine"}
    assert graph["cellar.wine"] == {"stair"} and graph["stair"] == {"roof", "roof.tile"}
    assert circles(graph) == ["cellar.wine", "roof.tile", "stair"]
    assert ("cellar.wine", "roof.tile") in upward(graph, ("cellar", "roof"))
    assert upward(graph, ("roof", "cellar")) == [("roof.tile", "cellar"), ("roof.tile", "cellar.wine")]
