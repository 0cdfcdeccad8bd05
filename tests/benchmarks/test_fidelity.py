"""The measures beside the loss: their arithmetic, and that a damaged model scores worse."""

import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from cntlora_core.data.images import find_pictures
from cntlora_core.lora.adapter import Factors, attached_lora
from cntlora_core.lora.file import save_lora
from cntlora_core.lora.targets import find_projections
from cntlora_core.model.loader import MINI_SD_FOLDER

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"
PROMPTS = "a sks cat face emoji", "a cat face emoji"


@pytest.fixture
def script(monkeypatch):
    """The script under a name of its own; it and its siblings, whose names are common, are
    forgotten afterwards."""
    monkeypatch.setattr(sys, "path", [*sys.path, str(FOLDER)])
    spec = importlib.util.spec_from_file_location("benchmarks_fidelity", FOLDER / "fidelity.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look there
    spec.loader.exec_module(module)
    yield module
    for name in (spec.name, "common", "subjects", "train_encoder"):
        sys.modules.pop(name, None)


@pytest.fixture
def fidelity(script, monkeypatch):
    """The module, drawing little."""
    monkeypatch.setattr(script, "STEPS", 2)
    monkeypatch.setattr(script, "SUBJECT_SEEDS", range(2))
    monkeypatch.setattr(script, "CLASS_SEEDS", range(100, 102))
    monkeypatch.setattr(script, "UNRELATED", {"a red heart emoji": "heart", "a taxi emoji": "car"})
    return script


@pytest.fixture
def pictures():
    return [
        [p.image for p in find_pictures(MINI_SD_FOLDER / part)] for part in ("subject", "heldout")
    ]


@pytest.fixture
def damage(mini_sd):
    """A LoRA that moves every projection far and at random."""
    draw = torch.Generator().manual_seed(0)
    return {
        p.name: Factors(
            torch.randn(p.out_features, 1, generator=draw),
            0.3 * torch.randn(1, p.in_features, generator=draw),
        )
        for p in find_projections(mini_sd.unet)
    }


@pytest.fixture
def data(tmp_path):
    """240 emoji of 8 categories by two vendors, and one with a skin tone."""
    rows = [
        {
            "name": f"thing {i}",
            "short": "t",
            "vendor": v,
            "category": f"{i // 30}",
            "unified": f"{i:03}",
            "skin": None,
        }
        for v in ("twitter", "google")
        for i in range(240)
    ]
    rows.append(rows[0] | {"skin": "dark"})
    images = np.random.default_rng(0).integers(0, 255, (len(rows), 64, 64, 3), dtype=np.uint8)
    np.savez(tmp_path / "pretrain.npz", images=images)
    (tmp_path / "pretrain.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return tmp_path


def made_up(fidelity, **parts):
    e = torch.eye(4)
    given = {
        "train": e[:1],
        "held_out": e[:2],
        "drawn": e,
        "asked": ("c", "c", "u", "u"),
        "seeds": (0, 1, 2, 2),
    }
    return fidelity.Reference(encoder=None, prompt="s", **given | parts)


def test_subject_scores_by_hand(fidelity):
    e = torch.eye(4)
    x = torch.stack([e[0], 0.6 * e[0] + 0.8 * e[1]])
    scores = fidelity.subject_scores(x, made_up(fidelity))
    assert scores["subject"] == pytest.approx((1 + 0 + 0.6 + 0.8) / 4)
    assert scores["subject_nearest"] == pytest.approx((1 + 0.8) / 2)
    assert scores["copying"] == pytest.approx((1 + 0.6) / 2)
    assert scores["variety"] == pytest.approx(1 - 0.6)


def test_prompt_scores_keep_class_and_unrelated_apart(fidelity):
    e = torch.eye(4)
    same = fidelity.prompt_scores(e, made_up(fidelity))
    assert same == {"class": 1, "unrelated": 1, "leak": 0.5}
    other = fidelity.prompt_scores(torch.stack([e[0], e[2], e[2], e[0]]), made_up(fidelity))
    assert other == {"class": 0.5, "unrelated": 0.5, "leak": 0.25}
    leaked = fidelity.prompt_scores(torch.stack([e[0], e[0], e[2], e[3]]), made_up(fidelity))
    assert leaked == {"class": 0.5, "unrelated": 1, "leak": 0.5}


def test_the_base_model_keeps_everything_and_a_damaged_one_does_not(
    fidelity, mini_sd, pictures, damage
):
    to = fidelity.reference(mini_sd, *pictures, *PROMPTS)
    base = fidelity.prompt_fidelity(mini_sd, to)
    assert base["class"] == pytest.approx(1, abs=1e-5)
    assert base["unrelated"] == pytest.approx(1, abs=1e-5)
    subject = fidelity.subject_fidelity(mini_sd, to)
    assert subject == fidelity.subject_fidelity(mini_sd, to)
    own = fidelity.subject_scores(to.train, to)
    assert own["subject"] > subject["subject"] + 0.2
    assert own["copying"] == pytest.approx(1, abs=1e-5)
    with attached_lora(mini_sd.unet, damage):
        damaged = fidelity.prompt_fidelity(mini_sd, to)
        assert fidelity.subject_fidelity(mini_sd, to) != subject
    assert damaged["class"] < 0.7
    assert damaged["unrelated"] < 0.7


@pytest.mark.parametrize(
    ("class_prompt", "asked"),
    [
        ("a cat face emoji", ["a red heart emoji", "a taxi emoji"]),
        ("a heart emoji", ["a taxi emoji"]),
    ],
)
def test_the_subjects_own_class_is_not_unrelated(fidelity, mini_sd, pictures, class_prompt, asked):
    to = fidelity.reference(mini_sd, *pictures, "a sks emoji", class_prompt)
    assert list(dict.fromkeys(to.asked)) == [class_prompt, *asked]
    assert len(to.asked) == len(to.seeds) == len(to.drawn) == 2 + 2 * len(asked)


def test_every_unrelated_prompt_belongs_to_a_class_of_the_subjects_or_to_none(script):
    kinds = {subject.class_name for subject in sys.modules["subjects"].SUBJECTS.values()}
    assert set(script.UNRELATED.values()) - kinds == {"tree"}


def test_pictures_of_the_domain_are_spread_and_disjoint(fidelity, data):
    measured, prior = fidelity.domain_pictures(data)
    assert (len(measured), len(prior)) == (48, 32)
    emoji = [{p.name.split()[0] for p in part} for part in (measured, prior)]
    assert [len(e) for e in emoji] == [48, 32]
    assert not emoji[0] & emoji[1]
    for part in (measured, prior):
        assert {int(p.name.split()[0]) // 30 for p in part} == set(range(8))
        assert {sum(v in p.name for p in part) for v in ("twitter", "google")} == {len(part) // 2}
        assert all(
            p.caption == f"thing {int(p.name[:3])} emoji, {p.name.split()[1]} style" for p in part
        )
    again = fidelity.domain_pictures(data)
    assert [p.digest for p in again[0]] == [p.digest for p in measured]


def test_forgetting_is_one_for_the_base_model_and_more_when_damaged(
    fidelity, mini_sd, data, damage, monkeypatch
):
    monkeypatch.setattr(fidelity, "MEASURED", 3)
    monkeypatch.setattr(fidelity, "PRIOR", 2)
    of = fidelity.domain(mini_sd, data)
    assert len(of.triples) == 3 * 8
    assert fidelity.forgetting(mini_sd, of) == 1
    with attached_lora(mini_sd.unet, damage):
        assert fidelity.forgetting(mini_sd, of) > 1.1


def test_the_prior_has_each_of_its_pictures_once_with_its_own_caption(fidelity, mini_sd, data):
    triples = fidelity.prior_triples(mini_sd, data)
    (batch,) = triples.sizes
    assert len(batch) == 32
    assert len({row.numpy().tobytes() for row in batch.conditioning.tokens}) == 32
    assert len({row.numpy().tobytes() for row in batch.latents}) == 32
    assert torch.diff(batch.timesteps.sort().values).max() < 2 * 1000 / 32 + 1


def test_a_file_is_measured_from_the_command_line(
    fidelity, mini_sd, data, damage, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(fidelity, "MEASURED", 3)
    monkeypatch.setattr(fidelity, "PRIOR", 2)
    file = save_lora(tmp_path / "lora.safetensors", damage, mini_sd.family, {})
    monkeypatch.setattr(sys, "argv", ["fidelity.py", str(file), "--data", str(data)])
    monkeypatch.setattr(torch, "set_num_threads", lambda n: None)
    fidelity.main()
    result = json.loads(capsys.readouterr().out)
    scores, base = result["lora"], result["base"]
    subject = ["subject", "subject_nearest", "copying", "variety"]
    assert list(scores) == list(base) == [*subject, "class", "unrelated", "leak", "forgetting"]
    assert list(result["training_pictures"]) == subject
    assert [base[name] for name in ("class", "unrelated", "forgetting")] == [1, 1, 1]
    assert scores["forgetting"] > 1.1
    assert scores["unrelated"] < 0.7


def test_a_folder_without_prompts_is_refused(fidelity, tmp_path):
    with pytest.raises(
        SystemExit, match=r"has no train/metadata\.jsonl with prompt and class_prompt"
    ):
        fidelity.prompts_of(tmp_path)
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "metadata.jsonl").write_text(
        json.dumps({"prompt": "a", "class_prompt": "b"}) + "\n"
    )
    assert fidelity.prompts_of(tmp_path) == ("a", "b")
