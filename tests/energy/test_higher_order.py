"""Third derivatives: parameter gradients of score matching against differences of first ones."""

import functools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from termwise.energy import hessian_trace, score_matching_loss
from termwise.energy._higher_order import higher_order_safe


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(5, 5)  # a parameter before the norm: the third derivative counts
        self.norm, self.up, self.down = nn.LayerNorm(5), nn.Linear(5, 6), nn.Linear(6, 5)

    def forward(self, x):
        x = self.embed(x)
        return (x + self.down(F.gelu(self.up(self.norm(x))))).square().sum(1)


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, x):
        mixed, _ = self.attention(x, x, x, need_weights=False)
        return torch.sin(x + mixed).sum((1, 2))


class Convolution(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(1, 2, 3, padding=1), nn.Conv2d(2, 1, 2)
        self.norm = nn.InstanceNorm2d(2, affine=True)

    def forward(self, x):
        return self.second(F.silu(self.norm(self.first(x)))).square().flatten(1).sum(1)


def energies():
    torch.manual_seed(0)
    mlp = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 1), nn.Flatten(0))
    return {
        "mlp": (mlp, (3, 4)),
        "convolution": (Convolution(), (2, 1, 3, 3)),
        "residual": (Residual(), (3, 5)),
        "attention": (Attention(), (2, 3, 4)),
    }


def by_differences(model, x):
    """Score matching from first derivatives alone, which are right."""

    def score(x):
        x = x.detach().requires_grad_()
        return torch.autograd.grad(model(x).sum(), x)[0].flatten(1)

    h, d = 1e-3, x[0].numel()
    trace = 0
    for i in range(d):
        step = h * F.one_hot(torch.tensor(i), d).to(x).reshape(x.shape[1:])
        near = score(x + step) - score(x - step)
        far = score(x + 2 * step) - score(x - 2 * step)
        trace = trace + (8 * near - far)[:, i] / (12 * h)
    return (0.5 * score(x).square().sum(1) - trace).mean()


def slopes(model, x, directions):
    """Derivatives of `by_differences` along directions in the space of all parameters."""
    parameters = [*model.parameters()]
    start = nn.utils.parameters_to_vector(parameters).detach()
    found, h = [], 1e-3
    for direction in directions:
        values = []
        for step in (-2, -1, 1, 2):
            nn.utils.vector_to_parameters(start + step * h * direction, parameters)
            values.append(by_differences(model, x))
        found.append((8 * (values[2] - values[1]) - (values[3] - values[0])) / (12 * h))
    nn.utils.vector_to_parameters(start, parameters)
    return torch.stack(found)


@functools.cache
def problem(name):
    """Give a model, data, directions and the derivatives along them."""
    model, shape = energies()[name]
    model = model.double()
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    parameters = [*model.parameters()]
    size = sum(p.numel() for p in parameters)
    directions = torch.randn(2, size, generator=generator, dtype=torch.float64)
    directions = directions / directions.norm(dim=1, keepdim=True)
    return model, x, directions, slopes(model, x, directions)


