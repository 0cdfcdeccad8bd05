"""ComfyUI's MODEL, with its CLIP and VAE, as the core sees a model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import comfy.lora
import comfy.model_patcher
import comfy.model_sampling as samplings
import torch
from torch import Tensor

from ..cntlora_core.errors import CheckpointError
from ..cntlora_core.events import Notice, Observer, ignore
from ..cntlora_core.model.families import check_depth, config_of, detect_family, distilled
from ..cntlora_core.model.loader import StableDiffusion
from ..cntlora_core.model.noise_schedule import NoiseSchedule
from ..cntlora_core.model.prediction import V_IN_NAME
from ..cntlora_core.model.single_file import empty_unet
from ..cntlora_core.model.tensor_file import SCALES
from .comfyui_encoders import ComfyUIPictures, ComfyUIPrompts

PREFIX = "diffusion_model."
# What of a MODEL changes its passes and cannot be trained through, by the host's attribute.
HOOKS = {
    "injections": "injections",
    "hook_patches": "hooks",
    "weight_wrapper_patches": "weight wrappers",
    "additional_models": "additional models (a ControlNet or its like)",
}
WHOLE_PASS = ("patches", "patches_replace", "wrappers")  # of its transformer options
UNSHARED_OPTIONS = ("model_function_wrapper",)
HARMLESS_OBJECTS = ("model_sampling", "manual_cast_dtype")


def use_model(
    model: Any,
    clip: Any,
    vae: Any,
    *,
    device: torch.device,
    dtype: torch.dtype,
    observer: Observer = ignore,
) -> StableDiffusion:
    """The model that ComfyUI has loaded, to be calibrated and trained. Its weights stay where they
    are: the UNet has them while it works. Raises CheckpointError for what is not trained."""
    for given, name in ((model, "MODEL"), (clip, "CLIP"), (vae, "VAE")):
        if given is None:
            raise CheckpointError(
                f"There is no {name}: the file it was loaded from holds none. Connect one from a "
                "loader of its own."
            )
    network = type(model.model.diffusion_model).__name__
    if network != "UNetModel":
        raise CheckpointError(
            f"The MODEL is {type(model.model).__name__} ({network}), no UNet of Stable Diffusion "
            "1, 2 or SDXL, which is what CNTLoRA trains."
        )
    _refuse_changes(model)
    weights = ModelWeights(model)
    family, schedule = detect_family(weights), _schedule(model)
    if family == "sd2" and schedule.prediction_type != "epsilon":
        family = "sd2-v"
    config = config_of(family)
    check_depth(weights, config["unet"])
    if warning := distilled(weights.path.name):
        observer(Notice(warning))
    if schedule.prediction_type == "epsilon" and V_IN_NAME.search(weights.path.name):
        said = (
            f"'{weights.path.name}' looks like v-prediction by its name, but the MODEL samples as "
            "epsilon and is trained so. If it is one, connect it through ModelSamplingDiscrete "
            "(v_prediction, for most SDXL models with zsnr), as before a KSampler."
        )
        observer(Notice(said))
    return StableDiffusion(
        unet=empty_unet(config["unet"]).eval().requires_grad_(False),
        prompts=ComfyUIPrompts(clip, family, config["unet"]["cross_attention_dim"], observer),
        pictures=ComfyUIPictures(vae, model.model.latent_format.scale_factor, observer),
        schedule=schedule,
        scheduler_config=config["scheduler"] | {"prediction_type": schedule.prediction_type},
        family=family,
        name=weights.path.name,
        device=device,
        dtype=dtype,
        lender=lambda: ModelWeights(model),
    )


class ModelWeights:
    """The UNet of a MODEL as a file of named tensors: those that are wanted as they are kept share
    its memory. Its patches (LoRAs, merges) are in what is read, not in what it keeps."""

    def __init__(self, patcher: Any) -> None:
        self.patcher = patcher
        self.path = Path(_file_name(patcher) or "ComfyUI's MODEL")
        self.metadata: dict[str, str] = {}
        weights = {
            name: weight
            for name, weight in patcher.model.diffusion_model.named_parameters()
            if not name.endswith(SCALES)
        }
        self.shapes = {name: tuple(weight.shape) for name, weight in weights.items()}
        self.dtypes = {name: weight.dtype for name, weight in weights.items()}

    def read(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        key = PREFIX + name
        weight, _, convert = comfy.model_patcher.get_key_weight(self.patcher.model, key)
        if key in self.patcher.backup:  # the weight is patched as long as the model is loaded
            weight = self.patcher.backup[key].weight
        patches = self.patcher.patches.get(key)
        if convert is not None:  # quantised: kept as numbers and their scale
            weight = convert(weight, inplace=False)
        if patches:
            whole = weight.detach().to(torch.float32, copy=True)
            weight = comfy.lora.calculate_weight(patches, whole, key)
        elif dtype in (None, weight.dtype):
            return shared(weight)
        return shared(weight.detach().to(dtype or self.dtypes[name]))


def shared(tensor: Tensor) -> Tensor:
    """The same memory as a tensor that can be trained through: those made in inference mode, as
    ComfyUI's are, cannot."""
    tensor = tensor.detach()
    if not tensor.is_inference():
        return tensor
    empty = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
    return empty.set_(
        tensor.untyped_storage(), tensor.storage_offset(), tensor.shape, tensor.stride()
    )


