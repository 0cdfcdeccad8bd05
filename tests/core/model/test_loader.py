import json
import shutil

import pytest
import torch

from cntlora_core.errors import CheckpointError
from cntlora_core.model.diffusers_folder import folder_family, read_json, weights_files
from cntlora_core.model.loader import MINI_SD_FOLDER, load_checkpoint
from cntlora_core.model.single_file import build_text
from cntlora_core.model.tensor_file import TensorFiles


@pytest.fixture
def copy(tmp_path):
    return shutil.copytree(MINI_SD_FOLDER / "model", tmp_path / "model")


def test_the_embedded_model(mini_sd):
    assert (mini_sd.family, mini_sd.name, mini_sd.resolution, mini_sd.vae_scale) == (
        "sd1",
        "mini-sd",
        64,
        4,
    )
    assert not mini_sd.unet.training
    assert not any(
        p.requires_grad
        for part in (mini_sd.unet, mini_sd.pictures.vae, *mini_sd.prompts.encoders)
        for p in part.parameters()
    )


def test_its_files_stay_small():
    size = sum(f.stat().st_size for f in MINI_SD_FOLDER.rglob("*") if f.is_file())
    assert size < 12_300_000


def test_a_folder_loads_like_the_name(copy, mini_sd):
    loaded = load_checkpoint(copy, dtype=torch.bfloat16)
    assert loaded.dtype == loaded.unet.dtype == torch.bfloat16
    weight = "conv_in.weight"
    assert torch.equal(
        loaded.unet.state_dict()[weight], mini_sd.unet.state_dict()[weight].bfloat16()
    )


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder", "tokenizer", "scheduler"])
def test_a_missing_component_is_named(copy, part):
    shutil.rmtree(copy / part)
    with pytest.raises(CheckpointError, match=rf"has no {part}|{part}.*cannot be read"):
        load_checkpoint(copy)


def test_missing_weights_are_named(copy):
    (copy / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="no safetensors weights in unet"):
        load_checkpoint(copy)


def test_truncated_weights(copy):
    file = copy / "unet" / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:100_000])
    with pytest.raises(CheckpointError, match="is cut off"):
        load_checkpoint(copy)


def test_parts_of_another_shape(copy):
    path = copy / "unet" / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"cross_attention_dim": 96}))
    with pytest.raises(CheckpointError, match=r"UNet of another shape.*expected \(96, 96\)"):
        load_checkpoint(copy)
    path.write_text(json.dumps(config | {"block_out_channels": "wide"}))
    with pytest.raises(CheckpointError, match="cannot be loaded"):
        load_checkpoint(copy)


def test_broken_json(copy):
    (copy / "model_index.json").write_text("{")
    with pytest.raises(CheckpointError, match="cannot be read as JSON"):
        load_checkpoint(copy)
    (copy / "model_index.json").unlink()
    with pytest.raises(CheckpointError, match=r"model_index\.json is missing"):
        load_checkpoint(copy)


def test_paths_that_are_no_checkpoint(tmp_path):
    with pytest.raises(CheckpointError, match="does not exist"):
        load_checkpoint(tmp_path / "none")


def test_inpainting_models_are_refused_by_name(copy, monkeypatch):
    from diffusers import UNet2DConditionModel

    config = json.loads((copy / "unet" / "config.json").read_text())
    unet = UNet2DConditionModel.from_config(config | {"in_channels": 9})
    shutil.rmtree(copy / "unet")
    unet.save_pretrained(copy / "unet")
    with pytest.raises(CheckpointError, match="9 input channels \\(inpainting"):
        load_checkpoint(copy)


@pytest.mark.parametrize(
    ("files", "count"),
    [
        (["model.safetensors", "model.fp16.safetensors"], 1),
        (["diffusion_pytorch_model.safetensors", "model-00001-of-00002.safetensors"], 1),
        (["model.fp16.safetensors", "model.ema.safetensors"], 1),
        (["model.non-ema.safetensors"], 1),
        (["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"], 2),
        (["model.fp16-00001-of-00002.safetensors", "model.fp16-00002-of-00002.safetensors"], 2),
        (["model-00001-of-00002.fp16.safetensors", "model-00002-of-00002.fp16.safetensors"], 2),
    ],
)
def test_which_weights_are_read(tmp_path, files, count):
    """The plain ones, then fp16; one file before shards."""
    for name in (*files, "other.safetensors", "model.safetensors.index.json"):
        (tmp_path / name).touch()
    assert [path.name for path in weights_files(tmp_path)] == files[:count]


def test_parts_are_kept_as_they_are_stored(copy):
    """They compute in fp32 all the same."""
    stored = load_checkpoint(copy)
    assert {p.dtype for p in stored.pictures.vae.parameters()} == {torch.float16}
    assert {p.dtype for p in stored.unet.parameters()} == {torch.float32}


def test_the_second_text_encoder_has_its_projection(tmp_path):
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    sizes = {"hidden_size": 16, "projection_dim": 8, "intermediate_size": 16, "vocab_size": 30}
    torch.manual_seed(0)
    saved = CLIPTextModelWithProjection(CLIPTextConfig(**sizes, num_hidden_layers=1))
    saved.save_pretrained(tmp_path)
    config = read_json(tmp_path / "config.json")
    loaded = build_text(TensorFiles(weights_files(tmp_path)), config, True)
    expected = saved.state_dict()
    assert loaded.state_dict().keys() == expected.keys()
    assert all(torch.equal(v, expected[k]) for k, v in loaded.state_dict().items())


def test_separate_text_encoders_do_not_go_with_a_folder():
    with pytest.raises(CheckpointError, match="text encoders of its own"):
        load_checkpoint("mini-sd", text_encoders=["clip_l.safetensors"])


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ({"class_embed_type": "projection", "cross_attention_dim": 1024}, "unCLIP, an upscaler"),
        ({"addition_embed_type": "text_time", "cross_attention_dim": 1280}, "the SDXL refiner"),
    ],
)
def test_folders_of_other_kinds_are_refused_by_name(more, says):
    with pytest.raises(CheckpointError, match=says):
        folder_family({"in_channels": 4} | more, "epsilon", "x")
