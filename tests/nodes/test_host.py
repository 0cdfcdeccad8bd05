"""What `nodes/host.py` makes of the host: where our nodes stand, which folders are offered."""

import sys
from functools import partial
from types import SimpleNamespace

import pytest
import torch


@pytest.mark.parametrize("core", [None, "training", "model/training"])
def test_our_nodes_stand_beside_the_hosts_training(pack, monkeypatch, core):
    known = {"TrainLoraNode": SimpleNamespace(CATEGORY=core)} if core else {}
    monkeypatch.setitem(sys.modules, "nodes", SimpleNamespace(NODE_CLASS_MAPPINGS=known))
    assert pack.CalibrateLoRA.define_schema().category == f"{core or 'training'}/CNTLoRA"


def test_comfyuis_own_folders_are_not_offered(pack):
    (pack.base / "input/mine").mkdir()
    (pack.base / "input/3d").mkdir()
    assert "mine" in pack.host.input_subfolders()
    assert "3d" not in pack.host.input_subfolders()


@pytest.mark.parametrize(
    ("page", "folder"),
    [
        (None, "12_5"),
        ({"workflow": {"id": "1a-2b"}}, "1a-2b-12_5"),
        ({"workflow": {"id": "../../etc"}}, "______etc-12_5"),
        ({"workflow": {}}, "12_5"),
        ({"workflow": ["strange"]}, "12_5"),
        ("strange", "12_5"),
    ],
)
def test_each_workflow_has_its_own_runs_under_temp(pack, page, folder):
    node = SimpleNamespace(hidden=SimpleNamespace(unique_id="12:5", extra_pnginfo=page))
    assert pack.host.identity(node).folder == f"cntlora/{folder}"


class Moved(torch.nn.Linear):
    """A UNet that notes whether it is moved inside ComfyUI's inference mode: its weights would be
    inference tensors, which cannot be trained where the move back has nothing to do."""

    def __init__(self):
        super().__init__(1, 1)
        self.inside = []

    def _apply(self, fn, recurse=True):
        self.inside.append(torch.is_inference_mode_enabled())
        return self


def test_a_model_is_moved_outside_inference_mode(pack, monkeypatch):
    model = SimpleNamespace(unet=Moved(), device=torch.device("cpu"), lender=None)
    loading = sys.modules["cntlora_pack.nodes.load_checkpoint"]
    kind = sys.modules["cntlora_pack.cntlora_core.model.loader"].StableDiffusion
    for name in ("at_work", "_bring", "_put_away"):
        setattr(model, name, partial(getattr(kind, name), model))
    monkeypatch.setattr(loading, "load_checkpoint", lambda *args, **options: model)
    monkeypatch.setattr(pack.host, "notices", lambda node: None)
    with torch.inference_mode():
        pack.LoadCheckpoint.execute(pack.host.EMBEDDED, precision="fp32")
        with pack.host.working(model):
            assert not torch.is_inference_mode_enabled()
        with pytest.raises(KeyError), pack.host.working(model):
            raise KeyError
    assert model.unet.inside == [False] * 4
    assert model.device == pack.host.device()  # where it goes, not where it was loaded


def test_a_host_that_knows_no_folding_hands_the_word_on(pack):
    class Input:
        def __init__(self, id, tooltip=None):
            self.id, self.tooltip, self.extra_dict = id, tooltip, {}

    field = pack.host.advanced(SimpleNamespace(Input=Input))("rho", tooltip="How far.")
    assert (field.id, field.tooltip, field.extra_dict) == ("rho", "How far.", {"advanced": True})
