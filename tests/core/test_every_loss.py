"""What holds for every loss: it compiles, transforms, exports, copies, and waits for no device."""

import copy
import dataclasses
import inspect
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from functorch.compile import make_boxed_func
from jaxtyping import Float
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch._subclasses.fake_tensor import FakeTensorMode

import termwise as tw
from termwise import energy
from termwise.joint_embedding import VICRegLoss, vicreg_loss
from termwise.lm import TargetedVarianceLoss, targeted_variance_loss
from termwise.sae import (
    Crosscoder,
    CrosscoderObjective,
    EndToEnd,
    EndToEndObjective,
    Gated,
    GatedObjective,
    JumpReLU,
    JumpReLUObjective,
    Matryoshka,
    MatryoshkaObjective,
    TopK,
    TopKObjective,
    Vanilla,
    VanillaObjective,
    crosscoder_loss,
    end_to_end_loss,
    gated_loss,
    jumprelu_loss,
    matryoshka_loss,
    topk_loss,
    vanilla_loss,
)


@dataclasses.dataclass(frozen=True)
class Case:
    """A loss, its module with the same numbers, and the shapes of its tensors."""

    function: Callable[..., tw.Terms]
    module: nn.Module
    options: dict[str, Any]
    shapes: tuple[str, ...] = ("rows columns",)
    """Of the tensors by position; the first one's name is what a wrong rank is blamed on."""
    named: dict[str, str] = dataclasses.field(default_factory=dict)
    """Shapes of the tensors by name."""
    masks: tuple[str, ...] = ()
    fixed: dict[str, Any] = dataclasses.field(default_factory=dict)
    """What else a call needs, of the function and the module alike."""
    order: tuple[int, ...] | None = None
    """Where the module takes its tensors in another order than the function."""
    first: tuple[Any, ...] = ()
    """What the function takes before its tensors, and the module holds: an energy."""

    def tensors(self, rows: int = 7, seed: int = 0) -> list[Tensor]:
        generator = torch.Generator().manual_seed(seed)
        return [draw(shape, rows, generator) for shape in self.shapes]

    def extra(self, rows: int = 7) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(9)
        masks = {name: torch.arange(rows) % 3 != 1 for name in self.masks}
        drawn = {name: draw(shape, rows, generator) for name, shape in self.named.items()}
        return {**drawn, **masks, **self.fixed}

    def call_function(self, *inputs: Tensor, **extra: Any) -> tw.Terms:
        return self.function(*self.first, *inputs, **self.options, **extra)

    def call_module(self, *inputs: Tensor, **extra: Any) -> tw.Terms:
        return self.call(self.module, *inputs, **extra)

    def call(self, module: nn.Module, *inputs: Tensor, **extra: Any) -> tw.Terms:
        order = self.order or range(len(inputs))
        return module(*[inputs[place] for place in order], **extra)


def draw(shape: str, rows: int, generator: torch.Generator) -> Tensor:
    sizes = {"rows": rows, "columns": 3, "latents": 5, "layers": 2, "noises": 2}
    return torch.randn([sizes[axis] for axis in shape.split()], generator=generator)


def bowl(x: Tensor) -> Tensor:
    """An energy that is not quadratic and couples the elements of a row; it pickles by its name."""
    squares = torch.bmm(x[:, None], x.roll(1, 1)[:, :, None]).flatten()
    return squares + (x.pow(4) / 4 - x.sin()).sum(1)


def timed_bowl(x: Tensor, time: Tensor) -> Tensor:
    """What the module of a loss with times holds, where the function takes a closure."""
    return bowl(x)


