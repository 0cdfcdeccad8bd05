"""Counts from shapes, of a UNet small enough to take a moment."""

import importlib.util
import sys
from pathlib import Path

import pytest
from small_unet import SMALL_UNET


@pytest.fixture(scope="module")
def counts():
    path = Path(__file__).resolve().parents[2] / "benchmarks/counts.py"
    spec = importlib.util.spec_from_file_location("counts", path)
    module = sys.modules["counts"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_step_is_a_pass_and_what_comes_back(counts):
    forward, adamw, fresh, kept, sweep, solved = counts.phases(SMALL_UNET, side=16)
    # frozen weights want no gradients, and nothing before the first adapter does
    assert 1.5 * forward.tflop < adamw.tflop < 3 * forward.tflop
    assert adamw.tflop <= kept.tflop < fresh.tflop
    assert 1.5 * forward.tflop < sweep.tflop
    assert adamw.kernels < kept.kernels < fresh.kernels
    assert adamw.waits == kept.waits == fresh.waits == 1
    assert sweep.to_host_mb == 0
    assert 0 < solved.to_host_mb < 5  # small matrices, what terms are worth, the LoRA
    assert solved.waits < solved.kernels / 20
    assert sweep.kernels < fresh.kernels < 3 * adamw.kernels
    large, small = adamw.seconds  # so small a step is as long as its launches
    assert large == small == pytest.approx(adamw.kernels * 6e-6)
    table = counts.table("sd1", [forward, adamw])
    assert table.count("\n") == 3
    assert f"| {adamw.kernels} |" in table
    quick, balanced, thorough = counts.lengths(
        [forward, adamw, fresh, kept, sweep, solved]
    ).splitlines()
    steps = [float(line.split()[1]) for line in (quick, balanced, thorough)]
    assert 12 < steps[0] < steps[1] < steps[2]


def test_checkpointing_computes_the_pass_twice_and_holds_less(counts):
    forward, plain, *_ = counts.phases(SMALL_UNET, side=16)
    _, again, *_ = counts.phases(SMALL_UNET, side=16, gradient_checkpointing=True)
    assert again.tflop == pytest.approx(plain.tflop + forward.tflop, rel=0.15)
    assert again.held_gb < plain.held_gb


def test_a_natural_step_launches_as_many_kernels_whatever_the_ranks(counts, monkeypatch):
    *_, equal, _, _ = counts.phases(SMALL_UNET, side=16)
    of_rank = counts.meta_lora

    def unequal(projections, _):
        each = [of_rank([p], 1 + i % 7) for i, p in enumerate(projections)]
        return {name: own for lora in each for name, own in lora.items()}

    monkeypatch.setattr(counts, "meta_lora", unequal)
    *_, kept, _, _ = counts.phases(SMALL_UNET, side=16)
    assert kept.kernels == equal.kernels
