"""The laws: a right loss passes them, and each planted defect is found by the one meant for it."""

import functools
import random
import re
from typing import Any, Literal

import numpy
import pytest
import torch
from beartype import beartype
from hypothesis import settings
from hypothesis import strategies as st
from jaxtyping import Complex, Float, Int, jaxtyped
from torch import Tensor, nn
from vicreg_like import DEFECTS, formula, right

import termwise as tw
from termwise import testing

SIZES = {"sizes": {"batch": st.integers(2, 3), "dim": st.integers(1, 2)}, "max_examples": 12}
ONE = {"max_examples": 1}
DOUBLE = {"dtypes": [torch.float64]}
WEIGHTS = {"sim": "sim_weight", "var": "var_weight", "cov": "cov_weight"}
EAGER = {"compiled": False}
DEGREES = {"sim": 2, "cov": 4}

# Defect, the law that is meant to find it, what the law is given, and what it says.
FOUND = [
    ("not centred", "assert_shift_invariant", ("batch",), {}, r"(loss|var|cov|std) is .*shifted"),
    (
        "n for n-1",
        "assert_formula",
        (formula,),
        {},
        r"var is [\d.e-]+, but the formula gives [\d.e-]+\n",
    ),
    (
        "diagonal kept",
        "assert_formula",
        (formula,),
        {},
        r"cov is [\d.e-]+, but the formula gives 0\n",
    ),
    ("one view ignored", "assert_symmetric", ("z1", "z2"), {}, "when z1 and z2 are swapped"),
    (
        "eps outside",
        "assert_finite",
        (),
        {},
        r"gradient with respect to z1 is nan for (zeros|arguments)",
    ),
    ("repaired", "assert_finite", (), {}, "a NaN in z1 does not reach the result"),
    (
        "weights swapped",
        "assert_terms_sum",
        (WEIGHTS,),
        {},
        r"loss is .*, but the weighted sum of its terms is ",
    ),
    ("diagnostic in graph", "assert_terms_sum", (WEIGHTS,), {}, "std is not detached"),
    (
        "dtype leak",
        "assert_contract",
        (),
        EAGER | DOUBLE,
        r"loss is float32\[\], but must be float64",
    ),
    ("no contract", "assert_contract", (), EAGER, r"z[12] violates its annotation \(.*\), but"),
    ("field's shape", "assert_contract", (), EAGER, r"the result's std needs .* got float"),
    (
        "field's shape, no contract",
        "assert_contract",
        (),
        EAGER,
        r'the result\'s std needs Float\[Tensor, " dim"\], got float32\[1, 1\]',
    ),
    ("in-place", "assert_pure", (), {}, "z1 is modified in place"),
    ("global noise", "assert_pure", (), {}, "the global generator's state is changed"),
    ("memory", "assert_pure", (), {}, r"is .*, then .* for the same call"),
    ("last row dropped", "assert_permutation_invariant", ("batch",), {}, r"in the order \[1, 0\]"),
    ("no square", "assert_scale", (("z1", "z2"), DEGREES), {}, "sim is .*for 2 times z1, z2.* 2"),
    (
        "wrong backward",
        "assert_gradients",
        (),
        {},
        r"the gradient of \w+ with respect to z1 is .*, but finite differences give ",
    ),
    ("branch", "assert_compiles", (), ONE, r"raises \w+ when compiled: .*data-dependent"),
    (
        "no vmap rule",
        "assert_vmaps",
        (),
        {},
        "raises RuntimeError under vmap: .* does not have vmap support",
    ),
]


@pytest.mark.parametrize(
    ("defect", "law", "given", "options", "says"), FOUND, ids=[found[0] for found in FOUND]
)
def test_defect_is_found_by_its_law(defect, law, given, options, says):
    check = getattr(testing, law)
    check(right, *given, **(SIZES | options))
    with pytest.raises(AssertionError) as failure:
        check(DEFECTS[defect], *given, **(SIZES | options))
    text = str(failure.value)
    problem, _, code = text.partition("\n\n")
    name = DEFECTS[defect].__name__
    assert re.match(f"{law}: {name}: ", problem)
    assert re.search(says, problem + "\n"), problem
    assert "\n" not in problem
    assert code.startswith(f"from vicreg_like import {name}\n")
    assert f"\n{name}(\n    z1=torch.tensor(" in code


