"""What the site takes out of the code besides docstrings: the ops with their schemas, and the environment.

    ```{ops}
    ```

lists every op of the namespace, and ``{environment}`` every variable. Names that lead nowhere by themselves are
completed: a type in a signature by its module, a path of the repository outside of docs/ by itself.
"""

import inspect
import os
import re
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from docutils import nodes
from sphinx.addnodes import download_reference, pending_xref
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.util.docutils import SphinxDirective

from deep_ep import env

ROOT = Path(__file__).parent.parent
PAGES_OF_ROOT = {"README.md": "index", "CONTRIBUTING.md": "contributing", "CHANGELOG.md": "changelog"}


def op_names() -> list[str]:
    """Ops for users, without those that begin with an underscore."""
    names = {name.split("::")[1] for name in torch._C._dispatch_get_all_op_names() if name.startswith("deep_ep::")}
    return sorted({name.split(".")[0] for name in names if not name.startswith("_")})


def purpose_of(op: str) -> str:
    """What the first line of its module says behind its name, or else what another one says that it is."""
    module = sys.modules.get(f"deep_ep.ops.{op}")
    text = "" if module is None else (inspect.getdoc(module) or "").split("\n")[0].partition(": ")[2]
    if op.endswith("_start"):
        text = f"begins {op.removesuffix('_start')}, which wait completes."
    for other in (name for name in sorted(sys.modules) if name.startswith("deep_ep.ops.")):
        if not text and (found := re.search(rf"^{op} is ([^:.]*)", inspect.getdoc(sys.modules[other]) or "", re.M)):
            text = f"{found[1]}."
    return text[:1].upper() + text[1:]


def ops() -> Iterator[str]:
    for name in op_names():
        packet = getattr(torch.ops.deep_ep, name)
        overloads = sorted(packet.overloads(), key=lambda overload: (overload != "default", overload))
        schema = str(getattr(packet, overloads[0])._schema).removeprefix("deep_ep::")
        yield f"::::{{py:data}} torch.ops.deep_ep.{name}\n"
        yield f"{purpose_of(name)} Overloads: {', '.join(f'`.{overload}`' for overload in overloads)}.\n"
        yield f"```text\n{textwrap.fill(schema, 84, subsequent_indent='    ', break_on_hyphens=False)}\n```\n::::\n"


def environment() -> Iterator[str]:
    for variable in env.VARIABLES.values():
        yield f"::::{{envvar}} {variable.name}\n"
        yield f"{variable.effect}\n"
        if variable.platforms:
            yield f"Only on {', '.join(variable.platforms)}; elsewhere: {variable.elsewhere}\n"
        yield f"Default: {variable.default or 'not set'}. Allowed: {variable.values}.\n::::\n"


def environment_not_read() -> Iterator[str]:
    yield from (f"- `{name}`: {instead}." for name, instead in env.NOT_READ.items())


WRITERS = {"ops": ops, "environment": environment, "environment-not-read": environment_not_read}


class FromCode(SphinxDirective):
    """Markdown that one of WRITERS writes."""

    def run(self) -> list[nodes.Node]:
        text = "\n".join(WRITERS[self.name]())
        self.env.note_reread()
        return self.parse_text_to_nodes(text, allow_section_headings=True)


def returned(app: Sphinx, what: str, name: str, thing: object, options: object, lines: list[str]) -> None:
    """The section "Returns:" of a docstring as it is, and a list where results have names.

    Napoleon takes what is before a colon for a type, and all results for one.
    """
    if "Returns:" not in lines:
        return
    start = lines.index("Returns:")
    end = next((n for n in range(start + 1, len(lines)) if lines[n] and not lines[n].startswith(" ")), len(lines))
    text = textwrap.dedent("\n".join(lines[start + 1 : end])).strip("\n")
    if re.match(r"[\w, ]+: ", text):
        text = re.sub(r"^([\w, ]+): ", r"- **\1** -- ", text, flags=re.MULTILINE)
        text = re.sub(r"^(?=\S)(?!- )", "- ", text, flags=re.MULTILINE)
    lines[start:end] = [":returns:", *textwrap.indent(text, "    ").split("\n"), ""]


def described(app: Sphinx, what: str, name: str, thing: object, options: object, lines: list[str]) -> None:
    """Attributes: what stands before the colon stays there, which Napoleon takes for a type; no texts of namedtuple."""
    shape = next((line for line in lines if line.startswith(":type: ")), None)
    if shape is not None:
        lines[:] = [f"{shape.removeprefix(':type: ')}: {lines[0]}", *(line for line in lines[1:] if line != shape)]
    elif lines and re.match(r"Alias for field number \d+$", lines[0]):
        lines.clear()


def complete(app: Sphinx, environment: BuildEnvironment, node: pending_xref, text: nodes.TextElement) -> Any:
    """A type of a signature, `deep_ep.ops.dispatch.DispatchOutput`, is in the API as `deep_ep.DispatchOutput`."""
    target = node.get("reftarget", "")
    if node.get("refdomain") == "py" and target.startswith("deep_ep."):
        python = environment.domains.python_domain
        short = f"deep_ep.{target.rpartition('.')[2]}"
        if short != target and short in python.objects:
            return python.resolve_xref(environment, node["refdoc"], app.builder, "obj", short, node, text)
    return None


def lead_out(app: Sphinx, doctree: nodes.document) -> None:
    """Links to paths of the repository: a page stays a page, a file can be loaded, a folder is its name alone.

    Pages of the root are included in pages of docs/, so their links are relative to the root.
    """
    environment = app.env
    for node in list(doctree.findall(pending_xref)):
        if node.get("reftype") != "myst":
            continue
        target, _, anchor = node["reftarget"].partition("#")
        if node.get("refdomain") == "doc":
            target, anchor = f"{target}.md", node["reftargetid"]
        for folder in (ROOT / "docs" / environment.docname).parent, ROOT:
            path = (folder / target).resolve()
            if not target or not path.exists():
                continue
            page = PAGES_OF_ROOT.get(path.relative_to(ROOT).as_posix()) or environment.path2doc(path)
            if path.is_dir():
                node.replace_self(node.children)
            elif page in environment.found_docs:
                node.attributes.update(refdomain="doc", reftarget=page, reftargetid=anchor or None)
            else:
                found = os.path.relpath(path, (ROOT / "docs" / environment.docname).parent)
                node.replace_self(download_reference("", *node.children, reftarget=found, refdoc=environment.docname))
            break


def setup(app: Sphinx) -> dict[str, bool]:
    for name in WRITERS:
        app.add_directive(name, FromCode)
    app.connect("autodoc-process-docstring", returned, priority=400)
    app.connect("autodoc-process-docstring", described, priority=600)
    app.connect("missing-reference", complete)
    app.connect("doctree-read", lead_out, priority=100)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
