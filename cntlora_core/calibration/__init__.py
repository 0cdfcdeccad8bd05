"""Activations and gradients -> a LoRA that already fits."""
