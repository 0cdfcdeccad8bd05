"""NaN in a checkpoint is found where weights are read, and said with its place."""

import pytest
import torch
from torch import nn

from cntlora_core.errors import CheckpointError
from cntlora_core.model.finite import all_finite, check_weights


def part(value=0.0, dtype=torch.float32):
    module = nn.Linear(2, 2)
    with torch.no_grad():
        module.weight[1, 1] = value
    return module.to(dtype)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("where", "words"),
    [(0, "the UNet's"), (1, "the VAE's"), (2, "text encoder 1's"), (3, "text encoder 2's")],
)
def test_the_part_and_the_weight_are_named(where, words, value, dtype):
    parts = [part(value if n == where else 0.0, dtype) for n in range(4)]
    with pytest.raises(CheckpointError, match=rf"'sd' is damaged: .*{words} weight 'weight'"):
        check_weights("sd", parts[0], parts[1], parts[2:])


def test_whole_weights_pass():
    check_weights("sd", part(65504.0, torch.float16), part(), [part()])


def test_stored_numbers_of_8_bits_are_looked_at_too():
    weight = torch.tensor([1.0, float("nan")]).to(torch.float8_e4m3fn)
    assert not all_finite(weight)
    assert all_finite(weight[:1])
    assert all_finite(torch.tensor([1, 2]))
    assert all_finite(torch.empty(0))
