"""What a checkpoint predicts: its markers, its metadata, the user's word, and what follows from
them."""

import pytest
import torch
from safetensors.torch import save_file

from cntlora_core.errors import CheckpointError, SettingError
from cntlora_core.model.families import detect_family
from cntlora_core.model.ldm_names import UNET_PREFIX
from cntlora_core.model.loader import load_checkpoint
from cntlora_core.model.noise_schedule import ZERO_SNR_END, NoiseSchedule
from cntlora_core.model.prediction import (
    AUTO,
    EPSILON,
    PREDICTIONS,
    V_MARKS,
    V_ZERO_SNR,
    V,
    detect_prediction,
    scheduler_keys,
)
from cntlora_core.model.tensor_file import open_tensors

CONTEXT = {"sd1": 768, "sd2": 1024, "sdxl": 2048}
MARK = torch.zeros(0)


def write(path, family, extra=(), metadata=None):
    state = {
        f"{UNET_PREFIX}input_blocks.0.0.weight": torch.zeros(8, 4, 3, 3),
        f"{UNET_PREFIX}input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight": torch.zeros(
            8, CONTEXT[family]
        ),
    }
    save_file(state | dict(extra), path, metadata)
    return open_tensors(path)


@pytest.mark.parametrize("family", CONTEXT)
@pytest.mark.parametrize(
    ("extra", "metadata", "expected"),
    [
        ({}, None, EPSILON),
        ({"v_pred": MARK}, None, V),
        ({"v_pred": MARK, "ztsnr": MARK}, None, V_ZERO_SNR),
        ({f"{UNET_PREFIX}v_pred": MARK}, None, V),
        ({}, {"modelspec.prediction_type": "v"}, V),
        ({}, {"modelspec.prediction_type": "epsilon"}, EPSILON),
        ({"v_pred": MARK}, {"modelspec.prediction_type": "epsilon"}, V),
        ({"ztsnr": MARK}, None, EPSILON),
    ],
)
def test_markers_count_before_metadata(tmp_path, family, extra, metadata, expected):
    source = write(tmp_path / "x.safetensors", family, extra, metadata)
    assert detect_family(source) == family
    assert detect_prediction(source, family) == expected
    for asked in PREDICTIONS[1:]:
        assert detect_prediction(source, family, asked) == asked


@pytest.mark.parametrize(
    ("mark", "what"), [("edm_mean", "Playground"), ("edm_vpred.sigma_max", "CosXL")]
)
@pytest.mark.parametrize("asked", [AUTO, V])
def test_continuous_noise_levels_are_refused_by_name(tmp_path, mark, what, asked):
    source = write(tmp_path / "x.safetensors", "sdxl", {mark: torch.ones(1)})
    with pytest.raises(CheckpointError, match=what):
        detect_prediction(source, "sdxl", asked)


@pytest.mark.parametrize(
    ("family", "metadata", "asked", "told"),
    [
        ("sdxl", "v", AUTO, True),
        ("sdxl", "epsilon", AUTO, False),
        ("sdxl", "v", V, False),
        ("sd2", "v", AUTO, False),
    ],
)
def test_v_of_sdxl_without_a_word_on_its_schedule_is_told(tmp_path, family, metadata, asked, told):
    """Most of them end without any signal, which a marker tensor says and metadata do not."""
    words = {"modelspec.prediction_type": metadata}
    source, notices = write(tmp_path / "x.safetensors", family, metadata=words), []
    detect_prediction(source, family, asked, notices.append)
    assert [V_ZERO_SNR in notice.text for notice in notices] == [True] * told


def test_an_unknown_word_in_the_metadata_is_refused(tmp_path):
    source = write(
        tmp_path / "x.safetensors", "sdxl", metadata={"modelspec.prediction_type": "flow"}
    )
    with pytest.raises(CheckpointError, match="'flow'"):
        detect_prediction(source, "sdxl")
    assert detect_prediction(source, "sdxl", V) == V


@pytest.mark.parametrize("name", ["noobaiXL_vPred10", "myMerge-v-pred", "x_VPRED_fp16"])
def test_a_name_is_a_hint_and_no_more(tmp_path, name):
    said = []
    source = write(tmp_path / f"{name}.safetensors", "sdxl")
    assert detect_prediction(source, "sdxl", AUTO, said.append) == EPSILON
    assert "set prediction" in said[0].text
    detect_prediction(source, "sdxl", EPSILON, said.append)
    marked = write(tmp_path / f"{name}.safetensors", "sdxl", {"v_pred": MARK})
    detect_prediction(marked, "sdxl", AUTO, said.append)
    assert len(said) == 1


def test_sd2_is_told_by_a_statistic_where_nothing_is_said(tmp_path):
    for spread, expected in ((0.02, EPSILON), (0.2, V)):
        mark = torch.randn(320, generator=torch.Generator().manual_seed(0)) * spread
        assert f"{UNET_PREFIX}output_blocks.11.1.transformer_blocks.0.norm1.bias" in V_MARKS
        for name in V_MARKS:  # of a whole file, of a UNet's in both kinds of names, of averages
            source = write(tmp_path / "x.safetensors", "sd2", {name: mark})
            assert detect_prediction(source, "sd2") == expected
            assert detect_prediction(source, "sd2", EPSILON) == EPSILON


def test_an_unknown_wish_is_a_sentence():
    with pytest.raises(SettingError, match="'auto', 'epsilon', 'v', 'v \\+ zero terminal SNR'"):
        load_checkpoint("mini-sd", prediction="v_prediction")


def test_the_wish_reaches_folders_too():
    model = load_checkpoint("mini-sd", prediction=V_ZERO_SNR)
    assert model.schedule.prediction == V_ZERO_SNR
    assert model.scheduler_config["prediction_type"] == "v_prediction"
    assert load_checkpoint("mini-sd").schedule.prediction == EPSILON


def test_zero_terminal_snr_rescales_as_lin_et_al_and_ends_above_zero():
    from diffusers.schedulers.scheduling_ddim import rescale_zero_terminal_snr

    plain = NoiseSchedule.from_config({})
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    theirs = torch.cumprod(1 - rescale_zero_terminal_snr(betas), 0)
    ours = NoiseSchedule.from_config(scheduler_keys(V_ZERO_SNR))
    torch.testing.assert_close(
        ours.alphas_cumprod[:-1].double(), theirs[:-1], rtol=1e-5, atol=1e-12
    )
    assert float(ours.alphas_cumprod[-1]) == pytest.approx(ZERO_SNR_END)
    assert ours.zero_terminal_snr
    assert not plain.zero_terminal_snr
    weights = ours.min_snr_weight(torch.arange(1000), 5.0)
    assert torch.isfinite(weights).all()
    assert float(weights[-1]) == pytest.approx(ZERO_SNR_END, rel=1e-3)
    x, noise = torch.randn(1, 4, 2, 2), torch.randn(1, 4, 2, 2)
    last = torch.tensor([999])
    torch.testing.assert_close(ours.add_noise(x, noise, last), noise, rtol=0, atol=2e-3)
    torch.testing.assert_close(ours.target(x, noise, last), -x, rtol=0, atol=2e-3)
