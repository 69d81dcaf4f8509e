"""Calls drawn from annotations: they fit, they shrink, they paste back; broken ones do not fit."""

import dataclasses
import functools
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Generic, Literal, NamedTuple, TypedDict, TypeVar

import pytest
import torch
from beartype import beartype
from hypothesis import HealthCheck, Phase, find, given, settings
from hypothesis import strategies as st
from jaxtyping import Bool, Complex, Float, Float64, Int, Shaped, UInt, jaxtyped
from torch import Tensor, nn

import termwise as tw
from termwise import testing
from termwise._groups import ProcessGroup
from termwise.testing import BrokenCall, Call, broken_calls, calls
from termwise.testing._calls import violations
from termwise.testing._laws import same_tensor

jaxtyping_alone = jaxtyped(typechecker=beartype)
both = pytest.mark.parametrize("decorate", [tw.contract, jaxtyping_alone])


def every(strategy: st.SearchStrategy[Any], check: Callable[[Any], Any], examples: int = 15):
    """Run a check on drawn calls, without shrinking; give back what it returned."""
    answers = []

    @settings(
        max_examples=examples,
        phases=[Phase.generate],
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.nested_given],
    )
    @given(strategy)
    def run(drawn):
        answers.append(check(drawn))

    run()
    return answers


def first(strategy: st.SearchStrategy[Any], condition: Callable[[Any], bool] = bool) -> Any:
    """Find a call, without shrinking."""
    many = settings(phases=[Phase.generate], max_examples=200)
    return find(strategy, condition, settings=many)


def pasted(call: Call) -> Any:
    """Run a call's code and give what its last expression gives."""
    *lines, last = call.code().split("\n\n")
    names: dict[str, Any] = {"fn": call.fn}
    exec("\n".join(lines), names)
    return eval(last.replace("<locals>", ""), names)


def same(one: Any, two: Any) -> bool:
    if isinstance(one, Tensor):
        alike = one.dtype == two.dtype and one.shape == two.shape
        return alike and bool(((one == two) | ((one != one) & (two != two))).all())
    if isinstance(one, dict):
        return one.keys() == two.keys() and all(same(one[key], two[key]) for key in one)
    if isinstance(one, list | tuple):
        return type(one) is type(two) and all(same(*pair) for pair in zip(one, two, strict=True))
    if dataclasses.is_dataclass(one):
        return type(one) is type(two) and all(
            same(getattr(one, f.name), getattr(two, f.name)) for f in dataclasses.fields(one)
        )
    return type(one) is type(two) and (one == two or one != one)


@dataclasses.dataclass(frozen=True)
class Inner:
    offsets: Float[Tensor, " width"]
    scale: float = 2.0


@dataclasses.dataclass(frozen=True)
class Sparse:
    values: Float[Tensor, "batch k"]
    indices: Int[Tensor, "batch k"]
    inner: Inner
    name: str = "plain"
    extra: tuple[int, ...] = dataclasses.field(default_factory=lambda: (7,))


class Metric(nn.Module):
    def __init__(self, power: float = 2.0):
        super().__init__()
        self.power = power

    def extra_repr(self) -> str:
        return f"power={self.power}"

    @tw.contract
    def forward(self, x: Float[Tensor, "batch dim"], y: Float[Tensor, "batch dim"]) -> Tensor:
        return (x - y).abs().pow(self.power).sum()


def echo(**arguments: Any) -> dict[str, Any]:
    return arguments


@tw.contract
def distance(x: Float[Tensor, "batch dim"], y: Float[Tensor, "batch dim"], *, weight: float = 1.0):
    return weight * (x - y).square().sum()


@tw.contract
def of_record(r: Sparse, x: Float[Tensor, "batch width"]):
    return r, x


@tw.contract
def of_kinds(
    flag: bool,
    count: int,
    weight: float,
    how: Literal["sum", "mean"],
    half: Float[Tensor, " n"],
    whole: Int[Tensor, " n"],
    truth: Bool[Tensor, " n"],
    small: UInt[Tensor, " n"],
    wide: Complex[Tensor, " n"],
    any_of_them: Shaped[Tensor, " n"],
    pairs: list[Float[Tensor, " n"]],
    three: tuple[int, float, Float[Tensor, " n"]],
    generator: torch.Generator,
    group: ProcessGroup | None,
    perhaps: Float[Tensor, " n"] | None,
):
    noise = torch.rand(3, generator=generator)
    return flag, count, weight, how, half, whole, truth, small, wide, any_of_them, pairs, three, (
        noise, perhaps
    )  # fmt: skip


class Weighing:
    def __repr__(self) -> str:
        return "Weighing()"

    @tw.contract
    def of(self, x: Float[Tensor, " n"]):
        return x


@tw.contract
def with_k(x: Float[Tensor, "{k}+1 n"], *, k: int, y: Float[Tensor, " n"]):
    return x, y


# What is drawn.


@both
def test_an_axis_name_has_one_size(decorate):
    @decorate
    def fn(x: Float[Tensor, "batch dim"], y: Float[Tensor, "dim 3"], z: Int[Tensor, " batch"]):
        return x.shape[0], x.shape[1]

    drawn = every(calls(fn), lambda call: (call(), call.sizes, call["y"].shape[1]))
    assert all(shape == (sizes["batch"], sizes["dim"]) for shape, sizes, _ in drawn)
    assert {three for *_, three in drawn} == {3}
    assert len({shape for shape, *_ in drawn}) > 5


@both
def test_variadic_axes(decorate):
    @decorate
    def fn(
        x: Float[Tensor, "*batch dim"],
        y: Float[Tensor, "*batch"],
        free: Float[Tensor, "... dim"],
        any_size: Float[Tensor, "_ dim"],
    ):
        return x.ndim, free.ndim, any_size.shape[0]

    drawn = every(calls(fn), lambda call: (call(), call.sizes["batch"]), 40)
    assert {1, 2} <= {ndim for (ndim, *_), _ in drawn} <= {1, 2, 3}
    assert any(free != ndim for (ndim, free, _), _ in drawn)
    assert {1, 2} <= {size for (*_, size), _ in drawn} <= {1, 2, 3, 4}
    assert all(len(batch) == ndim - 1 for (ndim, *_), batch in drawn)


