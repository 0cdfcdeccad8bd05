"""Files of every family as ComfyUI loads them and as we do, small: fixtures."""

import importlib.util
import json
import os
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from cntlora_core.model import single_file
from cntlora_core.model.loader import load_checkpoint

ROOT = Path(__file__).resolve().parents[2]


def load_module(name, path, **options):
    spec = importlib.util.spec_from_file_location(name, path, **options)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def use_host_on_cpu():
    """Makes the host's modules importable; skips where there is none."""
    if not os.environ.get("COMFYUI_PATH"):
        pytest.skip("COMFYUI_PATH is not set")
    sys.path.insert(0, os.environ["COMFYUI_PATH"])
    import comfy.cli_args

    comfy.cli_args.args.cpu = True


@pytest.fixture(scope="module")
def comfy():
    """The host's modules, on the CPU, and the pack beside them."""
    use_host_on_cpu()
    import comfy.sd
    import comfy.supported_models

    load_module("cntlora_pack", ROOT / "__init__.py", submodule_search_locations=[str(ROOT)])
    importlib.import_module("cntlora_pack.nodes")
    return comfy


def small(family, maker):
    """The family's grammar at a tenth of its width: ComfyUI's norms have 32 groups."""
    config = maker.small_config(family)
    unet, vae = config["unet"], config["vae"]
    widths = [32 * min(2**i, 4) for i in range(len(unet["block_out_channels"]))]
    unet.update(block_out_channels=widths, norm_num_groups=32)
    unet["attention_head_dim"] = {"sd1": 8, "sd2": [1, 2, 4, 4], "sdxl": [1, 1, 2]}[family]
    if family == "sdxl":  # what ComfyUI tells it by
        unet["transformer_layers_per_block"] = [1, 2, 10]
    for text in config["text_encoders"]:
        text["num_hidden_layers"] = 3
    vae.update(block_out_channels=[32, 32, 64, 64], norm_num_groups=32)
    return config


class Models:
    """One file through both loaders."""

    def __init__(self, comfy, family, folder, config, maker):
        self.comfy, self.family, self.config = comfy, family, config
        self.path = folder / f"{family}.safetensors"
        maker.write(self.path, family, dtype="fp16", config=config)
        self.nodes = sys.modules["cntlora_pack.nodes.comfyui_model"]
        # The pack brings a core of its own, as in ComfyUI.
        self.refused = sys.modules["cntlora_pack.cntlora_core.errors"].CheckpointError
        self.loaded = self.load()

    def ours(self, **options):
        tokenizer = Path(self.comfy.__path__[0], "sd1_tokenizer")
        return load_checkpoint(self.path, tokenizer=tokenizer, **options)

    def theirs(self):
        """MODEL, CLIP and VAE as a loader node gives them: the same to all, who leave no trace."""
        return self.loaded

    def load(self):
        names, unread = ("h", 1) if self.family == "sd2" else ("lg", 0)  # layers at the end
        texts = {
            f"clip_{name}_model_config": {
                "num_hidden_layers": text["num_hidden_layers"] + unread,
                "intermediate_size": text["intermediate_size"],
            }
            for name, text in zip(names, self.config["text_encoders"], strict=False)
        }
        with torch.inference_mode():
            model, clip, _, _ = self.comfy.sd.load_state_dict_guess_config(
                load_file(self.path), output_vae=False, te_model_options=texts
            )
            state = {
                k.removeprefix("first_stage_model."): v
                for k, v in load_file(self.path).items()
                if k.startswith("first_stage_model.")
            }
            blocks = {
                "double_z": True, "z_channels": 4, "resolution": 256, "in_channels": 3, "ch": 32,
                "out_ch": 3, "ch_mult": [1, 1, 2, 2], "num_res_blocks": 2, "attn_resolutions": [],
                "dropout": 0.0,
            }  # fmt: skip
            settings = {"params": {"embed_dim": 4, "ddconfig": blocks}}
            vae = self.comfy.sd.VAE(sd=state, config=settings)
        return model, clip, vae

    def use(self, model, clip, vae, dtype=torch.float32):
        return self.nodes.use_model(model, clip, vae, device=torch.device("cpu"), dtype=dtype)


@pytest.fixture(scope="module", params=["sd1", "sdxl"])
def models(request, comfy, tmp_path_factory):
    maker = load_module("make_checkpoint", ROOT / "benchmarks" / "make_checkpoint.py")
    family = request.param
    config = small(family, maker)
    kind = {"sd1": "SD15", "sd2": "SD20", "sdxl": "SDXL"}[family]
    kind = getattr(comfy.supported_models, kind)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(kind.unet_config, "model_channels", 32)
        if family == "sd2":
            patch.setitem(kind.unet_extra_config, "num_head_channels", 32)
        for module in (single_file, sys.modules["cntlora_pack.nodes.comfyui_model"]):
            patch.setattr(module, "config_of", lambda name: json.loads(json.dumps(config)))
        yield Models(comfy, family, tmp_path_factory.mktemp(family), config, maker)
