"""The recipe of the embedded model, on arrays made here: each script's core runs and does its job."""

import importlib
import random
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks" / "mini_sd"


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    loaded = []

    def load(name):
        loaded.append(name)
        return importlib.import_module(name)

    yield load
    for name in [*loaded, "common"]:
        sys.modules.pop(name, None)


def test_drawings_are_put_on_white(script):
    import io

    from PIL import Image

    raw = io.BytesIO()
    Image.new("RGBA", (32, 32), (255, 0, 0, 0)).save(raw, "PNG")
    assert (script("prepare_data").on_white(raw.getvalue()) == 255).all()


def test_subjects_keep_their_held_out_pictures_apart(script, tmp_path):
    prepare = script("prepare_data")
    names = [f"{colour} heart" for colour in ("blue", "green", "pink", "black", "grey")] + ["heart decoration"]
    images = np.zeros((len(names), 64, 64, 3), np.uint8)
    assert prepare.make_subject(images, [{"name": n} for n in names], "hearts", tmp_path) == (3, 2)
    train, held = ({p.name for p in (tmp_path / "hearts" / part).glob("*.png")} for part in ("train", "heldout"))
    assert held == {"black_heart.png", "grey_heart.png"}
    assert not train & held


def test_the_tokenizer_round_trips(script, tmp_path):
    pytest.importorskip("tokenizers")
    module = script("train_tokenizer")
    texts = ["grinning cat face emoji, twitter style", "red heart"] * 20
    tokenizer = module.save(*module.train(iter(texts)), tmp_path)
    ids = tokenizer("Red  Heart naïve 漢").input_ids
    assert ids[0] == tokenizer.bos_token_id
    assert ids[-1] == tokenizer.eos_token_id == len(tokenizer) - 1
    assert tokenizer.decode(ids, skip_special_tokens=True).strip() == "red heart naïve 漢"


def test_whitened_latents_have_unit_variance_and_the_same_pictures(script):
    module = script("train_vae")
    torch.manual_seed(0)
    vae = module.AutoencoderKL(**module.CONFIG).eval()
    images = np.random.default_rng(0).integers(0, 255, (8, 64, 64, 3), dtype=np.uint8)
    x = module.to_tensor(images)
    assert module.augment(x).shape == x.shape
    assert torch.isfinite(module.step_loss(vae, x))
    with torch.no_grad():
        before = vae.decode(vae.encode(x).latent_dist.mean).sample
        module.whiten(vae, module.encode(vae, images)[:, 0])
        latents = vae.encode(x).latent_dist.mean
        after = vae.decode(latents).sample
    torch.testing.assert_close(before, after, rtol=1e-3, atol=1e-3)
    scaled = latents * vae.config.scaling_factor
    torch.testing.assert_close(scaled.std((0, 2, 3)), torch.ones(4), rtol=0.05, atol=0)


def test_captions_and_loss_weights(script):
    module = script("train_unet")
    row = {"name": "cat face", "short": "cat", "vendor": "google", "skin": None}
    texts = {module.caption(row, random.Random(i)) for i in range(200)}
    assert "" in texts
    assert "cat face emoji, google style" in texts
    abar = torch.linspace(0.999, 0.01, 1000)
    t = torch.arange(0, 1000, 1000 // 32)[:32]
    each = torch.linspace(0.3, 0.01, 32)
    balanced = module.Losses(2, abar)
    assert float(balanced.weigh(each, t)) == pytest.approx(0.1)
    assert float(module.Losses(1, abar).weigh(each, t)) < float(each.mean())


def test_the_learning_rate_rises_and_falls(script):
    common = script("common")
    rates = [common.learning_rate(s, 100, 10, 1.0) for s in range(101)]
    assert rates[0] == pytest.approx(0.1)
    assert max(rates) == pytest.approx(1.0, abs=0.03)
    assert rates[100] == pytest.approx(0.02)
