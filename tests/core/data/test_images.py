"""A folder of pictures as people keep them."""

import dataclasses
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from cntlora_core.config import DataConfig, TrainConfig
from cntlora_core.data import latent_cache
from cntlora_core.data.batches import batch_order, draw_noised, fixed_noised, mean_loss
from cntlora_core.data.buckets import CLOSER, RANDOM_CROPS, bucket_size, crops_of
from cntlora_core.data.captions import prepare_captions
from cntlora_core.data.checks import check_pictures, near_duplicates
from cntlora_core.data.dataset import encode_subject
from cntlora_core.data.images import Picture, find_pictures
from cntlora_core.data.latent_cache import LatentCache
from cntlora_core.errors import OutputError, SettingError
from cntlora_core.model import denoising_loss
from cntlora_core.model.noise_schedule import NoiseSchedule


def save(path, size=(64, 64), color="red", mode="RGB"):
    path.parent.mkdir(exist_ok=True)
    Image.new(mode, size, color).save(path)


def test_captions_repeats_and_words(tmp_path):
    save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text(
        "\ufeffa photo of {trigger}\n  {class}, sitting ", encoding="utf-8"
    )
    save(tmp_path / "b.png", color="blue")
    (tmp_path / "b.txt").write_bytes(b"\xff\xfe\x00")
    save(tmp_path / "3_cat" / "c.png", color="green")
    save(tmp_path / "others" / "d.png")
    said = []
    pictures, _ = prepare_captions(find_pictures(tmp_path, said.append), "x", ("sks", "cat"))
    assert [(p.name, p.caption, p.repeats) for p in pictures] == [
        ("a.png", "a photo of sks cat, sitting", 1),
        ("b.png", None, 1),
        ("c.png", None, 3),
    ]
    texts = [event.text for event in said]
    assert any("'b.txt' was left out" in text for text in texts)
    assert any("Left out the folder 'others' with 1 picture" in text for text in texts)


def test_what_one_would_want_to_know_before_training(tmp_path):
    save(tmp_path / "a.png", color="red")
    Image.new("RGB", (50, 50), (250, 2, 2)).save(tmp_path / "b.jpg")
    findings = check_pictures(find_pictures(tmp_path), 64)
    assert len(findings) == 3
    assert "Only 2 pictures" in findings[0]
    assert "1 of 2 is smaller than 64 px: b.jpg" in findings[1]
    assert "'a.png' and 'b.jpg'" in findings[2]


def test_other_pictures_are_no_duplicates():
    noise = torch.Generator().manual_seed(0)
    images = [
        Image.fromarray((torch.rand(32, 32, 3, generator=noise) * 255).byte().numpy()).resize(
            (64, 64)
        )
        for _ in range(4)
    ]
    assert near_duplicates([Picture(str(n), image, "") for n, image in enumerate(images)]) == []


@given(
    st.integers(16, 6000),
    st.integers(16, 6000),
    st.sampled_from([(64, 16), (512, 64), (1024, 64)]),
    st.booleans(),
)
def test_buckets_keep_their_promises(width, height, model, upscale):
    resolution, step = model
    w, h = bucket_size(width, height, resolution, step, upscale=upscale)
    assert w % step == h % step == 0
    assert step <= min(w, h)
    assert w * h <= resolution**2
    assert max(w, h) <= 2 * resolution
    if not upscale:
        assert w <= max(width, step)
        assert h <= max(height, step)
    if width == height and width >= resolution:
        assert (w, h) == (resolution, resolution)


@given(st.integers(16, 900), st.integers(16, 900), st.booleans(), st.booleans(), st.booleans())
def test_views_are_of_their_size_and_inside_the_picture(width, height, buckets, flip, crop):
    config = DataConfig(buckets=buckets, flip=flip, random_crop=crop)
    views = list(
        crops_of(
            Picture("a", Image.new("RGB", (width, height)), ""), 64, 16, config, torch.Generator()
        )
    )
    assert len({v.key for v in views}) == len(views) or crop
    for view in views:
        assert view.image().size == view.size
        assert 0 <= view.corner[0] <= view.resized[0] - view.size[0]
        assert 0 <= view.corner[1] <= view.resized[1] - view.size[1]