PAIR = ("rows columns", "rows columns")
THREE = ("rows columns", "rows columns", "rows")
NOISES = ("rows columns", "noises rows columns")
VICREG = {"sim_weight": 5.0, "gamma": 2.0, "eps": 0.01}
VARIANCE = {"coefficient": 0.7, "target": 2.0}
VANILLA = {"sparsity_coeff": 0.3, "feature_reduction": "sum"}
CODED = ("rows columns", "rows latents", "rows columns")
CASES = {
    "vicreg": Case(vicreg_loss, VICRegLoss(**VICREG), VICREG, PAIR),
    "vicreg gram": Case(
        vicreg_loss,
        VICRegLoss(covariance_path="gram", variance_views="mean"),
        {"covariance_path": "gram", "variance_views": "mean"},
        PAIR,
    ),
    "targeted variance": Case(targeted_variance_loss, TargetedVarianceLoss(**VARIANCE), VARIANCE),
    "targeted variance, masked": Case(
        targeted_variance_loss,
        TargetedVarianceLoss(**VARIANCE),
        VARIANCE,
        masks=("valid_rows",),
    ),
    "vanilla": Case(vanilla_loss, VanillaObjective(Vanilla(**VANILLA)), VANILLA, CODED),
    "vanilla, masked": Case(
        vanilla_loss,
        VanillaObjective(Vanilla(**VANILLA)),
        VANILLA,
        CODED,
        named={"decoder_norm": "latents"},
        masks=("mask",),
    ),
    "topk": Case(
        topk_loss,
        TopKObjective(TopK(aux_coeff=0.5)),
        {"aux_coeff": 0.5},
        ("rows columns", "rows columns", "rows latents"),
        named={"aux": ""},
        masks=("mask",),
        order=(0, 2, 1),
    ),
    "jumprelu": Case(
        jumprelu_loss,
        JumpReLUObjective(JumpReLU(sparsity_coeff=0.3, bandwidth=0.5)),
        {"sparsity_coeff": 0.3, "bandwidth": 0.5},
        ("rows columns", "rows latents", "latents columns", "columns"),
        named={"log_threshold": "latents"},
        masks=("mask",),
    ),
    "gated": Case(
        gated_loss,
        GatedObjective(Gated(sparsity_coeff=0.3)),
        {"sparsity_coeff": 0.3},
        ("rows columns", "rows latents", "rows latents", "rows columns", "latents columns"),
        masks=("mask",),
    ),
    "matryoshka": Case(
        matryoshka_loss,
        MatryoshkaObjective(Matryoshka(sparsity_coeff=0.3)),
        {"sparsity_coeff": 0.3},
        ("rows columns", "rows latents", "latents columns", "columns"),
        masks=("mask",),
        fixed={"prefixes": (1, 3, 5)},
    ),
    "crosscoder": Case(
        crosscoder_loss,
        CrosscoderObjective(Crosscoder(sparsity_coeff=0.3)),
        {"sparsity_coeff": 0.3},
        (
            "rows layers columns",
            "rows latents",
            "rows layers columns",
            "latents layers columns",
        ),
        masks=("mask",),
    ),
    "end to end": Case(
        end_to_end_loss,
        EndToEndObjective(EndToEnd(kl_coeff=0.7, sparsity_coeff=0.3)),
        {"kl_coeff": 0.7, "sparsity_coeff": 0.3},
        PAIR,
        named={"f": "rows latents"},
        masks=("mask",),
    ),
    "maximum likelihood": Case(
        energy.maximum_likelihood_loss,
        energy.MaximumLikelihoodLoss(bowl, negative_weight=0.7),
        {"negative_weight": 0.7},
        PAIR,
        named={"weights": "rows"},
        first=(bowl,),
    ),
    "noise contrastive": Case(
        energy.noise_contrastive_loss,
        energy.NoiseContrastiveLoss(bowl, log_z=0.0),
        {"log_z": torch.zeros(())},
        PAIR,
        named={"log_noise_x": "rows", "log_noise_noise": "rows"},
        first=(bowl,),
    ),
    "ranking noise contrastive": Case(
        energy.ranking_noise_contrastive_loss,
        energy.RankingNoiseContrastiveLoss(bowl),
        {},
        NOISES,
        named={"log_noise_x": "rows", "log_noise_noise": "noises rows"},
        first=(bowl,),
    ),
    "conditional noise contrastive": Case(
        energy.conditional_noise_contrastive_loss,
        energy.ConditionalNoiseContrastiveLoss(bowl),
        {},
        NOISES,
        first=(bowl,),
    ),
    "energy discrepancy": Case(
        energy.energy_discrepancy_loss,
        energy.EnergyDiscrepancyLoss(bowl, t=0.3, copies=1),
        {"t": 0.3, "copies": 1},
        named={"noise": "noises rows columns"},
        first=(bowl,),
    ),
    "energy matching": Case(
        energy.energy_matching_loss,
        energy.EnergyMatchingLoss(bowl, contrastive_weight=0.3),
        {"contrastive_weight": 0.3},
        (*THREE, "rows columns"),
        first=(bowl,),
    ),
    "equilibrium matching": Case(
        energy.equilibrium_matching_loss,
        energy.EquilibriumMatchingLoss(bowl, multiplier=2.0),
        {"multiplier": 2.0},
        THREE,
        first=(bowl,),
    ),
    "flow matching": Case(
        energy.flow_matching_loss,
        energy.FlowMatchingLoss(timed_bowl, sigma_min=0.1),
        {"sigma_min": 0.1},
        THREE,
        first=(bowl,),
    ),
}


@pytest.fixture(params=CASES.values(), ids=CASES.keys())
def case(request):
    return request.param


def gradients(terms: tw.Terms, inputs: list[Tensor]) -> tuple[Tensor, ...]:
    return torch.autograd.grad(terms.loss, inputs, materialize_grads=True)


