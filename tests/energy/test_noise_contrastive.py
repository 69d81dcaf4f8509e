"""Noise-contrastive estimation: closed forms, recovery of log Z, refusals."""

import copy
import math

import pytest
import torch
from torch import Tensor, nn

import termwise as tw
from termwise.energy import NoiseContrastiveLoss, noise_contrastive_loss

EXACT = {"rtol": 1e-12, "atol": 1e-12}


def log_z_of(problem) -> Tensor:
    precision = (problem.precision + problem.precision.T) / 2
    return 0.5 * (len(precision) * math.log(2 * math.pi) - torch.logdet(precision))


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize(
    ("nu", "value"), [(1, 2 * math.log(2)), (2, math.log(3) + 2 * math.log(1.5))]
)
def test_noise_of_the_model_itself(make_gaussian, nu, value):
    problem = make_gaussian(3, 1)
    x, noise = normal(4, 3), normal(4 * nu, 3, seed=1)
    log_z = log_z_of(problem).detach().requires_grad_()
    with torch.no_grad():
        log_q = [-problem.energy(rows) - log_z for rows in (x, noise)]
    terms = noise_contrastive_loss(
        problem.energy, x, noise, log_noise_x=log_q[0], log_noise_noise=log_q[1], log_z=log_z
    )
    assert terms.loss.item() == pytest.approx(value, rel=1e-13)
    assert terms.data.item() == pytest.approx(math.log(1 + nu), rel=1e-13)
    # d loss / d log Z is how many more data than noise are taken for what they are not: none.
    (slope,) = torch.autograd.grad(terms.loss, log_z)
    assert abs(slope.item()) < 1e-15


@pytest.mark.parametrize("nu", [1, 2, 3])
def test_the_true_gaussian_is_stationary(make_gaussian, nu):
    """With noise of the true density the gradient asks for first and second moments alone."""
    problem = make_gaussian(3, 2, at_the_truth=True)
    log_z = log_z_of(problem).detach().requires_grad_()
    noise = problem.x.repeat(nu, 1)
    with torch.no_grad():
        log_q = [-problem.energy(rows) - log_z for rows in (problem.x, noise)]

    def slopes(**changes):
        options = {"log_noise_x": log_q[0], "log_noise_noise": log_q[1], "log_z": log_z, **changes}
        loss = noise_contrastive_loss(problem.energy, problem.x, noise, **options).loss
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, [*problem.leaves, log_z])])

    assert slopes().abs().max() < 1e-13
    without = {"log_noise_x": 0 * log_q[0], "log_noise_noise": 0 * log_q[1]}
    assert slopes(**without).abs().max() > 1e-2
    assert slopes(log_z=log_z + 0.1).abs().max() > 1e-3


@pytest.mark.parametrize("d", [1, 2])
def test_lbfgs_finds_the_gaussian_and_its_log_z(make_gaussian, d):
    """A grid stands for space: data weigh as the true density, noise has a density in steps."""
    truth = make_gaussian(d, 4, at_the_truth=True)
    line = torch.linspace(-14, 14, 47, dtype=torch.float64)
    grid = torch.cartesian_prod(*[line] * d).reshape(-1, d)
    cell = (line[1] - line[0]) ** d
    with torch.no_grad():
        weights = (-truth.energy(grid)).exp()
        times = 1 + 2 * ((grid - truth.data_mean).norm(dim=1) < 2)
        noise = grid.repeat_interleave(times, dim=0)
        log_q = (times / (times.sum() * cell)).log()
    model = make_gaussian(d, 5)
    log_z = torch.zeros((), dtype=torch.float64, requires_grad=True)
    parameters = [*model.leaves, log_z]
    optimizer = torch.optim.LBFGS(
        parameters,
        max_iter=150,
        tolerance_grad=1e-13,
        tolerance_change=0,
        line_search_fn="strong_wolfe",
    )

    def closure():
        optimizer.zero_grad()
        loss = noise_contrastive_loss(
            model.energy,
            grid,
            noise,
            log_noise_x=log_q,
            log_noise_noise=log_q.repeat_interleave(times),
            log_z=log_z,
            weights=weights,
        ).loss
        loss.backward()
        return loss

    optimizer.step(closure)
    # The grid's own truth: on it the sum of exp(-E) is the integral to the last digits.
    near = {"rtol": 1e-6, "atol": 1e-6}
    torch.testing.assert_close(model.mean, truth.mean, **near)
    symmetric = (model.precision + model.precision.T) / 2
    torch.testing.assert_close(symmetric, truth.precision, **near)
    torch.testing.assert_close(log_z, log_z_of(truth), **near)


