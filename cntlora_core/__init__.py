"""CNTLoRA: personal LoRAs for Stable Diffusion, calibrated in closed form and then trained."""

__version__ = "0.1.0"
