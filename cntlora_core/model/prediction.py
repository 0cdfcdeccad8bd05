"""What a checkpoint's UNet predicts and on which noise schedule: told by marker tensors, metadata
or the user."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, get_args

from ..config import Prediction
from ..errors import CheckpointError, SettingError
from ..events import Notice, Observer, ignore
from .ldm_names import UNET_PREFIX, unet_places

if TYPE_CHECKING:  # the command line reads the words alone, without loading torch
    from .tensor_file import TensorSource

AUTO, EPSILON, V, V_ZERO_SNR = "auto", "epsilon", "v", "v + zero terminal SNR"
PREDICTIONS = get_args(Prediction)  # what a user may choose; a model has one of the last three

# ComfyUI tells SD 2's v-prediction models by this tensor's spread; nothing in the shapes does.
V_MARK = "up_blocks.3.attentions.2.transformer_blocks.0.norm1.bias"
V_MARKS = [name for name, _ in unet_places(V_MARK, frozenset((1, 2, 3)))]  # in every kind of file
V_SPREAD = 0.09
# Tensors without use that say how a model was trained; ComfyUI reads and writes the same.
EDM_MARKS = {
    "edm_mean": "a Playground v2.5 model",
    "edm_vpred.sigma_max": "a CosXL model",
}
MODELSPEC = "modelspec.prediction_type"
SPOKEN = {"epsilon": EPSILON, "eps": EPSILON, "v": V, "v_prediction": V, "v-prediction": V}
V_IN_NAME = re.compile(r"v[-_. ]?pred|(?<![a-z])v[-_. ]?param", re.IGNORECASE)


def check_prediction(prediction: str) -> None:
    """Raises SettingError for a word that is none of `PREDICTIONS`."""
    if prediction not in PREDICTIONS:
        raise SettingError(
            f"prediction is {prediction!r}: it must be one of {', '.join(map(repr, PREDICTIONS))}."
        )


def detect_prediction(
    source: TensorSource, family: str, asked: str = AUTO, observer: Observer = ignore
) -> str:
    """`epsilon`, `v` or `v + zero terminal SNR`; `asked` settles it unless it is `auto`.

    Markers count before metadata, metadata before SD 2's statistic of the weights (a small tensor
    is read). A name alone gives a Notice, and SDXL's v without a word on its schedule. Raises
    CheckpointError for models of another parametrisation (EDM).
    """
    name, marks = source.path.name, {n.removeprefix(UNET_PREFIX) for n in source.shapes}
    for mark, what in EDM_MARKS.items():
        if mark in marks:
            raise CheckpointError(
                f"'{name}' is {what} ('{mark}'): it was trained on EDM's continuous noise levels, "
                "which CNTLoRA does not train. Choose an SDXL checkpoint."
            )
    if asked != AUTO:
        return asked
    if "v_pred" in marks:
        return V_ZERO_SNR if "ztsnr" in marks else V
    spoken = source.metadata.get(MODELSPEC)
    if spoken is not None and spoken.lower() not in SPOKEN:
        raise CheckpointError(
            f"'{name}' says of itself that it predicts {spoken!r} ({MODELSPEC}): CNTLoRA trains "
            "epsilon and v models. If the file is wrong, set prediction."
        )
    found = SPOKEN[spoken.lower()] if spoken is not None else _by_weights(source, family)
    if found == V and family == "sdxl":
        observer(
            Notice(
                f"'{name}' says that it predicts v, but not whether its schedule ends without any "
                "signal, as NoobAI's and most SDXL models of this kind do. If it does, set "
                f"prediction to '{V_ZERO_SNR}'."
            )
        )
    if found == EPSILON and V_IN_NAME.search(source.path.stem):
        observer(
            Notice(
                f"'{name}' looks like v-prediction by its name, but nothing in the file says so: "
                f"it is taken as epsilon. If it is one, set prediction to '{V}' or '{V_ZERO_SNR}'."
            )
        )
    return found


def _by_weights(source: TensorSource, family: str) -> str:
    mark = next((name for name in V_MARKS if name in source.shapes), None)
    if family != "sd2" or mark is None:
        return EPSILON
    return V if float(source.read(mark).float().std(unbiased=False)) > V_SPREAD else EPSILON


def scheduler_keys(prediction: str) -> dict[str, Any]:
    """A prediction in the words of a diffusers scheduler configuration; none for `auto`."""
    if prediction == AUTO:
        return {}
    return {
        "prediction_type": "epsilon" if prediction == EPSILON else "v_prediction",
        "rescale_betas_zero_snr": prediction == V_ZERO_SNR,
    }
