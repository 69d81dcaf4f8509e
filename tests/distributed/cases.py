"""What each rank runs: functions of the group and of the rank's own arguments."""

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from termwise import Terms, _groups, sae
from termwise.joint_embedding import VICRegLoss, vicreg_loss
from termwise.lm import targeted_variance_loss

Numbers = dict[str, Tensor]


def network(seed: int, inputs: int, outputs: int) -> nn.Module:
    """A model that is the same on every rank."""
    generator = torch.Generator().manual_seed(seed)
    model = nn.Sequential(nn.Linear(inputs, 6), nn.Tanh(), nn.Linear(6, outputs)).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return model


def values(terms: Terms) -> Numbers:
    return {name: value.detach().clone() for name, value in terms.items()}


def vicreg_of(group, model: nn.Module, x: Tensor, options) -> tuple[Numbers, Numbers]:
    """Terms, and the gradients that backward leaves in the parameters."""
    terms = vicreg_loss(model(x), model(x.flip(1)), batch_group=group, **options)
    terms.loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    return values(terms), gradients


def vicreg(group, x, options):
    return vicreg_of(group, network(1, x.shape[1], options.pop("dim", 5)), x, options)


def vicreg_ddp(group, x, options):
    model = network(1, x.shape[1], options.pop("dim", 5))
    wrapped = DistributedDataParallel(model, process_group=group)
    # Both views in one forward, as DDP asks.
    z1, z2 = wrapped(torch.cat([x, x.flip(1)])).tensor_split([len(x)])
    terms = vicreg_loss(z1, z2, batch_group=group, **options)
    terms.loss.backward()
    return values(terms), {name: p.grad.clone() for name, p in model.named_parameters()}


def vicreg_fsdp(group, x, options):
    model = network(1, x.shape[1], options.pop("dim", 5))
    mesh = DeviceMesh.from_group(group, "cpu")
    fully_shard(model[0], mesh=mesh)
    fully_shard(model, mesh=mesh)
    z1, z2 = model(torch.cat([x, x.flip(1)])).tensor_split([len(x)])
    terms = vicreg_loss(z1, z2, batch_group=group, **options)
    terms.loss.backward()
    return values(terms), {name: p.grad.full_tensor() for name, p in model.named_parameters()}


class WithLoss(nn.Module):
    """A model whose forward returns the record, which DDP must look into."""

    def __init__(self, model: nn.Module, group) -> None:
        super().__init__()
        self.model = model
        self.loss_fn = VICRegLoss()
        self.group = group

    def forward(self, x: Tensor) -> Terms:
        return self.loss_fn(self.model(x), self.model(x.flip(1)), batch_group=self.group)


def vicreg_ddp_static_graph(group, x):
    model = network(1, x.shape[1], 5)
    wrapped = DistributedDataParallel(
        WithLoss(model, group), process_group=group, static_graph=True
    )
    for _ in range(2):
        model.zero_grad()
        terms = wrapped(x)
        terms.loss.backward()
    return values(terms), {name: p.grad.clone() for name, p in model.named_parameters()}


def vicreg_compiled(group, x, options):
    model = network(1, x.shape[1], 5)

    def loss(x):
        return vicreg_loss(model(x), model(x.flip(1)), batch_group=group, **options)

    terms = torch.compile(loss, fullgraph=True, backend="aot_eager")(x)
    terms.loss.backward()
    torch.compiler.reset()
    return values(terms), {name: p.grad.clone() for name, p in model.named_parameters()}


def vicreg_without_gradients_on_one_rank(group, x, path):
    with torch.set_grad_enabled(group.rank() > 0):
        terms = vicreg_loss(x.requires_grad_(), x.flip(1), batch_group=group, covariance_path=path)
    return values(terms)


def vicreg_refusal(group, x):
    try:
        vicreg_loss(x, x, batch_group=group)
    except ValueError as error:
        return str(error)


def vicreg_second_derivatives(group, x):
    """Try to differentiate the gradient of each term; give what was said."""
    x = x.requires_grad_()
    said = []
    for name in ("var", "cov"):
        terms = vicreg_loss(x, x + 1, gamma=9.0, batch_group=group)
        (gradient,) = torch.autograd.grad(getattr(terms, name), x, create_graph=True)
        try:
            gradient.square().sum().backward()
            said.append("")
        except NotImplementedError as error:
            said.append(str(error))
    return said


