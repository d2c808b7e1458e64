"""A run on disk: checkpoints, the folder with its logs, and stopping in time."""
