"""How long the command line takes to start, in seconds of processor time, each the best of some.

python -m benchmarks.startup
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys

FIT = "fit -c recipes/toy_dmd2.yaml --print_config"
CASES = {
    "lightning --help": ["-m", "lightning_dfd", "--help"],
    f"lightning {FIT}": ["-m", "lightning_dfd", *FIT.split()],
    "import lightning.pytorch.cli (for comparison)": ["-c", "import lightning.pytorch.cli"],
    "import torch (for comparison)": ["-c", "import torch"],
}


def seconds(words: list[str]) -> float:
    """User and system time of one process with its children."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, *words], check=True, stdout=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    asked = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    asked.add_argument("--runs", type=int, default=3, help="of which the best counts")
    runs = asked.parse_args().runs
    for name, words in CASES.items():
        print(f"{min(seconds(words) for _ in range(runs)):6.2f} s  {name}", flush=True)


if __name__ == "__main__":
    main()
