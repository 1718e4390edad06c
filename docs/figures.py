"""Draws the figures of README.md and docs/concepts.md: `python docs/figures.py` writes docs/figures/*.svg.

A figure has a background of its own and two sets of colours, of which the reader's color scheme chooses one.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from xml.sax.saxutils import escape

FOLDER = Path(__file__).parent / "figures"

STYLE = """
svg { --back: #ffffff; --text: #1f2328; --soft: #59636e; --line: #818b98; --panel: #f6f8fa; --edge: #d1d9e0;
  --a: #cfe2ff; --b: #ffe0b3; --empty: #ffffff; --ink-a: #1a5fb4; --ink-b: #a35200; --mark: #1a7f37; --bad: #cf222e; }
@media (prefers-color-scheme: dark) { svg { --back: #15191f; --text: #e6edf3; --soft: #a3adb8; --line: #8b949e;
  --panel: #1f252d; --edge: #3d444d; --a: #1d4277; --b: #6e430a; --empty: #15191f; --ink-a: #79b0ff; --ink-b: #f0a94a;
  --mark: #56d364; --bad: #ff7b72; } }
text { font: 14px system-ui, "Segoe UI", "DejaVu Sans", sans-serif; fill: var(--text); }
.code { font-family: ui-monospace, Menlo, "DejaVu Sans Mono", monospace; font-size: 13px; }
.soft { fill: var(--soft); font-size: 13px; } .title { font-weight: 600; font-size: 15px; } .bad { fill: var(--bad); }
.back { fill: var(--back); stroke: var(--edge); } .panel { fill: var(--panel); stroke: var(--edge); }
.a { fill: var(--a); stroke: var(--ink-a); } .b { fill: var(--b); stroke: var(--ink-b); }
.empty { fill: var(--empty); stroke: var(--line); stroke-dasharray: 3 3; }
.dropped { fill: var(--empty); stroke: var(--bad); }
.box { fill: var(--back); stroke: var(--line); } .strong { fill: var(--back); stroke: var(--mark); stroke-width: 2; }
path { fill: none; stroke: var(--line); stroke-width: 1.5; } path.la { stroke: var(--ink-a); }
path.lb { stroke: var(--ink-b); }
path.cross { stroke: var(--bad); } marker path { fill: var(--line); stroke: none; }
""".strip()

CELL = 26
"""The height of a row."""

# Two ranks with three and two tokens, two experts each, K = 2: the experts of each token.
CHOICES = {"a0": (0, 2), "a1": (1, 3), "a2": (0, 1), "b0": (2, 3), "b1": (0, 2)}


class Figure:
    """Shapes of one drawing, in the order in which they are painted."""

    def __init__(self, width: int, height: int, title: str) -> None:
        self.size, self.title = (width, height), title
        self.parts = [f'<rect class="back" x="0.5" y="0.5" width="{width - 1}" height="{height - 1}" rx="8"/>']

    def text(self, x: float, y: float, text: str, kind: str = "", anchor: str = "start") -> None:
        self.parts.append(f'<text class="{kind}" x="{x:g}" y="{y:g}" text-anchor="{anchor}">{escape(text)}</text>')

    def box(self, x: float, y: float, width: float, height: float, kind: str, *lines: str, code: str = "code") -> None:
        """A rectangle with lines of text in its middle; the first is code."""
        self.parts.append(f'<rect class="{kind}" x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="4"/>')
        for n, line in enumerate(lines):
            middle = y + height / 2 + 5 + 19 * (n - (len(lines) - 1) / 2)
            self.text(x + width / 2, middle, line, code if n == 0 else "soft", "middle")

    def row(self, x: float, y: float, width: float, token: str, text: str | None = None) -> None:
        self.box(x, y, width, CELL - 4, token[0], token if text is None else text)

    def curve(self, start: tuple[float, float], end: tuple[float, float], kind: str) -> None:
        middle = (start[0] + end[0]) / 2
        points = f"M{start[0]:g} {start[1]:g} C{middle:g} {start[1]:g} {middle:g} {end[1]:g} {end[0]:g} {end[1]:g}"
        self.parts.append(f'<path class="{kind}" d="{points}"/>')

    def arrow(self, *points: tuple[float, float]) -> None:
        way = " L".join(f"{x:g} {y:g}" for x, y in points)
        self.parts.append(f'<path d="M{way}" marker-end="url(#head)"/>')

    def svg(self) -> str:
        width, height = self.size
        head = (
            '<marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="8" markerHeight="8" orient="auto">'
            '<path d="M0 0 L8 4 L0 8 z"/></marker>'
        )
        return "\n".join(
            (
                f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}"'
                f' height="{height}" role="img" aria-label="{escape(self.title)}">',
                f"<title>{escape(self.title)}</title>",
                f"<style>{STYLE}</style>",
                f"<defs>{head}</defs>",
                *self.parts,
                "</svg>\n",
            )
        )


def received(expert: int) -> list[str]:
    """The tokens of an expert, ordered by source rank and token."""
    return [token for token, experts in CHOICES.items() if expert in experts]


def rows() -> Figure:
    """Where rows go in dispatch and combine."""
    figure = Figure(860, 436, "dispatch sends each token to the ranks of its experts, combine brings the results back")
    tops = {"a": 42, "b": 236}
    width, columns = 104, {"x": 84, "recv": 378, "out": 672}
    for rank, top in enumerate(tops.values()):
        figure.box(14, top, 832, 182, "panel")
        figure.text(26, top + 26, f"rank {rank}", "title")
    for name, text in (("x", "x [T, H]"), ("recv", "recv_x [N, H]"), ("out", "result [T, H]")):
        figure.text(columns[name] + width / 2, 30, text, "code", "middle")
    figure.text((columns["x"] + columns["recv"] + width) / 2, 30, "dispatch →", "title", "middle")
    figure.text((columns["recv"] + columns["out"] + width) / 2, 30, "combine →", "title", "middle")

    at: dict[tuple[str, int], float] = {}
    for rank, top in enumerate(tops.values()):
        y = top + 22.0
        for expert in (2 * rank, 2 * rank + 1):
            start = y
            for token in received(expert):
                at[token, expert] = y + 11
                y += CELL
            figure.text(columns["recv"] + width + 8, (start + y) / 2 + 3, f"expert {expert}", "soft")
            y += 10
    ends = {}
    for source, top in tops.items():
        tokens = [token for token in CHOICES if token[0] == source]
        for n, token in enumerate(tokens):
            ends[token] = top + 100 + CELL * (n - len(tokens) / 2)
    for token, experts in CHOICES.items():
        y = ends[token] + 11
        for expert in experts:
            figure.curve((columns["x"] + width, y), (columns["recv"], at[token, expert]), f"l{token[0]}")
            figure.curve((columns["recv"] + width + 70, at[token, expert]), (columns["out"], y), f"l{token[0]}")
    for token, y in ends.items():
        chosen = " ".join(map(str, CHOICES[token]))
        figure.row(columns["x"], y, width, token, f"{token} → {chosen}")
        figure.row(columns["out"], y, width, token, f"Σ w·y({token})")
    for (token, _), y in at.items():
        figure.row(columns["recv"], y - 11, width, token)
    return figure


def contracts() -> Figure:
    """What rank 0 receives under the two row contracts."""
    figure = Figure(860, 410, "the two row contracts: one row per token and expert, or one row per token and rank")
    for left, name, of in ((14, "expert", "of DeepEP-Ascend and the functions"), (437, "rank", "of DeepEP")):
        figure.box(left, 14, 409, 382, "panel")
        figure.text(left + 14, 40, f'rows="{name}"', "title code")
        figure.text(left + 150, 40, of, "soft")
        figure.text(left + 14, 72, "normal mode, recv_x of rank 0", "")
        figure.text(left + 14, 292, "low latency, recv_x of rank 0 with M = 3", "")
    y = 84.0
    for expert in (0, 1):
        start = y
        for token in received(expert):
            figure.row(28, y, 120, token)
            y += CELL
        figure.text(162, (start + y) / 2 + 3, f"expert {expert}", "soft")
        y += 6
    figure.text(28, 244, "by local expert, source rank, token, k", "soft")
    figure.text(28, 264, "combine: Σ over k of weight · row", "soft")
    y = 84.0
    for token, experts in CHOICES.items():
        local = [str(e) for e in experts if e < 2]
        if local:
            figure.row(451, y, 120, token)
            figure.text(585, y + 16, f"goes to expert {' and '.join(local)}", "soft")
            y += CELL
    figure.text(451, 244, "by source rank, token", "soft")
    figure.text(451, 264, "combine: plain Σ; the caller has applied the weights", "soft")

    # M = 3 tokens per rank, min(K, L) = 2: 12 places. Padded: two experts with R·M = 6 places each.
    packed = received(0) + received(1)
    for n in range(12):
        x = 28 + 31 * n
        if n < len(packed):
            figure.box(x, 306, 29, CELL - 2, packed[n][0], packed[n])
        else:
            figure.box(x, 306, 29, CELL - 2, "empty")
    figure.text(28, 382, "[R·M·min(K, L), H]: packed, unused rows at the end", "soft")
    for expert in (0, 1):
        y = 306 + 30 * expert
        for n in range(6):
            tokens = received(expert)
            if n < len(tokens):
                figure.box(451 + 31 * n, y, 29, CELL - 2, tokens[n][0], tokens[n])
            else:
                figure.box(451 + 31 * n, y, 29, CELL - 2, "empty")
        figure.text(648, y + 17, f"expert {expert}", "soft")
    figure.text(451, 382, "[L, R·M, H]: a block for each expert", "soft")
    return figure


def shapes() -> Figure:
    """The two shape modes."""
    figure = Figure(860, 316, "exact row counts, and capacity with room to spare or rows that do not fit")
    tokens = received(0) + received(1)
    static = "static shape, num_dropped ="
    columns = (
        (14, 0, "exact: N = 5", len(tokens), ("the host waits for N,", "no row is lost")),
        (300, 8, "capacity, enough", 8, (f"{static} 0,", "unused rows: 0, with ids of -1")),
        (586, 3, "capacity, too little", 3, (f"{static} 2,", "dropped rows add 0 to results")),
    )
    for left, worst, title, room, below in columns:
        figure.box(left, 14, 260, 288, "panel")
        figure.text(left + 14, 38, f"num_worst_tokens={worst}", "code")
        figure.text(left + 14, 60, title, "title")
        for n in range(max(room, len(tokens))):
            y = 72 + 22 * n
            kind = "dropped" if n >= room else tokens[n][0] if n < len(tokens) else "empty"
            figure.box(left + 14, y, 110, 18, kind, tokens[n] if n < len(tokens) else "")
            if kind == "dropped":
                figure.parts.append(f'<path class="cross" d="M{left + 14} {y + 18} L{left + 124} {y}"/>')
                figure.text(left + 134, y + 14, "dropped", "bad")
        for n, line in enumerate(below):
            figure.text(left + 14, 270 + 19 * n, line, "soft")
    return figure


def call() -> Figure:
    """How a call reaches a kernel."""
    figure = Figure(860, 470, "how a call reaches a kernel: function or Buffer, op overload, kernel of the device")
    figure.box(190, 20, 220, 50, "box", "deep_ep.dispatch", "function")
    figure.box(450, 20, 220, 50, "box", "Buffer.dispatch", "DeepEP's calls")
    figure.box(
        230, 112, 400, 50, "strong", "torch.ops.deep_ep.dispatch", "fake kernel, autograd formula, NPU converter"
    )
    figure.arrow((300, 70), (360, 110))
    figure.arrow((560, 70), (500, 110))
    figure.text(648, 94, "the strategy chooses", "soft")
    figure.text(648, 112, "the overload, in Python", "soft")
    figure.text(648, 130, "that Dynamo traces", "soft")
    for x, overload, what in ((110, ".default", "this library's kernels"), (445, ".alltoall", "torch.distributed"),
                              (664, ".ops", "low latency only")):  # fmt: skip
        width = 250 if overload == ".default" else 182
        figure.box(x, 210, width, 50, "box", overload, what)
        figure.arrow((min(max(x + width / 2, 260), 600), 162), (x + width / 2, 208))
    leaves = (
        (14, 132, "CPU", ("C++ on windows", "in shared memory")),
        (158, 132, "NPU, eager", ("task queue, aclnn,", "AscendC kernel")),
        (302, 132, "NPU graph", ("GE node, then the", "same kernel")),
        (445, 182, "any device", ("all_to_all on gloo", "or HCCL")),
        (664, 182, "NPU", ("MoeDistribute…V2", "of torch_npu")),
    )
    for n, (x, width, title, lines) in enumerate(leaves):
        figure.box(x, 312, width, 84, "panel", title, *lines, code="title")
        start = (235 if n < 3 else x + width / 2, 260)
        figure.arrow(start, (x + width / 2, 310))
    figure.text(
        430,
        430,
        "Eager calls and compiled graphs issue the same op: a graph holds the overload, so another",
        "soft",
        "middle",
    )
    figure.text(
        430,
        449,
        "strategy is another graph. Backward calls ops of its own, dispatch_backward and combine_backward.",
        "soft",
        "middle",
    )
    return figure


def window() -> Figure:
    """The window of a rank on a CPU."""
    figure = Figure(
        860, 372, "each rank has a window that its peers map; senders write rows where the receiver reads them"
    )
    for left, name, kind in ((14, "rank 0", "a"), (586, "rank 1", "b")):
        figure.box(left, 14, 260, 344, "panel")
        figure.text(left + 14, 40, f"process of {name}", "title")
        figure.text(left + 14, 66, "x, in its own memory", "soft")
        for n in range(2):
            figure.row(left + 14, 76 + CELL * n, 110, f"{kind}{n}")
        figure.text(left + 14, 160, "its window, mapped by all ranks", "soft")
        figure.box(left + 14, 170, 232, 36, "box", "posts")
        figure.text(left + 130, 228, "recv_x: this memory itself", "soft", "middle")
        for n, token in enumerate((f"a{1 if name == 'rank 1' else 0}", f"b{0 if name == 'rank 1' else 1}")):
            figure.row(left + 24, 238 + CELL * n, 212, token)
        figure.box(left + 14, 298, 232, 46, "empty", "free, or not there yet", code="soft")
    figure.curve((138, 113), (610, 249), "la")
    figure.curve((600, 113), (250, 275), "lb")
    figure.box(286, 172, 288, 34, "box", "1. what each rank brings; one verdict", code="soft")
    figure.arrow((286, 189), (262, 189))
    figure.arrow((574, 189), (598, 189))
    figure.text(430, 96, "2. every rank computes where its rows go", "soft", "middle")
    figure.text(430, 116, "and writes them there", "soft", "middle")
    figure.text(430, 312, "3. when all have written, recv_x is a tensor", "soft", "middle")
    figure.text(430, 331, "on that memory; it goes back to the window", "soft", "middle")
    figure.text(430, 350, "when the tensor dies", "soft", "middle")
    return figure


FIGURES: dict[str, Callable[[], Figure]] = {
    "rows": rows,
    "contracts": contracts,
    "shapes": shapes,
    "call": call,
    "window": window,
}


def main(folder: Path = FOLDER) -> None:
    folder.mkdir(exist_ok=True)
    for name, draw in FIGURES.items():
        (folder / f"{name}.svg").write_text(draw().svg())


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
