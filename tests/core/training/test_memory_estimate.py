import dataclasses
import functools
from types import SimpleNamespace

import pytest
import torch
from small_unet import SMALL_UNET

from cntlora_core.calibration.calibrate import calibrate
from cntlora_core.calibration.constraints import Metric
from cntlora_core.calibration.moments import Moments
from cntlora_core.calibration.natural import NaturalStart
from cntlora_core.config import CalibrationConfig, TrainConfig
from cntlora_core.lora.adapter import attached_lora, gaussian_init
from cntlora_core.lora.targets import ALL, find_projections
from cntlora_core.model.families import config_of
from cntlora_core.model.gradient_checkpointing import recomputing_activations
from cntlora_core.run.runs import run_training
from cntlora_core.training import memory_plan
from cntlora_core.training.memory_estimate import (
    Adapted,
    estimate_training_memory,
    meta_lora,
    unet_calibration_memory,
    unet_sampling_memory,
    unet_training_memory,
    vae_memory,
)
from cntlora_core.training.memory_plan import COPIES_OF_ADAPTERS, NEEDS, natural_bytes
from cntlora_core.training.shapes import Live, meta_unet, peak_bytes, unet_inputs
from cntlora_core.training.state import start_state

SMALL_DEFAULTS = {
    "side": 32,
    "batch_size": 1,
    "rank": 4,
    "targets": "attention+ff",
    "dtype": torch.bfloat16,
    "gradient_checkpointing": False,
    "device": "cuda",
}


@functools.cache
def small(**settings):
    return unet_training_memory(SMALL_UNET, Adapted(**SMALL_DEFAULTS | settings))


def test_the_frozen_weights_are_counted_exactly():
    estimate = estimate_training_memory("sd1", resolution=64)
    assert estimate.weights == 859_520_964 * 4
    assert estimate.peak > estimate.weights + estimate.activations


def test_activations_follow_batch_size_precision_and_checkpointing():
    one = small()
    assert small(batch_size=4).activations == pytest.approx(4 * one.activations, rel=0.05)
    assert small(side=64).activations == pytest.approx(4 * one.activations, rel=0.05)
    full = small(dtype=torch.float32)
    assert full.weights == 2 * one.weights
    assert full.activations == pytest.approx(2 * one.activations, rel=0.1)
    assert small(gradient_checkpointing=True).activations < 0.7 * one.activations


def test_only_devices_without_fused_attention_keep_all_pairs_of_places():
    places, heads, bytes_each = 32 * 32, 4, 2
    all_pairs = heads * places**2 * bytes_each
    fused, composed = small(), small(device="mps")
    assert small(device="cpu").activations == pytest.approx(fused.activations, rel=0.05)
    assert composed.activations > fused.activations + all_pairs
    assert small(device="cuda", dtype=torch.float32).activations < composed.activations


def test_more_layers_and_ranks_take_more():
    attention = small(targets="attention")
    assert small().activations > 1.05 * attention.activations
    assert small(rank=8).adapters == 2 * small().adapters
    assert small().adapters == pytest.approx(attention.adapters, rel=0.1)  # one budget


def test_the_estimate_is_what_a_real_step_holds(mini_sd, subject):
    """The same count of storages, of real tensors and the CPU's real kernels."""
    projections = find_projections(mini_sd.unet, "attention+ff")
    ranks = {p.name: 4 for p in projections}
    lora = gaussian_init(projections, ranks, torch.Generator().manual_seed(0))
    latents, t = torch.stack(subject.mean[:2]), torch.tensor([1, 2])
    words = subject.conditioning[:2].unet_kwargs()
    with attached_lora(mini_sd.unet, lora, trainable=True) as adapters:
        held = [*mini_sd.unet.parameters(), *mini_sd.unet.buffers(), latents, t, adapters.flat]

        def step():
            (out,) = mini_sd.unet(latents, t, return_dict=False, **words)
            out.square().mean().backward()

        real = peak_bytes(step, held)
    estimate = unet_training_memory(
        mini_sd.unet.config,
        Adapted(
            **SMALL_DEFAULTS
            | {"side": latents.shape[-1], "batch_size": 2, "dtype": torch.float32, "device": "cpu"}
        ),
    )
    assert estimate.activations == pytest.approx(real, rel=0.1)


