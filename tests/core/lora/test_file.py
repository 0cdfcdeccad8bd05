import os
import stat

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from cntlora_core.errors import LoRAFileError, OutputError
from cntlora_core.lora.adapter import Factors
from cntlora_core.lora.file import (
    from_state_dict,
    kohya_name,
    load_lora,
    read_lora,
    save_lora,
    to_state_dict,
)
from cntlora_core.lora.targets import Projection, find_projections

PROJECTIONS = [
    Projection("down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q", 6, 5, "a"),
    Projection("mid_block.attentions.0.transformer_blocks.1.attn2.to_out.0", 4, 7, "b"),
]


def make(ranks=(2, 3), seed=0):
    g = torch.Generator().manual_seed(seed)
    return {
        p.name: Factors(
            torch.randn(p.out_features, r, generator=g), torch.randn(r, p.in_features, generator=g)
        )
        for p, r in zip(PROJECTIONS, ranks, strict=True)
    }


@settings(deadline=None)
@given(
    st.integers(1, 4),
    st.integers(1, 4),
    st.integers(0, 2**31),
    st.sampled_from(["sd1", "sd2", "sdxl"]),
)
def test_round_trip(tmp_path_factory, first, second, seed, family):
    path = tmp_path_factory.mktemp("lora") / "x.safetensors"
    lora = make((first, second), seed)
    save_lora(path, lora, family, {"a": "ü"})
    loaded, metadata = load_lora(path, PROJECTIONS, family)
    assert metadata["a"] == "ü"
    for name, factors in lora.items():
        torch.testing.assert_close(loaded[name].delta(), factors.delta(), rtol=1e-6, atol=1e-6)
        assert loaded[name].rank == factors.rank


def test_key_names():
    q, out = (p.name for p in PROJECTIONS)
    assert (
        kohya_name(q, "sd1")
        == "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q"
    )
    assert kohya_name(q, "sdxl") == "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q"
    assert kohya_name(out, "sdxl") == "lora_unet_middle_block_1_transformer_blocks_1_attn2_to_out_0"
    up = "up_blocks.0.attentions.2.transformer_blocks.9.attn2.to_v"
    assert kohya_name(up, "sdxl") == "lora_unet_output_blocks_2_1_transformer_blocks_9_attn2_to_v"


def test_three_tensors_a_module_and_one_alpha():
    """diffusers applies the most common alpha to every attention module: they must not differ."""
    for ranks, alpha in (((3, 3), 3.0), ((1, 4), 2.0)):
        lora = make(ranks)
        state = to_state_dict(lora, "sd1")
        assert len(state) == 6
        alphas = [v for k, v in state.items() if k.endswith(".alpha")]
        assert all(v.shape == () and v.dtype == torch.float32 and float(v) == alpha for v in alphas)
        key = kohya_name(PROJECTIONS[0].name, "sd1")
        up, down = state[f"{key}.lora_up.weight"], state[f"{key}.lora_down.weight"]
        torch.testing.assert_close(alpha / ranks[0] * up @ down, lora[PROJECTIONS[0].name].delta())


def test_alpha_of_others_is_folded_in():
    state = to_state_dict(make(), "sd1")
    halved = {k: v / 2 if k.endswith("alpha") else v for k, v in state.items()}
    name = PROJECTIONS[0].name
    torch.testing.assert_close(
        from_state_dict(halved, PROJECTIONS, "sd1")[name].delta(), make()[name].delta() / 2
    )


def test_equal_content_gives_equal_bytes(tmp_path):
    metadata = {f"k{i}": str(i) for i in range(40)}
    save_lora(tmp_path / "a.safetensors", make(), "sd1", metadata)
    save_lora(tmp_path / "b.safetensors", make(), "sd1", dict(reversed(metadata.items())))
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


def test_nothing_is_overwritten_silently(tmp_path):
    path = save_lora(tmp_path / "a.safetensors", make(), "sd1", {})
    before = path.read_bytes()
    with pytest.raises(OutputError, match="exists"):
        save_lora(path, make(seed=1), "sd1", {})
    assert path.read_bytes() == before
    save_lora(path, make(seed=1), "sd1", {}, overwrite=True)
    assert path.read_bytes() != before
    assert os.listdir(tmp_path) == ["a.safetensors"]


def test_a_failed_write_leaves_no_trace(tmp_path, monkeypatch):
    def no_space(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", no_space)
    with pytest.raises(OutputError, match="No space left"):
        save_lora(tmp_path / "a.safetensors", make(), "sd1", {})
    assert os.listdir(tmp_path) == []


def test_weights_that_are_not_finite_are_not_written(tmp_path):
    lora = make()
    lora[PROJECTIONS[0].name].up[0, 0] = float("inf")
    with pytest.raises(LoRAFileError, match="not finite"):
        save_lora(tmp_path / "a.safetensors", lora, "sd1", {})
    big = {PROJECTIONS[0].name: Factors(torch.full((5, 1), 1e6), torch.ones(1, 6))}
    with pytest.raises(LoRAFileError, match="float16"):
        save_lora(tmp_path / "a.safetensors", big, "sd1", {}, dtype=torch.float16)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("missing/a.safetensors", "does not exist"),
        ("a.txt", "must end in"),
        ("folder.safetensors", "is a folder"),
    ],
)
def test_unusable_outputs(tmp_path, name, words):
    (tmp_path / "folder.safetensors").mkdir()
    with pytest.raises(OutputError, match=words):
        save_lora(tmp_path / name, make(), "sd1", {})


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="permissions do not bind here")
def test_a_read_only_folder_is_found_before_the_work(tmp_path):
    tmp_path.chmod(stat.S_IRUSR | stat.S_IXUSR)
    with pytest.raises(OutputError, match="not writable"):
        save_lora(tmp_path / "a.safetensors", make(), "sd1", {})


