"""What a training should leave as it is."""

import dataclasses

import pytest
import torch

from cntlora_core.calibration.calibrate import calibrate
from cntlora_core.cli.main import main
from cntlora_core.config import CalibrationConfig, TrainConfig
from cntlora_core.data.batches import draw_noised
from cntlora_core.data.class_images import class_images
from cntlora_core.errors import SettingError
from cntlora_core.lora.adapter import attached_lora
from cntlora_core.model import conditioning
from cntlora_core.model.conditioning import encode_prompts
from cntlora_core.model.denoising_loss import predict
from cntlora_core.model.loader import MINI_SD_FOLDER
from cntlora_core.model.noise_schedule import NoiseSchedule
from cntlora_core.run.runs import run_training
from cntlora_core.training.prior_loss import BasePrediction, ClassImages, OutsideTheMask

PLAIN = CalibrationConfig(init="gaussian", rank=4)
TRAINING = TrainConfig(steps=15, learning_rate=1e-2, validate_every=0, prior_weight=4.0)
CLASS = "a cat face emoji"


@pytest.fixture(scope="module")
def drawn(mini_sd):
    return class_images(mini_sd, CLASS, count=4)


def drift(model, drawn, lora):
    """How far the prediction under the class prompt moved."""
    (batch,) = draw_noised(drawn, 8, 1000, torch.Generator().manual_seed(5)).sizes
    arguments = (model, batch.latents, batch.timesteps, batch.noise, batch.conditioning)
    with torch.no_grad():
        before = predict(*arguments)
        with attached_lora(model.unet, lora):
            return float((predict(*arguments) - before).square().mean())


def test_both_prior_losses_hold_the_class(mini_sd, subject, drawn):
    free = drift(mini_sd, drawn, run_training(mini_sd, subject, PLAIN, TRAINING).lora)
    for prior in (ClassImages(drawn), BasePrediction(encode_prompts(mini_sd, [CLASS]))):
        held = run_training(mini_sd, subject, PLAIN, TRAINING, prior=prior)
        assert drift(mini_sd, drawn, held.lora) < 0.8 * free, type(prior).__name__


def test_the_base_prediction_of_an_untrained_lora_is_its_own_target(mini_sd, subject):
    prior = BasePrediction(encode_prompts(mini_sd, [CLASS]))
    start = calibrate(mini_sd, subject, PLAIN).lora
    (batch,) = draw_noised(subject, 2, 1000, torch.Generator().manual_seed(0)).sizes
    with attached_lora(mini_sd.unet, start, trainable=True) as adapters:
        others = prior.draw(1, batch, 1000, torch.Generator())
        assert torch.equal(others.conditioning.tokens[0], others.conditioning.tokens[1])
        assert prior.loss(mini_sd, adapters, others).abs().max() < 1e-10
        assert not adapters.off


def test_what_a_mask_hides_stays_as_the_model_has_it(mini_sd, subject):
    """The mask shows the left half; the right one changes less than without the prior."""
    left = torch.zeros(1, 16, 16)
    left[..., :8] = 1
    masked = dataclasses.replace(subject, masks=(left,) * len(subject))
    (batch,) = draw_noised(masked, 8, 1000, torch.Generator().manual_seed(5)).sizes

    def moved(lora):
        with attached_lora(mini_sd.unet, lora) as adapters:
            return float(prior.loss(mini_sd, adapters, prior.draw(1, batch, 1000, None)).mean())

    training = dataclasses.replace(TRAINING, steps=8)
    prior = OutsideTheMask(masked)
    free = moved(run_training(mini_sd, masked, PLAIN, training).lora)
    held = moved(run_training(mini_sd, masked, PLAIN, training, prior=prior).lora)
    assert 0 < held < 0.7 * free
    with pytest.raises(SettingError, match="needs masks, and there is none that is used"):
        OutsideTheMask(subject)


