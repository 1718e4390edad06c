"""python -m tools.twin report --ops low_latency_dispatch low_latency_combine [--ranks 4 …] [--json FILE]
python -m tools.twin model [--write docs]
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

from . import model, report
from .kernels import Failed


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.twin", description="AscendC kernels on the twin")
    commands = parser.add_subparsers(dest="command", required=True)
    _add_report(commands.add_parser("report", help="what launches move and wait for: docs/kernels.md"))
    _add_model(commands.add_parser("model", help="how long launches may take on A2, A3 and A5: docs/time_model.md"))
    given = parser.parse_args(arguments)
    given.run(given)


def _add_report(command: argparse.ArgumentParser) -> None:
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

    def run(given: argparse.Namespace) -> None:
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

    command.set_defaults(run=run)


def _add_model(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--write", type=Path, metavar="FOLDER", help="that of time_model.md and time_model.svg, instead of printing"
    )
    command.set_defaults(run=lambda given: model.write(given.write) if given.write else print(model.text()))


if __name__ == "__main__":
    main()
