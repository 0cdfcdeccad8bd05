"""The sweep's answer: layers of one shape solved together as each by itself, densely, in fp64."""

import copy
import dataclasses
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pretended_device import pretended
from torch import nn

from cntlora_core.calibration.constraints import Domain, Metric, Target
from cntlora_core.calibration.inputs import Tokens
from cntlora_core.calibration.moments import Moments
from cntlora_core.calibration.natural import NaturalGradient, NaturalStart
from cntlora_core.calibration.recording import input_key, output_key
from cntlora_core.calibration.seen import Seen
from cntlora_core.calibration.sketch import Sketches
from cntlora_core.calibration.solution import FIRST_CHANGE, solve
from cntlora_core.config import CalibrationConfig
from cntlora_core.lora.adapter import attached_lora
from cntlora_core.lora.targets import Projection

WIDTH = 9  # directions of a gradient that are kept
RHO = 0.5


def layers(m, d, thin_in=False, thin_out=False, count=3):
    return [Projection(f"p{i}", d, m, f"in{i}", thin_in, thin_out) for i in range(count)]


def seen_of(projections, seed, strengths=(1.0,), directions=4):
    """What two pictures left, and sketches of gradients of so many `directions`; of the layers in
    turn as strong as `strengths`."""
    g = torch.Generator().manual_seed(seed)
    seen, sketches = Seen(), Sketches(WIDTH)
    for i, p in enumerate(projections):
        x = torch.randn(2, 40, p.in_features, generator=g) * torch.rand(p.in_features, generator=g)
        delta = torch.randn(2, 40, directions, generator=g)
        delta = delta @ torch.randn(directions, p.out_features, generator=g) / directions
        delta = delta * strengths[i % len(strengths)]
        seen.add(input_key(p), x, 80, p.diagonal_in, 1.0)
        seen.add(output_key(p), delta, 80, p.diagonal_out, 1.0)
        sketches.add(p.name, delta, Tokens(x))
    return seen, sketches


def measured(*given, **more):
    seen, sketches = seen_of(*given, **more)
    moments = Moments(gradients=sketches)
    moments.take_in(seen)
    return moments


def dense(moment):
    return moment.matmul(torch.eye(moment.diagonal().shape[-1])).double()


def inverse_root(moment):
    values, vectors = torch.linalg.eigh(dense(moment))
    return (vectors * values.rsqrt()) @ vectors.T


def by_itself(p, moments, metric):
    """D and the singular values of one layer's whitened gradient."""
    up, down = (part[0].double() for part in moments.G([p]))
    left = inverse_root(moments.S(p).damped(metric.rho))
    right = inverse_root(metric.K(p, moments))
    H = left @ up @ down @ right
    return -left @ H @ right, torch.linalg.svdvals(H)


shapes = st.tuples(st.sampled_from([3, 7, 40, 60]), st.sampled_from([3, 7, 40, 60]))


@settings(deadline=None, max_examples=15)
@given(
    shapes,
    st.booleans(),
    st.booleans(),
    st.sampled_from([0.0, 0.7]),
    st.sampled_from([(1.0,), (0.0, 1.0), (1e-6, 0.0, 1e3)]),
    st.integers(1, 12),
    st.integers(0, 2**31),
)
def test_layers_together_are_solved_as_each_by_itself(
    shape, thin_in, thin_out, prior, strengths, directions, seed
):
    """Also where a gradient has fewer directions than its sketch, or none; and then in directions
    that could still learn."""
    projections = layers(*shape, thin_in, thin_out)
    moments = measured(projections, seed, strengths, directions)
    kept = measured(projections, seed + 1) if prior else None
    metric = Metric(RHO, kept, prior)
    parts = Target(metric).components(projections, None, moments, WIDTH, torch.Generator())
    for p, own in zip(projections, parts, strict=True):
        D, sigma = by_itself(p, moments, metric)
        k = len(own.sigma)
        assert k == min(WIDTH, *shape)
        top = sigma[0].clamp_min(1e-30)
        torch.testing.assert_close(own.sigma.double() / top, sigma[:k] / top, rtol=1e-3, atol=1e-4)
        found = (own.up * own.sigma).double() @ own.down.double()
        assert float((found - D).norm()) <= 1e-3 * float(D.norm())
        torch.testing.assert_close(own.score, moments.passed(p) * own.sigma.square())
        # U and V of the whitened gradient are orthonormal, of a gradient that is zero too
        P, K = dense(moments.S(p).damped(RHO)), dense(metric.K(p, moments))
        up, down = own.up.double(), own.down.double()
        eye = torch.eye(k, dtype=torch.float64)
        torch.testing.assert_close(up.T @ P @ up, eye, rtol=0, atol=1e-3)
        torch.testing.assert_close(down @ K @ down.T, eye, rtol=0, atol=1e-3)
        assert (up.gather(0, up.abs().argmax(0, keepdim=True)) > 0).all(), "signs are fixed"


def test_who_is_solved_beside_it_changes_nothing():
    projections = layers(40, 60)
    moments = measured(projections, 0)
    together = Target(Metric(RHO)).components(projections, None, moments, 5, torch.Generator())
    for p, parts in zip(projections, together, strict=True):
        (alone,) = Target(Metric(RHO)).components([p], None, moments, 5, torch.Generator())
        torch.testing.assert_close(
            (parts.up * parts.sigma) @ parts.down, (alone.up * alone.sigma) @ alone.down
        )