def leaves(batch, m, seed):
    shapes = [(batch,), (m,), (batch,), (m,), ()]
    drawn = [normal(*shape, seed=seed + i) for i, shape in enumerate(shapes)]
    drawn.append(normal(batch, seed=seed + 9).abs() + 0.1)
    return [tensor.requires_grad_() for tensor in drawn]


def called(table_x, table_noise, log_q_x, log_q_noise, log_z, weights):
    """Free energies of every row: rows carry their energy as their one coordinate."""
    return noise_contrastive_loss(
        lambda x: x[:, 0],
        table_x[:, None],
        table_noise[:, None],
        log_noise_x=log_q_x,
        log_noise_noise=log_q_noise,
        log_z=log_z,
        weights=weights,
    )


def test_a_tie_is_half_right_and_nan_is_not_an_answer():
    zeros = torch.zeros(3, dtype=torch.float64)
    none = torch.zeros((), dtype=torch.float64)
    assert called(zeros, zeros, zeros, zeros, none, None).accuracy.item() == 0.5
    bad = torch.tensor([0, math.nan, 0], dtype=torch.float64)
    assert called(zeros, bad, zeros, zeros, none, None).accuracy.isnan()
    # Extreme odds neither overflow nor lose the answer.
    far = called(zeros - 1e4, zeros + 1e4, zeros, zeros, none, None)
    assert far.metrics() == {"loss": 0, "data": 0, "noise": 0, "accuracy": 1, "log_z": 0}
    wrong = called(zeros + 1e4, zeros - 1e4, zeros, zeros, none, None)
    assert wrong.metrics()["loss"] == 2e4


def test_without_rows_the_terms_are_nan():
    full, empty = torch.zeros(3), torch.zeros(0)
    for x, noise in ((full, empty), (empty, full), (empty, empty)):
        assert called(x, noise, x, noise, torch.zeros(()), None).loss.isnan()


def test_integer_images_of_any_event_shape():
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 1), nn.Flatten(0)).double()
    x, noise = normal(4, 3, 2, 2), normal(6, 3, 2, 2, seed=1)
    options = {"log_noise_x": normal(4), "log_noise_noise": normal(6)}
    loss_fn = NoiseContrastiveLoss(model, log_z=0.5)
    terms = loss_fn(x, noise, **options)
    flat = called(model(x), model(noise), *options.values(), torch.tensor(0.5), None)
    torch.testing.assert_close(dict(terms.items()), dict(flat.items()), check_dtype=False, **EXACT)
    terms.loss.backward()
    assert all(p.grad is not None for p in loss_fn.parameters())


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1), nn.Flatten(0))


def inputs(dtype=torch.float32):
    x, noise = normal(5, 3).to(dtype), normal(7, 3, seed=1).to(dtype)
    return (x, noise), {"log_noise_x": normal(5).float(), "log_noise_noise": normal(7).float()}


def test_the_module_owns_log_z():
    loss_fn = NoiseContrastiveLoss(network(), log_z=1.5)
    assert loss_fn.log_z.shape == ()
    assert "log_z" in dict(loss_fn.named_parameters())
    assert len(list(loss_fn.parameters())) == 5
    fixed = NoiseContrastiveLoss(network(), log_z=1.5, learn_log_z=False)
    assert "log_z" not in dict(fixed.named_parameters())
    assert fixed.state_dict()["log_z"].item() == loss_fn.state_dict()["log_z"].item() == 1.5
    assert "learn_log_z=False" in repr(fixed)
    rows, options = inputs()
    terms, again = loss_fn(*rows, **options), copy.deepcopy(loss_fn)(*rows, **options)
    assert terms.metrics() == again.metrics()
    function = noise_contrastive_loss(loss_fn.energy, *rows, **options, log_z=torch.tensor(1.5))
    assert terms.metrics() == function.metrics()


