"""python -m deep_ep.twin report --ops low_latency_dispatch low_latency_combine [--ranks 4 …] [--json FILE]"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

from . import report
from .kernels import Failed


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m deep_ep.twin", description="AscendC kernels on the twin")
    command = parser.add_subparsers(dest="command", required=True).add_parser(
        "report", help="what launches move and wait for: docs/kernels.md"
    )
    default = report.Options([])
    command.add_argument("--ops", nargs="+", required=True, metavar="OP", help=f"of {', '.join(report.OPS)}")
    for name, text in {
        "ranks": "R",
        "tokens": "T, of each rank",
        "hidden": "H",
        "top-k": "K",
        "experts": "E",
        "dtype": f"of rows: {', '.join(report.DTYPES)}",
        "arch": ", ".join(report.ARCHS),
        "cores": "that a launch may use",
        "routing": f"{', '.join(report.ROUTINGS)}: one expert gets half of all tokens",
        "seed": "of tokens and routing",
    }.items():
        value = getattr(default, name.replace("-", "_"))
        command.add_argument(f"--{name}", type=type(value), default=value, help=f"{text} (%(default)s)")
    command.add_argument("--json", type=Path, metavar="FILE", help="write everything there as well")
    given = parser.parse_args(arguments)
    try:
        options = report.Options(**{field.name: getattr(given, field.name) for field in fields(default)})
    except ValueError as error:
        command.error(str(error))
    try:
        made = report.make(options)
    except (RuntimeError, Failed) as error:
        command.exit(1, f"{command.prog}: {error}\n")
    if given.json:
        given.json.write_text(json.dumps(made, indent=1) + "\n")
    print(report.table(made))


if __name__ == "__main__":
    main()