def failure(law: str, fn: Any, *given: Any, **options: Any) -> str:
    with pytest.raises(AssertionError) as broken:
        getattr(testing, law)(fn, *given, **options)
    return str(broken.value)


def test_every_defect_is_planted_for_a_law():
    # test_sharding.py finds that one over ranks.
    assert {found[0] for found in FOUND} == set(DEFECTS) - {"gradient not scaled"}
    assert len({found[1] for found in FOUND}) == 12


@tw.contract
def log_sum(x: Float[Tensor, " n"], how: Literal["sum", "mean"] = "sum") -> Float[Tensor, ""]:
    return x.log().sum() if how == "sum" else x.log().mean()


def test_finite_keeps_to_what_is_given():
    positive = st.integers(1, 8).map(float)
    assert "for " in failure("assert_finite", log_sum)
    testing.assert_finite(log_sum, elements={"x": positive})
    testing.assert_finite(log_sum, elements=positive)
    testing.assert_finite(log_sum, overrides={"x": lambda sizes: torch.ones(2)})


def test_formula_shows_where_and_asks_for_the_gradient():
    def rows(x: Float[Tensor, "n 2"], w: Float[Tensor, " 2"]) -> Float[Tensor, "n 2"]:
        return x * w + 1

    def detached(x: Float[Tensor, " n"]) -> Float[Tensor, ""]:
        return x.detach().square().sum()

    def wrong_rows(x, w):
        return x * w + torch.tensor([1.0, 1.0 + 1e-7], dtype=x.dtype)

    testing.assert_formula(rows, lambda x, w: 1 + w * x)
    text = failure("assert_formula", rows, wrong_rows)
    assert "rows: result is 1 at [0, 1], but the formula gives 1.0000001\n" in text
    text = failure("assert_formula", rows, lambda x, w: x * w.detach() + 1)
    assert re.search(
        r"the gradient of result with respect to w is .* at \[\d\], but the formula gives 0\n", text
    )
    text = failure("assert_formula", detached, lambda x: x.square().sum())
    assert "result has no gradient, but the formula has one" in text


class CubeOnce(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx, grad):
        return 3 * ctx.saved_tensors[0].detach() ** 2 * grad


