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
from termwise import energy, lm, sae
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


def test_a_compiled_backward_pass_has_no_hessian_in_it():
    graphs = []

    def keep(graph, inputs):
        graphs.append(graph)
        return make_boxed_func(graph.forward)

    backend = aot_autograd(fw_compiler=keep, bw_compiler=keep)
    inputs = [x.requires_grad_() for x in views()]
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
