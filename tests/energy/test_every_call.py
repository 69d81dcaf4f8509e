"""No call that an energy makes ends the process, and none is wrong without a word."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from termwise.energy import (
    _fallback,
    hessian_trace,
    score_matching_loss,
    sliced_score_matching_loss,
)


@pytest.fixture(autouse=True)
def no_energy_is_known():
    _fallback._warned.clear()
    _fallback._failed.clear()


SWEEP = Path(__file__).with_name("sweep_calls.py")
# Each function in three forms or more; in all of them, in half a minute, with TERMWISE_SWEEP=full.
STRIDE = "1" if os.environ.get("TERMWISE_SWEEP") == "full" else "8"


def test_every_function_of_torch_is_right_or_falls_back_and_the_process_lives():
    start, deaths, wrong, ended = 0, [], [], False
    while not ended:
        command = [sys.executable, str(SWEEP), str(start), "100000", STRIDE]
        child = subprocess.run(command, capture_output=True, text=True, timeout=600)
        lines = child.stdout.splitlines()
        wrong += [line for line in lines if line.startswith("wrong")]
        ended = child.returncode == 0
        if not ended:
            begun = [line for line in lines if line[:1].isdigit()]
            assert begun, child.stderr
            deaths.append(begun[-1])
            start = int(begun[-1].split()[0]) + 1
            assert len(deaths) < 5, deaths
    assert not deaths, deaths
    assert not wrong, wrong
    assert int(lines[-1].split()[1]) > 300  # calls that went through, and were compared


ENDED_THE_PROCESS = {
    "pow": lambda x: torch.pow(x, 2),
    "float_power": lambda x: torch.float_power(x, 2),
    "remainder": lambda x: torch.remainder(x, 2.0) ** 2,
    "xlogy": lambda x: torch.xlogy(x, 2.0) ** 2,
    "xlog1py": lambda x: torch.special.xlog1py(x, 2.0) ** 2,
    "as_tensor": lambda x: torch.as_tensor(x).square(),
    "asarray": lambda x: torch.asarray(x).square(),
}
OTHER = torch.tensor([[0.3, -1.2], [0.8, 0.4]], dtype=torch.float64)


def squares(x):
    return torch.stack(
        [torch.stack([2 + x[:, 0], x[:, 1]], 1), torch.stack([x[:, 1], 3 - x[:, 0] * x[:, 1]], 1)],
        1,
    )


MULTIVARIATE = torch.distributions.MultivariateNormal(
    torch.zeros(2, dtype=torch.float64), torch.tensor([[2.0, 0.3], [0.3, 1.0]], dtype=torch.float64)
)
MIXTURE = torch.distributions.MixtureSameFamily(
    torch.distributions.Categorical(logits=OTHER[0]),
    torch.distributions.Independent(torch.distributions.Normal(OTHER, OTHER.exp()), 1),
)
GOES_THROUGH = {
    "cast": lambda x: (x.float().sin().type(x.dtype) * x).square(),
    "baddbmm": lambda x: torch.baddbmm(squares(x), squares(x), squares(x)).flatten(1),
    "det": lambda x: torch.linalg.det(squares(x)).sin(),
    "logdet": lambda x: torch.logdet(squares(x) @ squares(x).mT),
    "solve": lambda x: torch.linalg.solve(squares(x), x),
    "cholesky": lambda x: torch.linalg.cholesky(squares(x) @ squares(x).mT).flatten(1),
    "multivariate normal": MULTIVARIATE.log_prob,
    "mixture": MIXTURE.log_prob,
    "norm": lambda x: torch.linalg.norm(x, dim=1),
    "cross_entropy": lambda x: F.cross_entropy(3 * x, x.argmax(1), reduction="none"),
    "channels_last": lambda x: F.silu(
        x.reshape(-1, 1, 1, 2).to(memory_format=torch.channels_last)
    ).flatten(1),
    "requires_grad_": lambda x: x.requires_grad_().sin(),
    "augmented": lambda x: torch.Tensor.add_(2 * x, x.sin()).mul_(x),
}  # fmt: skip


class Cube(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx, gradient):
        return 3 * gradient * ctx.saved_tensors[0] ** 2


class Straight(torch.autograd.Function):
    """An identity, with a gradient of its own."""

    @staticmethod
    def forward(x):
        return x

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, gradient):
        return 2 * gradient


class Looked(Cube):
    """With a backward that vmap cannot follow."""

    @staticmethod
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        return 3 * gradient * x**2 if float(gradient.detach().abs().sum()) else gradient


def under_no_grad(x):
    with torch.no_grad():
        factor = x.square()
    return factor * x.square()


FALLS_BACK = {
    "Function": (lambda x: Cube.apply(x) * x, "under no_grad"),
    "Function of identity": (lambda x: Straight.apply(x.sin()), "no_grad"),
    "Function with a look": (lambda x: Looked.apply(x) * x, "under no_grad"),
    "no_grad": (under_no_grad, "under no_grad"),
    "checkpoint": (
        lambda x: checkpoint(lambda h: (h @ OTHER).sin(), x, use_reentrant=False) * x,
        "takes tensors apart",
    ),
    "rrelu": (lambda x: F.rrelu(x).sin(), "rrelu"),
    "vmap": (lambda x: torch.vmap(lambda row: row.sin() * row[0])(x), "takes tensors apart"),
    "func.grad": (lambda x: torch.func.grad(lambda h: (h**3).sum())(x), "takes tensors apart"),
    "aten": (lambda x: torch.ops.aten.sin(x), "aten.sin"),
    "scripted": (torch.jit.trace(lambda x: x.sin() * x, OTHER), "TorchScript"),
    "written": (
        lambda x: torch.zeros_like(x).index_add_(0, torch.arange(len(x)), x.sin()),
        "index_add_",
    ),
    "special": (torch.special.erfcx, "erfcx"),
}  # fmt: skip


def by_loops(energy, x, weight):
    x = x.clone().requires_grad_()
    energies = energy(x)
    (score,) = torch.autograd.grad(energies.sum(), x, create_graph=True)
    rows = [
        torch.autograd.grad(score[:, i].sum(), x, create_graph=True)[0][:, i]
        for i in range(x.shape[1])
    ]
    trace = sum(rows)
    loss = (0.5 * score.square().sum(1) - trace).mean()
    return trace.detach(), loss.detach(), *torch.autograd.grad(loss, weight)


def problem_of(function):
    weight = torch.tensor([[1.0, 0.4], [-0.3, 0.8]], dtype=torch.float64, requires_grad=True)
    x = torch.tensor([[0.4, 0.7], [0.9, 0.2], [0.3, 1.1]], dtype=torch.float64)

    def energy(x):
        torch.manual_seed(0)
        out = function(x @ weight)
        out = out if out.ndim > 1 else out[:, None]
        return (out * torch.linspace(0.5, 1.5, out.shape[1], dtype=x.dtype)).sum(1)

    return energy, x, weight


def ours(energy, x, weight):
    trace = hessian_trace(energy, x).detach()
    loss = score_matching_loss(energy, x).loss
    return trace, loss.detach(), *torch.autograd.grad(loss, weight)


def sliced(energy, x, weight):
    """Along the axes, of length sqrt(d), it is score matching."""
    v = 2**0.5 * torch.eye(2, dtype=x.dtype)[:, None].expand(2, *x.shape)
    loss = sliced_score_matching_loss(energy, x, projections=v).loss
    return loss.detach(), *torch.autograd.grad(loss, weight)


@pytest.mark.parametrize("name", [*ENDED_THE_PROCESS, *GOES_THROUGH])
def test_what_goes_through_is_what_loops_give(name):
    function = ENDED_THE_PROCESS.get(name) or GOES_THROUGH[name]
    exact = 1e-5 if name == "cast" else 1e-9
    problem = problem_of(function)
    expected = by_loops(*problem)
    torch.testing.assert_close(ours(*problem), expected, rtol=exact, atol=exact)
    torch.testing.assert_close(sliced(*problem), expected[1:], rtol=exact, atol=exact)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("name", FALLS_BACK)
def test_what_does_not_is_differentiated_backward_and_said_once(name):
    function, cause = FALLS_BACK[name]
    problem = problem_of(function)
    expected = by_loops(*problem)
    with pytest.warns(UserWarning, match=cause):
        traced = hessian_trace(problem[0], problem[1]).detach()
    torch.testing.assert_close(traced, expected[0], rtol=1e-9, atol=1e-9)
    # A second warning would be an error here.
    torch.testing.assert_close(ours(*problem), expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(sliced(*problem), expected[1:], rtol=1e-9, atol=1e-9)


def test_each_energy_is_warned_of_for_itself():
    x = torch.rand(3, 2)
    for module in (Unknown(), Unknown()):
        with pytest.warns(UserWarning, match="erfcx"):
            hessian_trace(calling(module), x)
        with pytest.warns(UserWarning, match="erfcx"):
            hessian_trace(module, x)
        hessian_trace(calling(module), x)
        hessian_trace(module, x)  # a second warning would be an error here


def calling(module):
    return lambda x: module(x) + 0


class Unknown(torch.nn.Module):
    def forward(self, x):
        return torch.special.erfcx(x).sum(1)


@pytest.mark.parametrize("loss", [ours, sliced])
def test_saved_tensor_hooks_of_the_caller(loss):
    problem = problem_of(lambda x: (x @ OTHER).sin() * x)
    expected = loss(*problem)
    with torch.autograd.graph.save_on_cpu(), pytest.warns(UserWarning, match="saved-tensor hooks"):
        under = loss(*problem)
    torch.testing.assert_close(under, expected)


@pytest.mark.parametrize("loss", [ours, sliced])
@pytest.mark.parametrize("function", [torch.sin, Cube.apply])
@pytest.mark.filterwarnings("ignore")
def test_anomaly_mode_of_the_caller(loss, function):
    problem = problem_of(lambda x: function(x @ OTHER) * x)
    expected = loss(*problem)
    with torch.autograd.detect_anomaly():
        under = loss(*problem)
    torch.testing.assert_close(under, expected)


@pytest.mark.parametrize(
    "context", [torch.autograd.graph.save_on_cpu, torch.autograd.detect_anomaly]
)
@pytest.mark.parametrize("trace", ["reverse", "forward_over_reverse"])
@pytest.mark.filterwarnings("ignore")
def test_asked_for_ways_under_the_same_modes(context, trace):
    energy, x, _ = problem_of(torch.sin)
    with context():
        under = hessian_trace(energy, x, trace=trace)
    torch.testing.assert_close(under, hessian_trace(energy, x))


def test_what_is_written_in_place_is_no_other_tensor():
    def energy(x):
        h = x * 1
        before = h.detach()
        h.add_(1)  # which changes `before` too
        return (h * before).sum(1)

    x = torch.tensor([[0.4, 0.7]], dtype=torch.float64)
    with pytest.warns(UserWarning, match="shares its memory"):
        traced = hessian_trace(energy, x)
    torch.testing.assert_close(traced, hessian_trace(energy, x, trace="reverse"))


def test_an_energy_that_writes_to_its_input_is_refused_as_autograd_refuses_it():
    with pytest.raises(RuntimeError, match="leaf Variable"):
        hessian_trace(lambda x: x.add_(1).square().sum(1), torch.ones(2, 3))
