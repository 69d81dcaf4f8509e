"""JumpReLU against explicit sums over the kernel in float64, and its objective against both."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import termwise as tw
from termwise.sae._jumprelu import (
    JumpReLU,
    JumpReLUObjective,
    jumprelu,
    jumprelu_l0,
    jumprelu_loss,
)
from termwise.sae._penalties import lp_penalty

PENALTIES = {
    "l0": {"penalty": "l0"},
    "l0_relative": {"penalty": "l0_relative", "l0_target": 1.5},
    "tanh": {"penalty": "tanh", "tanh_scale": 0.7},
    "l0, with the input": {"input_gradient": True},
    "tanh, with the input": {"penalty": "tanh", "input_gradient": True},
    "tanh, by the gate": {"penalty": "tanh", "threshold_gradient": "gate", "input_gradient": True},
    "all pushed": {"pre_act_coeff": 0.3},
    "summed": {"feature_reduction": "sum", "pre_act_coeff": 0.2},
}


def kernel(pre, threshold, bandwidth):
    return ((pre - threshold) / bandwidth).abs().lt(0.5).to(pre.dtype)


def data(n=6, d_model=3, d_sae=5, *, seed=0, dtype=torch.float64):
    """x, and what has a gradient: pre-activations near their thresholds, and a decoder."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    threshold = torch.rand(d_sae, generator=generator, dtype=torch.float64) + 0.1
    leaves = {
        "pre": normal(n, d_sae),
        "threshold": threshold.to(dtype),
        "W_dec": normal(d_sae, d_model),
        "b_dec": normal(d_model),
    }
    return normal(n, d_model), {name: leaf.requires_grad_() for name, leaf in leaves.items()}


def call(x, leaves, **options):
    numbers = {"sparsity_coeff": 0.25, "bandwidth": 0.6, "dead": "all"} | options
    return jumprelu_loss(
        x,
        leaves["pre"],
        leaves["W_dec"],
        leaves.get("b_dec"),
        threshold=leaves["threshold"],
        **numbers,
    )


def gradients(terms, leaves):
    return torch.autograd.grad(terms.loss, list(leaves.values()), materialize_grads=True)


# --- the activation and the count -----------------------------------------------------------


