"""`python -m termwise check`: what it says where all works, and where something does not."""

import functools
import re

import pytest
import torch

from termwise import joint_embedding
from termwise.demo import _check
from termwise.demo._command import main


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Time nothing for long, and compile without a C++ compiler."""
    monkeypatch.setattr(_check, "_SECONDS", 0.0)
    compiled = functools.partial(torch.compile, backend="aot_eager")
    monkeypatch.setattr(_check.torch, "compile", compiled)


def test_all_works_here(capsys):
    assert main(["check"]) == 0
    said = capsys.readouterr().out
    for line in (r"^termwise     \d", r"^torch        2\.", r"^distributed  gloo works$"):
        assert re.search(line, said, re.MULTILINE), said
    assert re.search(r"^compile      works, \d+ s", said, re.MULTILINE), said
    rows = re.findall(r"^(\w+)\.\w+_loss .* [\d.]+ +[\d.]+ +[\d.]+  agree$", said, re.MULTILINE)
    assert rows == ["joint_embedding", "sae", "energy", "lm"]
    assert not torch.distributed.is_initialized()


def test_a_loss_that_differs_or_fails_is_said_and_fails_the_command(capsys, monkeypatch):
    right = joint_embedding.vicreg_loss
    wrong = functools.partial(right, cov_weight=1.01)
    monkeypatch.setattr(_check.joint_embedding, "vicreg_loss", wrong)
    assert main(["check"]) == 1
    assert re.search(r"vicreg_loss .*DIFFER$", capsys.readouterr().out, re.MULTILINE)

    def broken(*_, **__):
        raise RuntimeError("no such kernel\nand a traceback")

    monkeypatch.setattr(_check.torch, "compile", broken)
    monkeypatch.setattr(_check.joint_embedding, "vicreg_loss", broken)
    assert main(["check"]) == 1
    said = capsys.readouterr().out
    assert "compile      does not work: RuntimeError: no such kernel\n" in said
    assert "gloo does not work: RuntimeError: no such kernel\n" in said
    assert re.search(r"vicreg_loss 256 x 512 +RuntimeError: no such kernel$", said, re.MULTILINE)
    assert not torch.distributed.is_initialized()


def test_a_nan_does_not_agree(capsys, monkeypatch):
    right = _check.F.cross_entropy
    monkeypatch.setattr(_check.F, "cross_entropy", lambda *a: right(*a) * torch.nan)
    assert main(["check"]) == 1
    assert re.search(r"next_token_loss .*DIFFER$", capsys.readouterr().out, re.MULTILINE)
