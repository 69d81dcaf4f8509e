"""Distillation from two heads is that of their logits, which it never holds."""

import functools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import termwise as tw
from termwise.lm import LinearDistillationLoss, linear_distillation_loss

EXACT = {"rtol": 1e-10, "atol": 1e-11}
DIVERGENCES = ["forward", "reverse", "jensen_shannon"]


def draw(batch, time, vocab, *, d_models=(3, 2), seed=0, dtype=torch.float64):
    """Hidden states, weight and bias of student and teacher; tokens and masks."""
    g = torch.Generator().manual_seed(seed)
    models = [
        [
            2 * torch.randn(shape, generator=g, dtype=torch.float64)
            for shape in ((batch, time, d_model), (vocab, d_model), (vocab,))
        ]
        for d_model in d_models
    ]
    tokens = torch.randint(-1, vocab, (batch, time), generator=g)
    mask, samples = (torch.rand(n, generator=g) < 0.7 for n in ((batch, time), (batch,)))
    student, teacher = ([x.to(dtype) for x in model] for model in models)
    return [x.requires_grad_() for x in student], teacher, tokens, mask, samples


def head(hidden, weight, bias, softcap):
    x = hidden @ weight.T if bias is None else hidden @ weight.T + bias
    return x if softcap is None else softcap * (x / softcap).tanh()


def oracle(x, y, tokens, counted, *, divergence, beta, temperature, kd_weight, ce_weight):
    """Return loss, divergence, cross-entropy and count of whole logits in float64."""
    zero = 0 * x.sum()
    total, nats, count = zero, zero, 0
    for b in range(counted.shape[0]):
        for t in range(counted.shape[1] - 1):
            if not counted[b, t + 1]:
                continue
            q, p = ((z[b, t] / temperature).softmax(0) for z in (x, y))
            m = beta * p + (1 - beta) * q
            pairs = {
                "forward": [(1.0, p, q)],
                "reverse": [(1.0, q, p)],
                "jensen_shannon": [(beta, p, m), (1 - beta, q, m)],
            }
            for share, one, other in pairs[divergence]:
                total = total + share * (one * (one / other).log()).sum()
            if tokens is not None:
                nats = nats - x[b, t].log_softmax(0)[tokens[b, t + 1]]
            count += 1
    total, nats = total / max(count, 1), nats / max(count, 1)
    return kd_weight * temperature**2 * total + ce_weight * nats, total, nats, count


pytestmark = pytest.mark.usefixtures("path_of_a_head")


@given(
    batch=st.integers(1, 3),
    time=st.integers(2, 4),
    vocab=st.integers(1, 6),
    seed=st.integers(0, 2**30),
    softcaps=st.tuples(*[st.none() | st.sampled_from([0.5, 5.0])] * 2),
    divergence=st.sampled_from(DIVERGENCES),
    beta=st.sampled_from([0.1, 0.5, 0.8]),
    temperature=st.sampled_from([1.0, 2.5]),
    weights=st.tuples(*[st.sampled_from([1.0, 0.3, 0.0, -0.5])] * 2),
    biased=st.tuples(st.booleans(), st.booleans()),
    told=st.booleans(),
    masked=st.booleans(),
)
def test_terms_and_gradients_are_the_formulas(
    batch, time, vocab, seed, softcaps, divergence, beta, temperature, weights, biased, told, masked
):
    student, teacher, tokens, mask, samples = draw(batch, time, vocab, seed=seed)
    numbers = {
        "divergence": divergence,
        "beta": beta,
        "temperature": temperature,
        "kd_weight": weights[0],
        "ce_weight": weights[1],
    }
    bias, teacher_bias = (
        m[2] if b else None for m, b in zip((student, teacher), biased, strict=True)
    )
    tokens = tokens if told else None
    counted = torch.ones_like(mask) if tokens is None else tokens >= 0
    options = {"tokens": tokens}
    if masked:
        options |= {"mask": mask, "sample_mask": samples}
        counted = counted & mask & samples[:, None]
    terms = linear_distillation_loss(
        *student[:2],
        *teacher[:2],
        bias=bias,
        softcap=softcaps[0],
        teacher_bias=teacher_bias,
        teacher_softcap=softcaps[1],
        **options,
        **numbers,
    )
    x = head(*student[:2], bias, softcaps[0])
    y = head(*teacher[:2], teacher_bias, softcaps[1])
    loss, total, nats, count = oracle(x, y, tokens, counted, **numbers)
    found = dict(terms.items())
    expected = {"loss": loss, "divergence": total, "num_tokens": torch.tensor(count).double()}
    if told:
        expected["cross_entropy"] = nats
        assert 0 <= found.pop("accuracy") <= 1
    torch.testing.assert_close(found, expected, **EXACT)
    inputs = [*student[:2], *([bias] if biased[0] else [])]
    ours, theirs = (torch.autograd.grad(value, inputs) for value in (terms.loss, loss))
    torch.testing.assert_close(ours, theirs, **EXACT)


