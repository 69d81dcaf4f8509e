import asyncio
import builtins
import dataclasses
import fractions
import functools
import importlib
import inspect
import random
import re
import subprocess
import sys
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Annotated, Generic, Literal, NamedTuple, NotRequired, Self, TypedDict, TypeVar

import einops
import jaxtyping
import numpy
import pytest
import torch
import torch.distributed as dist
from beartype import beartype
from beartype.roar import BeartypeCallHintViolation
from jaxtyping import Bool, Float, Int, Shaped, jaxtyped
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore
from typing_extensions import TypeAliasType

import termwise as tw
from termwise import testing
from termwise._annotations import BEARTYPE
from termwise._contract import _Check


@tw.terms
class PairTerms(tw.Terms):
    distance: Float[Tensor, ""]
    mean: Float[Tensor, " dim"]


@tw.contract
def pair_loss(
    x: Float[Tensor, "batch dim"],
    y: Float[Tensor, "batch dim"],
    *,
    weight: float = 1.0,
    reduction: Literal["sum", "mean"] = "sum",
    mask: Bool[Tensor, " batch"] | None = None,
) -> PairTerms:
    """Pair distance."""
    distance = (x - y).square().sum()
    return PairTerms(loss=weight * distance, distance=distance, mean=x.mean(0))


x = torch.zeros(8, 4)

# (what is wrong, positional arguments, keyword arguments, the whole message)
WRONG = {
    "size": (
        (x, x[:1]),
        {},
        'pair_loss: y needs Float[Tensor, "batch dim"], got float32[1, 4]: '
        "axis batch is 1, but it is 8 in x",
    ),
    "rank": (
        (x[0], x),
        {},
        'pair_loss: x needs Float[Tensor, "batch dim"], got float32[4]: 1 axis, not 2',
    ),
    "rank three": (
        (x, x[None]),
        {},
        'pair_loss: y needs Float[Tensor, "batch dim"], got float32[1, 8, 4]: 3 axes, not 2; '
        'positions as samples: einops.rearrange(y, "b t d -> (b t) d"); '
        'as features: einops.rearrange(y, "b t d -> b (t d)")',
    ),
    "integers": (
        (x.long(), x),
        {},
        'pair_loss: x needs Float[Tensor, "batch dim"], got int64[8, 4]: '
        "int64 is not a dtype of Float",
    ),
    "complex": (
        (x, x.to(torch.complex64)),
        {},
        'pair_loss: y needs Float[Tensor, "batch dim"], got complex64[8, 4]: '
        "complex64 is not a dtype of Float",
    ),
    "a list": (([1.0], x), {}, 'pair_loss: x needs Float[Tensor, "batch dim"], got list'),
    "None": ((x, None), {}, 'pair_loss: y needs Float[Tensor, "batch dim"], got None'),
    "literal": (
        (x, x),
        {"reduction": "avg"},
        'pair_loss: reduction needs Literal["sum", "mean"], got str "avg"',
    ),
    "optional": (
        (x, x),
        {"mask": x[:3, 0] > 0},
        'pair_loss: mask needs Bool[Tensor, " batch"] | None, got bool[3]: '
        "axis batch is 3, but it is 8 in x",
    ),
    "optional dtype": (
        (x, x),
        {"mask": x[:, 0]},
        'pair_loss: mask needs Bool[Tensor, " batch"] | None, got float32[8]: '
        "float32 is not a dtype of Bool",
    ),
}


@pytest.mark.parametrize(("args", "kwargs", "message"), WRONG.values(), ids=WRONG.keys())
def test_a_wrong_argument_is_refused_in_one_sentence(args, kwargs, message):
    with pytest.raises(tw.ContractError) as caught:
        pair_loss(*args, **kwargs)
    assert str(caught.value) == message
    assert isinstance(caught.value, jaxtyping.TypeCheckError)
    assert isinstance(caught.value, TypeError)
    assert caught.value.__cause__ is None


@pytest.mark.parametrize(("args", "kwargs", "message"), WRONG.values(), ids=WRONG.keys())
def test_a_wrong_argument_is_refused_compiled_with_the_same_text(args, kwargs, message):
    compiled = torch.compile(pair_loss, fullgraph=True, backend="eager", dynamic=False)
    with pytest.raises(torch._dynamo.exc.Unsupported) as caught:
        compiled(*args, **kwargs)
    assert message in str(caught.value)


def test_without_fullgraph_a_compiled_call_raises_the_error_itself():
    compiled = torch.compile(pair_loss, backend="eager")
    with pytest.raises(tw.ContractError, match="axis batch is 1, but it is 8 in x"):
        compiled(x, x[:1])


def test_a_call_below_a_frame_that_dynamo_gave_up_is_no_false_alarm():
    def step(x):
        torch._dynamo.graph_break()
        with torch.no_grad(), pytest.MonkeyPatch.context():
            print("", end="")
            return pair_loss(x, x, reduction="mean").loss

    assert torch.compile(step, backend="eager")(x) == 0
    with pytest.raises(tw.ContractError, match="axis dim is 2, but it is 4 in x"):
        torch.compile(lambda x: step(x) + pair_loss(x, x[:, :2]).loss, backend="eager")(x)


def test_a_compiled_shape_that_changes_is_checked_anew():
    compiled = torch.compile(pair_loss, fullgraph=True, backend="eager")
    for n in (8, 5, 3, 2):
        assert compiled(torch.ones(n, 4), torch.zeros(n, 4)).loss == 4 * n
    with pytest.raises(torch._dynamo.exc.Unsupported, match="ContractError"):
        compiled(torch.ones(5, 4), torch.ones(1, 4))


def test_the_check_leaves_nothing_in_the_graph():
    graphs = []

    def keep(graph, _):
        graphs.append(graph)
        return graph.forward

    torch.compile(pair_loss, fullgraph=True, backend=keep)(x, x)
    targets = {node.target for node in graphs[0].graph.nodes if node.op == "call_function"}
    assert not any("assert" in str(target) for target in targets)


def test_export_refuses_a_wrong_shape():
    class Pair(torch.nn.Module):
        def forward(self, x, y):
            return pair_loss(x, y)

    torch.export.export(Pair(), (x, x))
    with pytest.raises(Exception, match="axis batch is 1, but it is 8 in x"):
        torch.export.export(Pair(), (x, x[:1]))


def test_other_arrays_and_types():
    with pytest.raises(tw.ContractError, match=r"y needs .*, got numpy.ndarray float32\[8, 4\]$"):
        pair_loss(x, x.numpy())
    with pytest.raises(tw.ContractError, match='^pair_loss: weight needs float, got str "1"$'):
        pair_loss(x, x, weight="1")
    pair_loss(x, x, weight=1)


