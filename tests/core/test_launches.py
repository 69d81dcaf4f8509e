"""Kernels on an accelerator: they do not grow with the data, and are not many more than needed."""

import importlib.util
import inspect
import sys
from pathlib import Path

import pytest
from exports import EXPORTS, FUNCTIONS

import termwise as tw
from termwise import _means

PATH = Path(__file__).parents[1] / "bench" / "launches.py"
sys.path.insert(0, str(PATH.parent))
SPEC = importlib.util.spec_from_file_location("launches", PATH)
launches = sys.modules["launches"] = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(launches)

# Of more than four times as many kernels as the plain formula.
MANY = {
    "lm.next_token_loss, bfloat16": "masks, counts and accuracies are 36 kernels on small tensors",
    "lm.linear_next_token_loss": "the same, and rooms for a block's logits",
    "lm.linear_distillation_loss": "the same",
    "sae.topk_loss": "17 kernels count active latents and average rows; the plain formula has 3",
}
# Blocks of 2^26 logits, however many there are, for logits that are never held.
GROWING = {
    "lm.linear_next_token_loss",
    "lm.linear_distillation_loss",
}
NOT_COUNTED = {
    "energy.contrastive_divergence_kl_term": "distances of all pairs of samples, in blocks of them",
}


def kernels(case, rows):
    ours, plain, leaves = launches.built(case, int(rows))
    return [launches.counted(loss, leaves).kernels.total() for loss in (ours, plain)]


def cases(failing):
    strict = pytest.mark.xfail(strict=True)
    return [
        pytest.param(name, marks=strict if name in failing else ()) for name in launches.COUNTED
    ]


@pytest.mark.parametrize("name", cases(MANY))
def test_kernels_are_at_most_four_times_the_plain_formulas(name):
    case = launches.COUNTED[name]
    ours, plain = kernels(case, case.rows)
    assert ours <= 4 * plain


@pytest.mark.parametrize("name", cases(GROWING))
def test_kernels_do_not_grow_with_the_data(name, monkeypatch):
    case = launches.COUNTED[name]
    monkeypatch.setattr(_means, "FEW_ROWS", 0)  # whose mean converts nothing: one kernel less
    # Up to 2^26 elements all are read at once, and from 2^29 on in eighths.
    few, more = (kernels(case, case.rows * times)[0] for times in (1 / 16, 1 / 2))
    assert more <= few
    large = (4, 16) if name in GROWING else (128, 512)
    many, most = (kernels(case, case.rows * times)[0] for times in large)
    assert most <= many


@pytest.mark.parametrize("name", ["projected_kl", "partitioned", "universal_logit"])
def test_losses_over_chunks_are_linear_in_time(name):
    case = launches.COUNTED[f"lm.{name}_loss"]
    short, long = (
        launches.counted(*launches.built(case, case.rows * times)[::2]) for times in (1, 4)
    )
    assert not short.flops
    assert not long.flops
    assert 3.9 * short.bytes < long.bytes < 4.1 * short.bytes


def test_every_loss_is_counted():
    returned = {name: inspect.signature(EXPORTS[name]).return_annotation for name in FUNCTIONS}
    losses = {
        name
        for name, kind in returned.items()
        if isinstance(kind, type) and issubclass(kind, tw.Terms)
    }
    counted = {name.partition(",")[0] for name in launches.COUNTED}
    assert losses - {name for name in losses if name.startswith("termwise.")} == {
        *counted,
        *NOT_COUNTED,
    }
