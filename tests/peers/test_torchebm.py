"""TorchEBM's losses beside ours, its Langevin dynamics, and ten steps of its example loops."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from termwise import energy

core = pytest.importorskip("torchebm.core")
losses = pytest.importorskip("torchebm.losses")
samplers = pytest.importorskip("torchebm.samplers")

WIDE = {"dtype": torch.float64}


class Energy(core.BaseModel):
    """A small network with one energy for each row."""

    def __init__(self, event: int = 3) -> None:
        super().__init__(**WIDE)
        self.layers = nn.Sequential(
            nn.Flatten(), nn.Linear(event, 8), nn.Tanh(), nn.Linear(8, 1)
        ).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x).squeeze(-1) + 0.5 * x.flatten(1).square().sum(1)


class Field(nn.Module):
    """A vector field that knows the time."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)).double()

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        return self.layers(torch.cat([x, time[:, None]], 1))


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=seeded(seed), dtype=torch.float64)


def assert_same(ours: Tensor, theirs: Tensor, model: nn.Module, **tolerance) -> None:
    """Both, and their gradients by the parameters."""
    assert_close(ours, theirs, **tolerance)
    parameters = [*model.parameters()]
    gradients = [
        torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)
        for loss in (ours, theirs)
    ]
    assert_close(*gradients, **tolerance)


@pytest.fixture
def model() -> Energy:
    return Energy()


X, Y, Z, SIZE = normal(7, 3), normal(7, 3, seed=1), normal(5, 3, seed=2), 3
TIME = torch.linspace(0.05, 0.95, 7, dtype=torch.float64)


def test_contrastive_divergence_with_their_sampler(model):
    sampler = samplers.LangevinDynamics(model, step_size=0.02, **WIDE)
    loss_fn = losses.ContrastiveDivergence(model, sampler, k_steps=4, **WIDE)
    theirs, negatives = loss_fn(X, generator=seeded())
    ours = energy.contrastive_divergence_loss(
        model,
        X,
        sampler=lambda _, x: sampler.sample(x=x, n_steps=4, generator=seeded()),
        energy_square_weight=0.001,
    )
    assert_close(ours.negatives, negatives)
    assert_same(ours.loss, theirs, model)


def test_their_langevin_dynamics_is_ours(model):
    theirs = samplers.LangevinDynamics(model, step_size=0.02, **WIDE).sample(
        x=X, n_steps=4, generator=seeded()
    )
    generator = seeded()
    noise = torch.stack([torch.randn(7, 3, generator=generator, **WIDE) for _ in range(4)])
    assert_close(energy.langevin(model, X, steps=4, step_size=0.02, noise=noise), theirs)


def test_a_loss_that_is_not_finite_is_a_tenth_there(model):
    loss_fn = losses.ContrastiveDivergence(model, samplers.LangevinDynamics(model, **WIDE), **WIDE)
    diverged = torch.full_like(X, torch.inf)
    assert loss_fn.compute_loss(X, diverged).item() == pytest.approx(0.1)
    assert not energy.contrastive_divergence_loss(model, X, diverged).loss.isfinite()


def test_exact_score_matching(model):
    theirs = losses.ScoreMatching(model, hessian_method="exact", **WIDE)(X)
    assert_same(energy.score_matching_loss(model, X).loss, theirs, model)


def test_approximate_score_matching_divides_the_trace_by_the_dimension(model):
    theirs = losses.ScoreMatching(model, hessian_method="approx", **WIDE)(X, generator=seeded())
    along = torch.randn(1, 7, 3, generator=seeded(), **WIDE)
    terms = energy.sliced_score_matching_loss(model, X, projections=along)
    ours = 0.5 * terms.score_square - terms.curvature / SIZE
    assert_same(ours, theirs, model, rtol=1e-3, atol=1e-4)


def test_sliced_score_matching(model):
    theirs = losses.SlicedScoreMatching(model, n_projections=5, **WIDE)(X, generator=seeded())
    projections = torch.randn(35, 3, generator=seeded(), **WIDE).sign().view(5, 7, 3)
    terms = energy.sliced_score_matching_loss(
        model, X, projections=projections, variance_reduced=False
    )
    assert_same(terms.loss, theirs, model)


def test_sliced_score_matching_of_images_is_another_number_there():
    """Theirs takes each of the two rows of pixels for a sample, and averages over them."""
    model, x = Energy(6), normal(4, 2, 3)
    theirs = losses.SlicedScoreMatching(model, n_projections=2, **WIDE)(x, generator=seeded())
    projections = torch.randn(8, 2, 3, generator=seeded(), **WIDE).sign().view(2, 4, 2, 3)
    ours = energy.sliced_score_matching_loss(
        model, x, projections=projections, variance_reduced=False
    )
    point = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(model(point).sum(), point)
    by_row = (gradient * projections).sum(-1).square().mean()
    assert_close(0.5 * by_row - ours.curvature / 2, theirs)
    assert abs(by_row - ours.score_square) > 0.1 * ours.score_square


@pytest.mark.parametrize("sigma", [0.01, 0.5])
def test_denoising_score_matching_is_ours_and_no_longer_of_the_negated_energy(model, sigma):
    theirs = losses.DenoisingScoreMatching(model, noise_scale=sigma, **WIDE)(X, generator=seeded())
    noise = torch.randn(7, 3, generator=seeded(), **WIDE)
    ours = energy.denoising_score_matching_loss(model, X, sigma=sigma, noise=noise)
    assert_same(ours.loss, theirs, model)
    negated = energy.denoising_score_matching_loss(lambda x: -model(x), X, sigma=sigma, noise=noise)
    assert abs(negated.loss - theirs) > 0.01 * abs(theirs)