@both
def test_what_broadcasts(decorate):
    @decorate
    def fn(
        x: Float[Tensor, "batch #dim"], y: Float[Tensor, "#batch dim"], z: Float[Tensor, "*#lead 1"]
    ):
        return x.shape[1] == 1 < y.shape[1], y.shape[0] == 1 < x.shape[0]

    narrow, short = zip(*every(calls(fn, sizes={"lead": (2, 3)}), lambda c: c(), 30), strict=True)
    assert set(narrow) == set(short) == {True, False}

    @decorate
    def several(x: Float[Tensor, "*#lead n"], y: Float[Tensor, "*#lead n"]):
        return (x + y).shape

    shapes = every(calls(several, sizes={"lead": (2, 3), "n": 1}), lambda call: call(), 30)
    assert set(shapes) >= {(2, 3, 1), (1, 3, 1)}


@both
def test_computed_axes(decorate):
    @decorate
    def fn(x: Float[Tensor, " n"], y: Float[Tensor, " n-1"], z: Float[Tensor, "{k}+1"], k: int):
        return len(x), len(y), len(z), k

    drawn = every(calls(fn), lambda call: call(), examples=30)
    assert all(y == n - 1 and z == k + 1 for n, y, z, k in drawn)
    assert {k for *_, k in drawn} == {1, 2, 3}

    @decorate
    def shorter(x: Float[Tensor, " n"], y: Float[Tensor, " n-2"]):
        return len(y)

    assert set(every(calls(shorter), lambda call: call(), 60)) == {0, 1, 2}


@both
def test_axes_computed_by_a_function_in_items_and_from_a_sequence(decorate):
    @decorate
    def least(x: Float[Tensor, " n"], y: Float[Tensor, " min(n,3)"]):
        return len(x), len(y)

    assert set(every(calls(least), lambda call: call(), 30)) == {(1, 1), (2, 2), (3, 3), (4, 3)}

    @decorate
    def counted(y: Float[Tensor, " {len(xs)}"], xs: list[Float[Tensor, " n"]]):
        return len(y) - len(xs)

    assert set(every(calls(counted), lambda call: call())) == {0}
    found = violations(first(calls(counted)))
    assert {one.argument for one in found} == {"y", "xs"}


def by_name(
    xs: Mapping[str, Float[Tensor, "b d"] | Int[Tensor, " b"]],
    ys: dict[str, Float[Tensor, " {k} d"]] | None = None,
    k: int = 2,
):
    return xs, ys, k


def test_mappings_by_name_share_the_axes():
    def check(call):
        xs, ys, k = call()
        b, d = call.sizes.get("b"), call.sizes.get("d")
        assert {x.shape for x in xs.values()} <= {(b, d), (b,)}
        assert all(y.shape == (k, d) for y in (ys or {}).values())
        axes = call.axes()
        assert all(axes[f"xs.{key}"] == ("b", "d")[: x.ndim] for key, x in xs.items())
        assert set(call.tensors()) == {
            *(f"xs.{key}" for key in xs),
            *(f"ys.{key}" for key in ys or {}),
        }
        again = {}
        exec(call.code().replace("\n\nby_name", "\n\nresult = by_name", 1), again)
        assert all(torch.equal(again["result"][0][key], x) for key, x in xs.items())
        return len(xs), ys is None

    seen = every(calls(by_name), check, 40)
    assert {count for count, _ in seen} == {1, 2, 3}
    assert {is_none for _, is_none in seen} == {True, False}
    given = first(calls(by_name, elements={"xs.a": st.just(0.5)}), lambda call: len(call["xs"]) > 1)
    assert set(given["xs"]["a"].flatten().tolist()) <= {0.5}


@both
def test_items_of_mappings_are_broken(decorate):
    @decorate
    def fn(xs: Mapping[str, Float[Tensor, "b d"]], y: Float[Tensor, "b d"]):
        return y

    call = first(calls(fn, sizes={"b": 2, "d": 3}), lambda call: len(call["xs"]) > 1)
    found = violations(call)
    for broken in found:
        with pytest.raises(TypeError, match=rf"\b{broken.argument}\b|\by\b"):
            broken()
    kinds = {one.kind for one in found if one.argument == "xs"}
    assert kinds == {"rank", "axis", "dtype", "array", "none"}


def test_axes_in_items_are_computed_from_arguments():
    @tw.contract
    def fn(
        xs: list[Float[Tensor, "{k} n"]],
        k: int,
        pair: tuple[Float[Tensor, "{k}+1"] | None, int] | None,
    ):
        return {len(x) for x in xs}, k, pair

    def check(call):
        lengths, k, pair = call()
        assert lengths == {k}
        assert pair is None or pair[0] is None or len(pair[0]) == k + 1
        assert call.axes()["xs.0"] == (None, "n")
        assert [one.violation for one in violations(call) if one.argument == "k"] == ["None"]
        return pair is not None and pair[0] is not None

    assert set(every(calls(fn), check, 30)) == {True, False}


def test_what_an_axis_is_computed_from_is_never_none():
    def fn(
        x: Float[Tensor, "{k}+1 {len(ys)}"],
        ys: list[Float[Tensor, " n"]] | None = None,
        k: int | None = None,
        other: int | None = None,
        z: Float[Tensor, "{len(zs)}"] | None = None,
        zs: dict[str, float] | None = None,
    ):
        assert z is None or len(z) == len(zs)
        return k, ys, other

    seen = every(calls(fn), lambda call: call(), 30)
    assert all(k is not None and ys is not None for k, ys, _ in seen)
    assert {other is None for _, _, other in seen} == {True, False}


