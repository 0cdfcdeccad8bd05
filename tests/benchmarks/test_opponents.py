"""The opponents: strengths, optimisers of matrices, what is measured at every cost."""

import sys

import pytest
import torch

from cntlora_core.lora.adapter import Factors, attached_lora
from cntlora_core.training.validation import validation_loss


@pytest.fixture
def opponents(benchmark_script):
    return benchmark_script("opponents")


@pytest.mark.parametrize(
    ("best", "found"), [(1.2, 1.0), (0.83, 0.8), (0.55, 0.6), (0.1, 0.4), (0.91, 1.0)]
)
def test_the_best_of_the_strengths_is_found(opponents, best, found):
    strength, loss = sys.modules["strengths"].strongest_strength(lambda s: 1 + (s - best) ** 2)
    assert (strength, loss) == (found, 1 + (found - best) ** 2)


def test_the_judge_leaves_what_is_attached(opponents, mini_sd, subject):
    layer = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
    width = mini_sd.unet.get_submodule(layer).in_features
    lora = {layer: Factors(torch.randn(width, 2), torch.randn(2, width))}
    judge = opponents.Judge(validation_loss(mini_sd, subject.only([0]), 8))
    with attached_lora(mini_sd.unet, lora) as adapters:
        found = judge(adapters)
        assert adapters.flat.equal(adapters.flat_of(lora))
    assert found["loss"] <= found["whole"]
    assert found["strength"] < 1  # noise


def test_steps_on_factors_are_those_of_their_optimiser(opponents):
    optimizers = sys.modules["factor_optimizers"]
    torch.manual_seed(0)
    adapters = sys.modules["cntlora_core.lora.adapter"].Adapters(
        {"a": Factors(torch.randn(5, 2), torch.randn(2, 3))}, torch.device("cpu"), True
    )
    before = adapters.factors()["a"]
    optimizer = optimizers.OnFactors(adapters, lambda parts: torch.optim.SGD(parts))
    optimizer.param_groups[0]["lr"] = 0.5
    adapters.flat.grad = torch.ones_like(adapters.flat)
    optimizer.step()
    after = adapters.factors()["a"]
    assert torch.allclose(after.up, before.up - 0.5)
    assert torch.allclose(after.down, before.down - 0.5)


def test_a_riemannian_step_does_not_see_how_the_update_is_factored(opponents):
    """Of B A = (B R^-1)(R A), Zhang & Pilanci 2024, section 4."""
    riemannian = sys.modules["factor_optimizers"].riemannian
    torch.manual_seed(0)
    up, down, G = (torch.randn(*s, dtype=torch.float64) for s in ((6, 2), (2, 4), (6, 4)))
    R = torch.randn(2, 2, dtype=torch.float64)

    def change(own):
        step = riemannian(own, Factors(G @ own.down.T, own.up.T @ G))
        return step.up @ own.down + own.up @ step.down

    other = Factors(up @ torch.linalg.inv(R), R @ down)
    assert torch.allclose(change(Factors(up, down)), change(other), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    "name", ["ours, held out", "with feed-forward, 2, Muon", "kohya as it comes"]
)
def test_a_run_is_measured_at_every_cost(opponents, mini_sd, subject, monkeypatch, name):
    monkeypatch.setattr(opponents, "COSTS", (2, 6))
    monkeypatch.setitem(sys.modules["cntlora_core.config"].EFFORTS, "quick", (1, 1))
    validate = validation_loss(mini_sd, subject.only([1]), 8)
    method = opponents.METHODS[name]
    alone = validation_loss(mini_sd, subject.only([0]), 8) if method.held_out else None
    judge = opponents.Judge(validate, alone)
    row = opponents.run(mini_sd, subject, judge, method, method.rates[0], 4, 0)
    assert [cost for cost, _ in row["loss"]] == [2, 6]
    (_, first), (_, last) = row["loss"]
    assert (first == 1) == method.held_out  # its looks cost more than 2 steps
    assert 0 < last != 1
