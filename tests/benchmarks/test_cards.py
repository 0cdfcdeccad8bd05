"""What a run plans on cards of several sizes, told as the run tells it."""

import importlib.util
import sys
from pathlib import Path

from cntlora_core.config import CalibrationConfig

PATH = Path(__file__).resolve().parents[2] / "benchmarks/cards.py"


def test_a_card_on_which_half_precision_does_not_fit_is_asked_again_in_eight_bits():
    spec = importlib.util.spec_from_file_location("cards", PATH)
    cards = sys.modules["cards"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(cards)
    rows = cards.table("sd1", [3, 24], CalibrationConfig(rank=16)).splitlines()[2:]
    assert [row.split(" | ")[:2] for row in rows] == [
        ["| 3 GB", "bf16"],
        ["| 3 GB", "int8"],
        ["| 24 GB", "bf16"],
    ]
    assert "too little" in rows[0]
    assert "checkpointing on, batch 2 x 1" in rows[1]
    assert "checkpointing off, batch 2 x 1" in rows[2]