def test_by_hand():
    # Student (1/4, 3/4), teacher (1/2, 1/2): KL = log(4/3)/2 = .143841 and log(27/16)/4 = .130812.
    hidden, weight = torch.ones(1, 2, 1), torch.tensor([[0.0], [math.log(3)]])
    loss = functools.partial(
        linear_distillation_loss, hidden, weight, torch.ones(1, 2, 5), torch.zeros(2, 5)
    )
    assert loss().loss.item() == pytest.approx(0.143841, abs=1e-6)
    assert loss(divergence="reverse").loss.item() == pytest.approx(0.130812, abs=1e-6)
    terms = loss(tokens=torch.tensor([[0, 1]]), kd_weight=2.0, ce_weight=3.0)
    assert terms.cross_entropy.item() == pytest.approx(math.log(4 / 3), abs=1e-6)
    assert terms.loss.item() == pytest.approx(2 * 0.143841 + 3 * math.log(4 / 3), abs=1e-5)
    assert terms.accuracy == 1.0


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_gradcheck_and_one_input_alone(divergence):
    student, teacher, tokens, _, _ = draw(2, 3, 4)

    def loss(hidden, weight, bias):
        return linear_distillation_loss(
            hidden, weight, *teacher[:2], tokens=tokens, bias=bias, softcap=3.0,
            divergence=divergence, temperature=1.5,
        ).loss  # fmt: skip

    assert torch.autograd.gradcheck(loss, student)
    every = torch.autograd.grad(loss(*student), student)
    for place, expected in enumerate(every):
        alone = [x.detach() for x in student]
        alone[place].requires_grad_()
        torch.testing.assert_close(torch.autograd.grad(loss(*alone), alone[place])[0], expected)


def test_the_teacher_gets_no_gradient():
    student, teacher, _, _, _ = draw(2, 3, 4)
    for x in teacher:
        x.requires_grad_()
    terms = linear_distillation_loss(*student[:2], *teacher[:2], teacher_bias=teacher[2])
    found = torch.autograd.grad(terms.loss, teacher, allow_unused=True, retain_graph=True)
    assert found == (None, None, None)
    quiet = [x.detach() for x in student]
    terms = linear_distillation_loss(*quiet[:2], *teacher[:2], teacher_bias=teacher[2])
    assert not terms.loss.requires_grad


def test_positions_that_do_not_count_may_hold_anything():
    student, teacher, tokens, _, _ = draw(3, 4, 5)
    tokens[0, 2], samples = -100, torch.tensor([True, True, False])
    changed = [x.detach().clone() for x in (student[0], teacher[0])]
    for x in changed:
        x[:, -1], x[0, 1], x[2] = torch.nan, torch.inf, torch.nan
    changed[0].requires_grad_()
    for divergence in DIVERGENCES:
        found = []
        for own, other in (changed, (student[0], teacher[0])):
            loss = linear_distillation_loss(
                own, student[1], other, teacher[1], tokens=tokens, sample_mask=samples,
                divergence=divergence, softcap=2.0,
            ).loss  # fmt: skip
            found.append((loss, *torch.autograd.grad(loss, [own, student[1]])))
        torch.testing.assert_close(found[0], found[1], rtol=0, atol=0)


def test_nothing_that_counts_is_no_loss():
    student, teacher, tokens, mask, _ = draw(2, 3, 4)
    for options in ({}, {"tokens": tokens}, {"normalizer": 0}):
        terms = linear_distillation_loss(
            *student[:2], *teacher[:2], mask=torch.zeros_like(mask), **options
        )
        assert terms.loss == 0
        assert all((g == 0).all() for g in torch.autograd.grad(terms.loss, student[:2]))


def test_what_has_weight_0_is_left_out():
    student, teacher, _, _, _ = draw(2, 3, 4)
    ruled_out = torch.tensor([0.0, -torch.inf, 0.0, 0.0]).double()
    tokens = torch.ones(2, 3).long()
    call = functools.partial(
        linear_distillation_loss, *student[:2], *teacher[:2], bias=ruled_out, tokens=tokens
    )
    terms = call(teacher_bias=ruled_out, ce_weight=0.0)
    assert terms.cross_entropy.isinf()
    assert terms.loss == terms.divergence
    assert all(g.isfinite().all() for g in torch.autograd.grad(terms.loss, student[:2]))
    terms = linear_distillation_loss(
        *student[:2], *teacher[:2], bias=ruled_out, tokens=0 * tokens, kd_weight=0.0
    )
    assert terms.divergence.isinf()
    assert terms.loss == terms.cross_entropy
    assert all(g.isfinite().all() for g in torch.autograd.grad(terms.loss, student[:2]))


