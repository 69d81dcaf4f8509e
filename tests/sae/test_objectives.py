"""From a config to its objective."""

import dataclasses
import inspect
import math

import pytest
import torch
from declared import CASES
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


# Each objective as it is declared, with tensors for the terms that it has on request.
OBJECTIVE = {
    name.removeprefix("sae.").removesuffix(" masked"): case
    for name, case in CASES.items()
    if name.startswith("sae.") and name != "sae.vanilla_loss plain"
}


def parameters_of(name):
    return inspect.signature(OBJECTIVE[name].loss).parameters


def called(name, **given):
    """Call an objective with what it takes of some arguments, on six rows."""
    on_request = {"mask": None, "aux": ONE, "dead": NORM > 0}
    if "Sequence" in str(parameters_of(name)["x"].annotation):
        on_request |= {"x": [X], "x_hat": [X_HAT]}
    return OBJECTIVE[name].changed(6, **on_request | given)


COEFFICIENTS = ("sparsity_coeff", "aux_coeff", "pre_act_coeff", "kl_coeff", "reconstruction_coeff")


@pytest.mark.parametrize("coefficient", COEFFICIENTS)
def test_only_the_sparsity_has_its_coefficient_in_it(coefficient):
    assert set(OBJECTIVE) == {name for name in LOSSES if not name.endswith("auxiliary_k_loss")}
    before = dict.fromkeys(COEFFICIENTS, 0.5)
    after = before | {coefficient: 1.5}
    for name in OBJECTIVE:
        parameters = parameters_of(name)
        assert {key for key in parameters if key.endswith("_coeff")} <= set(COEFFICIENTS)
        terms, changed = called(name, **before), called(name, **after)
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


GENERATOR = torch.Generator().manual_seed(0)
X, X_HAT = torch.randn(6, 3, generator=GENERATOR), torch.randn(6, 3, generator=GENERATOR)
F, W_DEC = torch.randn(6, 5, generator=GENERATOR), torch.randn(5, 3, generator=GENERATOR)
ONE, NORM, THETA = torch.tensor(1.0), torch.ones(5), torch.full((5,), 0.3)
WEIGHED = {name: {} for name in OBJECTIVE} | {
    f"{name}, {penalty}": {"penalty": penalty, "l0_target": 2.0 if "relative" in penalty else None}
    for name in OBJECTIVE
    if "penalty" in parameters_of(name)
    for penalty in ("l0_relative", "tanh")
}


def weighed(name, weight):
    return called(name.partition(",")[0], **WEIGHED[name], **dict.fromkeys(COEFFICIENTS, weight))


