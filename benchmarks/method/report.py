"""The method, reported: three seeds from nothing to tables and plots.

python benchmarks/method/report.py --work build/method --out benchmarks/results/method
python benchmarks/method/report.py --seeds 12              # one seed's stages, in a process of its own

What is finished is not repeated, so it can be stopped and started again. Tables are made when all seeds are there.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from prm_search.commands.models import quiet


def main() -> int:
    """The command line. Returns the exit status."""
    parser = argparse.ArgumentParser(prog="report.py", description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, default=Path("build/method"), help="where the stages of each seed lie")
    parser.add_argument(
        "--out", type=Path, default=Path("benchmarks/results/method"), help="for report.json, .md, .png"
    )
    parser.add_argument("--seeds", help="only these, separated by commas: their stages, and no tables")
    parser.add_argument(
        "--part", choices=("method", "strategies"), help="only this page: the method's, or the comparison of strategies"
    )
    parser.add_argument(
        "--quick", action="store_true", help="tiny sizes: does everything run? The figures mean nothing"
    )
    args = parser.parse_args()
    quiet()
    import protocol
    import torch
    from stages import Seed
    from strategies import write_strategies
    from write import write_report

    from prm_search.demo.learn import PolicyRecipe

    torch.set_num_threads(1)  # the models are tiny
    sizes = protocol.QUICK if args.quick else protocol.Protocol()
    recipe = PolicyRecipe()
    if args.quick:
        recipe = PolicyRecipe(max_curriculum_steps=3, anneal_steps=2, extra_rounds=0, gate_problems=8)
    try:
        seeds = sizes.seeds if args.seeds is None else tuple(int(seed) for seed in args.seeds.split(","))
        for seed in seeds:
            made = Seed(seed, args.work / f"seed-{seed}", sizes, recipe, lambda line: print(line, file=sys.stderr))
            if args.part != "strategies":
                made.run()
            if args.part != "method":
                made.strategies()
    except KeyboardInterrupt:
        print("stopped; the same command goes on", file=sys.stderr)
        return 130
    if args.seeds is None:
        if args.part != "strategies":
            write_report(args.work, args.out, sizes)
            print(args.out / "report.md")
        if args.part != "method":
            write_strategies(args.work, args.out, sizes, sizes.seeds)
            print(args.out / "strategies.md")
    return 0


if __name__ == "__main__":
    sys.exit(main())