def cube(x: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
    return CubeOnce.apply(x)


def test_second_derivatives():
    testing.assert_gradients(cube, max_examples=1)
    text = failure("assert_gradients", cube, second=True, max_examples=1)
    assert "the gradient of (the gradient with respect to x) with respect to x is [[0." in text


def test_what_is_along_the_axis_is_permuted_with_it():
    def running(x: Float[Tensor, "n d"], keep: Int[Tensor, " n"]) -> Float[Tensor, "n d"]:
        return x.cumsum(0) * keep[:, None]

    def each(x: Float[Tensor, "n d"], keep: Int[Tensor, " n"]) -> Float[Tensor, "n d"]:
        return x.square() * keep[:, None]

    def neighbours(x: Float[Tensor, " n"]) -> Float[Tensor, ""]:
        return (x * x.roll(1)).sum()

    testing.assert_permutation_invariant(each, "n")
    assert " when n is in the order" in failure("assert_permutation_invariant", running, "n")
    assert "order [" in failure("assert_permutation_invariant", neighbours, "n")


def test_every_place_is_moved_and_no_order_is_a_turn_alone():
    def at(x: Float[Tensor, " n"], place: int) -> Float[Tensor, ""]:
        return x[place] + x.sum()

    def around(x: Float[Tensor, " n"]) -> Float[Tensor, ""]:
        return (x * x.roll(1).square()).sum()

    for n in range(2, 7):
        for place in range(n):
            text = failure(
                "assert_permutation_invariant", at, "n", sizes={"n": n}, overrides={"place": place}
            )
            assert "is in the order [" in text
        if n > 2:
            assert "order [" in failure("assert_permutation_invariant", around, "n", sizes={"n": n})
    with pytest.raises(ValueError, match="the size of n was below 2 in every call of around"):
        testing.assert_permutation_invariant(around, "n", sizes={"n": 1})


@tw.terms
class HalfTerms(tw.Terms):
    base: Float[Tensor, " n"]


def nested(x: Float[Tensor, " n"]) -> tuple[HalfTerms, int]:
    return HalfTerms(loss=x[0].float(), base=x[None].float()), 3


def keyed(x: Float[Tensor, " n"]) -> dict[str, Any]:
    return {"a": x.sum(), "results": {"c": x[0] / 0}}


def number(x: Float[Tensor, " n"]) -> float:
    return float(x[0])


def text(x: Float[Tensor, " n"]) -> str:
    return str(x)


COUNTED = iter(range(1000))


def counted(x: Float[Tensor, " n"]) -> list[Any]:
    return [x.sum(), (next(COUNTED), None)]


def test_what_is_within_a_result_is_looked_at():
    two = {"sizes": {"n": 2}}
    for fn, part in ((nested, "result 0.loss"), (number, "result")):
        assert f": {part} is " in failure("assert_permutation_invariant", fn, "n", **two), fn
    assert "the result's base needs" in failure("assert_contract", nested, compiled=False)
    assert ": results.c is " in failure("assert_finite", keyed)
    assert ": result 1.0 is " in failure("assert_pure", counted)
    for law, given in (("pure", ()), ("finite", ()), ("permutation_invariant", ("n",))):
        with pytest.raises(ValueError, match="text returns no tensor and no number to compare"):
            getattr(testing, f"assert_{law}")(text, *given, **two)


class Averaged(nn.BatchNorm1d):
    def forward(self, x: Float[Tensor, "2 3"]) -> Float[Tensor, "2 3"]:
        return super().forward(x)


def widened(x: Float[Tensor, " n"], y: Float[Tensor, ""]) -> Float[Tensor, " n"]:
    return (x + y).repeat(2)


def test_what_a_partial_holds_limits_the_result():
    held = functools.partial(widened, x=torch.zeros(3))
    assert "the result needs" in failure("assert_contract", held, compiled=False)


def test_a_module_that_changes_is_not_pure():
    testing.assert_pure(Averaged(3).eval())
    assert "the module's running_" in failure("assert_pure", Averaged(3))


def test_each_argument_is_refused_compiled():
    @tw.contract
    def inner(x: Float[Tensor, " n"]) -> Float[Tensor, ""]:
        return x.sum()

    def lenient(x: Float[Tensor, " n"]) -> Float[Tensor, ""]:
        return x.sum() if torch.compiler.is_compiling() else inner(x=x)

    testing.assert_contract(inner, compiled=True)
    assert "when compiled, x violates its annotation" in failure(
        "assert_contract", lenient, compiled=True
    )

    @tw.contract
    def computed(k: int, x: Float[Tensor, "{k} n"]) -> Float[Tensor, ""]:
        return x.sum()

    testing.assert_contract(computed, compiled=True, sizes={"n": 2})

    @tw.contract
    def several(xs: dict[str, Float[Tensor, "{k}+1 n"]], k: int = 1) -> Float[Tensor, ""]:
        return torch.stack([x.sum() for x in xs.values()]).sum()

    testing.assert_contract(several, compiled=True)


def test_a_memory_of_other_calls_is_found():
    seen = set()

    def counted(x: Float[Tensor, " n"]) -> Float[Tensor, ""]:
        seen.add(tuple(x.tolist()))
        return x.sum() + len(seen)

    says = r"result is .*, then .* for the same call|result is .* if this call runs first, but "
    assert re.search(says, failure("assert_pure", counted))


KEPT: dict[Any, Tensor] = {}
LAST = None


def by_shape(x: Float[Tensor, "n d"]) -> Float[Tensor, ""]:
    if x.shape not in KEPT:
        KEPT[x.shape] = x.detach().mean()
    return (x - KEPT[x.shape]).square().sum()


def of_a_helper(x: Float[Tensor, "n d"]) -> Float[Tensor, ""]:
    return by_shape(x) + x.sum()


def by_name(x: Float[Tensor, "n d"]) -> Float[Tensor, ""]:
    global LAST
    LAST = x.detach().mean() if LAST is None else LAST
    return (x - LAST).square().sum()


def by_attribute(x: Float[Tensor, "n d"]) -> Float[Tensor, ""]:
    by_attribute.mean = getattr(by_attribute, "mean", x.detach().mean())
    return (x - by_attribute.mean).square().sum()


def by_closure():
    kept = {}

    def closed(x: Float[Tensor, "n d"]) -> Float[Tensor, ""]:
        return (x - kept.setdefault(x.shape, x.detach().mean())).square().sum()

    return closed


@functools.cache
def of_this_shape(shape: torch.Size) -> list[Tensor]:
    return []


def by_cache(x: Float[Tensor, "n d"]) -> Float[Tensor, ""]:
    kept = of_this_shape(x.shape)
    kept.append(x.detach().mean())
    return (x - kept[0]).square().sum()


class Centred(nn.Module):
    def __init__(self):
        super().__init__()
        self.kept = {}

    def forward(self, x: Float[Tensor, "n d"]) -> Float[Tensor, ""]:
        return (x - self.kept.setdefault(x.shape, x.detach().mean())).square().sum()


PLACES: dict[int, Tensor] = {}


@functools.cache
def ones(n: int) -> Tensor:
    return torch.ones(n)


def constants(x: Float[Tensor, "n d"]) -> Float[Tensor, ""]:
    n = len(x)
    return (x * PLACES.setdefault(n, torch.arange(n))[:, None] * ones(n)[:, None]).sum()


@pytest.mark.parametrize(
    "fn",
    [
        by_shape,
        of_a_helper,
        tw.contract(by_shape),
        by_name,
        by_attribute,
        by_closure(),
        by_cache,
        Centred(),
        functools.partial(of_a_helper),
    ],
)
def test_a_value_that_is_kept_from_an_earlier_call_is_found(fn):
    KEPT.clear()  # what is kept when a law begins is as a first call finds it
    text = failure("assert_pure", fn, max_examples=20)
    assert re.search(
        r"is .* if this call runs first, but .* after a call with the same shapes", text
    )


def test_constants_by_size_may_be_kept():
    testing.assert_pure(constants, max_examples=20)
    assert PLACES  # and stay


def test_a_result_that_is_an_argument_is_found():
    @tw.terms
    class GivenTerms(tw.Terms):
        given: Float[Tensor, " n"]

    def itself(x: Float[Tensor, " n"]) -> GivenTerms:
        return GivenTerms(loss=x.sum(), given=x)

    def view(x: Float[Tensor, "n 2"]) -> GivenTerms:
        return GivenTerms(loss=x.sum(), given=x[:, 1].detach())

    def copied(x: Float[Tensor, " n"]) -> GivenTerms:
        return GivenTerms(loss=x.sum(), given=x.clone())

    text = failure("assert_pure", itself)
    assert 'itself: given is the argument x: return a copy, or pass aliases=["given"]' in text
    assert "view: given is a view of the argument x: return a copy" in failure("assert_pure", view)
    testing.assert_pure(itself, aliases=["given"])
    testing.assert_pure(copied)


def test_what_is_put_into_an_argument_is_found():
    def stored(xs: dict[str, Float[Tensor, " n"]]) -> Float[Tensor, ""]:
        xs["z"] = xs["a"] * 2
        return xs["z"].sum()

    assert ": xs.z is added to an argument" in failure("assert_pure", stored)


# --- where a law found what was right -------------------------------------------------------

EDGES = {"edges": lambda sizes: st.integers(0, sizes["nodes"] - 1)}


def on_edges(nodes: Float[Tensor, "nodes d"], edges: Int[Tensor, "edges 2"]) -> Float[Tensor, ""]:
    return (nodes[edges[:, 0]] - nodes[edges[:, 1]]).square().sum()


def repaired_on_edges(
    nodes: Float[Tensor, "nodes d"], edges: Int[Tensor, "edges 2"]
) -> Float[Tensor, ""]:
    return on_edges(nodes.nan_to_num(), edges)


def test_a_node_without_an_edge_need_not_reach_the_result():
    testing.assert_finite(on_edges, elements=EDGES, max_examples=60)
    testing.assert_permutation_invariant(on_edges, "edges", elements=EDGES)
    says = 'a NaN in nodes does not reach the result (if it need not, pass ignores=["nodes"])'
    assert says in failure("assert_finite", repaired_on_edges, elements=EDGES)


def test_a_nan_that_is_left_out_of_a_mean_is_found():
    def without(x: Float[Tensor, "n d"]) -> Float[Tensor, ""]:
        return x.nanmean(1).sum()

    def of_one(x: Float[Tensor, " n"], y: Float[Tensor, " n"]) -> Float[Tensor, ""]:
        return x.sum()

    assert "a NaN in x does not reach" in failure("assert_finite", without, sizes={"d": 3})
    assert "a NaN in y does not reach" in failure("assert_finite", of_one)
    testing.assert_finite(of_one, ignores=["y"])


def test_an_exponent_has_a_scale_of_its_own():
    def divergence(
        mean: Float[Tensor, "n d"], log_variance: Float[Tensor, "n d"]
    ) -> Float[Tensor, ""]:
        return (log_variance.exp() + mean**2 - 1 - log_variance).sum() / 2

    text = failure("assert_finite", divergence)
    assert "result is inf for large elements (pass a smaller scale=" in text
    testing.assert_finite(divergence, scale={"log_variance": 10.0})
    with pytest.raises(ValueError, match="assert_finite: divergence takes no log_var, only mean"):
        testing.assert_finite(divergence, scale={"log_var": 10.0})


def test_the_formula_s_gradient_by_each_argument_is_compared():
    def halved(x, kept):
        return x / 2 + (x / 2).detach() if kept else x

    def fn(
        x: Float[Tensor, " n"], ys: dict[str, Float[Tensor, " n"]], wrong: int
    ) -> Float[Tensor, ""]:
        x = halved(x, wrong == 0)
        return sum((halved(y, wrong > 0) * x).sum() for y in ys.values())

    def formula(x, ys, wrong):
        return sum((y * x).sum() for y in ys.values())

    testing.assert_formula(fn, formula, overrides={"wrong": -1})
    for wrong, path in ((0, "x"), (1, r"ys\.a")):
        text = failure("assert_formula", fn, formula, overrides={"wrong": wrong})
        assert re.search(
            rf"the gradient of result with respect to {path} is .*, but the formula gives ", text
        )


def test_a_seed_and_a_setting_that_a_body_changes_are_found():
    def seeds(x: Float[Tensor, " n"]) -> Float[Tensor, ""]:
        torch.manual_seed(0)
        return (x * torch.randn(len(x))).sum()

    def shuffles(x: Float[Tensor, " n"]) -> Float[Tensor, ""]:
        random.random()
        return x.sum()

    def of_numpy(x: Float[Tensor, " n"]) -> Float[Tensor, ""]:
        numpy.random.seed(0)
        return x.sum()

    def rounds(x: Float[Tensor, " n"]) -> Float[Tensor, ""]:
        torch.set_float32_matmul_precision("high")
        return x.sum()

    before = torch.get_rng_state(), random.getstate(), numpy.random.get_state()[1].tolist()
    try:
        assert "the global generator's state is changed" in failure("assert_pure", seeds)
        assert "the state of random is changed" in failure("assert_pure", shuffles)
        assert "the state of numpy.random is changed" in failure("assert_pure", of_numpy)
        assert "the precision of matrix products is changed" in failure("assert_pure", rounds)
    finally:
        torch.set_float32_matmul_precision("highest")
    # The law itself leaves them as they were.
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]
    assert numpy.random.get_state()[1].tolist() == before[2]


