"""A training that was stopped goes on by itself; a finished LoRA is trained on from its file."""

import json
import sys
from copy import deepcopy
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open

FOLDER = "example: cat faces (embedded)"
TRAIN = {"steps": 4, "batch_size": 1, "validate_every": 2, "learning_rate": 3e-3, "sample_every": 0}


def run(node, **inputs):
    node.hidden = SimpleNamespace(unique_id="31", extra_pnginfo=None)
    with torch.inference_mode():
        return node.execute(**inputs)


@pytest.fixture(scope="module")
def inputs(pack):
    model = run(pack.LoadCheckpoint, checkpoint="mini-sd (embedded)", precision="auto").values[0]
    words = {"trigger": "sks", "class_name": "cat", "resolution": 32}
    subject = run(pack.SubjectImages, folder=FOLDER, **words).values[0]
    return {"sd_model": model, "subject": subject, **TRAIN}


@pytest.fixture(scope="module")
def whole(pack, inputs):
    """What the undisturbed run gives."""
    return run(pack.TrainLoRA, **inputs).values


@pytest.fixture
def stop(pack, inputs, monkeypatch):
    """Train and press Cancel after so many steps."""

    def stopped(after, **more):
        def cancel():
            if any(e["type"] == "step" and e["step"] == after for e in events(pack)):
                raise pack.host.Cancelled

        with monkeypatch.context() as patched:
            patched.setattr(pack.host, "check_cancel", cancel)
            with pytest.raises(pack.host.Cancelled):
                run(pack.TrainLoRA, **inputs | more)

    return stopped


def test_a_start_for_another_kind_of_model_is_refused(pack, inputs):
    calibrated = run(pack.CalibrateLoRA, **{k: inputs[k] for k in ("sd_model", "subject")}).values[
        0
    ]
    first = dict(list(calibrated.calibration.lora.items())[:1])
    wider = {n: replace(f, down=torch.cat([f.down, f.down], 1)) for n, f in first.items()}
    for lora in (wider, dict.fromkeys(["another.layer"], *first.values())):
        foreign = replace(calibrated, calibration=replace(calibrated.calibration, lora=lora))
        with pytest.raises(ValueError, match="another kind of model than 'mini-sd"):
            run(pack.TrainLoRA, **inputs, lora_init=foreign)


@pytest.mark.parametrize("node", ["CalibrateLoRA", "TrainLoRA"])
def test_a_prior_of_another_kind_of_model_is_refused(pack, inputs, node):
    prior = run(
        pack.PriorImages, sd_model=inputs["sd_model"], class_prompt="a dog", class_count=1
    ).values[0]
    tokens = prior.encoded.conditioning.tokens
    words = replace(prior.encoded.conditioning, tokens=torch.cat([tokens, tokens], -1))
    foreign = replace(prior, encoded=replace(prior.encoded, conditioning=words))
    given = inputs if node == "TrainLoRA" else {k: inputs[k] for k in ("sd_model", "subject")}
    with pytest.raises(ValueError, match="prior was made with another kind of model than 'mini-sd"):
        run(getattr(pack, node), **given, prior=foreign)


def test_what_another_checkpoint_of_the_same_kind_has_made_is_told(pack, inputs):
    given = {k: inputs[k] for k in ("sd_model", "subject")}
    made = {"sd_model": inputs["sd_model"], "class_prompt": "a dog", "class_count": 1}
    prior = run(pack.PriorImages, **made).values[0]
    calibrated = run(pack.CalibrateLoRA, **given, prior=prior).values[0]
    run(pack.TrainLoRA, **inputs, prior=prior, lora_init=calibrated)
    assert not any("which is another" in text for text in said(pack))

    other = replace(prior.maker, name="one", content="1")
    prior, calibrated = replace(prior, maker=other), replace(calibrated, maker=other)
    run(pack.TrainLoRA, **inputs, prior=prior, lora_init=calibrated)
    told = [text.split(",")[0] for text in said(pack) if "which is another" in text]
    assert told == ["prior was made with 'one'", "lora_init was calibrated for 'one'"]
    run(pack.CalibrateLoRA, **given, prior=prior)
    assert any("prior was made with 'one'" in text for text in said(pack))


def test_a_run_goes_on_with_the_start_and_the_prior_that_it_had(pack, inputs, stop):
    """Another checkpoint's, or pictures that were read in another way, are another run."""
    given = {k: inputs[k] for k in ("sd_model", "subject")}
    made = {"sd_model": inputs["sd_model"], "class_prompt": "a dog", "class_count": 1}
    prior = run(pack.PriorImages, **made).values[0]
    calibrated = run(pack.CalibrateLoRA, **given, prior=prior).values[0]
    other = replace(prior.maker, name="one", content="1")
    flipped = replace(inputs["subject"].data, flip=True)
    variants = [
        {"lora_init": calibrated, "prior": prior},
        {"lora_init": calibrated, "prior": replace(prior, maker=other)},
        {"lora_init": replace(calibrated, maker=other), "prior": prior},
        {"lora_init": replace(calibrated, data=(flipped,)), "prior": prior},
    ]
    known = {*states(pack)}
    for more in variants:
        stop(1, **more)
    made = {*states(pack)} - known
    assert len(made) == len(variants)
    for path in made:
        path.unlink()
    foreign = run(pack.CalibrateLoRA, **given, prior=replace(prior, maker=other)).values[0]
    assert foreign.made_from != calibrated.made_from


