import pytest
import torch
from torch import nn

from cntlora_core.calibration.ranks import uniform_ranks
from cntlora_core.lora.adapter import (
    Factors,
    attached_lora,
    default_init,
    gaussian_init,
    parameter_count,
)
from cntlora_core.lora.targets import find_projections


def random_lora(projections, rank, seed=0):
    g = torch.Generator().manual_seed(seed)
    return {
        p.name: Factors(
            torch.randn(p.out_features, rank, generator=g) * 0.02,
            torch.randn(rank, p.in_features, generator=g),
        )
        for p in projections
    }


def forward(model, conditioning):
    g = torch.Generator().manual_seed(5)
    x = torch.randn(2, 4, 16, 16, generator=g)
    with torch.no_grad():
        return model.unet(
            x, torch.tensor([100, 700]), return_dict=False, **conditioning[:2].unet_kwargs()
        )[0]


def test_attached_equals_the_merged_weights(mini_sd, subject):
    """y = W x + B A x agrees with (W + B A) x to fp32 rounding, through the whole UNet."""
    lora = random_lora(find_projections(mini_sd.unet), 3)
    with attached_lora(mini_sd.unet, lora):
        beside = forward(mini_sd, subject.conditioning)
    originals = {name: mini_sd.unet.get_submodule(name).weight.data.clone() for name in lora}
    try:
        for name, factors in lora.items():
            mini_sd.unet.get_submodule(name).weight.data += factors.delta()
        merged = forward(mini_sd, subject.conditioning)
    finally:
        for name, weight in originals.items():
            mini_sd.unet.get_submodule(name).weight.data.copy_(weight)
    assert not torch.equal(merged, forward(mini_sd, subject.conditioning))
    torch.testing.assert_close(beside, merged, rtol=1e-4, atol=1e-4)


def test_the_base_model_is_bit_identical_afterwards(mini_sd):
    before = {k: v.clone() for k, v in mini_sd.unet.state_dict().items()}
    modules = dict(mini_sd.unet.named_modules())

    def train_and_fail():
        with attached_lora(
            mini_sd.unet, random_lora(find_projections(mini_sd.unet), 2), trainable=True
        ) as adapters:
            adapters.flat.detach().add_(1)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        train_and_fail()
    after = mini_sd.unet.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[k], v) for k, v in before.items())
    assert dict(mini_sd.unet.named_modules()) == modules


def test_factors_are_copied_in_and_out():
    net = nn.Sequential(nn.Linear(4, 3))
    factors = Factors(torch.zeros(3, 2), torch.ones(2, 4))
    with attached_lora(net, {"0": factors}, trainable=True) as adapters:
        adapters.flat.detach()[:8].mul_(2)  # the first factor's A
        out = adapters.factors()["0"]
    assert torch.equal(factors.down, torch.ones(2, 4))
    assert torch.equal(out.down, torch.full((2, 4), 2.0))


def test_bf16_base_keeps_fp32_adapters():
    net = nn.Sequential(nn.Linear(4, 3)).bfloat16()
    with attached_lora(
        net, {"0": Factors(torch.ones(3, 1), torch.ones(1, 4))}, trainable=True
    ) as adapters:
        y = net(torch.ones(2, 4, dtype=torch.bfloat16))
        y.float().sum().backward()
        assert y.dtype == torch.bfloat16
        assert adapters.flat.dtype == adapters.flat.grad.dtype == torch.float32


def test_attaching_to_something_else_is_refused():
    net = nn.Sequential(nn.Conv1d(1, 1, 1))
    with (
        pytest.raises(TypeError, match="Conv1d"),
        attached_lora(net, {"0": Factors(torch.ones(1, 1), torch.ones(1, 1))}),
    ):
        pass
    assert isinstance(net[0], nn.Conv1d)


def test_parameters_are_counted():
    lora = {
        "x": Factors(torch.ones(3, 2), torch.ones(2, 4)),
        "y": Factors(torch.ones(3, 1), torch.ones(1, 4)),
    }
    assert parameter_count(lora) == 3 * 2 + 2 * 4 + 3 + 4


@pytest.mark.parametrize(
    ("init", "std"),
    [(default_init, lambda d, r: (3 * d) ** -0.5), (gaussian_init, lambda d, r: 1 / r)],
)
def test_plain_starts_change_nothing_and_have_their_distribution(mini_sd, init, std):
    projections = find_projections(mini_sd.unet)
    lora = init(projections, uniform_ranks(projections, 8), torch.Generator().manual_seed(0))
    for p in projections:
        factors = lora[p.name]
        assert not factors.up.any()
        assert float(factors.down.std()) == pytest.approx(std(p.in_features, 8), rel=0.12)
        assert abs(float(factors.down.mean())) < 0.15 * float(factors.down.std())


@pytest.mark.parametrize("needs_input", [True, False])
@pytest.mark.parametrize(("dtype", "close"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_gradients_are_autograds_own(dtype, close, needs_input):
    generator = torch.Generator().manual_seed(3)
    base = nn.Linear(6, 5).to(dtype).requires_grad_(False)
    factors = Factors(
        torch.randn(5, 2, generator=generator), torch.randn(2, 6, generator=generator)
    )
    x = torch.randn(3, 4, 6, generator=generator).to(dtype).requires_grad_(needs_input)
    weights = torch.randn(3, 4, 5, generator=generator).to(dtype)
    net = nn.Sequential(base)
    with attached_lora(net, {"0": factors}, trainable=True) as adapters:
        (net(x) * weights).sum().backward()
        own, gradient = adapters.weights["0"], adapters.split(adapters.gradient(1.0))["0"]
        again = [
            x.detach().clone().requires_grad_(needs_input),
            own.up.clone().requires_grad_(),
            own.down.clone().requires_grad_(),
        ]
        y = base(again[0]) + again[0] @ again[2].to(dtype).T @ again[1].to(dtype).T
        (y * weights).sum().backward()
        ours = (x.grad, gradient.up, gradient.down)
        for grad, theirs in zip(ours, (t.grad for t in again), strict=True):
            assert (grad is None) == (theirs is None)
            if grad is not None:
                assert grad.dtype == theirs.dtype
                torch.testing.assert_close(
                    grad, theirs, rtol=close, atol=close * theirs.abs().max().item()
                )