class OfMagnitudes(torch.autograd.Function):
    """|x|^2 of a complex x, with a wrong derivative: its conjugate's."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return (x * x.conj()).real

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 2 * x.conj() * grad


def test_faults_of_complex_numbers_are_found():
    def right(x: Complex[Tensor, "batch n"], y: Complex[Tensor, "batch n"]) -> Float[Tensor, ""]:
        return (x - y).abs().square().sum(1).mean()

    def not_conjugated(
        x: Complex[Tensor, "batch n"], y: Complex[Tensor, "batch n"]
    ) -> Float[Tensor, ""]:
        return ((x - y) * (x - y)).real.sum(1).mean()

    def repaired(x: Complex[Tensor, "batch n"], y: Complex[Tensor, "batch n"]) -> Float[Tensor, ""]:
        x, y = (torch.complex(z.real.nan_to_num(), z.imag.nan_to_num()) for z in (x, y))
        return right(x, y)

    def derived(x: Complex[Tensor, "batch n"], y: Complex[Tensor, "batch n"]) -> Float[Tensor, ""]:
        return OfMagnitudes.apply(x - y).sum(1).mean()

    def formula(x, y):
        apart = torch.view_as_real(x) - torch.view_as_real(y)
        return (apart**2).sum() / len(x)

    testing.assert_formula(right, formula)
    testing.assert_finite(right)
    testing.assert_gradients(right)
    testing.assert_vmaps(right)
    testing.assert_permutation_invariant(right, "batch")
    assert "but the formula gives" in failure("assert_formula", not_conjugated, formula)
    assert "a NaN in x does not reach the result" in failure("assert_finite", repaired)
    assert "but finite differences give" in failure("assert_gradients", derived)
    assert "the gradient of result with respect to x is" in failure(
        "assert_formula", derived, formula
    )


def test_a_view_of_what_is_transposed_is_found():
    def flat(x: Float[Tensor, "batch n"]) -> Float[Tensor, ""]:
        return x.view(-1).square().sum()

    said = failure("assert_permutation_invariant", flat, "batch", max_examples=30)
    assert "view size is not compatible" in said
    # The call as code has the strides too.
    assert re.search(r"\]\](, dtype=torch.float64)?\)\.(mT\.contiguous|repeat\()", said), said


def test_repeated_rows_are_views_of_one():
    def flat(x: Float[Tensor, "batch n"]) -> Float[Tensor, ""]:
        return x.square().sum() / (x.stride(0) // x.stride(0))

    said = failure("assert_finite", flat, sizes={"batch": 2, "n": 2})
    assert "assert_finite: flat: raises ZeroDivisionError for equal rows: integer division" in said
    assert ".expand(2, 2)" in said


def test_sizes_above_a_block_are_drawn_and_empty_ones():
    def first_block(x: Float[Tensor, "batch 2"]) -> Float[Tensor, ""]:
        return x[:64].square().sum() / len(x)

    def plain(x: Tensor) -> Tensor:
        return x.square().mean(0).sum()

    def right(x: Float[Tensor, "batch 2"]) -> Float[Tensor, ""]:
        return x.square().sum(1).mean()

    assert "but the formula gives" in failure("assert_formula", first_block, plain)
    testing.assert_formula(right, plain)
    # A size that is named is never another one.
    testing.assert_formula(first_block, plain, sizes={"batch": st.integers(1, 64)})

    @tw.contract
    def highest(x: Float[Tensor, " n"]) -> Float[Tensor, ""]:
        return x.max()

    @tw.contract
    def refused(x: Float[Tensor, " n"]) -> Float[Tensor, ""]:
        if not len(x):
            raise ValueError("refused needs one n, got x of size 0")
        return x.max()

    def made_up(x: Float[Tensor, " n"]) -> Float[Tensor, ""]:
        return x.max() if len(x) else x.sum() + 1

    said = failure("assert_contract", highest)
    assert (
        "assert_contract: highest: a call with size 0 for axis n raises RuntimeError: max(): "
        in said
    )
    assert "torch.zeros([0], dtype=" in said
    testing.assert_contract(refused)
    testing.assert_contract(highest, sizes={"n": st.integers(1, 3)})
    said = failure("assert_formula", made_up, lambda x: x.max())
    assert "result is 1 with size 0 for axis n, but the formula raises " in said
    testing.assert_formula(refused, lambda x: x.max())


def test_laws_refuse_a_keyword_that_they_do_not_know():
    for law in ("assert_pure", "assert_formula", "assert_gradients"):
        with pytest.raises(TypeError, match="calls take no size, only sizes, dtypes"):
            getattr(testing, law)(log_sum, *[log_sum] * (law == "assert_formula"), size={"n": 2})


def test_a_change_within_an_argument_is_found():
    def scaled(xs: dict[str, Float[Tensor, " n"]]) -> Float[Tensor, ""]:
        xs["a"].data.mul_(2)
        return xs["a"].sum()

    def listed(xs: list[dict[str, Float[Tensor, " n"]]]) -> Float[Tensor, ""]:
        xs[0]["a"].data.mul_(2)
        return xs[0]["a"].sum()

    assert ": xs.a is modified in place" in failure("assert_pure", scaled)
    assert ": xs.0.a is modified in place" in failure("assert_pure", listed)
    given = {"overrides": {"xs": {"a": torch.ones(2)}}}
    assert ": xs.a is modified in place" in failure("assert_pure", scaled, **given)


def test_terms_outside_the_sum():
    in_graph = DEFECTS["diagnostic in graph"]
    testing.assert_terms_sum(in_graph, WEIGHTS, also_in_graph=["std"], **SIZES)
    text = failure("assert_terms_sum", right, {**WEIGHTS, "var": 24.0}, **SIZES)
    assert re.search(r"loss is .*, but the weighted sum of its terms is ", text)
    testing.assert_terms_sum(right, {**WEIGHTS, "sim": lambda call: call["sim_weight"]}, **SIZES)


def test_symmetry_reaches_all_other_gradients():
    def fn(a: Float[Tensor, " n"], b: Float[Tensor, " n"], c: Float[Tensor, " n"]):
        return (a * b * c + (a - b).detach() * (c - c.detach())).sum()

    text = failure("assert_symmetric", fn, "a", "b")
    assert re.search(r"the gradient with respect to c is .* when a and b are swapped", text)


def test_a_failing_function_is_a_failure_with_its_cause():
    def picky(x: Float[Tensor, " n"]) -> Float[Tensor, ""]:
        if len(x) > 2:
            raise ValueError("picky needs few")
        return x.sum()

    with pytest.raises(AssertionError) as broken:
        testing.assert_pure(picky)
    assert str(broken.value) == (
        "assert_pure: picky: raises ValueError: picky needs few\n\n"
        "import torch\n\npicky(\n    x=torch.tensor([0.0, 0.0, 0.0]),\n)"
    )
    assert isinstance(broken.value.__cause__, ValueError)


def test_compilation_is_not_tried_on_zeros_alone():
    sizes = {"batch": 2, "dim": 2}
    text = failure("assert_compiles", DEFECTS["branch"], sizes=sizes)
    assert "[[0.0, 0.0], [0.0, 0.0]]" not in text
    # Unless there is nothing else.
    every = dict.fromkeys(("sim_weight", "var_weight", "cov_weight", "eps"), 1.0)
    zeros = {"z1": torch.zeros(2, 2), "z2": torch.zeros(2, 2), **every}
    text = failure("assert_compiles", DEFECTS["branch"], overrides=zeros, dtypes=[torch.float32])
    assert "[[0.0, 0.0], [0.0, 0.0]]" in text


def test_jaxtyping_alone_does_not_compile():
    @jaxtyped(typechecker=beartype)
    def plain(x: Float[Tensor, " n"]) -> Float[Tensor, ""]:
        return x.sum()

    testing.assert_contract(plain, compiled=False)
    assert "assert_contract: plain: raises " in failure("assert_contract", plain, compiled=True)


def test_a_name_inside_a_word_is_no_name():
    def fn(a: Float[Tensor, " n"]) -> Tensor:
        if not isinstance(a, Tensor) or a.ndim != 1 or not a.is_floating_point():
            raise TypeError("what is passed has another shape")
        return a.sum()

    text = failure("assert_contract", fn, compiled=False)
    assert (
        "a violates its annotation (one axis more), but the TypeError does not name it: what is "
        in text
    )


def numbers(k: int, weight: float = 1.0) -> float:
    return k * weight


def counting(tokens: Int[Tensor, " n"], x: Float[Tensor, " n"]) -> Int[Tensor, ""]:
    return tokens.sum() + (x > 0).sum()


def of_tokens(tokens: Int[Tensor, " n"]) -> Int[Tensor, ""]:
    return tokens.sum()


def without_tensors() -> int:
    return 3


@pytest.mark.parametrize(
    ("law", "fn", "given", "says"),
    [
        (
            "assert_permutation_invariant",
            right,
            ("bacth",),
            "assert_permutation_invariant: right has no axis bacth, only batch, dim",
        ),
        ("assert_shift_invariant", right, ("n",), "right has no axis n, only batch, dim"),
        ("assert_symmetric", right, ("z1", "z3"), "assert_symmetric: right takes no z3, only z1"),
        ("assert_scale", right, (["z"], 1), "assert_scale: right takes no z, only z1, z2"),
        (
            "assert_scale",
            right,
            (["z1"], {"covar": 1}),
            "the result of right has no covar, only",
        ),
        ("assert_terms_sum", right, ({"similarity": 1},), "the result of right has no similarity"),
        ("assert_terms_sum", right, ({"sim": "weight"},), "right takes no weight, only z1"),
        ("assert_terms_sum", counting, ({},), "the result of counting has no loss"),
        ("assert_scale", right, ([], 1), "assert_scale needs arguments, a degree, and a factor"),
        ("assert_symmetric", right, ("z1.a", "z2"), "right takes no z1.a, only z1"),
        (
            "assert_shift_invariant",
            of_tokens,
            ("n",),
            "takes no floating tensor that has the axis n",
        ),
        (
            "assert_contract",
            without_tensors,
            (),
            "without_tensors has no argument that can violate its annotation",
        ),
        ("assert_formula", right, (lambda **_: 1.0,), "the reference returns no tensor"),
        (
            "assert_formula",
            right,
            (lambda z1, **_: {"a": z1},),
            "the result of right has no a, only",
        ),
        (
            "assert_gradients",
            numbers,
            (),
            "the result of numbers has a gradient with respect to an argument",
        ),
        ("assert_gradients", counting, (), "no part of the result of counting has a gradient"),
        ("assert_vmaps", numbers, (), "assert_vmaps: numbers takes no floating tensor"),
    ],
)
def test_laws_refuse_what_they_say_nothing_about(law, fn, given, says):
    with pytest.raises(ValueError, match=re.escape(says)):
        getattr(testing, law)(fn, *given, **(SIZES if fn is right else {}))


def test_unknown_arguments_are_refused():
    with pytest.raises(ValueError, match="assert_finite: right takes no q, only z1, z2"):
        testing.assert_finite(right, ignores=["q"])
    with pytest.raises(ValueError, match="the result of right has no zz"):
        testing.assert_terms_sum(right, WEIGHTS, also_in_graph=["zz"])
    for law in ("assert_gradients", "assert_vmaps"):
        with pytest.raises(ValueError, match=rf"{law}: right takes no z, only z1, z2"):
            getattr(testing, law)(right, arguments=["z"], **SIZES)


def test_a_profile_and_the_environment_ask_for_more_calls(monkeypatch):
    seen = []

    def counted(x: Float[Tensor, " n"]) -> Float[Tensor, ""]:
        seen.append(x)
        return x.sum()

    def calls_of(**options):
        seen.clear()
        sizes = {"n": st.integers(1, 4)}
        testing.assert_formula(counted, lambda x: x.sum(), sizes=sizes, **options)
        return len(seen)

    before = settings()
    usual = calls_of(max_examples=5)
    assert usual <= 5
    monkeypatch.setenv("TERMWISE_EXAMPLES", "40")
    assert 30 < calls_of(max_examples=5) <= 40
    assert calls_of(max_examples=60) > 40
    monkeypatch.delenv("TERMWISE_EXAMPLES")
    try:
        settings.register_profile("nightly", before, max_examples=120)
        settings.load_profile("nightly")
        assert 100 < calls_of(max_examples=5) <= 120
    finally:
        settings.load_profile("ci")
    assert calls_of(max_examples=5) == usual
