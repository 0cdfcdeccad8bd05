"""Whether what comes along the wires fits the model it meets."""

from __future__ import annotations

from ..cntlora_core.config import CalibrationConfig
from ..cntlora_core.errors import SettingError
from ..cntlora_core.files import check_space
from ..cntlora_core.lora.adapter import LoRA
from ..cntlora_core.lora.targets import ALL, find_projections
from ..cntlora_core.model.loader import StableDiffusion
from ..cntlora_core.training.state_size import parameters_of
from . import host
from .types import CalibratedStart, ClassPictures, Maker


def check_model(model: StableDiffusion, lora: LoRA) -> None:
    """Raises SettingError for a start that another kind of model was calibrated for."""
    layers = {p.name: (p.out_features, p.in_features) for p in find_projections(model.unet, ALL)}
    made_for = {name: (len(f.up), f.down.shape[1]) for name, f in lora.items()}
    if not made_for.items() <= layers.items():
        raise _of_another_kind("lora_init was made for", model)


def check_prior(model: StableDiffusion, prior: ClassPictures | None) -> None:
    """Raises SettingError for one whose words another kind of model read."""
    width = model.unet.config.cross_attention_dim
    if prior is not None and prior.encoded.conditioning.tokens.shape[-1] != width:
        raise _of_another_kind("prior was made with", model)


def of_other_models(
    own: Maker, prior: ClassPictures | None, start: CalibratedStart | None = None
) -> list[str]:
    """A sentence for each thing that another model of the same kind than this node's `own` has
    made: it runs, and is seldom meant."""
    made = [
        ("prior was made with", prior and prior.maker),
        ("lora_init was calibrated for", start and start.maker),
    ]
    return [
        f"{what} '{maker.name}', which is another than the '{own.name}' of sd_model: connect the "
        "same model to both nodes, unless you mean it."
        for what, maker in made
        if maker and maker.content != own.content
    ]


def _of_another_kind(made: str, model: StableDiffusion) -> SettingError:
    return SettingError(
        f"{made} another kind of model than '{model.name}': connect the same sd_model to both "
        "nodes."
    )


def check_room(model: StableDiffusion, config: CalibrationConfig, lora: LoRA | None = None) -> None:
    """Refuse to start what the loras folder has no space for. Raises OutputError."""
    check_space(host.lora_path("lora"), 4 * parameters_of(model, config, lora), "the LoRA")