def test_axes_computed_from_what_is_not_known_yet_are_named():
    def number(x: Float[Tensor, "{k} n"], k: int):
        return x

    with pytest.raises(TypeError, match="calls: number has an axis computed from k, .* circular"):
        first(calls(number, overrides={"k": lambda sizes: 3}))

    def shape(x: Float[Tensor, "{z.shape[0]} n"], z: Float[Tensor, " m"]):
        return len(x)

    with pytest.raises(TypeError, match="calls: shape has an axis computed from z, .* not known"):
        first(calls(shape))
    assert first(calls(shape, overrides={"z": torch.zeros(4)}))() == 4


def test_optional_union_and_literal():
    @tw.contract
    def fn(
        x: Float[Tensor, " n"] | None,
        y: Float[Tensor, " n"] | Int[Tensor, "n n"] | float,
        how: Literal["sum", "mean", 3] = "mean",
    ):
        return type(x), (y.ndim if isinstance(y, Tensor) else y), how

    kinds, others, how = zip(*every(calls(fn), lambda call: call(), 50), strict=True)
    assert set(kinds) == {Tensor, type(None)}
    assert {1, 2, 0.5} <= set(others)
    assert set(how) == {"sum", "mean", 3}


def test_every_kind_of_argument():
    drawn = every(calls(of_kinds), dict)
    assert {call["flag"] for call in drawn} == {True, False}
    assert {call["how"] for call in drawn} == {"sum", "mean"}
    assert all(call["weight"] > 0 and call["count"] > 0 for call in drawn)
    assert {call["half"].dtype for call in drawn} == {torch.float32, torch.float64}
    assert {call["whole"].dtype for call in drawn} == {torch.int64}
    assert {call["small"].dtype for call in drawn} == {torch.uint8}
    assert {call["wide"].dtype for call in drawn} == {torch.complex64, torch.complex128}
    assert all(call["any_of_them"].dtype == call["half"].dtype for call in drawn)
    assert all(isinstance(call["pairs"], list) and call["pairs"] for call in drawn)
    assert {call["group"] for call in drawn} == {None}
    assert len({call["generator"].initial_seed() for call in drawn}) > 5


def test_defaults_stay_where_nothing_can_be_derived():
    def fn(x: Float[Tensor, " n"], text: str = "t", hook: Callable[..., Any] = len, other=3):
        return text, hook, other

    assert set(every(calls(fn), lambda call: call())) == {("t", len, 3)}


def test_records_share_axis_names():
    def check(call):
        r, x = call()
        assert x.shape == (r.values.shape[0], r.inner.offsets.shape[0])
        assert r.indices.shape == r.values.shape
        assert (r.name, type(r.inner.scale)) == ("plain", float)
        assert call.axes()["r.inner.offsets"] == ("width",)
        assert call.tensors()["r.values"] is r.values
        return r.values.dtype, r.indices.dtype

    assert set(every(calls(of_record), check)) == {
        (torch.float32, torch.int64),
        (torch.float64, torch.int64),
    }
    given = {"r.inner.scale": 9.0, "r.indices": lambda sizes: torch.arange(2).repeat(3, 1)}
    strategy = calls(of_record, sizes={"batch": 3, "k": 2}, overrides=given)
    for call in every(strategy, lambda call: call, 3):
        assert call["r"].inner.scale == 9.0
        assert call["r"].indices.tolist() == [[0, 1]] * 3


def test_a_given_record_or_sequence_sets_the_sizes():
    strategy = calls(of_record, overrides={"r.values": torch.zeros(3, 2)}, dtypes=[torch.float32])
    drawn = every(strategy, lambda call: call(), 5)
    assert {(tuple(r.indices.shape), len(x)) for r, x in drawn} == {((3, 2), 3)}
    record = Sparse(torch.zeros(3, 2), torch.zeros(3, 2).long(), Inner(torch.zeros(5)))
    strategy = calls(of_record, overrides={"r": record}, dtypes=[torch.float32])
    assert {tuple(x.shape) for _, x in every(strategy, lambda call: call(), 5)} == {(3, 5)}

    @tw.contract
    def fn(many: Sequence[Float[Tensor, " n"]], x: Float[Tensor, " n"]):
        return len(x)

    strategy = calls(fn, overrides={"many": [torch.zeros(6)]}, dtypes=[torch.float32])
    assert set(every(strategy, lambda call: call(), 5)) == {6}


def test_sizes_are_numbers_strategies_or_tuples():
    @tw.contract
    def fn(x: Float[Tensor, "*batch dim width"]):
        return tuple(x.shape)

    sizes = {"batch": st.sampled_from([(), (2, 6)]), "dim": 5, "width": st.integers(1, 2)}
    shapes = set(every(calls(fn, sizes=sizes), lambda call: call(), 30))
    assert shapes == {(5, 1), (5, 2), (2, 6, 5, 1), (2, 6, 5, 2)}
    assert set(every(calls(fn, sizes={**sizes, "batch": (2,)}), lambda c: c()[0], 3)) == {2}


def test_large_tensors():
    @tw.contract
    def fn(x: Float[Tensor, "n d"], y: Float[Tensor, "n d"], i: Int[Tensor, " d"]):
        return x, y, i

    for x, y, i in every(calls(fn, sizes={"n": 100, "d": 500}), lambda call: call(), 3):
        assert x.shape == y.shape == (100, 500)
        assert not torch.equal(x, y)
        assert x.unique().tolist() == [n / 32 for n in range(-96, 97)]
        assert i.unique().tolist() == [0, 1, 2, 3]


def test_dtypes():
    @tw.contract
    def fn(x: Float[Tensor, " n"], y: Float64[Tensor, " n"], i: Int[Tensor, " n"]):
        return x.dtype, y.dtype, i.dtype

    dtypes = [torch.bfloat16, torch.float16, torch.int8]
    assert set(every(calls(fn, dtypes=dtypes), lambda call: call())) == {
        (torch.bfloat16, torch.float64, torch.int8),
        (torch.float16, torch.float64, torch.int8),
    }


