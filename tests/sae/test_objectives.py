"""From a config to its objective."""

import dataclasses
import inspect
import math

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from termwise import sae


@pytest.mark.parametrize(
    "name",
    ["Vanilla", "TopK", "JumpReLU", "Gated", "Matryoshka", "Crosscoder", "EndToEnd"],
)
def test_a_config_gives_the_objective_of_its_name(name):
    cfg = getattr(sae, name)()
    objective = sae.get_objective(cfg)
    assert type(objective).__name__ == f"{name}Objective"
    assert objective.cfg is cfg
    with pytest.raises(AttributeError):
        setattr(cfg, dataclasses.fields(cfg)[0].name, 1.0)


def test_anything_else_is_refused():
    with pytest.raises(TypeError, match=r"^get_objective needs a config of termwise.sae, got str$"):
        sae.get_objective("vanilla")


def test_one_prefix_of_full_width_is_vanilla():
    x, f, W_dec, b_dec = torch.randn(6, 4), torch.rand(6, 9), torch.randn(9, 4), torch.randn(4)
    whole = sae.matryoshka_loss(x, f, W_dec, b_dec, prefixes=(9,), sparsity_coeff=0.1)
    vanilla = sae.vanilla_loss(x, f, f @ W_dec + b_dec, sparsity_coeff=0.1)
    for name in ("loss", "mse", "sparsity", "l0", "l1"):
        torch.testing.assert_close(getattr(whole, name), getattr(vanilla, name))


LOSSES = [name for name in dir(sae) if name.endswith("_loss")]
OBJECTIVES = [name for name in dir(sae) if name.endswith("Objective")]


@pytest.mark.parametrize("name", [*LOSSES, *OBJECTIVES])
def test_latents_stand_before_their_reconstruction(name):
    """No two objectives take tensors that may have one shape in different orders."""
    what = getattr(sae, name)
    parameters = inspect.signature(what.forward if isinstance(what, type) else what).parameters
    coded = [key for key in parameters if key in ("x", "f", "x_hat")]
    assert coded == [key for key in ("x", "f", "x_hat") if key in coded]
    ordered = [key for key, one in parameters.items() if one.kind is not one.KEYWORD_ONLY]
    ordered = [key for key in ordered if key != "self"]
    if "f" in ordered and "x_hat" in ordered:
        assert ordered[:3] == ["x", "f", "x_hat"]


def test_latents_as_wide_as_the_activations_are_not_their_reconstruction():
    x, f, x_hat = (torch.randn(5, 4, dtype=torch.float64) for _ in range(3))
    error = (x - x_hat).square().mean()
    for terms in (
        sae.vanilla_loss(x, f, x_hat, sparsity_coeff=0.0),
        sae.topk_loss(x, f, x_hat),
        sae.gated_loss(x, f, x_hat, f, torch.eye(4).double(), sparsity_coeff=0.0),
    ):
        torch.testing.assert_close(terms.mse, error)


def every_call(**coefficients):
    """The terms of each loss, with coefficients for those that take them."""
    generator = torch.Generator().manual_seed(0)
    x, x_hat, f, pre, W_dec = (
        torch.randn(*shape, generator=generator, dtype=torch.float64)
        for shape in ((6, 4), (6, 4), (6, 5), (6, 5), (5, 4))
    )
    dead = torch.arange(5) < 2
    aux = torch.tensor(2.0, dtype=torch.float64)
    jump = {"threshold": f[0].abs(), "penalty": "tanh", "dead": dead}
    layers = {"x": x[:, None], "x_hat": x_hat[:, None], "W_dec": W_dec[:, None]}
    calls = {
        "vanilla_loss": {"x": x, "f": f, "x_hat": x_hat},
        "topk_loss": {"x": x, "f": f, "x_hat": x_hat, "aux": aux, "dead": dead},
        "jumprelu_loss": {"x": x, "pre": pre, "W_dec": W_dec, **jump},
        "gated_loss": {"x": x, "f": f, "x_hat": x_hat, "f_gate": pre, "W_dec": W_dec},
        "matryoshka_loss": {"x": x, "f": f, "W_dec": W_dec, "b_dec": None, "prefixes": (2, 5)},
        "crosscoder_loss": {"f": f, **layers},
        "end_to_end_loss": {
            "logits": x,
            "original_logits": x_hat,
            "x": [x],
            "f": f,
            "x_hat": [x_hat],
        },
    }
    terms = {}
    for name, call in calls.items():
        parameters = inspect.signature(getattr(sae, name)).parameters
        given = {key: value for key, value in coefficients.items() if key in parameters}
        terms[name] = getattr(sae, name)(**call, **given)
    return terms


