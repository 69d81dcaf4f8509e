"""The trace of the Hessian: three ways, whatever an energy is made of."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import termwise as tw
from termwise.energy import _fallback, _forward_laplacian, _score_matching, hessian_trace

WAYS = ("forward_laplacian", "reverse", "forward_over_reverse")
OTHER = torch.randn(5, 4, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
KERNEL = torch.randn(2, 2, 2, 2, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
ROWS, IMAGES, SETS = (3, 4), (2, 2, 3, 3), (2, 3, 2)


@pytest.fixture(autouse=True)
def no_energy_is_known():
    _fallback._warned.clear()
    _fallback._failed.clear()


def in_place(x):
    h = x + 1
    return F.silu(h, inplace=True) * h


CARRIED = {
    "silu": (F.silu, ROWS),
    "gelu": (F.gelu, ROWS),
    "softplus": (lambda x: F.softplus(x, beta=2.0), ROWS),
    "elu": (F.elu, ROWS),
    "relu squared": (lambda x: F.relu(x) ** 2, ROWS),
    "gate": (lambda x: x * torch.sigmoid(x), ROWS),
    "glu": (lambda x: F.glu(x, 1), ROWS),
    "quotient": (lambda x: x / (2 + x * x), ROWS),
    "operators": (lambda x: 1 - 2 / (3 + torch.exp(-x)) + 2**x - (-x).abs(), ROWS),
    "powers": (lambda x: (1 + x * x).pow(x) + (2 + x.sin()) ** 1.5, ROWS),
    "where": (lambda x: torch.where(x > 0, x.sin(), x.exp()), ROWS),
    "two arguments": (lambda x: torch.atan2(x, 2 + x.cos()) + torch.logaddexp(x, x * x), ROWS),
    "broadcast": (lambda x: x[:, :1] * x + x.mean(1, keepdim=True) * OTHER[0], ROWS),
    "residual": (lambda x: x + torch.tanh(x @ OTHER[:4]), ROWS),
    "joined": (lambda x: torch.cat([x, OTHER[:3].sin(), x * x], 1), ROWS),
    "stacked": (lambda x: torch.stack([x, x.sin()], 1), ROWS),
    "pieces": (lambda x: torch.prod(torch.stack(x.chunk(2, 1)), 0), ROWS),
    "rows merged": (lambda x: torch.sin(x.reshape(-1, 2) @ OTHER[:2, :2]).reshape(3, 4), ROWS),
    "transposed": (lambda x: (x.T.flip(0) ** 2).T, ROWS),
    "softmax": (lambda x: x.softmax(1), ROWS),
    "log_softmax": (lambda x: F.log_softmax(x, 1), ROWS),
    "logsumexp": (lambda x: x.logsumexp(1, keepdim=True), ROWS),
    "norms": (lambda x: x.norm(dim=1, keepdim=True) * F.normalize(x, dim=1), ROWS),
    "cosine": (lambda x: F.cosine_similarity(x[:, None], OTHER[None], 2), ROWS),
    "cdist": (lambda x: torch.cdist(x, OTHER), ROWS),
    "spread": (lambda x: x.var(1, keepdim=True) + x.std(1, keepdim=True), ROWS),
    "cumulated": (lambda x: x.sin().cumsum(1) * x.cumprod(1), ROWS),
    "layer_norm": (lambda x: F.layer_norm(x, (4,), OTHER[0], OTHER[1]), ROWS),
    "in place": (in_place, ROWS),
    "einsum": (lambda x: torch.einsum("bi,ij,bj->b", x, OTHER[:4], x.sin())[:, None], ROWS),
    "convolution": (lambda x: F.silu(F.conv2d(x, KERNEL, OTHER[0, :2], padding=1)), IMAGES),
    "transposed convolution": (lambda x: F.conv_transpose2d(x.sin(), KERNEL), IMAGES),
    "pooled": (lambda x: F.avg_pool2d(x.sin(), 2) + F.max_pool2d(x.cos(), 2), IMAGES),
    "padded": (lambda x: F.pad(x.sin(), (1, 0, 0, 1), value=2.0), IMAGES),
    "instance_norm": (F.instance_norm, IMAGES),
    "group_norm": (lambda x: F.group_norm(x, 1), IMAGES),
    "products": (lambda x: torch.bmm(x, x.mT.sin()) @ x, SETS),
    "attention": (lambda x: F.scaled_dot_product_attention(x, x.sin(), x), SETS),
}


def case(function, shape):
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    d = x[0].numel()
    weight = torch.randn(d, d, generator=generator, dtype=torch.float64) / d**0.5
    weight.requires_grad_()

    def energy(x):
        out = function((x.flatten(1) @ weight).reshape(x.shape)).flatten(1)
        return (out.sin() * torch.linspace(0.5, 1.5, out.shape[1], dtype=x.dtype)).sum(1)

    return energy, x.requires_grad_(), weight


def values_and_gradients(energy, x, weight, **options):
    trace = hessian_trace(energy, x, **options)
    rows = torch.arange(1.0, 1.0 + len(x), dtype=x.dtype)
    return trace, *torch.autograd.grad((trace * rows).sum(), (weight, x))


@pytest.mark.parametrize("name", CARRIED)
def test_what_carriers_go_through_has_the_derivatives_of_autograd(name):
    energy, x, weight = case(*CARRIED[name])
    expected = values_and_gradients(energy, x, weight, trace="reverse")
    ours = values_and_gradients(energy, x, weight)
    torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-10)


def test_directions_may_go_through_a_layer_a_few_at_a_time(monkeypatch):
    monkeypatch.setattr(_forward_laplacian, "_steps", lambda base: 3)
    layers = nn.Linear(4, 6), nn.SiLU(), nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)
    energy, x, _ = case(nn.Sequential(*layers).double(), ROWS)
    for weight in (layers[0].weight, layers[2].weight, layers[4].weight):
        expected = values_and_gradients(energy, x, weight, trace="reverse")
        torch.testing.assert_close(values_and_gradients(energy, x, weight), expected)


@pytest.mark.parametrize("name", ["convolution", "attention", "layer_norm"])
@pytest.mark.parametrize("chunk_size", [None, 5])
def test_all_ways_agree_with_whole_hessians(name, chunk_size):
    energy, x, weight = case(*CARRIED[name])
    hessians = torch.stack(
        [torch.autograd.functional.hessian(lambda p: energy(p[None])[0], row) for row in x.detach()]
    )
    d = x[0].numel()
    expected = hessians.reshape(len(x), d, d).diagonal(dim1=1, dim2=2).sum(1)
    first = None
    for trace in WAYS:
        for differentiation in ("autograd", "func"):
            ours = values_and_gradients(
                energy,
                x,
                weight,
                trace=trace,
                chunk_size=chunk_size,
                differentiation=differentiation,
            )
            torch.testing.assert_close(ours[0].detach(), expected, rtol=1e-10, atol=1e-10)
            first = first or ours
            torch.testing.assert_close(ours, first, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("trace", WAYS)
def test_energies_of_numbers_and_of_no_curvature(trace):
    x = torch.tensor([1.0, 2.0])
    torch.testing.assert_close(hessian_trace(lambda x: x**3, x, trace=trace), 6 * x)
    weight = torch.ones(3, requires_grad=True)
    flat = hessian_trace(lambda x: x @ weight, torch.ones(2, 3), trace=trace)
    torch.testing.assert_close(flat, torch.zeros(2))
    flat.sum().backward()
    torch.testing.assert_close(weight.grad, torch.zeros(3))


@pytest.mark.parametrize("trace", WAYS)
def test_modes_of_the_caller_change_no_value_and_record_nothing(trace):
    energy, x, weight = case(*CARRIED["silu"])
    expected = hessian_trace(energy, x, trace=trace).detach()
    with torch.no_grad():
        quiet = hessian_trace(energy, x, trace=trace)
    with torch.inference_mode():
        silent = hessian_trace(energy, x.clone(), trace=trace)
    for ours in (quiet, silent):
        assert not ours.requires_grad
        torch.testing.assert_close(ours, expected)
    assert x.grad is None
    assert weight.grad is None


class Exponential(torch.autograd.Function):
    """With a backward of its own, twice what is right."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.exp()

    @staticmethod
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        return 2 * gradient * x.exp()


