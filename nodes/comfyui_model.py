"""ComfyUI's MODEL, CLIP and VAE as the core sees a model. Beside host.py the only file that knows
ComfyUI."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import comfy.lora
import comfy.model_management as management
import comfy.model_patcher
import comfy.model_sampling as samplings
import torch
from torch import Tensor, nn

from ..cntlora_core.errors import CheckpointError
from ..cntlora_core.events import Notice, Observer, ignore
from ..cntlora_core.model.families import check_depth, config_of, detect_family, distilled
from ..cntlora_core.model.loader import StableDiffusion
from ..cntlora_core.model.noise_schedule import NoiseSchedule
from ..cntlora_core.model.sampling import LATENT_CHANNELS
from ..cntlora_core.model.single_file import empty_unet
from ..cntlora_core.model.tensor_file import SCALES

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
    return StableDiffusion(
        unet=empty_unet(config["unet"]).eval().requires_grad_(False),
        prompts=ComfyUIPrompts(clip, config["unet"]["cross_attention_dim"], family == "sdxl"),
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


@contextmanager
def _hosts_work() -> Iterator[None]:
    """ComfyUI at work with a model of its own, in the mode it works in; out of the way after."""
    try:
        with torch.inference_mode():
            yield
    finally:
        management.unload_all_models()


@dataclass
class ComfyUIPrompts:
    """A CLIP: chunks, weights in parentheses, embeddings and its layer are those of generation."""

    clip: Any
    features: int  # that the UNet reads
    pooled: bool
    max_tokens: int | None = None
    modules: tuple[nn.Module, ...] = ()  # none is ours to drop

    @property
    def clip_skip(self) -> int | None:
        layer = getattr(self.clip, "layer_idx", None)
        return None if layer is None or self.pooled else -int(layer)

    def encode(
        self, prompts: Sequence[str], device: torch.device
    ) -> list[tuple[Tensor, Tensor | None]]:
        with _hosts_work():
            rows = [self._encode(prompt) for prompt in prompts]
        return [(tokens.clone(), None if p is None else p.clone()) for tokens, p in rows]

    def _encode(self, prompt: str) -> tuple[Tensor, Tensor | None]:
        found = self.clip.encode_from_tokens_scheduled(self.clip.tokenize(prompt))
        if len(found) != 1 or found[0][1].get("hooks") is not None:
            raise CheckpointError(
                "The CLIP is changed by hooks, differently from step to step: connect it as it is "
                "before them."
            )
        tokens, pooled = found[0][0][0], found[0][1].get("pooled_output")
        if tokens.shape[-1] != self.features or (self.pooled and pooled is None):
            raise CheckpointError(
                f"The CLIP is of another kind of model: it gives {tokens.shape[-1]} features, the "
                f"MODEL reads {self.features}. Connect the CLIP that belongs to it."
            )
        return tokens.float(), pooled[0].float() if self.pooled else None

    def cut(self, prompts: Sequence[str]) -> dict[str, tuple[int, ...]]:
        return {}  # however long


@dataclass
class ComfyUIPictures:
    """A VAE, in tiles where memory does not suffice."""

    vae: Any
    factor: float  # of the latents that the UNet reads
    observer: Observer = ignore
    modules: tuple[nn.Module, ...] = ()

    def __post_init__(self) -> None:
        if self.vae.latent_channels != LATENT_CHANNELS or self.scale != 8:
            raise CheckpointError(
                f"The VAE is of another kind of model: its latents have {self.vae.latent_channels} "
                f"channels, Stable Diffusion's {LATENT_CHANNELS}. Connect the VAE that belongs to "
                "the MODEL."
            )

    @property
    def scale(self) -> int:
        ratio = self.vae.downscale_ratio
        return ratio if isinstance(ratio, int) else 0

    @contextmanager
    def working(self, device: torch.device) -> Iterator[None]:
        try:
            yield
        finally:
            management.unload_all_models()

    def encode(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        with torch.inference_mode():
            mean, std = self._whole_or_tiled(pixels)
        return mean.float() * self.factor, std.float() * self.factor

    def _whole_or_tiled(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        with suppress(management.OOM_EXCEPTION):
            return self._posterior(pixels)
        text = "Memory did not suffice for the VAE: the pictures are encoded in tiles."
        self.observer(Notice(text))
        mean = self.vae.encode_tiled((pixels.movedim(1, -1) + 1) / 2)
        return mean, torch.zeros_like(mean)

    def _posterior(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation where the VAE has them, as `vae.encode` computes its mean."""
        images, network = (pixels + 1) / 2, self.vae.first_stage_model
        if type(getattr(network, "regularization", None)).__name__ != "DiagonalGaussianRegularizer":
            mean = self.vae.encode(images.movedim(1, -1))
            return mean, torch.zeros_like(mean)
        memory = self.vae.memory_used_encode(images.shape, self.vae.vae_dtype)
        management.load_models_gpu([self.vae.patcher], memory_required=memory)
        x = self.vae.process_input(images).to(self.vae.vae_dtype).to(self.vae.device)
        moments = network.encoder(x)
        if hasattr(network, "quant_conv"):
            moments = network.quant_conv(moments)
        mean, log_variance = moments.float().chunk(2, dim=1)
        return mean, (log_variance.clamp(-30, 20) / 2).exp()

    def decode(self, latents: Tensor) -> Tensor:
        with torch.inference_mode():
            images = self.vae.decode(latents / self.factor)
        return images.movedim(-1, 1).float() * 2 - 1
