"""Flow matching: closed form of a Gaussian and its true field, modes, refusals."""

import copy

import pytest
import torch
from torch import Tensor, nn

import termwise as tw
from termwise.energy import FlowMatchingLoss, flow_matching_loss

EXACT = {"rtol": 1e-12, "atol": 1e-12}


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Pairs:
    """Independent Gaussian noise and data, as joint sigma points: means and covariances exact."""

    def __init__(self, d: int, time: float) -> None:
        root = normal(d, d, seed=1)
        noise_covariance = 0.7 * torch.eye(d, dtype=torch.float64)
        data_covariance = root @ root.T / d + 0.3 * torch.eye(d, dtype=torch.float64)
        means = normal(2 * d, seed=2)
        roots = torch.linalg.cholesky(torch.block_diag(noise_covariance, data_covariance))
        steps = (2 * d) ** 0.5 * roots.T
        self.x0, self.x1 = torch.cat([means + steps, means - steps]).split(d, 1)
        self.time = torch.full((4 * d,), time, dtype=torch.float64)
        self.drift = means[d:] - means[:d]
        self.spread = noise_covariance + data_covariance
        self.mean = (1 - time) * means[:d] + time * means[d:]
        self.covariance = (1 - time) ** 2 * noise_covariance + time**2 * data_covariance
        self.shared = time * data_covariance - (1 - time) * noise_covariance  # of path and point


@pytest.mark.parametrize("time", [0.0, 0.3, 0.8, 1.0])
def test_gaussian_paths_and_their_true_field(time):
    d = 3
    pairs = Pairs(d, time)

    def terms_of(mean, precision):
        def energy(x):
            return 0.5 * ((x - mean) @ precision * (x - mean)).sum(1)

        return flow_matching_loss(energy, pairs.x0, pairs.x1, pairs.time)

    root = normal(d, d, seed=3)
    leaves = (normal(d, seed=4).requires_grad_(), (root + root.T).requires_grad_())
    mean, precision = leaves
    terms = terms_of(*leaves)
    miss = precision @ (pairs.mean - mean) + pairs.drift
    through = precision @ pairs.covariance @ precision + 2 * precision @ pairs.shared
    exact = (through + pairs.spread).trace() + miss.square().sum()
    torch.testing.assert_close(terms.loss, exact, **EXACT)
    symmetric = torch.autograd.grad(terms.loss, leaves)
    expected = torch.autograd.grad(exact, leaves)
    for ours, theirs in zip(symmetric, expected, strict=True):
        ours, theirs = (g if g.ndim == 1 else g + g.T for g in (ours, theirs))
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-11)
    size = (pairs.drift.square().sum() + pairs.spread.trace()).item()
    assert terms.target_square.item() == pytest.approx(size)

    true_precision = -pairs.shared @ torch.linalg.inv(pairs.covariance)
    true_mean = pairs.mean + torch.linalg.solve(true_precision, pairs.drift)
    truth = (true_mean.requires_grad_(), true_precision.requires_grad_())
    terms = terms_of(*truth)
    for slope in torch.autograd.grad(terms.loss, truth):
        slope = slope if slope.ndim == 1 else slope + slope.T
        assert slope.abs().max() < 1e-12
    assert terms.cross.item() == pytest.approx(-2 * terms.velocity_square.item(), rel=1e-12)


def network(d: int = 3) -> nn.Module:
    return nn.Sequential(nn.Linear(d, 4), nn.Tanh(), nn.Linear(4, 1), nn.Flatten(0))


class Timed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.network = network(5)

    def forward(self, x, time):
        return self.network(torch.cat([x.flatten(1), time.to(x.dtype)[:, None]], 1))


def inputs():
    x0, x1 = normal(5, 2, 2).float(), normal(5, 2, 2, seed=1).float()
    return x0, x1, torch.tensor([0.0, 0.2, 0.5, 0.9, 1.0])


