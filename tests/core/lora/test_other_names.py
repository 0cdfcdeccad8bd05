"""The same LoRA in the names of each trainer is read as the same factors."""

import json

import pytest
import torch
from peft.utils.other import get_pattern_key
from safetensors.torch import save_file
from torch.nn import functional as F

from cntlora_core.errors import LoRAFileError
from cntlora_core.events import Notice
from cntlora_core.lora.adapter import Factors
from cntlora_core.lora.continuing import continued_lora
from cntlora_core.lora.file import load_lora, to_state_dict
from cntlora_core.lora.summary import inspect_file
from cntlora_core.lora.targets import Projection, find_projections
from cntlora_core.model.convolution import Convolution

BLOCK = "down_blocks.1.attentions.0.transformer_blocks.0"
LAYERS = ("attn1.to_q", "attn2.to_out.0", "ff.net.0.proj", "ff.net.2")
NAMES = [f"{BLOCK}.{layer}" for layer in LAYERS]
PROJECTIONS = [Projection(name, 8, 6, name) for name in NAMES]


@pytest.fixture
def lora():
    noise = torch.Generator().manual_seed(0)
    return {
        name: Factors(torch.randn(6, 2, generator=noise), torch.randn(2, 8, generator=noise))
        for name in NAMES
    }


def processors(name):
    """As diffusers named them before its LoRA layers: attention alone."""
    path, _, last = name.removesuffix(".0").rpartition(".")
    return f"unet.{path}.processor.{last}_lora"


