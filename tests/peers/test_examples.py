"""The examples that need another library, run as they stand on the site."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "docs/pages/examples"))

import accelerate_loop
import hf_trainer
import lightning_module
import logging_terms

VICREG = {"loss", "sim", "var", "cov", "std"}


def test_lightning_logs_every_term():
    logged = lightning_module.main()
    assert set(logged) >= {f"train/{name}" for name in VICREG}
    assert all(0 < value < 100 for value in logged.values())


def test_accelerate_trains():
    assert set(accelerate_loop.main()) >= VICREG


def test_the_trainer_takes_the_steps_that_it_takes_with_its_own_loss():
    ours, loss = hf_trainer.main(hf_trainer.Loss())
    theirs, _ = hf_trainer.main(None)
    start = hf_trainer.LlamaForCausalLM(ours.config)
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter, theirs.get_parameter(name), rtol=1e-4, atol=1e-5)
        assert not torch.equal(parameter, start.get_parameter(name)) or "norm" in name
    assert set(loss.average.metrics()) == {"loss", "num_tokens", "accuracy"}


class Recorded:
    def __init__(self):
        self.logged = []

    def log(self, metrics, *, step):
        self.logged.append((step, metrics))

    def add_scalar(self, tag, scalar_value, global_step):
        self.logged.append((global_step, tag, scalar_value))


def test_terms_are_logged_every_ten_steps():
    run, writer = Recorded(), Recorded()
    logging_terms.train(run, writer)
    assert [step for step, _ in run.logged] == [9, 19, 29, 39]
    names = {"loss", "mse", "sparsity", "l0", "l1"}
    assert all(set(metrics) == {f"train/{name}" for name in names} for _, metrics in run.logged)
    assert len(writer.logged) == 4 * len(names)
    with logging_terms.wandb.init(mode="disabled") as opened:  # their own object takes it too
        logging_terms.train(opened)


@pytest.mark.parametrize(
    "name", ["lightning_module", "hf_trainer", "accelerate_loop", "logging_terms"]
)
def test_each_example_says_how_it_is_run(name):
    text = (Path(__file__).parents[2] / f"docs/pages/examples/{name}.py").read_text()
    assert f"docs/pages/examples/{name}.py" in text.partition('"""\n\n')[0]
