"""The recipe of the embedded model, on arrays made here: each script's core runs and does its
job."""

import argparse
import importlib
import io
import random
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("tokenizers")

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks" / "mini_sd"
MINI_SD = FOLDER.parents[1] / "cntlora_core" / "mini_sd"
MODULES = {file.stem for file in FOLDER.glob("*.py")}


@pytest.fixture
def script(monkeypatch):
    """Import a script as it is run, with its folder first on the path; forget it afterwards, for
    its siblings' names are common."""
    monkeypatch.syspath_prepend(str(FOLDER))
    yield importlib.import_module
    for name in MODULES:
        sys.modules.pop(name, None)


@pytest.fixture
def data():
    """24 drawings of 12 emoji by two vendors."""
    images = np.random.default_rng(0).integers(0, 255, (24, 64, 64, 3), dtype=np.uint8)
    rows = [
        {
            "name": f"thing {i % 12}",
            "short": "t",
            "vendor": v,
            "category": "Symbols",
            "unified": str(i % 12),
            "skin": None,
        }
        for i, v in enumerate(["twitter"] * 12 + ["google"] * 12)
    ]
    return images, rows


@pytest.fixture
def tokenizer(script, tmp_path):
    module = script("tokenizer")
    texts = ["grinning cat face emoji, twitter style", "red heart"] * 20
    module.save(*module.train(iter(texts)), tmp_path / "tokenizer")
    return module.CLIPTokenizer.from_pretrained(tmp_path / "tokenizer")


def parameters(module):
    return torch.cat([p.detach().flatten() for p in module.parameters()])


def test_drawings_are_put_on_white(script):
    raw = io.BytesIO()
    Image.new("RGBA", (32, 32), (255, 0, 0, 0)).save(raw, "PNG")
    assert (script("prepare_data").on_white(raw.getvalue()) == 255).all()


def test_a_damaged_tarball_is_refused(script, tmp_path):
    prepare = script("prepare_data")
    package = prepare.PACKAGES["fluent"]
    (tmp_path / f"lobehub-fluent-emoji-3d-{package.version}.tgz").write_bytes(b"half of it")
    with pytest.raises(SystemExit, match="Delete it to fetch it again"):
        prepare.archive(package, tmp_path)


HEARTS = [
    f"{c} heart"
    for c in ("blue", "green", "pink", "brown", "white", "purple", "black", "grey", "orange")
]


def test_subjects_keep_their_held_out_pictures_apart(script, tmp_path):
    subjects = script("subjects")
    names = [*HEARTS, "heart decoration", "blue heart"]
    images = np.zeros((len(names), 64, 64, 3), np.uint8)
    hearts = subjects.SUBJECTS["hearts"]
    for _ in range(2):  # again into the same folder changes nothing
        assert subjects.make_subject(images, [{"name": n} for n in names], hearts, tmp_path) == (
            6,
            3,
        )
    train, held = (
        {p.name for p in (tmp_path / part).glob("*.png")} for part in ("train", "heldout")
    )
    assert held == {"black_heart.png", "grey_heart.png", "orange_heart.png"}
    assert not train & held
    assert '"prompt": "a sks heart emoji", "class_prompt": "a heart emoji"' in (
        (tmp_path / "train" / "metadata.jsonl").read_text()
    )
    changed = subjects.Subject("heart", hearts.pattern, "blue|green|pink")
    with pytest.raises(
        ValueError, match=r"already holds 3 other pictures, such as 'blue_heart\.png'"
    ):
        subjects.make_subject(images, [{"name": n} for n in names], changed, tmp_path)


def test_too_few_pictures_for_a_subject_are_told(script, tmp_path):
    subjects = script("subjects")
    with pytest.raises(ValueError, match="leave 2 pictures for heldout, fewer than 3"):
        subjects.choose(
            [{"name": n} for n in HEARTS], subjects.Subject("heart", ".* heart", "black|grey")
        )


@pytest.mark.parametrize("part", ["train", "heldout"])
def test_the_embedded_subject_is_the_recipes(script, part):
    subjects = script("subjects")
    files = {k: sorted(p.stem for p in (MINI_SD / k).glob("*.png")) for k in ("subject", "heldout")}
    names = sorted(name.replace("_", " ") for stems in files.values() for name in stems)
    chosen = subjects.choose(
        [{"name": n} for n in [*names, "cat face", "smiling face"]], subjects.SUBJECTS["cat_faces"]
    )
    assert [names[i].replace(" ", "_") for i in chosen[part]] == files[
        "subject" if part == "train" else "heldout"
    ]