def test_what_a_wire_carries_is_told_in_a_few_words(pack, inputs):
    """Where a node fails the host writes all of its inputs into the answer."""
    given = {k: inputs[k] for k in ("sd_model", "subject")}
    made = {"sd_model": inputs["sd_model"], "class_prompt": "a dog", "class_count": 1}
    start, lora, *_ = run(pack.CalibrateLoRA, **given).values
    prior = run(pack.PriorImages, **made).values[0]
    for value in (*given.values(), start, lora, prior):
        assert len(str(value)) < 100


def test_an_unfinished_run_that_cannot_be_written_is_told(pack, inputs, stop, monkeypatch):
    def full(checkpoints, state):
        raise sys.modules["cntlora_pack.cntlora_core.errors"].OutputError("No space left.")

    with monkeypatch.context() as patched:
        resume = sys.modules["cntlora_pack.cntlora_core.training.resume"]
        patched.setattr(resume.RunSnapshots, "write", full)
        stop(2)
    assert "No space left." in said(pack)
    assert not any("goes on where it stopped" in text for text in said(pack))


def events(pack):
    log = sorted((pack.base / "temp/cntlora/31").glob("events_*.jsonl"))[-1]
    return [json.loads(line) for line in log.read_text().splitlines()]


def said(pack):
    return [e["text"] for e in events(pack) if e["type"] == "warning"]


def states(pack):
    return sorted((pack.base / "output/cntlora-unfinished").glob("*"))


def test_a_cancelled_run_goes_on_to_the_same_end(pack, inputs, whole, stop):
    assert not states(pack)
    stop(3)
    (state,) = states(pack)
    assert state.name.startswith("sks_mini_sd_")
    assert said(pack)[-1] == "Queue the same graph again and the run goes on where it stopped."
    assert pack.unfinished.choices()[2:] == [state.name.removesuffix(".state.safetensors")]
    resumed = run(pack.TrainLoRA, **inputs).values
    assert "Goes on after step 3 of the run that was stopped." in said(pack)
    assert [e["step"] for e in events(pack) if e["type"] == "step"] == [4]
    (behind,) = [e for e in events(pack) if e["type"] == "resumed"]
    assert behind["losses"] == pytest.approx(whole[1]["loss"][:3], rel=1e-6)
    assert all(torch.equal(resumed[0][key], whole[0][key]) for key in whole[0])
    assert resumed[1] == whole[1]  # the losses of all four steps
    assert not states(pack)


def test_a_killed_run_goes_on_from_its_last_checkpoint(pack, inputs, whole, monkeypatch):
    """What a kill leaves: a checkpoint, and nothing that was done after it."""
    checkpoints = pack.unfinished.RunSnapshots
    with monkeypatch.context() as patched:
        patched.setattr(checkpoints, "remove", lambda self: None)
        patched.setattr(checkpoints, "due", lambda self, step: step == 2)
        run(pack.TrainLoRA, **inputs, checkpoint_every=1)
    resumed = run(pack.TrainLoRA, **inputs).values[0]
    assert [e["step"] for e in events(pack) if e["type"] == "step"] == [3, 4]
    assert all(torch.equal(resumed[key], whole[0][key]) for key in whole[0])


def test_another_run_starts_afresh_and_a_chosen_one_says_what_differs(pack, inputs, stop):
    stop(1)
    name = pack.unfinished.choices()[2]
    run(pack.TrainLoRA, **inputs | {"seed": 1, "steps": 1})
    assert not [text for text in said(pack) if "Goes on" in text]
    with pytest.raises(ValueError, match="is of another run: its seed is 0, now it is 1"):
        run(pack.TrainLoRA, **inputs | {"seed": 1, "unfinished": name})
    run(pack.TrainLoRA, **inputs, unfinished=name)
    with pytest.raises(ValueError, match=f"'{name}' is no unfinished run: it ended"):
        run(pack.TrainLoRA, **inputs, unfinished=name)
    assert pack.TrainLoRA.validate_inputs(unfinished=name) is True  # so that it can say that


@pytest.mark.parametrize("name", ["../x", "/etc/x", "a/../../x", "C:x"])
def test_no_name_leads_out_of_the_folder(pack, inputs, name):
    with pytest.raises(ValueError, match="is not a name inside"):
        run(pack.TrainLoRA, **inputs, unfinished=name)


