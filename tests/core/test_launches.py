"""Kernels on an accelerator: they do not grow with the data, and are not many more than needed."""

import importlib.util
import inspect
import sys
from pathlib import Path

import pytest
from exports import EXPORTS, FUNCTIONS

import termwise as tw
from termwise import _means, testing

PATH = Path(__file__).parents[1] / "bench" / "launches.py"
sys.path.insert(0, str(PATH.parent))
SPEC = importlib.util.spec_from_file_location("launches", PATH)
launches = sys.modules["launches"] = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(launches)

# Blocks of 2^26 logits, however many there are, for logits that are never held.
GROWING = {
    "lm.linear_next_token_loss",
    "lm.linear_distillation_loss",
}
NOT_COUNTED = {
    "energy.contrastive_divergence_kl_term": "distances of all pairs of samples, in blocks of them",
}


def hold(name, *times, against_plain=False):
    """Hold the law on so many times the rows of a case."""
    case = launches.COUNTED[name]
    ours, plain = launches.ours_and_plain(case)
    testing.assert_launches(
        ours,
        "rows",
        at=[int(case.rows * one) for one in times],
        plain=plain if against_plain else None,
        given=lambda sizes: {"inputs": launches.made(case, sizes["rows"])},
        dtypes=[case.dtype],
    )


def cases(failing):
    strict = pytest.mark.xfail(strict=True)
    return [
        pytest.param(name, marks=strict if name in failing else ()) for name in launches.COUNTED
    ]


@pytest.mark.parametrize("name", launches.COUNTED)
def test_kernels_are_at_most_four_times_the_plain_formulas(name):
    hold(name, 1, against_plain=True)


@pytest.mark.parametrize("name", cases(GROWING))
def test_kernels_do_not_grow_with_the_data(name, monkeypatch):
    monkeypatch.setattr(_means, "FEW_ROWS", 0)  # whose mean converts nothing: one kernel less
    # Up to 2^26 elements all are read at once, and from 2^29 on in eighths.
    hold(name, 1 / 16, 1 / 2)
    hold(name, *((4, 16) if name in GROWING else (128, 512)))


@pytest.mark.parametrize("name", ["projected_kl", "partitioned", "universal_logit"])
def test_losses_over_chunks_are_linear_in_time(name):
    case = launches.COUNTED[f"lm.{name}_loss"]
    ours, _ = launches.ours_and_plain(case)
    short, long = (
        launches.launches(ours, {"inputs": launches.made(case, case.rows * times)})
        for times in (1, 4)
    )
    assert not short.flops
    assert not long.flops
    assert 3.9 * short.bytes < long.bytes < 4.1 * short.bytes


LOSSES = [
    name
    for name in FUNCTIONS
    if isinstance(kind := inspect.signature(EXPORTS[name]).return_annotation, type)
    and issubclass(kind, tw.Terms)
    and not name.startswith("termwise.")
]
COUNTED = {name.partition(",")[0] for name in launches.COUNTED}


@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_is_counted(name):
    counted = name in COUNTED or name in NOT_COUNTED
    assert counted, f"the declaration of {name} in tests/losses needs a bench, with rows"


def test_nothing_else_is_counted():
    assert COUNTED | NOT_COUNTED.keys() <= set(LOSSES)
    assert not COUNTED & NOT_COUNTED.keys()
