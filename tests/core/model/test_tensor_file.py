"""Numbers of a file, converted piece by piece, come out as they would whole."""

import pytest
import torch
from safetensors.torch import save_file

from cntlora_core.model.tensor_file import PIECE, open_tensors, read_scaled

FP8 = torch.float8_e4m3fn


@pytest.fixture
def stored():
    generator = torch.Generator().manual_seed(0)
    return {
        "a.weight": torch.randn(3, PIECE // 2 + 5, generator=generator).half(),
        "b.weight": torch.randn(300, 257, generator=generator).to(FP8),
        "c.weight": torch.zeros(0, 4).half(),
    }


@pytest.fixture
def file(stored, tmp_path):
    def make(**beside):
        path = tmp_path / "x.safetensors"
        save_file(stored | beside, path)
        return open_tensors(path)

    return make


@pytest.mark.parametrize("dtype", [None, torch.float16, torch.bfloat16, torch.float32])
def test_it_is_what_the_file_holds_in_another_dtype(file, stored, dtype):
    source = file()
    for name, tensor in stored.items():
        read = source.read(name, dtype)
        assert read.dtype == (dtype or tensor.dtype)
        assert torch.equal(read.float(), tensor.to(read.dtype).float())


@pytest.mark.parametrize("shape", [(), (1,), (300,), (300, 1)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_a_scale_is_a_number_or_one_for_each_row(file, stored, shape, dtype):
    scale = torch.rand(shape) + 0.1
    read = read_scaled(file(**{"b.weight_scale": scale}), "b.weight", dtype)
    rows = scale.reshape(-1, 1)
    assert torch.equal(read, (stored["b.weight"].float() * rows).to(dtype))


def test_a_scaled_tensor_of_the_wanted_dtype_leaves_the_file_as_it_is(file, stored):
    source = file(**{"a.scale_weight": torch.tensor(2.0)})
    for _ in range(2):
        assert torch.equal(read_scaled(source, "a.weight", torch.float16), stored["a.weight"] * 2)
    assert torch.equal(source.read("a.weight"), stored["a.weight"])