@given(
    n=st.integers(1, 8),
    d_sae=st.integers(1, 6),
    seed=st.integers(0, 2**30),
    bandwidth=st.sampled_from([0.05, 0.5, 2.0]),
    input_gradient=st.booleans(),
)
def test_gradients_are_sums_over_the_kernel(n, d_sae, seed, bandwidth, input_gradient):
    _, leaves = data(n, 2, d_sae, seed=seed)
    pre, threshold = leaves["pre"], leaves["threshold"]
    options = {"bandwidth": bandwidth, "input_gradient": input_gradient}
    upstream = torch.randn(n, d_sae, dtype=torch.float64)
    near = kernel(pre.detach(), threshold.detach(), bandwidth)

    f = jumprelu(pre, threshold, **options)
    assert torch.equal(f, pre * (pre > threshold))
    for_pre, for_threshold = torch.autograd.grad((f * upstream).sum(), (pre, threshold))
    jump = upstream * near * threshold.detach() / bandwidth
    torch.testing.assert_close(for_threshold, -jump.sum(0), rtol=1e-12, atol=1e-12)
    expected = upstream * (pre > threshold) + (jump if input_gradient else 0)
    torch.testing.assert_close(for_pre, expected, rtol=1e-12, atol=1e-12)

    count = jumprelu_l0(pre, threshold, **options)
    assert torch.equal(count, (pre > threshold).sum(1).double())
    for_pre, for_threshold = torch.autograd.grad(
        count @ upstream[:, 0], (pre, threshold), materialize_grads=True
    )
    jump = upstream[:, :1] * near / bandwidth
    torch.testing.assert_close(for_threshold, -jump.sum(0), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(for_pre, jump if input_gradient else torch.zeros_like(pre))


@pytest.mark.parametrize("bandwidth", [0.02, 0.1, 0.5, 0.9])
def test_the_estimates_are_unbiased_where_the_density_is_even(bandwidth):
    # h uniform on (0, 1): E[h > theta] = 1 - theta, so d L0 / d theta = -1, and d E[f] / d theta =
    # -theta. A draw of the first is -1 / bandwidth with probability bandwidth, else 0.
    rows, d_sae = 20_000, 16
    generator = torch.Generator().manual_seed(7)
    pre = torch.rand(rows, d_sae, generator=generator, dtype=torch.float64)
    threshold = torch.full((d_sae,), 0.5, dtype=torch.float64, requires_grad=True)
    error = 4 * math.sqrt((1 / bandwidth - 1) / (rows * d_sae))
    l0 = jumprelu_l0(pre, threshold, bandwidth=bandwidth).mean()
    (slope,) = torch.autograd.grad(l0, threshold)
    assert abs(slope.mean().item() + 1) < error
    total = jumprelu(pre, threshold, bandwidth=bandwidth).sum() / rows
    (slope,) = torch.autograd.grad(total, threshold)
    assert abs(slope.mean().item() + 0.5) < error / 2


def test_what_is_not_finite():
    threshold = torch.ones(3)
    f = jumprelu(torch.tensor([[-math.inf, math.inf, math.nan]]), threshold)
    torch.testing.assert_close(f, torch.tensor([[0.0, math.inf, math.nan]]), equal_nan=True)
    assert jumprelu(torch.ones(1, 3), threshold).count_nonzero() == 0  # at theta: not above it


@pytest.mark.parametrize("function", [jumprelu, jumprelu_l0])
def test_the_backward_pass_keeps_the_arguments_alone(function):
    _, leaves = data(50, 2, 40)
    pre, threshold = leaves["pre"], leaves["threshold"]
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(kept.append, lambda x: x):
        function(pre, threshold)
    assert {x.data_ptr() for x in kept} == {pre.data_ptr(), threshold.data_ptr()}


# --- penalties of latents below their threshold ---------------------------------------------


def normal_quantiles(n=200_000):
    """Mid-points of as many equal parts: sums over them are integrals over a normal density."""
    return torch.special.ndtri((torch.arange(n, dtype=torch.float64) + 0.5) / n)[:, None]


def density(h):
    return math.exp(-h * h / 2) / math.sqrt(2 * math.pi)


@pytest.mark.parametrize(("h", "scale"), [(1.0, 4.0), (0.3, 4.0), (0.1, 0.1), (-0.7, 2.0)])
def test_the_gradient_by_the_gate_is_that_of_the_mean(h, scale):
    # d/dtheta of the integral over h > theta of tanh(c |h|) p(h) is -tanh(c |theta|) p(theta).
    pre, W_dec = normal_quantiles(), torch.ones(1, 1, dtype=torch.float64)
    slopes = {}
    for how in ("latents", "gate"):
        theta = torch.full((1,), h, dtype=torch.float64, requires_grad=True)
        terms = jumprelu_loss(
            torch.zeros_like(pre),
            pre,
            W_dec,
            threshold=theta,
            sparsity_coeff=1.0,
            bandwidth=0.05,
            penalty="tanh",
            tanh_scale=scale,
            threshold_gradient=how,
        )
        (slope,) = torch.autograd.grad(terms.sparsity, theta)
        slopes[how] = slope.item()
    assert slopes["gate"] == pytest.approx(-math.tanh(scale * abs(h)) * density(h), rel=2e-3)
    # SAELens' expression, in the mean: the slope c of a latent of 0 in half of the kernel.
    steep = scale * (1 + (1 - math.tanh(scale * h) ** 2) * math.copysign(1, h)) / 2
    assert slopes["latents"] == pytest.approx(-h * steep * density(h), rel=3e-2)
    if (h, scale) == (1.0, 4.0):
        assert slopes["gate"] == pytest.approx(-0.2418, abs=1e-4)
        assert slopes["latents"] == pytest.approx(-0.4906, abs=1e-4)
    if (h, scale) == (0.1, 0.1):  # nearly linear, where the two are one
        assert slopes["latents"] == pytest.approx(slopes["gate"], rel=1e-3)


def test_l1_of_jumprelu_latents_has_the_whole_kernel():
    # -theta p(theta), of which half came from above the threshold.
    pre = normal_quantiles()
    theta = torch.full((1,), 0.3, dtype=torch.float64, requires_grad=True)
    penalty = lp_penalty(jumprelu(pre, theta, bandwidth=0.05), p=1.0).mean()
    (slope,) = torch.autograd.grad(penalty, theta)
    assert slope.item() == pytest.approx(-0.1144, abs=1e-4)
    assert slope.item() == pytest.approx(-0.3 * density(0.3), rel=1e-3)


# --- the objective --------------------------------------------------------------------------


@pytest.mark.parametrize("options", PENALTIES.values(), ids=PENALTIES.keys())
def test_padding_enters_nothing(options):
    x, leaves = data(8, 3, 5)
    mask = torch.arange(8) % 3 != 1
    target = torch.randn(8, 3, dtype=torch.float64)
    kept = {"pre": leaves["pre"].detach()[mask].requires_grad_()}
    kept |= {name: leaf for name, leaf in leaves.items() if name != "pre"}
    expected = call(x[mask], kept, target=target[mask], **options)
    with torch.no_grad():
        for rows in (x, leaves["pre"], target):
            rows[~mask] = math.nan
    terms = call(x, leaves, mask=mask, target=target, **options)
    for (name, ours), (_, theirs) in zip(terms.items(), expected.items(), strict=True):
        torch.testing.assert_close(ours, theirs, msg=name)
    first, *others = gradients(terms, leaves)
    theirs = gradients(expected, kept)
    torch.testing.assert_close(first[mask], theirs[0])
    assert first[~mask].count_nonzero() == 0
    torch.testing.assert_close(others, list(theirs[1:]))


def test_a_transcoder_reconstructs_its_target():
    x, leaves = data()
    assert call(x, leaves, target=2 * x).metrics() == call(2 * x, leaves).metrics()


def test_no_row_counts():
    x, leaves = data()
    terms = call(x, leaves, mask=torch.zeros(6, dtype=torch.bool))
    assert all(terms.metrics()[name] != terms.metrics()[name] for name in ("loss", "mse", "l0"))


def test_the_logarithm_of_a_threshold():
    x, leaves = data()
    threshold = leaves["threshold"]
    logarithm = threshold.detach().log().requires_grad_()
    plain = call(x, leaves)
    terms = jumprelu_loss(
        x,
        leaves["pre"],
        leaves["W_dec"],
        leaves["b_dec"],
        log_threshold=logarithm,
        sparsity_coeff=0.25,
        bandwidth=0.6,
        dead="all",
    )
    assert terms.metrics() == pytest.approx(plain.metrics())
    (ours,) = torch.autograd.grad(terms.loss, logarithm)
    (theirs,) = torch.autograd.grad(plain.loss, threshold)
    torch.testing.assert_close(ours, theirs * threshold.detach())
    assert theirs.count_nonzero() > 0


def test_the_square_comes_after_the_mean():
    # Rows of 0 and of 4 active latents: their mean is on target, no row is.
    pre = torch.tensor([[0.0] * 4, [1.0] * 4], dtype=torch.float64)
    x, W_dec = torch.zeros(2, 1, dtype=torch.float64), torch.zeros(4, 1, dtype=torch.float64)
    threshold = torch.full((4,), 0.5, dtype=torch.float64, requires_grad=True)
    options = {"threshold": threshold, "sparsity_coeff": 3.0, "bandwidth": 2.0}
    terms = jumprelu_loss(x, pre, W_dec, penalty="l0_relative", l0_target=2.0, **options)
    assert terms.sparsity.item() == 0
    terms = jumprelu_loss(x, pre, W_dec, penalty="l0_relative", l0_target=1.0, **options)
    assert terms.sparsity.item() == 3
    # 3 * 2 (L0 - 1) dL0, and each latent's dL0 is -1 / 2 in both rows.
    (slope,) = torch.autograd.grad(terms.loss, threshold)
    torch.testing.assert_close(slope, torch.full_like(slope, -3.0))


def test_the_push_reaches_dead_latents_alone():
    x, leaves = data()
    dead = torch.tensor([True, False, False, True, False])
    terms = call(x, leaves, pre_act_coeff=2.0, dead=dead)
    (push,) = torch.autograd.grad(terms.pre_act, leaves["pre"])
    assert push[:, ~dead].count_nonzero() == 0
    below = (leaves["pre"] < leaves["threshold"])[:, dead]
    norm = leaves["W_dec"].detach().norm(dim=1)[dead]
    torch.testing.assert_close(push[:, dead], -1 / 6 * below * norm)
    assert call(x, leaves, pre_act_coeff=2.0, dead=dead & False).pre_act.item() == 0


def test_without_dead_latents_there_is_no_push():
    x, leaves = data()
    terms = call(x, leaves, dead=None)
    assert terms.pre_act.item() == 0
    mask = torch.ones(5, dtype=torch.bool)
    every = call(x, leaves, pre_act_coeff=0.5, dead=mask).metrics()
    assert call(x, leaves, pre_act_coeff=0.5, dead="all").metrics() == every


def test_the_loss_is_the_sum_of_the_terms_in_the_graph():
    x, leaves = data()
    terms = call(x, leaves, pre_act_coeff=0.5)
    total = terms.mse + terms.sparsity + 0.5 * terms.pre_act
    torch.testing.assert_close(terms.loss, total)
    ours = torch.autograd.grad(terms.loss, list(leaves.values()), retain_graph=True)
    torch.testing.assert_close(ours, torch.autograd.grad(total, list(leaves.values())))
    assert not terms.l0.requires_grad
    assert not terms.threshold_mean.requires_grad


def test_gradcheck_to_second_order_away_from_the_jump():
    x, leaves = data(4, 3, 4)
    threshold = leaves["threshold"].detach()

    def loss(pre, W_dec, b_dec):
        terms = jumprelu_loss(
            x,
            pre,
            W_dec,
            b_dec,
            threshold=threshold,
            sparsity_coeff=0.5,
            bandwidth=1e-9,
            penalty="tanh",
            pre_act_coeff=0.5,
            dead="all",
        )
        return terms.loss, terms.mse, terms.pre_act

    inputs = (leaves["pre"], leaves["W_dec"], leaves["b_dec"])
    assert torch.autograd.gradcheck(loss, inputs)
    assert torch.autograd.gradgradcheck(loss, inputs)


# --- refusals -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bandwidth": 0.0}, "jumprelu_loss needs bandwidth > 0, got 0.0"),
        ({"bandwidth": math.nan}, "jumprelu_loss needs bandwidth > 0, got nan"),
        ({"penalty": "tanh", "tanh_scale": -1}, "jumprelu_loss needs tanh_scale > 0, got -1"),
        ({"penalty": "l0_relative"}, 'penalty="l0_relative" needs l0_target > 0, got None'),
        (
            {"penalty": "l0_relative", "l0_target": 0.0},
            'penalty="l0_relative" needs l0_target > 0, got 0.0',
        ),
        (
            {"l0_target": 5.0},
            'l0_target belongs to penalty="l0_relative", got penalty="l0"',
        ),
        (
            {"log_threshold": torch.zeros(5)},
            "jumprelu_loss needs one of threshold and log_threshold, got both",
        ),
        (
            {"threshold": None},
            "jumprelu_loss needs one of threshold and log_threshold, got neither",
        ),
        (
            {"pre_act_coeff": 3e-6},
            "jumprelu_loss needs dead where pre_act_coeff is not 0, got None: pass a mask of the "
            'dead latents, or dead="all" for Anthropic\'s formula',
        ),
    ],
)
def test_values_that_make_no_sense_are_refused(options, message):
    x, leaves = data(dtype=torch.float32)
    given = {"threshold": leaves["threshold"], "sparsity_coeff": 1.0} | options
    with pytest.raises(ValueError, match=f"^{message}$"):
        jumprelu_loss(x, leaves["pre"], leaves["W_dec"], **given)