def test_elements():
    @tw.contract
    def fn(x: Float[Tensor, " n"], many: list[Float[Tensor, " n"]], tokens: Int[Tensor, "n vocab"]):
        return x.tolist(), [one.tolist() for one in many], tokens.max() < tokens.shape[1]

    for x, many, _ in every(calls(fn, elements=st.just(0.25)), lambda call: call(), 5):
        assert {0.25} == set(x) == set(many[0])
    by_name = {
        "x": st.just(5.0),
        "many": st.just(6.0),
        "tokens": lambda sizes: st.integers(0, sizes["vocab"] - 1),
    }
    drawn = every(calls(fn, elements=by_name, sizes={"vocab": 2}), lambda call: call())
    assert all({5.0} == set(x) and {6.0} == set(many[-1]) for x, many, _ in drawn)
    assert all(few for *_, few in drawn)
    usual = every(calls(fn, sizes={"vocab": 2}), lambda call: call())
    assert not all(few for *_, few in usual)
    assert all((32 * number).is_integer() and abs(number) <= 3 for x, *_ in usual for number in x)


def test_overrides():
    def energy(x):
        return x.sum()

    @tw.contract
    def fn(energy: Callable[..., Any], x: Float[Tensor, "n d"], a: float, b: int, c: float = 1.0):
        return energy, a, b, c, x.shape[0]

    given = {
        "energy": energy,
        "a": 8.0,
        "b": lambda sizes: st.just(10 * sizes["n"]),
        "c": st.sampled_from([3.0, 4.0]),
    }
    drawn = every(calls(fn, overrides=given), lambda call: call())
    assert {(e, a) for e, a, *_ in drawn} == {(energy, 8.0)}
    assert all(b == 10 * n for *_, b, _, n in drawn)
    assert {c for *_, c, _ in drawn} == {3.0, 4.0}
    narrowed = {**given, "x": Float[Tensor, "n {b}"]}
    for call in every(calls(fn, overrides={**narrowed, "b": 5}), lambda call: call, 5):
        assert call["x"].shape[1] == 5
        assert call.axes()["x"] == ("n", None)


def test_methods_modules_and_partials():
    assert every(calls(Weighing().of), lambda call: call().ndim, 3) == [1] * 3
    assert every(calls(Metric()), lambda call: list(call) == ["x", "y"] and call().ndim, 3) == [
        0,
        0,
        0,
    ]
    for call in every(calls(functools.partial(with_k, k=2)), lambda call: call, 5):
        x, y = call()
        assert x.shape == (3, len(y))
        assert list(call) == ["x", "y"]


@pytest.mark.parametrize("by_position", [True, False])
@pytest.mark.parametrize("module", [True, False])
def test_what_a_partial_holds_sets_the_sizes(by_position, module):
    fn, x = Metric() if module else distance, torch.ones(3, 2)
    held = functools.partial(fn, x) if by_position else functools.partial(fn, x=x)
    for call in every(calls(held), lambda call: call, 5):
        assert "x" not in call
        assert (call.sizes, call["y"].shape) == ({"batch": 3, "dim": 2}, (3, 2))
        assert call().ndim == 0
        seen = {one.violation for one in violations(call)}
        assert {"axis 0 is 1, not 3", "axis 0 is 4, not 3"} <= seen


def test_axes_computed_from_what_a_partial_holds():
    @tw.contract
    def fn(k: int, x: Float[Tensor, "{k} n"], y: Float[Tensor, " n"], *, z: Float[Tensor, " n"]):
        return len(x), len(y)

    inner = functools.partial(fn, 3)
    inner.note = "keeps the next from being merged with it"
    held = functools.partial(inner, z=torch.zeros(5))
    assert held.func is inner
    drawn = every(calls(held), lambda call: (list(call), call()), 5)
    assert drawn == [(["x", "y"], (3, 5))] * 5
    held = functools.partial(inner, torch.zeros(3, 6))
    drawn = every(calls(held), lambda call: (list(call), call()), 5)
    assert drawn == [(["y", "z"], (3, 6))] * 5


def test_a_call_is_keyword_arguments():
    for call in every(calls(distance), lambda call: call, 3):
        assert torch.equal(distance(**call), call())
        assert call.changed(weight=2.0)["weight"] == 2.0
        doubled = call.mapped(lambda path, t: 2 * t)
        assert torch.equal(doubled["x"], 2 * call["x"])
        assert doubled.sizes == call.sizes == dict(zip(("batch", "dim"), call["x"].shape))  # noqa: B905


# What is drawn together.


@tw.contract
def of_entries(
    values: Float[Tensor, "batch k"],
    indices: Int[Tensor, "batch k"],
    x: Float[Tensor, "batch d"],
    weight: float = 1.0,
):
    return values, indices, x


def test_arguments_of_a_tuple_of_names_are_given_together():
    def top(sizes):
        numbers = st.permutations(range(sizes["batch"] * sizes["d"]))
        shape = sizes["batch"], sizes["d"]
        found = numbers.map(lambda drawn: torch.tensor(drawn).double().reshape(shape))
        return found.map(lambda x: (x.topk(1).values, x.topk(1).values.long()))

    def check(call):
        values, indices, x = call()
        assert len(x) == len(values)
        assert call.axes()["values"] == ("batch", "k")
        return torch.equal(values.long(), indices)

    together = {("values", "indices"): top}
    assert all(every(calls(of_entries, overrides=together, sizes={"k": 1}), check))
    pair = st.just((torch.ones(2, 3), torch.zeros(2, 3).long()))
    strategy = calls(of_entries, overrides={("values", "indices"): pair, "weight": 3.0})
    for call in every(strategy, lambda call: call, 5):
        assert (call.sizes["batch"], call.sizes["k"], call["weight"]) == (2, 3, 3.0)
        assert call["values"].tolist() == [[1.0] * 3] * 2
    record = {("r.values", "r.indices"): pair, ("of", "others"): (1, 2)}
    for call in every(calls(of_record, overrides=record, dtypes=[torch.float32]), lambda c: c, 3):
        assert call["r"].values.sum() == 6
        assert call["r"].indices.count_nonzero() == 0
    with pytest.raises(TypeError, match=r"overrides of \(values, indices\) need 2 values, got 1"):
        first(calls(of_entries, overrides={("values", "indices"): (1,)}))


