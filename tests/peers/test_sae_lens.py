"""SAELens' own losses beside ours on the same tensors, and its trainer with the loss swapped."""

import itertools

import pytest
import torch
from sae_lens.config import SAETrainerConfig
from sae_lens.saes.abstopk_sae import AbsTopKTrainingSAE, AbsTopKTrainingSAEConfig
from sae_lens.saes.batchtopk_sae import BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig
from sae_lens.saes.gated_sae import GatedTrainingSAE, GatedTrainingSAEConfig
from sae_lens.saes.jumprelu_sae import JumpReLU, JumpReLUTrainingSAE, JumpReLUTrainingSAEConfig
from sae_lens.saes.matryoshka_batchtopk_sae import (
    MatryoshkaBatchTopKTrainingSAE,
    MatryoshkaBatchTopKTrainingSAEConfig,
)
from sae_lens.saes.sae import TrainStepInput
from sae_lens.saes.standard_sae import StandardTrainingSAE, StandardTrainingSAEConfig
from sae_lens.saes.topk_sae import TopKTrainingSAE, TopKTrainingSAEConfig
from sae_lens.training.sae_trainer import SAETrainer

from termwise.sae import (
    auxiliary_k_loss,
    batch_topk,
    gated_loss,
    jumprelu,
    jumprelu_l0,
    jumprelu_loss,
    lp_penalty,
    matryoshka_auxiliary_k_loss,
    matryoshka_loss,
    topk,
    topk_loss,
    vanilla_loss,
)

