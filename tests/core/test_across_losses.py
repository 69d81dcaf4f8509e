"""What no single loss shows: losses side by side, and their files."""

import ast
import re
from pathlib import Path

import pytest
import torch
from functorch.compile import make_boxed_func
from jaxtyping import Float
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd

import termwise as tw
from termwise import energy, joint_embedding, lm, sae
from termwise.joint_embedding import vicreg_loss
from termwise.lm import targeted_variance_loss


def assert_same(ours: tw.Terms, theirs: tw.Terms) -> None:
    assert type(ours) is type(theirs)
    torch.testing.assert_close(dict(ours.items()), dict(theirs.items()))


def views() -> list[Tensor]:
    return [torch.randn(7, 3), torch.randn(7, 3)]


def test_compiled_refuses_what_would_broadcast():
    z1, z2 = views()
    compiled = torch.compile(vicreg_loss, fullgraph=True, backend="eager")
    with pytest.raises(torch._dynamo.exc.Unsupported, match="batch is 1, but it is 7 in z1"):
        compiled(z1, z2[:1])


@tw.terms
class PoweredTerms(tw.Terms):
    base: Float[Tensor, ""]


def test_twelve_losses_compile_one_by_one():
    # Each is a function of its own; with one shared code object the ninth would fail.
    functions = [vicreg_loss, targeted_variance_loss]
    for power in range(1, 11):

        @tw.contract
        def powered(x: Float[Tensor, "batch dim"], *, power: int = power) -> PoweredTerms:
            base = targeted_variance_loss(x).loss
            return PoweredTerms(loss=base**power, base=base)

        functions.append(powered)
    x, y = views()
    for function in functions:
        inputs = (x, y) if function is vicreg_loss else (x,)
        compiled = torch.compile(function, fullgraph=True, backend="eager")
        assert_same(compiled(*inputs), function(*inputs))


def test_a_number_beside_a_loss_is_no_float():
    """Where sizes are symbols Dynamo makes one of it, which may not go into a backward pass."""
    root = Path(tw.__file__).parent
    files = [path for path in root.rglob("*.py") if path.relative_to(root).parts[0] != "demo"]
    values = [
        (path.name, node.value)
        for path in files
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.Assign | ast.AnnAssign) and node.value is not None
    ]
    numbers = [(name, value.value) for name, value in values if isinstance(value, ast.Constant)]
    assert any(isinstance(value, int) for _, value in numbers)
    assert not [found for found in numbers if isinstance(found[1], float)]


def of_one_tokenizer(loss, **options):
    """Return a loss over chunks that are the same tensors for both models."""
    ids, valid = torch.tensor([[-1, 0, 0, 1], [0, 1, 1, 1]]), torch.ones(2, 2, dtype=torch.bool)
    alignment = lm.Alignment(ids, ids, valid, valid)
    return lambda x: loss(x, x, alignment=alignment, **options)


# Its own transpose.
ENTRIES = torch.tensor([0, 1, 2, 3]), torch.tensor([1, 0, 2]), torch.ones(3)
PROJECTION = lm.VocabProjection(3, 3, *ENTRIES, *ENTRIES)
ONE_TENSOR = {
    "vicreg": lambda x: vicreg_loss(x[0], x[0]),
    "info_nce": lambda x: joint_embedding.info_nce_loss(x[0], x[0], scale=2.0),
    "sigmoid": lambda x: joint_embedding.sigmoid_contrastive_loss(
        x[0], x[0], scale=x[0, 0, 0], bias=x[0, 0, 0]
    ),
    "barlow": lambda x: joint_embedding.barlow_twins_loss(x[0], x[0]),
    "linear": lambda x: lm.linear_distillation_loss(x, x[0, :3], x, x[0, :3]),
    "projected": of_one_tokenizer(lm.projected_kl_loss, projection=PROJECTION),
    "partitioned": of_one_tokenizer(
        lm.partitioned_loss, partition=lm.vocab_partition(PROJECTION, rule="strict")
    ),
    "universal": of_one_tokenizer(lm.universal_logit_loss),
}


@pytest.mark.parametrize("name", ONE_TENSOR)
def test_one_tensor_for_two_arguments_compiles(name):
    x = torch.randn(2, 4, 3, requires_grad=True)
    loss = ONE_TENSOR[name]
    compiled = torch.compile(loss, fullgraph=True, backend="eager")
    ours, expected = compiled(x), loss(x)
    assert_same(ours, expected)
    gradients = [torch.autograd.grad(terms.loss, x)[0] for terms in (ours, expected)]
    torch.testing.assert_close(*gradients)


def test_a_compiled_backward_pass_has_no_hessian_in_it():
    graphs = []

    def keep(graph, inputs):
        graphs.append(graph)
        return make_boxed_func(graph.forward)

    backend = aot_autograd(fw_compiler=keep, bw_compiler=keep)
    # So many elements that the formula as it is written would not do.
    inputs = [torch.randn(300, 120, requires_grad=True) for _ in range(2)]
    torch.compile(vicreg_loss, fullgraph=True, backend=backend)(*inputs).loss.backward()
    assert len(graphs) == 2
    assert not any("mm" in str(node.target) for graph in graphs for node in graph.graph.nodes)


@pytest.mark.parametrize(
    ("family", "some"),
    [
        (energy, {"_score_matching", "_flow_matching"}),
        (lm, {"_projected_kl", "_linear_projected_kl", "_cross_tokenizer"}),
        (sae, {"_vanilla", "_auxiliary_k"}),
    ],
)
def test_no_loss_imports_a_helper_from_another_one(family, some):
    """What two losses share has a file of its own; a loss may call another as anyone may."""
    texts = {path.stem: path.read_text() for path in Path(family.__file__).parent.glob("_*.py")}
    public = re.compile(r"^def [a-z]\w*_loss\(", re.MULTILINE)
    defined = {stem for stem, text in texts.items() if public.search(text)}
    losses = defined - {"_create"}  # which makes losses by name
    assert some < losses
    for loss in losses:
        for node in ast.parse(texts[loss]).body:
            if isinstance(node, ast.ImportFrom) and node.level == 1 and node.module in losses:
                names = {name.name for name in node.names}
                assert all(re.fullmatch(r"[a-z]\w*_loss", name) for name in names), (loss, names)
                assert loss == "_cross_tokenizer", loss
