"""Several samples, or parts of boxes, in one run: rows as by themselves, and bounds that hold what lies in a part."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import pyxai_bounds as xb
from pyxai_bounds import rounding as rd
from pyxai_bounds.certify import forms
from pyxai_bounds.certify.affine.rows import Rows
from pyxai_bounds.certify.forms import Forms
from pyxai_bounds.certify.parts import bounded
from pyxai_bounds.fuse import VIEWS
from pyxai_bounds.program import captured_graph
from tests.networks import images, mlp, sample

aten = torch.ops.aten


def forms_of(fn, x: Tensor, *points: Tensor, sound: bool = True) -> Forms:
    found = Forms.of(captured_graph(fn, x[:1], *points).graph, rd.choose(sound, "real"), "rump", cheaply=False)
    assert found is not None
    return found


def network(name: str) -> nn.Sequential:
    torch.manual_seed(3)
    if name == "deep":
        return mlp((6, 12, 10, 3)).double()
    if name == "pools":
        return nn.Sequential(
            nn.Unflatten(1, (1, 2, 3)), nn.Conv2d(1, 3, 2, padding=2), nn.BatchNorm2d(3), nn.ReLU(),
            nn.MaxPool2d(3, 2, 1), nn.ZeroPad2d((1, 0, 0, 1)), nn.Conv2d(3, 4, 2), nn.ReLU(),
            nn.AdaptiveMaxPool2d((2, 1)), nn.Flatten(), nn.Linear(8, 3),
        ).double().eval()  # fmt: skip
    if name == "tokens":
        return nn.Sequential(
            nn.Unflatten(1, (3, 2)), nn.Linear(2, 5), nn.ReLU(), nn.Linear(5, 4), nn.LayerNorm(4), nn.ReLU(),
            nn.Flatten(), nn.Linear(12, 3),
        ).double()  # fmt: skip
    return nn.Sequential(
        nn.Unflatten(1, (1, 2, 3)), nn.Conv2d(1, 5, 2, padding=1), nn.BatchNorm2d(5), nn.LeakyReLU(0.1)
        if name == "leaky" else nn.ReLU(), nn.AvgPool2d(2, 1), nn.Conv2d(5, 4, 2), nn.ReLU(), nn.Flatten(),
        nn.Linear(8, 3),
    ).double().eval()  # fmt: skip


# --- which functions keep rows apart ---------------------------------------------------------------------------------

W = torch.linspace(-1, 1, 30, dtype=torch.float64).reshape(5, 6)


def kernel_gradient(x: Tensor) -> Tensor:
    """That of Σ w² by the input, where the input is the kernel w."""
    kernel = x.reshape(1, 1, 6)
    args = [0], [1], [0], [1], False, [0], 1, [True, False, False]
    return aten.convolution_backward.default(x[:, None, :1], kernel, kernel, *args)[0].reshape(1, 6)


# Functions of x [1, 6] that return what a function of the sample would, and mix samples or could.
MIXING = {
    "mean over samples": lambda x: x - x.mean(0, keepdim=True),
    "sum over samples": lambda x: x * x.sum(0),
    "softmax over samples": lambda x: x.softmax(0),
    "cumulative sum": lambda x: x.cumsum(0),
    "reversed": lambda x: x.flip(0) + 0 * x,
    "transposed": lambda x: (W @ x.T).T,
    "by another one's": lambda x: x[0] * x,
    "products of all": lambda x: (x @ x.T) @ x,
    "joined": lambda x: torch.cat([x, x], 0)[:1],
    "moved into the first dimension": lambda x: x.reshape(6, 1).softmax(0).reshape(1, 6),
    "a moving weight": lambda x: F.linear(x, x),
    "a moving kernel": lambda x: F.conv1d(x[:, None], x[:, None, :3]),
    "a kernel of its own": lambda x: F.conv1d(*[x.reshape(1, 1, 6)] * 2).sum(1) * x,
    "a kernel's own gradient": lambda x: kernel_gradient(x) * x,
    "a channel without samples": lambda x: F.avg_pool2d(x.reshape(1, 2, 3), (2, 1)),
    "squeezed": lambda x: x.reshape(1, 1, 6).squeeze(0) * 2,
    "unsqueezed": lambda x: x.unsqueeze(0)[:, 0] * 2,
    "expanded": lambda x: x.expand(3, 1, 6).mean(0),
    "aligned from the right": lambda x: x[:, :, None] * x[:, :1],
    "maximum": lambda x: x.amax(0, keepdim=True) - x,
    "divided": lambda x: x.split(1, 0)[0] * 2,
    "unbound": lambda x: x.unbind(0)[0][None] * x,
    "stacked": lambda x: torch.stack([x, x]).mean(0),
    "padded": lambda x: F.pad(x, (0, 0, 1, 0)).sum(0, keepdim=True) * 2,
    "chosen": lambda x: x.index_select(0, torch.tensor([0])) * 2,
    "gathered": lambda x: x.gather(0, torch.zeros(1, 6, dtype=torch.long)) * 2,
    "a norm over samples": lambda x: F.layer_norm(x, (1, 6)),
    "root mean squares over samples": lambda x: x * (x.pow(2).mean((0, 1), keepdim=True) + 0.1).rsqrt(),
    "a mean loss": lambda x: F.cross_entropy(x, torch.tensor([1])) * x,
    "channels without samples": lambda x: F.max_pool2d(x.reshape(1, 2, 3), (2, 1)),
    "places of maxima": lambda x: x.gather(1, F.max_pool2d(x[:, None, None], (1, 2), return_indices=True)[1][:, 0, 0]),
    "numbers in a row's place": lambda x: (x.reshape(6, 1) * x[:, :1]).reshape(1, 6),
    "numbers expanded": lambda x: x[:, :1].expand(6, 1).reshape(1, 6) * 2,
    "softmax over numbers": lambda x: x.reshape(6, 1).exp().softmax(0).reshape(1, 6),
    "sums over numbers": lambda x: x.reshape(6, 1).exp().sum(0, keepdim=True) * x,
}


@pytest.mark.parametrize("name", MIXING)
def test_what_may_mix_samples_is_run_one_by_one(name: str) -> None:
    graph = captured_graph(MIXING[name], images(1, 3, (6,))).graph
    assert Rows.of(graph) is None


GROUPS = nn.Sequential(nn.Unflatten(1, (1, 2, 3)), nn.Conv2d(1, 4, 2, padding=1), nn.GroupNorm(2, 4), nn.ReLU(),
                       nn.Flatten(), nn.Linear(48, 3)).double()  # fmt: skip


def rooted(x: Tensor) -> Tensor:
    """Root-mean-square norms of two tokens."""
    x = F.linear(x, W.T[:, :4] if x.shape[1] == 4 else torch.eye(6).double()).reshape(-1, 2, 3)
    return (x * (x.pow(2).mean(2, keepdim=True) + 0.1).rsqrt()).flatten(1) @ W[:3].T


def normed(x: Tensor) -> Tensor:
    """The gradients of sums behind norms are constants."""
    x = x if x.requires_grad else x.detach().requires_grad_()
    tokens = F.layer_norm(x.reshape(-1, 2, 3), (3,), W[0, :3], W[1, :3], 0.1)
    channels = F.group_norm(x.reshape(-1, 2, 3), 1, W[0, :2], W[1, :2], 0.1)
    return torch.autograd.grad((tokens * W[:2, :3] / 3).sum() + (channels * W[2:4, :3] / 3).sum(), x)[0]


APART = {
    "elementwise": lambda x: (x * W[:1]).tanh() * W[1] + 2 * x.sigmoid() / 3 - (1 - x).exp(),
    "products of itself": lambda x: torch.bmm(x.reshape(-1, 2, 3), x.reshape(-1, 3, 2)).softmax(-1).sum(1) * x[:, :2],
    "layers": lambda x: F.linear(F.relu(F.linear(x, W, W[0, :5])), W.T).log_softmax(1),
    "divided by sums of numbers": lambda x: (x.reshape(-1, 2, 3) / (W[:2, :3] + 1.7)).flatten(1),
    "gradients of norms": normed,
    "moved": lambda x: x.reshape(-1, 2, 3).permute(0, 2, 1)[:, :2].unsqueeze(1).transpose(1, 2).sum(3),
    "pools": lambda x: F.adaptive_avg_pool2d(F.avg_pool2d(x.reshape(-1, 1, 2, 3), 2, 1), (1, 1)).flatten(1) * x,
    "broadcast": lambda x: x[:, :, None] * x.sum(1, keepdim=True)[:, :, None].expand(-1, 6, 2) + W[0, :2],
    "joined and divided": lambda x: torch.cat([torch.stack(x.split(2, 1), 2).unbind(1)[0].exp(), x, 0 * x + W[:1]], 1),
    "padded and chosen": lambda x: F.pad(x.tanh(), (1, 2))[:, 1:].index_select(1, torch.tensor([5, 0, 1])) * x[:, :3],
    "maxima of three": lambda x: F.max_pool2d(x.reshape(-1, 2, 3, 1), (3, 1)).flatten(1) * x.reshape(-1, 2, 3).amax(2),
    "root mean squares": rooted,
    "tokens as samples": lambda x: F.layer_norm(F.linear(x.reshape(3, 2), W[:4, :2], W[:1, :4]).exp(), (4,), W[0, :4])
    .reshape(1, 3, 4).sum(2) * x[:, :3],
    "blocks": lambda x: torch.bmm(x.reshape(3, 1, 2).transpose(1, 2), x.reshape(3, 1, 2) * W[:3, None, :2])
    .softmax(2).reshape(1, 12),
    "the target's": lambda x, y: x.exp().gather(1, y[:, None]) * x,
    "a gradient": xb.explain.gradient(network("convolutions"), of="probability"),
    "of a loss": xb.explain.gradient(network("deep"), of="loss"),
    "through max pools": xb.explain.gradient(network("pools")),
    "through layer norms": xb.explain.gradient(network("tokens")),
    "through group norms": xb.explain.gradient(GROUPS),
    "through root mean squares": xb.explain.gradient(rooted),
}  # fmt: skip
TARGETED = [name for name, fn in APART.items() if isinstance(fn, xb.explain.Gradient) or name == "the target's"]


@pytest.mark.parametrize("name", APART)
@pytest.mark.parametrize("sound", [False, True])
def test_rows_are_what_they_are_by_themselves(name: str, sound: bool) -> None:
    """Rows of samples with targets of their own."""
    fn, x = APART[name], images(5, 4, (6,))
    points = [(torch.tensor([row % 3]),) if name in TARGETED else () for row in range(5)]
    found = forms_of(fn, x, *points[0], sound=sound)
    assert found.shared is not None and found.own is not None
    box = xb.Interval.linf(x, torch.tensor([0.0, 1e-4, 0.01, 0.1, 0.3])[:, None])
    bounds, form = found(box, points)
    for row in range(5):
        alone, of_row = found(box[row : row + 1], points[row : row + 1])
        # Sums in another order are all that may differ.
        scale = 1e-12 * (1 + alone.mid.abs() + alone.rad)
        assert ((bounds.mid[row] - alone.mid).abs() <= scale).all() and (
            (bounds.rad[row] - alone.rad).abs() <= scale
        ).all()
        assert ((form.reach[row] - of_row.reach).abs() <= scale).all()
        for seed in range(10):
            point = fn(sample(box[row : row + 1], seed, corners=seed % 2 == 0), *points[row]).detach()
            assert ((point - form.centre[row]).abs() <= form.reach[row] + scale).all()


@pytest.mark.parametrize("name", ["pools", "tokens", "groups"])
@pytest.mark.parametrize("of", ["logit", "probability", "loss"])
def test_rows_hold_what_is_computed_in_twice_the_digits(name: str, of: str) -> None:
    """Proofs in float32, without any tolerance: float64 loses nothing beside what they allow for."""
    exact = GROUPS if name == "groups" else network(name)
    exact = copy.deepcopy(exact).float().double()
    model, x = copy.deepcopy(exact).float(), images(6, 4, (6,)).float()
    fn, truth = xb.explain.gradient(model, of=of), xb.explain.gradient(exact, of=of)
    points = [(torch.tensor([row % 3]),) for row in range(6)]
    found = forms_of(fn, x, *points[0])
    assert found.own is not None
    box = xb.Interval.linf(x, torch.tensor([0.0, 1e-6, 1e-4, 0.01, 0.05, 0.2])[:, None])
    bounds = found(box, points)[0]
    lower, upper = bounds.lower.double(), bounds.upper.double()
    for row in range(6):
        for seed in range(40):
            point = sample(box[row : row + 1], seed, corners=seed % 2 == 0)
            point = point.clamp(*(t.double()[row : row + 1] for t in box.inner_ends()))
            value = truth(point, *points[row])[0].detach()
            assert ((value >= lower[row]) & (value <= upper[row])).all()


def test_arguments_that_all_rows_read_are_the_same_for_them() -> None:
    """Here the target chooses a weight."""
    weight = torch.linspace(-1, 2, 90, dtype=torch.float64).reshape(3, 30)

    def fn(x: Tensor, y: Tensor) -> Tensor:
        if len(x) > 1:
            return torch.cat([fn(*one) for one in zip(x.split(1), y.split(1), strict=True)])
        return F.relu(F.linear(x, weight.index_select(0, y).reshape(5, 6))) @ W * x

    found = forms_of(fn, images(1, 4, (6,)), torch.tensor([0]))
    assert found.shared is not None and found.own is None
    boxes = [xb.Interval.linf(images(1, seed, (6,)), 0.1) for seed in range(2)]
    with pytest.raises(AssertionError, match="rows meet"):
        bounded(found, boxes, [(torch.tensor([0]),), (torch.tensor([1]),)], [{}, {}])
    x, y = images(6, 4, (6,)), torch.arange(6) % 3
    bounds = xb.certify(fn, x, y, eps=0.1, property=xb.L2(0.1), sharpen=True).bounds
    for row in range(6):
        alone = xb.certify(fn, x[row : row + 1], y[row : row + 1], eps=0.1, property=xb.L2(0.1), sharpen=True).bounds
        torch.testing.assert_close(bounds.rad[row], alone.rad[0], rtol=1e-12, atol=1e-15)


# --- parts -----------------------------------------------------------------------------------------------------------


class _Seen(fx.Interpreter):
    """A graph at a point, whose values stay."""

    def __init__(self, graph: fx.GraphModule) -> None:
        super().__init__(graph, garbage_collect_values=False)

    def call_function(self, target, args, kwargs):
        return super().call_function(aten.reshape.default if target in VIEWS else target, args, kwargs)


@pytest.mark.parametrize("name", ["deep", "convolutions", "leaky", "pools", "tokens"])
def test_inputs_lie_within_the_bounds_of_their_parts(name: str) -> None:
    """Of boxes and signs that differ from row to row, by inputs whose signs these are."""
    model, rows, points = network(name), 6, torch.tensor([2])
    fn, x = xb.explain.gradient(model), images(rows, 2, (6,))
    found = forms_of(fn, x, points)
    relus = (aten.relu.default, aten.leaky_relu.default)
    sources = [node.args[0] for node in found.graph.graph.nodes if node.target in relus]
    eps = {"pools": 0.05, "tokens": 0.02}.get(name, 0.2)
    boxes = [xb.Interval.linf(x[i // 2 : i // 2 + 1], eps) for i in range(rows)]

    def seen(at: Tensor) -> tuple[Tensor, dict]:
        run = _Seen(found.graph)
        value = run.run(at, points)[0].detach()
        return value, {source: run.env[source].detach() for source in sources}

    generator = torch.Generator().manual_seed(0)
    signs = []
    for i, box in enumerate(boxes):  # those at one of its inputs, of a few ReLUs
        _, values = seen(sample(box, i, corners=False))
        wanted = {s: torch.rand(v.shape, generator=generator) < 0.2 for s, v in values.items()}
        signs.append(
            {s: torch.where(wanted[s], torch.where(v > 0, 1, -1), 0).to(torch.int8) for s, v in values.items()}
        )
    signs[0] = {}  # the whole of a box among parts of others
    parts = bounded(found, boxes, [[points]] * rows, signs)
    inside, strays = [0] * rows, 0
    for i, box in enumerate(boxes):
        part = parts[i]
        (alone,) = bounded(found, [box], [[points]], [signs[i]])
        assert ((part.bounds.rad - alone.bounds.rad).abs() <= 1e-12 * (1 + alone.bounds.rad)).all()
        for seed in range(300):
            at = sample(box, seed, corners=seed % 4 == 0)
            value, values = seen(at)
            if any(((values[node] > 0) != (sign > 0))[sign != 0].any() for node, sign in signs[i].items()):
                continue
            inside[i] += 1
            lost = 1e-12 * (1 + value.abs())
            assert ((value - part.bounds.mid).abs() <= part.bounds.rad + lost).all()
            others = [p for k, p in enumerate(parts) if k != i]
            strays += sum(bool(((value - p.bounds.mid).abs() > p.bounds.rad + lost).any()) for p in others)
            if signs[i]:  # what the part says of its symbols is true of those of the input
                rows_ = part.inequalities()
                inputs = int((box.rad > 0).sum())
                symbols = ((at - box.mid) / box.rad).flatten()
                known = rows_.generators[:inputs]
                rest = rows_.generators[inputs:].abs().sum(0) + rows_.slack
                assert (rows_.centre + symbols @ known + rest >= -1e-9).all()
    assert all(inside) and sum(inside) > 50
    assert strays > sum(inside)  # bounds of another part would have been caught


def test_a_gradient_that_decides_its_own_gates_keeps_its_value() -> None:
    """Gates are decided by a number of the sign that a part knows: it must not be taken for the gradient as well."""
    torch.manual_seed(35)
    weight, x = 3 * torch.randn(8, 6).double(), images(6, 35, (6,))

    def fn(x: Tensor) -> Tensor:
        x = x if x.requires_grad else x.detach().requires_grad_()
        active = F.relu((x - 0.5) @ weight.T)
        return torch.autograd.grad(active, x, grad_outputs=active)[0]

    box = xb.Interval.linf(x, 0.07)
    bounds = xb.certify(fn, x, eps=0.07, property=xb.TopK(2), sharpen=True, branches=32).bounds
    for seed in range(200):
        value = fn(sample(box, seed, corners=seed % 2 == 0)).detach()
        assert ((value - bounds.mid).abs() <= bounds.rad + 1e-12).all()


@pytest.mark.parametrize("name", ["deep", "convolutions", "leaky", "pools", "tokens"])
@pytest.mark.parametrize(("property", "eps"), [(xb.TopK(2), 0.08), (xb.Cosine(0.7), 0.12)])
def test_together_all_is_decided_as_one_by_one(
    name: str, property: object, eps: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    fn, x, y = xb.explain.gradient(network(name)), images(10, 2, (6,)), torch.arange(10) % 3
    eps = {"pools": 0.03, "tokens": 0.03}.get(name, eps)

    def found(branches: int) -> xb.Certificate:
        return xb.certify(fn, x, y, eps=eps, property=property, clip=(0.0, 1.0), branches=branches)

    many = [found(branches) for branches in (1, 60)]
    monkeypatch.setattr(forms, "ROWS", 1)
    for together, alone in zip(many, (found(1), found(60)), strict=True):
        assert torch.equal(together.holds, alone.holds) and torch.equal(together.refuted, alone.refuted)
        torch.testing.assert_close(together.margin, alone.margin, rtol=1e-9, atol=1e-12)
    plain, divided = many
    assert divided.holds.any() and divided.refuted.any()
    if name != "pools":  # where parts by the signs of ReLUs decide less
        assert (divided.refuted & ~plain.refuted).any()


def test_more_than_memory_holds_is_looked_at_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    fn, x, y = xb.explain.gradient(network("deep")), images(6, 2, (6,)), torch.zeros(6, dtype=torch.long)
    options = dict(eps=0.08, property=xb.TopK(2), branches=20)
    expected, whole = xb.certify(fn, x, y, **options), Forms.__call__

    def one_alone(self: Forms, box: xb.Interval, *more: object) -> tuple:
        if len(box) > 1:
            raise MemoryError
        return whole(self, box, *more)

    monkeypatch.setattr(Forms, "__call__", one_alone)
    found = xb.certify(fn, x, y, **options)
    assert torch.equal(found.holds, expected.holds) and torch.equal(found.refuted, expected.refuted)
    assert found.holds.any()


def test_radii_begin_where_they_end_without_parts() -> None:
    fn, x, y = xb.explain.gradient(network("deep")), images(6, 2, (6,)), torch.arange(6) % 3
    options = dict(property=xb.TopK(2), clip=(0.0, 1.0))
    told: list[float] = []
    plain, divided = (
        xb.certified_radius(fn, x, y, max_eps=0.3, tol=2e-3, branches=most, on_progress=told.append, **options)
        for most in (1, 30)
    )
    assert (divided >= plain).all() and (divided > plain + 2e-3).any()
    assert xb.certify(fn, x, y, eps=divided[:, None], branches=30, **options).holds[divided > 0].all()
    assert told.count(1.0) >= 2 and all(0 <= share <= 1 for share in told)


def test_targets_that_differ_in_the_sign_of_a_zero_are_two() -> None:
    """Between its corners the second sample's explanation leaves what the first one's stays in."""

    def fn(x: Tensor, target: Tensor) -> Tensor:
        bump = 100 * (0.01 - (x - 0.48).abs()).relu()
        return torch.where(torch.signbit(target), bump, x * 0.3 + x * 0.7 - x)

    x, target = torch.full((2, 3), 0.45, dtype=torch.float64), torch.tensor([[0.0], [-0.0]], dtype=torch.float64)
    found = xb.certify(fn, x, target, eps=0.1, property=xb.L2(0.05), sharpen=True)
    assert found.holds.tolist() == [True, False]


def test_entries_that_are_equal_are_left_open_at_points() -> None:
    """Boxes that are points have no symbols."""
    gradient, x, y = xb.explain.gradient(network("deep")), images(3, 2, (6,)), torch.arange(3)

    def fn(x: Tensor, target: Tensor) -> Tensor:
        return torch.cat([gradient(x, target)] * 2, 1)

    found = xb.certify(fn, x, y, eps=0.0, property=xb.TopK(1), branches=4)
    assert not found.holds.any() and not found.refuted.any()
    assert (found.margin.abs() < 1e-12).all()


def test_what_the_function_cannot_say_of_an_input_leaves_the_bounds() -> None:
    model, armed = network("deep"), []

    def fn(x: Tensor, target: Tensor) -> Tensor:
        if armed and len(x) == 1 and type(x) is Tensor:  # neither captured nor as one of many
            raise RuntimeError("not alone")
        return xb.explain.gradient(model)(x, target)

    x, y = images(6, 2, (6,)), torch.arange(6) % 3
    options = dict(eps=0.08, property=xb.TopK(2), clip=(0.0, 1.0))
    plain = xb.certify(fn, x, y, sharpen=False, **options)
    armed.append(True)
    assert (xb.certify(fn, x, y, branches=20, **options).margin >= plain.margin).all()