@pytest.mark.parametrize("decode", [False, True], ids=["encoding", "decoding"])
def test_what_the_vae_holds_is_the_estimate(mini_sd, decode):
    size_px, side = 64, 64 // mini_sd.pictures.scale
    given = torch.zeros(2, 4, side, side) if decode else torch.zeros(2, 3, size_px, size_px)
    work = mini_sd.pictures.vae.decode if decode else mini_sd.pictures.vae.encode
    with torch.no_grad(), mini_sd.pictures.working(torch.device("cpu")):
        real = peak_bytes(lambda: work(given), [*mini_sd.pictures.vae.parameters(), given])
    estimate = vae_memory(
        mini_sd.pictures.vae.config, size_px=size_px, pictures=2, decode=decode, device="cpu"
    )
    assert estimate.activations == pytest.approx(real, rel=0.15)


def test_what_drawing_holds_is_the_estimate(mini_sd, subject):
    latents, t = torch.stack(subject.mean[:4]), torch.tensor([1, 2, 3, 4])
    words = subject.conditioning[:4].unet_kwargs()
    held = [*mini_sd.unet.parameters(), *mini_sd.unet.buffers(), latents, t]
    with torch.no_grad():
        real = peak_bytes(lambda: mini_sd.unet(latents, t, return_dict=False, **words), held)
    estimate = unet_sampling_memory(
        mini_sd.unet.config, side=latents.shape[-1], pictures=2, dtype=torch.float32, device="cpu"
    )
    assert estimate.activations == pytest.approx(real, rel=0.15)


def test_a_calibration_holds_more_than_a_training_step(monkeypatch):
    """Its metric, or the sketches of its sweep and what passes beside them."""
    monkeypatch.setattr(memory_plan, "SKETCHING_BYTES", 0)  # of real layers
    for checkpointing in (False, True):
        settings = SMALL_DEFAULTS | {"gradient_checkpointing": checkpointing}
        calibration = unet_calibration_memory(SMALL_UNET, Adapted(**settings))
        assert calibration.peak > small(gradient_checkpointing=checkpointing).peak
    many = unet_calibration_memory(SMALL_UNET, Adapted(**settings | {"rank": 64}))
    assert many.adapters > 0, "the steps hold more than the sweep"
    assert many.metric > 0


@pytest.mark.slow
@pytest.mark.parametrize("preserves", [False, True])
def test_the_steps_hold_what_is_planned(preserves):
    """Passes and updates of SD 1.5 with a metric and all layers, by their storages: within a tenth
    of the activations, the adapters and `natural_bytes`."""
    unet = meta_unet(config_of("sd1")["unet"], torch.bfloat16, "cuda")
    projections = find_projections(unet, ALL)
    model = SimpleNamespace(unet=unet, device=torch.device("meta"), dtype=torch.bfloat16)
    inputs = unet_inputs(unet.config, 1, 64, torch.bfloat16)
    settings = TrainConfig(steps=1, learning_rate=1e-4)
    with (
        Live([*unet.parameters(), *unet.buffers()]) as live,
        attached_lora(unet, meta_lora(projections, 16), trainable=True) as adapters,
        recomputing_activations(unet),
    ):
        start = NaturalStart(projections, Metric(0.5), Moments(), 1.0)
        state = start_state(model, adapters, settings, start)

        def step():
            live.peak = live.now
            state.begin_step()
            with state.recording(model, 1):
                unet(return_dict=False, **inputs)[0].float().square().mean().backward()
            state.gather_gradient()
            state.optimise(1e-4, finite=True)
            state.end_step()

        step()
        if preserves:
            of_inputs = {
                key: own
                for key, own in state.optimizer.moments.seconds.items()
                if key.startswith("C.")
            }
            state.optimizer.metric = Metric(0.5, Moments(of_inputs), 4.0)
            state.optimizer.metrics = {}
            step()
            live.peak = live.now
        step()
        planned = 64**2 * NEEDS["sd1"].checkpointed + COPIES_OF_ADAPTERS * adapters.flat.nbytes
    planned += natural_bytes(projections, 1, torch.bfloat16, preserves)
    assert live.peak == pytest.approx(planned, rel=0.1)


@pytest.mark.slow
def test_sdxl_on_a_card_as_the_documentation_says():
    def gigabytes(checkpointing):
        return (
            estimate_training_memory(
                "sdxl",
                resolution=1024,
                targets="attention",
                dtype=torch.bfloat16,
                gradient_checkpointing=checkpointing,
            ).peak
            / 1e9
        )

    assert gigabytes(False) == pytest.approx(10.9, abs=0.1)
    assert gigabytes(True) == pytest.approx(5.8, abs=0.1)


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
