"""`make fuzz`: wrong inputs to the library, its command line, its server and its records, and what came of them.

    python benchmarks/fuzz/fuzz.py [--seed N] [--size N] [--area api|cli|http|records] [--out report.md] [--show N]

A refusal is clear where it is a ValueError or TypeError, one line and status 2, or a status 4xx, and names the
argument, the option, the file and line, or the field. Other refusals are unclear; other exceptions (and a status 5xx)
are tracebacks; what is accepted although it is known to be wrong is silent. The same seed gives the same inputs.
"""

from __future__ import annotations

import argparse
import logging
import random
import re
import sys
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent.parent / "tests")]

import fuzz_api  # noqa: E402
import fuzz_files  # noqa: E402
import fuzz_http  # noqa: E402
from fuzz_cases import Case, Tally  # noqa: E402

AREAS = ("api", "cli", "http", "records")


def cases(
    seed: int, size: int, folder: Path, server: fuzz_http.Server, areas: tuple[str, ...] = AREAS
) -> Iterator[Case]:
    """All cases of some areas. Each area draws from a stream of its own."""
    if "api" in areas:
        yield from fuzz_api.cases(random.Random(f"{seed} api"), size)
    if "http" in areas:
        yield from fuzz_http.cases(server, random.Random(f"{seed} http"), size)
    if "cli" in areas or "records" in areas:
        files = fuzz_files.cases(fuzz_files.Folder(folder), random.Random(f"{seed} files"), size)
        yield from (case for case in files if case.area in areas)


def fuzz(seed: int, size: int, areas: tuple[str, ...] = AREAS, *, trace: bool = False) -> Tally:
    """Run them all; with trace, say each on standard error before."""
    tally, terminal = Tally(), sys.stderr
    logging.disable(logging.CRITICAL)
    try:
        with tempfile.TemporaryDirectory() as folder, closing(fuzz_http.Server()) as server, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for case in cases(seed, size, Path(folder), server, areas):
                if trace:
                    print(case.target, case.argument, case.given, file=terminal, flush=True)
                tally.add(case)
    finally:
        logging.disable(logging.NOTSET)
    return tally


def report(tally: Tally, seed: int, size: int) -> str:
    """The page."""
    total = tally.total()
    lines = [
        "# Wrong inputs, and what came of them",
        "",
        f"Made by `make fuzz FUZZ='--seed {seed} --size {size} --out benchmarks/results/fuzz/report.md'`;",
        "what the words mean is said in `benchmarks/fuzz/fuzz.py`.",
        "",
        tally.table(),
        "",
        f"## Not clear: {total.total() - total['clear']} of {total.total()}",
        "",
    ]
    if tally.faults:
        lines += ["The first of each kind.", "", "| outcome | cases | target | argument | given | said |"]
        lines.append("|---|---:|---|---|---|---|")
    kinds: dict[tuple[str, str, str], list[tuple[Case, str]]] = {}
    for case, outcome, said in tally.faults:
        kinds.setdefault((outcome, case.target, case.argument), []).append((case, said))
    for (outcome, target, argument), found in sorted(kinds.items()):
        case, said = found[0]
        cells = [outcome, str(len(found)), f"`{target}`", f"`{_tidy(argument)}`", f"`{_tidy(case.given)}`", _tidy(said)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _tidy(text: str) -> str:
    folder = re.escape(tempfile.gettempdir())
    one_line = re.sub(rf"{folder}/tmp\w+", "FOLDER", " ".join(text.split())).replace("|", "\\|").replace("`", "'")
    return one_line if len(one_line) <= 160 else f"{one_line[:157]}..."


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--size", type=int, default=12, help="random values beside the fixed ones, for each argument")
    parser.add_argument("--area", choices=AREAS, action="append", help="may be repeated; default: all")
    parser.add_argument("--out", type=Path, help="write the report here")
    parser.add_argument("--show", type=int, default=20, help="print so many of what is not clear")
    parser.add_argument("--trace", action="store_true", help="say each case before it runs")
    options = parser.parse_args()
    tally = fuzz(options.seed, options.size, tuple(options.area or AREAS), trace=options.trace)
    print(tally.table())
    for case, outcome, said in tally.faults[: options.show]:
        print(f"{outcome}: {case.target} {case.argument}={case.given}: {_tidy(said)}")
    if options.out is not None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(report(tally, options.seed, options.size))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
