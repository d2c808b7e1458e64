"""`python -m lightning_dfd.tiny NAME FOLDER`."""

from lightning_dfd.testing.tiny.__main__ import main

if __name__ == "__main__":
    main()
