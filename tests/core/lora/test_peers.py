"""Our files in the peers' own loaders: every key mapped, and the patched weights are W + the update
we wrote.

Full-size shapes of SD 1.5, SD 2.1 and SDXL with random factors and ranks that differ. ComfyUI needs
COMFYUI_PATH (marker `comfyui`), kohya's sd-scripts SD_SCRIPTS_PATH; each with its own requirements
in this environment.
"""

import json
import os
import sys

import pytest
import torch
from safetensors.torch import load_file

from cntlora_core.lora.adapter import Factors
from cntlora_core.lora.file import save_lora
from cntlora_core.lora.targets import ALL, find_projections
from cntlora_core.model.families import config_of
from cntlora_core.model.ldm_names import unet_name

FAMILIES = ("sd1", "sd2-v", "sdxl")
# attention, feed-forward, convolutions
COUNTS = {"sd1": 128 + 32 + 50, "sd2-v": 128 + 32 + 50, "sdxl": 560 + 140 + 38}


def empty_unet(config):
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        return UNet2DConditionModel.from_config(config)


def random_lora(unet):
    g = torch.Generator().manual_seed(0)
    lora = {}
    for i, p in enumerate(find_projections(unet, ALL)):
        rank = 1 + i % 6
        up, down = (
            torch.randn(*s, generator=g) for s in ((p.out_features, rank), (rank, p.in_features))
        )
        lora[p.name] = Factors(up * 0.05, down * 0.05)
    return lora


@pytest.fixture
def file(request, tmp_path):
    family = request.param
    unet = empty_unet(config_of(family)["unet"])
    lora = random_lora(unet)
    assert len(lora) == COUNTS[family]
    return (
        family,
        unet,
        lora,
        save_lora(tmp_path / "x.safetensors", lora, family, {"ss_v2": "True"}),
    )


@pytest.mark.comfyui
@pytest.mark.parametrize("file", FAMILIES, indirect=True)
def test_comfyui_maps_every_key(file, caplog, monkeypatch):
    path = os.environ.get("COMFYUI_PATH")
    if not path:
        pytest.skip("COMFYUI_PATH is not set")
    monkeypatch.syspath_prepend(path)
    monkeypatch.setattr(sys, "argv", ["main.py", "--cpu"])
    import comfy.options

    comfy.options.enable_args_parsing()
    import comfy.lora
    import comfy.model_detection

    family, unet, lora, saved = file
    attentive = frozenset(
        i for i, k in enumerate(unet.config.up_block_types) if k.startswith("CrossAttn")
    )
    names = {k: unet_name(k, attention_up_blocks=attentive) for k in unet.state_dict()}
    state = {f"model.diffusion_model.{old}": unet.state_dict()[new] for new, old in names.items()}

    class Model:
        class model_config:
            unet_config = comfy.model_detection.detect_unet_config(state, "model.diffusion_model.")

        def state_dict(self):
            return {k.removeprefix("model."): v for k, v in state.items()}

    key_map = comfy.lora.model_lora_keys_unet(Model(), {})
    with caplog.at_level("WARNING"):
        patches = comfy.lora.load_lora(load_file(saved), key_map)
    assert "not loaded" not in caplog.text
    assert len(patches) == COUNTS[family]
    for name, factors in lora.items():
        key = f"diffusion_model.{names[name + '.weight']}"
        shape = unet.get_submodule(name).weight.shape
        weight = torch.randn(shape, generator=torch.Generator().manual_seed(1))
        expected = weight + factors.delta().view(shape)
        patched = comfy.lora.calculate_weight([(1.0, patches[key], 1.0, None, None)], weight, key)
        torch.testing.assert_close(patched, expected, rtol=1e-5, atol=1e-6)


SMALL = {
    "sd1": {
        "block_out_channels": [16, 32, 32, 32],
        "norm_num_groups": 8,
        "cross_attention_dim": 24,
        "attention_head_dim": 2,
    },
    "sd2-v": {
        "block_out_channels": [16, 32, 32, 32],
        "norm_num_groups": 8,
        "attention_head_dim": [1, 2, 2, 2],
    },
    "sdxl": {
        "block_out_channels": [16, 32, 64],
        "norm_num_groups": 8,
        "attention_head_dim": [1, 2, 4],
        "cross_attention_dim": 48,
        "projection_class_embeddings_input_dim": 256 * 6 + 16,
    },
}