def vicreg_traffic(group, z, path):
    """Count the elements of each collective, and whether a rank ever received the whole batch."""
    sent = {"sums": 0, "out": 0, "in": 0}
    reduce, exchange = _groups.all_reduce, dist.all_to_all_single

    def counted_reduce(x, group_name):
        sent["sums"] += x.numel()
        return reduce(x, group_name)

    def counted_exchange(received, x, *args, **kwargs):
        sent["out"] += x.numel()
        sent["in"] += received.numel()
        return exchange(received, x, *args, **kwargs)

    _groups.all_reduce, dist.all_to_all_single = counted_reduce, counted_exchange
    try:
        z = z.requires_grad_()
        vicreg_loss(z, z.detach(), batch_group=group, covariance_path=path).loss.backward()
    finally:
        _groups.all_reduce, dist.all_to_all_single = reduce, exchange
    return sent


def variance(group, weight, valid_rows, options):
    weight = weight.requires_grad_()
    terms = targeted_variance_loss(weight, valid_rows=valid_rows, vocab_group=group, **options)
    terms.loss.backward()
    return values(terms), weight.grad


def variance_compiled(group, weight):
    weight = weight.requires_grad_()
    compiled = torch.compile(targeted_variance_loss, fullgraph=True, backend="aot_eager")
    terms = compiled(weight, target=0.3, vocab_group=group)
    terms.loss.backward()
    torch.compiler.reset()
    return values(terms), weight.grad


def variance_second_derivative(group, weight):
    weight = weight.requires_grad_()
    terms = targeted_variance_loss(weight, target=0.3, vocab_group=group)
    (gradient,) = torch.autograd.grad(terms.loss, weight, create_graph=True)
    try:
        gradient.square().sum().backward()
    except NotImplementedError as error:
        return str(error)


def sums(group, x, weight):
    """Sum over ranks with a use that differs from rank to rank; and its second derivative."""
    x = x.requires_grad_()
    own = weight * _groups.sum_over_ranks(x, group).pow(3).sum()
    (gradient,) = torch.autograd.grad(own, x, create_graph=True)
    (second,) = torch.autograd.grad(gradient.sum(), x)
    batched = torch.vmap(lambda row: _groups.sum_over_ranks(row, group))(x.detach()[None])
    return own.detach(), gradient.detach(), second, batched[0]


def terminal_sums(group, x, scale):
    x = x.requires_grad_()
    total = _groups.terminal_sum(x, group, scale)
    (gradient,) = torch.autograd.grad(total.square().sum(), x)
    batched = torch.vmap(lambda row: _groups.terminal_sum(row, group, scale))(x.detach()[None])
    return total.detach(), gradient, batched[0]


def counts(group, x):
    return _groups.row_counts(x, group)


def exchange(group, x):
    counts = _groups.row_counts(x, group).tolist()
    columns = _groups.rows_to_columns(x, counts, group.group_name)
    return columns, _groups.columns_to_rows(columns, counts, x.shape[1], group.group_name)


def sae_selection(group, pre, k, mask, activation):
    return sae.batch_topk(pre, k=k, activation=activation, mask=mask, batch_group=group)


def sae_measurements(group, x, x_hat, mask):
    options = {"mask": mask, "batch_group": group}
    statistics = [
        sae.VarianceStatistics.of(rows, mask=mask).over_ranks(group) for rows in (x, x - x_hat)
    ]
    return [
        sae.fraction_of_variance_unexplained(x, x_hat, **options),
        sae.fraction_of_variance_unexplained(x, x_hat, reduction="mean_of_ratios", **options),
        sae.explained_variance(x, x_hat, **options),
        sae.normalized_mse(x, x_hat, **options),
        sae.cosine_similarity(x, x_hat, **options),
        statistics[0].fraction_unexplained(statistics[1]),
    ]


def sae_state(group, batches):
    """Fold steps of latents into both states."""
    dead = sae.DeadLatents.start(batches[0].shape[1])
    firsts = (None, "minimum", "mean")
    thresholds = [sae.ActivationThreshold.start() for _ in firsts]
    for f in batches:
        dead = dead.update((f != 0).any(0), len(f), batch_group=group)
        thresholds = [
            threshold.update(f, decay=0.9, first=first, batch_group=group)
            for threshold, first in zip(thresholds, firsts, strict=True)
        ]
    return dead.tokens_since_fired, *(threshold.value for threshold in thresholds)