def assert_same(ours: tw.Terms, theirs: tw.Terms) -> None:
    assert type(ours) is type(theirs)
    torch.testing.assert_close(dict(ours.items()), dict(theirs.items()))


@pytest.mark.parametrize("form", ["function", "module"])
def test_compiled_is_eager_whole(case, form):
    eager = case.call_function if form == "function" else case.call_module
    compiled = torch.compile(eager, fullgraph=True, backend="aot_eager")
    for rows in (7, 9, 4):  # the second recompiles with a dynamic batch
        inputs = [x.requires_grad_() for x in case.tensors(rows)]
        ours = compiled(*inputs, **case.extra(rows))
        theirs = eager(*inputs, **case.extra(rows))
        assert_same(ours, theirs)
        torch.testing.assert_close(gradients(ours, inputs), gradients(theirs, inputs))


@pytest.mark.parametrize("form", ["function", "module"])
def test_compiled_refuses_a_wrong_shape(case, form):
    eager = case.call_function if form == "function" else case.call_module
    compiled = torch.compile(eager, fullgraph=True, backend="eager")
    first, *others = case.tensors()
    few = first.sum() if case.first else first[0]  # to an energy a row may be one number
    with pytest.raises(torch._dynamo.exc.Unsupported, match="ContractError.*ax[ie]s, not"):
        compiled(few, *others, **case.extra())
    with pytest.raises(torch._dynamo.exc.Unsupported, match="int64 is not a dtype of Float"):
        compiled(first.long(), *others, **case.extra())


def test_compiled_refuses_what_would_broadcast():
    z1, z2 = CASES["vicreg"].tensors()
    compiled = torch.compile(vicreg_loss, fullgraph=True, backend="eager")
    with pytest.raises(torch._dynamo.exc.Unsupported, match="batch is 1, but it is 7 in z1"):
        compiled(z1, z2[:1])


@pytest.mark.parametrize("form", ["function", "module"])
def test_the_module_is_the_function(case, form):
    inputs = case.tensors()
    ours = case.call_module(*inputs, **case.extra())
    assert_same(ours, case.call_function(*inputs, **case.extra()))


def test_vmap_is_a_loop(case):
    batches = [
        torch.stack(xs) for xs in zip(*[case.tensors(seed=s) for s in range(3)], strict=True)
    ]
    masks = case.extra()

    def loss(*inputs):
        return case.call_function(*inputs, **masks)

    ours = torch.vmap(loss)(*batches)
    last = torch.vmap(loss, in_dims=-1)(*[x.movedim(0, -1) for x in batches])
    assert_same(ours, last)
    for index in range(3):
        expected = loss(*[x[index] for x in batches])
        torch.testing.assert_close(
            {name: value[index] for name, value in ours.items()}, dict(expected.items())
        )


def test_vmap_and_grad_in_either_order(case):
    batch, *others = [torch.stack([x, x + 1, x * 2]) for x in case.tensors()]

    extra = case.extra()

    def loss(*inputs):
        return case.call_function(*inputs, **extra).loss

    inside = torch.vmap(torch.func.grad(loss))(batch, *others)
    outside = torch.func.grad(lambda *xs: torch.vmap(loss)(*xs).sum())(batch, *others)
    batch.requires_grad_()
    total = sum(loss(*xs) for xs in zip(batch, *others, strict=True))
    (expected,) = torch.autograd.grad(total, batch)
    torch.testing.assert_close(inside, expected)
    torch.testing.assert_close(outside, expected)


def test_batched_gradients_through_a_retained_graph(case):
    inputs = [x.requires_grad_() for x in case.tensors()]
    terms = case.call_function(*inputs, **case.extra())
    weights = torch.tensor([1.0, -2.0, 0.5])
    (batched,) = torch.autograd.grad(
        terms.loss, inputs[:1], weights, is_grads_batched=True, retain_graph=True
    )
    (single,) = torch.autograd.grad(terms.loss, inputs[:1])
    torch.testing.assert_close(batched, weights.view(-1, *[1] * single.ndim) * single)


def test_grad_has_aux(case):
    inputs = case.tensors()

    def loss(*inputs):
        terms = case.call_function(*inputs, **case.extra())
        return terms.loss, terms

    gradient, terms = torch.func.grad(loss, has_aux=True)(*inputs)
    assert isinstance(terms, tw.Terms)
    inputs = [x.requires_grad_() for x in inputs]
    expected = case.call_function(*inputs, **case.extra())
    assert_same(terms, expected)
    torch.testing.assert_close(gradient, gradients(expected, inputs)[0])


