import dataclasses

import pytest
import torch

from cntlora_core.calibration.calibrate import calibrate
from cntlora_core.config import CalibrationConfig, TrainConfig
from cntlora_core.model.gradient_checkpointing import recomputing_activations
from cntlora_core.run import run_training
from cntlora_core.training.memory_estimate import estimate_training_memory


def test_the_frozen_weights_are_counted_exactly():
    estimate = estimate_training_memory("sd1", resolution=128)
    assert estimate.weights == 859_520_964 * 4
    assert estimate.peak > estimate.weights + estimate.activations


def test_activations_follow_batch_precision_and_checkpointing():
    one = estimate_training_memory("sd1", resolution=128)
    two = estimate_training_memory("sd1", resolution=128, batch_size=2)
    assert two.activations == pytest.approx(2 * one.activations, rel=0.1)
    half = estimate_training_memory("sd1", resolution=128, dtype=torch.bfloat16)
    assert half.weights * 2 == one.weights
    assert half.activations < one.activations
    few = estimate_training_memory("sd1", resolution=128, gradient_checkpointing=True)
    assert few.activations < 0.4 * one.activations


def test_the_estimate_is_what_autograd_keeps(mini_sd, subject):
    """The same count on real tensors of the mini SD, by other means: sizes of all distinct storages
    saved."""
    from cntlora_core.calibration.ranks import uniform_ranks
    from cntlora_core.lora.adapter import attached_lora, gaussian_init
    from cntlora_core.lora.targets import find_projections
    from cntlora_core.training.memory_estimate import _Kept

    projections = find_projections(mini_sd.unet)
    lora = gaussian_init(
        projections, uniform_ranks(projections, 4), torch.Generator().manual_seed(0)
    )
    storages = {}

    def pack(tensor):
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    own = {p.untyped_storage().data_ptr() for p in mini_sd.unet.parameters()}
    kwargs = subject.conditioning[:2].unet_kwargs()
    with attached_lora(mini_sd.unet, lora, trainable=True) as adapters:
        own |= {p.untyped_storage().data_ptr() for p in adapters.parameters()}
        with (
            _Kept(mini_sd.unet) as kept,
            torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t),
        ):
            out = mini_sd.unet(
                torch.stack(subject.mean[:2]), torch.tensor([1, 2]), return_dict=False, **kwargs
            )
        with _Kept(mini_sd.unet) as kept:
            again = mini_sd.unet(
                torch.stack(subject.mean[:2]), torch.tensor([1, 2]), return_dict=False, **kwargs
            )
    real = sum(size for place, size in storages.items() if place not in own)
    assert kept.total == pytest.approx(real, rel=0.1)
    assert torch.equal(out[0], again[0])


def test_checkpointing_changes_memory_and_nothing_else(mini_sd, subject):
    with recomputing_activations(mini_sd.unet):
        assert mini_sd.unet.training
    assert not mini_sd.unet.training
    assert not mini_sd.unet.is_gradient_checkpointing

    def starts(effort):
        config = CalibrationConfig(effort=effort, batch_size=2)
        return [
            calibrate(mini_sd, subject, dataclasses.replace(config, gradient_checkpointing=on)).lora
            for on in (False, True)
        ]

    plain, recomputed = starts("quick")
    for name, factors in plain.items():
        torch.testing.assert_close(factors.delta(), recomputed[name].delta(), rtol=1e-2, atol=1e-4)
    plain, recomputed = starts("balanced")  # 16 steps on, rounding has grown in a few entries
    for name, factors in plain.items():
        assert (
            factors.delta() - recomputed[name].delta()
        ).norm() <= 1e-2 * factors.delta().norm(), name
    plain = CalibrationConfig(init="gaussian")
    loras = [
        run_training(
            mini_sd,
            subject,
            plain,
            TrainConfig(steps=2, learning_rate=3e-3, validate_every=0, gradient_checkpointing=on),
        ).lora
        for on in (False, True)
    ]
    for name, factors in loras[0].items():
        torch.testing.assert_close(factors.down, loras[1][name].down, rtol=1e-3, atol=1e-4)