@pytest.mark.parametrize("autocast", [False, True])
def test_half_precision_rounds_only_the_gradients(autocast):
    dtype = torch.bfloat16
    student, teacher, tokens, _, _ = draw(2, 9, 300, d_models=(16, 8), dtype=dtype)
    call = functools.partial(linear_distillation_loss, divergence="reverse", temperature=2.0)
    with torch.autocast("cpu", dtype, enabled=autocast):
        terms = call(*student[:2], *teacher[:2], tokens=tokens)
        ours = torch.autograd.grad(1024 * terms.loss, student[:2])
    wide, other = ([x.detach().double().requires_grad_() for x in m] for m in (student, teacher))
    expected = call(*wide[:2], *other[:2], tokens=tokens).loss
    assert terms.loss.dtype == torch.float32
    assert terms.loss.item() == pytest.approx(expected.item(), rel=1e-5)
    for found, like in zip(ours, torch.autograd.grad(1024 * expected, wide[:2]), strict=True):
        assert found.dtype == dtype
        torch.testing.assert_close(
            found.double(), like, rtol=0.51 * torch.finfo(dtype).eps, atol=1e-2
        )


def test_a_float64_beside_a_float32_lifts_all():
    student, teacher, _, _, _ = draw(2, 3, 4)
    mixed = [x.detach().float() for x in student[:2]]
    terms = linear_distillation_loss(*mixed, *teacher[:2])
    assert terms.loss.dtype == torch.float64
    exact = linear_distillation_loss(*[x.double() for x in mixed], *teacher[:2])
    torch.testing.assert_close(terms.loss, exact.loss, rtol=1e-12, atol=0)


def test_it_compiles_whole_and_maps():
    student, teacher, tokens, mask, samples = draw(2, 4, 5)

    def loss(hidden, weight, bias):
        return linear_distillation_loss(
            hidden, weight, *teacher[:2], tokens=tokens, bias=bias, softcap=2.0, mask=mask,
            sample_mask=samples, divergence="jensen_shannon", temperature=2.0,
        ).loss  # fmt: skip

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    expected = torch.autograd.grad(loss(*student), student)
    torch.testing.assert_close(compiled(*student), loss(*student))
    torch.testing.assert_close(torch.autograd.grad(compiled(*student), student), expected)
    gradient = torch.func.grad(loss, argnums=(0, 1, 2))
    plain = [x.detach() for x in student]
    torch.testing.assert_close(gradient(*plain), expected)
    batched = torch.vmap(gradient, in_dims=(0, None, None))(plain[0][None], *plain[1:])
    torch.testing.assert_close([x[0] for x in batched], list(expected))


def test_refusals():
    student, teacher, _, _, _ = draw(2, 3, 4)
    call = functools.partial(linear_distillation_loss, *student[:2], *teacher[:2])
    for name in ("softcap", "teacher_softcap"):
        with pytest.raises(
            ValueError,
            match=f"^linear_distillation_loss needs {name} positive and finite, got {math.inf}$",
        ):
            call(**{name: math.inf})
    with pytest.raises(
        ValueError, match=r"^linear_distillation_loss needs beta in \(0, 1\), got 1"
    ):
        call(beta=1.0)
    with pytest.raises(tw.ContractError, match="teacher_weight needs .*axis vocab is 3, but it is"):
        linear_distillation_loss(*student[:2], teacher[0], teacher[1][1:])


def test_the_module_is_the_function():
    student, teacher, tokens, mask, samples = draw(2, 3, 4)
    numbers = {
        "kd_weight": 0.5,
        "ce_weight": 2.0,
        "divergence": "reverse",
        "beta": 0.3,
        "temperature": 2.0,
        "softcap": 2.0,
        "teacher_softcap": 3.0,
        "grad_reduction": "sum",
    }
    named = {
        "tokens": tokens,
        "bias": student[2],
        "teacher_bias": teacher[2],
        "mask": mask,
        "sample_mask": samples,
        "normalizer": 3,
    }
    terms = LinearDistillationLoss(**numbers)(*student[:2], *teacher[:2], **named)
    expected = linear_distillation_loss(*student[:2], *teacher[:2], **named, **numbers)
    torch.testing.assert_close(dict(terms.items()), dict(expected.items()), rtol=0, atol=0)