def test_what_is_given_stands_first_and_sets_the_sizes():
    def of_dicts(a: dict[str, Float[Tensor, " n"]], b: dict[str, Float[Tensor, " n"]], k: int = 1):
        return a, b

    keys = st.lists(st.sampled_from("xyz"), min_size=1, unique=True)
    alike = keys.map(lambda names: dict.fromkeys(names, torch.ones(2)))
    both = st.builds(lambda one: {"a": one, "b": {**one}, "unknown": 1}, alike)
    for call in every(calls(of_dicts, given=both, dtypes=[torch.bfloat16]), lambda call: call):
        assert call["a"].keys() == call["b"].keys()
        assert {x.dtype for x in (*call["a"].values(), *call["b"].values())} == {torch.bfloat16}
        assert (call.sizes, set(call)) == ({"n": 2}, {"a", "b", "k"})
        assert call.axes()[f"a.{next(iter(call['a']))}"] == ("n",)

    # Calls are given as they are, but for the dtype.
    wide = calls(distance).filter(lambda call: call["x"].shape[1] > 1)
    strategy = calls(distance, given=wide, dtypes=[torch.float64], overrides={"weight": 7.0})
    for call in every(strategy, lambda call: call, 5):
        assert call["x"].shape[1] == call.sizes["dim"] > 1
        assert call["x"].dtype == call["y"].dtype == torch.float64
    assert first(calls(distance, given=st.just({"x": torch.ones(3, 2)})))["y"].shape == (3, 2)

    def only(x: Float64[Tensor, " n"]):
        return x

    held = st.just({"x": torch.ones(2, dtype=torch.float64)})
    assert first(calls(only, given=held, dtypes=[torch.float32]))().dtype == torch.float64


def test_a_function_of_the_sizes_gives_all_arguments():
    def unannotated(x, y, power=2):
        return x.sum() + y.sum()

    def made(sizes):
        x = torch.ones(sizes["rows"], sizes["columns"])
        return st.integers(0, 3).map(lambda number: {"x": x, "y": x * number})

    strategy = calls(unannotated, given=made, sizes={"rows": st.integers(2, 3), "columns": 2})
    drawn = every(strategy, lambda call: (call.sizes, tuple(call["x"].shape), list(call)))
    assert {shape for _, shape, _ in drawn} == {(2, 2), (3, 2)}
    assert all(sizes == {"rows": n, "columns": m} for sizes, (n, m), _ in drawn)
    assert {tuple(names) for *_, names in drawn} == {("x", "y")}

    def with_axes(x: Float[Tensor, "{k}+1 n"], k: int):
        return x.shape

    wide = calls(with_axes, given=lambda sizes: {"k": 2, "x": torch.ones(3, sizes["n"])})
    assert {shape[0] for shape in every(wide, lambda call: call(), 5)} == {3}
    named = calls(distance, given=lambda sizes: dict.fromkeys("xy", torch.zeros(*sizes.values())))
    assert all(every(named, lambda call: call["x"].shape[0] == call.sizes["batch"]))


# How it lies in memory.


def test_strides_are_those_of_users_tensors():
    def fn(
        x: Float[Tensor, " n"],
        y: Float[Tensor, "2 n"],
        z: Int[Tensor, "2 3 2 2"],
        s: Float[Tensor, ""],
    ):
        return x, y, z, s

    def layouts(call):
        x, y, z, s = call()
        assert s.stride() == ()
        assert same(pasted(call), call())
        assert [t.stride() for t in pasted(call)] == [t.stride() for t in call()]
        for path, tensor in call.tensors().items():
            copied = same_tensor(path, tensor)
            assert copied.stride() == tensor.stride()
            assert torch.equal(copied, tensor)
            assert copied.data_ptr() != tensor.data_ptr()
        return x.stride(), y.stride(), z.stride()

    drawn = every(calls(fn, sizes={"n": 3}), layouts, 60)
    of_x, of_y, of_z = (set(found) for found in zip(*drawn, strict=True))
    assert of_x == {(1,), (2,)}
    assert of_y == {(3, 1), (1, 2), (6, 1)}
    assert of_z == {(12, 4, 2, 1), (12, 4, 1, 2), (24, 8, 4, 1), (12, 1, 6, 3)}
    repeated = Call(echo, {"x": torch.tensor([[1.0], [2.0]]).expand(2, 3)}, {})
    assert repr(repeated) == "echo(\n    x=torch.tensor([[1.0], [2.0]]).expand(2, 3),\n)"
    copied = same_tensor("x", repeated["x"])
    assert copied.stride() == (1, 0)
    assert copied.data_ptr() != repeated["x"].data_ptr()


class Point(NamedTuple):
    place: Tensor
    weight: float


def test_a_named_tuple_keeps_its_type():
    @tw.contract
    def fn(p: Point, x: Float[Tensor, " n"]):
        return p

    for call in every(calls(fn, overrides={"p": Point(torch.ones(2), 0.5)}), lambda c: c, 3):
        doubled = call.mapped(lambda path, t: 2 * t)
        assert same(doubled(), Point(torch.full((2,), 2.0), 0.5))
        assert "p=Point(place=torch.tensor([1.0, 1.0]), weight=0.5),\n" in repr(call)
    call = Call(echo, {"p": Point(torch.ones(2), 0.5)}, {})
    assert same(pasted(call), call())


Item = TypeVar("Item")


@dataclasses.dataclass
class Pair(Generic[Item]):
    first: Item
    second: Item


class Weighted(NamedTuple, Generic[Item]):
    item: Item
    weight: float


class Named(TypedDict, Generic[Item]):
    item: Item
    ids: Int[Tensor, " n"]


