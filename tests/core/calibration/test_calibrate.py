import dataclasses
import sys
import weakref

import pytest
import torch

from cntlora_core import config as config_module
from cntlora_core.calibration import measure
from cntlora_core.calibration import passes as passes_module
from cntlora_core.calibration.calibrate import calibrate
from cntlora_core.calibration.closed_form import fitted_step
from cntlora_core.calibration.ranks import budget_of
from cntlora_core.calibration.sketch import Sketches
from cntlora_core.config import CalibrationConfig
from cntlora_core.data.batches import draw_noised, fixed_noised, mean_loss
from cntlora_core.data.class_images import class_images, class_noised
from cntlora_core.data.importance import Importance
from cntlora_core.errors import NonFiniteError
from cntlora_core.lora.adapter import Factors, attached_lora, parameter_count, scaled
from cntlora_core.lora.targets import find_projections

QUICK = CalibrationConfig(effort="quick", batch_size=2, seed=1)


def input_moments(model, projections, triples):
    """E[x x^T] of every projection, whole."""
    found, handles = {}, []
    for p in projections:

        def keep(_module, args, name=p.name):
            rows = args[0].reshape(-1, args[0].shape[-1])
            found[name] = rows.T @ rows / len(rows)

        handles.append(model.unet.get_submodule(p.name).register_forward_pre_hook(keep))
    with torch.no_grad():
        triples.sizes[0].loss(model)
    for handle in handles:
        handle.remove()
    return found


@pytest.fixture(scope="module")
def target(mini_sd, subject):
    return calibrate(mini_sd, subject, QUICK)


def test_target_lowers_the_loss_before_any_training(target):
    assert target.report.loss < 0.97 * target.report.base_loss
    assert target.report.backward_passes == (4 + 8) * 2
    assert (4 + 8 + 2 * 4) * 2 <= target.report.forward_passes <= (4 + 8 + 3 * 4) * 2


def test_refining_goes_on_where_the_sweep_ends(mini_sd, subject, held_out):
    """Lower on pictures that calibration never saw, and the cost is told."""
    losses = {}
    validate = fixed_noised(held_out, 1000)
    for effort in ("quick", "balanced"):
        start = calibrate(mini_sd, subject, dataclasses.replace(QUICK, effort=effort))
        with attached_lora(mini_sd.unet, start.lora):
            losses[effort] = mean_loss(mini_sd, validate, 8)
    assert start.report.backward_passes == (4 + 48) * 2
    base = mean_loss(mini_sd, validate, 8)
    assert losses["balanced"] < 0.95 * losses["quick"] < 0.95 * base
    assert losses["balanced"] < 0.8 * base


def test_what_the_sweep_held_is_gone_before_the_steps(mini_sd, subject, monkeypatch):
    """At SDXL's size it is a GB of the card, which the steps want."""
    made, alive = [], []

    def sketches(width):
        made.append(weakref.ref(own := Sketches(width)))
        return own

    def refined(*given):
        alive.append(made[0]())
        return natural_refine(*given)

    natural_refine = passes_module.Passes.refined
    monkeypatch.setattr(measure, "Sketches", sketches)
    monkeypatch.setattr(passes_module.Passes, "refined", refined)
    calibrate(mini_sd, subject, CalibrationConfig(effort="quick"))
    assert len(made) == 1
    assert alive == [None]


def test_more_refinement_begins_like_less(mini_sd, subject, monkeypatch):
    """The batches are drawn as they are asked for, so `thorough` passes through what `balanced`
    gives."""
    batches = {}
    for count in (2, 3):
        monkeypatch.setitem(config_module.EFFORTS, "quick", (2, count))
        seen = batches.setdefault(count, [])

        def keep(*args, into=seen, **more):
            _, lora, natural, drawn, _ = args
            into.extend(batch.noise for batch in drawn)
            return lora, natural

        monkeypatch.setattr(passes_module, "refine", keep)
        calibrate(mini_sd, subject, QUICK)
    assert len(batches[3]) == 3
    assert all(torch.equal(a, b) for a, b in zip(batches[2], batches[3], strict=False))


@pytest.mark.parametrize("init", ["target", "domain"])
def test_never_worse_than_the_base_on_its_own_set(mini_sd, subject, init):
    for seed in range(2):
        config = dataclasses.replace(QUICK, init=init, seed=seed)
        start = calibrate(mini_sd, subject, config)
        generator = torch.Generator().manual_seed(seed)
        triples = draw_noised(subject, 8, 1000, generator, Importance.usual())
        with attached_lora(mini_sd.unet, start.lora):
            after = mean_loss(mini_sd, triples, 4)
        assert after == pytest.approx(start.report.loss, rel=1e-4)
        assert after <= mean_loss(mini_sd, triples, 4) * (1 + 1e-6)


