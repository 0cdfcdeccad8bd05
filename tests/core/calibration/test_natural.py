from dataclasses import replace

import pytest
import torch
from PIL import Image

from cntlora_core.calibration.calibrate import calibrate
from cntlora_core.calibration.natural import FRESH, REFRESH, STEP_SHARE, NaturalGradient
from cntlora_core.calibration.refine import refine
from cntlora_core.config import CalibrationConfig, TrainConfig
from cntlora_core.data.batches import draw_batch, draw_noised, mean_loss
from cntlora_core.data.dataset import read_subject
from cntlora_core.distributed import ALONE
from cntlora_core.events import ignore
from cntlora_core.lora.adapter import attached_lora
from cntlora_core.model.loader import MINI_SD_FOLDER
from cntlora_core.run.runs import run_training
from cntlora_core.training.state import start_state


@pytest.fixture(scope="module")
def start(mini_sd, subject):
    return calibrate(mini_sd, subject, CalibrationConfig(rank=2, effort="quick", seed=2))


def steps(model, subject, start, count, scale=1.0, generator=None):
    """The weights after each of `count` steps, and the optimiser."""
    generator = generator or torch.Generator().manual_seed(3)
    weights = []
    with attached_lora(model.unet, start.lora, trainable=True) as adapters:
        flat = adapters.flat
        natural = NaturalGradient(adapters, start.natural)
        for _ in range(count):
            batch = draw_batch(subject, torch.tensor([0, 1]), 1000, generator, start.importance)
            with natural.recording(model, 2, scale), torch.enable_grad():
                (batch.loss(model).mean() * scale).backward()
            adapters.gradient(scale)
            natural.step()
            natural.zero_grad()
            weights.append(flat.detach().clone())
    return weights, natural


def test_a_step_does_not_depend_on_how_the_loss_is_scaled(mini_sd, subject, start):
    (plain,), _ = steps(mini_sd, subject, start, 1)
    (scaled,), _ = steps(mini_sd, subject, start, 1, scale=1024.0)
    torch.testing.assert_close(plain, scaled, rtol=1e-3, atol=1e-6)


def test_the_calibration_it_starts_from_is_left_alone(mini_sd, subject, start):
    """Two trainings from one start: the graph keeps it for the next run."""
    before = {k: v.clone() for k, v in start.natural.moments.to_tensors("").items()}
    first, _ = steps(mini_sd, subject, start, 2)
    again, _ = steps(mini_sd, subject, start, 2)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    after = start.natural.moments.to_tensors("")
    assert all(torch.equal(after[k], v) for k, v in before.items())


def test_steps_shrink_and_the_metric_is_kept_for_some(mini_sd, subject, start):
    assert start.natural.made == FRESH == 8
    _, natural = steps(mini_sd, subject, start, 1)
    first = natural.metrics
    _, natural = steps(mini_sd, subject, start, REFRESH + 1)
    (settings,) = natural.param_groups
    assert settings["made"] == FRESH + REFRESH + 1
    assert natural.metrics is not first
    assert natural.share < STEP_SHARE * start.natural.step
    reached = natural.reached()
    assert reached.made == FRESH + REFRESH + 1
    passed = [m.passed(reached.projections[0]) for m in (start.natural.moments, reached.moments)]
    assert passed[1] == passed[0] + 2 * passed[0] // 12, "two of the steps were looked on at"


@pytest.mark.parametrize("preserves", [False, True])
def test_a_basis_of_moments_and_metric_is_held_once(mini_sd, subject, start, preserves):
    if preserves:
        kept = draw_noised(subject, 4, 1000, torch.Generator().manual_seed(5))
        config = CalibrationConfig(rank=2, effort="quick", seed=2)
        start = calibrate(mini_sd, subject, config, prior=kept)
    _, natural = steps(mini_sd, subject, start, REFRESH + 1)
    of_metrics = {
        part.untyped_storage().data_ptr()
        for metric in natural.metrics.values()
        for part in vars(metric).values()
    }
    bases = [own.basis for own in natural.moments.seconds.values() if hasattr(own, "basis")]
    assert bases
    assert {basis.untyped_storage().data_ptr() for basis in bases} <= of_metrics


