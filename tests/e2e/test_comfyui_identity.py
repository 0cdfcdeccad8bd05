"""What ComfyUI has loaded, told apart."""

import pytest
import torch

from cntlora_core.model.fingerprint import fingerprint

pytestmark = pytest.mark.comfyui


def test_another_clip_or_vae_is_another_run(comfy, models):
    """Another file, strength of a LoRA, or layer; not the same twice, whether loaded or not."""

    def told(model, clip, vae):
        used = models.use(model, clip, vae)
        with used.at_work():
            return fingerprint(used)

    model, clip, vae = models.theirs()
    own = told(model, clip, vae)
    assert told(*models.theirs()) == own
    key = next(k for k in clip.patcher.model.state_dict() if k.endswith("fc1.weight"))
    weight = clip.patcher.model.state_dict()[key]
    seen = {own}
    for strength in (0.5, 0.25):
        patched = clip.clone()
        with torch.inference_mode():
            patched.patcher.add_patches({key: (torch.ones_like(weight),)}, strength)
        found = told(model, patched, vae)
        with torch.inference_mode():
            comfy.model_management.load_models_gpu([patched.patcher])
        assert patched.patcher.backup, "the patch is in the weights"
        assert told(model, patched, vae) == found
        seen.add(found)
    layered = clip.clone()
    layered.clip_layer(-2)
    seen.add(told(model, layered, vae))
    with torch.inference_mode():
        next(vae.first_stage_model.parameters()).view(-1)[0].add_(1)
    seen.add(told(model, clip, vae))
    assert len(seen) == 5
