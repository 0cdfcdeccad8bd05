"""`cntlora train` with several subjects and with masks."""

import argparse
import json
from types import SimpleNamespace

import pytest
from PIL import Image

from cntlora_core.cli import identity
from cntlora_core.cli.main import main
from cntlora_core.data import class_images, dataset
from cntlora_core.model import conditioning
from cntlora_core.training import identity as run_identity
from cntlora_core.training.resume import RunSnapshots

SHORT = ["--init", "gaussian", "--steps", "2", "--batch-size", "1", "--validate-every", "0"]


@pytest.fixture
def folders(tmp_path):
    """Of two subjects, a picture each."""
    for name, colour in (("red", (200, 20, 20)), ("blue", (20, 20, 200))):
        (tmp_path / name).mkdir()
        Image.new("RGB", (64, 64), colour).save(tmp_path / name / "a.png")
    return tmp_path


def train(folder, *more, other=("zwx", "thing")):
    given = ["train", "--checkpoint", "mini-sd", "--images", str(folder / "red"), *SHORT]
    given += ["--trigger", "sks", "--class-name", "thing", "--prompt", "a {trigger} {class}"]
    given += ["--and-subject", str(folder / "blue"), *other] if other else []
    return main([*given, "--output", str(folder / "x.safetensors"), *more])


def events(log):
    return [json.loads(line) for line in log.read_text().splitlines()]


def steps(log):
    return [e["step"] for e in events(log) if e["type"] == "step"]


def test_another_second_subject_does_not_go_on_from_the_checkpoint(folders, capsys, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr(RunSnapshots, "remove", lambda self: None)  # as a kill leaves it
        assert train(folders, "--checkpoint-every", "1") == 0
    capsys.readouterr()
    for other, says in (
        (("abc", "thing"), "its trigger is 'sks, zwx', now it is 'sks, abc'"),
        (("zwx", "dog"), "captions: not the same as then"),
        ((), "pictures: not the same as then"),
    ):
        assert train(folders, "--resume", other=other) == 1
        assert f"is of another run: {says}." in capsys.readouterr().err
    log = folders / "log.jsonl"
    assert train(folders, "--resume", "--steps", "3", "--events", str(log)) == 0
    assert steps(log) == [3]


def test_captions_without_a_trigger_are_told(folders, capsys):
    (folders / "red" / "a.txt").write_text("a red thing")
    given = ["--checkpoint", "mini-sd", "--images", str(folders / "red"), "--prompt", "a sks cat"]
    assert main(["train", *given, *SHORT, "--output", str(folders / "x.safetensors")]) == 0
    assert "1 caption is read in place of the prompt" in capsys.readouterr().err
    assert main(["check", "--images", str(folders / "red")]) == 0
    assert "1 caption is read in place of the prompt" in capsys.readouterr().out


def test_a_prior_outside_the_masks(folders, capsys):
    assert train(folders, "--prior-loss", "masked") == 1
    assert "needs masks, and there is none that is used: turn on masked" in capsys.readouterr().err
    half = Image.new("L", (64, 64), 0)
    half.paste(255, (0, 0, 32, 64))
    half.save(folders / "red" / "a-masklabel.png")
    log = folders / "log.jsonl"
    assert train(folders, "--prior-loss", "masked", "--masked", "--events", str(log)) == 0
    assert steps(log) == [1, 2]
    assert not [e for e in events(log) if "no effect" in e.get("text", "")]


@pytest.mark.parametrize(
    "more", [("--prior-loss", "base"), ("--class-count", "1"), ("--class-images", "red")]
)
def test_the_class_is_filled_into_its_prompt_wherever_it_is_read(folders, monkeypatch, more):
    read = []
    encode = conditioning.encode_prompts

    def kept(model, prompts, **options):
        read.extend(prompts)
        return encode(model, prompts, **options)

    for module in (conditioning, dataset, class_images):
        monkeypatch.setattr(module, "encode_prompts", kept)
    more = [str(folders / word) if word == "red" else word for word in more]
    said = ["--class-prompt", "a {class}", "--init", "target", "--effort", "quick"]
    assert train(folders, *said, *more) == 0
    assert "a thing" in read or "a dog" in read, read
    assert "a {class}" not in read


def test_a_run_goes_on_with_as_many_processes(monkeypatch):
    """Each has a batch of its own. One alone is told as before."""
    monkeypatch.setattr(run_identity, "run_identity", lambda *given, **others: others)
    args = argparse.Namespace(
        **dict.fromkeys(identity.OPTIONS), class_images=None, validate_every=0
    )
    inputs = SimpleNamespace(subject=None, held_out=None)
    of = [
        identity.identity_of(args, None, inputs, None, None, None, SimpleNamespace(size=size))
        for size in (1, 2)
    ]
    assert [found["processes"] for found in of] == [None, 2]
