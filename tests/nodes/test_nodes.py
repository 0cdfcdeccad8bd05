"""The nodes themselves beside stand-ins: what is refused before a run, what makes them run again,
and a whole short run."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from safetensors import safe_open

FOLDER = "example: cat faces (embedded)"
SUBJECT = {"trigger": "sks", "class_name": "cat face emoji", "resolution": 0}
TRAIN = {
    "learning_rate": 3e-3,
    "seed": 0,
    "batch_size": 2,
    "validate_every": 0,
    "weight_decay": 0.01,
    "gradient_checkpointing": False,
    "sample_prompt": "",
    "unfinished": "start afresh",
}


def last_run(pack):
    """The events of the newest run of the node that `run` plays."""
    path = pack.host.events_file(pack.base / "temp/cntlora/12_5")
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def pictures(pack):
    return pack.run(pack.SubjectImages, folder=FOLDER, **SUBJECT).values[0]


def test_only_safetensors_checkpoints_are_offered(pack):
    assert pack.host.checkpoint_names() == ["sd15.safetensors", "mini-sd (embedded)"]


def test_the_prediction_is_what_the_user_says(pack):
    def load(**options):
        return pack.run(
            pack.LoadCheckpoint, checkpoint="mini-sd (embedded)", precision="fp32", **options
        ).values[0]

    assert load().schedule.prediction == "epsilon"
    wish = {"prediction": "v + zero terminal SNR"}
    assert load(**wish).schedule.prediction == "v + zero terminal SNR"


@pytest.mark.parametrize(
    ("node", "folder", "inputs"),
    [
        ("LoadCheckpoint", "checkpoints", {"checkpoint": "sd15.safetensors"}),
        ("LoadCheckpoint", "checkpoints", {"checkpoint": None}),  # another node says which
        ("LoadCheckpoint", "vae", {"checkpoint": "mini-sd (embedded)", "vae": "sd15.safetensors"}),
        ("LoadCheckpoint", "vae", {"checkpoint": "mini-sd (embedded)", "vae": None}),
        ("ContinueLoRA", "loras", {"lora_file": "sd15.safetensors"}),
        ("ContinueLoRA", "loras", {"lora_file": None}),
    ],
)
def test_a_file_that_was_replaced_is_read_again(pack, node, folder, inputs):
    path = pack.base / folder / "sd15.safetensors"
    path.parent.mkdir(exist_ok=True)
    seen = set()
    try:
        for content in (b"one", b"another"):
            path.write_bytes(content)
            asked = [getattr(pack, node).fingerprint_inputs(**inputs) for _ in range(2)]
            assert asked[0] == asked[1]
            seen.add(asked[0])
    finally:
        path.unlink()
    assert len(seen) == 2


def test_a_notice_goes_to_the_page_that_began_the_run_and_into_the_log(pack, monkeypatch, caplog):
    sent = []
    server = SimpleNamespace(client_id="ab-1", send_sync=lambda kind, message: sent.append(message))
    monkeypatch.setattr(pack.host.PromptServer, "instance", server)
    hidden = SimpleNamespace(unique_id="7", extra_pnginfo={"workflow": {"id": "w"}})
    monkeypatch.setattr(pack.LoadCheckpoint, "hidden", hidden, raising=False)
    pack.host.notices(pack.LoadCheckpoint)(pack.host.Notice("One."))
    (message,) = sent
    assert message == {
        **{"v": 1, "workflow": "w", "node": "7", "client": "ab1", "class": "CNTLoRALoadCheckpoint"},
        "events": [{"type": "warning", "text": "One."}],
    }
    assert "One." in caplog.text


@pytest.mark.parametrize("name", ["../up", "/etc", "nowhere", "C:\\x"])
def test_a_wrong_folder_is_a_sentence(pack, name):
    assert pack.SubjectImages.validate_inputs(name).endswith(".")


def test_a_picture_that_links_outside_is_refused(pack, folder, tmp_path):
    Image.new("RGB", (64, 64)).save(tmp_path / "secret.png")
    (folder / "b.png").symlink_to(tmp_path / "secret.png")
    assert "link to a place outside" in pack.SubjectImages.validate_inputs(folder.name)


def test_changed_pictures_change_the_fingerprint_and_nothing_else_does(pack, folder):
    first = pack.SubjectImages.fingerprint_inputs(folder.name, **SUBJECT)
    (folder / "notes.txt").write_text("hello")
    assert pack.SubjectImages.fingerprint_inputs(folder.name, **SUBJECT) == first
    Image.new("RGB", (64, 64), "red").save(folder / "b.png")
    assert pack.SubjectImages.fingerprint_inputs(folder.name, **SUBJECT) != first


@pytest.mark.parametrize(
    ("node", "inputs", "says"),
    [
        ("SaveLoRA", {"name": "../x"}, "is not a name inside 'loras'"),
        ("SaveLoRA", {"name": ""}, "is not a name inside 'loras'"),
        ("SaveLoRA", {"name": "people/"}, "is not a name inside 'loras'"),
        ("SaveLoRA", {"name": "x/.safetensors"}, "is not a name inside 'loras'"),
        ("PriorImages", {"class_prompt": "  "}, "class_prompt is empty"),
        ("LoadCheckpoint", {"checkpoint": "no.safetensors"}, "is not in models/checkpoints"),
    ],
)
def test_what_is_wrong_is_said_before_the_run(pack, node, inputs, says):
    assert says in getattr(pack, node).validate_inputs(**inputs)


def test_a_checkpoint_that_another_node_names_is_judged_when_it_is_known(pack, tmp_path):
    assert pack.LoadCheckpoint.validate_inputs() is True
    assert pack.LoadCheckpoint.fingerprint_inputs(None)
    outside = tmp_path / "x.safetensors"
    outside.write_bytes(b"secret")
    with pytest.raises(ValueError, match="is not in models/checkpoints"):
        pack.run(pack.LoadCheckpoint, checkpoint=str(outside))


def test_a_list_of_class_pictures_is_one_prior(pack, model):
    sizes = [torch.rand(1, 64, 48, 3), torch.rand(2, 32, 64, 3)]
    given = {"sd_model": [model], "class_prompt": ["a dog"], "resolution": [64]}
    prior, pictures = pack.run(pack.PriorImages, **given, images=sizes).values
    assert len(prior.encoded) == 3
    assert pictures.shape[0] == 3


def test_a_subject_without_a_name_is_refused(pack):
    with pytest.raises(ValueError, match="say what the pictures show"):
        pack.run(pack.SubjectImages, folder=FOLDER, trigger="", class_name=" ", resolution=0)


def test_pictures_from_the_graph_take_the_folders_place(pack):
    batch = torch.rand(3, 64, 64, 3)
    subject, sheet = pack.run(pack.SubjectImages, folder=FOLDER, images=[batch], **SUBJECT).values
    assert len(subject.pictures) == 3
    assert sheet.ndim == 4


def test_a_run_tells_everything_in_order_and_leaves_the_model_as_it_was(pack, model, pictures):
    before = {k: v.clone() for k, v in model.unet.state_dict().items()}
    out = pack.run(
        pack.TrainLoRA, sd_model=model, subject=pictures, steps=3, sample_every=2, **TRAIN
    )
    lora, losses, images = out.values
    assert len(losses["loss"]) == 3
    assert images.shape == (4, 64, 64, 3)
    events = last_run(pack)
    assert json.loads(out.ui["cntlora_shown"][0]) == (
        {"workflow": "", "node": "12:5", "client": "", "class": "CNTLoRATrain"}
        | {"run": events[0]["run"]}
    )
    assert [e["step"] for e in events if e["type"] == "kept"] == [3]
    assert [e["seq"] for e in events] == list(range(1, len(events) + 1))
    assert [e["step"] for e in events if e["type"] == "sample"] == [0, 2, 3]
    assert events[-1]["type"] == "end"
    assert events[-1]["ok"]
    after = model.unet.state_dict()
    assert set(after) == set(before)
    assert all(torch.equal(after[k], v) for k, v in before.items())
    first, second = (
        pack.run(pack.SaveLoRA, lora=lora, name="runs/a", save_precision="fp16").values[0]
        for _ in range(2)
    )
    assert (first, second) == ("runs/a.safetensors", "runs/a_2.safetensors")


def test_cancel_leaves_within_one_step_and_keeps_the_work(pack, model, pictures, monkeypatch):
    calls = []

    def check():
        calls.append(1)
        if len(calls) == 8:
            raise pack.host.Cancelled

    monkeypatch.setattr(pack.host, "check_cancel", check)
    with pytest.raises(pack.host.Cancelled):
        pack.run(
            pack.TrainLoRA, sd_model=model, subject=pictures, steps=1000, sample_every=0, **TRAIN
        )
    assert len(calls) == 8
    events = last_run(pack)
    (saved,) = [e["path"] for e in events if e["type"] == "saved"]
    assert saved.startswith("loras/")
    assert (pack.base / saved).is_file()
    assert events[-1]["text"] == "Cancelled; what was trained is kept"


def test_a_run_cancelled_while_its_last_samples_are_drawn_is_kept(
    pack, model, pictures, monkeypatch
):
    def finish(sampler, run):
        raise pack.host.Cancelled

    monkeypatch.setattr(pack.sampler.Sampler, "finish", finish)
    with pytest.raises(pack.host.Cancelled):
        pack.run(pack.TrainLoRA, sd_model=model, subject=pictures, steps=2, sample_every=0, **TRAIN)
    events = last_run(pack)
    (saved,) = [e["path"] for e in events if e["type"] == "saved"]
    assert saved.startswith("loras/")
    assert (pack.base / saved).is_file()


def test_samples_without_memory_do_not_stop_the_training(pack, model, pictures, monkeypatch):
    def sample(*args, **options):
        raise pack.sampler.CNTLoRAError("The memory did not suffice.")

    monkeypatch.setattr(pack.sampler, "sample", sample)
    pack.run(pack.TrainLoRA, sd_model=model, subject=pictures, steps=2, sample_every=1, **TRAIN)
    told = [e["text"] for e in last_run(pack) if e["type"] == "warning"]
    said = (
        "The samples of step {} could not be drawn (The memory did not suffice.); training goes on."
    )
    assert [text for text in told if "samples" in text] == [said.format(n) for n in (0, 1, 2)]


def test_auto_settings_get_numbers_from_the_model_and_the_page_is_told(
    pack, model, pictures, monkeypatch
):
    def train(model, subject, state, config, **options):
        raise pack.host.Cancelled

    from cntlora_pack.cntlora_core.run import runs

    monkeypatch.setattr(runs, "train", train)
    real = replace(model, name="sd15.safetensors")
    auto = TRAIN | {"steps": "auto", "learning_rate": 0.0}
    with pytest.raises(pack.host.Cancelled):
        pack.run(pack.TrainLoRA, sd_model=real, subject=pictures, sample_every=0, **auto)
    events = last_run(pack)
    assert [e["steps"] for e in events if e["type"] in ("run", "training")] == [0, 600]
    told = [e["text"] for e in events if e["type"] == "status"]
    assert "Chosen by model and pictures: steps 600, optimizer adamw, learning rate 0.0001" in told


def test_what_was_chosen_stands_in_the_file(pack, model, pictures):
    lora = pack.run(
        pack.TrainLoRA,
        sd_model=model,
        subject=pictures,
        steps=1,
        sample_every=0,
        **(TRAIN | {"learning_rate": "auto"}),
    ).values[0]
    name = pack.run(pack.SaveLoRA, lora=lora, name="runs/auto", save_precision="fp16").values[0]
    with safe_open(pack.base / "loras" / name, "pt") as file:
        assert file.metadata()["ss_learning_rate"] == "0.01"
        assert json.loads(file.metadata()["cntlora.training"])["steps"] == 1


def test_running_out_of_memory_says_what_to_try_and_where_the_work_is(
    pack, model, pictures, monkeypatch
):
    from cntlora_pack.cntlora_core.run import runs

    def fail(model, subject, state, *args, observer, **options):
        state.step = 1
        observer(pack.sampler.Step(1, 0.1, 1e-3))
        raise torch.OutOfMemoryError

    monkeypatch.setattr(runs, "train", fail)
    with pytest.raises(
        ValueError, match=r"a lower resolution than 64 px.*What was trained is in loras/"
    ):
        pack.run(pack.TrainLoRA, sd_model=model, subject=pictures, steps=5, sample_every=0, **TRAIN)


def test_a_failed_sample_does_not_stop_training(pack, model, pictures, monkeypatch):
    def fail(*args, **options):
        raise RuntimeError("no room")

    monkeypatch.setattr(pack.sampler, "sample", fail)
    out = pack.run(
        pack.TrainLoRA, sd_model=model, subject=pictures, steps=2, sample_every=1, **TRAIN
    )
    assert len(out.values[1]["loss"]) == 2


def test_validating_with_other_words_is_a_warning(pack, model, pictures):
    validation = replace(pictures, prompt="a dog")
    inputs = {"sd_model": model, "subject": pictures, "validation": validation}
    pack.run(pack.TrainLoRA, **inputs, steps=1, sample_every=0, **TRAIN)
    told = [e["text"] for e in last_run(pack) if e["type"] == "warning"]
    (text,) = [text for text in told if "no effect" not in text]  # nothing is validated here
    assert "say 'a dog', those to train on 'a sks cat face emoji'" in text


def test_an_empty_prompt_draws_what_was_trained(pack, model, pictures, monkeypatch):
    asked = []

    def draw(model, prompts, *args, **options):
        asked.extend(prompts)
        return [Image.new("RGB", (8, 8))]

    monkeypatch.setattr(pack.preview, "sample", draw)
    out = pack.run(
        pack.TrainLoRA, sd_model=model, subject=pictures, steps=1, sample_every=0, **TRAIN
    )
    settings = {"strength": 1.0, "count": 1, "seed": 0, "steps": 1, "guidance": 1.0}
    for prompt in (" ", "a sks cat on grass"):
        pack.run(pack.PreviewLoRA, sd_model=model, lora=out.values[0], prompt=prompt, **settings)
    assert asked == ["a sks cat face emoji", "a sks cat on grass"]
    with pytest.raises(ValueError, match="say what to draw"):
        pack.run(pack.PreviewLoRA, sd_model=model, lora={}, prompt="", **settings)


def test_an_error_is_shown_without_the_path_of_the_pack(pack):
    with pytest.raises(ValueError, match=r"\.") as error:
        pack.run(pack.SaveLoRA, lora={}, name="x", save_precision="fp16")
    assert error.type.__module__ == "cntlora_core.errors"


def test_a_foreign_lora_is_sent_to_comfyuis_own_node(pack):
    with pytest.raises(ValueError, match="Save LoRA Weights"):
        pack.run(pack.SaveLoRA, lora={}, name="x", save_precision="fp16")


def test_training_goes_on_in_the_metric_of_the_calibration(pack, model, pictures):
    """The wire carries more than the LoRA: without the metric the steps would be AdamW's."""
    start = pack.run(
        pack.CalibrateLoRA, sd_model=model, subject=pictures, init="target", rank=1, effort="quick"
    ).values[0]
    assert start.calibration.natural.made == 8
    lora = pack.run(
        pack.TrainLoRA,
        sd_model=model,
        subject=pictures,
        lora_init=start,
        steps=1,
        validate_every=0,
        sample_every=0,
    ).values[0]
    run = last_run(pack)
    assert not [e for e in run if e["type"] == "warning" and "adamw" in e["text"]]
    saved = pack.run(pack.SaveLoRA, lora=lora, name="runs/natural", save_precision="fp16")
    (name,) = saved.values
    # Also what is shown by nodes before: no host tells of them when its cache answers for all.
    traces = {trace["class"]: trace for trace in map(json.loads, saved.ui["cntlora_shown"])}
    assert list(traces) == ["CNTLoRATrain", "CNTLoRACalibrate", "CNTLoRASubjectImages"]
    assert traces["CNTLoRASubjectImages"]["text"].startswith("6 pictures")
    assert run[0]["before"] == list(traces.values())[1:]
    assert [e["text"] for e in last_run(pack) if e["type"] == "status"] == list(saved.ui["text"])
    with safe_open(pack.base / "loras" / name, "pt") as file:
        assert file.metadata()["ss_optimizer"].startswith("cntlora.NaturalGradient")


def test_a_calibrated_lora_has_the_strength_that_fits_what_was_held_out(
    pack, model, pictures, monkeypatch
):
    """Training goes on from the whole one."""
    runs = "cntlora_pack.cntlora_core.run.runs.fitted_strength"
    monkeypatch.setattr(runs, lambda *_: (0.5, 0.1))
    start, lora, _ = pack.run(
        pack.CalibrateLoRA, sd_model=model, subject=pictures, rank=1, effort="quick"
    ).values
    events = last_run(pack)
    assert any("at 0.50 of its strength" in e["text"] for e in events if e["type"] == "warning")
    assert not {"base", "validation"} & {e["type"] for e in events}  # one point is no chart
    names = [key.removesuffix(".lora_up.weight") for key in lora if "lora_up" in key]
    whole = [own.delta().norm() for own in start.calibration.lora.values()]
    given = [
        (lora[f"{n}.lora_up.weight"].flatten(1) @ lora[f"{n}.lora_down.weight"].flatten(1)).norm()
        * (lora[f"{n}.alpha"] / len(lora[f"{n}.lora_down.weight"]))
        for n in names
    ]
    assert sorted(map(float, given)) == pytest.approx(sorted(0.5 * float(w) for w in whole))
