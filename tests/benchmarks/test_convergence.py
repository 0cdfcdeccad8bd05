"""The fair comparison: PEFT's starts change nothing before training, and the arithmetic of cost."""

import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("peft")
pytest.importorskip("attr")
FOLDER = str(Path(__file__).resolve().parents[2] / "benchmarks")


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(FOLDER)
    import convergence
    import peer_starts

    yield convergence, peer_starts
    for name in ("convergence", "peer_starts"):
        del sys.modules[name]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("method", ["gaussian", "pissa", "eva", "corda", "lora_ga"])
def test_a_peers_start_leaves_the_models_function_as_it_is(bench, mini_sd, subject, method):
    from cntlora_core.lora import attached
    from cntlora_core.runs import validation_loss

    _, peers = bench
    validate = validation_loss(mini_sd, subject.only([0]), 8)
    before, weights = validate(), {k: v.clone() for k, v in mini_sd.unet.state_dict().items()}
    start = peers.peer_start(mini_sd, subject, method, 2, 0, passes=1)
    with peers.without(mini_sd, start.residuals), attached(mini_sd.unet, start.lora):
        assert validate() == pytest.approx(before, rel=1e-4)
    assert bool(start.residuals) == (method in ("pissa", "corda", "lora_ga"))
    assert (start.forward, start.backward) == {"eva": (4, 0), "corda": (4, 0), "lora_ga": (4, 4)}.get(method, (0, 0))
    assert all(torch.equal(weights[k], v) for k, v in mini_sd.unet.state_dict().items())


def test_cost_to_a_goal(bench):
    convergence, _ = bench
    curve = [(0, 1.0), (10, 0.8), (20, 0.9), (30, 0.4)]
    assert convergence.cost_to(curve, 0.9, 7) == pytest.approx(12)
    assert convergence.cost_to(curve, 1.0, 7) == 7
    assert convergence.cost_to(curve, 0.3, 7) == float("inf")


def test_the_best_rate_is_interior_only_between_tried_ones(bench):
    convergence, _ = bench
    rows = [
        {"key": ["s", "m", lr, 0, 10, 4], "base": 1.0, "cost": 2.0, "curve": [(0, 1.0), (10, loss)]}
        for lr, loss in ((0.1, 0.9), (0.2, 0.5), (0.3, 0.7))
    ]
    lr, curve, extra, interior = convergence._best_rate(rows)
    assert (lr, curve[-1], extra, interior) == (0.2, (10, 0.5), 2.0, True)
    assert not convergence._best_rate(rows[:2])[3]
