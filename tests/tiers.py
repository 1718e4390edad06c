"""What the tiers of `make test` did: python tests/tiers.py NAME REPORT [NAME REPORT ...], with pytest's junit-xml.

Exits with 1 unless all of them ran to the end and nothing failed.
"""

import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

# Of why a test failed.
LINES, LINE = 20, 200


def told(name: str, report: Path) -> tuple[str, list[str]]:
    """A line about the tier, and lines about the tests that failed in it."""
    if not report.exists():
        return f"{name}: did not come to its end", []
    failed, counts, seconds = [], dict.fromkeys(("passed", "failed", "skipped"), 0), 0.0
    for suite in ElementTree.parse(report).iter("testsuite"):
        seconds += float(suite.get("time", 0))
        for case in suite.iter("testcase"):
            why = [child.get("message", "") for child in case if child.tag in ("failure", "error")]
            kind = "failed" if why else "skipped" if case.find("skipped") is not None else "passed"
            counts[kind] += 1
            if why:
                failed.append(f"  failed: {case.get('classname')}::{case.get('name')}")
                failed += [f"    {line[:LINE]}" for line in why[0].splitlines()[:LINES]]
    minutes, seconds = divmod(round(seconds), 60)
    said = ", ".join(f"{count} {kind}" for kind, count in counts.items() if count) or "no tests"
    return f"{name}: {said} in {minutes} min {seconds} s", failed


def main(arguments: list[str]) -> int:
    status = 0
    for name, report in zip(arguments[::2], arguments[1::2], strict=True):
        line, failed = told(name, Path(report))
        print(line, *failed, sep="\n")
        status |= bool(failed) or not Path(report).exists()
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