COEFFICIENTS = ("sparsity_coeff", "aux_coeff", "pre_act_coeff", "kl_coeff", "reconstruction_coeff")


@pytest.mark.parametrize("coefficient", COEFFICIENTS)
def test_only_the_sparsity_has_its_coefficient_in_it(coefficient):
    objectives = {name for name in LOSSES if not name.endswith("auxiliary_k_loss")}
    assert objectives == set(every_call(sparsity_coeff=0.5))
    before = dict.fromkeys(COEFFICIENTS, 0.5)
    after = before | {coefficient: 1.5}
    for name, terms in every_call(**before).items():
        parameters = inspect.signature(getattr(sae, name)).parameters
        assert {key for key in parameters if key.endswith("_coeff")} <= set(COEFFICIENTS)
        changed = every_call(**after)[name]
        for key, value in terms.items():
            if key == "loss":
                moved = changed.loss - value
                term = getattr(terms, coefficient.removesuffix("_coeff"), torch.zeros(()))
                factor = 2 if coefficient == "sparsity_coeff" else 1
                expected = factor * term if coefficient in parameters else torch.zeros_like(moved)
                torch.testing.assert_close(moved, expected.to(moved), msg=name)
            elif key == coefficient.removesuffix("_coeff") == "sparsity":
                torch.testing.assert_close(getattr(changed, key), 3 * value)
            else:
                torch.testing.assert_close(getattr(changed, key), value, equal_nan=True)


WEIGHED = {
    "vanilla": lambda weight: sae.vanilla_loss(X, F, X_HAT, sparsity_coeff=weight),
    "gated": lambda weight: sae.gated_loss(X, F, X_HAT, F, W_DEC, sparsity_coeff=weight),
    "matryoshka": lambda weight: sae.matryoshka_loss(
        X, F, W_DEC, None, prefixes=(1, 4), sparsity_coeff=weight, aux=ONE, aux_coeff=weight
    ),
    "crosscoder": lambda weight: sae.crosscoder_loss(
        X[:, None], F, X_HAT[:, None], W_DEC[:, None], sparsity_coeff=weight
    ),
    "end to end": lambda weight: sae.end_to_end_loss(
        X, X_HAT, f=F, sparsity_coeff=weight, kl_coeff=weight
    ),
    "topk": lambda weight: sae.topk_loss(
        X, F, X_HAT, aux=ONE, aux_coeff=weight, dead=torch.ones(4) > 0
    ),
    **{
        f"jumprelu, {penalty}": lambda weight, penalty=penalty: sae.jumprelu_loss(
            X,
            F,
            W_DEC,
            threshold=torch.full((4,), 0.3),
            sparsity_coeff=weight,
            penalty=penalty,
            l0_target=2.0 if penalty == "l0_relative" else None,
            pre_act_coeff=weight,
            dead="all",
        )
        for penalty in ("l0", "l0_relative", "tanh")
    },
}
GENERATOR = torch.Generator().manual_seed(0)
X, X_HAT = torch.randn(6, 3, generator=GENERATOR), torch.randn(6, 3, generator=GENERATOR)
F, W_DEC = torch.randn(6, 4, generator=GENERATOR), torch.randn(4, 3, generator=GENERATOR)
ONE = torch.tensor(1.0)


