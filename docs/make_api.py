"""Writes docs/api.md from docstrings, signatures, schemas and the table of the environment: `make docs`.

With --check it writes nothing, and exits with 1 if the file is not what it would write.
"""

import ast
import enum
import inspect
import re
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

import deep_ep
from deep_ep import buffer, env, groups, npu, quantization, rank_rows, strategies
from deep_ep.ops import low_latency_dispatch_padded as padded

PAGE = Path(__file__).with_name("api.md")

HEAD = """# API

<!-- Made by docs/make_api.py out of the docstrings: change those, and run `make docs`. -->

{legend}

Calls that communicate trace under torch.compile. [from_deep_ep.md](from_deep_ep.md) has them beside those of
DeepEP-Ascend and DeepEP, and [sharp_bits.md](sharp_bits.md) the limits.
"""
LEGEND = (
    "T local tokens · H hidden · K top-k · E experts · R ranks · L = E/R local experts · N received rows · "
    "M num_max_dispatch_tokens_per_rank · W num_worst_tokens"
)
OPS = """What the functions and Buffer call, for code that is written against ops. A call of the packet is `.default`.
Results are in the order of the schema; handles are made of them. `deep_ep.init` has been called for the group
whose name is `group`."""

# Names of functions and classes besides those in deep_ep.__all__, by module.
BUFFER = (
    (buffer, ("Handle", "AlignedHandle", "InternodeHandle")),
    (rank_rows, ("RankHandle",)),
    (padded, ("PaddedHandle",)),
)
STRATEGIES = (
    *("register_normal_strategy", "register_low_latency_strategy", "get_normal_strategy", "get_low_latency_strategy"),
    *("NormalEPCommStrategy", "LowLatencyEPCommStrategy", "AllToAllLowLatencyCommStrategy"),
)
QUANTIZATION = ("quantize", "dequantize", "straight_through", "pack", "unpack")
DEBUGGING = ("phases", "op_log")

SECTIONS = {"Args:", "Returns:", "Raises:"}


def lines() -> Iterator[str]:
    public = {name: getattr(deep_ep, name) for name in deep_ep.__all__}
    yield HEAD.format(legend=LEGEND)
    yield "## Functions\n"
    for name, value in public.items():
        if inspect.isfunction(value):
            yield from entry(f"deep_ep.{name}", value)
    classes = {name: value for name, value in public.items() if inspect.isclass(value)}
    for name in ("DispatchOutput", "DispatchHandle", "LowLatencyOutput", "LowLatencyHandle"):
        yield from entry(f"deep_ep.{name}", classes.pop(name))
    yield "## Buffer\n"
    yield from entry("deep_ep.Buffer", classes.pop("Buffer"))
    for module, names in BUFFER:
        for name in names:
            if inspect.isclass(getattr(module, name)):
                yield from entry(f"{module.__name__}.{name}", getattr(module, name))
    yield "## Strategies\n"
    yield f"`deep_ep.strategies` has {', '.join(f'`{name}`' for name in strategies.__all__)}.\n"
    for name in STRATEGIES:
        yield from entry(f"deep_ep.strategies.{name}", getattr(strategies, name))
    yield "## Events, configs and choices\n"
    for name, value in classes.items():
        yield from entry(f"deep_ep.{name}", value)
    yield "## Ops\n"
    yield OPS + "\n"
    yield from schemas()
    yield "## Quantised rows\n"
    yield f"Modes: {', '.join(f'`{mode}`' for mode in quantization.MODES)}.\n"
    for name in QUANTIZATION:
        yield from entry(f"deep_ep.quantization.{name}", getattr(quantization, name))
    yield "## Environment\n"
    yield from environment()
    yield "## NPUs\n"
    for name in npu.__all__:
        yield from entry(f"deep_ep.npu.{name}", getattr(npu, name))
    yield "## Debugging\n"
    for name in DEBUGGING:
        yield from entry(f"deep_ep.groups.{name}", getattr(groups, name))


def entry(name: str, value: Any) -> Iterator[str]:
    """A function, or a class with its members."""
    yield f"### {name}\n"
    if inspect.isfunction(value):
        yield from function(value)
        return
    yield from described(inspect.getdoc(value) or "")
    if issubclass(value, enum.Enum):
        yield "".join(f"- **{member.name}** = {member.value!r}\n" for member in value)
        return
    if issubclass(value, tuple):
        texts = attributes(value)
        yield "".join(f"- **{field}**{texts.get(field, '')}\n" for field in value._fields)  # type: ignore[attr-defined]
    elif is_dataclass(value):
        yield "".join(f"- **{field.name}** = {field.default}\n" for field in fields(value))
    elif "__init__" in vars(value):
        yield from function(vars(value)["__init__"], value.__name__)
    for member in members(value):
        yield f"#### {value.__name__}.{member}\n"
        found = inspect.getattr_static(value, member)
        if isinstance(found, property):
            yield from described(inspect.getdoc(found) or "")
        else:
            yield from function(getattr(value, member))