def test_missing_and_unknown_arguments_are_pythons_own_errors():
    with pytest.raises(TypeError, match=r"pair_loss\(\) missing 1 required positional argument"):
        pair_loss(x)
    with pytest.raises(TypeError, match="unexpected keyword argument 'weigth'"):
        pair_loss(x, x, weigth=1.0)


def test_name_docstring_signature_are_kept():
    assert pair_loss.__name__ == "pair_loss"
    assert pair_loss.__doc__ == "Pair distance."
    assert pair_loss.__wrapped__.__annotations__["return"] is PairTerms


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"loss": x[0]},
            r'broken: the result\'s loss needs Float[Tensor, ""], got float32[4]: 1 axis, not 0',
        ),
        (
            {"mean": x[:, 0]},
            r"broken: the result's mean needs Float[Tensor, \" dim\"], got float32[8]: "
            "axis dim is 8, but it is 4 in x",
        ),
        ({"distance": x.sum().long()}, "int64 is not a dtype of Float"),
    ],
)
def test_fields_of_the_record_are_checked_in_the_axes_of_the_call(fields, message, compiled):
    @tw.contract
    def broken(x: Float[Tensor, "batch dim"]) -> PairTerms:
        parts = {"loss": x.sum(), "distance": x.sum(), "mean": x[0], **fields}
        return PairTerms(**parts)

    call = torch.compile(broken, fullgraph=True, backend="eager") if compiled else broken
    kind = torch._dynamo.exc.Unsupported if compiled else tw.ContractError
    with pytest.raises(kind) as caught:
        call(x)
    assert message.replace("\\", "") in str(caught.value).replace("\\", "")


def test_a_result_of_another_type_is_refused():
    @tw.contract
    def scalar(x: Float[Tensor, " n"]) -> PairTerms:
        return x.sum()

    with pytest.raises(
        tw.ContractError, match=r"scalar: the result needs PairTerms, got float32\[\]"
    ):
        scalar(x[0])

    @tw.contract
    def rows(x: Float[Tensor, "n m"]) -> Float[Tensor, " n"]:
        return x.sum(0)

    with pytest.raises(tw.ContractError, match="rows: the result needs .* axis n is 4, but it is"):
        rows(x)

    @tw.contract
    def both(x: Float[Tensor, "n m"]) -> tuple[Float[Tensor, " n"], Int[Tensor, ""]]:
        return x.sum(1), x.sum()

    with pytest.raises(tw.ContractError, match="both: the result's 1 needs .* not a dtype of Int"):
        both(x)


@pytest.mark.parametrize("compiled", [False, True])
def test_the_grammar_of_axes(compiled):
    @tw.contract
    def shapes(
        a: Shaped[Tensor, "*lead n"],
        b: Float[Tensor, "... n-1"],
        c: Float[Tensor, "_ 3 #n rows=2"],
        d: Float[Tensor, "*lead"] | Float[Tensor, ""],
    ) -> None:
        return None

    call = torch.compile(shapes, fullgraph=True, backend="eager", dynamic=False)
    call = call if compiled else shapes
    good = {
        "a": torch.zeros(2, 3, 5),
        "b": torch.zeros(7, 4),
        "c": torch.zeros(9, 3, 1, 2),
        "d": torch.zeros(2, 3),
    }
    call(**good)
    call(**{**good, "c": torch.zeros(9, 3, 5, 2), "d": torch.zeros(())})
    for name, shape, reason in [
        ("a", (), "0 axes, not at least 1"),
        ("b", (7, 5), "axis n-1 is 5, but it needs 4, as n is 5 in a"),
        ("c", (9, 4, 1, 2), "an axis is 4, not 3"),
        ("c", (9, 3, 2, 2), "axis n is 2, but it is 5 in a"),
        ("c", (9, 3, 1, 1), "an axis is 1, not 2"),
        ("d", (3, 2), ""),
    ]:
        with pytest.raises((tw.ContractError, torch._dynamo.exc.Unsupported)) as caught:
            call(**{**good, name: torch.zeros(shape)})
        assert f"{name} needs" in str(caught.value)
        assert reason in str(caught.value)


def test_axes_computed_from_arguments_hold_in_eager():
    @tw.contract
    def windows(x: Float[Tensor, "n {k}+1"], *, k: int = 2) -> Float[Tensor, " n"]:
        return x[:, 0]

    windows(torch.zeros(4, 3))
    windows(torch.zeros(4, 6), k=5)
    with pytest.raises(
        tw.ContractError,
        match=r"windows: x needs .*, got float32\[4, 3\]: axis 5\+1 is 3, but it needs 6",
    ):
        windows(torch.zeros(4, 3), k=5)


def test_a_wrong_number_that_an_axis_is_computed_from_is_named():
    @tw.contract
    def after(x: Float[Tensor, "{k}+1 n"], k: int = 2):
        return k

    @tw.contract
    def ahead(k: int, x: Float[Tensor, "{k}+1 n"]):
        return k

    @tw.contract
    def perhaps(x: Float[Tensor, "{k}+1 n"], k: int | None = None):
        return k

    three = torch.zeros(3, 2)
    for call in (lambda k: after(three, k=k), lambda k: ahead(k, three)):
        assert call(2) == 2
        for wrong, shown in ((None, "None"), ("a", 'str "a"'), (2.5, "float 2.5")):
            with pytest.raises(tw.ContractError, match=f"k needs int, got {shown}$"):
                call(wrong)

    @tw.contract
    def many(y: Float[Tensor, " {len(xs)}"], xs: list[Float[Tensor, " n"]]):
        return y

    many(three[0], [three[0], three[0]])
    with pytest.raises(tw.ContractError, match=r"many: xs needs list\[.*, got None$"):
        many(three[0], None)
    # Here None is legal, and there is no size for it.
    with pytest.raises(tw.ContractError, match=r"perhaps: x needs .*\{k\}\+1 n.*'NoneType'"):
        perhaps(three)