@pytest.mark.parametrize("name", WEIGHED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_coefficient_may_be_a_tensor_of_any_type(name, dtype):
    ours = WEIGHED[name](torch.tensor(0.25, dtype=dtype))
    assert ours.loss.dtype == torch.float32
    assert ours.metrics() == WEIGHED[name](0.25).metrics()


def test_a_coefficient_that_changes_compiles_once():
    counts = CompileCounter()
    compiled = torch.compile(WEIGHED["matryoshka"], fullgraph=True, backend=counts)
    for weight in (0.0, 0.25, 0.5):
        tensor = torch.tensor(weight)
        torch.testing.assert_close(compiled(tensor).loss, WEIGHED["matryoshka"](weight).loss)
    assert counts.frame_count == 1


NORM = torch.ones(4)
THETA = torch.full((4,), 0.3)
# For each coefficient, a call with that coefficient, and a number that its term alone is made of.
LEFT_OUT = {
    "vanilla, sparsity": lambda w, bad, x, f: sae.vanilla_loss(
        x, f, X_HAT, sparsity_coeff=w, decoder_norm=NORM * bad
    ),
    "vanilla, sparsity of squares": lambda w, bad, x, f: sae.vanilla_loss(
        x, torch.cat([f, bad * ONE.expand(6, 1)], 1), X_HAT, sparsity_coeff=w, p=2.0
    ),
    "gated, sparsity": lambda w, bad, x, f: sae.gated_loss(
        x, f, X_HAT, f, W_DEC, sparsity_coeff=w, decoder_norm=NORM * bad
    ),
    "topk, aux": lambda w, bad, x, f: sae.topk_loss(
        x, f, X_HAT, aux_coeff=w, aux=ONE * bad, dead=NORM > 0
    ),
    "matryoshka, sparsity": lambda w, bad, x, f: sae.matryoshka_loss(
        x, f, W_DEC, None, prefixes=(1, 4), sparsity_coeff=w, decoder_norm=NORM * bad
    ),
    "matryoshka, aux": lambda w, bad, x, f: sae.matryoshka_loss(
        x, f, W_DEC, None, prefixes=(1, 4), aux_coeff=w, aux=ONE * bad
    ),
    "crosscoder, sparsity": lambda w, bad, x, f: sae.crosscoder_loss(
        x[:, None], f, X_HAT[:, None], W_DEC[:, None] * bad, sparsity_coeff=w
    ),
    "crosscoder, aux": lambda w, bad, x, f: sae.crosscoder_loss(
        x[:, None],
        f,
        X_HAT[:, None],
        W_DEC[:, None],
        sparsity_coeff=0.1,
        aux_coeff=w,
        aux=ONE * bad,
    ),
    "end to end, kl": lambda w, bad, x, f: sae.end_to_end_loss(
        X * bad, X_HAT, x=[X_HAT], x_hat=[x], f=f, kl_coeff=w, reconstruction_coeff=0.5
    ),
    "end to end, reconstruction": lambda w, bad, x, f: sae.end_to_end_loss(
        f, F + 1, x=[x], x_hat=[X_HAT * bad], reconstruction_coeff=w
    ),
    "end to end, sparsity": lambda w, bad, x, f: sae.end_to_end_loss(
        f, F + 1, x=[x], x_hat=[X_HAT], f=F * bad, sparsity_coeff=w
    ),
    "jumprelu, l0_relative": lambda w, bad, x, f: sae.jumprelu_loss(
        x,
        f,
        W_DEC,
        threshold=THETA,
        sparsity_coeff=w,
        penalty="l0_relative",
        l0_target=1 / min(bad, 1e300),
    ),
    "jumprelu, tanh": lambda w, bad, x, f: sae.jumprelu_loss(
        x,
        f,
        W_DEC * bad,
        threshold=THETA,
        sparsity_coeff=w,
        penalty="tanh",
        f=sae.jumprelu(f, THETA),
        x_hat=X_HAT,
    ),
    "jumprelu, tanh by gate": lambda w, bad, x, f: sae.jumprelu_loss(
        x,
        f,
        W_DEC * bad,
        threshold=THETA,
        sparsity_coeff=w,
        penalty="tanh",
        threshold_gradient="gate",
        f=sae.jumprelu(f, THETA),
        x_hat=X_HAT,
    ),
    "jumprelu, pre_act": lambda w, bad, x, f: sae.jumprelu_loss(
        x,
        f,
        W_DEC * bad,
        threshold=THETA,
        sparsity_coeff=0.1,
        pre_act_coeff=w,
        dead="all",
        f=sae.jumprelu(f, THETA),
        x_hat=X_HAT,
    ),
}


@pytest.mark.parametrize("bad", [math.inf, math.nan, 1e30])
@pytest.mark.parametrize("name", LEFT_OUT)
def test_what_has_coefficient_0_is_left_out(name, bad):
    """Of the value and of the gradient, though 0 times infinity is NaN."""
    if name == "jumprelu, l0_relative" and math.isnan(bad):
        pytest.skip("no target is NaN")
    results = []
    for number in (bad, 1.0):
        leaves = [X.clone().requires_grad_(), F.clone().requires_grad_()]
        terms = LEFT_OUT[name](0.0, number, *leaves)
        slopes = torch.autograd.grad(terms.loss, leaves, materialize_grads=True, retain_graph=True)
        results.append((terms.loss, *slopes))
        assert terms.loss.isfinite()
        if name == "jumprelu, pre_act":
            assert terms.pre_act.requires_grad  # to be weighed anew
    torch.testing.assert_close(*results)
    if bad != 1e30:  # a tensor is not looked at
        assert LEFT_OUT[name](ONE * 0, bad, X, F).loss.isnan()


def test_every_coefficient_is_tried_at_0():
    tried = {(name.split(", ")[0], name.split(", ")[1].split()[0]) for name in LEFT_OUT}
    for loss in LOSSES:
        for key in inspect.signature(getattr(sae, loss)).parameters:
            if key.endswith("_coeff"):
                which = (loss.removesuffix("_loss").replace("_", " "), key.removesuffix("_coeff"))
                aliases = {("jumprelu", "sparsity"): ("jumprelu", "tanh")}
                assert aliases.get(which, which) in tried


def test_the_parts_of_a_term_that_are_left_out_are_returned():
    gone = {"aux": ONE * math.inf, "aux_coeff": 0.0}
    assert sae.topk_loss(X, F, X_HAT, dead=NORM > 0, **gone).aux == math.inf
    terms = sae.end_to_end_loss(X * math.nan, X_HAT, f=F, sparsity_coeff=0.5, kl_coeff=0.0)
    assert terms.kl.isnan()
    assert terms.loss == terms.sparsity


def test_a_loss_of_which_all_is_left_out_has_a_gradient_of_0():
    logits = torch.full((6, 3), math.nan, requires_grad=True)
    loss = sae.end_to_end_loss(logits, X_HAT, kl_coeff=0.0).loss
    assert (loss.item(), loss.dtype) == (0, torch.float32)
    loss.backward()
    assert logits.grad.count_nonzero() == 0


def test_a_prefix_of_weight_0_is_left_out():
    far = W_DEC.clone()
    far[1] = 1e30
    f = F.clone().requires_grad_()
    call = {"prefixes": (1, 2), "weights": (1.0, 0.0)}
    terms = sae.matryoshka_loss(X, f, far, None, **call)
    assert terms.mse_per_prefix[1] == math.inf
    assert terms.loss == terms.mse == terms.mse_per_prefix[0]
    assert torch.autograd.grad(terms.loss, f)[0].isfinite().all()
