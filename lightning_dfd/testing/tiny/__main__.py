"""Save a tiny pipeline: `python -m lightning_dfd.tiny NAME FOLDER`."""

from __future__ import annotations

import argparse

import lightning_dfd.testing.tiny
from lightning_dfd.testing.tiny import TINY, save_tiny


def main() -> None:
    parser = argparse.ArgumentParser(
        description=lightning_dfd.testing.tiny.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("name", choices=sorted(TINY))
    parser.add_argument("folder")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    print(f"saved {save_tiny(args.name, args.folder, args.seed)}")


if __name__ == "__main__":
    main()
