"""`python -m lightning_dfd`, and the installed `lightning`."""

import sys

try:
    from lightning_dfd.cli.main import main
except KeyboardInterrupt:  # in the seconds that torch takes to load
    sys.exit(130)

if __name__ == "__main__":
    main()
