"""Several processes: who shares what, weights spread over them, the strategy for it."""
