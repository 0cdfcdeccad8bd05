"""A disk that fails at its n-th call, in the nodes: the LoRA is never lost."""

import errno
import json
import os
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open

FOLDER = "example: cat faces (embedded)"
TRAIN = {"learning_rate": 3e-3, "steps": 2, "batch_size": 1, "validate_every": 0}
LORA = 4  # calls: open, write, sync, rename


def run(node, **inputs):
    node.hidden = SimpleNamespace(unique_id="77", extra_pnginfo=None)
    with torch.inference_mode():
        return node.execute(**inputs)


@pytest.fixture(scope="module")
def inputs(pack):
    model = run(pack.LoadCheckpoint, checkpoint="mini-sd (embedded)", precision="auto").values[0]
    words = {"trigger": "sks", "class_name": "cat", "resolution": 0}
    subject = run(pack.SubjectImages, folder=FOLDER, **words).values[0]
    more = {"sample_every": 0, "unfinished": "start afresh"}
    return {"sd_model": model, "subject": subject, **more, **TRAIN}


def with_disk(node, disk):
    return type(node.__name__, (node,), {"disk": disk})


def events(pack):
    log = sorted((pack.base / "temp/cntlora/77").glob("events_*.jsonl"))[-1]
    return [json.loads(line) for line in log.read_text().splitlines()]


class CancelAfter:
    """Cancel at the first look for it after so many steps."""

    def __init__(self, pack, steps, disk):
        self.pack, self.steps, self.disk, self.looks = pack, steps, disk, 0

    def __call__(self):
        if any(e["type"] == "step" and e["step"] == self.steps for e in events(self.pack)):
            self.disk.calls = 0  # count those of the LoRA alone
            self.disk.fails_at = self.disk.at_the_lora
            raise self.pack.host.Cancelled


@pytest.mark.parametrize("call", range(1, LORA + 1))
def test_a_cancelled_run_is_saved_although_a_call_fails(
    pack, inputs, failing_disk, monkeypatch, call
):
    disk = failing_disk()
    disk.at_the_lora = call
    monkeypatch.setattr(pack.host, "check_cancel", CancelAfter(pack, 1, disk))
    before = set(pack.base.rglob("*.safetensors"))
    with pytest.raises(pack.host.Cancelled):
        run(with_disk(pack.TrainLoRA, disk), **inputs)
    new = set(pack.base.rglob("*.safetensors")) - before
    (saved,) = (path for path in new if "cntlora-unfinished" not in path.parts)
    with safe_open(saved, "pt") as file:
        assert file.metadata()["ss_steps"] == "1"
    told = events(pack)
    assert any(e["type"] == "warning" and "A second try" in e["text"] for e in told)
    assert [e for e in told if e["type"] == "saved"]
    assert not list(pack.base.rglob(".cntlora-*"))


@pytest.mark.parametrize("call", range(1, 4))
def test_events_that_cannot_be_written_stop_no_run(pack, inputs, failing_disk, call):
    out = run(with_disk(pack.TrainLoRA, failing_disk(call, stays=True)), **inputs)
    assert len(out.values[1]["loss"]) == TRAIN["steps"]


@pytest.mark.parametrize("call", range(1, LORA + 1))
def test_save_lora_finds_another_place(pack, inputs, failing_disk, call):
    lora = run(pack.TrainLoRA, **inputs | {"steps": 1}).values[0]
    node = with_disk(pack.SaveLoRA, failing_disk(call))
    out = run(node, lora=lora, name="fault", save_precision="fp32")
    assert (pack.base / "loras" / out.values[0]).is_file()
    assert "No space left" in out.ui["text"][0]
    full = with_disk(pack.SaveLoRA, failing_disk(call, stays=True))
    with pytest.raises(ValueError, match="could not be written"):
        run(full, lora=lora, name="fault", save_precision="fp32")
    assert not list(pack.base.rglob(".cntlora-*"))


def only_under(pack, folder):
    """A disk that is full everywhere else."""

    class Full(type(pack.SaveLoRA.disk)):
        def open(self, path, mode):
            if not path.is_relative_to(pack.base / folder):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return super().open(path, mode)

    return with_disk(pack.SaveLoRA, Full())


def test_what_is_emptied_is_no_place_to_keep_the_only_copy(pack, inputs):
    """ComfyUI's temp takes it, and is emptied at the next start."""
    lora = run(pack.TrainLoRA, **inputs | {"steps": 1, "seed": 3}).values[0]
    out = run(only_under(pack, "temp"), lora=lora, name="kept")
    assert "ComfyUI empties that folder" in out.ui["text"][0]
    assert lora.spare.is_file()
    run(only_under(pack, "output"), lora=lora, name="kept")
    assert not lora.spare.exists()


def test_a_save_that_fails_says_where_the_lora_is(pack, inputs):
    lora = run(pack.TrainLoRA, **inputs | {"steps": 1, "seed": 4}).values[0]
    with pytest.raises(ValueError, match="could not be written") as failed:
        run(only_under(pack, "nowhere"), lora=lora, name="lost")
    assert f"It is still in loras/cntlora-unsaved/{lora.spare.name}." in str(failed.value)


def test_a_run_that_could_not_be_saved_is_not_started(pack, inputs, monkeypatch):
    used = SimpleNamespace(total=1_000_000, used=999_000, free=1_000)
    monkeypatch.setattr("shutil.disk_usage", lambda path: used)
    for node, more in ((pack.TrainLoRA, {}), (pack.CalibrateLoRA, {"init": "gaussian"})):
        given = {name: inputs[name] for name in ("sd_model", "subject")}
        with pytest.raises(ValueError, match=r"0\.0 MB free, and the LoRA needs"):
            run(node, **(given | more if more else inputs))


def test_inputs_that_do_nothing_are_told(pack, inputs):
    settings = run(pack.TrainingSettings, prior_loss="base").values[0]
    more = {"validation": inputs["subject"], "settings": settings, "steps": 1}
    run(pack.TrainLoRA, **inputs | more)
    told = " ".join(e["text"] for e in events(pack) if e["type"] == "warning")
    assert "The pictures to validate with have no effect: validate_every is 0." in told
    assert "prior_loss has no effect: no prior is connected." in told
    given = {name: inputs[name] for name in ("sd_model", "subject")}
    run(pack.CalibrateLoRA, **given, init="gaussian", effort="quick")
    assert any("effort: without effect" in e.get("text", "") for e in events(pack))