def of_generics(
    pairs: list[Pair[Float[Tensor, " n"]]],
    weighted: Weighted[Float[Tensor, "n d"]],
    named: Named[Float[Tensor, "d d"]],
) -> Pair[Float[Tensor, " n"]]:
    rows = sum(pair.first * pair.second for pair in pairs) + named["item"].sum()
    return Pair(rows, weighted.item.sum(1) * weighted.weight)


def test_generic_records_are_drawn_broken_and_held():
    fn = tw.contract(of_generics)

    def check(call):
        found = call()
        assert found.first.shape == call["named"]["ids"].shape
        assert call["weighted"].item.shape[1] == len(call["named"]["item"])
        assert call.axes()["weighted.item"] == ("n", "d")
        broken = violations(call)
        for one in broken:
            with pytest.raises(tw.ContractError, match=one.argument):
                one()
        return {(one.argument, one.violation.rpartition(": ")[0], one.kind) for one in broken}

    seen = set().union(*every(calls(fn), check, 5))
    assert {(argument, part) for argument, part, _ in seen} == {
        *(
            ("pairs", part)
            for part in ("", "every item", "every item: first", "every item: second")
        ),
        *(("weighted", part) for part in ("", "item", "weight")),
        *(("named", part) for part in ("", "item", "ids")),
    }
    assert {kind for _, _, kind in seen} == {"rank", "axis", "dtype", "array", "none"}
    testing.assert_pure(fn)
    testing.assert_gradients(fn)
    testing.assert_permutation_invariant(fn, "n")


# What cannot be drawn.


@pytest.mark.parametrize(
    ("annotation", "says"),
    [
        (
            Callable[[int], int],
            "fn needs a, and its annotation Callable does not determine what to draw",
        ),
        (
            str,
            "its annotation str does not determine what to draw: pass it in overrides",
        ),
        (dict[int, float], "its annotation dict"),
    ],
)
def test_what_cannot_be_derived_is_named(annotation, says):
    def fn(a, x: Float[Tensor, " n"]):
        return x

    with pytest.raises(TypeError, match="calls: fn needs a, and it has no annotation"):
        first(calls(fn))
    fn.__annotations__["a"] = annotation
    with pytest.raises(TypeError) as error:
        first(calls(fn))
    assert says in str(error.value)
    assert first(calls(fn, overrides={"a": "given"}))["a"] == "given"


def test_parameters_that_no_annotation_limits():
    def several(*xs: Float[Tensor, " n"]):
        return xs

    def by_position(x: Float[Tensor, " n"], /):
        return x

    with pytest.raises(
        TypeError, match=r"several takes \*xs, whose number of arguments no annotation limits"
    ):
        first(calls(several))
    with pytest.raises(TypeError, match="by_position takes x by position only"):
        first(calls(by_position))
    with pytest.raises(TypeError, match="Metric is a class: pass a function or an instance"):
        first(calls(Metric))


# What is printed.


def test_shrinks_to_a_small_readable_call():
    smallest = find(calls(distance), lambda call: float((call["x"] - call["y"]).sum()) > 1)
    assert repr(smallest) == (
        "distance(\n    x=torch.tensor([[2.0]]),\n    y=torch.tensor([[0.0]]),\n)"
    )
    wide = find(calls(distance), lambda call: call["x"].shape[1] == 2 and call["weight"] != 1)
    assert repr(wide) == (
        "distance(\n    x=torch.tensor([[0.0, 0.0]]),\n    y=torch.tensor([[0.0, 0.0]]),\n"
        "    weight=0.5,\n)"
    )


def test_code_is_the_call_with_its_imports():
    call = find(calls(tw.joint_embedding.vicreg_loss), lambda call: call["eps"] == 0.25)
    assert call.code() == (
        "from termwise.joint_embedding import vicreg_loss\nimport torch\n\n"
        "vicreg_loss(\n    z1=torch.tensor([[0.0]]),\n    z2=torch.tensor([[0.0]]),\n"
        "    eps=0.25,\n)"
    )


@pytest.mark.parametrize("fn", [distance, of_record, of_kinds, Metric(3.0), Weighing().of])
def test_code_pastes_back(fn):
    name = getattr(fn, "__name__", "Metric")

    def check(call):
        code = call.code()
        assert f"from {__name__} import " in code, name
        assert same(pasted(call), call()), code

    dtypes = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
    floats = st.sampled_from([0.0, -0.0, 0.1, 1 / 3, -1e-3, 6e4, float("nan"), float("-inf")])
    every(calls(fn, dtypes=dtypes, elements=floats, sizes={"n": st.integers(0, 3)}), check, 30)


def test_partials_paste_back():
    for call in every(calls(functools.partial(with_k, k=2)), lambda call: call, 5):
        assert "functools.partial(with_k, k=2)(" in repr(call)
        assert same(pasted(call), call())


class Unsaid(nn.Module):  # prints as Unsaid(), whatever its power
    def __init__(self, power: float = 2.0):
        super().__init__()
        self.power = power

    def forward(self, x: Float[Tensor, " n"]) -> Tensor:
        return x.pow(self.power).sum()


class Plain(nn.Module):
    def forward(self, x: Float[Tensor, " n"]) -> Tensor:
        return x.sum()


class Learned(Plain):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.rand(()))


class Outer(Plain):
    def __init__(self):
        super().__init__()
        self.inner = Unsaid(3.0)


class Opaque:
    def __call__(self, x: Float[Tensor, " n"]) -> Tensor:
        return x

    def of(self, x: Float[Tensor, " n"]) -> Tensor:
        return x


@pytest.mark.parametrize(
    ("value", "what"),
    [
        (Unsaid(5.0), "Unsaid"),
        (Learned(), "Learned"),
        (Outer(), "Outer"),
        (nn.CosineSimilarity(0), "CosineSimilarity"),
        (nn.Linear(1, 1), "Linear"),
        (lambda x: x, "lambda"),
        (Opaque(), "Opaque"),
        (Opaque().of, "Opaque.of"),
    ],
)
def test_what_has_no_code_is_a_name_that_a_comment_explains(value, what):
    def echo(x):
        return x

    told = Call(echo, {"x": value}, {}).code()
    assert told == f"# x: the {what} that was passed\n\necho(\n    x=x,\n)"
    told = Call(echo, {"x": [1, functools.partial(value, 2)]}, {}).code()
    assert told.startswith(f"# x_1: the {what} that was passed\nimport functools\n\n")
    assert "x=[1, functools.partial(x_1, 2)],\n" in told


