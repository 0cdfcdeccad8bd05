"""What a run plans on cards of several sizes, told as the run tells it."""

from cntlora_core.config import CalibrationConfig


def test_a_card_on_which_half_precision_does_not_fit_is_asked_again_in_eight_bits(
    benchmark_script,
):
    cards = benchmark_script("cards")
    rows = cards.table("sd1", [3, 24], CalibrationConfig(rank=16)).splitlines()[2:]
    assert [row.split(" | ")[:2] for row in rows] == [
        ["| 3 GB", "bf16"],
        ["| 3 GB", "int8"],
        ["| 24 GB", "bf16"],
    ]
    assert "too little" in rows[0]
    assert "checkpointing on, batch 1 x 2" in rows[1]
    assert "checkpointing off, batch 2 x 1" in rows[2]
