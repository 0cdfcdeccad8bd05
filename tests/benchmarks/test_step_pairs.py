"""Natural steps beside AdamW's, timed in turn."""

import re
import sys


def test_it_says_each_pair_and_the_median(benchmark_script, monkeypatch, capsys):
    pairs = benchmark_script("step_pairs")
    monkeypatch.setattr(sys, "argv", ["step_pairs", "--pairs", "2", "--steps", "1"])
    pairs.main()
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 3
    ratios = [float(number) for line in said for number in re.findall(r"\d+\.\d\d", line)]
    assert all(0 < ratio < 100 for ratio in ratios)
    assert said[-1].startswith("median ")