def test_a_tested_function_without_code_is_fn():
    for fn in (Unsaid(5.0), Opaque().of):
        call = first(calls(fn, sizes={"n": 2}))
        assert "that was tested\nimport torch\n\nfn(\n    x=torch.tensor(" in call.code()
        assert same(pasted(call), call())
    assert repr(first(calls(Plain()))).startswith("Plain()(\n")


def test_numbers_are_short_and_exact():
    values = torch.tensor([0.1, 1 / 3, -0.0, 1e-8, 3e38, float("nan"), float("inf")])
    call = Call(echo, {"x": values, "y": values.double()[:2], "z": values.bfloat16()[:2]}, {})
    text = repr(call)
    assert 'x=torch.tensor([0.1, 0.33333334, -0.0, 1e-08, 3e+38, float("nan"), float(' in text
    assert "y=torch.tensor([0.10000000149011612, 0.3333333432674408], dtype=torch.float64)" in text
    assert "z=torch.tensor([0.1, 0.334], dtype=torch.bfloat16)" in text
    assert same(pasted(call), call())


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (torch.zeros(0, 3), "torch.zeros([0, 3], dtype=torch.float32)"),
        (torch.tensor(True), "torch.tensor(True)"),
        (
            torch.tensor([1 + 2j, 3]),
            "torch.tensor([complex(1.0, 2.0), 3.0], dtype=torch.complex64)",
        ),
        (torch.float16, "torch.float16"),
        (float("-inf"), 'float("-inf")'),
        ('say "no"', "'say \"no\"'"),
        ("sum", '"sum"'),
        ({"a": [torch.tensor([1, 2])]}, '{"a": [torch.tensor([1, 2])]}'),
        ((1,), "(1,)"),
        (Phase.shrink, "Phase.shrink"),
        (distance, "distance"),
        (torch.sin, "sin"),
        (None, "None"),
    ],
)
def test_values_as_code(value, text):
    call = Call(echo, {"a": value}, {})
    assert repr(call) == f"echo(\n    a={text},\n)"
    assert same(pasted(call), call())


def test_sparse_values_and_arrays_as_code():
    dense = torch.tensor([[0.0, 2.0], [0.0, 0.0]])
    call = Call(echo, {"a": dense.to_sparse_csr(), "b": dense.numpy()}, {})
    again = pasted(call)
    assert again["a"].layout == torch.sparse_csr
    assert torch.equal(again["a"].to_dense(), dense)
    assert again["b"].tolist() == dense.tolist()
    assert type(again["b"]) is type(call["b"])


# What is broken.


@tw.contract
def broken_everywhere(
    x: Float[Tensor, "batch dim"],
    y: Float[Tensor, "batch dim"],
    tokens: Int[Tensor, " batch"],
    *,
    how: Literal["sum", "mean"] = "sum",
    weight: float = 1.0,
    mask: Bool[Tensor, " batch"] | None = None,
    generator: torch.Generator | None = None,
):
    return x


def test_broken_calls_are_of_every_kind_and_refused_by_name():
    def check(broken):
        assert isinstance(broken, BrokenCall)
        with pytest.raises(tw.ContractError, match=rf"\b{broken.argument}\b"):
            broken()
        value = broken[broken.argument]
        shape = list(getattr(value, "shape", ()))
        if broken.kind == "axis":
            axis, size = int(broken.violation.split()[1]), int(broken.violation.split()[-1])
            assert broken.violation == f"axis {axis} is {shape[axis]}, not {size}"
            assert shape[axis] in {1, size + 1} - {size}
            assert size == broken.sizes[("batch", "dim")[axis]]
        if broken.kind == "rank":
            wanted = 2 if broken.argument in "xy" else 1
            more = {"one axis more": 1, "one axis fewer": -1}[broken.violation]
            assert len(shape) == wanted + more
        if broken.kind == "dtype":
            now = "int64" if broken.argument in "xy" else "float32"
            assert broken.violation.startswith(f"{now}{shape}, not ")
            assert value.dtype == getattr(torch, now)
        if broken.kind == "array":
            assert type(value).__module__ == "numpy"
        if broken.kind == "literal":
            assert value == "not sum" or value == "not mean"
        if broken.kind == "none":
            assert value is None
        return broken.argument, broken.kind, broken.violation

    sizes = {"batch": st.integers(1, 3), "dim": st.integers(1, 3)}
    kinds = {kind for _, kind, _ in every(broken_calls(broken_everywhere, sizes=sizes), check, 200)}
    assert kinds == {"rank", "axis", "dtype", "array", "none", "literal"}
    # Of each call every argument is broken in every way.
    sizes = {"batch": 2, "dim": 1}
    strategy = calls(broken_everywhere, sizes=sizes, dtypes=[torch.float32])
    call = first(strategy, lambda call: call["mask"] is not None)
    seen = [check(broken) for broken in violations(call)]
    tensors = {"rank", "axis", "dtype", "array", "none"}
    assert {(argument, kind) for argument, kind, _ in seen} == {
        *((name, kind) for name in ("x", "y", "tokens") for kind in tensors),
        *(("mask", kind) for kind in tensors - {"none"}),
        ("how", "literal"),
        ("how", "none"),
        ("weight", "none"),
    }
    assert [violation for argument, _, violation in seen if argument == "y"] == [
        "axis 0 is 1, not 2",
        "axis 0 is 3, not 2",
        "axis 1 is 2, not 1",
        "one axis more",
        "one axis fewer",
        "int64[2, 1], not float32[2, 1]",
        "a NumPy array",
        "None",
    ]


