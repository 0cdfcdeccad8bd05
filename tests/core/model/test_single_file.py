"""Single-file checkpoints: small models in the true key grammar of each family, and files that are
something else."""

import importlib.util
import json
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from cntlora_core.errors import CheckpointError
from cntlora_core.model import single_file, tokenizers
from cntlora_core.model.encoders import temporarily_on
from cntlora_core.model.families import FAMILIES, config_of, detect_family, distilled
from cntlora_core.model.ldm_names import UNET_PREFIX, unet_name, vae_name
from cntlora_core.model.loader import MINI_SD_FOLDER, load_checkpoint
from cntlora_core.model.tensor_file import open_tensors

ROOT = Path(__file__).resolve().parents[3]


def _maker():
    spec = importlib.util.spec_from_file_location(
        "make_checkpoint", ROOT / "benchmarks" / "make_checkpoint.py"
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


make_checkpoint = _maker()


small_config, clip_vocabulary = make_checkpoint.small_config, make_checkpoint.clip_vocabulary


@pytest.fixture(scope="module", params=FAMILIES)
def checkpoint(request, tmp_path_factory):
    family = request.param
    path = tmp_path_factory.mktemp(family) / f"{family}.safetensors"
    config = small_config(family)
    make_checkpoint.write(path, family, dtype="fp16", config=config)
    return family, config, path


@pytest.fixture
def small(checkpoint, monkeypatch, tmp_path):
    """The checkpoint with its small configuration in the loader's place, and a tokenizer folder."""
    family, config, path = checkpoint
    monkeypatch.setattr(single_file, "config_of", lambda name: json.loads(json.dumps(config)))
    return family, path, clip_vocabulary(tmp_path)


def test_names_agree_with_diffusers_converter():
    """Our names, put through diffusers' own conversion, come back as we started."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from diffusers.loaders.single_file_utils import (
        convert_ldm_unet_checkpoint,
        convert_ldm_vae_checkpoint,
    )

    for family in FAMILIES:
        config = config_of(family)
        with torch.device("meta"):
            unet = UNet2DConditionModel.from_config(config["unet"])
            vae = AutoencoderKL.from_config(config["vae"])
        attentive = frozenset(
            i for i, k in enumerate(config["unet"]["up_block_types"]) if k.startswith("CrossAttn")
        )
        ours = {
            UNET_PREFIX + unet_name(k, attention_up_blocks=attentive): k for k in unet.state_dict()
        }
        back = convert_ldm_unet_checkpoint(ours, dict(unet.config))
        assert back == {k: k for k in unet.state_dict()}
        state = vae.state_dict()
        tensors = {f"first_stage_model.{vae_name(k, 4)}": v for k, v in state.items()}
        assert {
            k: v.shape for k, v in convert_ldm_vae_checkpoint(tensors, dict(vae.config)).items()
        } == {k: v.shape for k, v in state.items()}


def test_families_are_told_apart(checkpoint):
    family, _, path = checkpoint
    assert detect_family(open_tensors(path)) == family.removesuffix("-v")


def test_loading_fills_every_weight(small):
    family, path, vocabulary = small
    model = load_checkpoint(path, tokenizer=vocabulary)
    assert model.family == family
    assert model.schedule.prediction_type == ("v_prediction" if family == "sd2-v" else "epsilon")
    assert (
        len(model.prompts.encoders)
        == len(model.prompts.tokenizers)
        == (2 if family == "sdxl" else 1)
    )
    stored = load_file(path)
    attentive = frozenset(
        i for i, k in enumerate(model.unet.config.up_block_types) if k.startswith("CrossAttn")
    )
    for name, value in model.unet.state_dict().items():
        assert value.dtype == torch.float32
        assert torch.equal(
            value, stored[UNET_PREFIX + unet_name(name, attention_up_blocks=attentive)].float()
        )
    for part in (model.pictures.vae, *model.prompts.encoders):
        assert not any(t.is_meta for t in (*part.parameters(), *part.buffers()))


def test_it_runs_end_to_end(small, tmp_path):
    """Pictures in, a calibrated and trained LoRA out, on every family."""
    from cntlora_core.cli.main import main

    family, path, vocabulary = small
    vocabulary.rename(path.parent / "tokenizer") if not (
        path.parent / "tokenizer"
    ).exists() else None
    out = tmp_path / "x.safetensors"
    command = ["train", "--checkpoint", str(path), "--images", str(MINI_SD_FOLDER / "subject")]
    more = ["--prompt", "a cat", "--resolution", "64", "--steps", "1", "--rank", "2"]
    more += ["--effort", "quick", "--output", str(out)]
    assert main([*command, *more, "--validate-every", "0"]) == 0
    state = load_file(out)
    assert any(("input_blocks" in k) == (family == "sdxl") for k in state)
    assert all(torch.isfinite(v).all() for v in state.values())


def test_text_encoders_agree_with_transformers(small):
    """The joined q, k, v of OpenCLIP are taken apart rightly: both layouts give one result."""
    family, path, vocabulary = small
    model = load_checkpoint(path, tokenizer=vocabulary)
    encoder = model.prompts.encoders[-1]
    stored = load_file(path)
    state = {k.removeprefix("text_model."): v for k, v in encoder.state_dict().items()}
    layer = "encoder.layers.1.self_attn.k_proj.weight"
    if family == "sd1":
        original = stored[f"cond_stage_model.transformer.text_model.{layer}"]
    else:
        prefix = "conditioner.embedders.1.model." if family == "sdxl" else "cond_stage_model.model."
        joined = stored[f"{prefix}transformer.resblocks.1.attn.in_proj_weight"]
        original = joined[len(joined) // 3 : 2 * len(joined) // 3]
    assert torch.equal(state[layer], original)
    with temporarily_on(encoder, torch.device("cpu")), torch.no_grad():
        ids = torch.full((1, 77), 49407)
        assert torch.isfinite(encoder(ids).last_hidden_state).all()


@pytest.mark.parametrize("checkpoint", ["sd1"], indirect=True)
class TestOnSD1:
    def test_bf16_and_the_vae_beside(self, small, tmp_path):
        _, path, vocabulary = small
        state = load_file(path)
        vae = {
            k.removeprefix("first_stage_model."): v
            for k, v in state.items()
            if k.startswith("first_stage")
        }
        save_file({k: v.clone() for k, v in vae.items()}, tmp_path / "vae.safetensors")
        pruned = tmp_path / "pruned.safetensors"
        save_file({k: v for k, v in state.items() if not k.startswith("first_stage")}, pruned)
        with pytest.raises(CheckpointError, match="holds no VAE"):
            load_checkpoint(pruned, tokenizer=vocabulary)
        model = load_checkpoint(
            pruned, dtype=torch.bfloat16, vae=tmp_path / "vae.safetensors", tokenizer=vocabulary
        )
        assert model.unet.dtype == torch.bfloat16

    def test_ema_keys_and_extras_are_ignored(self, small, tmp_path):
        _, path, vocabulary = small
        state = load_file(path)
        state["model_ema.decay"] = torch.ones(1)
        state["cond_stage_model.transformer.text_model.embeddings.position_ids"] = torch.arange(77)[
            None
        ]
        save_file(state, tmp_path / "ema.safetensors")
        assert load_checkpoint(tmp_path / "ema.safetensors", tokenizer=vocabulary).family == "sd1"

    def test_ckpt_without_code(self, small, tmp_path):
        _, path, vocabulary = small
        torch.save({"state_dict": load_file(path), "global_step": 3}, tmp_path / "x.ckpt")
        assert load_checkpoint(tmp_path / "x.ckpt", tokenizer=vocabulary).name == "x"

    def test_ckpt_of_before_torch_wrote_archives(self, small, tmp_path):
        _, path, vocabulary = small
        old = tmp_path / "old.ckpt"
        torch.save({"state_dict": load_file(path)}, old, _use_new_zipfile_serialization=False)
        assert load_checkpoint(old, tokenizer=vocabulary).name == "old"
        torch.save({"state_dict": [1]}, tmp_path / "list.ckpt")
        with pytest.raises(CheckpointError, match="not a Stable Diffusion checkpoint"):
            load_checkpoint(tmp_path / "list.ckpt", tokenizer=vocabulary)

    def test_whole_numbers_are_no_weights(self, small, tmp_path):
        _, path, vocabulary = small
        state = load_file(path)
        name = next(k for k in state if k.endswith("attn1.to_q.weight"))
        state[name] = (state[name] * 100).to(torch.int8)
        save_file(state, tmp_path / "x.safetensors")
        with pytest.raises(CheckpointError, match="is quantised"):
            load_checkpoint(tmp_path / "x.safetensors", tokenizer=vocabulary)

    def test_missing_and_misshapen_weights_are_named(self, small, tmp_path):
        _, path, vocabulary = small
        state = load_file(path)
        key = f"{UNET_PREFIX}middle_block.1.norm.weight"
        broken = dict(state)
        del broken[key]
        save_file(broken, tmp_path / "a.safetensors")
        with pytest.raises(
            CheckpointError, match=r"lacks 'model\.diffusion_model\.middle_block\.1\.norm\.weight'"
        ):
            load_checkpoint(tmp_path / "a.safetensors", tokenizer=vocabulary)
        state[key] = torch.ones(3)
        save_file(state, tmp_path / "b.safetensors")
        with pytest.raises(CheckpointError, match="another shape"):
            load_checkpoint(tmp_path / "b.safetensors", tokenizer=vocabulary)

    def test_no_tokenizer_says_how_to_get_one(self, small, tmp_path, monkeypatch):
        _, path, _ = small
        monkeypatch.delenv("COMFYUI_PATH", raising=False)
        monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
        with pytest.raises(CheckpointError, match="COMFYUI_PATH"):
            load_checkpoint(path, tokenizer=tmp_path / "none")

    def test_a_file_cut_off(self, small, tmp_path):
        _, path, _ = small
        (tmp_path / "cut.safetensors").write_bytes(path.read_bytes()[:-1000])
        with pytest.raises(CheckpointError, match=r"is cut off: .* Download it again"):
            load_checkpoint(tmp_path / "cut.safetensors")


def test_of_the_cache_only_clips_tokenizers_are_taken(tmp_path, monkeypatch):
    monkeypatch.delenv("COMFYUI_PATH", raising=False)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    other = tmp_path / "models--a--other" / "snapshots" / "1" / "tokenizer"
    clip = tmp_path / "models--stable--diffusion" / "snapshots" / "1" / "tokenizer"
    for folder in (other, clip):
        folder.mkdir(parents=True)
    (other / "vocab.json").write_text('{"a": 0}')
    (other / "merges.txt").write_text("#version: 0.2\n")
    assert tokenizers.find_tokenizer() is None
    given = clip_vocabulary(tmp_path)
    for name in ("vocab.json", "merges.txt"):
        (clip / name).write_bytes((given / name).read_bytes())
    assert tokenizers.find_tokenizer() == clip


def test_a_tokenizer_that_cannot_be_read_is_a_sentence(tmp_path):
    (tmp_path / "vocab.json").write_text("[]")
    (tmp_path / "merges.txt").write_text("x")
    with pytest.raises(CheckpointError, match="cannot be read"):
        tokenizers.load_tokenizers("sd1", [tmp_path])


def test_tokenizers_pad_as_their_encoders_were_trained(tmp_path):
    folder = clip_vocabulary(tmp_path)
    assert [t.pad_token for t in tokenizers.load_tokenizers("sdxl", [folder])] == [
        "<|endoftext|>",
        "!",
    ]
    (sd2,) = tokenizers.load_tokenizers("sd2", [folder])
    ids = sd2("cat", padding="max_length", truncation=True)["input_ids"]
    assert len(ids) == 77
    assert ids[-1] == sd2.convert_tokens_to_ids("!")


def unet_of(channels=4, context=768):
    return {
        f"{UNET_PREFIX}input_blocks.0.0.weight": (8, channels, 3, 3),
        f"{UNET_PREFIX}input_blocks.4.1.transformer_blocks.0.attn2.to_k.weight": (8, context),
    }


FOREIGN = {
    "a LoRA": {"lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight": (4, 8)},
    "a ControlNet": {"control_model.input_blocks.0.0.weight": (8, 4, 3, 3)},
    "an IP-Adapter": {"image_proj.proj.weight": (4, 4)},
    "a Flux model": {"model.diffusion_model.double_blocks.0.img_attn.qkv.weight": (4, 4)},
    "a Stable Diffusion 3 model": {
        "model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight": (4, 4)
    },
    "a PixArt model": {"adaln_single.linear.weight": (4, 4)},
    "a Lumina or Z-Image model": {"cap_embedder.0.weight": (4,)},
    "a Qwen-Image model": {
        "transformer_blocks.0.attn.to_q.weight": (4, 4),
        "txt_norm.weight": (4,),
    },
    "a Stable Cascade model": {"clip_txt_mapper.weight": (4, 4)},
    "a T5 text encoder": {"encoder.block.0.layer.0.SelfAttention.q.weight": (4, 4)},
    "a textual-inversion embedding": {"emb_params": (1, 768)},
    "a UNet alone": {"input_blocks.0.0.weight": (8, 4, 3, 3)},
    "a VAE alone": {"decoder.conv_in.weight": (4, 4, 3, 3), "encoder.conv_in.weight": (4, 3, 3, 3)},
    "a text encoder alone": {"text_model.encoder.layers.0.mlp.fc1.weight": (4, 4)},
    "an upscaling model": {"body.0.rdb1.conv1.weight": (4, 4, 3, 3)},
    "an unknown model": {"spam": (1,)},
    "an inpainting model": unet_of(channels=9),
    "an image-editing": unet_of(channels=8),
    "a depth-to-image model": unet_of(channels=5),
    "the SDXL refiner": unet_of(context=1280),
    "no Stable Diffusion 1, 2 or SDXL": unet_of(context=640),
}


@pytest.mark.parametrize("what", FOREIGN)
def test_other_models_are_called_by_their_name(tmp_path, what):
    path = tmp_path / "model.safetensors"
    save_file({k: torch.zeros(s) for k, s in FOREIGN[what].items()}, path)
    with pytest.raises(CheckpointError, match=what) as caught:
        load_checkpoint(path)
    assert "model.safetensors" in str(caught.value)
    assert "\n" not in str(caught.value)


def _file(header):
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw)) + raw + bytes(64)


BYTES = {
    "empty": b"",
    "a web page": b"<!DOCTYPE html><html><body>Not found</body></html>",
    "a Git LFS pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
    "a GGUF file": b"GGUF" + bytes(60),
    "a pickled checkpoint or zip archive": b"PK\x03\x04" + bytes(60),
    "a pickled checkpoint under": b"\x80\x02}q\x00." + bytes(60),
    "a JSON file": b'{"error": "Invalid username or password."}',
    "its header is damaged": struct.pack("<Q", 10**15) + b"{" + bytes(60),
    "damaged": _file({"a": {"dtype": "F32", "shape": [1], "data_offsets": ["0", "4"]}}),
    "header is damaged": _file({"a": {"dtype": "F32", "shape": [1], "data_offsets": {"a": 0}}}),
    "file: its header is damaged": _file(b"[" * 100_000),
    "not a safetensors file": struct.pack("<Q", 20) + b"x" * 60,
}


@pytest.mark.parametrize("what", BYTES)
def test_files_that_are_no_model_at_all(tmp_path, what):
    path = tmp_path / "model.safetensors"
    path.write_bytes(BYTES[what])
    with pytest.raises(CheckpointError, match=what):
        load_checkpoint(path)


def test_a_pickle_with_code_is_not_run(tmp_path):
    class Evil:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "pwned",))

    torch.save({"state_dict": Evil()}, tmp_path / "evil.ckpt")
    with pytest.raises(CheckpointError, match="without running code"):
        load_checkpoint(tmp_path / "evil.ckpt")
    assert not (tmp_path / "pwned").exists()


def test_other_endings(tmp_path):
    (tmp_path / "model.bin").write_bytes(b"x" * 100)
    with pytest.raises(CheckpointError, match=r"ends in '\.bin'"):
        load_checkpoint(tmp_path / "model.bin")


@pytest.mark.parametrize(
    ("name", "word"),
    [
        ("dreamshaperXL_v21TurboDPMSDE", "Turbo"),
        ("juggernautXL_lightning4S", "lightning"),
        ("dreamshaper_8LCM", "LCM"),
        ("Hyper-SDXL-8steps", "Hyper"),
        ("epicrealism_natural", None),
        ("hyperRealism_v30", None),
        ("helmcollection", None),
    ],
)
def test_distilled_models_are_told_by_name(name, word):
    said = distilled(name)
    assert (said is None) == (word is None)
    assert word is None or f"({word})" in said


def test_other_words_of_clips_size_are_refused(tmp_path):
    folder = clip_vocabulary(tmp_path)
    table = json.loads((folder / "vocab.json").read_text())
    table["a</w>"], table["photo</w>"] = table["photo</w>"], table["a</w>"]
    (folder / "vocab.json").write_text(json.dumps(table))
    with pytest.raises(CheckpointError, match="other words"):
        tokenizers.load_tokenizers("sd1", [folder])


def test_a_number_of_unknown_kind_is_a_sentence(tmp_path):
    header = json.dumps({"w": {"dtype": "F4", "shape": [2], "data_offsets": [0, 1]}}).encode()
    (tmp_path / "x.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + b"\0" * 9)
    with pytest.raises(CheckpointError, match="keeps 'w' as F4"):
        open_tensors(tmp_path / "x.safetensors")
