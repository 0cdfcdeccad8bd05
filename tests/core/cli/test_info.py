"""`cntlora info --checkpoint`: what a checkpoint is, from its header."""

import json

import pytest
import torch
from safetensors.torch import save_file

from cntlora_core.cli.main import main
from cntlora_core.model.ldm_names import UNET_PREFIX
from cntlora_core.model.loader import MINI_SD_FOLDER
from cntlora_core.model.tensor_file import SafetensorsFile


def header_of_sdxl():
    inside = "input_blocks.4.1.transformer_blocks.0.attn2.to_k.weight"
    blocks = {f"{UNET_PREFIX}input_blocks.{i}.0.bias": torch.zeros(1).half() for i in range(9)}
    return blocks | {
        f"{UNET_PREFIX}input_blocks.0.0.weight": torch.zeros(8, 4, 3, 3).half(),
        f"{UNET_PREFIX}{inside}": torch.zeros(8, 2048).half(),
        "first_stage_model.decoder.conv_in.weight": torch.zeros(4, 4, 3, 3),
        "conditioner.embedders.0.transformer.text_model.embeddings.token_embedding.weight": (
            torch.zeros(2, 768).to(torch.float8_e4m3fn)
        ),
        "v_pred": torch.zeros(0),
        "ztsnr": torch.zeros(0),
    }


def test_a_file_is_described_without_its_weights(tmp_path, capsys, monkeypatch):
    path = tmp_path / "dream_lightning.safetensors"
    save_file(header_of_sdxl(), path)
    monkeypatch.setattr(SafetensorsFile, "read", lambda *a: pytest.fail("weights were read"))
    assert main(["info", "--checkpoint", str(path)]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["family"] == "sdxl"
    assert said["prediction"] == "v + zero terminal SNR"
    assert said["last_alpha_bar"] == pytest.approx(4.897e-8, rel=1e-3)
    assert said["dtypes"] == {"float16": 16681, "float8_e4m3fn": 1536, "float32": 144}
    assert said["missing"] == ["text encoder 2"]
    assert "Lightning" in said["notes"][0] or "lightning" in said["notes"][0]


def test_a_folder_and_what_is_none(tmp_path, capsys):
    assert main(["info", "--checkpoint", str(MINI_SD_FOLDER / "model")]) == 0
    said = json.loads(capsys.readouterr().out)
    assert (said["family"], said["prediction"], said["notes"]) == ("sd1", "epsilon", [])
    assert main(["info", "--checkpoint", str(tmp_path / "none")]) == 1
    assert "does not exist" in capsys.readouterr().err