def test_what_does_not_fit_is_refused():
    x, leaves = data(dtype=torch.float32)
    with pytest.raises(tw.ContractError, match="W_dec.*axis d_sae is 4, but it is 5 in pre"):
        call(x, leaves | {"W_dec": leaves["W_dec"][:4]})
    with pytest.raises(tw.ContractError, match='penalty needs Literal.*got str "l1"'):
        call(x, leaves, penalty="l1")
    for function in (jumprelu, jumprelu_l0):
        with pytest.raises(ValueError, match="needs bandwidth > 0, got -1"):
            function(leaves["pre"], leaves["threshold"], bandwidth=-1)
        with pytest.raises(tw.ContractError, match="threshold.*axis d_sae is 6, but it is 5"):
            function(leaves["pre"], torch.zeros(6))


# --- precision ------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("options", PENALTIES.values(), ids=PENALTIES.keys())
def test_halves_are_lifted_before_any_arithmetic(dtype, options):
    x, leaves = data(12, 8, 6, dtype=dtype)
    with torch.no_grad():
        for leaf in (x, leaves["pre"], leaves["threshold"]):
            leaf *= 200  # whose squares overflow in fp16
    wide = {name: leaf.detach().double().requires_grad_() for name, leaf in leaves.items()}
    terms = call(x, leaves, bandwidth=100.0, **options)
    expected = call(x.double(), wide, bandwidth=100.0, **options)
    for (name, ours), (_, theirs) in zip(terms.items(), expected.items(), strict=True):
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours.double(), theirs, rtol=2e-6, atol=1e-6, msg=name)
    pairs = zip(gradients(terms, leaves), gradients(expected, wide), strict=True)
    for ours, theirs in pairs:
        assert ours.dtype == dtype
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-2, atol=1e-2)


