"""What ComfyUI has loaded, trained on where it is: beside the same file through our own loader."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from comfyui_models import ROOT, load_module
from safetensors.torch import load_file, save_file

from cntlora_core.config import CalibrationConfig, DataConfig, TrainConfig
from cntlora_core.data.dataset import encode_subject
from cntlora_core.data.images import find_pictures
from cntlora_core.model.conditioning import encode_prompts
from cntlora_core.model.ldm_names import attention_up_blocks, unet_name
from cntlora_core.model.loader import MINI_SD_FOLDER
from cntlora_core.model.sampling import sample_latents
from cntlora_core.run.runs import run_training

pytestmark = pytest.mark.comfyui
LONG = "a photo of a cat on a table with a red ball beside a window, " * 12

# How far rounding carries, measured: latents changed by a millionth move the start by 0.9 % on
# random weights (and the steps of init target by a third: it is compared on the same latents).
LIMITS = {"gaussian": 0.01, "domain": 0.05}


def encoded(model):
    """The pictures as it reads them. At 64 px the deepest attention would see one place alone, and
    what it asks for would be rounding."""
    pictures = find_pictures(MINI_SD_FOLDER / "subject")[:3]
    return encode_subject(model, pictures, "a sks cat", DataConfig(resolution=128, upscale=True))


def trained(model, subject, init):
    """A LoRA after two steps."""
    start = CalibrationConfig(init=init, rank=2, rank_rule="uniform", effort="quick")
    how = TrainConfig(steps=2, learning_rate=1e-3, validate_every=0)
    return run_training(model, subject, start, how).lora


def test_the_same_lora_as_from_our_own_loader(models):
    ours, (model, clip, vae) = models.ours(), models.theirs()
    before = {k: v.clone() for k, v in model.model.state_dict().items()}
    theirs = models.use(model, clip, vae)
    assert (theirs.family, theirs.resolution) == (ours.family, ours.resolution)
    torch.testing.assert_close(
        theirs.schedule.alphas_cumprod, ours.schedule.alphas_cumprod, rtol=1e-4, atol=0
    )
    subjects, loras = [], []
    for model_used in (theirs, ours):
        with model_used.at_work():
            subjects.append(encoded(model_used))
            loras.append({init: trained(model_used, subjects[-1], init) for init in LIMITS})
    subject, expected = subjects
    for name in ("mean", "std"):
        for a, b in zip(getattr(subject, name), getattr(expected, name), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(
        subject.conditioning.tokens, expected.conditioning.tokens, rtol=1e-3, atol=1e-4
    )
    for init, limit in LIMITS.items():
        # Of the whole: a layer that hardly takes part is mostly rounding.
        whole, same = (
            torch.cat([factors.delta().flatten() for _, factors in sorted(lora.items())])
            for lora in (found[init] for found in loras)
        )
        assert same.norm() > 0
        assert float((whole - same).norm() / same.norm()) < limit, init
    assert all(torch.equal(v, before[k]) for k, v in model.model.state_dict().items())


def test_with_the_same_inputs_the_target_is_the_same_to_the_bit(models):
    """What differs between the nodes is rounding, in pictures, prompts and schedule; the UNets do
    not."""
    ours = models.ours()
    theirs = replace(models.use(*models.theirs()), schedule=ours.schedule)
    subject, loras = encoded(ours), []
    for model in (theirs, ours):
        with model.at_work():
            loras.append(trained(model, subject, "target"))
    same, expected = loras
    assert same.keys() == expected.keys()
    assert any(factors.up.any() for factors in same.values())
    for name, factors in same.items():
        assert torch.equal(factors.up, expected[name].up), name
        assert torch.equal(factors.down, expected[name].down), name


def test_the_weights_are_shared_while_it_works_and_nowhere_else(models):
    model, clip, vae = models.theirs()
    used = models.use(model, clip, vae)
    host = dict(model.model.diffusion_model.named_parameters())
    assert all(w.is_meta for w in used.unet.parameters())
    attentive = attention_up_blocks(used.unet.config)
    with used.at_work():
        for name, weight in used.unet.named_parameters():
            lent = host[unet_name(name, attention_up_blocks=attentive)]
            assert weight.data_ptr() == lent.data_ptr(), name
            assert not weight.is_inference()
    assert all(w.is_meta for w in used.unet.parameters())


@pytest.mark.parametrize(
    ("models", "skip", "layer"),
    [
        ("sd1", 1, None), ("sd1", 2, -2), ("sd2", 1, None), ("sd2", 1, -2), ("sd2", 2, -3),
        ("sdxl", 1, None),
    ],
    indirect=["models"],
)  # fmt: skip
def test_prompts_are_encoded_as_comfyui_does(models, skip, layer):
    """SD 2 was trained on the last layer but one, and so has no last one here."""
    _, clip, vae = theirs = models.theirs()
    clip = clip.clone()
    if layer is not None:
        clip.clip_layer(layer)
    used = models.use(theirs[0], clip, vae)
    ours = models.ours(clip_skip=skip)
    assert used.prompts.clip_skip == (layer and skip)
    prompts = ["a cat", "", LONG[:500], LONG]
    for prompt in prompts:
        a, b = (encode_prompts(model, [prompt]) for model in (used, ours))
        assert a.tokens.shape == b.tokens.shape
        torch.testing.assert_close(a.tokens, b.tokens, rtol=1e-3, atol=1e-4)
        if a.pooled is not None:
            torch.testing.assert_close(a.pooled, b.pooled, rtol=1e-3, atol=1e-4)
    assert encode_prompts(ours, prompts).tokens.shape[1] == 77 * 6  # of 1, 2 and 3 chunks


def test_patches_on_the_model_count_and_stay_off_it(models):
    model, clip, vae = models.theirs()
    key = "diffusion_model.time_embed.0.weight"
    own = model.model.state_dict()[key].clone()
    patched = model.clone()
    with torch.inference_mode():
        patched.add_patches({key: (torch.full_like(own, 0.5),)}, 0.5, 0.25)
    used = models.use(patched, clip, vae)
    with used.at_work():
        merged = used.unet.time_embedding.linear_1.weight
        torch.testing.assert_close(merged, own * 0.25 + 0.25)
        assert merged.data_ptr() != model.model.state_dict()[key].data_ptr()
        other = used.unet.time_embedding.linear_2.weight
        assert other.data_ptr() == model.model.diffusion_model.time_embed[2].weight.data_ptr()
    assert torch.equal(model.model.state_dict()[key], own)


def test_prediction_and_schedule_are_the_models_own(models):
    from comfy_extras.nodes_model_advanced import ModelSamplingDiscrete

    model, clip, vae = models.theirs()
    (changed,) = ModelSamplingDiscrete().patch(model, "v_prediction", True)
    assert models.use(changed, clip, vae).schedule.prediction == "v + zero terminal SNR"
    for name in ("lcm", "x0"):
        (changed,) = ModelSamplingDiscrete().patch(model, name, False)
        with pytest.raises(models.refused, match="The MODEL samples by"):
            models.use(changed, clip, vae)


def test_what_cannot_be_trained_is_refused(models):
    model, clip, vae = models.theirs()
    changed = model.clone()
    changed.set_model_attn1_patch(lambda *args: args)
    with pytest.raises(models.refused, match="cannot be trained through"):
        models.use(changed, clip, vae)
    with pytest.raises(models.refused, match="There is no CLIP"):
        models.use(model, None, vae)
    wrong = models.use(model, clip, vae)
    wrong.prompts.features = 5
    with pytest.raises(models.refused, match="CLIP is of another kind"):
        wrong.prompts.encode([""], wrong.device)


def test_fp8_weights_are_taken_as_they_are(models, tmp_path):
    state = load_file(models.path)
    small = {
        k: v.to(torch.float8_e4m3fn) if k.startswith("model.") and v.ndim > 1 else v
        for k, v in state.items()
    }
    save_file(small, tmp_path / "fp8.safetensors")
    with torch.inference_mode():
        model = models.comfy.sd.load_state_dict_guess_config(
            load_file(tmp_path / "fp8.safetensors"), output_vae=False, output_clip=False,
            model_options={"dtype": torch.float8_e4m3fn},
        )[0]  # fmt: skip
    _, clip, vae = models.theirs()
    used = models.use(model, clip, vae)
    kept = model.model.diffusion_model.time_embed[0].weight
    assert kept.dtype == torch.float8_e4m3fn
    with used.at_work():
        assert torch.equal(used.unet.time_embedding.linear_1.weight, kept.float())
        assert torch.isfinite(sample_latents(used, ["a cat"], [0], steps=1, size=(64, 64))).all()


def test_pictures_are_tiled_where_memory_does_not_suffice(models, monkeypatch):
    _, _, vae = theirs = models.theirs()
    used = models.use(*theirs)
    pixels = torch.rand(1, 3, 64, 64) * 2 - 1
    mean, _ = used.pictures.encode(pixels)

    def full(*args, **kwargs):
        raise torch.OutOfMemoryError("none left")

    monkeypatch.setattr(vae.first_stage_model.encoder, "forward", full)
    monkeypatch.setattr(vae, "encode_tiled", lambda images: torch.ones(len(images), 4, 8, 8))
    tiled, std = used.pictures.encode(pixels)
    assert tiled.shape == mean.shape
    assert not std.any()


def test_pictures_are_encoded_one_at_a_time(models, monkeypatch):
    """The host makes room for one."""
    _, _, vae = theirs = models.theirs()
    used, seen = models.use(*theirs), []
    forward = vae.first_stage_model.encoder.forward
    monkeypatch.setattr(
        vae.first_stage_model.encoder,
        "forward",
        lambda x: seen.append(len(x)) or forward(x),
    )
    pixels = torch.rand(3, 3, 64, 64) * 2 - 1
    mean, std = used.pictures.encode(pixels)
    assert seen == [1, 1, 1]
    alone = used.pictures.encode(pixels[1:2])
    torch.testing.assert_close(mean[1:2], alone[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(std[1:2], alone[1], rtol=1e-4, atol=1e-5)


def test_parentheses_that_are_no_weights_are_told_once(models):
    prompts, told = models.use(*models.theirs()).prompts, []
    prompts.observer = told.append
    for text in ("a (red:1.2) cat", r"saber \(fate\)", "saber (fate)", "1girl, :(, smile"):
        prompts.encode([text], torch.device("cpu"))
    assert ["saber (fate)" in notice.text for notice in told] == [True]


@pytest.fixture(scope="module")
def full_size(comfyui):
    """SD 1.5's shapes with random weights, under the name that the template gives."""
    maker = load_module("make_checkpoint", ROOT / "benchmarks" / "make_checkpoint.py")
    name = template()["8"]["inputs"]["ckpt_name"]
    path = comfyui.base / "models/checkpoints" / name
    maker.write(path, "sd1", dtype="fp16")
    yield path
    path.unlink()