FORMS = {
    "peft": lambda n: tuple(f"base_model.model.{n}.lora_{half}.weight" for half in "AB"),
    "diffusers": lambda n: (f"unet.{n}.lora_A.weight", f"unet.{n}.lora_B.weight"),
    "diffusers before": lambda n: (f"unet.{n}.lora.down.weight", f"unet.{n}.lora.up.weight"),
    "processors": lambda n: (f"{processors(n)}.down.weight", f"{processors(n)}.up.weight"),
    "kohya by diffusers' paths": lambda n: tuple(
        f"lora_unet_{n.replace('.', '_')}.lora_{half}.weight" for half in ("down", "up")
    ),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_every_form_is_the_same_lora(lora, tmp_path, form, family):
    if form == "processors":
        lora = {n: f for n, f in lora.items() if ".attn" in n}
    state = {}
    for name, factors in lora.items():
        down, up = FORMS[form](name)
        state |= {down: factors.down, up: factors.up}
    save_file(state, tmp_path / "x.safetensors")
    read, _ = load_lora(tmp_path / "x.safetensors", PROJECTIONS, family)
    assert set(read) == set(lora)
    for name, factors in lora.items():
        torch.testing.assert_close(read[name].up @ read[name].down, factors.up @ factors.down)


def halves(lora):
    return {
        key: tensor
        for n, f in lora.items()
        for key, tensor in zip(FORMS["diffusers"](n), (f.down, f.up), strict=True)
    }


def test_alpha_is_read_where_each_writes_it(lora, tmp_path):
    said = {"unet.r": 2, "unet.lora_alpha": 1, "unet.alpha_pattern": {"attn1.to_q": 6}}
    metadata = {"lora_adapter_metadata": json.dumps(said)}
    save_file(halves(lora), tmp_path / "x.safetensors", metadata)
    read, _ = load_lora(tmp_path / "x.safetensors", PROJECTIONS, "sd1")
    peft = {k.replace("unet.", "base_model.model."): v for k, v in halves(lora).items()}
    save_file(peft, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text('{"r": 2, "lora_alpha": 8}')
    beside, _ = load_lora(tmp_path / "adapter_model.safetensors", PROJECTIONS, "sd1")
    for name, factors in lora.items():
        torch.testing.assert_close(read[name].up, factors.up * (3 if "to_q" in name else 0.5))
        torch.testing.assert_close(beside[name].up, factors.up * 4)


def test_a_rank_stabilised_lora_is_as_strong_as_in_peft(lora, tmp_path):
    said = {"unet.lora_alpha": 8, "unet.use_rslora": True}
    metadata = {"lora_adapter_metadata": json.dumps(said)}
    save_file(halves(lora), tmp_path / "x.safetensors", metadata)
    read, _ = load_lora(tmp_path / "x.safetensors", PROJECTIONS, "sd1")
    for name, factors in lora.items():
        torch.testing.assert_close(read[name].up, factors.up * 8 / factors.rank**0.5)


@pytest.mark.parametrize(
    "pattern",
    [
        "to_q",
        "attn1.to_q",
        r"attn1\.to_q",
        r"^down_blocks.*\.to_q$",
        "^up_blocks.*",
        "transformer_blocks.0.attn1",
        ".*to_k",
        "^to_q",
        "o_q",
    ],
)
def test_patterns_of_layers_are_pefts(lora, tmp_path, pattern):
    said = {"unet.lora_alpha": 2, "unet.alpha_pattern": {pattern: 12}}
    metadata = {"lora_adapter_metadata": json.dumps(said)}
    save_file(halves(lora), tmp_path / "x.safetensors", metadata)
    read, _ = load_lora(tmp_path / "x.safetensors", PROJECTIONS, "sd1")
    for name, factors in lora.items():
        alpha = 12 if get_pattern_key([pattern], name) == pattern else 2
        torch.testing.assert_close(read[name].up, factors.up * alpha / factors.rank)


@pytest.mark.parametrize("pattern", ["(a+)+$", "to_(q|k)", ".*.*.*.*x", "[a-z]*"])
def test_patterns_that_are_not_understood_are_refused(lora, tmp_path, pattern):
    """No stranger's regular expression is run: some never end."""
    metadata = {"lora_adapter_metadata": json.dumps({"unet.alpha_pattern": {pattern: 12}})}
    save_file(halves(lora), tmp_path / "x.safetensors", metadata)
    with pytest.raises(LoRAFileError, match="is not understood"):
        load_lora(tmp_path / "x.safetensors", PROJECTIONS, "sd1")


def test_a_json_that_is_none_says_nothing(lora, tmp_path):
    for text in ("no", "[1]", '{"unet.lora_alpha": "x", "unet.alpha_pattern": 3}', "[" * 9999):
        save_file(halves(lora), tmp_path / "x.safetensors", {"lora_adapter_metadata": text})
        read, _ = load_lora(tmp_path / "x.safetensors", PROJECTIONS, "sd1")
        assert torch.equal(read[NAMES[0]].up, lora[NAMES[0]].up)


def test_other_layers_are_refused_or_left_out_and_told(lora, tmp_path):
    path = tmp_path / "x.safetensors"
    encoder = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_A.weight"
    save_file(halves(lora) | {encoder: torch.ones(2, 8)}, path)
    with pytest.raises(LoRAFileError, match=r"1 of 9 tensors do not belong.*continue_shared"):
        load_lora(path, PROJECTIONS, "sd1")
    said = []
    read, _ = load_lora(path, PROJECTIONS, "sd1", shared=True, observer=said.append)
    assert len(read) == 4
    (notice,) = said
    assert isinstance(notice, Notice)
    assert notice.text == (
        f"1 of 9 tensors of 'x.safetensors' are of layers that CNTLoRA does not train, e.g. "
        f"'{encoder}': they are left out, and what they did is lost."
    )
    save_file({"base_model.model.x.lora_magnitude_vector": torch.ones(2)}, path)
    with pytest.raises(LoRAFileError, match="a DoRA"):
        load_lora(path, PROJECTIONS, "sd1", shared=True)


@pytest.mark.parametrize(
    ("said", "init"), [("target", "target"), ("", "gaussian"), ("x", "gaussian")]
)
def test_the_rate_goes_by_where_the_lora_came_from(mini_sd, tmp_path, said, init):
    name = find_projections(mini_sd.unet)[0].name
    layer = mini_sd.unet.get_submodule(name)
    ours = {name: Factors(torch.ones(layer.out_features, 1), torch.ones(1, layer.in_features))}
    path = tmp_path / "cat.safetensors"
    save_file(to_state_dict(ours, "sd1"), path, {"cntlora.init": said} if said else None)
    found = continued_lora(path, mini_sd)
    assert found.init == init
    again = {"cntlora.init": "continued", "cntlora.origin": said}  # it was continued before
    save_file(to_state_dict(ours, "sd1"), path, again)
    assert continued_lora(path, mini_sd).init == init
    assert (found.source.file, len(found.source.sha256)) == ("cat.safetensors", 64)
    assert list(found.lora) == [name]


def test_parted_convolutions_are_one(tmp_path):
    """LyCORIS' Tucker form: three convolutions in a row do what the two that are read do."""
    g = torch.Generator().manual_seed(0)
    name = "down_blocks.0.resnets.0.conv1"
    p = Projection(name, 9 * 5, 6, name, convolution=Convolution((3, 3), (1, 1), (1, 1)))
    down, mid, up = (
        torch.randn(*shape, generator=g) for shape in ((2, 5, 1, 1), (2, 2, 3, 3), (6, 2, 1, 1))
    )
    key = f"lora_unet_{name.replace('.', '_')}"
    state = {
        f"{key}.lora_{n}.weight": t
        for n, t in zip(("down", "mid", "up"), (down, mid, up), strict=True)
    }
    path = tmp_path / "x.safetensors"
    save_file(state | {f"{key}.alpha": torch.tensor(1.0)}, path)
    (factors,) = load_lora(path, [p], "sd1")[0].values()
    x = torch.randn(1, 5, 8, 8, generator=g)
    in_a_row = F.conv2d(F.conv2d(F.conv2d(x, down), mid, padding=1), up) / 2
    kernel = factors.delta().view(6, 5, 3, 3)
    torch.testing.assert_close(F.conv2d(x, kernel, padding=1), in_a_row, rtol=1e-4, atol=1e-4)
    (row,) = inspect_file(path)["ranks"].values()
    assert row["in"] == 45
    assert row["norm"] == pytest.approx(float(kernel.norm()), rel=1e-4)
    state[f"{key}.lora_mid.weight"] = mid[:, :1].contiguous()
    save_file(state, path)
    with pytest.raises(LoRAFileError):
        load_lora(path, [p], "sd1")
