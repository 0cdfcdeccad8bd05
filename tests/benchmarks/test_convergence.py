"""The fair comparison: PEFT's starts change nothing before training, and the arithmetic of cost."""

import importlib
import itertools
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("peft")
pytest.importorskip("attr")
FOLDER = str(Path(__file__).resolve().parents[2] / "benchmarks")


MODULES = ("convergence", "convergence_report", "peer_starts", "starts")


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(FOLDER)
    yield SimpleNamespace(**{name: importlib.import_module(name) for name in MODULES})
    for name in MODULES:
        del sys.modules[name]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("method", ["gaussian", "pissa", "eva", "corda", "lora_ga"])
def test_a_peers_start_leaves_the_models_function_as_it_is(bench, mini_sd, subject, method):
    from cntlora_core.lora.adapter import attached_lora
    from cntlora_core.training.validation import validation_loss

    peers = bench.peer_starts
    validate = validation_loss(mini_sd, subject.only([0]), 8)
    before, weights = validate(), {k: v.clone() for k, v in mini_sd.unet.state_dict().items()}
    start = peers.peer_start(mini_sd, subject, method, 2, 0, passes=1, batch_size=4)
    with peers.without(mini_sd, start.residuals), attached_lora(mini_sd.unet, start.lora):
        assert validate() == pytest.approx(before, rel=1e-4)
    assert bool(start.residuals) == (method in ("pissa", "corda", "lora_ga"))
    assert (start.forward, start.backward) == {
        "eva": (4, 0),
        "corda": (4, 0),
        "lora_ga": (4, 4),
    }.get(method, (0, 0))
    assert all(torch.equal(weights[k], v) for k, v in mini_sd.unet.state_dict().items())


def test_cost_to_a_goal(bench):
    curve = [(7, 1.0, 0.0), (17, 0.8, 2.0), (27, 0.9, 4.0), (37, 0.4, 6.0)]
    reached = bench.convergence_report.reached
    assert reached(curve, 0.9) == pytest.approx(12)
    assert reached(curve, 0.9, 2) == pytest.approx(1)
    assert reached(curve, 1.0) == 7
    assert reached(curve, 0.3) == float("inf")


def row(subject, method, lr, seed, losses, start=0):
    curve = [(start + 10 * i, loss, float(i)) for i, loss in enumerate(losses)]
    return {
        "key": [subject, method, lr, seed, 20, 4],
        "start": start,
        "step0": losses[0],
        "curve": curve,
    }


def test_the_best_rate_is_interior_only_between_tried_ones(bench):
    rows = [row("s", "m", lr, 0, [1.0, loss]) for lr, loss in ((0.1, 0.9), (0.2, 0.5), (0.3, 0.7))]
    chosen = bench.convergence_report.chosen
    assert chosen(rows, ["s"], "m") == (0.2, True)
    assert chosen(rows[:2], ["s"], "m") == (0.2, False)
    other = [
        row("t", "m", 0.1, 0, [1.0, 0.0]),
        row("s", "m", 0.1, 1, [1.0, 0.0]),
    ]  # another subject, another seed
    assert chosen(rows + other, ["s"], "m") == (0.2, True)


def test_the_table_counts_calibration_and_names_what_never_arrives(bench):
    rows = [
        row(subject, method, 0.1, seed, losses, start)
        for subject in ("s", "t")
        for seed in (0, 1)
        for method, losses, start in (
            ("gaussian", [1.0, 0.8, 0.6], 0),
            ("target", [0.8, 0.6, 0.5], 5),
            ("eva", [1.0, 0.9, 0.7], 4),
        )
    ]
    text = bench.convergence_report.report(
        rows, ["s"], ["t"], baselines=["gaussian"], peers=["eva"]
    )
    assert text.count("0.800 / 0.500 / 15 | 0.75 (0.75-0.75)") == 2  # 15 steps of the baseline's 20
    assert text.count("1.000 / 0.700 / never") == 2
    assert "Not used for any choice" in text
    assert "The best of eva on each subject: median share never." in text


def test_permuted_ranks_keep_the_parameters(bench, mini_sd):
    from cntlora_core.lora.adapter import default_init, parameter_count
    from cntlora_core.lora.targets import find_projections

    projections = find_projections(mini_sd.unet, "attention+ff")
    generator = torch.Generator().manual_seed(0)
    ranks = {p.name: 1 + i % 5 for i, p in enumerate(projections)}
    lora = default_init(projections, ranks, generator)
    shuffled = bench.starts._permuted(projections, lora, 0)
    assert shuffled != ranks
    assert parameter_count(default_init(projections, shuffled, generator)) == parameter_count(lora)