def test_a_threshold_in_float32_keeps_its_gradient_beside_halves():
    x, leaves = data(64, 4, 3)
    pre = leaves["pre"].detach().bfloat16()
    threshold = leaves["threshold"].detach().float().requires_grad_()
    f = jumprelu(pre, threshold, bandwidth=0.5)
    assert f.dtype == torch.bfloat16
    terms = jumprelu_loss(
        x.bfloat16(),
        pre,
        leaves["W_dec"].detach().float(),
        threshold=threshold,
        sparsity_coeff=0.0,
        bandwidth=0.5,
    )
    (ours,) = torch.autograd.grad(terms.loss, threshold)
    twin = threshold.detach().double().requires_grad_()
    expected = jumprelu_loss(
        x.bfloat16().double(),
        pre.double(),
        leaves["W_dec"].detach().float().double(),
        threshold=twin,
        sparsity_coeff=0.0,
        bandwidth=0.5,
    )
    torch.testing.assert_close(ours.double(), torch.autograd.grad(expected.loss, twin)[0])


@pytest.mark.parametrize("options", PENALTIES.values(), ids=PENALTIES.keys())
def test_autocast_changes_nothing(options):
    x, leaves = data(16, 8, 12, dtype=torch.float32)
    plain = call(x, leaves, **options)
    expected = gradients(plain, leaves)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        terms = call(x, leaves, **options)
        assert terms.metrics() == plain.metrics()
        for ours, theirs in zip(gradients(terms, leaves), expected, strict=True):
            assert torch.equal(ours, theirs)


