"""A checkpoint on disk -> a frozen Stable Diffusion, and what it computes."""
