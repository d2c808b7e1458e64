"""What tiny pipelines of your own are made of, at the address that the docs give."""

from lightning_dfd.testing.tiny.parts import *  # noqa: F403