ROWS, D_MODEL, D_SAE = 64, 8, 24
SUM = {"feature_reduction": "sum"}
AUX = {"k_aux": D_MODEL // 2, "normalize": "none", "scale_by_count": True, **SUM}
WIDTHS = [6, 12, D_SAE]


# --- our loss in place of theirs, from the parameters of their modules ----------------------


def standard(sae, step):
    x, coeff = step.sae_in, step.coefficients["l1"]
    f, _ = sae.encode_with_hidden_pre(x)
    x_hat, norm, p = sae.decode(f), sae.W_dec.norm(dim=1), sae.cfg.lp_norm
    if p == 1:
        return vanilla_loss(x, f, x_hat, sparsity_coeff=coeff, decoder_norm=norm, **SUM).loss
    mse = vanilla_loss(x, f, x_hat, sparsity_coeff=0.0, **SUM).mse
    return mse + coeff * lp_penalty(f * norm, p=p).pow(1 / p).mean()


def gated(sae, step):
    x = step.sae_in
    f, _ = sae.encode_with_hidden_pre(x)
    return gated_loss(
        x,
        f,
        sae.decode(f),
        sae.process_sae_in(x) @ sae.W_enc + sae.b_gate,
        sae.W_dec,
        sae.b_dec,
        sparsity_coeff=step.coefficients["l1"],
        stop_decoder=False,
        decoder_norm=sae.W_dec.norm(dim=1),
        **SUM,
    ).loss


def jumping(sae, step):
    x, cfg, coeff = step.sae_in, sae.cfg, step.coefficients["l0"]
    pre = sae.process_sae_in(x) @ sae.W_enc + sae.b_enc
    theta = sae.threshold.to(pre.dtype)
    jump = {"bandwidth": cfg.jumprelu_bandwidth, "input_gradient": cfg.jumprelu_ste_to_input}
    if cfg.jumprelu_sparsity_loss_mode == "quadratic":
        f, k = jumprelu(pre, theta, **jump), cfg.target_l0
        mse = vanilla_loss(x, f, f @ sae.W_dec + sae.b_dec, sparsity_coeff=0.0, **SUM).mse
        return mse + coeff * (2 / k * (jumprelu_l0(pre, theta, **jump) - k).square()).mean()
    return jumprelu_loss(
        x,
        pre,
        sae.W_dec,
        sae.b_dec,
        threshold=theta,
        sparsity_coeff=coeff,
        penalty={"step": "l0", "tanh": "tanh"}[cfg.jumprelu_sparsity_loss_mode],
        tanh_scale=cfg.jumprelu_tanh_scale,
        pre_act_coeff=cfg.pre_act_loss_coefficient or 0.0,
        dead=step.dead_neuron_mask,
        **jump,
        **SUM,
    ).loss


def choosing(sae, step):
    x, cfg, dead = step.sae_in, sae.cfg, step.dead_neuron_mask
    norm = sae.W_dec.norm(dim=1)
    pre = (sae.process_sae_in(x) @ sae.W_enc + sae.b_enc) * norm
    unit = sae.W_dec / norm[:, None]
    named = {"dead": dead, "activation": "none", **AUX}
    if isinstance(sae, BatchTopKTrainingSAE):
        f = batch_topk(pre, k=cfg.k)
        x_hat = f @ unit + sae.b_dec
    elif isinstance(sae, AbsTopKTrainingSAE):
        f, named["activation"] = topk(pre, k=cfg.k, activation="abs"), "abs"
        x_hat = f.decode(unit, sae.b_dec)
    else:
        f = topk(pre, k=cfg.k)
        x_hat = f.decode(unit, sae.b_dec)
    if not isinstance(sae, MatryoshkaBatchTopKTrainingSAE):
        aux = auxiliary_k_loss(x, x_hat, pre, unit, **named)
        coeff = cfg.aux_loss_coefficient
        return topk_loss(x, f, x_hat, aux=aux, aux_coeff=coeff, dead=dead, **SUM).loss
    levels = cfg.matryoshka_widths
    if cfg.use_matryoshka_aux_loss:
        aux = matryoshka_auxiliary_k_loss(x, f, pre, unit, sae.b_dec, prefixes=levels, **named)
    else:
        aux = auxiliary_k_loss(x, x_hat, pre, unit, **named)
    mse = matryoshka_loss(x, f, unit, sae.b_dec, prefixes=levels, **SUM).mse
    return len(levels) * mse + cfg.aux_loss_coefficient * aux


# --- their modules --------------------------------------------------------------------------


def jumps():
    """Each mode, with and without a gradient for the input and a push on dead latents."""
    modes = {
        "step": {},
        "tanh": {"jumprelu_sparsity_loss_mode": "tanh"},
        "quadratic": {"jumprelu_sparsity_loss_mode": "quadratic", "target_l0": 5.0},
    }
    for (mode, options), ste, push in itertools.product(modes.items(), (False, True), (None, 0.1)):
        if mode == "quadratic" and push is not None:
            continue
        options = {
            "l0_coefficient": 0.05,
            "jumprelu_bandwidth": 0.5,
            "jumprelu_init_threshold": 0.3,
            "jumprelu_ste_to_input": ste,
            "pre_act_loss_coefficient": push,
            **options,
        }
        yield (
            f"jumprelu, {mode}, {ste}, {push}",
            (
                JumpReLUTrainingSAE,
                JumpReLUTrainingSAEConfig,
                jumping,
                options,
            ),
        )


MATRYOSHKA = (MatryoshkaBatchTopKTrainingSAE, MatryoshkaBatchTopKTrainingSAEConfig, choosing)
STANDARD = (StandardTrainingSAE, StandardTrainingSAEConfig, standard)
KINDS = {
    "standard": (*STANDARD, {"l1_coefficient": 0.3}),
    "standard, p 0.5": (*STANDARD, {"l1_coefficient": 0.01, "lp_norm": 0.5}),
    "gated": (GatedTrainingSAE, GatedTrainingSAEConfig, gated, {"l1_coefficient": 0.3}),
    **dict(jumps()),
    "topk": (TopKTrainingSAE, TopKTrainingSAEConfig, choosing, {"k": 3}),
    "abstopk": (AbsTopKTrainingSAE, AbsTopKTrainingSAEConfig, choosing, {"k": 3}),
    "batchtopk": (BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig, choosing, {"k": 2.5}),
    "matryoshka": (*MATRYOSHKA, {"k": 3, "matryoshka_widths": WIDTHS}),
    "matryoshka, aux by level": (
        *MATRYOSHKA,
        {"k": 3, "matryoshka_widths": WIDTHS, "use_matryoshka_aux_loss": True},
    ),
}
every_kind = pytest.mark.parametrize("name", KINDS)


def made(name, *, swapped):
    """Return a module of theirs, the same at each call, that computes their loss or ours."""
    kind, config, loss, options = KINDS[name]

    class Swapped(kind):
        def training_forward_pass(self, step_input):
            with torch.no_grad():  # for what it updates: thresholds
                output = super().training_forward_pass(step_input)
            output.loss = loss(self, step_input)
            return output

    sizes = {"d_in": D_MODEL, "d_sae": D_SAE, "dtype": "float64", "device": "cpu"}
    if config is not GatedTrainingSAEConfig:
        sizes["apply_b_dec_to_input"] = True
    torch.manual_seed(0)
    sae = (Swapped if swapped else kind)(config(**sizes, **options))
    with torch.no_grad():
        for key, parameter in sae.named_parameters():
            if key != "threshold":
                parameter.add_(0.3 * torch.randn_like(parameter))
    return sae


def rows(generator, n=ROWS):
    return torch.randn(n, D_MODEL, generator=generator, dtype=torch.float64)


@every_kind
@pytest.mark.parametrize("dead", ["some", "few", "none"])
def test_value_and_gradients(name, dead):
    mask = torch.arange(D_SAE) % {"some": 2, "few": 20, "none": 1}[dead] == 0
    mask = mask if dead != "none" else ~mask
    found = []
    for swapped in (False, True):
        sae = made(name, swapped=swapped)
        step = TrainStepInput(
            sae_in=rows(torch.Generator().manual_seed(1)),
            coefficients={"l1": 0.3, "l0": 0.05},
            dead_neuron_mask=mask,
            n_training_steps=0,
            is_logging_step=False,
        )
        loss = sae.training_forward_pass(step).loss
        names, parameters = zip(*sae.named_parameters(), strict=True)
        slopes = torch.autograd.grad(loss, parameters, materialize_grads=True)
        found.append({"loss": loss.detach(), **dict(zip(names, slopes, strict=True))})
    theirs, ours = found
    assert theirs["loss"].isfinite()
    for key, value in theirs.items():
        close = 1e-11 if key != "threshold" else 1e-6  # which they hold in float32
        torch.testing.assert_close(ours[key], value, rtol=close, atol=close, msg=key)


@every_kind
def test_ten_steps_of_their_trainer(name):
    found = []
    for swapped in (False, True):
        sae = made(name, swapped=swapped)
        cfg = SAETrainerConfig(
            total_training_samples=10 * ROWS,
            train_batch_size_samples=ROWS,
            lr=3e-3,
            lr_end=3e-3,
            dead_feature_window=2,
        )
        generator = torch.Generator().manual_seed(2)
        trainer = SAETrainer(cfg=cfg, sae=sae, data_provider=(rows(generator) for _ in range(10)))
        start = {key: value.clone() for key, value in sae.state_dict().items()}
        trainer.fit()
        assert trainer.n_training_steps == 10
        assert any(not torch.equal(start[key], value) for key, value in sae.state_dict().items())
        found.append(sae.state_dict())
    theirs, ours = found
    torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=1e-7)


def test_what_their_tanh_gives_the_threshold():
    """In the mean twice the derivative of the mean, -tanh(4) p(1): `threshold_gradient="gate"`."""
    n = 100_000
    pre = torch.special.ndtri((torch.arange(n, dtype=torch.float64) + 0.5) / n)[:, None]
    theta = torch.ones(1, dtype=torch.float64, requires_grad=True)
    penalty = (4 * JumpReLU.apply(pre, theta, 0.05, False)).tanh().mean()
    (theirs,) = torch.autograd.grad(penalty, theta)
    assert theirs.item() == pytest.approx(-0.4906, abs=1e-3)
    for how, slope in {"latents": theirs.item(), "gate": -0.2418}.items():
        ours = jumprelu_loss(
            torch.zeros_like(pre),
            pre,
            torch.ones(1, 1, dtype=torch.float64),
            threshold=theta,
            sparsity_coeff=1.0,
            bandwidth=0.05,
            penalty="tanh",
            threshold_gradient=how,
        ).sparsity
        assert torch.autograd.grad(ours, theta)[0].item() == pytest.approx(slope, abs=1e-4)
