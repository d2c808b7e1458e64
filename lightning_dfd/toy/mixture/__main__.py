"""`python -m lightning_dfd.toy.mixture --output DIR`: the study in the exact world (docs/study_exact.md)."""

from __future__ import annotations

import argparse
from pathlib import Path

from lightning_dfd.toy.mixture.arms import all_arms
from lightning_dfd.toy.mixture.report import write_report
from lightning_dfd.toy.mixture.study import FULL, QUICK, run_study


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m lightning_dfd.toy.mixture", description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("outputs/study_exact"))
    parser.add_argument("--quick", action="store_true", help="two seeds and few iterations: shows that all arms run")
    parser.add_argument("--report", action="store_true", help="only make tables of the results there are")
    parser.add_argument("--workers", type=int, default=2, help="processes, of one thread each")
    args = parser.parse_args()
    if not args.report:
        run_study(args.output, QUICK if args.quick else FULL, all_arms(), args.workers)
    write_report(args.output, all_arms())
    print(f"Open {args.output / 'report.md'}")


if __name__ == "__main__":
    main()
