"""ComfyUI's door to CNTLoRA. Nothing is imported here: ComfyUI calls `comfy_entrypoint` when it is
ready."""

WEB_DIRECTORY = "./web"


async def comfy_entrypoint():  # type: ignore[no-untyped-def]  # the type is ComfyUI's
    """The extension with its nodes, for ComfyUI 0.3.64 and later."""
    try:
        from .nodes import CNTLoRAExtension
    except Exception:
        import logging

        # ComfyUI prints one line; the cause of a broken install is further up the traceback.
        logging.getLogger(__name__).exception("CNTLoRA could not be loaded")
        raise
    return CNTLoRAExtension()