class Trained(nn.Module):
    """A model that returns the terms of its own loss."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)
        self.case = case
        self.loss_fn = case.module

    def forward(self, *inputs: Tensor) -> tw.Terms:
        rows = inputs[0].shape[0]
        embedded = [self.linear(x) if x.shape[-1] == 3 else x for x in inputs]
        return self.case.call_module(*embedded, **self.case.extra(rows))


def test_functional_call(case):
    model, inputs = Trained(case), case.tensors()
    parameters = {name: p.detach() * 2 for name, p in model.named_parameters()}

    def loss(parameters):
        terms = torch.func.functional_call(model, parameters, tuple(inputs))
        return terms.loss, terms

    gradient, terms = torch.func.grad(loss, has_aux=True)(parameters)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter *= 2
    expected = model(*inputs)
    assert_same(terms, expected)
    expected.loss.backward()
    torch.testing.assert_close(gradient["linear.weight"], model.linear.weight.grad)


def test_export_saves_and_loads(case, tmp_path):
    model, inputs = Trained(case), case.tensors()
    with torch.no_grad():
        exported = torch.export.export(model, tuple(inputs))
        torch.export.save(exported, tmp_path / "loss.pt2")
        loaded = torch.export.load(tmp_path / "loss.pt2").module()
        assert_same(loaded(*inputs), model(*inputs))


@pytest.mark.parametrize("copier", ["deepcopy", "pickle", "torch.save"])
def test_a_module_copies(case, copier):
    model = case.module
    if copier == "deepcopy":
        copied = copy.deepcopy(model)
    elif copier == "pickle":
        copied = pickle.loads(pickle.dumps(model))
    else:
        buffer = io.BytesIO()
        torch.save(model, buffer)
        buffer.seek(0)
        copied = torch.load(buffer, weights_only=False)
    inputs = case.tensors()
    assert repr(copied) == repr(model)
    ours = case.call(copied, *inputs, **case.extra())
    assert_same(ours, case.call_module(*inputs, **case.extra()))


def test_nothing_waits_for_the_device(case):
    # A fake tensor has no data: .item(), a boolean index or nonzero would raise.
    with FakeTensorMode() as mode:
        inputs = [mode.from_tensor(x).requires_grad_() for x in case.tensors()]
        extra, options = (
            {
                name: mode.from_tensor(value) if isinstance(value, Tensor) else value
                for name, value in numbers.items()
            }
            for numbers in (case.extra(), case.options)
        )
        terms = dataclasses.replace(case, options=options).call_function(*inputs, **extra)
        assert [g.shape for g in gradients(terms, inputs)] == [x.shape for x in inputs]


def test_autocast_changes_nothing(case):
    inputs = [x.requires_grad_() for x in case.tensors()]
    plain = case.call_function(*inputs, **case.extra())
    expected = gradients(plain, inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = case.call_function(*inputs, **case.extra())
        ours = gradients(cast, inputs) if not case.first else ()
    # An energy's own backward pass is as its caller runs it.
    ours = ours or gradients(cast, inputs)
    assert_same(cast, plain)
    torch.testing.assert_close(ours, expected)


def test_no_grad_gives_the_same_terms(case):
    inputs = [x.requires_grad_() for x in case.tensors()]
    with torch.no_grad():
        quiet = case.call_function(*inputs, **case.extra())
    assert not quiet.loss.requires_grad
    assert_same(quiet, case.call_function(*inputs, **case.extra()).detach())
    with torch.inference_mode():
        assert_same(quiet, case.call_function(*inputs, **case.extra()))


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
    x, y = CASES["vicreg"].tensors()
    for function in functions:
        inputs = (x, y) if function is vicreg_loss else (x,)
        compiled = torch.compile(function, fullgraph=True, backend="eager")
        assert_same(compiled(*inputs), function(*inputs))


def test_no_public_loss_is_left_out():
    families = [tw.energy, tw.joint_embedding, tw.lm, tw.sae]
    public = [value for family in families for value in vars(family).values()]
    functions = {
        value
        for value in public
        if inspect.isfunction(value)
        and isinstance(returned := inspect.signature(value).return_annotation, type)
        and issubclass(returned, tw.Terms)
    }
    modules = {v for v in public if isinstance(v, type) and issubclass(v, nn.Module)}
    assert functions == {case.function for case in CASES.values()}
    assert modules == {type(case.module) for case in CASES.values()}


def test_a_compiled_backward_pass_has_no_hessian_in_it():
    graphs = []

    def keep(graph, inputs):
        graphs.append(graph)
        return make_boxed_func(graph.forward)

    backend = aot_autograd(fw_compiler=keep, bw_compiler=keep)
    inputs = [x.requires_grad_() for x in CASES["vicreg"].tensors()]
    torch.compile(vicreg_loss, fullgraph=True, backend=backend)(*inputs).loss.backward()
    assert len(graphs) == 2
    assert not any("mm" in str(node.target) for graph in graphs for node in graph.graph.nodes)