@both
def test_what_is_legal_is_not_drawn(decorate):
    @decorate
    def fn(
        alone: Float[Tensor, "n free"],
        x: Float[Tensor, "... d"],
        y: Float[Tensor, "#n d"],
        z: Float[Tensor, "_ d"] | None,
    ):
        return alone

    def check(broken):
        with pytest.raises(TypeError):
            broken()
        return broken.argument, broken.kind, broken.violation

    sizes = {"n": 2, "d": 3, "free": 4}
    call = first(
        calls(fn, sizes=sizes),
        lambda call: call["z"] is not None and call["y"].shape == (2, 3) and call["x"].ndim == 2,
    )
    seen = {check(broken) for broken in violations(call)}
    shapes = {(a, violation) for a, kind, violation in seen if kind in ("axis", "rank")}
    assert shapes == {
        ("alone", "axis 0 is 1, not 2"),
        ("alone", "axis 0 is 3, not 2"),
        ("alone", "one axis more"),
        ("alone", "one axis fewer"),
        ("x", "axis 1 is 1, not 3"),
        ("x", "axis 1 is 4, not 3"),
        ("y", "axis 0 is 3, not 2"),
        ("y", "axis 1 is 1, not 3"),
        ("y", "axis 1 is 4, not 3"),
        ("y", "one axis more"),
        ("y", "one axis fewer"),
        ("z", "axis 1 is 1, not 3"),
        ("z", "axis 1 is 4, not 3"),
        ("z", "one axis more"),
        ("z", "one axis fewer"),
    }
    assert {a for a, kind, _ in seen if kind == "none"} == {"alone", "x", "y"}


@both
def test_a_broken_number_that_an_axis_is_computed_from(decorate):
    @decorate
    def after(x: Float[Tensor, "{k}+1 n"], k: int = 2):
        return x

    @decorate
    def ahead(k: int, x: Float[Tensor, "{k}+1 n"]):
        return x

    for fn in (after, ahead):
        found = violations(first(calls(fn, sizes={"n": 1}), lambda call: call["k"] == 1))
        for broken in found:
            with pytest.raises(TypeError, match=r"\bk\b" if broken.argument == "k" else None):
                broken()
        assert [one.violation for one in found if one.argument == "k"] == ["None"]
        assert {one.kind for one in found} == {"rank", "axis", "dtype", "array", "none"}


@both
def test_items_of_sequences_are_broken(decorate):
    @decorate
    def fn(
        xs: list[Float[Tensor, "b d"]] | None,
        y: Float[Tensor, "b d"],
        pair: tuple[Int[Tensor, " b"], float],
        many: Sequence[Float[Tensor, " free"]],
        nested: tuple[tuple[Float[Tensor, ""], ...], ...],
    ):
        return y

    def check(broken):
        for _ in range(5):  # beartype looks at an item by chance
            with pytest.raises(TypeError, match=rf"\b{broken.argument}\b"):
                broken()
        return broken.argument, broken.violation

    strategy = calls(fn, sizes={"b": 2, "d": 1, "free": 2}, dtypes=[torch.float32])
    call = first(strategy).changed(xs=[torch.zeros(2, 1), torch.ones(2, 1)])
    seen = [check(broken) for broken in violations(call)]
    assert [violation for argument, violation in seen if argument == "xs"] == [
        "every item: axis 0 is 1, not 2",
        "every item: axis 0 is 3, not 2",
        "every item: axis 1 is 2, not 1",
        "every item: one axis more",
        "every item: one axis fewer",
        "every item: int64[2, 1], not float32[2, 1]",
        "every item: a NumPy array",
        "every item: None",
    ]
    assert [violation for argument, violation in seen if argument == "pair"] == [
        "item 0: axis 0 is 1, not 2",
        "item 0: axis 0 is 3, not 2",
        "item 0: one axis more",
        "item 0: one axis fewer",
        "item 0: float32[2], not int64[2]",
        "item 0: a NumPy array",
        "item 0: None",
        "item 1: None",
        "None",
    ]
    # An axis that nothing else has may have any size in all items.
    assert not [v for argument, v in seen if argument == "many" and "is" in v.split()]
    assert ("nested", "every item: every item: one axis more") in seen


def test_nothing_to_break():
    def anything(x: Any = 1):
        return x

    with pytest.raises(
        TypeError, match="broken_calls: anything has no argument that can violate its annotation"
    ):
        first(broken_calls(anything))

    def optional(x: Float[Tensor, " n"] | None = None):
        return x

    found = first(broken_calls(optional))
    assert found.argument == "x"
    assert found["x"] is not None


def test_broken_calls_shrink_and_print():
    broken = find(
        broken_calls(distance), lambda call: call.argument == "y" and call.kind == "array"
    )
    assert repr(broken) == (
        "distance(\n    x=torch.tensor([[0.0]]),\n    y=torch.tensor([[0.0]]).numpy(),\n)"
    )
    trap = find(broken_calls(distance), lambda call: call.violation == "axis 0 is 1, not 2")
    assert repr(trap) == (
        "distance(\n    x=torch.tensor([[0.0]]),\n    y=torch.tensor([[0.0], [0.0]]),\n)"
    )


def test_without_hypothesis_the_extra_is_named():
    code = "import sys; sys.modules['hypothesis'] = None; import termwise.testing"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    said = 'termwise.testing needs hypothesis: pip install "termwise[testing]"'
    assert done.stderr.rstrip().endswith(f"ModuleNotFoundError: {said}")


WITHOUT_NUMPY = """
import sys
from importlib.machinery import PathFinder

class WithoutNumPy(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name == "numpy" else super().find_spec(name, path, target)

sys.meta_path[sys.meta_path.index(PathFinder)] = WithoutNumPy
from termwise import joint_embedding, testing
testing.assert_contract(joint_embedding.vicreg_loss, sizes={"batch": 3}, max_examples=2)
"""


def test_without_numpy_the_laws_leave_out_its_arrays():
    # PyTorch does not require NumPy, and a tensor's .numpy() fails where it is not installed.
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_NUMPY], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
