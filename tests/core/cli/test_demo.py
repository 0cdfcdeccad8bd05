import json
from functools import partial

from PIL import Image

from cntlora_core.cli import demo
from cntlora_core.config import CalibrationConfig, TrainConfig
from cntlora_core.model.sampling import sample


def test_the_demo_draws_and_reports(tmp_path, monkeypatch):
    """The whole demo, with fewer steps: every file is written and the calibrated start beats the
    base."""
    monkeypatch.setattr(
        demo, "TRAINING", TrainConfig(steps=4, learning_rate=3e-3, validate_every=2)
    )
    monkeypatch.setattr(demo, "CALIBRATION", CalibrationConfig(effort="quick"))
    monkeypatch.setattr(demo, "sample", partial(sample, steps=4))
    result = demo.run_demo(tmp_path / "new" / "folder")
    folder = tmp_path / "new" / "folder"
    assert {p.name for p in folder.iterdir()} == {
        "lora.safetensors",
        "samples.png",
        "ranks.png",
        "loss.png",
        "events.jsonl",
    }
    assert {
        "lora",
        "base_loss",
        "step0_loss",
        "final_loss",
        "gaussian_final_loss",
        "seconds",
    } <= set(result)
    assert result["step0_loss"] < result["base_loss"]
    for name in ("samples", "ranks", "loss"):
        assert min(Image.open(folder / f"{name}.png").size) > 200
    last = json.loads((folder / "events.jsonl").read_text().splitlines()[-1])
    assert last == {"type": "done", "result": result}
