"""What is drawn and how: several prompts, a negative one, seeds and a size while it trains, a row
for each strength afterwards; what a mask hides."""

import pytest
import torch
from PIL import Image

FOLDER = "example: cat faces (embedded)"
TRAIN = {"steps": 2, "batch_size": 2, "validate_every": 0, "learning_rate": 3e-3}
PREVIEW = {"prompt": "a sks cat", "count": 2, "seed": 5, "steps": 1, "guidance": 1.0}


@pytest.fixture(scope="module")
def subject(pack):
    words = {"trigger": "sks", "class_name": "cat", "resolution": 0}
    mask = torch.zeros(1, 64, 64)
    mask[:, :, :32] = 1
    pictures = [torch.rand(2, 64, 64, 3, generator=torch.Generator().manual_seed(0))]
    return pack.run(pack.SubjectImages, folder=FOLDER, images=pictures, masks=[mask], **words)


@pytest.fixture
def drawn(pack, monkeypatch):
    """What the sampler is asked for, a picture of that size for each."""
    asked = []

    def draw(model, prompts, seeds, *, size=(64, 64), **options):
        asked.append((list(prompts), list(seeds), size, options.get("negative")))
        return [Image.new("RGB", size[::-1]) for _ in prompts]

    monkeypatch.setattr(pack.sampler, "sample", draw)
    monkeypatch.setattr(pack.preview, "sample", draw)
    return asked


def train(pack, model, subject, **more):
    given = {"sd_model": model, "subject": subject.values[0], "unfinished": "start afresh"}
    return pack.run(pack.TrainLoRA, **given, **(TRAIN | more)).values


@pytest.mark.parametrize(
    ("text", "prompts", "seeds"),
    [
        ("", ["a sks cat"] * 4, [7, 8, 9, 10]),
        ("one\n\n  two \n", ["one", "one", "two", "two"], [7, 8, 7, 8]),
        ("\n".join("abcdefghij"), list("abcdefgh"), [7] * 8),
    ],
)
def test_several_prompts_are_drawn(pack, model, subject, drawn, text, prompts, seeds):
    how = {"sample_prompt": text, "sample_negative": "blurry", "sample_seed": 7}
    images = train(pack, model, subject, **how, sample_every=1, sample_size="96x64")[2]
    assert drawn == [(prompts, seeds, (64, 96), "blurry")] * 3  # at steps 0, 1 and 2
    assert images.shape == (len(prompts), 64, 96, 3)


@pytest.mark.parametrize("size", ["100x64", "64", "0x0", "64x64x64", "9000x9000"])
def test_a_size_that_cannot_be_drawn_is_said_before_training(pack, model, subject, size):
    with pytest.raises(ValueError, match=f"sample_size is '{size}': say auto, or width x height"):
        train(pack, model, subject, sample_size=size)


def test_the_grid_of_strengths_has_a_row_for_each(pack, model, subject, drawn, monkeypatch, caplog):
    lora = train(pack, model, subject, sample_every=0)[0]
    shown = []
    real = pack.preview.sample_sheet
    monkeypatch.setattr(
        pack.preview, "sample_sheet", lambda rows, **how: shown.extend(rows) or real(rows, **how)
    )
    given = {"strength": 0.5, "strength_grid": True}
    out = pack.run(pack.PreviewLoRA, sd_model=model, lora=lora, **given, **PREVIEW)
    assert "strength: without effect, because strength_grid draws at its own" in caplog.text
    assert [name for name, _ in shown] == [f"strength {s}" for s in ("0.4", "0.6", "0.8", 1, 1.2)]
    assert drawn == [(["a sks cat"] * 2, [5, 6], (64, 64), None)] * 5
    assert out.values[0].shape == (10, 64, 64, 3)

    on_the_page = []  # which shows no picture larger than it is
    monkeypatch.setattr(
        pack.preview.ui, "PreviewImage", lambda images, cls: on_the_page.append(images.shape)
    )
    out = pack.run(pack.PreviewLoRA, sd_model=model, lora=lora, **PREVIEW)
    assert out.values[0].shape == (2, 64, 64, 3)
    assert on_the_page == [(2, 256, 256, 3)]


def test_strengths_differ_in_the_grid(pack, model, subject):
    lora = train(pack, model, subject, sample_every=0, learning_rate=0.05)[0]
    out = pack.run(pack.PreviewLoRA, sd_model=model, lora=lora, strength_grid=True, **PREVIEW)
    assert len({tuple(row.flatten().tolist()) for row in out.values[0][::2]}) == 5


@pytest.mark.parametrize(("weight", "share"), [(0.0, 0.0), (0.25, 0.25)])
def test_what_a_mask_hides_counts_as_much_as_the_node_says(pack, model, subject, weight, share):
    words = {"trigger": "sks", "class_name": "cat", "resolution": 0, "unmasked_weight": weight}
    mask = torch.zeros(1, 64, 64)
    mask[:, :, :32] = 1
    given = {"images": [torch.rand(2, 64, 64, 3)], "masks": [mask]}
    node = pack.run(pack.SubjectImages, folder=FOLDER, **given, **words)
    encoded = node.values[0].encode_all(model, lambda event: None)
    assert [float(encoded.masks[0][0, 5, x]) for x in (2, 13)] == [1.0, share]


def test_the_prior_outside_the_mask_is_trained_from_the_node(pack, model, subject):
    """Its settings arrive, masks are needed, and a prior that is connected for nothing is told."""
    settings = pack.run(pack.TrainingSettings, prior_loss="masked", prior_weight=50.0)
    given = {"settings": settings.values[0], "sample_every": 0, "learning_rate": 0.05}
    held, free = (train(pack, model, subject, **g)[0] for g in (given, given | {"settings": None}))
    assert any(not torch.equal(held[key], free[key]) for key in held)
    plain = pack.run(pack.SubjectImages, folder=FOLDER, trigger="sks", class_name="cat")
    with pytest.raises(ValueError, match="needs masks, and there is none that is used"):
        train(pack, model, plain, **given)
    told = pack.train_inputs.without_effect(pack.train.TrainConfig(), None, object(), "masked")
    assert told == ["The prior has no effect on training: prior_loss is masked."]