@given(st.integers(64, 900), st.integers(64, 900), st.booleans(), st.booleans())
def test_random_crops_are_the_centre_and_some_closer_in(width, height, buckets, flip):
    """Of a square picture, too, though it fills its bucket to the edges."""
    picture = Picture("a", Image.new("RGB", (width, height)), "")
    plain, random = (
        list(crops_of(picture, 64, 16, DataConfig(buckets=buckets, flip=flip, random_crop=r),
                      torch.Generator().manual_seed(7)))
        for r in (False, True)
    )  # fmt: skip
    assert random[: len(plain)] == plain
    assert len(random) == RANDOM_CROPS * len(plain)
    assert len({view.corner for view in random}) > 1
    for view in random:
        assert all(
            whole <= own <= CLOSER * whole + 1
            for own, whole in zip(view.resized, plain[0].resized, strict=True)
        )


@pytest.fixture
def mixed(mini_sd, tmp_path):
    """Two squares, a wide and a tall picture; the second is half transparent and shown twice."""
    generator = torch.Generator().manual_seed(1)
    pictures = []
    for n, size in enumerate([(64, 64), (80, 80), (96, 48), (40, 90)]):
        noise = (torch.rand(size[1], size[0], 3, generator=generator) * 255).byte().numpy()
        mask = None
        if n == 1:
            mask = Image.new("L", size, 0)
            mask.paste(255, (0, 0, 40, 80))
        pictures.append(
            Picture(
                f"{n}",
                Image.fromarray(noise),
                f"{n}",
                mask,
                "two" if n == 1 else None,
                1 + (n == 1),
            )
        )
    return pictures


def test_pictures_of_many_shapes_train_together(mini_sd, mixed):
    subject = encode_subject(mini_sd, mixed, "a thing", DataConfig(masked=True))
    assert [tuple(m.shape[1:]) for m in subject.mean] == [(16, 16), (16, 16), (12, 20), (20, 8)]
    assert subject.masks[1].mean() == 0.5
    assert subject.masks[0].mean() == 1
    assert not torch.equal(subject.conditioning.tokens[0], subject.conditioning.tokens[1])
    order = batch_order(subject, 2, 50, torch.Generator().manual_seed(0))
    counts = torch.bincount(torch.cat(order), minlength=4)
    assert counts[1] == pytest.approx(2 * counts[0], abs=2)
    assert counts[2] == pytest.approx(counts[0], abs=2)
    assert all(len({subject.mean[i].shape for i in index.tolist()}) == 1 for index in order)
    triples = draw_noised(subject, 9, 1000, torch.Generator().manual_seed(0))
    assert len(triples) == 9
    assert abs(mean_loss(mini_sd, triples, 4) - mean_loss(mini_sd, triples, 1)) < 1e-6
    assert len(fixed_noised(subject, 1000)) == 32


def test_what_the_mask_hides_does_not_count(mini_sd, mixed, monkeypatch):
    """A prediction that is wrong by 3 where the mask hides and by 2 where it shows has the loss
    4."""
    subject = encode_subject(mini_sd, [mixed[1]], "x", DataConfig(masked=True))
    (batch,) = draw_noised(subject, 2, 1000, torch.Generator().manual_seed(0)).sizes
    hidden = batch.mask < 0.5
    sharp = dataclasses.replace(batch, mask=(~hidden).float())
    monkeypatch.setattr(
        denoising_loss, "predict", lambda *args: batch.noise + torch.where(hidden, 3.0, 2.0)
    )
    torch.testing.assert_close(sharp.loss(mini_sd), torch.full((2,), 4.0))
    assert (dataclasses.replace(batch, mask=None).loss(mini_sd) > 5).all()


