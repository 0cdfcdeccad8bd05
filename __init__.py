"""ComfyUI's door to CNTLoRA. Nothing is imported here: ComfyUI calls `comfy_entrypoint` when it is ready."""