@pytest.mark.parametrize("family", [*FAMILIES[:2], pytest.param("sdxl", marks=pytest.mark.slow)])
def test_diffusers_loads_and_fuses(family, tmp_path):
    """The families' grammar at smaller widths: all keys, all ranks, and W + update after fusing."""
    pytest.importorskip("peft")
    from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel

    torch.manual_seed(0)
    unet = UNet2DConditionModel.from_config(config_of(family)["unet"] | SMALL[family])
    before = {k: v.clone() for k, v in unet.state_dict().items()}
    lora = random_lora(unet)
    assert len(lora) == COUNTS[family]
    saved = save_lora(tmp_path / "x.safetensors", lora, family, {})
    pipeline = StableDiffusionXLPipeline if family == "sdxl" else StableDiffusionPipeline
    state, alphas = pipeline.lora_state_dict(str(saved), unet_config=unet.config)
    assert (
        len([k for k in state if k.endswith(("lora_A.weight", "lora.down.weight"))])
        == COUNTS[family]
    )
    unet.load_lora_adapter(state, network_alphas=alphas, prefix="unet")
    unet.fuse_lora()
    unet.unload_lora()
    for key, value in unet.state_dict().items():
        name = key.removesuffix(".weight")
        expected = before[key]
        if name in lora:
            expected = expected + lora[name].delta().view_as(expected)
        torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-5, msg=key)


@pytest.mark.comfyui
@pytest.mark.parametrize("file", FAMILIES, indirect=True)
def test_kohya_builds_its_network_from_our_file(file, monkeypatch):
    path = os.environ.get("SD_SCRIPTS_PATH")
    if not path:
        pytest.skip("SD_SCRIPTS_PATH is not set")
    monkeypatch.syspath_prepend(path)
    pytest.importorskip("cv2")
    from library import original_unet, sdxl_original_unet
    from networks.lora import create_network_from_weights

    family, _, lora, saved = file
    with torch.device("meta"):
        if family == "sdxl":
            theirs = sdxl_original_unet.SdxlUNet2DConditionModel()
        else:
            v2 = family == "sd2-v"
            theirs = original_unet.UNet2DConditionModel(
                sample_size=64,
                attention_head_dim=[5, 10, 20, 20] if v2 else 8,
                cross_attention_dim=1024 if v2 else 768,
                use_linear_projection=v2,
            )
    network, weights = create_network_from_weights(1.0, str(saved), None, [], theirs)
    assert len(network.unet_loras) == COUNTS[family]
    ranks = sorted(module.lora_dim for module in network.unet_loras)
    assert ranks == sorted(f.rank for f in lora.values())
    network.apply_to([], theirs, apply_text_encoder=False, apply_unet=True)
    result = network.load_state_dict(weights, strict=False)
    assert not result.missing_keys
    assert not result.unexpected_keys
    by_shape = sorted(float(m.scale * m.lora_dim) for m in network.unet_loras)
    assert by_shape[0] == by_shape[-1]  # one alpha for all
    sums = sorted(
        round(float((m.scale * (up.flatten(1) @ down.flatten(1))).detach().double().sum()), 3)
        for m in network.unet_loras
        for up, down in [(m.lora_up.weight, m.lora_down.weight)]
    )
    assert sums == pytest.approx(
        sorted(float(f.delta().double().sum()) for f in lora.values()), abs=2e-3
    )


def test_metadata_is_json_where_readers_parse_it(tmp_path):
    from safetensors import safe_open

    from cntlora_core.config import CalibrationConfig
    from cntlora_core.lora.metadata import Taught, describe

    lora = random_lora(empty_unet(config_of("sd1")["unet"]))
    about = describe(
        lora,
        family="sd1",
        title="t",
        model_name="m",
        prediction="epsilon",
        taught=Taught("sks cat", (("sks cat, sitting", 1),) * 3, 512, "d"),
        steps=0,
        calibration=CalibrationConfig(),
    )
    with safe_open(save_lora(tmp_path / "x.safetensors", lora, "sd1", about), "pt") as opened:
        read = opened.metadata()
    assert {k: v for k, v in read.items() if k != "sshs_model_hash"} == about
    for key in ("ss_tag_frequency", "ss_datasets", "cntlora.ranks", "cntlora.calibration"):
        json.loads(read[key])
