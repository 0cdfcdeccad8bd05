"""The command line's contract, by running it."""

import json
import shutil

import pytest
import torch
from PIL import Image
from safetensors import safe_open

from cntlora_core.cli.main import main
from cntlora_core.model.loader import MINI_SD_FOLDER

SUBJECT = MINI_SD_FOLDER / "subject"
HELD_OUT = MINI_SD_FOLDER / "heldout"
PROMPT = "a sks cat face emoji"
SMALL = ["--effort", "quick", "--resolution", "32"]
EVERY_LAYER = ["--targets", "attention+ff"]  # of these each gets a rank


def arguments(command, output, *more):
    return [
        command,
        "--checkpoint",
        "mini-sd",
        "--images",
        str(SUBJECT),
        "--prompt",
        PROMPT,
        "--output",
        str(output),
        *more,
    ]


def test_train_from_pictures_to_file(tmp_path, capsys):
    out, log, other = (tmp_path / name for name in ("cat.safetensors", "run.jsonl", "other"))
    other.mkdir()
    shutil.copy(min(HELD_OUT.glob("*.png")), other)
    more = ["--steps", "3", "--validation-images", str(other), "--validate-every", "2"]
    more += ["--events", str(log)]
    assert main(arguments("train", out, *more, "--rank-rule", "uniform", "--effort", "quick")) == 0
    events = [json.loads(line) for line in log.read_text().splitlines()]
    kinds = [e["type"] for e in events]
    assert kinds[-1] == "done"
    losses = {e["step"]: e["loss"] for e in events if e["type"] == "validation"}
    assert sorted(losses) == [0, 2, 3]
    base = next(e["loss"] for e in events if e["type"] == "base")
    assert losses[0] < base
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["lora"] == str(out)
    with safe_open(out, "pt") as file:
        assert len(list(file.keys())) == 3 * 56
        assert file.metadata()["ss_steps"] == str(
            min(losses, key=losses.__getitem__)
        )  # the best weights are kept


def test_validation_does_not_depend_on_the_seed(tmp_path):
    base = []
    for seed in (1, 2):
        log = tmp_path / f"{seed}.jsonl"
        more = ["--init", "gaussian", "--steps", "1", "--seed", str(seed), "--events", str(log)]
        assert main(arguments("train", tmp_path / f"{seed}.safetensors", *more)) == 0
        events = [json.loads(line) for line in log.read_text().splitlines()]
        base.append([e["loss"] for e in events if e["type"] == "validation"])
    assert base[0][0] == base[1][0]
    assert base[0][1] != base[1][1]