def test_items_of_sequences_share_the_axes():
    @tw.contract
    def fn(
        xs: list[Float[Tensor, "b d"]] | None,
        y: Float[Tensor, "b d"],
        zs: tuple[Int[Tensor, " b"], str] | None = None,
        by_name: dict[str, Float[Tensor, " b"]] | None = None,
    ):
        return y

    one, two = torch.zeros(1, 1), torch.zeros(2, 1)
    need = r'needs Float\[Tensor, "b d"\], got '
    fn([two, two], two)
    for _ in range(10):  # beartype looks at one item of a list, by chance
        with pytest.raises(tw.ContractError) as caught:
            fn(xs=[one], y=two)
        assert str(caught.value) == (
            'fn: y needs Float[Tensor, "b d"], got float32[2, 1]: axis b is 2, but it is 1 in xs[0]'
        )
        with pytest.raises(tw.ContractError, match=rf"^fn: xs\[1\] {need}.* it is 2 in xs\[0\]"):
            fn([two, one, two, two[None]], torch.zeros(3, 1))
        with pytest.raises(tw.ContractError, match=rf"^fn: xs\[0\] {need}float32\[2\]: 1 axis"):
            fn([two[:, 0]], two)
    with pytest.raises(tw.ContractError, match=r"^fn: zs\[0\] needs Int.* it is 2 in xs\[0\]"):
        fn([two], two, (torch.zeros(3).long(), "s"))
    with pytest.raises(tw.ContractError, match=r"^fn: zs\[1\] needs str, got int 3"):
        fn([two], two, (torch.zeros(2).long(), 3))
    with pytest.raises(tw.ContractError, match=r"^fn: zs needs .*, got tuple$"):
        fn([two], two, (torch.zeros(2).long(),))
    with pytest.raises(tw.ContractError, match=r"^fn: by_name\['c'\] needs .* is 2 in xs\[0\]"):
        fn([two], two, None, {"a": torch.zeros(2), "b": torch.zeros(2), "c": torch.zeros(3)})
    with pytest.raises(tw.ContractError, match=r"^fn: a key of by_name needs str, got int 3"):
        fn([two], two, None, {3: torch.zeros(2)})


@tw.contract
def listed(zs: Sequence[Float[Tensor, "batch dim"]]) -> Float[Tensor, ""]:
    return torch.stack([z.square().sum() for z in zs]).sum()


@tw.contract
def mapped(
    zs: Mapping[str, Float[Tensor, "batch dim"]] | None = None,
) -> dict[str, Float[Tensor, ""]]:
    return {name: z.square().sum() for name, z in (zs or {}).items()}


@tw.contract
def nested(zs: tuple[list[Float[Tensor, "batch dim"]], ...]) -> list[Float[Tensor, " dim"]]:
    return [z.sum(0) for part in zs for z in part]


@tw.contract
def by_position(*zs: Float[Tensor, "batch dim"], weight: float = 1.0) -> Float[Tensor, ""]:
    return weight * torch.stack([z.square().sum() for z in zs]).sum()


@tw.contract
def by_name(x: Float[Tensor, " batch"], /, **zs: Float[Tensor, "batch dim"]) -> Float[Tensor, ""]:
    return x.sum() + torch.stack([z.square().sum() for z in zs.values()]).sum()