def test_the_log_z_that_was_logged_stays():
    loss_fn = NoiseContrastiveLoss(network(), log_z=1.5)
    rows, options = inputs()
    terms = loss_fn(*rows, **options)
    with torch.no_grad():
        loss_fn.log_z.add_(1)
    assert terms.log_z.item() == 1.5


def test_the_noise_is_not_detached_and_nothing_else_is_touched():
    model = network()
    (x, noise), options = inputs()
    noise.requires_grad_()
    before = torch.get_rng_state()
    noise_contrastive_loss(model, x, noise, **options, log_z=torch.zeros(())).loss.backward()
    assert noise.grad is not None
    assert not x.requires_grad
    assert torch.equal(before, torch.get_rng_state())


def test_half_precision_and_autocast():
    model = network().bfloat16()
    rows, options = inputs(torch.bfloat16)
    terms = noise_contrastive_loss(model, *rows, **options, log_z=torch.zeros(()))
    assert {value.dtype for _, value in terms.items()} == {torch.float32}
    with torch.no_grad():
        tables = [model(r).float() for r in rows]
    expected = called(*tables, *options.values(), torch.zeros(()), None)
    assert terms.metrics() == pytest.approx(expected.metrics(), rel=1e-6)
    model, (rows, options) = network(), inputs()
    plain = noise_contrastive_loss(model, *rows, **options, log_z=torch.zeros(()))
    with torch.autocast("cpu", torch.bfloat16):
        cast = noise_contrastive_loss(model, *rows, **options, log_z=torch.zeros(()))
    assert cast.metrics() == plain.metrics()


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_grad_mode_the_terms_are_the_same(mode):
    loss_fn = NoiseContrastiveLoss(network())
    rows, options = inputs()
    with mode():
        quiet = loss_fn(*rows, **options)
    assert not quiet.loss.requires_grad
    assert quiet.metrics() == loss_fn(*rows, **options).metrics()


def test_compiled_vmapped_and_differentiated_by_torch_func():
    model = network()
    rows, options = inputs()

    def of(log_z):
        return noise_contrastive_loss(model, *rows, **options, log_z=log_z)

    compiled = torch.compile(of, fullgraph=True, backend="aot_eager")(torch.tensor(0.3))
    assert compiled.metrics() == pytest.approx(of(torch.tensor(0.3)).metrics())
    many = torch.vmap(of)(torch.tensor([0.0, 0.3]))
    assert many.loss[1].item() == pytest.approx(of(torch.tensor(0.3)).loss.item())

    def pair(log_z):
        terms = of(log_z)
        return terms.loss, terms

    slope, terms = torch.func.grad(pair, has_aux=True)(torch.tensor(0.3))
    assert terms.metrics() == pytest.approx(of(torch.tensor(0.3)).metrics())
    log_z = torch.tensor(0.3, requires_grad=True)
    torch.testing.assert_close(slope, torch.autograd.grad(of(log_z).loss, log_z)[0])


def test_refusals():
    (x, noise), options = inputs()
    log_z = torch.zeros(())
    with pytest.raises(tw.ContractError, match=r'energy\(x\) needs Float\[Tensor, " batch"\]'):
        noise_contrastive_loss(lambda x: x[:, :1], x, noise, **options, log_z=log_z)
    with pytest.raises(tw.ContractError, match="log_z needs"):
        noise_contrastive_loss(network(), x, noise, **options, log_z=torch.zeros(1))
    with pytest.raises(tw.ContractError, match="log_noise_noise needs"):
        noise_contrastive_loss(
            network(),
            x,
            noise,
            log_noise_x=options["log_noise_x"],
            log_noise_noise=options["log_noise_noise"][:5],
            log_z=log_z,
        )
    with pytest.raises(tw.ContractError, match="noise needs"):
        noise_contrastive_loss(network(), x, noise[:, :2], **options, log_z=log_z)
