"""The comparison's own arithmetic; the measuring needs other people's programs."""

import importlib.util
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"


def script(name):
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
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
    throughput = script("throughput")
    assert throughput._renumbered(original, 2) == renumbered
    assert throughput._renumbered(original, 3) == original


def test_a_process_that_fails_says_so():
    import sys

    throughput = script("throughput")
    seconds, peak = throughput.measure([sys.executable, "-c", "x = bytearray(200_000_000)"], FOLDER)
    assert seconds > 0
    assert peak > 150
    with pytest.raises(SystemExit, match="ZeroDivisionError"):
        throughput.measure([sys.executable, "-c", "1 / 0"], FOLDER)
