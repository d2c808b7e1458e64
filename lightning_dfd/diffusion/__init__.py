"""Noise levels, the steps from noise to clean latents, and what is drawn by chance."""