def error_of(name, **options):
    model, x, directions, expected = problem(name)
    parameters = [*model.parameters()]
    loss = score_matching_loss(model, x, **options).loss
    torch.testing.assert_close(loss.detach(), by_differences(model, x), rtol=1e-7, atol=1e-8)
    gradient = torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)
    ours = directions @ torch.cat([part.flatten() for part in gradient])
    return ((ours - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("name", ["mlp", "convolution", "residual", "attention"])
@pytest.mark.parametrize("trace", ["forward_laplacian", "reverse", "forward_over_reverse"])
def test_gradients_are_those_of_first_derivatives_differences(name, trace):
    assert error_of(name, trace=trace) < 1e-6


@pytest.mark.parametrize("name", ["residual", "convolution"])
def test_without_it_torch_is_wrong_silently(name):
    # The day that this fails, torch's layer_norm and instance_norm are right and need no stand-in.
    assert error_of(name, trace="reverse", higher_order_safe=False) > 0.02


def test_without_it_fused_attention_has_no_second_derivative():
    model, shape = energies()["attention"]
    x = torch.randn(shape)
    with pytest.raises(RuntimeError, match="not implemented"):
        score_matching_loss(model, x, trace="reverse", higher_order_safe=False)


def blind(shape):
    mask = torch.ones(shape, dtype=torch.bool)
    mask[0] = False
    return mask


MASK = torch.tensor([[0.0, -1.0, -torch.inf], [0.3, 0.1, 0.0], [0.0, -torch.inf, 1.0]])
FUNCTIONS = {
    "layer_norm": (lambda x: F.layer_norm(x, (4,), x.new_ones(4), x.new_ones(4)), (2, 4)),
    "torch.layer_norm": (lambda x: torch.layer_norm(x, (4,)), (2, 4)),
    "rms_norm": (lambda x: F.rms_norm(x, (4,)), (2, 4)),
    "group_norm": (lambda x: F.group_norm(x, 2, x.new_ones(4), x.new_ones(4)), (2, 4, 3)),
    "instance_norm": (F.instance_norm, (2, 3, 4)),
    "torch.instance_norm": (
        lambda x: torch.instance_norm(x, None, None, None, None, True, 0.1, 1e-5, False),
        (2, 3, 4),
    ),
    "batch_norm": (lambda x: F.batch_norm(x, x.new_ones(4), x.new_full((4,), 2.0)), (2, 4)),
    "attention": (lambda x: F.scaled_dot_product_attention(x, x, x.sin()), (1, 2, 3, 4)),
    "causal": (lambda x: F.scaled_dot_product_attention(x, x, x, is_causal=True), (1, 1, 3, 4)),
    "blind": (lambda x: F.scaled_dot_product_attention(x, x, x, blind((3, 3))), (1, 1, 3, 4)),
    "blind in one head": (
        lambda x: F.scaled_dot_product_attention(
            x, x, x, torch.stack([blind((3, 3)), blind((3, 3)).mT])
        ),
        (1, 2, 3, 4),
    ),
    "biased": (
        lambda x: F.scaled_dot_product_attention(x, x, x, MASK.to(x), scale=0.3),
        (1, 1, 3, 4),
    ),
    "grouped": (
        lambda x: F.scaled_dot_product_attention(x, x[:, :1], x[:, :1], enable_gqa=True),
        (1, 2, 3, 4),
    ),
    "cdist": (lambda x: torch.cdist(x, x[:1].detach() + 1), (3, 4)),
    "hardsigmoid": (F.hardsigmoid, (2, 4)),
    "prod": (lambda x: torch.prod(x, 1) * x.prod(0, keepdim=True)[:, 0], (3, 5)),
    "prod of all": (lambda x: x.prod(dtype=torch.float64), (3, 5)),
    "cumprod": (lambda x: torch.cumprod(x, 0) * x.cumprod(1), (3, 5)),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_stand_in_is_what_it_stands_for(name):
    function, shape = FUNCTIONS[name]
    torch.manual_seed(0)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    expected = function(x)
    with higher_order_safe():
        ours = function(x)
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-13)
    weight = torch.randn_like(expected)
    gradients = [torch.autograd.grad((y * weight).sum(), x)[0] for y in (ours, expected)]
    exact = 1e-7 if name == "hardsigmoid" else 1e-10  # torch's own 1/6 is a float32
    torch.testing.assert_close(*gradients, rtol=exact, atol=1e-11)


@pytest.mark.parametrize("function", [torch.prod, torch.cumprod])
def test_third_derivatives_of_products_beside_zeros_are_right(function):
    # One factor is 1e-7 of the others. As written: a product of elements, all derivatives of it.
    x = torch.tensor([[1e-7, 0.7, 1.3], [2.0, 1e-7, -0.5]], dtype=torch.float64)
    weight = torch.tensor([0.3, -1.2, 0.8], dtype=torch.float64, requires_grad=True)

    def gradient(product):
        loss = score_matching_loss(lambda x: product(x * weight).sin(), x, trace="reverse").loss
        return torch.autograd.grad(loss, weight)

    def ours(h):
        h = function(h, 1)
        return h if h.ndim == 1 else h[:, 2]

    torch.testing.assert_close(gradient(ours), gradient(lambda h: h[:, 0] * h[:, 1] * h[:, 2]))


@pytest.mark.parametrize("trace", ["forward_laplacian", "reverse", "forward_over_reverse"])
def test_statistics_of_the_batch_are_refused_wherever_they_are_taken(trace):
    def energy(x):
        return F.batch_norm(x, None, None, training=True).square().sum(1)

    with pytest.raises(ValueError, match="couples the rows"):
        hessian_trace(energy, torch.randn(4, 3), trace=trace)


def test_half_precision_normalises_in_single():
    x = torch.randn(4, 64).bfloat16() + 8
    with higher_order_safe():
        ours = F.layer_norm(x, (64,))
    assert ours.dtype == torch.bfloat16
    torch.testing.assert_close(ours, F.layer_norm(x.float(), (64,)).bfloat16())


def test_an_energy_compiled_by_its_user_has_right_gradients():
    model, shape = energies()["residual"]
    x = torch.randn(shape)
    expected = torch.autograd.grad(score_matching_loss(model, x).loss, model.up.weight)
    compiled = torch.compile(model, backend="aot_eager")
    for trace in ("forward_laplacian", "reverse", "forward_over_reverse"):
        loss = score_matching_loss(compiled, x, trace=trace).loss
        torch.testing.assert_close(torch.autograd.grad(loss, model.up.weight), expected)
