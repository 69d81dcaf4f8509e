"""The projected KL of a linear head: halves, transforms, and what does not count."""

import copy
import pickle

import pytest
import torch

from termwise.lm import (
    Alignment,
    LinearProjectedKLLoss,
    VocabProjection,
    linear_projected_kl_loss,
)

EXACT = {"rtol": 1e-10, "atol": 1e-11}


def draw(seed, *, dtype=torch.float64, batch=2, times=(7, 6), vocabs=(6, 5), d_model=3):
    g = torch.Generator().manual_seed(seed)
    alignment = Alignment(
        *[torch.randint(-1, 4, (batch, t), generator=g).sort(1).values for t in times],
        *[torch.rand(batch, 4, generator=g) < 0.8 for _ in range(2)],
    )
    indices = torch.randint(0, vocabs[1], (vocabs[0], 2), generator=g)
    sizes = {"student_vocab": vocabs[0], "teacher_vocab": vocabs[1]}
    projection = VocabProjection.from_topk(indices, torch.rand(vocabs[0], 2, generator=g), **sizes)
    tensors = [
        torch.randn(shape, generator=g, dtype=torch.float64).to(dtype)
        for shape in (
            (batch, times[0], d_model),
            (vocabs[0], d_model),
            (batch, times[1], vocabs[1]),
        )
    ]
    return tensors, {"alignment": alignment, "projection": projection}


def gradients(loss, inputs):
    return torch.autograd.grad(loss, inputs)


def test_gradcheck_and_one_input_alone():
    (hidden, weight, teacher), held = draw(1)
    hidden.requires_grad_(), weight.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda h, w: linear_projected_kl_loss(h, w, teacher, **held).loss, (hidden, weight)
    )
    both = gradients(
        linear_projected_kl_loss(hidden, weight, teacher, **held).loss, (hidden, weight)
    )
    for place in range(2):
        inputs = [x.detach() for x in (hidden, weight)]
        inputs[place].requires_grad_()
        loss = linear_projected_kl_loss(*inputs, teacher, **held).loss
        assert torch.equal(gradients(loss, inputs[place])[0], both[place])


@pytest.mark.parametrize("autocast", [False, True])
def test_half_precision_rounds_only_the_gradients(autocast):
    (hidden, weight, teacher), held = draw(4, dtype=torch.bfloat16, vocabs=(40, 30), d_model=8)
    inputs = [hidden.requires_grad_(), weight.requires_grad_()]
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        terms = linear_projected_kl_loss(*inputs, teacher, **held)
        own = gradients(terms.loss, inputs)
    wide = [x.detach().double().requires_grad_() for x in inputs]
    expected = linear_projected_kl_loss(*wide, teacher.double(), **held)
    torch.testing.assert_close(terms.loss.double(), expected.loss, rtol=1e-5, atol=1e-6)
    for rounded, exact in zip(own, gradients(expected.loss, wide), strict=True):
        assert rounded.dtype == torch.bfloat16
        error = (rounded.double() - exact).abs()
        assert (error <= 0.004 * exact.abs() + 1e-5 * exact.abs().max()).all()


def test_compiled_and_transformed():
    (hidden, weight, teacher), held = draw(2)
    inputs = [hidden.requires_grad_(), weight.requires_grad_()]
    theirs = linear_projected_kl_loss(*inputs, teacher, **held)
    expected = gradients(theirs.loss, inputs)
    compiled = torch.compile(linear_projected_kl_loss, fullgraph=True, backend="aot_eager")
    ours = compiled(*inputs, teacher, **held)
    torch.testing.assert_close(dict(ours.items()), dict(theirs.items()), **EXACT)
    torch.testing.assert_close(gradients(ours.loss, inputs), expected, **EXACT)

    def loss(hidden, weight):
        return linear_projected_kl_loss(hidden, weight, teacher, **held).loss

    plain = [x.detach() for x in inputs]
    found = torch.func.grad(loss, argnums=(0, 1))(*plain)
    torch.testing.assert_close(found, expected, **EXACT)
    batched = torch.vmap(torch.func.grad(loss), in_dims=(0, None))(plain[0][None], plain[1])
    torch.testing.assert_close(batched[0], expected[0], **EXACT)
    created = torch.autograd.grad(loss(*inputs), inputs, create_graph=True)
    for gradient in created:
        with pytest.raises(NotImplementedError, match="no second derivative"):
            gradient.sum().backward(retain_graph=True)


def test_where_no_chunk_counts_the_loss_is_zero():
    (hidden, weight, teacher), held = draw(0)
    held["alignment"].pair_valid[:] = False
    inputs = [hidden.fill_(torch.nan).requires_grad_(), weight.requires_grad_()]
    terms = linear_projected_kl_loss(*inputs, teacher, **held)
    assert terms.loss == 0
    assert all((gradient == 0).all() for gradient in gradients(terms.loss, inputs))


def test_refusals():
    (hidden, weight, teacher), held = draw(0)
    with pytest.raises(ValueError, match="from 5 student tokens to 5 .*, got one from 6 to 5"):
        linear_projected_kl_loss(hidden, weight[:5], teacher, **held)
    with pytest.raises(TypeError, match="weight needs .*d_model is 2, but it is 3 in hidden"):
        linear_projected_kl_loss(hidden, weight[:, :2], teacher, **held)
    with pytest.raises(
        TypeError, match=r"alignment\.student_chunk_id needs .* is 7, but it is 6 in"
    ):
        linear_projected_kl_loss(hidden[:, :6], weight, teacher, **held)


def test_the_module_is_the_function():
    (hidden, weight, teacher), held = draw(0)
    numbers = {
        "temperature": 2.0,
        "divergence": "reverse",
        "columns_top_k": 3,
        "teacher_mean": "prob",
        "exact_only": True,
        "eps": 1e-8,
        "grad_reduction": "sum",
    }
    module = LinearProjectedKLLoss(held["projection"], **numbers)
    expected = linear_projected_kl_loss(hidden, weight, teacher, **held, **numbers, normalizer=3)
    for one in (module, copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        terms = one(hidden, weight, teacher, alignment=held["alignment"], normalizer=3)
        torch.testing.assert_close(dict(terms.items()), dict(expected.items()), rtol=0, atol=0)
    assert "temperature=2.0, divergence='reverse', columns_top_k=3" in repr(module)
