"""What each rank runs of the energy family: the loss of a network's energy, by name."""

import torch
from cases import Numbers, network, values
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from termwise import Terms, energy


class Scalar(nn.Module):
    """The energy of a network that is the same on every rank."""

    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.model = network(1, inputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x).sum(1)


class Normalised(Scalar):
    """The same with a log Z, which not every loss gives a gradient."""

    def __init__(self, inputs: int) -> None:
        super().__init__(inputs)
        self.log_z = nn.Parameter(torch.tensor(0.3, dtype=torch.float64))


def noises(x: Tensor, copies: int) -> Tensor:
    """Noise that follows from each row alone, so that it is the same however rows are shared."""
    return torch.stack([torch.cos((copy + 1) * x.flip(1)) for copy in range(copies)])


def loss_of(name: str, model: nn.Module, x: Tensor, options) -> Terms:
    noise, others = noises(x, 3), torch.cat([torch.sin(x), torch.cos(x)])
    log_density = {
        "x": -0.5 * x.square().sum(1),
        "noise": -0.4 * noise.square().sum(2),
        "others": -0.3 * others.square().sum(1),
    }
    time = torch.sigmoid(x.sum(1))
    log_z = model.log_z if isinstance(model, Normalised) else x.new_full((), 0.3)
    match name:
        case "maximum likelihood":
            return energy.maximum_likelihood_loss(
                model,
                x,
                others,
                negative_weight=0.7,
                regularization="l2",
                regularization_weight=0.1,
                parameters=list(model.parameters()),
                **options,
            )
        case "noise contrastive":
            return energy.noise_contrastive_loss(
                model,
                x,
                others,
                log_noise_x=log_density["x"],
                log_noise_noise=log_density["others"],
                log_z=log_z,
                **options,
            )
        case "ranking noise contrastive":
            return energy.ranking_noise_contrastive_loss(
                model,
                x,
                noise,
                log_noise_x=log_density["x"],
                log_noise_noise=log_density["noise"],
                **options,
            )
        case "conditional noise contrastive":
            return energy.conditional_noise_contrastive_loss(
                model,
                x,
                noise,
                log_forward=log_density["noise"],
                log_backward=log_density["noise"] * 2,
                **options,
            )
        case "energy discrepancy":
            return energy.energy_discrepancy_loss(model, x, t=0.3, copies=2, noise=noise, **options)
        case "energy matching":
            return energy.energy_matching_loss(model, noise[0], x, time, others, **options)
        case "equilibrium matching":
            return energy.equilibrium_matching_loss(model, noise[0], x, time, **options)
        case "flow matching":
            return energy.flow_matching_loss(model, noise[0], x, time, **options)
        case "contrastive divergence":
            return energy.contrastive_divergence_loss(
                model, x, others, energy_square_weight=0.1, **options
            )
        case "score matching":
            return energy.score_matching_loss(model, x, **options)
        case "score matching, reverse":
            return energy.score_matching_loss(model, x, trace="reverse", **options)
        case "score matching, forward over reverse":
            return energy.score_matching_loss(model, x, trace="forward_over_reverse", **options)
        case "sliced":
            return energy.sliced_score_matching_loss(model, x, projections=noise, **options)
        case "sliced, autograd":
            return energy.sliced_score_matching_loss(
                model, x, projections=noise, differentiation="autograd", **options
            )
        case "finite difference":
            return energy.finite_difference_score_matching_loss(
                model, x, projections=noise, **options
            )
        case "denoising":
            return energy.denoising_score_matching_loss(
                model, x, sigma=(0.5, 1, 2), noise=noise, antithetic=True, **options
            )
        case "kl term":
            return energy.contrastive_divergence_kl_term(
                model, x, neighbours=others, batch_group=options["batch_group"]
            )
        case "energy square":
            return energy.energy_square_penalty(model, x, **options)
        case "gradient penalty":
            return energy.gradient_penalty(model, x, target=0.5, **options)
    raise KeyError(name)


def terms_and_gradients(terms: Terms, parameters: dict[str, Tensor]) -> tuple[Numbers, Numbers]:
    terms.loss.backward()
    kept = {
        name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in parameters.items()
    }
    shared = values(terms)
    shared.pop("negatives", None)  # each rank's own
    return shared, kept


def energy_loss(group, x, weights, name, how):
    """Terms, and the gradients that backward leaves in the parameters."""
    model = Normalised(x.shape[1])
    options = {"weights": weights, "batch_group": group, "grad_reduction": how}
    terms = loss_of(name, model, x, options)
    return terms_and_gradients(terms, dict(model.named_parameters()))


def energies_in_modes(group, x, names, mode):
    """Terms of each loss in a mode of autograd, which may be another one on each rank."""
    modes = {"grad": torch.enable_grad, "no_grad": torch.no_grad, "inference": torch.inference_mode}
    model = Normalised(x.shape[1])
    with modes[mode]():
        return [
            {
                key: value.clone()  # out of inference mode
                for key, value in values(loss_of(name, model, x, {"batch_group": group})).items()
                if key != "negatives"
            }
            for name in names
        ]


def energy_ddp(group, x, name):
    model = Scalar(x.shape[1])
    wrapped = DistributedDataParallel(model, process_group=group)
    for _ in range(2):
        model.zero_grad()
        terms = loss_of(name, wrapped, x, {"batch_group": group})
        result = terms_and_gradients(terms, dict(model.named_parameters()))
    return result


def energy_ddp_static_graph(group, x, name):
    """Return the text of the refusal."""
    model = Scalar(x.shape[1])
    wrapped = DistributedDataParallel(model, process_group=group, static_graph=True)
    try:
        loss_of(name, wrapped, x, {"batch_group": group})
    except ValueError as error:
        return str(error)


def energy_fsdp(group, x, name):
    model = Scalar(x.shape[1])
    mesh = DeviceMesh.from_group(group, "cpu")
    fully_shard(model.model[0], mesh=mesh)
    fully_shard(model, mesh=mesh)
    model.set_reshard_after_backward(False)
    parameters = dict(model.named_parameters())  # the shards, as an optimizer holds them
    for _ in range(2):
        for parameter in parameters.values():
            parameter.grad = None
        terms = loss_of(name, model, x, {"batch_group": group})
        terms.loss.backward()
    return values(terms), {name: p.grad.full_tensor() for name, p in parameters.items()}


def energy_whole_loss(group, x, trainer):
    """Put a trainer around the module of the whole loss, where even a static graph is fine."""
    model = Scalar(x.shape[1])
    loss_fn = energy.ScoreMatchingLoss(model)
    parameters = dict(model.named_parameters())
    if trainer == "ddp":
        run = DistributedDataParallel(loss_fn, process_group=group, static_graph=True)
    else:
        run = fully_shard(loss_fn, mesh=DeviceMesh.from_group(group, "cpu"))
        parameters = dict(model.named_parameters())
    for _ in range(2):
        for parameter in parameters.values():
            parameter.grad = None
        terms = run(x, batch_group=group)
        terms.loss.backward()
    kept = {name: p.grad for name, p in parameters.items()}
    return values(terms), {
        name: g.full_tensor() if trainer == "fsdp2" else g for name, g in kept.items()
    }