def test_files_that_are_no_lora_of_this_model(tmp_path):
    other = tmp_path / "other.safetensors"
    save_file({"first_stage_model.x": torch.ones(1)}, other)
    with pytest.raises(LoRAFileError, match=r"first_stage_model\.x"):
        load_lora(other, PROJECTIONS, "sd1")
    (tmp_path / "page.safetensors").write_text("<html></html>")
    with pytest.raises(LoRAFileError, match="not a readable safetensors"):
        read_lora(tmp_path / "page.safetensors")
    with pytest.raises(LoRAFileError, match="does not exist"):
        read_lora(tmp_path / "none.safetensors")
    wide = to_state_dict(make(), "sd1")
    key = next(k for k in wide if k.endswith("lora_down.weight"))
    wide[key] = torch.ones(2, 99)
    with pytest.raises(LoRAFileError, match="another model"):
        from_state_dict(wide, PROJECTIONS, "sd1")
    del wide[key]
    with pytest.raises(LoRAFileError, match="one half"):
        from_state_dict(wide, PROJECTIONS, "sd1")


def test_peft_reads_it_as_we_do(tmp_path, mini_sd):
    """diffusers' own loader maps every key, and the fused weights are W + up @ down."""
    pytest.importorskip("peft")
    from diffusers import StableDiffusionPipeline

    projections = find_projections(mini_sd.unet)
    g = torch.Generator().manual_seed(0)
    lora = {
        p.name: Factors(
            torch.randn(p.out_features, r, generator=g), torch.randn(r, p.in_features, generator=g)
        )
        for r, p in zip([1, 2, 3, 4] * 14, projections, strict=True)
    }
    path = save_lora(tmp_path / "a.safetensors", lora, "sd1", {})
    from cntlora_core.model.loader import MINI_SD_FOLDER

    pipe = StableDiffusionPipeline.from_pretrained(MINI_SD_FOLDER / "model", local_files_only=True)
    pipe.load_lora_weights(str(tmp_path), weight_name=path.name)
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    for p in projections:
        base = mini_sd.unet.get_submodule(p.name).weight
        fused = pipe.unet.get_submodule(p.name).weight
        torch.testing.assert_close(fused, base + lora[p.name].delta(), rtol=1e-4, atol=1e-4)


def foreign(**more):
    state = to_state_dict(make(), "sd1")
    key = kohya_name(PROJECTIONS[0].name, "sd1")
    return state, key, {name.replace("KEY", key): value for name, value in more.items()}


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("lora_down.weight", torch.ones(0, 6), "has shapes"),
        ("lora_down.weight", torch.tensor(1.0), "has shapes"),
        ("alpha", torch.ones(3), "holds 3 values, where a LoRA has one"),
        ("alpha", torch.tensor(float("nan")), "alpha' holds NaN or infinite"),
        ("lora_up.weight", torch.full((5, 2), float("inf")), "lora_up.weight' holds NaN"),
    ],
)
def test_strange_files_are_a_sentence(name, value, words):
    state, key, _ = foreign()
    with pytest.raises(LoRAFileError, match=words):
        from_state_dict(state | {f"{key}.{name}": value}, PROJECTIONS, "sd1")


def test_a_layer_of_rank_0_is_a_sentence():
    state, key, _ = foreign()
    empty = {f"{key}.lora_down.weight": torch.ones(0, 6), f"{key}.lora_up.weight": torch.ones(5, 0)}
    with pytest.raises(LoRAFileError, match="has rank 0"):
        from_state_dict(state | empty, PROJECTIONS, "sd1")


def test_an_alpha_of_one_value_is_an_alpha():
    state, key, _ = foreign()
    alpha = state[f"{key}.alpha"]
    read = from_state_dict(state | {f"{key}.alpha": alpha.reshape(1)}, PROJECTIONS, "sd1")
    assert torch.equal(
        read[PROJECTIONS[0].name].up,
        from_state_dict(state, PROJECTIONS, "sd1")[PROJECTIONS[0].name].up,
    )


@pytest.mark.parametrize(
    ("key", "words"),
    [
        ("lora_te_text_model_encoder_layers_0_mlp_fc1.lora_up.weight", "--continue-shared"),
        ("lora_unet_mid_block_attentions_0_proj_in.lora_up.weight", "--continue-shared"),
        ("KEY.dora_scale", "It is a DoRA"),
        ("KEY.hada_w1_a", "It is a LoHa"),
        ("KEY.lokr_w1", "It is a LoKr"),
    ],
)
def test_a_foreign_lora_gets_a_next_step(key, words):
    state, _, more = foreign(**{key: torch.ones(2, 2)})
    with pytest.raises(LoRAFileError, match=words):
        from_state_dict(state | more, PROJECTIONS, "sd1")


def test_the_shared_layers_of_a_foreign_lora_can_be_trained_on():
    state, _, more = foreign(lora_te_x=torch.ones(2))
    shared = from_state_dict(state | more, PROJECTIONS, "sd1", shared=True)
    assert set(shared) == {p.name for p in PROJECTIONS}
    with pytest.raises(LoRAFileError, match="choose another"):  # nothing is shared
        from_state_dict(more, PROJECTIONS, "sd1", shared=True)
    _, _, dora = foreign(**{"KEY.dora_scale": torch.ones(2)})
    with pytest.raises(LoRAFileError, match="DoRA"):
        from_state_dict(state | dora, PROJECTIONS, "sd1", shared=True)