@pytest.mark.parametrize(
    ("fn", "call", "last"),
    [
        (listed, lambda fn, *zs: fn(zs), "zs[3]"),
        (mapped, lambda fn, *zs: fn(dict(zip("abcd", zs, strict=True))), "zs['d']"),
        (nested, lambda fn, *zs: fn((list(zs[:1]), list(zs[1:]))), "zs[1][2]"),
        (by_position, lambda fn, *zs: fn(*zs, weight=2.0), "zs[3]"),
        (by_name, lambda fn, *zs: fn(zs[0][:, 0], **dict(zip("abcx", zs, strict=True))), "x"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_each_of_several_values_is_looked_at(fn, call, last):
    z, wrong = torch.zeros(8, 4), torch.zeros(1, 4)  # sizes that broadcast
    compiled = torch.compile(fn, backend="eager", fullgraph=True)
    call(fn, z, z, z, z)
    call(compiled, z, z, z, z)
    text = f'{fn.__name__}: {last} needs Float[Tensor, "batch dim"], got float32[1, 4]: axis batch'
    for _ in range(10):  # beartype looks at one of many, by chance
        with pytest.raises(tw.ContractError, match=f"^{re.escape(text)} is 1, but it is 8 in "):
            call(fn, z, z, z, wrong)
    with pytest.raises(torch._dynamo.exc.Unsupported) as caught:
        call(compiled, z, z, z, wrong)
    assert text in str(caught.value).replace("\\'", "'")


def test_the_body_does_not_run_where_an_item_is_wrong():
    ran = []

    @tw.contract
    def fn(zs: list[Float[Tensor, "batch dim"]]):
        ran.append(zs)

    z, wrong = torch.zeros(8, 4), torch.zeros(1, 4)
    for _ in range(10):  # beartype looks at one of many, by chance
        with pytest.raises(tw.ContractError, match=r"zs\[2\] needs"):
            fn([z, z, wrong, z])
    assert ran == []


def test_what_another_option_allows_is_no_wrong_item():
    @tw.contract
    def fn(
        xs: list[Float[Tensor, " n"]] | list[int] | Literal["none"],
        y: Float[Tensor, " n"] | Sequence[Int[Tensor, " n"]] | None = None,
    ) -> Float[Tensor, ""]:
        return torch.zeros(())

    z = torch.zeros(3)
    for call in (fn, torch.compile(fn, backend="eager", fullgraph=True)):
        for xs in ([z, z], [1, 2], [], "none"):
            call(xs, z)
            call(xs, (z.long(), z.long()))
    with pytest.raises(tw.ContractError, match=r"^fn: xs needs list.*, got str \"some\""):
        fn("some")
    with pytest.raises(
        tw.ContractError, match=r"^fn: y\[1\] needs Int.*: axis n is 2, but it is 3 in"
    ):
        fn([z], [z.long(), z[:2].long()])


def accepts_all(fn, *calls):
    for call in (fn, torch.compile(fn, backend="eager", fullgraph=True)):
        for args, kwargs in calls:
            call(*args, **kwargs)


def test_axes_in_a_collection_may_be_computed_from_others():
    two, three = torch.zeros(2), torch.zeros(3)

    @tw.contract
    def of_axes(x: Float[Tensor, " n"], d: dict[str, Float[Tensor, "n-1"]], k: int = 1):
        return x

    @tw.contract
    def of_both(x: Float[Tensor, " n"], d: dict[str, Float[Tensor, "n-{k}"]], k: int = 1):
        return x

    @tw.contract
    def of_what_is_open(
        x: Float[Tensor, " n"],
        d: Float[Tensor, "n-1"] | Callable[..., Tensor],
        z: list[Float[Tensor, "{k}"]],
        others: Iterable[Float[Tensor, "{k}"]] = (),
        k: int = 2,
    ):
        return x

    accepts_all(of_axes, ((three, {"a": two}), {}), ((), {"d": {"a": two}, "x": three}))
    accepts_all(of_both, ((three, {"a": two}), {}))
    accepts_all(of_what_is_open, ((three, two, [two]), {}), ((three, len, [], [two]), {}))
    for _ in range(10):  # beartype looks at one of many, by chance
        with pytest.raises(tw.ContractError, match=r"d\['b'\] needs .* needs 2, as n is 3 in x"):
            of_axes(d={"a": two, "b": three}, x=three)
        with pytest.raises(tw.ContractError, match=r"z\[1\] needs .*: an axis is 3, not 2"):
            of_what_is_open(three, len, [two, three])


def test_the_body_may_change_a_collection_of_the_caller():
    @tw.contract
    def grown(ws: dict[str, Float[Tensor, " d"]]) -> Float[Tensor, ""]:
        ws["pair"] = torch.outer(ws["a"], ws["a"])
        return ws["pair"].sum()

    @tw.contract
    def emptied(ws: list[Float[Tensor, "n d"]]) -> Float[Tensor, " d"]:
        ws.clear()
        return torch.zeros(7)

    grown({"a": torch.zeros(2)})
    with pytest.raises(
        tw.ContractError, match="the result needs .* axis d is 7, but it is 3 in ws"
    ):
        emptied([torch.zeros(2, 3)])


class Named(TypedDict):
    w: float


@dataclasses.dataclass(frozen=True)
class Key:
    number: int


def test_what_has_no_shape_in_a_collection_is_as_beartype_has_it():
    z = torch.zeros(2)

    @tw.contract
    def fn(
        xs: Sequence[
            Float[Tensor, " n"] | Float[numpy.ndarray, " n"] | complex | Named | Literal[1, "one"]
        ],
        by_key: Mapping[Key | torch.Tensor, Float[Tensor, " n"]] | None = None,
    ) -> Float[Tensor, ""]:
        return torch.zeros(())

    fn([z, numpy.zeros(2), 1.0, 2, 1j, {"w": 1.0}, "one"])
    accepts_all(fn, (([z, 1.0],), {}), (([], {Key(3): z}), {}), (([z], {nn.Parameter(z): z}), {}))
    with pytest.raises(tw.ContractError, match=r"^fn: by_key\[Key\] needs .* axis n is 3, but"):
        fn([z], {Key(3): torch.zeros(3)})
    with pytest.raises(tw.ContractError, match=r"^fn: a key of by_key needs .*, got str \"a\""):
        fn([z], {"a": z})

    @tw.contract
    def either(xs: list[Literal[1, "one"] | Float[Tensor, " n"]]):
        return xs

    with pytest.raises(tw.ContractError, match=r"xs\[0\] needs .*, got numpy.ndarray int64\[2\]"):
        either([numpy.array([1, 2])])


def test_an_item_that_no_class_says_is_named_where_beartype_finds_it():
    @tw.contract
    def fn(xs: list[Float[Tensor, " b"] | Callable[..., int]]):
        return xs

    fn([torch.zeros(2), len])
    with pytest.raises(tw.ContractError, match=r"^fn: xs\[0\] needs .* Callable, got int 3$"):
        fn([3])


def test_each_item_of_a_result_is_looked_at():
    @tw.contract
    def fn(x: Float[Tensor, "n d"]) -> list[Float[Tensor, " n"]]:
        return [x[:, 0], x[:, 0], x[0]]

    for call in (fn, torch.compile(fn, backend="eager", fullgraph=True)):
        with pytest.raises(
            (tw.ContractError, torch._dynamo.exc.Unsupported),
            match=r"fn: the result\[2\] needs .*: axis n is 4, but it is 3 in x",
        ):
            call(torch.zeros(3, 4))


def test_axes_of_items_are_computed_from_arguments():
    @tw.contract
    def fn(xs: list[Float[Tensor, "{k} n"] | None], k: int = 2):
        return k

    fn([torch.zeros(2, 3)])
    with pytest.raises(tw.ContractError, match=r"^fn: xs\[0\] needs .*an axis is 2, not 3"):
        fn([torch.zeros(2, 3)], k=3)
    for _ in range(10):  # beartype looks at one of many, by chance
        with pytest.raises(tw.ContractError, match=r"^fn: xs\[1\] needs .*an axis is 3, not 2"):
            fn([torch.zeros(2, 3), torch.zeros(3, 3), torch.zeros(2, 3)])
    with pytest.raises(tw.ContractError, match=r"^fn: k needs int, got None"):
        fn([torch.zeros(2, 3)], k=None)


def test_axes_computed_by_a_function():
    @tw.contract
    def fn(x: Float[Tensor, "n d"], y: Float[Tensor, " min(n,3)"]) -> Float[Tensor, " max(n,d)"]:
        return x.new_zeros(len(x) if len(y) else 0)

    fn(torch.zeros(5, 4), torch.zeros(3))
    with pytest.raises(tw.ContractError, match=r"fn: y needs .* it needs 3, as n is 5 in x$"):
        fn(torch.zeros(5, 4), torch.zeros(5))
    with pytest.raises(tw.ContractError, match=r"result needs .* it needs 6, as n is 5 in x, d is"):
        fn(torch.zeros(5, 6), torch.zeros(3))

    @tw.contract
    def same_name(x: Float[Tensor, " input"], y: Float[Tensor, " input-1"]):
        return len(y)

    assert same_name(torch.zeros(3), torch.zeros(2)) == 2
    with pytest.raises(tw.ContractError, match="it needs 2, as input is 3 in x"):
        same_name(torch.zeros(3), torch.zeros(3))


def test_an_error_from_inside_the_body_is_left_as_it_is():
    @beartype
    def inner(number: int):
        return number

    @tw.contract
    def outer(x: Float[Tensor, " n"]):
        return inner("one")

    with pytest.raises(BeartypeCallHintViolation, match="inner"):
        outer(x[0])

    @tw.contract
    def nested(x: Float[Tensor, "batch dim"]):
        return pair_loss(x, x[:1])

    with pytest.raises(tw.ContractError, match="^pair_loss: y needs"):
        nested(x)


def test_callables_and_classes_are_enforced():
    @tw.contract
    def apply(energy: Callable[[Tensor], Tensor], x: Float[Tensor, " n"], flag: bool = False):
        return energy(x)

    apply(torch.sin, x[0])
    with pytest.raises(tw.ContractError, match="apply: energy needs .*Callable.*, got int 3"):
        apply(3, x[0])
    with pytest.raises(tw.ContractError, match="apply: flag needs bool, got int 1"):
        apply(torch.sin, x[0], flag=1)


def test_a_method_is_checked_and_vmapped():
    class Holder:
        @tw.contract
        def norm(self, x: Float[Tensor, " n"], y: Float[Tensor, " n"]) -> Float[Tensor, ""]:
            return (x * y).sum()

    holder = Holder()
    assert torch.vmap(holder.norm)(torch.ones(3, 4), torch.ones(3, 4)).tolist() == [4, 4, 4]
    with pytest.raises(tw.ContractError, match="^Holder.norm: y needs"):
        holder.norm(torch.ones(3), torch.ones(4))


def test_functions_transform():
    (gradient, aux) = torch.func.grad(
        lambda x, y: (lambda terms: (terms.loss, terms))(pair_loss(x, y)), has_aux=True
    )(x + 1, x)
    torch.testing.assert_close(gradient, torch.full((8, 4), 2.0))
    assert isinstance(aux, PairTerms)
    batched = torch.vmap(pair_loss)(torch.ones(3, 8, 4), torch.zeros(3, 8, 4))
    assert batched.loss.tolist() == [32.0] * 3
    assert batched.mean.shape == (3, 4)
    with pytest.raises(tw.ContractError, match="axis batch is 1, but it is 8 in x"):
        torch.vmap(pair_loss)(torch.ones(3, 8, 4), torch.zeros(3, 1, 4))


def test_a_float_as_a_symbol_is_traced_twice_at_most():
    """Dynamo names each float that is a symbol by where it lies, to make it a number next time."""
    traces = []

    @torch.compiler.assume_constant_result
    def traced():
        traces.append(1)

    @tw.contract
    def shifted(x: Float[Tensor, " n"], *, by: float = 0.0) -> Float[Tensor, " n"]:
        traced()
        return x if by == 0 else x + by

    x = torch.ones(3, requires_grad=True)

    @torch.compile(fullgraph=True, backend="aot_eager", dynamic=True)
    def step(x):
        return shifted(x).sum()

    assert step(x) == 3
    assert len(traces) == 2


@pytest.mark.parametrize(
    "name", [name for name in dir(builtins) if name.islower() and name[0] != "_"]
)
@pytest.mark.parametrize("of", ["function", "parameter"])
def test_a_function_or_a_parameter_may_have_the_name_of_a_builtin(name, of):
    function, parameter = (name, "w") if of == "function" else ("f", name)
    written = {"A": Float[Tensor, " n"]}
    source = f"def {function}(x: A, k: float, *zs: A, {parameter}: A | None, **more: A): return k"
    exec(source, written)
    call, x = tw.contract(written[function]), torch.ones(3)
    assert call(x, 2.0, x, **{parameter: x}, other=x) == 2.0
    with pytest.raises(tw.ContractError, match=r"axis n is 2, but it is 3 in x"):
        call(x, 2.0, x, **{parameter: x[:2]})


def test_twelve_functions_compile_in_one_process():
    for index in range(12):

        @tw.contract
        def scaled(x: Float[Tensor, " n"], scale: int = index) -> Float[Tensor, ""]:
            return x.sum() * scale

        scaled.__wrapped__.__name__ = f"scaled_{index}"
        compiled = torch.compile(scaled, fullgraph=True, backend="eager")
        assert compiled(torch.ones(3)) == 3 * index


def test_it_can_be_switched_off(monkeypatch):
    @tw.contract
    def f(x: Float[Tensor, " n"]):
        return x + 1

    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    for function in (f, torch.compile(f, fullgraph=True, backend="eager")):
        assert function(torch.zeros(2, 2)).shape == (2, 2)


def test_a_variable_of_the_environment_switches_it_off():
    source = (
        "import torch, termwise as tw\n"
        "from jaxtyping import Float\n"
        "from torch import Tensor\n"
        "@tw.contract\n"
        "def f(x: Float[Tensor, 'n']): return x.shape\n"
        "print(f(torch.zeros(2, 2)))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", source],
        env={"JAXTYPING_DISABLE": "1", "PATH": ""},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.stdout == "torch.Size([2, 2])\n", done.stderr


def test_numpy_is_not_a_tensor():
    with pytest.raises(tw.ContractError):
        pair_loss(numpy.zeros((8, 4), dtype="float32"), x)


@tw.contract
def sharded_loss(
    logits: Float[Tensor, "batch time vocab"],
    mask: Bool[Tensor, " batch"] | None = None,
    *,
    batch_group: dist.ProcessGroup | None = None,
    vocab_group: dist.ProcessGroup | None = None,
    sequence_group: dist.ProcessGroup | None = None,
) -> Float[Tensor, ""]:
    return logits.sum()


@pytest.fixture
def mesh():
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=4)
    yield init_device_mesh("cpu", (2, 2))
    dist.destroy_process_group()


@pytest.mark.parametrize(
    ("placements", "instead"),
    [
        (
            [Shard(0), Replicate()],
            "logits.to_local() and batch_group=logits.device_mesh.get_group(0)",
        ),
        (
            [Shard(1), Shard(2)],
            "logits.to_local() and sequence_group=logits.device_mesh.get_group(0) "
            "and vocab_group=logits.device_mesh.get_group(1)",
        ),
        ([Replicate(), Replicate()], "logits.to_local()"),
        ([Replicate(), Partial()], "logits.full_tensor()"),
    ],
)
def test_a_dtensor_is_refused_with_the_group_that_replaces_it(mesh, placements, instead):
    logits = DTensor.from_local(torch.zeros(2, 3, 4), mesh, placements)
    message = (
        'sharded_loss: logits needs Float[Tensor, "batch time vocab"], got a DTensor, '
        f"float32{list(logits.shape)}: pass {instead}"
    )
    with pytest.raises(tw.ContractError) as caught:
        sharded_loss(logits)
    assert str(caught.value) == message
    compiled = torch.compile(sharded_loss, fullgraph=True, backend="eager")
    with pytest.raises(torch._dynamo.exc.Unsupported) as caught:
        compiled(logits)
    assert message in str(caught.value)


def test_a_dtensor_whose_axis_no_group_shares_has_to_be_gathered(mesh):
    rows = DTensor.from_local(torch.zeros(2, 4), mesh, [Replicate(), Shard(1)])
    with pytest.raises(tw.ContractError, match=r"x needs .*: pass x\.full_tensor\(\)$"):
        pair_loss(rows, rows)


def test_every_real_number_passes_for_a_float_and_arrives_as_one():
    @tw.contract
    def scaled(x: Float[Tensor, " n"], weight: float, bias: float | None = None):
        assert isinstance(weight, (float, int))
        return weight * x + (bias or 0)

    def compiled(*args):
        torch._dynamo.reset()
        return torch.compile(
            lambda x, w: pair_loss(x, x + 1, weight=w).loss, fullgraph=True, backend="eager"
        )(*args)

    for half in (0.5, numpy.float64(0.5), numpy.float32(0.5), fractions.Fraction(1, 2)):
        assert scaled(torch.ones(2), half, bias=half).tolist() == [1, 1]
        assert pair_loss(x, x + 1, weight=half).loss == 16
        assert compiled(x, half) == 16
    assert scaled(torch.ones(2), numpy.int64(2)).tolist() == [2, 2]
    for wrong in (numpy.ones(()), numpy.ones(1), 1j, "1", numpy.bool_(1), torch.ones(())):
        with pytest.raises(tw.ContractError, match="weight needs float, got"):
            pair_loss(x, x, weight=wrong)


class Point(NamedTuple):
    x: Float[Tensor, "batch dim"]
    y: Float[Tensor, " batch"]


@dataclasses.dataclass(frozen=True)
class Batch:
    x: Float[Tensor, "batch dim"]
    y: Float[Tensor, " batch"]
    name: str = ""


class Options(TypedDict):
    x: Float[Tensor, "batch dim"]
    y: NotRequired[Float[Tensor, " batch"]]


@tw.contract
def of_batch(b: Batch) -> Float[Tensor, ""]:
    return b.x.sum()


@tw.contract
def of_point(b: Point) -> Float[Tensor, ""]:
    return b.x.sum()


@tw.contract
def of_options(b: Options) -> Float[Tensor, ""]:
    return b["x"].sum()


@tw.contract
def of_batches(bs: list[Batch], y: Float[Tensor, " batch"]) -> Float[Tensor, ""]:
    return y.sum()


@tw.contract
def gives_point(x: Float[Tensor, "batch dim"], row: bool = False) -> Point:
    return Point(x, x[0] if row else x[:, 0])


def refused(fn, message, *args, **kwargs):
    """Hold that a call is refused with one text, eager and compiled."""
    with pytest.raises(tw.ContractError) as caught:
        fn(*args, **kwargs)
    assert str(caught.value) == message
    compiled = torch.compile(fn, backend="eager", fullgraph=True, dynamic=False)
    with pytest.raises(torch._dynamo.exc.Unsupported) as caught:
        compiled(*args, **kwargs)
    assert message in str(caught.value).replace("\\'", "'")


def test_fields_of_records_are_looked_at_in_the_axes_of_the_call():
    need = 'needs Float[Tensor, " batch"], got float32[1]: axis batch is 1, but it is 8 in'
    one = x[:1, 0]
    refused(of_batch, f"of_batch: b.y {need} b.x", Batch(x, one))
    refused(of_point, f"of_point: b.y {need} b.x", Point(x, one))
    refused(of_options, f"of_options: b['y'] {need} b['x']", {"x": x, "y": one})
    refused(of_options, "of_options: b needs Options, got dict: it has no 'x'", {})
    refused(
        gives_point,
        'gives_point: the result\'s y needs Float[Tensor, " batch"], got float32[4]: '
        "axis batch is 4, but it is 8 in x",
        x,
        True,
    )
    accepts_all(of_batch, ((Batch(x, x[:, 0]),), {}))
    accepts_all(of_point, ((Point(x, x[:, 0]),), {}))
    accepts_all(of_options, (({"x": x},), {}), (({"x": x, "y": x[:, 0]},), {}))
    accepts_all(gives_point, ((x,), {}))
    with pytest.raises(tw.ContractError, match=r"of_batch: b\.name needs str, got int 3"):
        of_batch(Batch(x, x[:, 0], 3))


Item = TypeVar("Item")


@dataclasses.dataclass
class Tagged(Generic[Item]):
    item: Item
    others: list[Item] = dataclasses.field(default_factory=list)


@dataclasses.dataclass
class TaggedRow(Tagged[Float[Tensor, " n"]]):
    tag: int = 0


@tw.contract
def of_tagged(
    a: Tagged[Float[Tensor, " n"]], *, b: Tagged[tuple[Float[Tensor, " n"], int]] | None = None
) -> Float[Tensor, ""]:
    return x.sum()


@tw.contract
def of_tagged_row(a: TaggedRow) -> Float[Tensor, ""]:
    return x.sum()


def test_the_parameters_of_a_generic_record_are_filled_in():
    row, one = x[:, 0], x[:1, 0]
    needs = 'needs Float[Tensor, " n"], got float32'
    refused(of_tagged, f"of_tagged: a.item {needs}[8, 4]: 2 axes, not 1", Tagged(x))
    differs = "axis n is 1, but it is 8 in a.item"
    refused(of_tagged, f"of_tagged: a.others[0] {needs}[1]: {differs}", Tagged(row, [one]))
    refused(of_tagged_row, f"of_tagged_row: a.item {needs}[8, 4]: 2 axes, not 1", TaggedRow(x))
    accepts_all(of_tagged, ((Tagged(row, [row]),), {"b": Tagged((row, 1))}))
    accepts_all(of_tagged_row, ((TaggedRow(row),), {}))
    refused(
        of_tagged,
        'of_tagged: b.item needs tuple[Float[Tensor, " n"], int], got str "s"',
        Tagged(row),
        b=Tagged("s"),
    )


def test_swapped_latents_are_refused():
    f = torch.zeros(8, 2)
    with pytest.raises(ValueError, match="SparseLatents needs values as a floating"):
        tw.sae.SparseLatents(values=f.long(), indices=f)
    # Where the record itself lets them pass, as after a map over its fields, the contract does not.
    swapped = tw.sae.SparseLatents(f, f.long())
    object.__setattr__(swapped, "values", f.long())
    with pytest.raises(tw.ContractError, match=r"f\.values needs .* int64 is not a dtype of Float"):
        tw.sae.vanilla_loss(x, swapped, x, sparsity_coeff=1.0)


def test_records_of_a_list_share_the_axes_that_others_fix_and_have_their_own():
    wide = Batch(torch.zeros(8, 7), x[:, 0])
    accepts_all(of_batches, (([Batch(x, x[:, 0]), wide], x[:, 0]), {}))
    with pytest.raises(tw.ContractError, match=r"bs\[1\]\.x needs .* batch is 3, but it is 8 in y"):
        of_batches([wide, Batch(x[:3], x[:3, 0])], x[:, 0])


Alias = TypeAliasType("Alias", Float[Tensor, "n d"])


@tw.contract
def of_aliases(
    a: Alias, b: Annotated[Float[Tensor, "n d"], "doc"], c: Annotated[float, "unit"] = 1.0
) -> Float[Tensor, ""]:
    return a.sum() * c


def test_aliases_and_annotated_are_unwrapped():
    accepts_all(of_aliases, ((x, x), {}))
    needs = 'needs Float[Tensor, "n d"], got float32'
    refused(of_aliases, f"of_aliases: b {needs}[1, 4]: axis n is 1, but it is 8 in a", x, x[:1])
    refused(of_aliases, f"of_aliases: a {needs}[4]: 1 axis, not 2", x[0], x)
    refused(of_aliases, 'of_aliases: c needs float, got str "s"', x, x, "s")


@tw.contract
def in_any_order(
    x: Float[Tensor, "n+1 n"],
    y: Float[Tensor, " m-1"],
    z: Float[Tensor, " m"],
    w: Float[Tensor, "{k}+1"] | None = None,
    *,
    k: int = 2,
) -> Float[Tensor, " m+1"]:
    return z.new_zeros(len(z) + k - 1)


def test_sizes_are_computed_from_axes_in_any_order_and_from_arguments():
    good = (torch.zeros(4, 3), torch.zeros(2), torch.zeros(3))
    accepts_all(in_any_order, (good, {}), ((*good, torch.zeros(3)), {}))
    name = "in_any_order"
    refused(
        in_any_order,
        f'{name}: x needs Float[Tensor, "n+1 n"], got float32[5, 3]: '
        "axis n+1 is 5, but it needs 4, as n is 3 in x",
        torch.zeros(5, 3),
        *good[1:],
    )
    refused(
        in_any_order,
        f'{name}: y needs Float[Tensor, "m-1"], got float32[3]: '
        "axis m-1 is 3, but it needs 2, as m is 3 in z",
        good[0],
        torch.zeros(3),
        good[2],
    )
    refused(
        in_any_order,
        f'{name}: w needs Float[Tensor, "{{k}}+1"] | None, got float32[3]: '
        "axis 4+1 is 3, but it needs 5",
        *good,
        torch.zeros(3),
        k=4,
    )
    refused(
        in_any_order,
        f'{name}: the result needs Float[Tensor, "m+1"], got float32[5]: '
        "axis m+1 is 5, but it needs 4, as m is 3 in z",
        *good,
        k=3,
    )


def test_what_cannot_be_checked_is_refused_at_the_def():
    for shape, message in {
        "2n": r"x: '2n' is neither the name of an axis nor its size: write \"2\*n\"",
        "?h": r"x: the axis '\?h' has a size of its own in each leaf of a tree",
        "n m-": "x: 'm-' is neither the name",
    }.items():

        def fn(x: Float[Tensor, shape]):
            return x

        with pytest.raises(TypeError, match=f"fn: {message}"):
            tw.contract(fn)


class Vector:
    def __init__(self, v: Tensor):
        self.v = v

    @tw.contract
    def plus(self, other: Self, wrong: bool = False) -> Self:
        return 3 if wrong else type(self)(self.v + other.v)

    @tw.contract
    def named(self, other: "Vector") -> "Vector":
        return other

    @classmethod
    @tw.contract
    def zeros(cls, n: int) -> Self:
        return cls(torch.zeros(n))


class SubVector(Vector):
    pass


class Holder(nn.Module):
    def forward(self, x: Float[Tensor, " n"]):
        return x


@pytest.mark.parametrize(
    ("what", "message"),
    [
        (Key, "Key is a dataclass: put it on its methods"),
        (Point, "Point is a class: put it on its methods"),
        (Holder, "Holder is a Module: put it on forward"),
        (Holder(), "this is a Holder: put it on forward"),
        (staticmethod(accepts_all), "accepts_all is a staticmethod: put @staticmethod above @tw"),
        (property(accepts_all), "accepts_all is a property: put @property above @tw.contract"),
        (functools.partial(accepts_all, 1), "a partial of accepts_all: put it on accepts_all"),
        (Vector(0).named, r"a method of Vector\.named: put it on Vector\.named"),
        (functools.lru_cache(accepts_all), "accepts_all is cached .*: put @lru_cache above @tw"),
        (len, "got builtin_function_or_method"),
    ],
)
def test_misuse_is_named(what, message):
    with pytest.raises(TypeError, match=f"^contract takes a function.*{message}"):
        tw.contract(what)


def test_coroutines_are_checked():
    @tw.contract
    async def fn(x: Float[Tensor, "n d"], row: bool = False) -> Float[Tensor, " n"]:
        await asyncio.sleep(0)
        return x[0] if row else x[:, 0]

    assert inspect.iscoroutinefunction(fn)
    assert asyncio.run(fn(x)).shape == (8,)
    with pytest.raises(tw.ContractError, match="fn: x needs .* 1 axis, not 2"):
        asyncio.run(fn(x[0]))
    with pytest.raises(tw.ContractError, match="fn: the result needs .* n is 4, but it is 8 in x"):
        asyncio.run(fn(x, row=True))


def test_self_and_the_name_of_a_class_in_its_own_body():
    v = Vector(x)
    assert SubVector(x).plus(v).named(v) is v
    assert type(SubVector.zeros(3)) is SubVector
    with pytest.raises(tw.ContractError, match=r"^Vector\.plus: other needs Self, got int 3$"):
        v.plus(3)
    with pytest.raises(tw.ContractError, match=r"^Vector\.plus: the result needs Self, got int 3$"):
        v.plus(v, wrong=True)
    with pytest.raises(tw.ContractError, match=r"^Vector\.named: other needs Vector, got int 3$"):
        v.named(3)


def test_a_name_that_cannot_be_resolved_is_told_with_its_argument():
    @tw.contract
    def fn(x: "Float[Tensor, ' n']", y: "Missing"):
        return x

    with pytest.raises(
        NameError, match="^fn: the annotation Missing of y cannot be resolved: name"
    ):
        fn(x[0], 1)


def test_a_forgotten_terms_is_told():
    class Forgotten(tw.Terms):
        error: Float[Tensor, ""]

    def fn(x: Float[Tensor, " n"]) -> Forgotten:
        return Forgotten(loss=x.sum(), error=x.sum())

    def pair(x: Float[Tensor, " n"]) -> tuple[Forgotten | None, int]:
        return fn(x), 1

    for one in (fn, pair):
        message = rf"^{one.__name__} returns .*Forgotten, .* that has no @tw\.terms above"
        with pytest.raises(TypeError, match=message):
            tw.contract(one)


def test_annotations_may_be_strings(tmp_path, monkeypatch):
    (tmp_path / "of_the_future.py").write_text(
        "from __future__ import annotations\n"
        "import termwise as tw\n"
        "from jaxtyping import Float\n"
        "from torch import Tensor\n"
        "@tw.contract\n"
        "def fn(x: Float[Tensor, 'n d'], y: Float[Tensor, ' n'] | None = None) -> Later:\n"
        "    return Later()\n"
        "class Later: pass\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    fn = importlib.import_module("of_the_future").fn
    fn(x, x[:, 0])
    with pytest.raises(tw.ContractError, match="fn: y needs .* n is 4, but it is 8 in x"):
        fn(x, x[0])


def test_defaults_arrays_and_broadcasts_are_checked():
    @tw.contract
    def fn(
        x: Float[Tensor, " n"],
        y: Float[Tensor, " n"] = torch.zeros(3),  # noqa: B008
        z: Float[numpy.ndarray, " n"] | None = None,
    ) -> Float[numpy.ndarray, " n"] | None:
        return z[:1] if z is not None and z.sum() else z

    fn(torch.zeros(3), z=numpy.zeros(3))
    with pytest.raises(tw.ContractError, match="y needs .* axis n is 3, but it is 4 in x"):
        fn(torch.zeros(4))
    with pytest.raises(tw.ContractError, match="z needs .* axis n is 2, but it is 3 in x"):
        fn(torch.zeros(3), z=numpy.zeros(2))
    with pytest.raises(tw.ContractError, match="result needs .* axis n is 1, but it is 3 in x"):
        fn(torch.zeros(3), z=numpy.ones(3))

    @tw.contract
    def wide(x: Float[Tensor, "*#b d"], y: Float[Tensor, "*b d"]):
        return x + y

    wide(x[:1], x)
    with pytest.raises(
        tw.ContractError, match=r"y needs .*: axis b is \[8\], but it is \[2\] in x"
    ):
        wide(x[:2], x)


# What a call may be given, good and broken, of the signature below.
POOL = {
    "x": [x, x[:3], x[:1], x[0], x.long(), x.double(), x[:, :2], None, "x", x.numpy()],
    "y": [x, x[:3], x[:, :1], x[:, :2], x[None], x.half(), 3],
    "lead": [torch.zeros(2, 3, 8), torch.zeros(8), torch.zeros(8, 8), torch.zeros(()), x],
    "mask": [None, x[:, 0] > 0, x[:3, 0] > 0, x[:, 0], x > 0],
    "f": [None, x[:, 0], x[:3, 0], x, 0.5, 2, numpy.float64(1), "sum", "no", 1j, x[0, 0].long()],
    "n": [1, True, 2.0, None, "1"],
    "w": [0.5, 1, True, None, "1", numpy.float64(2)],
    "mode": ["sum", "mean", "median", 1, None],
    "wide": [x, x[:, :1], x[:1], x[:1, :1], x[:3], x[:, :2]],
    "later": [x[:5, 0], x[:4, 0], x[:, 0], torch.zeros(9)],
    "zs": [(), (x,), (x, x), (x[:3], x[:3]), (x[0],), ("z",)],  # beartype looks at one of many
}


def drawn(
    x: Float[Tensor, "batch dim"],
    y: Float[Tensor, "batch dim"],
    lead: Float[Tensor, "*lead batch"],
    mask: Bool[Tensor, " batch"] | None,
    f: Float[Tensor, " batch"] | float | Literal["sum"] | None,
    n: int,
    w: float,
    mode: Literal["sum", "mean"],
    wide: Shaped[Tensor, "#batch #dim"],
    later: Float[Tensor, " dim+1"],
    zs: tuple[Float[Tensor, "batch dim"], ...],
) -> PairTerms:
    loss = x.new_zeros((), dtype=torch.int64 if n is True else torch.float32)
    return PairTerms(loss=loss, distance=loss.float(), mean=y[0] if w else x[:, 0])


def test_the_written_check_and_its_judges_agree():
    quick, check = tw.contract(drawn), _Check(drawn)
    # Jaxtyping and beartype judge the arguments; a record they do not look into.
    plain = types.FunctionType(drawn.__code__, drawn.__globals__)
    plain.__annotations__ = {k: v for k, v in drawn.__annotations__.items() if k != "return"}
    by_beartype = beartype(conf=BEARTYPE)(plain)

    def judge(**values):
        with jaxtyped("context"):
            try:
                return by_beartype(**values)
            except BeartypeCallHintViolation as violation:
                raise TypeError from violation

    source = random.Random(0)
    outcomes = {True: 0, False: 0}
    for _ in range(2000):
        # Mostly good: one or two arguments of eleven are anything.
        values = {name: good[0] for name, good in POOL.items()}
        values["lead"] = source.choice(POOL["lead"][:3])
        for name in source.sample(sorted(POOL), source.choice((0, 1, 1, 2))):
            values[name] = source.choice(POOL[name])

        def outcome(call, values=values):
            try:
                return call(**values)
            except TypeError as error:
                return f"{error}"

        def walked(**values):
            given, known = check.judge(tuple(values.values()))
            return check.judged_result(check.body()(*given), known)

        got, again = outcome(quick), outcome(walked)
        assert isinstance(got, str) == isinstance(again, str), values
        if isinstance(got, str):
            assert got == again
            assert got.startswith("drawn: ")
        if not (isinstance(got, str) and "the result" in got):
            assert isinstance(outcome(judge), str) == isinstance(got, str), (values, got)
        outcomes[isinstance(got, str)] += 1
    assert min(outcomes.values()) > 400


def test_the_kit_breaks_fields_of_records():
    def unchecked(b: Batch) -> Float[Tensor, ""]:
        return b.x.sum() + b.y.sum()

    for fn in (of_batch, of_point, of_options):
        testing.assert_contract(fn, compiled=False, max_examples=5)
    with pytest.raises(
        AssertionError, match="assert_contract: unchecked: b violates its annotation"
    ):
        testing.assert_contract(unchecked, compiled=False, max_examples=5)


def test_each_item_without_a_shape_is_looked_at_and_no_random_number_is_drawn():
    @tw.contract
    def of_levels(
        x: Float[Tensor, " n"], levels: Sequence[int], weights: dict[str, float] | None = None
    ):
        return x.sum() * len(levels)

    x, state = torch.ones(3), random.getstate()
    for place in range(8):
        levels = [1] * 8
        levels[place] = "no"
        with pytest.raises(tw.ContractError, match=rf"of_levels: levels\[{place}\] needs int"):
            of_levels(x, levels)
        with pytest.raises(tw.ContractError, match=r"of_levels: weights\['b'\] needs float"):
            of_levels(x, (1,), {"a": 1.0, "b": "no"})
    assert of_levels(x, (1, 2), {"a": 1}) == 6
    with pytest.raises(Exception, match=r"of_levels: levels\[1\] needs int"):
        torch.compile(of_levels, fullgraph=True, backend="eager")(x, [1, 2.5])
    assert random.getstate() == state


@pytest.mark.parametrize(
    ("sizes", "said"),
    [
        ((8, 4, 3), '"views b t d -> views (b t) d"'),
        ((8, 4, 3), '"views b t d -> views b (t d)"'),
        ((8, 3, 4, 4), '"views b d h w -> views (b h w) d"'),
        ((8, 3, 4, 4), '"views b d h w -> views b (d h w)"'),
    ],
)
def test_a_map_is_refused_with_both_ways_to_write_it(sizes, said):
    @tw.contract
    def of_one(z: Float[Tensor, "batch dim"]):
        return z

    @tw.contract
    def of_views(z: Float[Tensor, "views batch dim"]):
        return z

    for function, first, shape in ((of_one, "", sizes), (of_views, "views ", (2, *sizes))):
        z = torch.zeros(shape)
        written = said.replace("views ", first)
        with pytest.raises(tw.ContractError, match=re.escape(f"einops.rearrange(z, {written})")):
            function(z)
        pattern = written.strip('"')
        assert einops.rearrange(z, pattern).ndim == len(shape) - len(sizes) + 2
    with pytest.raises(tw.ContractError, match="1 axis, not 2$"):
        of_one(torch.zeros(3))
