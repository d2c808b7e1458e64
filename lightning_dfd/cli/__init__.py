"""The commands of `lightning`, on one Trainer."""

INTERRUPTED = 130  # exit code after Ctrl-C