@pytest.mark.parametrize("name", WEIGHED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_coefficient_may_be_a_tensor_of_any_type(name, dtype):
    ours = weighed(name, torch.tensor(0.25, dtype=dtype))
    assert ours.loss.dtype == torch.float32
    assert ours.metrics() == weighed(name, 0.25).metrics()


def test_a_coefficient_that_changes_compiles_once():
    def with_prefixes(weight):
        numbers = {"sparsity_coeff": weight, "aux": ONE, "aux_coeff": weight}
        return sae.matryoshka_loss(X, F, W_DEC, None, prefixes=(1, 5), **numbers)

    counts = CompileCounter()
    compiled = torch.compile(with_prefixes, fullgraph=True, backend=counts)
    for weight in (0.0, 0.25, 0.5):
        tensor = torch.tensor(weight)
        torch.testing.assert_close(compiled(tensor).loss, with_prefixes(weight).loss)
    assert counts.frame_count == 1


def left_out(name, term, of_the_term):
    def call(w, bad, x, f):
        one = {key: value * bad for key, value in of_the_term.items()}
        return called(name, x=x, f=f, **{f"{term}_coeff": w}, **one)

    return call


# For each coefficient, a call with that coefficient, and a number that its term alone is made of.
LEFT_OUT = {
    f"{name}, {term}": left_out(name, term, {key: value})
    for name in OBJECTIVE
    for term, key, value in (("sparsity", "decoder_norm", NORM), ("aux", "aux", ONE))
    if key in parameters_of(name) and "layer" not in str(parameters_of(name)["x"].annotation)
} | {
    "vanilla_loss, sparsity of squares": lambda w, bad, x, f: sae.vanilla_loss(
        x, torch.cat([f, bad * ONE.expand(6, 1)], 1), X_HAT, sparsity_coeff=w, p=2.0
    ),
    "crosscoder_loss, sparsity": lambda w, bad, x, f: sae.crosscoder_loss(
        x[:, None], f, X_HAT[:, None], W_DEC[:, None] * bad, sparsity_coeff=w
    ),
    "crosscoder_loss, aux": lambda w, bad, x, f: sae.crosscoder_loss(
        x[:, None],
        f,
        X_HAT[:, None],
        W_DEC[:, None],
        sparsity_coeff=0.1,
        aux_coeff=w,
        aux=ONE * bad,
    ),
    "end_to_end_loss, kl": lambda w, bad, x, f: sae.end_to_end_loss(
        X * bad, X_HAT, x=[X_HAT], x_hat=[x], f=f, kl_coeff=w, reconstruction_coeff=0.5
    ),
    "end_to_end_loss, reconstruction": lambda w, bad, x, f: sae.end_to_end_loss(
        f, F + 1, x=[x], x_hat=[X_HAT * bad], reconstruction_coeff=w
    ),
    "end_to_end_loss, sparsity": lambda w, bad, x, f: sae.end_to_end_loss(
        f, F + 1, x=[x], x_hat=[X_HAT], f=F * bad, sparsity_coeff=w
    ),
    "jumprelu_loss, l0_relative": lambda w, bad, x, f: sae.jumprelu_loss(
        x,
        f,
        W_DEC,
        threshold=THETA,
        sparsity_coeff=w,
        penalty="l0_relative",
        l0_target=1 / min(bad, 1e300),
    ),
    "jumprelu_loss, tanh": lambda w, bad, x, f: sae.jumprelu_loss(
        x,
        f,
        W_DEC * bad,
        threshold=THETA,
        sparsity_coeff=w,
        penalty="tanh",
        f=sae.jumprelu(f, THETA),
        x_hat=X_HAT,
    ),
    "jumprelu_loss, tanh by gate": lambda w, bad, x, f: sae.jumprelu_loss(
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
    "jumprelu_loss, pre_act": lambda w, bad, x, f: sae.jumprelu_loss(
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
    if name == "jumprelu_loss, l0_relative" and math.isnan(bad):
        pytest.skip("no target is NaN")
    results = []
    for number in (bad, 1.0):
        leaves = [X.clone().requires_grad_(), F.clone().requires_grad_()]
        terms = LEFT_OUT[name](0.0, number, *leaves)
        slopes = torch.autograd.grad(terms.loss, leaves, materialize_grads=True, retain_graph=True)
        results.append((terms.loss, *slopes))
        assert terms.loss.isfinite()
        if name == "jumprelu_loss, pre_act":
            assert terms.pre_act.requires_grad  # to be weighed anew
    torch.testing.assert_close(*results)
    if bad != 1e30:  # a tensor is not looked at
        assert LEFT_OUT[name](ONE * 0, bad, X, F).loss.isnan()


def test_every_coefficient_is_tried_at_0():
    tried = {(name.split(", ")[0], name.split(", ")[1].split()[0]) for name in LEFT_OUT}
    for loss in LOSSES:
        for key in inspect.signature(getattr(sae, loss)).parameters:
            if key.endswith("_coeff"):
                which = (loss, key.removesuffix("_coeff"))
                aliases = {("jumprelu_loss", "sparsity"): ("jumprelu_loss", "tanh")}
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
