"""What `inspect` says of a file, also of one that is damaged."""

import pytest
import torch
from safetensors.torch import save_file

from cntlora_core.errors import LoRAFileError
from cntlora_core.lora.summary import inspect_file


def test_ranks_sizes_and_norms(tmp_path):
    halves = {"a.lora_down.weight": torch.eye(2, 5), "a.lora_up.weight": 3 * torch.eye(4, 2)}
    save_file(halves | {"a.alpha": torch.tensor(1.0)}, tmp_path / "x.safetensors", {"k": "v"})
    found = inspect_file(tmp_path / "x.safetensors")
    assert found["ranks"]["a"] == {
        **{"rank": 2, "alpha": 1.0, "in": 5, "out": 4},
        "norm": pytest.approx(1.5 * 2**0.5),
    }
    assert (found["parameters"], found["metadata"]) == (18, {"k": "v"})


@pytest.mark.parametrize(
    ("down", "up", "alpha"),
    [
        ((), (4, 2), ()),
        ((2, 5), (), ()),
        ((0, 5), (4, 0), ()),
        ((3, 5), (4, 2), ()),
        ((2, 5), (4, 2), (2,)),
        ((2, 5), (4, 2, 3, 3), ()),
    ],
)
def test_shapes_that_do_not_fit_are_a_sentence(tmp_path, down, up, alpha):
    halves = {"a.lora_down.weight": torch.ones(down), "a.lora_up.weight": torch.ones(up)}
    save_file(halves | {"a.alpha": torch.ones(alpha)}, tmp_path / "x.safetensors")
    with pytest.raises(LoRAFileError, match="the shapes of 'a' do not fit"):
        inspect_file(tmp_path / "x.safetensors")
