"""Losses that differentiate a gradient once more, of energies that torch alone cannot."""

import functools
import inspect
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

import termwise as tw
from termwise import energy


def attention(q, k, v):
    return (q @ k.mT / math.sqrt(q.shape[-1])).softmax(-1) @ v


def layer_norm(x, shape, weight, bias):
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight + bias


def distances(x, y):
    return (x[..., :, None, :] - y[..., None, :, :]).square().sum(-1).sqrt()


def fused(q, k, v):
    return F.scaled_dot_product_attention(q, k, v)


class Tokens(nn.Module):
    """An energy of a row of tokens: attention, a norm and distances, torch's own or written out."""

    def __init__(self, written: bool = False) -> None:
        super().__init__()
        self.embed, self.norm = nn.Linear(4, 4), nn.LayerNorm(4)
        self.anchors = nn.Parameter(torch.randn(2, 4))
        self.attend = attention if written else fused
        self.normalise = layer_norm if written else F.layer_norm
        self.distance = distances if written else torch.cdist

    def forward(self, x):
        h = self.normalise(self.embed(x), (4,), self.norm.weight, self.norm.bias)
        h = h + self.attend(h[:, None], h[:, None].sin(), h[:, None])[:, 0]
        return h.sin().sum((1, 2)) + self.distance(h, self.anchors.expand(len(h), 2, 4)).sum((1, 2))


class AtTime(Tokens):
    def forward(self, x, time):
        return super().forward(x * (1 + time[:, None, None]))


def models(kind=Tokens):
    torch.manual_seed(0)
    ours, written = kind().double(), kind(written=True).double()
    written.load_state_dict(ours.state_dict())
    return ours, written


def inputs():
    generator = torch.Generator().manual_seed(1)
    x, y, z = torch.randn(3, 2, 3, 4, generator=generator, dtype=torch.float64)
    return x, y, z, torch.tensor([0.3, 0.9], dtype=torch.float64)


X, Y, Z, TIME = inputs()
CHAINS = {"steps": 2, "step_size": 0.1, "noise_scale": 0.0}
FUNCTIONS = {
    "denoising": functools.partial(energy.denoising_score_matching_loss, sigma=0.3, noise=Y),
    "antithetic": functools.partial(
        energy.denoising_score_matching_loss, sigma=0.3, noise=Y, antithetic=True
    ),
    "flow": functools.partial(energy.flow_matching_loss, x1=Y, time=TIME),
    "equilibrium": functools.partial(energy.equilibrium_matching_loss, x1=Y, time=TIME),
    "energy matching": functools.partial(energy.energy_matching_loss, x1=Y, time=TIME, negatives=Z),
    "gradient penalty": functools.partial(energy.gradient_penalty, target=0.5),
}


def of_the_kl_term(model, x, **options):
    samples = energy.langevin(model, x, differentiable_steps=1, **CHAINS, **options)
    return energy.contrastive_divergence_kl_term(model, samples)


FUNCTIONS["kl term"] = of_the_kl_term


def loss_and_gradients(run, model, *args, **options):
    loss = run(model, *args, **options).loss
    return loss, torch.autograd.grad(loss, [*model.parameters()])


def assert_same(ours, theirs, rtol=1e-9, atol=1e-9):
    torch.testing.assert_close(ours, theirs, rtol=rtol, atol=atol)


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("differentiation", ["autograd", "func"])
def test_an_energy_with_attention_trains(name, differentiation):
    ours, written = models()
    run = FUNCTIONS[name]
    options = {} if name == "kl term" else {"differentiation": differentiation}
    assert_same(
        loss_and_gradients(run, ours, X, **options),
        loss_and_gradients(run, written, X, higher_order_safe=False, **options),
    )


@pytest.mark.parametrize("name", FUNCTIONS)
def test_without_the_swap_torch_refuses(name):
    with pytest.raises(RuntimeError, match="not implemented"):
        loss_and_gradients(FUNCTIONS[name], models()[0], X, higher_order_safe=False)


MODULES = {
    "denoising": (functools.partial(energy.DenoisingScoreMatchingLoss, sigma=0.3), (X,)),
    "flow": (energy.FlowMatchingLoss, (X, Y, TIME)),
    "equilibrium": (energy.EquilibriumMatchingLoss, (X, Y, TIME)),
    "energy matching": (energy.EnergyMatchingLoss, (X, Y, TIME, Z)),
    "gradient penalty": (energy.GradientPenalty, (X,)),
}


@pytest.mark.parametrize("name", MODULES)
def test_a_module_takes_the_argument(name):
    kind, tensors = MODULES[name]
    noise = {"noise": Y} if name == "denoising" else {}
    ours, written = models(AtTime if name == "flow" else Tokens)
    results = [kind(model)(*tensors, **noise).loss for model in (ours, written)]
    assert_same(*results)
    results[0].backward()
    with pytest.raises(RuntimeError, match="not implemented"):
        kind(ours, higher_order_safe=False)(*tensors, **noise).loss.backward()


def takes(function, name):
    return name in inspect.signature(function).parameters


def test_every_loss_that_differentiates_an_energy_by_its_input_takes_it():
    """The term of the kl alone does not: it holds the gradient, and refuses a second derivative."""
    public = [value for value in vars(energy).values() if getattr(value, "__module__", "")]
    functions = [value for value in public if inspect.isfunction(value)]
    asked = [
        f for f in functions if takes(f, "differentiation") or takes(f, "differentiable_steps")
    ]
    without = [f.__name__ for f in asked if not takes(f, "higher_order_safe")]
    assert without == ["contrastive_divergence_kl_term"]
    modules = [m for m in public if isinstance(m, type) and issubclass(m, nn.Module)]
    asked = [m for m in modules if takes(m.forward, "differentiation")]
    without = [m.__name__ for m in asked if not takes(m, "higher_order_safe")]
    # Sliced score matching's module is always safe.
    assert set(without) <= {"ContrastiveDivergenceKLTerm", "SlicedScoreMatchingLoss"}