def test_the_tokenizer_round_trips(tokenizer):
    ids = tokenizer("Red  Heart naïve 漢").input_ids
    assert ids[0] == tokenizer.bos_token_id
    assert ids[-1] == tokenizer.eos_token_id == len(tokenizer) - 1
    assert tokenizer.decode(ids, skip_special_tokens=True).strip() == "red heart naïve 漢"


def test_the_tokenizer_is_the_same_in_every_run(script):
    module = script("tokenizer")
    # Many equally frequent pairs: only the ids of their parts order them.
    rng = random.Random(0)
    texts = [" ".join("".join(rng.choices("abcdefgh", k=3)) for _ in range(100))] * 2
    first, *others = (module.train(iter(texts)) for _ in range(8))
    assert all(again == first for again in others)


def vae_after(script, data, folder, **plan):
    """Parameters after seeded steps of a narrow VAE."""
    module, training = script("train_vae"), script("training")
    torch.manual_seed(0)
    vae = module.AutoencoderKL(**(module.CONFIG | {"block_out_channels": (8, 8, 8)}))
    steps = training.Plan(warm_up=1, ema_decay=0.9, checkpoint=folder / "training.pt", **plan)
    return parameters(module.train(vae, *data, steps, batch=4))


def test_vae_steps_are_exact_and_go_on_from_a_checkpoint(script, data, tmp_path):
    whole, again = (vae_after(script, data, tmp_path, steps=3, save_every=2) for _ in range(2))
    assert torch.isfinite(whole).all()
    assert torch.equal(whole, again)
    resumed = vae_after(script, data, tmp_path, steps=3, save_every=9, resume=True)
    assert torch.equal(whole, resumed)
    assert not torch.equal(whole, vae_after(script, data, tmp_path, steps=2))


def test_nothing_to_resume_is_told(script, data, tmp_path):
    with pytest.raises(SystemExit, match="there is nothing to resume"):
        vae_after(script, data, tmp_path, steps=1, resume=True)


def test_whitened_latents_have_unit_variance_and_the_same_pictures(script, data):
    module = script("train_vae")
    torch.manual_seed(0)
    vae = module.AutoencoderKL(**module.CONFIG).eval()
    images = data[0][:8]
    x = module.to_tensor(images)
    with torch.no_grad():
        before = vae.decode(vae.encode(x).latent_dist.mean).sample
        module.whiten(vae, module.encode(vae, x)[:, 0])
        latents = vae.encode(x).latent_dist.mean
        after = vae.decode(latents).sample
    torch.testing.assert_close(before, after, rtol=1e-3, atol=1e-3)
    scaled = latents * vae.config.scaling_factor
    torch.testing.assert_close(scaled.std((0, 2, 3)), torch.ones(4), rtol=0.05, atol=0)


def test_a_unet_step_trains_saves_and_samples(script, data, tokenizer, tmp_path):
    module = script("train_unet")
    rows = data[1] * 2
    images = np.concatenate([data[0]] * 2)
    script("train_vae").AutoencoderKL(**script("train_vae").CONFIG).save_pretrained(
        tmp_path / "vae"
    )
    torch.manual_seed(0)
    pipe = module.build(tmp_path / "tokenizer", tmp_path / "vae")
    fresh = [parameters(part) for part in (pipe.unet, pipe.text_encoder)]
    latents = module.encode_copies(pipe.vae, images, rows, copies=3)
    assert latents.shape == (3, 48, 2, 4, 16, 16)
    assert not torch.equal(latents[0], latents[1])
    plan = script("training").Plan(steps=1, warm_up=1, ema_decay=0.9)
    loss = module.train(pipe, latents, rows, plan, batch=32)
    assert 0.5 < loss < 2  # it guesses nothing yet, and the noise has variance 1
    module.save(pipe, tmp_path / "tokenizer", tmp_path / "model")
    again = module.build(tmp_path / "tokenizer", tmp_path / "vae", init=tmp_path / "model")
    for part, before in zip((again.unet, again.text_encoder), fresh, strict=True):
        assert part.training
        assert part.dtype == torch.float32
        assert not torch.equal(parameters(part), before)
    again.set_progress_bar_config(disable=True)
    (picture,) = again("red heart", num_inference_steps=1).images
    assert picture.size == (64, 64)


