"""The examples that need another library, run as they stand on the site."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from sae_lens import SAE
from torch.testing import assert_close
from trl.experimental.gkd import GKDTrainer

sys.path.insert(0, str(Path(__file__).parents[2] / "docs/pages/examples"))

import accelerate_loop
import clip_ranks
import hf_trainer
import lightning_module
import logging_terms
import open_clip_loop
import saelens_trainer
import trl_gkd

ROOT = Path(__file__).parents[2]
VICREG = {"loss", "sim", "var", "cov", "std"}


def test_lightning_logs_every_term():
    logged = lightning_module.main()
    assert set(logged) >= {f"train/{name}" for name in VICREG}
    assert all(0 < value < 100 for value in logged.values())


def test_accelerate_trains():
    assert set(accelerate_loop.main()) >= VICREG


def test_the_trainer_takes_the_steps_that_it_takes_with_its_own_loss():
    loss = hf_trainer.Loss()
    ours, reported = hf_trainer.main(loss)
    theirs, _ = hf_trainer.main(None)
    torch.manual_seed(0)
    start = hf_trainer.LlamaForCausalLM(ours.config)  # as in main
    for name, parameter in ours.named_parameters():
        # Not by element: Adam divides a gradient that is rounding by its own size.
        moved = (parameter - start.get_parameter(name)).norm()
        assert (parameter - theirs.get_parameter(name)).norm() < 1e-4 * moved, name
    assert set(loss.average.metrics()) == {"loss", "num_tokens", "accuracy"}
    # The mean over the steps, each of which is a mean over the tokens of both micro-batches.
    assert loss.average.metrics()["loss"] == pytest.approx(reported, rel=1e-2)


def test_the_terms_of_the_gkd_trainer_are_in_its_log():
    """Of two micro-batches each: their mean over tokens is the loss of the step."""
    trainer = trl_gkd.main(max_steps=3)
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(logged) == 3
    for entry in logged:
        assert set(entry) >= {f"terms/{name}" for name in ("loss", "divergence", "num_tokens")}
        assert entry["terms/loss"] == pytest.approx(entry["loss"], rel=1e-5)
    theirs = trl_gkd.main(GKDTrainer, max_steps=3)
    for ours, its in zip(trainer.model.parameters(), theirs.model.parameters(), strict=True):
        assert_close(ours, its, rtol=0, atol=1e-4)


def test_saelens_trainer_takes_the_steps_that_it_takes_with_its_own_loss():
    ours, logged = saelens_trainer.main()
    theirs, its = saelens_trainer.main(saelens_trainer.JumpReLUTrainingSAE)
    assert_close(ours.state_dict(), theirs.state_dict(), rtol=1e-4, atol=1e-4)
    same = {"losses/mse": "losses/mse_loss", "losses/sparsity": "losses/l0_loss"}
    for name, value in logged.items():
        if name not in ("metrics/loss", "metrics/pre_act", "metrics/threshold_mean"):
            assert value == pytest.approx(its[same.get(name, name)], rel=1e-4), name
    assert logged["metrics/threshold_mean"] == pytest.approx(
        theirs.threshold.mean().item(), rel=0.1
    )
    assert logged["metrics/explained_variance"] > 0.9


def test_saelens_loads_what_was_trained_with_our_loss(tmp_path):
    sae, _ = saelens_trainer.main()
    sae.save_inference_model(tmp_path)
    x = next(saelens_trainer.activations())
    assert_close(SAE.load_from_disk(tmp_path)(x), sae.decode(sae.encode(x)))


def test_clip_learns_the_digits():
    assert open_clip_loop.held_out_accuracy(open_clip_loop.train(None)) > 0.6


# 61 pairs: more on one rank than on the other, which open_clip's loss cannot have.
OVER_RANKS = [("termwise", 60), ("termwise", 61), ("open_clip", 60)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Train over two ranks, each run in a folder of its name."""
    folder, jobs = tmp_path_factory.mktemp("ranks"), []
    runs = {f"{loss}-{batch}": f"clip_ranks.py {loss} {batch}" for loss, batch in OVER_RANKS}
    for name, command in {**runs, "hf": "hf_ranks.py"}.items():
        (folder / name).mkdir()
        jobs += [str(folder / name), "2", f"{ROOT}/tests/peers/{command}"]
    paths = [str(ROOT / path) for path in ("src", "tests/peers", "docs/pages/examples")]
    done = subprocess.run(
        [sys.executable, f"{ROOT}/tests/fork_ranks.py", "installed,clip_ranks,hf_ranks", *jobs],
        env={
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "GLOO_SOCKET_IFNAME": "lo",
            "PYTHONPATH": os.pathsep.join(paths),
        },
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.parametrize(("loss", "batch"), OVER_RANKS)
def test_clip_over_ranks_is_one_process_and_open_clip(loss, batch, folder):
    place = folder / f"{loss}-{batch}"
    assert (place / "codes").read_text() == "0 0", (place / "err").read_text()
    for other in ("termwise", "open_clip"):
        alone = clip_ranks.parameters(None, other, batch)
        assert_close(torch.load(place / "parameters"), alone, rtol=0, atol=1e-9)
    start = open_clip_loop.clip().state_dict()
    assert any(not torch.equal(start[name].double(), value) for name, value in alone.items())


def test_the_trainer_over_ranks_takes_the_steps_that_it_takes_with_its_own_loss(folder):
    assert (folder / "hf/codes").read_text() == "0 0", (folder / "hf/err").read_text()
    found = torch.load(folder / "hf/found")
    assert found["apart"] < 1e-5
    assert 3.5 < found["loss"] < 4.5  # about log 64


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


EXAMPLES = (accelerate_loop, hf_trainer, lightning_module, logging_terms)
EXAMPLES += (open_clip_loop, saelens_trainer, trl_gkd)


@pytest.mark.parametrize("name", [example.__name__ for example in EXAMPLES])
def test_each_example_says_how_it_is_run(name):
    text = (ROOT / f"docs/pages/examples/{name}.py").read_text()
    assert f"docs/pages/examples/{name}.py" in text.partition('"""\n\n')[0]