def test_steps_that_end_no_better_leave_the_sweeps_own(mini_sd, subject, monkeypatch):
    """And it is that one's size which is told, not the size that the steps began with."""
    found = []

    def fitted(*given):
        own = fitted_step(*given)
        found.append(dataclasses.replace(own, least=own.step / 2))
        return found[0]

    def ruined(self, subject, lora, start, *given):
        return scaled(lora, 1000.0), start

    monkeypatch.setattr(sys.modules[calibrate.__module__], "fitted_step", fitted)
    monkeypatch.setattr(passes_module.Passes, "refined", ruined)
    said = []
    made = calibrate(mini_sd, subject, QUICK, observer=said.append)
    assert made.report.loss == found[0].loss
    assert made.report.step_size == found[0].step
    assert made.natural is None, "training would run off as they did"
    assert any("training goes on by adamw" in getattr(e, "text", "") for e in said)


def test_data_ranks_use_the_budget_and_differ(mini_sd, target):
    projections = find_projections(mini_sd.unet)
    budget = budget_of(projections, 4)
    left = budget - parameter_count(target.lora)
    assert 0 <= left < min(p.parameters_per_rank for p in projections)  # nothing more fits
    assert len(set(target.report.ranks.values())) > 3


def test_a_layers_energy_is_what_the_loss_falls_by_along_its_part(mini_sd, subject, monkeypatch):
    """In one unit for layers that see few tokens and many: the ranks compare them by it."""
    monkeypatch.setitem(config_module.EFFORTS, "quick", (4, 0))
    config = dataclasses.replace(QUICK, rank_rule="uniform", targets="attention")
    start = calibrate(mini_sd, subject, config)
    generator = torch.Generator().manual_seed(config.seed)
    triples = draw_noised(subject, 8, 1000, generator, Importance.usual())
    still = {name: Factors(torch.zeros_like(f.up), f.down) for name, f in start.lora.items()}
    with attached_lora(mini_sd.unet, still, trainable=True) as adapters, torch.enable_grad():
        sum(batch.loss(mini_sd).sum() for batch in triples.batches(2)).backward()
        slopes = adapters.split(adapters.flat.grad)
    shares = [
        -float((slopes[name].up * factors.up).sum())
        / (start.report.step_size * start.report.energy[name])
        for name, factors in start.lora.items()
    ]
    assert min(shares) > 0.7  # a sketch misses a tenth of a gradient, more of a faint one
    assert max(shares) < 1.4


@pytest.mark.parametrize("init", ["target", "domain"])
def test_unit_response_on_the_subject(mini_sd, subject, init, monkeypatch):
    """a_k^T C a_k = 1 for every row of A, with C measured here by other means."""
    monkeypatch.setitem(config_module.EFFORTS, "quick", (4, 0))
    config = dataclasses.replace(QUICK, init=init, rank_rule="uniform", targets="attention")
    start = calibrate(mini_sd, subject, config)
    generator = torch.Generator().manual_seed(config.seed)
    triples = draw_noised(subject, 8, 1000, generator, Importance.usual())
    projections = find_projections(mini_sd.unet)
    inputs = input_moments(mini_sd, projections, triples)
    answers = []
    for p in projections:
        down = start.lora[p.name].down
        assert len(down) == 4
        answers.append(((down @ inputs[p.name]) * down).sum(1))
    answers = torch.cat(answers)
    assert 0.9 < answers.median() < 1.1, "C was known from a sample of its rows"
    assert answers.quantile(0.05) > 0.5
    assert answers.quantile(0.95) < 2


def test_same_seed_same_lora_and_an_untouched_model(mini_sd, subject, target):
    before = {k: v.clone() for k, v in mini_sd.unet.state_dict().items()}
    again = calibrate(mini_sd, subject, QUICK)
    assert again.report.ranks == target.report.ranks
    for name, factors in target.lora.items():
        assert torch.equal(factors.up, again.lora[name].up)
        assert torch.equal(factors.down, again.lora[name].down)
    assert all(torch.equal(v, before[k]) for k, v in mini_sd.unet.state_dict().items())
    assert not any(m._forward_hooks for m in mini_sd.unet.modules())
    assert all(p.grad is None for p in mini_sd.unet.parameters())


