"""Losses of other kinds hold what they promise, and their tests see faults in them."""

import sys
import types
from pathlib import Path

import pytest
from hypothesis import settings

FOLDER = Path(__file__).parents[2] / "docs/pages/examples"
# What is written, and the fault in its place. Each is one that was met in losses of users.
FAULTS = {
    "segmentation": [
        ("weights.sum(),\n", "weights.numel(),\n"),  # pixels without a label count
        ("class_weights[safe] * counted", "class_weights[safe] * (labels != 0)"),
        ("labels >= 0", "labels > 0"),
    ],
    "clipped_policy": [
        ("torch.minimum", "torch.maximum"),
        ("- entropy_weight * entropy,", "+ entropy_weight * entropy,"),
        ("bounded * advantages", "bounded"),
        (".sum(1).mean()", ".mean()"),
    ],
    "evidence": [
        ("- 1 - log_variance", "- 1 + log_variance"),
        ("pixels.sum(1).mean()", "pixels.mean()"),
        ("+ beta * kl,", "+ beta * kl.detach(),"),
    ],
    "graph": [
        (".square().sum(1)", ".square().mean(1)"),
        ("weights * apart", "weights * apart.detach()"),
        ("nodes[start] - nodes[end]", "nodes[start] + nodes[end]"),
    ],
    "feature_maps": [
        ("F.normalize(x, dim=1)", "F.normalize(x, dim=-1)"),
        (", teacher[name].detach()))", ", teacher[name]))"),
        ("student.keys() != teacher.keys()", "False"),
    ],
    "spectrum": [
        ("target.conj()).real", "target).real"),
        ("(1 - cosine)", "(1 - cosine.abs())"),
        ("magnitude + phase_weight * phase, magnitude", "magnitude + phase, magnitude"),
    ],
    "key_queue": [
        ("keys.detach(), queue", "keys, queue"),
        ("self.queue.clone()", "F.normalize(keys, dim=1)"),
        ("/ temperature\n", "* temperature\n"),
        ("% self.size)", "% len(keys))"),
    ],
}


def loaded(name: str, text: str) -> types.ModuleType:
    """Run a file's text as a module that can be found by its name, as its records ask."""
    module = types.ModuleType(f"example_{name}")
    sys.modules[module.__name__] = module
    exec(compile(text, str(FOLDER / f"{name}.py"), "exec"), vars(module))
    return module


@pytest.fixture(autouse=True)
def forgotten():
    """Look for a call that fails, and not for the smallest one; forget the modules after it."""
    settings.register_profile("usual", settings.default)
    settings.load_profile("unshrunk")
    yield
    settings.load_profile("usual")
    for name in [name for name in sys.modules if name.startswith("example_")]:
        del sys.modules[name]


@pytest.mark.parametrize("name", FAULTS)
def test_a_loss_holds_what_it_promises(name):
    loaded(name, (FOLDER / f"{name}.py").read_text()).check()


@pytest.mark.parametrize(
    ("name", "fault"), [(name, fault) for name, faults in FAULTS.items() for fault in faults]
)
def test_its_tests_find_a_fault(name, fault):
    right, wrong = fault
    text = (FOLDER / f"{name}.py").read_text()
    head, tail = text.split("\ndef formula(")
    assert head.count(right) == 1, f"{right!r} is not there once"
    with pytest.raises((AssertionError, KeyError)):
        loaded(name, head.replace(right, wrong) + "\ndef formula(" + tail).check()
