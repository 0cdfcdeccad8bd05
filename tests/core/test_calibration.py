import dataclasses

import pytest
import torch

from cntlora_core.calibration import calibrate
from cntlora_core.config import CalibrationConfig
from cntlora_core.errors import NonFiniteError
from cntlora_core.lora import attached, parameter_count
from cntlora_core.projections import find_projections
from cntlora_core.ranks import budget_of
from cntlora_core.runs import class_pictures, class_triples
from cntlora_core.statistics import record
from cntlora_core.triples import draw_triples, mean_loss

QUICK = CalibrationConfig(passes=3, batch_size=4, seed=1)


@pytest.fixture(scope="module")
def target(mini_sd, subject):
    return calibrate(mini_sd, subject, QUICK)


def test_target_lowers_the_loss_before_any_training(target):
    assert target.report.loss < 0.97 * target.report.base_loss
    assert target.report.backward_passes == 12
    assert target.report.forward_passes >= 24


@pytest.mark.parametrize("init", ["target", "domain"])
def test_never_worse_than_the_base_on_its_own_set(mini_sd, subject, init):
    for seed in range(2):
        config = dataclasses.replace(QUICK, init=init, seed=seed, passes=2)
        start = calibrate(mini_sd, subject, config)
        triples = draw_triples(subject, 8, 1000, torch.Generator().manual_seed(seed))
        with attached(mini_sd.unet, start.lora):
            after = mean_loss(mini_sd, triples, 4)
        assert after == pytest.approx(start.report.loss, rel=1e-4)
        assert after <= mean_loss(mini_sd, triples, 4) * (1 + 1e-6)


def test_data_ranks_use_the_budget_and_differ(mini_sd, target):
    projections = find_projections(mini_sd.unet)
    budget = budget_of(projections, 4)
    smallest = min(p.parameters_per_rank for p in projections)
    assert budget - max(p.parameters_per_rank for p in projections) < parameter_count(target.lora) <= budget
    assert smallest > 0
    assert len(set(target.report.ranks.values())) > 3


@pytest.mark.parametrize("init", ["target", "domain"])
def test_unit_response_on_the_subject(mini_sd, subject, init):
    """a_k^T C a_k = 1 for every row of A, with C measured here by other means."""
    config = dataclasses.replace(QUICK, init=init, rank_rule="uniform", passes=1)
    start = calibrate(mini_sd, subject, config)
    triples = draw_triples(subject, 4, 1000, torch.Generator().manual_seed(config.seed))
    projections = find_projections(mini_sd.unet)
    with record(mini_sd.unet, projections, backward=False) as moments, torch.no_grad():
        triples.sizes[0].loss(mini_sd)
    for p in projections:
        down = start.lora[p.name].down
        assert len(down) == 4
        torch.testing.assert_close(((down @ moments.C(p)) * down).sum(1), torch.ones(4), rtol=2e-2, atol=2e-2)


def test_sweeps_share_the_rank(mini_sd, subject):
    config = dataclasses.replace(QUICK, sweeps=2, rank=3, passes=2, rank_rule="uniform")
    start = calibrate(mini_sd, subject, config)
    assert set(start.report.ranks.values()) == {3}
    assert len(start.report.step_sizes) == 2


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


def test_a_prior_takes_the_update_off_the_class(mini_sd, subject):
    """More weight on preservation: less change of the outputs on the prior's activations, relative to the subject's."""
    prior = class_triples(mini_sd, class_pictures(mini_sd, "a cat face emoji", subject.resolution))
    projections = find_projections(mini_sd.unet)
    with record(mini_sd.unet, projections, backward=False) as kept, torch.no_grad():
        prior.sizes[0].loss(mini_sd)
    triples = draw_triples(subject, 12, 1000, torch.Generator().manual_seed(1))
    with record(mini_sd.unet, projections, backward=False) as subjects, torch.no_grad():
        triples.sizes[0].loss(mini_sd)

    def leak(weight):
        config = dataclasses.replace(QUICK, preservation=weight, rank_rule="uniform")
        lora = calibrate(mini_sd, subject, config, prior=prior).lora
        ratios = []
        for p in projections:
            delta = lora[p.name].delta()
            change = [float(((delta @ moments.C(p)) * delta).sum()) for moments in (kept, subjects)]
            ratios.append(change[0] / change[1])
        return sum(ratios) / len(ratios)

    assert leak(16.0) < leak(0.0)


def test_damaged_weights_are_named(mini_sd, subject):
    weight = mini_sd.unet.conv_in.weight
    original = weight.data.clone()
    try:
        weight.data[0, 0, 0, 0] = float("nan")
        with pytest.raises(NonFiniteError, match=r"conv_in\.weight"):
            calibrate(mini_sd, subject, QUICK)
    finally:
        weight.data.copy_(original)


def test_a_rank_larger_than_the_layers_is_clipped_and_said(mini_sd, subject):
    said = []
    config = CalibrationConfig(init="gaussian", rank=200, rank_rule="uniform")
    start = calibrate(mini_sd, subject, config, observer=said.append)
    assert max(start.report.ranks.values()) == 96
    assert any("Rank 200" in getattr(event, "text", "") for event in said)
