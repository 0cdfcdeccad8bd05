"""The opponents: strengths, optimisers of matrices, what is measured at every cost."""

import json
import sys

import numpy as np
import pytest
import torch
from PIL import Image

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


def test_only_ordinary_loras_share_the_rank_among_more_layers(opponents):
    names = "attention, 2", "with feed-forward, 2", "with convolutions, 2"
    names += "ours", "ours, no convolutions", "ours, held out"
    ranks = [opponents.rank_of(opponents.METHODS[name], 4) for name in names]
    assert ranks == [4, 2, 1, 4, 4, 4]


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
    "name", ["ours, held out", "with feed-forward, 2, Muon", "kohya as it comes", "PEFT's EVA"]
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


COSTS = (10, 30, 60)
LOSSES = {  # by method, rate and seed
    ("with feed-forward, 2", 0.003, 0): (0.8, 0.7, 0.5),
    ("with feed-forward, 2", 0.003, 1): (0.8, 0.9, 0.7),
    ("with feed-forward, 1", 0.003, 0): (0.7, 0.75, 0.8),
    ("attention, 2", 0.003, 0): (0.1, 0.1, 0.1),
    ("ours", 0.0, 0): (0.7, 0.6, 0.65),
    ("ours", 0.0, 1): (0.7, 0.5, 0.65),
    ("ours, held out", 0.0, 0): (1.0, 0.64, 0.6),
}
METHODS = ("with feed-forward, 2", "with feed-forward, 1", "ours", "ours, held out")


@pytest.fixture
def results(opponents, tmp_path):
    for number, name in enumerate(("cat_faces", "cars")):
        for (method, rate, seed), losses in LOSSES.items():
            by = 1 - 0.1 * number
            found = [[c, x if x == 1 else x * by] for c, x in zip(COSTS, losses, strict=True)]
            results = opponents.Results(tmp_path / "runs.jsonl", "mini-sd")
            results.add([4, name, method, rate, seed], {"loss": found})
    return opponents.Results(tmp_path / "runs.jsonl", "mini-sd")


def test_a_file_is_of_one_model(opponents, results):
    with pytest.raises(SystemExit, match="holds runs of 'mini-sd': give another --output"):
        opponents.Results(results.path, "other")


def test_the_strongest_is_the_best_setting_at_each_cost(opponents, results):
    report = sys.modules["opponents_report"]
    settings = results.of(4, "cat_faces")
    assert report.strongest(settings, METHODS) == {10: 0.7, 30: 0.75, 60: pytest.approx(0.6)}
    assert report.strongest(settings, ("attention, 2",)) == {10: 0.1, 30: 0.1, 60: 0.1}
    assert report.strongest(settings, ("ours",)) == {}


def test_the_report_says_shares_and_when_the_best_is_reached(opponents, results):
    report = sys.modules["opponents_report"]
    lines = report.report(results, 4, ["cat_faces", "cars", "not run"], METHODS).splitlines()
    assert lines[:2] == ["| rank 4 | 10 | 30 | 60 |", "|---|---|---|---|"]
    assert "| cat faces: strongest ordinary | 0.700 | 0.750 | 0.600 |" in lines
    assert "| cat faces: ours | 0.700 | 0.550 | 0.650 |" in lines
    assert "| cars: ours, held out |  | 0.576 | 0.540 |" in lines  # not begun at cost 10
    assert "| median share: ours | 1.000 | 0.733 | 1.083 |" in lines
    assert "| median share, each keeping its best so far: ours | 1.000 | 0.786 | 0.917 |" in lines
    # 0.7 at cost 10 and 0.55 at cost 30: 0.6 is reached at 23.3, of 60
    assert "| cat faces: ours | 0.600, 60 | 0.39, 0.917 |" in lines
    assert "| ours, of with feed-forward, 1 at 0.003 | 1.000 | 0.733 | 0.812 |" in lines
    assert not any("so far: ours, held out" in line for line in lines)  # that were hindsight
    alone = report.report(results, 4, ["cars"], ["ours", "ours, held out"]).splitlines()
    assert alone[0] == "| rank 4 | 10 | 30 | 60 |"
    assert alone[3] == "| cars: ours, held out |  | 0.576 | 0.540 |"
    assert report.report(results, 16, ["cars"], METHODS) == "Nothing was run yet."


def test_what_is_never_reached_has_no_cost(opponents):
    report = sys.modules["opponents_report"]
    assert report.cost_to({10: 0.7, 30: 0.5}, 0.4) is None
    assert report.cost_to({10: 0.7, 30: 0.5}, 0.8) == 10
    assert report.cost_to({10: 0.7, 30: 0.5}, 0.6) == pytest.approx(20)


def test_the_figure_has_a_panel_for_each_subject(opponents, results):
    report = sys.modules["opponents_report"]
    pixels = np.asarray(report.figure(results, 4, ["cat_faces", "cars"], METHODS))
    blank = pixels.min(2).min(0) == 255  # columns
    assert pixels.shape[1] == 1080
    assert not blank[60:340].all()
    assert blank[-300:].all()  # two panels of three


def test_only_what_is_trained_on_is_shown_in_several_crops(benchmark_script, mini_sd, tmp_path):
    for part in ("train", "heldout"):
        (tmp_path / part).mkdir()
        for n in range(2):
            Image.new("RGB", (64, 64), (90 * n, 20, 20)).save(tmp_path / part / f"{n}.png")
    said = {"file_name": "0.png", "text": "a", "prompt": "a sks cat", "class_prompt": "a cat"}
    (tmp_path / "train" / "metadata.jsonl").write_text(json.dumps(said), encoding="utf-8")
    read = benchmark_script("subject_folders").read_halves
    assert [len(half) for half in read(mini_sd, tmp_path)] == [2, 2]
    train, held_out = read(mini_sd, tmp_path, random_crop=True)
    assert (len(train), len(held_out)) == (8, 2)
    assert {train.prompt, held_out.prompt} == {"a sks cat"}


def test_one_results_file_holds_no_runs_with_other_crops(opponents, results, monkeypatch):
    words = f"opponents.py --report --output {results.path} --subjects cars --methods ours"
    monkeypatch.setattr(sys, "argv", words.split())
    opponents.main()
    monkeypatch.setattr(sys, "argv", [*words.split(), "--random-crop"])
    with pytest.raises(SystemExit, match="holds runs of 'mini-sd': give another --output"):
        opponents.main()