def problem(device, count):
    """A net of linear layers in two shapes, what a sweep of it measured, and the metric."""
    projections = layers(40, 48, count=count)
    projections += [Projection("wide", 48, 70, "in0", diagonal_out=True)]
    net = nn.ModuleDict({p.name: nn.Linear(p.in_features, p.out_features) for p in projections})
    model = SimpleNamespace(unet=net.requires_grad_(False).to(device))
    (seen, own), (others, _) = seen_of(projections, 0), seen_of(projections, 1)
    moments, kept = Moments(gradients=own), Moments()
    moments.take_in(seen)
    kept.take_in(others)
    own.sums = {name: tuple(part.to(device) for part in parts) for name, parts in own.sums.items()}
    on_device = moments.on(torch.device(device))
    on_device.gradients = own
    return model, projections, on_device, Metric(RHO, kept.on(torch.device(device)), 1.0)


def solved(model, projections, moments, constraint):
    config = CalibrationConfig(rank=2)
    generator = torch.Generator().manual_seed(0)
    return solve(model, projections, constraint, moments, config, None, generator)


@pytest.mark.parametrize("constraint", [Target, Domain])
def test_a_device_gives_what_the_cpu_gives(constraint):
    """None is asked for what it makes one at a time: it would refuse."""
    torch.manual_seed(0)
    model, projections, moments, metric = problem("cpu", 3)
    expected = solved(model, projections, moments, constraint(metric))
    with pretended("cuda"):
        torch.manual_seed(0)
        model, projections, moments, metric = problem("cuda", 3)
        found = solved(model, projections, moments, constraint(metric))
    assert found.first == pytest.approx(expected.first, rel=1e-4)
    for name, factors in expected.update.items():
        torch.testing.assert_close(
            found.update[name].delta(), factors.delta(), rtol=1e-2, atol=1e-4
        )


@pytest.mark.parametrize("ranks", [None, {"p0": 1, "p1": 3, "p2": 0, "wide": 2}])
def test_the_first_step_moves_the_outputs_by_so_much(ranks):
    torch.manual_seed(0)
    model, projections, moments, metric = problem("cpu", 3)
    config, generator = CalibrationConfig(rank=2), torch.Generator()
    found = solve(model, projections, Target(metric), moments, config, ranks, generator)
    changes = []
    for p in found.projections:
        D, W = found.update[p.name].delta(), model.unet[p.name].weight
        C = dense(moments.C(p)).float()
        changes.append(((D @ C * D).sum() / (W @ C * W).sum()).item())
        assert not ranks or found.update[p.name].rank == ranks[p.name]
    assert found.first == pytest.approx(FIRST_CHANGE / (sum(changes) / len(changes)) ** 0.5, 1e-3)


def test_a_few_at_a_time_is_as_all_at_once_and_gives_their_gradients_back(monkeypatch):
    torch.manual_seed(0)
    model, projections, moments, metric = problem("cpu", 5)
    again = dataclasses.replace(moments, gradients=copy.deepcopy(moments.gradients))
    expected = solved(model, projections, moments, Target(metric))
    asked = []

    class Asked(Target):
        def components(self, group, *given):
            asked.append([p.name for p in group])
            return super().components(group, *given)

    monkeypatch.setattr("cntlora_core.calibration.moments.MOST", 2 * 3840)
    found = solved(model, projections, again, Asked(metric))
    assert asked == [["p0", "p1"], ["p2", "p3"], ["p4"], ["wide"]]
    assert not again.gradients.sums
    for name, factors in expected.update.items():
        torch.testing.assert_close(found.update[name].delta(), factors.delta())


def test_the_host_waits_for_shapes_not_for_layers():
    waits = []
    with pretended("cuda") as device:
        for count in (1, 5):
            model, projections, moments, metric = problem("cuda", count)
            before = device.waits.total()
            solved(model, projections, moments, Target(metric))
            waits.append(device.waits.total() - before)
    assert waits == [4, 4], "two shapes' small matrices; what is told of the terms, factors"


def test_a_natural_step_never_makes_the_host_wait():
    """Not when it brings the metric up to date either: nothing is factorised one at a time, nothing
    is copied in either direction."""
    with pretended("cuda") as device:
        model, projections, moments, metric = problem("cuda", 3)
        solution = solved(model, projections, moments, Target(metric))
        projections, update = solution.projections, solution.update
        start = NaturalStart(projections, metric, moments, 1.0)
        with attached_lora(model.unet, update, trainable=True) as adapters:
            natural = NaturalGradient(adapters, start)
            shown = [seen_of(projections, seed)[0] for seed in range(2)]
            for seen in shown:
                seen.rows = {k: [r.to("cuda") for r in rows] for k, rows in seen.rows.items()}
            adapters.flat.grad = torch.ones_like(adapters.flat)
            for seen in shown:
                natural.seen = seen
                before = device.waits.total(), device.uploads.total()
                natural.step()
                assert (device.waits.total(), device.uploads.total()) == before
            assert torch.isfinite(adapters.flat.cpu()).all()