# --- transforms -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        PENALTIES["l0_relative"] | {"input_gradient": True, "pre_act_coeff": 0.3},
        {"penalty": "tanh", "feature_reduction": "sum"},
    ],
)
def test_compiled_is_eager_under_autocast_too(options):
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    x, leaves = data(9, 8, 12, dtype=torch.float32)
    masks = {"mask": torch.arange(9) % 4 != 1, "dead": torch.arange(12) % 2 == 0}
    theirs = call(x, leaves, **masks, **options)
    expected = gradients(theirs, leaves)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours = compiled(x, leaves, **masks, **options)
        torch.testing.assert_close(gradients(ours, leaves), expected)
    torch.testing.assert_close(dict(ours.items()), dict(theirs.items()))


@pytest.mark.parametrize("options", PENALTIES.values(), ids=PENALTIES.keys())
def test_the_module_is_the_function(options):
    x, leaves = data()
    objective = JumpReLUObjective(JumpReLU(sparsity_coeff=0.25, bandwidth=0.6, **options))
    dead = torch.arange(5) % 2 == 0
    terms = objective(
        x,
        leaves["pre"],
        leaves["W_dec"],
        leaves["b_dec"],
        threshold=leaves["threshold"],
        dead=dead,
        mask=x[:, 0] < 1,
        target=2 * x,
    )
    expected = call(x, leaves, dead=dead, mask=x[:, 0] < 1, target=2 * x, **options)
    assert terms.metrics() == expected.metrics()
    assert repr(objective.cfg) in repr(objective)
    assert not list(objective.parameters())