def test_pictures_one_by_one_give_what_they_give_together(mini_sd, subject, held_out, target):
    """But for the metric, which takes in each by itself."""
    single = calibrate(mini_sd, subject, QUICK, at_once=1)
    assert single.report.backward_passes == target.report.backward_passes
    validate = fixed_noised(held_out, 1000)
    losses = []
    for start in (single, target):
        with attached_lora(mini_sd.unet, start.lora):
            losses.append(mean_loss(mini_sd, validate, 8))
    base = mean_loss(mini_sd, validate, 8)
    assert abs(losses[0] - losses[1]) < 0.05 * (base - losses[1])


def test_a_prior_takes_the_update_off_the_class(mini_sd, subject):
    """More weight on preservation: less change of the outputs on the prior's activations, relative
    to the subject's."""
    prior = class_noised(mini_sd, class_images(mini_sd, "a cat face emoji", subject.resolution))
    projections = find_projections(mini_sd.unet)
    triples = draw_noised(subject, 16, 1000, torch.Generator().manual_seed(1))
    both = [input_moments(mini_sd, projections, seen) for seen in (prior, triples)]

    def leak(weight):
        config = dataclasses.replace(QUICK, preservation=weight, rank_rule="uniform")
        lora = calibrate(mini_sd, subject, config, prior=prior).lora
        ratios = []
        for p in projections:
            delta = lora[p.name].delta()
            change = [float(((delta @ inputs[p.name]) * delta).sum()) for inputs in both]
            ratios.append(change[0] / change[1])
        return sum(ratios) / len(ratios)

    assert leak(16.0) < leak(0.0)


def test_a_long_caption_beside_it_changes_nothing_of_a_short_ones(mini_sd, subject):
    """The short one is then repeated to the long one's length, which the UNet does not see."""
    words = subject.conditioning
    longer = dataclasses.replace(
        words, tokens=words.tokens.repeat(1, 3, 1), copies=torch.full((len(words),), 3)
    )
    own, repeated = (
        calibrate(mini_sd, dataclasses.replace(subject, conditioning=c), QUICK)
        for c in (words, longer)
    )

    def of_words(start):
        read = [name for name in start.lora if "attn2.to_k" in name or "attn2.to_v" in name]
        energy = start.report.energy
        share = sum(energy[name] for name in read) / sum(energy.values())
        return share, sum(start.report.ranks[name] for name in read)

    assert of_words(repeated)[0] == pytest.approx(of_words(own)[0], rel=0.5)  # 9 times as much
    assert of_words(repeated)[1] == pytest.approx(of_words(own)[1], abs=3)
    assert repeated.report.loss == pytest.approx(own.report.loss, rel=0.02)


@pytest.mark.parametrize("init", ["target", "domain"])
def test_damaged_weights_are_named(mini_sd, subject, init):
    weight = mini_sd.unet.conv_in.weight
    original = weight.data.clone()
    try:
        weight.data[0, 0, 0, 0] = float("nan")
        with pytest.raises(NonFiniteError, match=r"conv_in\.weight"):
            calibrate(mini_sd, subject, dataclasses.replace(QUICK, init=init))
    finally:
        weight.data.copy_(original)


def test_a_rank_larger_than_the_layers_is_clipped_and_said(mini_sd, subject):
    said = []
    config = CalibrationConfig(init="gaussian", rank=200, rank_rule="uniform")
    start = calibrate(mini_sd, subject, config, observer=said.append)
    assert max(start.report.ranks.values()) == 96
    assert any("Rank 200" in getattr(event, "text", "") for event in said)


def test_convolutions_share_the_ranks_and_pass_twice_alike(mini_sd, subject):
    """With gradient checkpointing, outside of which diffusers leaves some of them."""
    config = CalibrationConfig(
        rank=4, effort="quick", batch_size=2, targets="attention+ff+conv", seed=3
    )
    plain = calibrate(mini_sd, subject, config)
    twice = calibrate(mini_sd, subject, dataclasses.replace(config, gradient_checkpointing=True))
    layers = {p.name: p for p in find_projections(mini_sd.unet, config.targets)}
    assert sum(layers[name].convolution is not None for name in plain.lora) > 3
    assert parameter_count(plain.lora) <= budget_of(
        [p for p in layers.values() if p.attention], config.rank
    )
    assert plain.report.loss < plain.report.base_loss
    assert twice.report.base_loss == pytest.approx(plain.report.base_loss, rel=1e-5)
    assert twice.report.ranks == plain.report.ranks
    assert twice.report.loss == pytest.approx(plain.report.loss, rel=0.02)
    kept = {key.split(".", 1)[1] for key in plain.natural.moments.seconds if key[0] == "S"}
    assert kept == set(plain.lora), "nothing is kept of layers that got no rank"