def matching(kind, model, **options):
    """A loss of theirs at fixed times, of pairs as they are given."""
    return kind(
        model,
        coupling="independent",
        t_sampler=lambda batch, **_: TIME,
        **options,
        **WIDE,
    )


def test_energy_matching_is_ours_over_the_size_of_the_event(model):
    theirs = matching(losses.EnergyMatchingLoss, model, sigma=0.0, lambda_cd=0.0)
    ours = energy.energy_matching_loss(model, Y, X, TIME, cutoff=0.8)
    assert_same(ours.loss / SIZE, theirs(X, x0=Y), model)


def test_energy_matching_with_negatives_weighs_the_contrast_by_the_size_of_the_event(model):
    theirs = matching(
        losses.EnergyMatchingLoss,
        model,
        sigma=0.0,
        lambda_cd=2.0,
        cd_trim_fraction=0.0,
        cd_clamp=None,
    )
    theirs._sample_negatives = lambda *_, **__: Z
    ours = energy.energy_matching_loss(
        model, Y, X, TIME, Z, cutoff=0.8, contrastive_weight=2.0 * SIZE
    )
    assert_same(ours.loss / SIZE, theirs(X, x0=Y), model)


def test_their_trimmed_and_clamped_contrast_is_not_here(model):
    theirs = matching(losses.EnergyMatchingLoss, model, sigma=0.0, cd_trim_fraction=0.5)
    theirs._sample_negatives = lambda *_, **__: Z
    terms = theirs.training_losses(X, x0=Y)
    kept = model(Z).sort().values[: 5 - 2]
    contrast = model(X).mean() - kept.mean()
    assert_close(terms["cd_value"], contrast)
    assert_close(terms["cd_loss"], (2 * contrast).clamp(min=-0.02))


@pytest.mark.parametrize(("threshold", "multiplier"), [(0.8, 4.0), (0.3, 1.0)])
def test_equilibrium_matching_of_an_energy_is_ours_over_the_size_of_the_event(
    threshold, multiplier
):
    field = Field()
    theirs = matching(
        losses.EquilibriumMatchingLoss,
        field,
        energy_type="dot",
        ct_threshold=threshold,
        ct_multiplier=multiplier,
    )

    def dot(x):
        return (x * field(x, torch.zeros(len(x), **WIDE))).sum(1)

    ours = energy.equilibrium_matching_loss(
        dot, Y, X, TIME, cutoff=threshold, multiplier=multiplier
    )
    assert_same(ours.loss / SIZE, theirs(X, x0=Y), field)


class Descent(nn.Module):
    """The field of an energy, as their flow matching takes it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        x = x.detach().requires_grad_()
        return -torch.autograd.grad(self.model(x).sum(), x, create_graph=True)[0]


def test_flow_matching_of_a_gradient_field_is_ours_over_the_size_of_the_event(model):
    theirs = matching(losses.FlowMatchingLoss, Descent(model))
    ours = energy.flow_matching_loss(model, Y, X, TIME)
    assert_same(ours.loss / SIZE, theirs(X, x0=Y), model)


def theirs_and_ours(name: str, model: Energy):
    """The loss of an example, and ours in its place: both of rows and a generator."""
    if name == "contrastive divergence":
        sampler = samplers.LangevinDynamics(model, step_size=0.02, **WIDE)
        loss_fn = losses.ContrastiveDivergence(model, sampler, k_steps=3, **WIDE)

        def ours(x, generator):
            def chains(_, x):
                return sampler.sample(x=x, n_steps=3, generator=generator)

            return energy.contrastive_divergence_loss(
                model, x, sampler=chains, energy_square_weight=0.001
            ).loss

        return lambda x, generator: loss_fn(x, generator=generator)[0], ours
    if name == "denoising":
        loss_fn = losses.DenoisingScoreMatching(model, noise_scale=0.1, **WIDE)
        return lambda x, generator: loss_fn(x, generator=generator), (
            lambda x, generator: (
                energy.denoising_score_matching_loss(model, x, sigma=0.1, generator=generator).loss
            )
        )
    loss_fn = losses.ScoreMatching(model, hessian_method="exact", **WIDE)
    return lambda x, _: loss_fn(x), lambda x, _: energy.score_matching_loss(model, x).loss


@pytest.mark.parametrize("name", ["contrastive divergence", "denoising", "score matching"])
def test_ten_steps_of_their_example_loop_with_the_loss_swapped(name):
    data, trained = normal(64, 3, seed=4), []
    first = Energy()
    for which in range(2):
        model, generator = copy.deepcopy(first), seeded(5)
        loss_fn = theirs_and_ours(name, model)[which]
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
        curve = []
        for _ in range(10):
            rows = data[torch.randint(len(data), (16,), generator=generator)]
            loss = loss_fn(rows, generator)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            curve.append(loss.detach())
        trained.append((torch.stack(curve), dict(model.named_parameters())))
    moved = trained[0][1]["layers.1.weight"] - first.layers[1].weight
    assert moved.abs().max() > 0.01
    assert_close(*trained, rtol=1e-8, atol=1e-8)