def test_random_directions_answer_the_subject_with_unit_power(bench, mini_sd, subject):
    from cntlora_core.data.batches import draw_noised
    from cntlora_core.lora.targets import find_projections

    lora = bench.starts._random(mini_sd, subject, 2, 0).lora
    triples = draw_noised(subject, 32, 1000, torch.Generator().manual_seed(0))
    p = find_projections(mini_sd.unet)[0]
    seen = []
    layer = mini_sd.unet.get_submodule(p.name)
    handle = layer.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        triples.sizes[0].loss(mini_sd)
    handle.remove()
    answers = (seen[0] @ lora[p.name].down.T).square().mean((0, 1))
    torch.testing.assert_close(answers, torch.ones(2), rtol=0.2, atol=0)


def test_refinement_is_watched_on_the_way(bench, mini_sd, subject, held_out):
    from cntlora_core.training.validation import validation_loss

    watch = bench.starts.Stopwatch(validation_loss(mini_sd, held_out, 16))
    begin, path = bench.starts.make_start(mini_sd, subject, "target balanced", 4, 0, watch)
    cost = bench.starts.steps_worth(begin.forward, begin.backward)
    assert [round(b[0] - a[0]) for a, b in itertools.pairwise(path)] == [2] * 11  # 48 batches of 2
    assert path[-1][0] + 1 == cost  # the last look at the sweep's pictures
    assert path[-1][1] < path[0][1]


def test_what_an_ordinary_lora_pays(monkeypatch):
    monkeypatch.syspath_prepend(FOLDER)
    tradeoff = importlib.import_module("tradeoff_report")
    ordinary = [(0.9, 1.1), (0.7, 1.3)]
    assert tradeoff.at(ordinary, 0.8) == pytest.approx(1.2)
    assert tradeoff.at(ordinary, 0.6) is None
    way = [(1.0, 1.0), (0.8, 1.1), (0.6, 1.3), (0.7, 1.9)]  # the last look is past its best
    assert [tradeoff.compared(x, way, min) for x in (0.9, 0.7, 0.5)] == pytest.approx(
        [1.05, 1.2, 1.3]
    )
    assert tradeoff.compared(1.1, way, min) is None
    assert tradeoff.compared(0.9, [(0.2, 0.9), (0.6, 0.7)], max) == 0.7
    assert tradeoff.compared(0.1, [(0.2, 0.9), (0.6, 0.7)], max) is None
    rows = [
        {
            "subject": "s",
            "seed": 0,
            "contestant": c,
            "when": "w",
            "loss": x,
            "forgetting": f,
            "subject_fidelity": s,
            "class": 1,
            "unrelated": u,
        }
        for c, x, f, s, u in (("ordinary", 0.8, 1.2, 0.5, 0.7), ("ours", 0.9, 1.02, 0.5, 0.8))
    ]
    assert (
        "| ours | w | 0.900 | 1.020 | 0.500 | 1.000 | 0.800 | 0.20 (1 of 1) | +0.100 (1 of 1) |"
        in tradeoff.report(rows)
    )


def test_what_is_forgotten_at_equal_loss(monkeypatch):
    """The ordinary LoRA comes to 0.8, by 1.3 and, at another look, by 1.2; ours to 0.6 by 1.4, and
    on its way past 0.8 by 1.15."""
    monkeypatch.syspath_prepend(FOLDER)
    tradeoff = importlib.import_module("tradeoff_report")
    paths = {
        "ordinary": [[(0.9, 1.1), (0.8, 1.3)], [(0.85, 1.1), (0.8, 1.2)]],
        "ours": [[(0.9, 1.1), (0.7, 1.2), (0.6, 1.4)]],
        "worse": [[(0.95, 1.05), (0.9, 1.15), (0.92, 1.3)]],
    }
    assert tradeoff.least(paths["ours"], 0.8) == pytest.approx(1.15)
    assert tradeoff.least(paths["ours"], 0.6) == pytest.approx(1.4)
    assert tradeoff.least(paths["ordinary"], 0.8) == pytest.approx(1.2)
    rows = [
        {"subject": "s", "seed": 0, "contestant": name, "path": path}
        for name, own in paths.items()
        for path in own
    ]
    table = tradeoff.at_equal_loss(rows)
    assert "| ours | 1.150 | 1.200 | 0.75 (1) | 1.100 | 1.067 | 1.50 (1) |" in table
    assert "| worse | 1.150 | 1.067 | 2.25 (1) | 1.050 | 1.033 | 1.50 (1) |" in table