def members(cls: type) -> list[str]:
    """Public methods and properties, those of the class itself first, each class's in the order of its source."""
    found = [
        name
        for base in cls.__mro__
        if base.__module__.startswith("deep_ep")
        for name, member in vars(base).items()
        if not name.startswith("_") and isinstance(member, property | staticmethod | type(members))
    ]
    return list(dict.fromkeys(found))


def function(value: Any, name: str | None = None) -> Iterator[str]:
    node = parsed(value)
    assert isinstance(node, ast.FunctionDef)
    arguments = [part for part in split(ast.unparse(node.args)) if part != "self"]
    returns = f" -> {ast.unparse(node.returns)}" if node.returns and name is None else ""
    one = f"{name or node.name}({', '.join(arguments)}){returns}"
    if len(one) > 110:
        one = f"{name or node.name}(\n" + "".join(f"    {part},\n" for part in arguments) + f"){returns}"
    yield f"```text\n{one.replace(chr(39), chr(34))}\n```\n"
    yield from described(inspect.getdoc(value) or "" if name is None else "")


def split(arguments: str) -> list[str]:
    """`a: int, b: tuple[int, int]` at the commas that are not within brackets."""
    parts, depth = [""], 0
    for character in arguments:
        depth += (character in "([{") - (character in ")]}")
        if character == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    return [re.sub(r"(: .*?)=", r"\1 = ", part.strip()) for part in parts if part.strip()]


def parsed(value: Any) -> ast.stmt:
    return ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(value)))).body[0]


def attributes(cls: type) -> dict[str, str]:
    """The strings below the fields of a class."""
    body = parsed(cls).body  # type: ignore[attr-defined]
    return {
        field.target.id: ": " + " ".join(inspect.cleandoc(text.value.value).split())
        for field, text in pairwise(body)
        if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr)
    }


def described(text: str) -> Iterator[str]:
    """A docstring as Markdown: its sections as lists, where they have names."""
    for block in re.split(r"\n(?=\S)", text):
        head, _, rest = block.partition("\n")
        if head.strip() in SECTIONS:
            yield f"**{head.strip()}**\n"
            yield items(textwrap.dedent(rest).strip("\n")) + "\n"
        else:
            yield block.rstrip() + "\n" * block.endswith("\n")
    yield ""


def items(text: str) -> str:
    """`name: text` lines, each with what is indented below it, as a list; or else the text as it is."""
    if not re.match(r"[\w, ]+: ", text):
        return text
    joined = (" ".join(item.split()) for item in re.split(r"\n(?=\S)", text))
    return "\n".join("- " + re.sub(r"^([\w, ]+): ", r"**\1**: ", item) for item in joined)


def schemas() -> Iterator[str]:
    names = {name.split("::")[1] for name in torch._C._dispatch_get_all_op_names() if name.startswith("deep_ep::")}
    for name in sorted({name.split(".")[0] for name in names if not name.startswith("_")}):
        packet = getattr(torch.ops.deep_ep, name)
        overloads = sorted(packet.overloads(), key=lambda overload: (overload != "default", overload))
        schema = str(getattr(packet, overloads[0])._schema).removeprefix("deep_ep::")
        module = sys.modules.get(f"deep_ep.ops.{name}")
        purpose = "" if module is None else (inspect.getdoc(module) or "").split("\n")[0].partition(": ")[2]
        yield f"### torch.ops.deep_ep.{name}\n"
        listed = ", ".join(f"`.{overload}`" for overload in overloads)
        yield f"Overloads: {listed}. {purpose[:1].upper() + purpose[1:]}\n"
        yield f"```text\n{textwrap.fill(schema, 116, subsequent_indent='    ', break_on_hyphens=False)}\n```\n"


def environment() -> Iterator[str]:
    yield (inspect.getdoc(env) or "").split("\n\n", 1)[1] + "\n"
    yield "| variable | default | allowed | effect |\n|---|---|---|---|"
    for variable in env.VARIABLES.values():
        where = (
            f" Only on {', '.join(variable.platforms)}; elsewhere: {variable.elsewhere}" if variable.platforms else ""
        )
        yield f"| `{variable.name}` | {variable.default or 'not set'} | {variable.values} | {variable.effect}{where} |"
    yield "\nNot read, though other releases of DeepEP-Ascend read them:\n"
    yield "".join(f"- `{name}`: {instead}.\n" for name, instead in env.NOT_READ.items())


def page() -> str:
    text = "\n".join(lines())
    return re.sub(r"\n{3,}", "\n\n", text).rstrip() + "\n"


def main() -> int:
    made = page()
    if "--check" not in sys.argv[1:]:
        PAGE.write_text(made)
        return 0
    is_new = PAGE.exists() and PAGE.read_text() == made
    if not is_new:
        print(f"{PAGE} is out of date: run `make docs`", file=sys.stderr)
    return 0 if is_new else 1


if __name__ == "__main__":
    sys.exit(main())
