import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.checkpoint import checkpoint

from cntlora_core.calibration.moments import Moments, moment_bytes
from cntlora_core.calibration.recording import _spread, record, recorded_bytes
from cntlora_core.calibration.seen import ROWS, Seen
from cntlora_core.calibration.sketch import Sketches
from cntlora_core.lora.targets import TEXT, Projection


class Block(nn.Module):
    """Two projections of one input, and one of their product."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.out = nn.Linear(5, 4), nn.Linear(5, 4), nn.Linear(4, 3)
        self.requires_grad_(False)

    def forward(self, x):
        return self.out(self.q(x) * self.k(x))


PROJECTIONS = [
    Projection("q", 5, 4, "qk"),
    Projection("k", 5, 4, "qk"),
    Projection("out", 4, 3, "out"),
]


def measured(block, x, parts, backward=True, scale=1.0, turn=0):
    sketches = Sketches(8)  # more than the layers have: exact
    moments = Moments(gradients=sketches)
    gradient = sketches.add if backward else None
    with record(
        block, PROJECTIONS, backward=backward, gradient=gradient, loss_scale=scale, turn=turn
    ) as recording:
        for part in x.split(parts):
            (block(part).square().sum() * scale).backward() if backward else block(part)
            moments.take_in(recording.take())
    return moments, recording


def G(moments, projection):
    up, down = moments.G([projection])
    return up[0] @ down[0]


def dense(moment):
    return moment.matmul(torch.eye(len(moment.diagonal())))


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 2**31), st.sampled_from([1.0, 64.0]))
def test_moments_match_autograd(seed, scale):
    torch.manual_seed(seed)
    block = Block()
    x = torch.randn(6, 7, 5)
    moments, recording = measured(block, x, 2, scale=scale)

    rows = x.reshape(-1, 5)
    torch.testing.assert_close(dense(moments.C(PROJECTIONS[0])), rows.T @ rows / len(rows))
    assert moments.passed(PROJECTIONS[0]) == len(rows)
    block.requires_grad_(True)
    block(x).square().sum().backward()
    for p in PROJECTIONS:
        torch.testing.assert_close(
            G(moments, p),
            block.get_submodule(p.name).weight.grad / len(rows),
            rtol=1e-4,
            atol=1e-5,
        )
    q = block.q(x).detach().requires_grad_(True)
    block.out(q * block.k(x)).square().sum().backward()
    delta = q.grad.reshape(-1, 4)
    torch.testing.assert_close(
        dense(moments.S(PROJECTIONS[0])), delta.T @ delta / len(rows), rtol=1e-4, atol=1e-5
    )
    norms = recording.gradient_norms()
    assert norms.shape == (2,)  # the pictures of a pass; nobody asked between the passes


def test_a_sample_of_the_rows_stands_for_all():
    torch.manual_seed(0)
    block = Block()
    x = torch.randn(1, 40_000, 5) * torch.linspace(0.2, 2, 5)
    C = x[0].T @ x[0] / 40_000
    moments, _ = measured(block, x.expand(16, -1, -1).contiguous(), 1, backward=False)
    seen = dense(moments.C(PROJECTIONS[0]))
    assert float((seen - C).norm() / C.norm()) < 0.1
    assert moments.counts == {"C.qk": 16, "C.out": 16}


def test_rows_start_elsewhere_in_each_pass_and_follow_no_pattern():
    found = [_spread(4096, turn, torch.device("cpu")) for turn in range(2)]
    assert not set(found[0].tolist()) & set(found[1].tolist())
    for at in found:
        assert at.min() >= 0
        assert at.max() < 4096
        columns = (at % 64).bincount(minlength=64)
        assert columns.max() <= 8
        quarters = (at // 1024).bincount(minlength=4)
        assert quarters.min() >= ROWS // 4 - 2


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_pass_that_is_computed_again_counts_once(reentrant):
    torch.manual_seed(0)
    block = Block()
    x = torch.randn(2, 7, 5, requires_grad=True)
    sketches, plain = Sketches(8), Sketches(8)
    with record(
        block, PROJECTIONS, backward=True, gradient=sketches.add, recomputes=True
    ) as recording:
        passed = checkpoint(block, x, use_reentrant=reentrant)
        assert not recording.inputs, "an input waits although it will be computed again"
        passed.square().sum().backward()
    seen = recording.take()
    with record(block, PROJECTIONS, backward=True, gradient=plain.add):
        block(x).square().sum().backward()
    counts = {key: sum(own) for key, own in seen.counts.items()}
    for p in PROJECTIONS:
        torch.testing.assert_close(
            G(Moments(counts=counts, gradients=sketches), p),
            G(Moments(counts=counts, gradients=plain), p),
        )
    assert seen.counts == {"C.qk": [2], "C.out": [2], "S.q": [14], "S.k": [14], "S.out": [14]}
    assert [part.shape for part in seen.rows["C.qk"]] == [(2, 7, 5)]


def test_a_prompt_that_stands_in_its_row_three_times_is_seen_as_once():
    """Prompts of several lengths are brought to one by repeating the shorter: attention sees the
    same in it, and each copy of a token gets a part of the gradient."""
    torch.manual_seed(0)
    p = Projection("0", 5, 4, TEXT)
    net = nn.Sequential(nn.Linear(5, 4)).requires_grad_(False)
    words, queries = torch.randn(2, 6, 5), torch.randn(2, 3, 4)

    def read(times):
        sketches = Sketches(8)
        with record(net, [p], backward=True, gradient=sketches.add) as recording:
            recording.copies = torch.full((2,), times) if times > 1 else None
            keys = net(words.repeat(1, times, 1).requires_grad_())
            ((queries @ keys.mT).softmax(-1) @ keys).square().sum().backward()
        return recording.take(), sketches

    (once, G_once), (seen, G_seen) = read(1), read(3)
    assert seen.counts == once.counts == {"C.text": [2], "S.0": [12]}
    for key in seen.rows:
        torch.testing.assert_close(seen.rows[key][0][:, :6], once.rows[key][0])
    for one, other in zip(G_seen.sums["0"], G_once.sums["0"], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


class Two:
    """This process and another like it."""

    rank, size = 0, 2

    def sum_(self, tensors):
        for tensor in tensors:
            if tensor.dtype == torch.float64:  # counts
                tensor *= 2
            elif len(tensor) == 2:
                tensor[1:] = tensor[:1]


def test_processes_share_what_they_saw():
    torch.manual_seed(0)
    block, x = Block(), torch.randn(2, 7, 5)
    with record(block, PROJECTIONS, backward=True) as recording:
        block(x).square().sum().backward()
    seen = recording.take()
    together = seen.together(Two())
    assert together.counts["S.q"] == [28]
    one, both = Moments(), Moments()
    one.take_in(seen)
    both.take_in(together)
    for p in PROJECTIONS:
        torch.testing.assert_close(dense(both.S(p)), dense(one.S(p)))
        torch.testing.assert_close(dense(both.C(p)), dense(one.C(p)))


class Side:
    """One of two processes, here threads, that add up."""

    size = 2

    def __init__(self, rank, barrier, given):
        self.rank, self.barrier, self.given = rank, barrier, given

    def sum_(self, tensors):
        for tensor in tensors:
            self.given[self.rank] = tensor.clone()
            self.barrier.wait(10)
            total = self.given[0] + self.given[1]
            self.barrier.wait(10)
            tensor.copy_(total)


def test_processes_may_have_pictures_of_other_sizes():
    """Fewer tokens than rows are kept, and more; together they are what one sees that has both."""
    torch.manual_seed(0)
    p, parts = Projection("a", 24, 32, "in"), []
    for tokens in (20, 400):
        part, kept = Seen(), min(tokens, ROWS)
        part.add("C.in", torch.randn(2, kept, 24), 2, False, 1.0)
        part.add("S.a", torch.randn(2, kept, 32), 2 * tokens, False, 1.0)
        part.add("C.wide", torch.randn(2, tokens, 24), 2, True, 1.0)
        parts.append(part)
    whole, barrier, given = Seen(), threading.Barrier(2), {}
    for part in parts:
        whole.extend(part)
    with ThreadPoolExecutor(2) as threads:
        sides = [Side(rank, barrier, given) for rank in range(2)]
        each = [*threads.map(lambda own, side: own.together(side), parts, sides)]
    both, shared = Moments(), Moments()
    both.take_in(whole)
    shared.take_in(each[0])
    assert torch.equal(each[0].rows["S.a"][0], each[1].rows["S.a"][0])
    assert shared.counts == both.counts == {"C.in": 4, "S.a": 840, "C.wide": 4}
    torch.testing.assert_close(dense(shared.C(p)), dense(both.C(p)))
    torch.testing.assert_close(dense(shared.S(p)), dense(both.S(p)))
    torch.testing.assert_close(shared.seconds["C.wide"].values, both.seconds["C.wide"].values)


def test_moments_go_through_tensors():
    torch.manual_seed(0)
    moments, _ = measured(Block(), torch.randn(2, 7, 5), 2)
    tensors = moments.to_tensors("x.")
    again = Moments.from_tensors(tensors | {"y.basis.C.qk": None}, "x.", torch.device("cpu"))
    assert again.counts == moments.counts
    assert again.to_tensors("x.").keys() == tensors.keys()
    assert all(torch.equal(v, tensors[k]) for k, v in again.to_tensors("x.").items())
    assert again.on(torch.device("meta")).C(PROJECTIONS[0]).basis.is_meta


WIDE = [
    Projection("a", 40, 64, "in"),
    Projection("b", 40, 96, "in", diagonal_out=True),
    Projection("c", 96, 40, "c", diagonal_in=True),
]


def seen_of_wide_layers(pictures, tokens, dtype=torch.float32, scale=1.0):
    net = nn.ModuleDict({p.name: nn.Linear(p.in_features, p.out_features) for p in WIDE})
    net.requires_grad_(False).to(dtype)
    with record(net, WIDE, backward=True, loss_scale=scale) as recording:
        x = torch.randn(pictures, tokens, 40, dtype=dtype)
        (net["a"](x).sum() + net["c"](net["b"](x)).square().sum()).backward()
    return recording.take()


def test_bytes_are_those_of_the_tensors():
    moments = Moments()
    moments.take_in(seen_of_wide_layers(1, 50))
    tensors = [t for k, t in moments.to_tensors("").items() if not k.startswith("count")]
    assert moment_bytes(WIDE) == pytest.approx(sum(t.nbytes for t in tensors), abs=4 * len(WIDE))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_bytes_of_the_rows_are_those_that_are_kept(dtype):
    seen = seen_of_wide_layers(2, 100, dtype, scale=0.5)
    rows = [t for k, parts in seen.rows.items() if k not in seen.diagonal for t in parts]
    assert 2 * recorded_bytes(WIDE, dtype) == sum(t.nbytes for t in rows)


def test_parts_of_a_batch_may_have_other_shapes_and_scales_go_out():
    """Two sizes of picture, each with fewer tokens than rows are kept, of a scaled loss."""
    torch.manual_seed(0)
    seen, plain = Seen(), []
    for pictures, tokens in ((1, 50), (2, 40)):
        part = seen_of_wide_layers(pictures, tokens, scale=8.0)
        plain += [8.0 * rows.flatten(0, 1) for rows in part.rows["S.a"]]
        seen.extend(part)
    moments = Moments()
    moments.take_in(seen)
    seen.scales = dict.fromkeys(seen.scales, 1 / 8)
    moments.take_in(seen)
    rows = torch.cat(plain)
    found = moments.seconds["S.a"].matmul(torch.eye(rows.shape[-1]))
    expected = rows.T @ rows / len(rows) * (1 / 8**4 + 1) / 2
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


def test_a_diagonal_of_passes_of_unequal_size_is_the_mean_of_their_tokens():
    """Two pictures and one, as buckets cut a batch of three."""
    torch.manual_seed(0)
    passes, seen = (torch.randn(2, 50, 3), 5 * torch.randn(1, 50, 3)), Seen()
    for rows in passes:
        part = Seen()
        part.add("C.a", 8 * rows, 50 * len(rows), True, 8.0)
        seen.extend(part)
    moments = Moments()
    moments.take_in(seen)
    expected = torch.cat([rows.flatten(0, 1) for rows in passes]).square().mean(0)
    torch.testing.assert_close(moments.seconds["C.a"].diagonal(), expected)


@pytest.mark.parametrize("apart", [False, True])
def test_pictures_of_other_sizes_weigh_by_what_they_do_to_the_weights(apart):
    """Of inputs each picture as much, of gradients each token: in one step or in two."""
    torch.manual_seed(0)
    p = Projection("a", 24, 32, "in")
    C, S, moments, seen = [], [], Moments(), Seen()
    for tokens in (200, 20):  # more than the rows that are kept, and fewer
        x, delta = torch.ones(1, tokens, 24), torch.ones(1, tokens, 32)
        x, delta = x * torch.randn(24), delta * torch.randn(32) / tokens
        part = Seen()
        part.add("C.in", x[:, :ROWS], 1, False, 1.0)
        part.add("S.a", delta[:, :ROWS], tokens, False, 1.0)
        C.append(x[0].T @ x[0] / tokens)
        S.append(delta[0].T @ delta[0])
        seen.extend(part)
        if apart:
            moments.take_in(part)
    if not apart:
        moments.take_in(seen)
    torch.testing.assert_close(dense(moments.C(p)), sum(C) / 2)
    assert moments.tokens(p) == 110
    torch.testing.assert_close(dense(moments.S(p)) * 110, sum(S) / 2)


def test_an_input_that_was_not_computed_again_is_told():
    block = Block()
    with record(
        block, PROJECTIONS, backward=True, gradient=Sketches(8).add, recomputes=True
    ) as recording:
        block(torch.randn(1, 7, 5)).square().sum().backward()
        with pytest.raises(RuntimeError, match="not recomputed"):
            recording.take()


def test_hooks_are_removed_after_an_error():
    block = Block()
    with pytest.raises(ZeroDivisionError), record(block, PROJECTIONS, backward=False):
        raise ZeroDivisionError
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in block.modules())