@pytest.mark.parametrize("choice", ["start afresh", "remove all"])
def test_starting_afresh_leaves_other_runs_alone(pack, inputs, stop, choice):
    """`remove all` was a choice once: a workflow that somebody shares must not remove any."""
    assert choice in pack.unfinished.choices() or choice == "remove all"
    stop(1)
    stop(1, seed=5)
    assert len(states(pack)) == 2
    run(pack.TrainLoRA, **inputs | {"steps": 1, "unfinished": choice})
    (left,) = states(pack)  # its own took the place of the old one, and ended
    left.unlink()


def test_what_to_set_is_said_where_the_next_run_would_not_go_on(pack, inputs, stop):
    stop(1, unfinished="start afresh")
    assert said(pack)[-1].startswith("Set unfinished to 'go on': queue the same graph again")
    run(pack.TrainLoRA, **inputs)
    assert not states(pack)


def test_fewer_steps_than_were_made_are_refused_and_nothing_is_lost(pack, inputs, stop):
    """What the run was after those is gone: its end would be that of more steps."""
    stop(3)
    with pytest.raises(ValueError, match="has made 3 steps already, and steps is 2"):
        run(pack.TrainLoRA, **inputs | {"steps": 2})
    run(pack.TrainLoRA, **inputs)
    assert [e["step"] for e in events(pack) if e["type"] == "step"] == [4]


def test_a_lora_of_the_folder_is_trained_on(pack, inputs):
    first = run(pack.TrainLoRA, **inputs | {"steps": 1}).values[0]
    path = pack.base / "loras/sd15.safetensors"  # the name that the stand-in lists
    first.write(path)
    model = inputs["sd_model"]
    start = run(pack.ContinueLoRA, sd_model=model, lora_file="sd15.safetensors").values[0]
    more = run(pack.TrainLoRA, **inputs | {"steps": 1, "lora_init": start}).values[0]
    assert {k: v.shape for k, v in more.items()} == {k: v.shape for k, v in first.items()}
    assert any(not torch.equal(more[key], first[key]) for key in first)
    saved = more.write(pack.base / "loras/on.safetensors")
    with safe_open(saved, "pt") as file:
        metadata = file.metadata()
    assert json.loads(metadata["cntlora.continued_from"])["file"] == "sd15.safetensors"
    path.unlink()
    with pytest.raises(ValueError, match=r"There is no LoRA '\.\./x\.safetensors' in models/loras"):
        run(pack.ContinueLoRA, sd_model=model, lora_file="../x.safetensors")


def test_a_run_with_another_prior_is_another_run(pack, inputs):
    """Of what the prior loss depends on: its kind, the pictures and their words."""
    with pack.host.gradients():
        pictures = inputs["subject"].encode_all(inputs["sd_model"], lambda event: None)
    other_words = replace(pictures, prompt="a dog")
    given = [
        *((None, "images"), (None, "masked"), (pictures, "images"), (pictures, "base")),
        (other_words, "base"),
    ]
    identity = pack.train_inputs.prior_identity
    found = [identity(*each) for each in given]
    assert all(found.count(each) == 1 for each in found)
    assert identity(pictures, "masked") == found[1]  # it is not looked at
    assert identity(pictures, "none") == found[0]


def test_a_finished_training_lies_on_disk_until_it_is_saved(pack, inputs):
    """Another node may fail before Save LoRA has run."""
    folder = pack.base / "loras/cntlora-unsaved"
    for path in folder.glob("*"):
        path.unlink()
    loras = [run(pack.TrainLoRA, **inputs | {"seed": n, "steps": 1}).values[0] for n in range(6)]
    assert len([*folder.iterdir()]) == 4
    last = loras[-1]
    assert last.spare.parent == folder
    with safe_open(last.spare, framework="pt") as file:
        assert {*file.keys()} == {*last}
    run(pack.SaveLoRA, lora=last, name="saved")
    assert not last.spare.exists()
    assert len([*folder.iterdir()]) == 3
    run(pack.SaveLoRA, lora=last, name="saved")  # again: there is nothing to remove


def test_a_model_whose_weights_are_lent_goes_through_every_node(pack, inputs):
    """Use ComfyUI Model's: it has them only while it works."""
    core = "cntlora_pack.cntlora_core.model."
    folder = sys.modules[core + "loader"].MINI_SD_FOLDER / "model" / "unet"
    files = sys.modules[core + "diffusers_folder"].weights_files(folder)
    lent = replace(inputs["sd_model"], unet=deepcopy(inputs["sd_model"].unet))
    lent.lender = lambda: sys.modules[core + "tensor_file"].TensorFiles(files)
    made = {"sd_model": lent, "class_prompt": "a dog", "class_count": 1}
    prior = run(pack.PriorImages, **made).values[0]
    given = inputs | {"sd_model": lent, "prior": prior}
    calibrated = run(
        pack.CalibrateLoRA, **{k: given[k] for k in ("sd_model", "subject", "prior")}
    ).values[0]
    run(pack.TrainLoRA, **given | {"steps": 1}, lora_init=calibrated)
    assert not any("which is another" in text for text in said(pack))
