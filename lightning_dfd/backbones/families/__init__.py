"""One file per family of diffusers pipelines."""
