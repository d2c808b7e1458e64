"""Turn a slow diffusers video pipeline into a few-step one without losing diversity or colour."""