def test_what_the_mask_hides_counts_as_little_as_asked(mini_sd, mixed):
    data = DataConfig(masked=True, unmasked_weight=0.25)
    (mask,) = encode_subject(mini_sd, [mixed[1]], "x", data).masks
    assert mask.min() == 0.25
    assert mask.max() == 1
    assert mask.mean() == pytest.approx(0.625, abs=1e-6)


def test_a_mirrored_crop_is_told_as_it_is_seen(mini_sd):
    """SDXL is told the crop's left edge in the picture that it sees."""
    image = Image.new("RGB", (96, 64), "white")
    config = DataConfig(flip=True, random_crop=True, buckets=False)
    views = list(crops_of(Picture("a", image, "a"), 64, 8, config, torch.Generator()))
    assert any(view.mirrored for view in views)
    for view in views:
        left, top = view.corner
        right = view.resized[0] - left - view.size[0]
        assert view.shown_corner == ((right if view.mirrored else left), top)


def test_a_cache_that_cannot_be_written_is_none(mini_sd, mixed, tmp_path, monkeypatch):
    """Another process writes the same folder, or the disk is full: the pictures are encoded."""

    def full(*args, **options):
        raise OutputError("no space left")

    monkeypatch.setattr(latent_cache, "atomic_write", full)
    cache = LatentCache(tmp_path, mini_sd.pictures.vae)
    assert len(encode_subject(mini_sd, mixed, "x", cache=cache)) >= len(mixed)
    assert not list(tmp_path.iterdir())


def test_masks_that_are_not_used_are_told(tmp_path):
    save(tmp_path / "a.png")
    save(tmp_path / "a-masklabel.png", color="white")
    (picture,) = find_pictures(tmp_path)
    told = "1 picture has a mask, not used: turn on masked."
    assert told in check_pictures([picture], 64, masked=False)
    assert told not in check_pictures([picture], 64, masked=True)


def test_a_cache_gives_the_same_latents_and_survives_damage(mini_sd, mixed, tmp_path, monkeypatch):
    fresh = encode_subject(mini_sd, mixed, "x", cache=LatentCache(tmp_path, mini_sd.pictures.vae))
    files = sorted(tmp_path.iterdir())
    assert len(files) == 4
    files[0].write_bytes(b"damaged")
    again = encode_subject(mini_sd, mixed, "x", cache=LatentCache(tmp_path, mini_sd.pictures.vae))
    for a, b in zip((*fresh.mean, *fresh.std), (*again.mean, *again.std), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    monkeypatch.setattr(mini_sd.pictures.vae, "encode", None)  # all is found: nothing is encoded
    encode_subject(mini_sd, mixed, "x", cache=LatentCache(tmp_path, mini_sd.pictures.vae))


def test_the_last_of_five_is_held_out(subject):
    training, held = subject.hold_out()
    assert training.picture_count == subject.picture_count - 1
    assert held.names == subject.names[-1:]
    assert len(held.conditioning) == 1


def test_min_snr_weighs_noisy_steps_more():
    schedule = NoiseSchedule.from_config({})
    t = torch.tensor([0, 300, 999])
    weight = schedule.min_snr_weight(t, 5.0)
    snr = schedule.alphas_cumprod[t] / (1 - schedule.alphas_cumprod[t])
    torch.testing.assert_close(weight, torch.minimum(snr, torch.tensor(5.0)) / snr)
    v = NoiseSchedule(schedule.alphas_cumprod, "v_prediction").min_snr_weight(t, 5.0)
    torch.testing.assert_close(v, torch.minimum(snr, torch.tensor(5.0)) / (snr + 1))


def test_an_optimiser_that_is_not_installed_is_a_sentence(mini_sd, subject, monkeypatch):
    from cntlora_core.config import CalibrationConfig
    from cntlora_core.run.runs import run_training

    monkeypatch.setitem(sys.modules, "prodigyopt", None)
    with pytest.raises(SettingError, match="pip install prodigyopt"):
        run_training(
            mini_sd,
            subject,
            CalibrationConfig(init="gaussian"),
            TrainConfig(steps=1, learning_rate=1.0, optimizer="prodigy"),
        )