@pytest.mark.parametrize("kept", [True, False])
def test_a_function_with_a_backward_of_its_own_is_believed(kept):
    def energy(x):
        return Exponential.apply(x).sum(1)

    x = torch.randn(3, 2, generator=torch.Generator().manual_seed(0))
    with torch.set_grad_enabled(kept), pytest.warns(UserWarning, match="under no_grad"):
        ours = hessian_trace(energy, x)
    torch.testing.assert_close(ours, hessian_trace(energy, x, trace="reverse"))
    torch.testing.assert_close(ours, 2 * x.exp().sum(1))


def test_what_is_detached_or_under_no_grad_is_constant():
    def energy(x):
        with torch.no_grad():
            factor = x.square()
        return (factor * x.detach() * x.square()).sum(1)

    x = torch.randn(3, 2, dtype=torch.float64)
    with pytest.warns(UserWarning, match="under no_grad"):
        ours = hessian_trace(energy, x)
    torch.testing.assert_close(ours, (2 * x**3).sum(1))


def unknown(x):
    return torch.special.erfcx(x).sum(1)


def test_an_unknown_function_is_named_once_and_differentiated_all_the_same():
    x = torch.randn(3, 2, dtype=torch.float64)
    with pytest.warns(UserWarning, match="erfcx"):
        ours = hessian_trace(unknown, x)
    torch.testing.assert_close(ours, hessian_trace(unknown, x, trace="reverse"))
    hessian_trace(unknown, x)  # a second warning would be an error here