def template():
    workflow = Path(__file__).with_name("workflows") / "with_comfyui_model.json"
    return json.loads(workflow.read_text(encoding="utf-8"))


# As few passes as show that every node works.
BRIEF = {"steps": 1, "sample_every": 0, "validate_every": 0, "batch_size": 1}
PREVIEW = {"count": 1, "steps": 1, "guidance": 1.0}
PREVIEWED = """() => {
    const node = window.app.graph.nodes.find((n) => n.comfyClass === 'CNTLoRAPreviewLoRA');
    const shown = document.querySelector(`[data-node-id="${node.id}"]`)?.querySelectorAll('img');
    return (node.imgs ?? []).length + (shown?.length ?? 0) > 0;
}"""


def test_the_template_runs_on_a_model_of_full_size(comfyui, full_size):
    graph = template()
    graph["3"]["inputs"]["init"] = "gaussian"
    graph["4"]["inputs"].update(BRIEF)
    graph["6"]["inputs"].update(PREVIEW)
    result = comfyui.run(graph, 3000)
    assert result["status"]["status_str"] == "success", result["status"]
    (text,) = result["outputs"]["5"]["text"]
    assert text.startswith("Saved as my_subject")
    assert result["outputs"]["6"]["images"]
    assert "lora key not loaded" not in comfyui.text()


def test_the_template_runs_from_its_page(page, full_size):
    page.reload()  # or its lists lack the file
    page.open_example("with_comfyui_model")
    page.shorten(init="gaussian", preview=PREVIEW, **BRIEF)
    page.fit()
    page.shot("comfyui_model_before")
    page.page.get_by_role("button", name="Run", exact=True).first.click()
    page.wait_for("headline", "^Done$", 3000)
    page.wait_for("text", "6 pictures|^Saved as", 300)
    page.page.wait_for_function(PREVIEWED, timeout=600_000)
    page.page.wait_for_timeout(3000)
    page.shot("comfyui_model_after")
