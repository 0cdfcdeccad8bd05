"""The comparison's own arithmetic; the measuring needs other people's programs."""

import importlib.util
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"


def script(name):
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    module = sys.modules[name] = importlib.util.module_from_spec(
        spec
    )  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("original", "renumbered"),
    [
        ("time_embed.0.weight", "time_embed.0.weight"),
        ("input_blocks.0.0.weight", "input_blocks.0.0.weight"),
        ("input_blocks.1.0.x", "input_blocks.1.0.x"),
        ("input_blocks.3.0.op.x", "input_blocks.2.0.op.x"),
        ("input_blocks.4.1.x", "input_blocks.3.1.x"),
        ("output_blocks.2.1.conv.x", "output_blocks.1.1.conv.x"),
        ("output_blocks.4.0.x", "output_blocks.3.0.x"),
    ],
)
def test_two_blocks_a_level_are_renumbered(original, renumbered):
    comfyui = script("comfyui_training")
    assert comfyui._renumbered(original, 2) == renumbered
    assert comfyui._renumbered(original, 3) == original


def test_a_process_that_fails_says_so():
    throughput = script("throughput")
    process = throughput.measure([sys.executable, "-c", "x = bytearray(200_000_000)"], FOLDER)
    assert process.seconds > 0
    assert process.peak_mib > 150
    with pytest.raises(SystemExit, match="ZeroDivisionError"):
        throughput.measure([sys.executable, "-c", "1 / 0"], FOLDER)


def test_a_summary_compares_pair_by_pair():
    throughput = script("throughput")
    ours = [
        throughput.Result(1.0, 2.0, 100.0),
        throughput.Result(2.0, 2.0, 100.0),
        throughput.Result(4.0, 2.0, 100.0),
    ]
    theirs = [
        throughput.Result(2.0, 4.0, 200.0),
        throughput.Result(3.0, 4.0, 200.0),
        throughput.Result(8.0, 4.0, 400.0),
    ]
    summary = throughput._summary(ours, theirs)
    assert summary["ours_is_faster"] == 2.0
    assert summary["ours_takes_processor_time"] == 0.5
    assert summary["ours_takes_memory"] == 0.5
    assert summary["steps_per_second"] == round(1 / 3, 3)


def test_the_script_gets_whole_batches(tmp_path):
    throughput = script("throughput")
    throughput.copy_pictures(tmp_path / "pictures", 4)
    assert len(list((tmp_path / "pictures").iterdir())) % 4 == 0