def test_the_second_derivative_of_a_loss_is_right_where_torchs_layer_norm_is_not():
    """A second derivative by the parameters takes the third one of the norm."""
    torch.manual_seed(0)
    first, norm = nn.Linear(5, 5).double(), nn.LayerNorm(5).double()
    weight = first.weight
    x, noise = torch.randn(2, 3, 5, dtype=torch.float64)

    def second(normalise, **options):
        def model(x):
            return normalise(first(x), (5,), norm.weight, norm.bias).sin().sum(1)

        terms = energy.denoising_score_matching_loss(model, x, sigma=0.3, noise=noise, **options)
        (gradient,) = torch.autograd.grad(terms.loss, weight, create_graph=True)
        return torch.autograd.grad(gradient.sin().sum(), weight)[0]

    right = second(layer_norm)
    assert_same(second(F.layer_norm), right)
    # The day that this fails, torch's own is right.
    wrong = second(F.layer_norm, higher_order_safe=False)
    assert ((wrong - right).norm() / right.norm()).item() == pytest.approx(0.654, abs=0.001)


def test_under_a_checkpoint_what_can_be_is_recomputed_and_the_rest_is_refused_by_name():
    torch.manual_seed(0)
    first = nn.Linear(4, 4)
    x, noise = torch.randn(2, 2, 3, 4)

    def parts(function, recompute):
        def model(x):
            inner = lambda y: function(first(y)).sin()  # noqa: E731
            return (checkpoint(inner, x, use_reentrant=False) if recompute else inner(x)).sum(
                (1, 2)
            )

        return model

    def gradient(function, recompute, **options):
        model = parts(function, recompute)
        terms = energy.denoising_score_matching_loss(model, x, sigma=0.3, noise=noise, **options)
        return torch.autograd.grad(terms.loss, first.weight)[0]

    def norm(y):
        return F.layer_norm(y, (4,))

    assert_same(gradient(norm, True), gradient(norm, False), 1e-5, 1e-5)

    def attend(y):
        return fused(y, y, y)

    said = (
        "^denoising_score_matching_loss needs scaled_dot_product_attention outside "
        "torch.utils.checkpoint, .* pass higher_order_safe=False$"
    )
    with pytest.raises(NotImplementedError, match=said):
        gradient(attend, True)

    def by_products(y):
        with sdpa_kernel(SDPBackend.MATH):
            return attend(y)

    advised = gradient(by_products, True, higher_order_safe=False)
    assert_same(advised, gradient(attend, False), 1e-4, 1e-4)

    def coupled(y):
        return F.batch_norm(y.flatten(1), None, None, training=True).view_as(y)

    for recompute in (True, False):
        with pytest.raises(
            ValueError, match="^denoising_score_matching_loss needs energies of each"
        ):
            gradient(coupled, recompute)


@pytest.mark.parametrize("trace", ["forward_laplacian", "reverse", "forward_over_reverse", None])
@pytest.mark.parametrize("name", ["scaled_dot_product_attention", "layer_norm", "cdist", "tanh"])
@pytest.mark.filterwarnings("ignore:score_matching_loss|sliced_score_matching_loss")
@pytest.mark.filterwarnings("ignore:.*jit.script:DeprecationWarning")
def test_score_matching_under_a_checkpoint_is_right_or_refused_by_name(name, trace):
    torch.manual_seed(0)
    weight = torch.randn(4, 4, dtype=torch.float64, requires_grad=True)
    x = torch.randn(3, 4, dtype=torch.float64)
    functions = {
        "scaled_dot_product_attention": lambda h: fused(*[h.reshape(-1, 1, 2, 2)] * 3).reshape(
            3, 4
        ),
        "layer_norm": lambda h: F.layer_norm(h, (4,)),
        "cdist": lambda h: torch.cdist(h, weight),
        "tanh": torch.tanh,
    }

    def inner(x):
        return functions[name](x @ weight)

    def gradient(function):
        def model(x):
            return function(x).sin().square().sum(1)

        if trace is None:
            terms = energy.sliced_score_matching_loss(model, x, projections=x.sign()[None])
        else:
            terms = energy.score_matching_loss(model, x, trace=trace)
        return terms.loss.detach(), *torch.autograd.grad(terms.loss, weight)

    def recomputed(x):
        return checkpoint(inner, x, use_reentrant=False)

    if name == "tanh":
        torch.testing.assert_close(gradient(recomputed), gradient(inner))
        return
    said = f"score_matching_loss needs {name} outside torch.utils.checkpoint"
    with pytest.raises(NotImplementedError, match=said):
        gradient(recomputed)


def test_steps_of_a_chain_that_leave_the_graph_run_on_torchs_own():
    """Sampling stays as fast, and to the bit, as without a swap."""
    ours, _ = models()
    plain = energy.langevin(ours, X, higher_order_safe=False, **CHAINS)
    assert torch.equal(energy.langevin(ours, X, **CHAINS), plain)
    kept = energy.langevin(ours, X, differentiable_steps=1, **CHAINS)
    assert kept.requires_grad
    assert_same(kept.detach(), plain)
    assert isinstance(energy.flow_matching_loss(ours, X, Y, TIME), tw.Terms)