def test_drawn_class_pictures_are_found_again(mini_sd, tmp_path, monkeypatch):
    first = class_images(mini_sd, CLASS, count=2, steps=2, folder=tmp_path)
    monkeypatch.setattr("cntlora_core.data.class_images.sample_latents", None)
    again = class_images(mini_sd, CLASS, count=2, steps=2, folder=tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(first.mean, again.mean, strict=True))


def test_another_text_encoder_does_not_find_the_pictures_of_the_first(
    mini_sd, tmp_path, monkeypatch
):
    first = class_images(mini_sd, CLASS, count=1, steps=1, folder=tmp_path)

    def read_otherwise(model, prompts, **sizes):
        words = conditioning.encode_prompts(model, prompts, **sizes)
        return dataclasses.replace(words, tokens=-words.tokens)

    monkeypatch.setattr("cntlora_core.data.class_images.encode_prompts", read_otherwise)
    drawn = []
    monkeypatch.setattr(
        "cntlora_core.data.class_images.sample_latents",
        lambda *_, **__: drawn.append(1) or torch.zeros(1, *first.mean[0].shape),
    )
    class_images(mini_sd, CLASS, count=1, steps=1, folder=tmp_path)
    assert drawn


def test_another_prediction_does_not_find_the_pictures_of_the_first(mini_sd, tmp_path):
    config = mini_sd.scheduler_config | {"rescale_betas_zero_snr": True}
    other = dataclasses.replace(mini_sd, schedule=NoiseSchedule.from_config(config))
    first, second = (
        class_images(model, CLASS, count=1, steps=1, folder=tmp_path) for model in (mini_sd, other)
    )
    assert not torch.equal(first.mean[0], second.mean[0])


@pytest.mark.parametrize("prior", ["images", "base"])
def test_from_the_command_line(tmp_path, prior):
    given = [
        "train",
        "--checkpoint",
        "mini-sd",
        "--images",
        str(MINI_SD_FOLDER / "subject"),
        "--trigger",
        "sks",
    ]
    given += [
        "--class-name",
        "cat face emoji",
        "--prompt",
        "a {trigger} {class}",
        "--class-prompt",
        CLASS,
    ]
    given += [
        "--prior-loss",
        prior,
        "--class-count",
        "4",
        "--cache",
        str(tmp_path / "cache"),
        "--steps",
        "2",
    ]
    assert main([*given, "--output", str(tmp_path / "x.safetensors")]) == 0
    assert len(list((tmp_path / "cache").iterdir())) >= 6 + 4


def test_a_prior_needs_its_class(tmp_path, capsys):
    given = [
        "train",
        "--checkpoint",
        "mini-sd",
        "--images",
        str(MINI_SD_FOLDER / "subject"),
        "--prompt",
        "x",
    ]
    assert main([*given, "--prior-loss", "base", "--output", str(tmp_path / "x.safetensors")]) == 1
    assert "needs --class-prompt" in capsys.readouterr().err


def test_the_best_weights_are_kept_and_patience_ends_the_run(mini_sd, subject):
    def validation(*losses):  # of the base, then at steps 0, 1, 2, ..., at two strengths each
        each = iter([0.1, *(loss for loss in losses for _ in range(2))])
        return lambda: next(each)

    training = TrainConfig(steps=20, learning_rate=3e-3, validate_every=1, patience=3)
    losses = validation(0.9, 0.5, 0.4, 0.6, 0.7, 0.8)
    run = run_training(mini_sd, subject, PLAIN, training, validate=losses)
    assert (run.kept_step, run.steps) == (2, 5)
    last = run_training(
        mini_sd,
        subject,
        PLAIN,
        dataclasses.replace(training, keep_best=False),
        validate=validation(0.9, 0.5, 0.4, *[0.6] * 20),
    )
    assert (last.kept_step, last.steps) == (5, 5)
    assert any(not torch.equal(run.lora[name].up, last.lora[name].up) for name in run.lora)
