"""What `nodes/host.py` makes of the host: where our nodes stand, which folders are offered."""

import sys
from types import SimpleNamespace

import pytest


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