@pytest.mark.parametrize("penalty", ["l0", "tanh"])
@pytest.mark.parametrize("masked", [False, True])
def test_given_latents_and_their_reconstruction_are_not_computed_again(penalty, masked):
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()

    x, pre, W_dec, b_dec = normal(6, 3), normal(6, 5), normal(5, 3), normal(3)
    theta = torch.full((5,), 0.3, dtype=torch.float64, requires_grad=True)
    mask = torch.arange(6) != 2 if masked else None
    f = jumprelu(pre, theta, bandwidth=0.5)
    options = {"threshold": theta, "sparsity_coeff": 0.3, "bandwidth": 0.5, "penalty": penalty}
    expected = jumprelu_loss(x, pre, W_dec, b_dec, mask=mask, **options)
    leaves = (x, pre, W_dec, b_dec, theta)
    gradients = torch.autograd.grad(expected.loss, leaves)
    for more in ({"f": f}, {"f": f, "x_hat": f @ W_dec + b_dec}):
        terms = jumprelu_loss(x, pre, W_dec, b_dec, mask=mask, **options, **more)
        for (name, ours), (_, theirs) in zip(terms.items(), expected.items(), strict=True):
            torch.testing.assert_close(ours, theirs, msg=name)
        ours = torch.autograd.grad(terms.loss, leaves, retain_graph=True)
        torch.testing.assert_close(ours, gradients)
    with pytest.raises(ValueError, match="^jumprelu_loss needs f where x_hat is given, got None"):
        jumprelu_loss(x, pre, W_dec, b_dec, x_hat=x, **options)


def test_compiled_within_a_transform_it_is_refused_with_what_to_write():
    gradient = torch.func.grad(lambda x: jumprelu(x, torch.ones(3), bandwidth=2.0).sum())
    compiled = torch.compile(gradient, fullgraph=True, backend="eager")
    with pytest.raises(torch._dynamo.exc.Unsupported, match="jumprelu has a gradient of its own"):
        compiled(torch.ones(2, 3))
    values = torch.compile(
        torch.vmap(lambda x: jumprelu(x, torch.ones(3), bandwidth=2.0)),
        fullgraph=True,
        backend="eager",
    )
    with torch.no_grad():
        assert torch.equal(values(torch.full((2, 4, 3), 2.0)), torch.full((2, 4, 3), 2.0))
