"""The commands of `lightning`, on one Trainer."""