def test_in_place_on_shared_memory_is_not_guessed():
    def energy(x):
        h = x + 0
        flat = h.flatten(1)
        F.silu(flat, inplace=True)
        return h.square().flatten(1).sum(1)

    x = torch.randn(3, 2, dtype=torch.float64)
    with pytest.warns(UserWarning, match="in place"):
        ours = hessian_trace(energy, x)
    torch.testing.assert_close(
        ours, hessian_trace(lambda x: F.silu(x).square().sum(1), x, trace="reverse")
    )


@pytest.mark.parametrize("trace", WAYS)
def test_expanded_rows_are_differentiated_without_a_warning(trace):
    row = torch.tensor([[[0.5, 1.0], [-1.0, 2.0]]]).mT.contiguous().mT
    found = hessian_trace(lambda x: x.flatten(1).cos().sum(1), row.expand(3, 2, 2), trace=trace)
    torch.testing.assert_close(found, -row.cos().sum().expand(3))


def test_energies_that_check_types_are_carried_too(monkeypatch):
    from einops import rearrange
    from jaxtyping import Float
    from torch import Tensor

    @tw.contract
    def energy(x: Float[Tensor, "batch height width"]) -> Float[Tensor, " batch"]:
        return rearrange(x.sin(), "b h w -> b (w h)").sum(1)

    monkeypatch.setattr(_score_matching, "_reverse", None)
    x = torch.randn(2, 3, 4)
    torch.testing.assert_close(hessian_trace(energy, x), -x.sin().sum((1, 2)))


def test_modules_are_called_once_and_left_as_they_were():
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.SiLU(), nn.Linear(5, 1))
    model = nn.Sequential(model, nn.Flatten(0)).eval()
    calls = []
    model.register_forward_hook(lambda *_: calls.append(1))
    state = {name: value.clone() for name, value in model.state_dict().items()}
    x = torch.randn(3, 4)
    before = x.clone()
    hessian_trace(model, x)
    assert calls == [1]
    assert not x.requires_grad
    torch.testing.assert_close(x, before, rtol=0, atol=0)
    torch.testing.assert_close(dict(model.state_dict()), state, rtol=0, atol=0)


@pytest.mark.parametrize("trace", WAYS)
def test_refusals(trace):
    x = torch.randn(3, 2)
    with pytest.raises(ValueError, match="chunk_size of at least 1, got 0"):
        hessian_trace(lambda x: x.sum(1), x, trace=trace, chunk_size=0)
    with pytest.raises(tw.ContractError, match="hessian_trace: energy"):
        hessian_trace(lambda x: x.sum(1, keepdim=True), x, trace=trace)
    with pytest.raises(ValueError, match="training mode"):
        hessian_trace(nn.Sequential(nn.BatchNorm1d(2), nn.Flatten()), x, trace=trace)
