"""`python -m lightning_dfd`, and the installed `lightning`."""

from lightning_dfd.cli.main import main

if __name__ == "__main__":
    main()