def test_captions_and_loss_weights(script, tokenizer):
    module = script("train_unet")
    row = {"name": "cat face", "short": "cat", "vendor": "google", "skin": None}
    texts = module.captions(row)
    for forms, styled in ((module.FORMS, 0.9 * 0.75), (module.NO_STYLE, 0.0)):
        share = dict(zip(texts, module.chances(forms), strict=True))
        assert sum(share.values()) == pytest.approx(1)
        assert share[""] == pytest.approx(0.1)
        assert sum(c for t, c in share.items() if "google" in t) == pytest.approx(styled)
    assert module.tokenise(tokenizer, [row, row]).shape == (2, len(texts), 32)
    t = module.stratified_timesteps(40, "cpu")
    assert torch.equal(t // 25, torch.arange(40))
    each = torch.linspace(0.3, 0.01, 64)
    assert float(module.Losses("cpu").weigh(each)) == pytest.approx(0.1)


def test_drawings_are_chosen_by_their_weights(script):
    common = script("common")
    torch.manual_seed(0)
    chosen = common.draw(common.cumulative([0.0, 1.0, 3.0, 0.0], "cpu"), 4000)
    assert torch.bincount(chosen, minlength=4).tolist() == pytest.approx([0, 1000, 3000, 0], abs=99)


def test_variations_keep_the_paper_white_and_mirror_only_what_may_be(script):
    module = script("train_unet")
    torch.manual_seed(0)
    x = torch.ones(64, 3, 64, 64)
    x[:, :, 20:40, 10:20] = -1  # in the left half
    mirror = torch.arange(64) < 32
    varied = module.vary(x, mirror)
    assert (varied[:, :, :4] == 1).all()
    dark = varied[..., 32:].amin((1, 2, 3)) < 0
    assert dark[mirror].any()
    assert not dark[~mirror].any()


def test_the_encoder_learns_pairs_and_is_stored_small(script, data, tmp_path):
    module = script("train_encoder")
    images, rows = data
    pairs = module.find_pairs(
        [*rows, dict(rows[0], skin="dark"), dict(rows[0], unified="only one vendor")]
    )
    assert pairs.tolist() == [[i, i + 12] for i in range(12)]
    torch.manual_seed(0)
    encoder = module.train(images, pairs, steps=2)
    file = tmp_path / "encoder.safetensors"
    module.save(encoder, file, {"steps": 2})
    assert file.stat().st_size < 1.5e6
    with torch.no_grad():
        features = module.embed(module.load_encoder(file), images)
        torch.testing.assert_close(features, module.embed(encoder, images), rtol=0, atol=5e-3)
    torch.testing.assert_close(features.norm(dim=1), torch.ones(24))


def test_retrieval_counts_the_own_emoji(script):
    module = script("train_encoder")
    gallery = torch.eye(7)
    queries = torch.stack([gallery[0], gallery[2] + 0.5 * gallery[1], gallery[3]])
    scores = module.retrieval(queries, ["0", "1", "not there"], gallery, [str(i) for i in range(7)])
    assert scores == {"top1": 0.5, "top5": 1.0}


def test_subjects_are_told_apart_by_their_features(script, monkeypatch):
    module = script("train_encoder")
    kinds = {
        kind: script("subjects").Subject(kind, f"{kind} .*", "[6-9]") for kind in ("red", "blue")
    }
    monkeypatch.setattr(module, "SUBJECTS", kinds)
    rows = [{"name": f"{kind} {i}"} for kind in kinds for i in range(10)]
    features = torch.eye(2).repeat_interleave(10, 0)
    features[9] = features[19]  # a red one that looks blue
    assert module.own_subject(features, rows) == {"red": "3/4", "blue": "4/4"}


def test_the_learning_rate_rises_and_falls(script):
    common = script("common")
    rates = [common.learning_rate(s, 100, 10, 1.0) for s in range(101)]
    assert rates[0] == pytest.approx(0.1)
    assert max(rates) == pytest.approx(1.0, abs=0.03)
    assert rates[100] == pytest.approx(0.02)
    with pytest.raises(SystemExit, match="--steps is 0"):
        common.start(argparse.Namespace(steps=0, seed=0, threads=1))