def _file_name(patcher: Any) -> str | None:
    """The stem of the file that a MODEL was loaded from, where ComfyUI remembers it."""
    made_by = getattr(patcher, "cached_patcher_init", None)
    arguments = made_by[1] if made_by and len(made_by) > 1 else ()
    first = arguments[0] if arguments else None
    return Path(first).stem if isinstance(first, str) else None


def _refuse_changes(model: Any) -> None:
    """Raises CheckpointError for changes to the model that are no weights."""
    options = model.model_options
    passes = options.get("transformer_options", {})
    found = [what for name, what in HOOKS.items() if _filled(getattr(model, name, None))]
    found += [name for name in WHOLE_PASS if _filled(passes.get(name))]
    found += [name for name in UNSHARED_OPTIONS if options.get(name) is not None]
    found += [name for name in model.object_patches if name not in HARMLESS_OBJECTS]
    found += ["wrappers"] if _filled(getattr(model, "wrappers", None)) else []
    if found:
        raise CheckpointError(
            f"The MODEL is changed in a way that cannot be trained through ({found[0]}): connect "
            "it as it is before that node (FreeU, IP-Adapter, attention patches and their like). "
            "LoRAs and merges are taken as they are."
        )


def _filled(value: Any) -> bool:
    """Whether anything stands in nested mappings and lists."""
    if isinstance(value, dict):
        return any(_filled(v) for v in value.values())
    return bool(value)


def _schedule(model: Any) -> NoiseSchedule:
    """From the MODEL's own sampling, as a ModelSamplingDiscrete left it. Raises CheckpointError."""
    sampling = model.get_model_object("model_sampling")
    kind, discrete = type(sampling), samplings.ModelSamplingDiscrete
    denoised = getattr(kind, "calculate_denoised", None)
    types = {
        samplings.EPS.calculate_denoised: "epsilon",
        samplings.V_PREDICTION.calculate_denoised: "v_prediction",
    }
    if (
        not isinstance(sampling, discrete)
        or kind.timestep is not discrete.timestep
        or kind.calculate_input is not samplings.EPS.calculate_input
        or denoised not in types
    ):
        names = " and ".join(base.__name__ for base in kind.__mro__[1:3])
        raise CheckpointError(
            f"The MODEL samples by {names}: CNTLoRA trains epsilon and v-prediction on Stable "
            "Diffusion's discrete schedule. Connect the model without the node that changes its "
            "sampling, or another model."
        )
    return NoiseSchedule.from_sigmas(sampling.sigmas.cpu(), types[denoised])