def test_the_module_gives_time_to_its_energy():
    loss_fn = FlowMatchingLoss(Timed(), sigma_min=0.1)
    assert "sigma_min=0.1" in repr(loss_fn)
    x0, x1, time = inputs()
    terms = loss_fn(x0, x1, time)
    function = flow_matching_loss(lambda x: loss_fn.energy(x, time), x0, x1, time, sigma_min=0.1)
    assert terms.metrics() == function.metrics()
    assert copy.deepcopy(loss_fn)(x0, x1, time).metrics() == function.metrics()
    terms.loss.backward()
    assert all(p.grad is not None for p in loss_fn.parameters())  # that of the last bias is 0
    with torch.autocast("cpu", torch.bfloat16):
        assert loss_fn(x0, x1, time).metrics() == function.metrics()


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_grad_mode_the_terms_are_the_same(mode):
    loss_fn, tensors = FlowMatchingLoss(Timed()), inputs()
    expected = loss_fn(*tensors).metrics()
    with mode():
        terms = loss_fn(*tensors)
    assert not terms.loss.requires_grad
    assert terms.metrics() == pytest.approx(expected, rel=1e-6)
    loss_fn.requires_grad_(False)
    assert loss_fn(*tensors).metrics() == pytest.approx(expected, rel=1e-6)


def test_half_precision():
    loss_fn = FlowMatchingLoss(Timed())
    x0, x1, time = inputs()
    expected = loss_fn(x0, x1, time).metrics()
    terms = loss_fn.bfloat16()(x0.bfloat16(), x1.bfloat16(), time)
    assert {value.dtype for _, value in terms.items()} == {torch.float32}
    assert terms.metrics() == pytest.approx(expected, rel=0.05, abs=0.05)
    terms.loss.backward()


def test_compiled_vmapped_and_differentiated_by_torch_func():
    loss_fn = FlowMatchingLoss(Timed())
    x0, x1, time = inputs()
    eager = loss_fn(x0, x1, time)
    compiled = torch.compile(loss_fn, fullgraph=True, backend="aot_eager")(x0, x1, time)
    assert compiled.metrics() == pytest.approx(eager.metrics(), rel=1e-5)
    many = torch.vmap(loss_fn, in_dims=(0, None, None))(torch.stack([x0, x1]), x1, time)
    assert many.loss[0].item() == pytest.approx(eager.loss.item(), rel=1e-5)
    names = dict(loss_fn.named_parameters())

    def pair(parameters):
        terms = torch.func.functional_call(loss_fn, parameters, (x0, x1, time))
        return terms.loss, terms

    slopes, terms = torch.func.grad(pair, has_aux=True)(names)
    assert terms.metrics() == pytest.approx(eager.metrics(), rel=1e-5)
    expected = torch.autograd.grad(eager.loss, list(names.values()))
    torch.testing.assert_close(list(slopes.values()), list(expected))


def test_a_compiled_model_in_the_module():
    loss_fn = FlowMatchingLoss(Timed())
    tensors = inputs()
    expected = loss_fn(*tensors).metrics()
    loss_fn.energy = torch.compile(loss_fn.energy, backend="aot_eager")
    terms = loss_fn(*tensors)
    terms.loss.backward()
    assert terms.metrics() == pytest.approx(expected, rel=1e-5)


def test_refusals():
    x0, x1, time = inputs()
    with pytest.raises(tw.ContractError, match=r"x1 needs .* axis batch is 4, but it is 5 in x0"):
        flow_matching_loss(lambda x: x.flatten(1).sum(1), x0, x1[:4], time)
    with pytest.raises(tw.ContractError, match="time needs"):
        flow_matching_loss(lambda x: x.flatten(1).sum(1), x0, x1, time[:, None])
    with pytest.raises(tw.ContractError, match=r"energy\(x_t\) needs Float"):
        flow_matching_loss(lambda x: x, x0, x1, time)
    with pytest.raises(ValueError, match=r"needs sigma_min in \[0, 1\], got 1.5"):
        flow_matching_loss(lambda x: x.flatten(1).sum(1), x0, x1, time, sigma_min=1.5)
    with pytest.raises(ValueError, match="can be differentiated by x_t"):
        flow_matching_loss(lambda x: x.detach().flatten(1).sum(1), x0, x1, time)
    coupled = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(4), nn.Linear(4, 1), nn.Flatten(0))
    with pytest.raises(ValueError, match="needs energies of each row alone, got BatchNorm1d"):
        flow_matching_loss(coupled, x0, x1, time)
    flow_matching_loss(coupled.eval(), x0, x1, time)
