"""Energy-based losses over ranks with different and uneven rows are one process's."""

import energy_cases
import pytest
import torch
from rows import rows

SIZES = ([11, 5], [13, 7, 4], [4, 0])
EXACT = {"rtol": 1e-12, "atol": 1e-12}
FIRST_ORDER = (
    "maximum likelihood",
    "noise contrastive",
    "ranking noise contrastive",
    "conditional noise contrastive",
    "energy discrepancy",
    "contrastive divergence",
    "finite difference",
    "energy square",
)
BY_X = (
    "energy matching",
    "equilibrium matching",
    "flow matching",
    "score matching",
    "score matching, reverse",
    "sliced",
    "sliced, autograd",
    "denoising",
    "gradient penalty",
)
"""Those that differentiate the energy by its input."""


@pytest.mark.parametrize("name", [*FIRST_ORDER, *BY_X])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize(("how", "weighted"), [("mean", True), ("sum", True), ("mean", False)])
def test_terms_and_gradients(ranks, name, how, weighted, sizes):
    shards, world = rows(sizes, 3), len(sizes)
    weights = [part.square().sum(1) if weighted else None for part in shards]
    together = torch.cat(weights) if weighted else None
    expected, gradients = energy_cases.energy_loss(None, torch.cat(shards), together, name, how)
    results = ranks(energy_cases.energy_loss, shards, weights, [name] * world, [how] * world)
    for terms, _ in results:
        torch.testing.assert_close(terms, expected, **EXACT)
    divisor = world if how == "mean" else 1
    for key, whole in gradients.items():
        combined = sum(part[key] for _, part in results) / divisor
        torch.testing.assert_close(combined, whole, rtol=1e-11, atol=1e-11, msg=key)


def test_no_collective_depends_on_the_mode_of_a_rank(ranks):
    """One rank validates under no_grad or inference mode while another trains: none waits."""
    names, shards = [*FIRST_ORDER, *BY_X, "kl term"], rows([5, 4, 3], 3)
    modes = ["grad", "no_grad", "inference"]
    # The neighbours are each rank's own.
    expected = energy_cases.energies_in_modes(None, torch.cat(shards), names[:-1], "grad")
    results = ranks(energy_cases.energies_in_modes, shards, [names] * 3, modes)
    for found in results:
        torch.testing.assert_close(found[:-1], expected, **EXACT)
        torch.testing.assert_close(found[-1], results[0][-1], **EXACT)


@pytest.mark.parametrize("name", [FIRST_ORDER[1], *BY_X])
@pytest.mark.parametrize(
    "trainer", [energy_cases.energy_ddp, energy_cases.energy_fsdp], ids=["ddp", "fsdp2"]
)
def test_under_a_trainer(ranks, trainer, name):
    shards = rows([11, 5], 3)
    expected, gradients = energy_cases.energy_loss(None, torch.cat(shards), None, name, "mean")
    del gradients["log_z"]  # which is not the trainer's
    for terms, reduced in ranks(trainer, shards, [name] * 2):
        torch.testing.assert_close(terms, expected, **EXACT)
        torch.testing.assert_close(reduced, gradients, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("name", BY_X)
def test_ddp_with_a_static_graph_is_refused_where_its_gradients_would_be_wrong(ranks, name):
    for said in ranks(energy_cases.energy_ddp_static_graph, rows([11, 5], 3), [name] * 2):
        assert "DistributedDataParallel(static_graph=True) takes for the backward pass" in said


@pytest.mark.parametrize("trainer", ["ddp", "fsdp2"])
def test_a_trainer_around_the_whole_loss(ranks, trainer):
    shards = rows([11, 5], 3)
    expected, gradients = energy_cases.energy_loss(
        None, torch.cat(shards), None, "score matching", "mean"
    )
    del gradients["log_z"]
    for terms, reduced in ranks(energy_cases.energy_whole_loss, shards, [trainer] * 2):
        torch.testing.assert_close(terms, expected, **EXACT)
        torch.testing.assert_close(reduced, gradients, rtol=1e-11, atol=1e-11)