def test_a_kept_metric_does_not_let_a_step_run(mini_sd, subject, start):
    """A gradient a thousand times as long as usual moves a factor no farther than usual."""
    far = replace(start.natural, made=FRESH + 1)
    with attached_lora(mini_sd.unet, start.lora, trainable=True) as adapters:
        flat = adapters.flat
        natural = NaturalGradient(adapters, far)
        lengths = []
        for factor in (1.0, 1000.0):
            before = flat.detach().clone()
            batch = draw_batch(
                subject, torch.tensor([0, 1]), 1000, torch.Generator().manual_seed(3)
            )
            with natural.recording(mini_sd, 2), torch.enable_grad():
                batch.loss(mini_sd).mean().backward()
            adapters.gradient(1 / factor)
            natural.step()
            natural.zero_grad()
            lengths.append(float((flat.detach() - before).norm()))
        assert lengths[1] < 2 * lengths[0]
        assert natural.lengths.keys() == start.natural.lengths.keys() != set()
        assert all(natural.lengths[k] == v for k, v in start.natural.lengths.items()), (
            "what is usual is what the first steps showed: later ones could let it grow"
        )
    assert REFRESH > 1


def test_small_pictures_among_large_ones_do_no_harm(mini_sd, tmp_path):
    """They are kept at their size, of a sixteenth of the tokens: their gradient is as long, and the
    metric must know as much of it."""
    for n, path in enumerate(sorted((MINI_SD_FOLDER / "subject").glob("*.png"))):
        with Image.open(path) as image:
            small = image.convert("RGB").resize((16, 16) if n % 2 else image.size)
            small.save(tmp_path / path.name)
    mixed = read_subject(mini_sd, tmp_path, "a sks cat face emoji")
    assert len({tuple(mean.shape) for mean in mixed.mean}) == 2
    large = mixed.only([n for n, mean in enumerate(mixed.mean) if mean.shape[-1] > 8])
    triples = draw_noised(large, 16, 1000, torch.Generator().manual_seed(4))
    base = mean_loss(mini_sd, triples, 4)
    training = TrainConfig(steps=20, learning_rate=3e-3, validate_every=0)
    run = run_training(mini_sd, mixed, CalibrationConfig(effort="quick"), training)
    assert run.training.optimizer == "natural"

    def after(lora):
        with attached_lora(mini_sd.unet, lora):
            return mean_loss(mini_sd, triples, 4)

    assert after(run.lora) < after(run.start.lora) < base


def test_its_state_goes_through_a_dictionary(mini_sd, subject, start):
    _, natural = steps(mini_sd, subject, start, 3)
    state = natural.state_dict()
    with attached_lora(mini_sd.unet, start.lora, trainable=True) as adapters:
        other = NaturalGradient(adapters, start.natural)
        other.load_state_dict(state)
    again = other.state_dict()
    assert again["param_groups"] == state["param_groups"]
    assert again["state"][0].keys() == state["state"][0].keys()
    assert all(torch.equal(again["state"][0][k], v) for k, v in state["state"][0].items())


def test_training_goes_on_as_if_the_calibration_had(mini_sd, subject, start, monkeypatch):
    """Five batches of a calibration, or three of them and two of a training."""
    monkeypatch.setattr("cntlora_core.calibration.natural.FRESH", 1)
    generator = torch.Generator().manual_seed(3)
    batches = [
        draw_batch(subject, torch.tensor([0, 1]), 1000, generator, start.importance)
        for _ in range(5)
    ]

    def refined(batches):
        begun = replace(start.natural, made=0, live=None, lengths={})
        return refine(
            mini_sd, start.lora, begun, batches, len(batches),
            at_once=2, gradient_checkpointing=False, observer=ignore, group=ALONE,
        )  # fmt: skip

    whole, _ = refined(batches)
    half, reached = refined(batches[:3])
    config = TrainConfig(steps=2, learning_rate=1.0)
    with attached_lora(mini_sd.unet, half, trainable=True) as adapters:
        state = start_state(mini_sd, adapters, config, reached, start.importance)
        for batch in batches[3:]:
            state.begin_step()
            with state.recording(mini_sd, 2):
                batch.loss(mini_sd).mean().backward()
            state.gather_gradient()
            state.optimise(0.0, finite=True)
            state.end_step()
        found = adapters.factors()
    for name, factors in whole.items():
        apart = (found[name].delta() - factors.delta()).norm()
        assert apart < 0.01 * factors.delta().norm()