def test_same_seed_same_file(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        out = tmp_path / name / "x.safetensors"
        assert main(arguments("train", out, "--steps", "2", "--validate-every", "0", *SMALL)) == 0
    first, second = ((tmp_path / name / "x.safetensors").read_bytes() for name in ("a", "b"))
    assert first == second


def test_calibrate_sample_inspect(tmp_path, capsys):
    out = tmp_path / "cat.safetensors"
    class_prompt = "--class-prompt", "a cat face emoji"
    assert main(arguments("calibrate", out, *class_prompt, *SMALL, *EVERY_LAYER)) == 0
    capsys.readouterr()
    assert main(["inspect", str(out)]) == 0
    about = json.loads(capsys.readouterr().out)
    assert about["modules"] == 56 + 14
    assert about["rank"]["min"] >= 1
    assert about["metadata"]["ss_steps"] == "0"
    assert sum(m["norm"] for m in about["ranks"].values()) > 0
    pictures = []
    for name, more in (
        ("base", []),
        ("lora", ["--lora", str(out)]),
        ("off", ["--lora", str(out), "--strength", "0"]),
    ):
        png = tmp_path / f"{name}.png"
        command = [
            "sample",
            "--checkpoint",
            "mini-sd",
            "--prompt",
            PROMPT,
            "--count",
            "1",
            "--steps",
            "4",
        ]
        assert main([*command, "--output", str(png), *more]) == 0
        pictures.append(Image.open(png).crop((24, 80, 150, 200)).tobytes())
    assert pictures[0] != pictures[1]
    assert pictures[0] == pictures[2]


def test_training_goes_on_from_a_file_with_its_ranks(tmp_path):
    first, second = tmp_path / "first.safetensors", tmp_path / "second.safetensors"
    assert main(arguments("calibrate", first, "--rank", "2", *SMALL, *EVERY_LAYER)) == 0
    assert (
        main(
            arguments(
                "train",
                second,
                "--continue-from",
                str(first),
                "--steps",
                "1",
                "--validate-every",
                "0",
                *SMALL[2:],
            )
        )
        == 0
    )
    with safe_open(first, "pt") as old, safe_open(second, "pt") as new:
        shapes = [{k: tuple(f.get_tensor(k).shape) for k in f.keys()} for f in (old, new)]  # noqa: SIM118
        changed = [k for k in shapes[0] if not torch.equal(old.get_tensor(k), new.get_tensor(k))]
    assert shapes[0] == shapes[1]
    assert len(changed) > 56


def test_info(capsys):
    assert main(["info"]) == 0
    about = json.loads(capsys.readouterr().out)
    assert {"cntlora", "torch", "diffusers", "devices", "tokenizer"} <= set(about)


def bad(tmp_path, kind):
    """Arguments of a run that must fail, and words its one sentence must hold."""
    out = tmp_path / "x.safetensors"
    empty = tmp_path / "empty"
    empty.mkdir()
    cases = {
        "no folder": (["--images", str(tmp_path / "none")], "does not exist"),
        "no pictures": (["--images", str(empty)], "No images in"),
        "checkpoint": (["--checkpoint", str(empty)], "model_index.json is missing"),
        "output folder": (["--output", str(tmp_path / "no" / "x.safetensors")], "output folder"),
        "rank": (["--rank", "0"], "rank is 0"),
        "steps": (["--steps", "-1"], "steps is -1"),
        "learning_rate": (["--learning-rate", "nan"], "learning_rate is nan"),
        "resolution": (["--resolution", "50"], "multiples of 16"),
        "device": (["--device", "quantum"], "not available here"),
        "choice": (["--init", "magic"], "invalid choice"),
    }
    more, words = cases[kind]
    return arguments("train", out, *more), words


@pytest.mark.parametrize(
    "kind",
    [
        "no folder",
        "no pictures",
        "checkpoint",
        "output folder",
        "rank",
        "steps",
        "learning_rate",
        "resolution",
        "device",
        "choice",
    ],
)
def test_bad_input_is_one_sentence_and_leaves_nothing(tmp_path, capsys, kind):
    command, words = bad(tmp_path, kind)
    before = sorted(tmp_path.rglob("*"))
    try:
        status = main(command)
    except SystemExit as stop:
        status = stop.code
    error = capsys.readouterr().err
    assert status not in (0, None)
    assert words in error
    assert "Traceback" not in error
    assert sorted(tmp_path.rglob("*")) == before


def test_an_existing_output_is_found_before_the_work(tmp_path, capsys):
    out = tmp_path / "x.safetensors"
    out.write_bytes(b"precious")
    assert main(arguments("train", out, "--checkpoint", "nowhere")) == 1
    assert "exists" in capsys.readouterr().err
    assert out.read_bytes() == b"precious"


def test_debug_shows_the_traceback(tmp_path, capsys):
    assert (
        main([*arguments("train", tmp_path / "x.safetensors", "--images", "none"), "--debug"]) == 1
    )
    assert "Traceback" in capsys.readouterr().err


def test_nan_keeps_the_last_good_weights(tmp_path, capsys, monkeypatch):
    """The loss turns NaN at step 3: exit 1, the step is named, and the file holds finite weights of
    2 steps."""
    from cntlora_core.data import batches as recipe

    real, calls = recipe.denoising_loss, []

    def poisoned(*args, **more):
        calls.append(1)
        loss = real(*args, **more)
        return loss * float("nan") if len(calls) == 3 else loss

    monkeypatch.setattr(recipe, "denoising_loss", poisoned)
    out = tmp_path / "x.safetensors"
    assert (
        main(arguments("train", out, "--steps", "9", "--validate-every", "0", "--init", "gaussian"))
        == 1
    )
    assert "step 3" in capsys.readouterr().err
    with safe_open(out, "pt") as file:
        assert file.metadata()["ss_steps"] == "2"
        assert all(torch.isfinite(file.get_tensor(k)).all() for k in file.keys())  # noqa: SIM118


def test_the_module_runs_from_the_root_and_when_installed(tmp_path):
    import subprocess
    import sys
    from pathlib import Path

    root = Path(__file__).resolve().parents[3]
    for folder in (root, tmp_path):
        if folder == tmp_path and not _installed(tmp_path):
            continue
        done = subprocess.run(
            [sys.executable, "-m", "cntlora_core", "--help"],
            cwd=folder,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0
        assert "demo" in done.stdout


def test_the_process_ends_with_the_commands_words_and_status(tmp_path):
    import subprocess
    import sys
    from pathlib import Path

    def run(*arguments):
        return subprocess.run(
            [sys.executable, "-m", "cntlora_core", *arguments],
            cwd=Path(__file__).resolve().parents[3],
            capture_output=True,
            text=True,
        )

    done = run("info")
    assert done.returncode == 0
    assert json.loads(done.stdout)
    failed = run("inspect", str(tmp_path / "none.safetensors"))
    assert failed.returncode == 1
    assert failed.stderr.startswith("Error: ")


def _installed(folder):
    import subprocess
    import sys

    return (
        subprocess.run(
            [sys.executable, "-c", "import cntlora_core"], cwd=folder, capture_output=True
        ).returncode
        == 0
    )
