"""How often a function is compiled, and how many kernels it launches."""

import pytest
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

import termwise as tw
from termwise import testing
from termwise.testing._launches import launches


def failure(law, fn, *given, **options):
    with pytest.raises(AssertionError) as broken:
        getattr(testing, law)(fn, *given, **options)
    return str(broken.value)


@tw.terms
class DistanceTerms(tw.Terms):
    squares: Float[Tensor, " batch"]


@tw.contract
def distance(
    x: Float[Tensor, "batch dim"], y: Float[Tensor, "batch dim"], *, weight: float = 1.0
) -> DistanceTerms:
    squares = (x - y).square().sum(1)
    return DistanceTerms(loss=weight * squares.mean(), squares=squares)


# --- compilations ---------------------------------------------------------------------------


def of_constants(x: Float[Tensor, "batch dim"]) -> Float[Tensor, ""]:
    weights = torch.tensor([1 / (1 + row) for row in range(len(x))], dtype=x.dtype)
    return (weights[:, None] * x).sum()


def of_two_ways(x: Float[Tensor, "batch dim"]) -> Float[Tensor, ""]:
    return x.square().sum() if len(x) > 10 else x.abs().square().sum()


def test_two_graphs_serve_all_sizes():
    testing.assert_recompiles(distance)
    testing.assert_recompiles(distance, "batch", at_most=1, dynamic=True)
    said = failure("assert_recompiles", of_constants)
    assert said.startswith(
        "assert_recompiles: of_constants: a 3rd graph is compiled at batch 9, dim 12: tensor 'x' "
        "size mismatch at index 0. expected 8, actual 9\n"
    )
    said = failure("assert_recompiles", of_constants, "batch", sizes={"dim": 2}, at_most=1)
    assert "a 2nd graph is compiled at batch 8, dim 2: tensor 'x' size mismatch" in said
    assert "of_constants(\n    x=torch.tensor(" in said


def test_a_graph_for_each_way_is_allowed_where_it_is_said():
    said = failure("assert_recompiles", of_two_ways, "batch")
    assert "a 3rd graph is compiled at" in said
    assert "x.size()[0] <= 10 # return x.square().sum() if len(x) > 10" in said
    testing.assert_recompiles(of_two_ways, "batch", at_most=3)
    testing.assert_recompiles(of_two_ways, "dim", sizes={"batch": 3})


def in_quarters(x: Float[Tensor, " n"]) -> Float[Tensor, ""]:
    if len(x) > 1000:
        return sum(block.square().sum() for block in x.split(len(x) // 4))
    return x.square().sum()


def test_a_graph_does_not_grow_with_the_data():
    testing.assert_recompiles(distance, "batch", traced_at=2**18)
    testing.assert_recompiles(in_quarters)
    said = failure("assert_recompiles", in_quarters, traced_at=4096)
    assert "the graph computes 3 tensors at n 7, and 17 at n 4096: it grows with the data" in said


def test_the_graphs_compute_what_eager_mode_does():
    def other(x: Float[Tensor, " n"]) -> Float[Tensor, ""]:
        return x.sum() * (2 if torch.compiler.is_compiling() else 1)

    def broken(x: Float[Tensor, " n"]) -> Float[Tensor, ""]:
        return x.sum() if x.sum() > 0 else x.mean()

    assert ": result is " in failure("assert_recompiles", other)
    assert "assert_recompiles: broken: compiled, " in failure("assert_recompiles", broken)


def test_sizes_that_do_not_change_are_refused():
    with pytest.raises(ValueError, match="distance has no axis n, only batch, dim"):
        testing.assert_recompiles(distance, "n")
    with pytest.raises(ValueError, match="the size of batch is that of a given tensor"):
        testing.assert_recompiles(distance, "batch", overrides={"x": torch.ones(2, 3).double()})
    with pytest.raises(ValueError, match="distance has no axis that may change"):
        testing.assert_recompiles(distance, sizes={"batch": 2, "dim": 3})
    with pytest.raises(ValueError, match="assert_recompiles needs at_most >= 1, got 0"):
        testing.assert_recompiles(distance, at_most=0)


def test_calls_may_be_made_from_the_sizes():
    def unannotated(x, options):
        return (x * options["weights"]).sum()

    def on(sizes):
        x = torch.arange(float(sizes["rows"])).double()
        return {"x": x, "options": {"weights": x.flip(0)}}

    testing.assert_recompiles(unannotated, "rows", given=on)
    testing.assert_launches(unannotated, "rows", given=on)


# --- kernels --------------------------------------------------------------------------------


def one_by_one(x: Float[Tensor, "batch dim"]) -> Float[Tensor, ""]:
    return torch.stack([row.square().sum() for row in x]).mean()


def in_blocks(x: Float[Tensor, "batch dim"]) -> Float[Tensor, ""]:
    return torch.stack([part.square().sum() for part in x.split(1000)]).sum() / len(x)


def waiting(x: Float[Tensor, "batch dim"]) -> Float[Tensor, ""]:
    return x[x > 0].sum()


def measured(x: Float[Tensor, "batch dim"]) -> Float[Tensor, ""]:
    return x.sum() * float(x.detach().abs().max())


def test_kernels_do_not_grow_with_an_axis():
    testing.assert_launches(distance, "batch", sizes={"dim": 2**20})
    testing.assert_launches(distance, "dim", at=(1, 2**30))
    said = failure("assert_launches", one_by_one, "batch")
    assert " kernels at batch 256, and " in said
    assert " at batch 16: " in said
    assert " pow" in said.partition("\n")[0]
    assert 'one_by_one(\n    x=torch.empty([256, 1], dtype=torch.float32, device="meta")' in said
    assert "kernels at batch 4096, and " in failure("assert_launches", in_blocks, "batch")
    testing.assert_launches(in_blocks, "batch", at=(16, 1000))
    testing.assert_launches(one_by_one, "dim", sizes={"batch": 3})


def test_kernels_are_few():
    def plain(x, y, *, weight):
        return weight * (x - y).square().sum(1).mean()

    def formula(x: Tensor) -> Tensor:
        return x.square().sum() / len(x)

    testing.assert_launches(distance, "batch", at_most=16, plain=plain, times=1.5)
    said = failure("assert_launches", distance, "batch", at_most=3)
    assert "kernels at batch 16, more than 3: " in said
    said = failure("assert_launches", one_by_one, "batch", plain=formula, at=(64,))
    assert "kernels at batch 64, more than 4 times the formula's " in said


def test_what_waits_for_the_device_fails():
    for fn in (waiting, measured):
        assert "meta" in failure("assert_launches", fn, "batch")


@torch.library.custom_op("counting::halved", mutates_args=())
def halved(x: Tensor) -> Tensor:
    return torch.cat([row[None] / 2 for row in x])


halved.register_fake(torch.empty_like)


def test_a_custom_operator_is_what_its_body_calls():
    def loss(x: Float[Tensor, "batch dim"]) -> Float[Tensor, ""]:
        return halved(x.detach()).sum()

    count = launches(loss, {"x": torch.empty(5, 2, device="meta")})
    assert count.kernels == {"div": 5, "cat": 1, "sum": 1}
    assert " div" in failure("assert_launches", loss, "batch", at=(4, 8))


def test_bytes_and_operations_are_counted():
    x, w = torch.empty(8, 4, device="meta"), torch.empty(2, 4, device="meta").requires_grad_()
    count = launches(lambda x, w: x @ w.T, {"x": x, "w": w})
    # x @ w.T, and its gradient with respect to w alone, which requires one.
    assert count.flops == {"float32": 2 * (2 * 8 * 4 * 2)}
    expanded = torch.empty(1, 1, device="meta").expand(1000, 1000)
    assert launches(lambda x: x.sum(), {"x": expanded.long()}).bytes < 8 * 1000**2 + 100
    parameter = nn.Parameter(torch.empty(3, device="meta"))
    count = launches(lambda xs: (xs[0] * 2).sum(), {"xs": [parameter]})
    assert count.kernels["mul"] == 2, "the backward pass by a parameter"


def test_other_sizes_are_those_that_are_asked_for():
    seen = []

    def fn(x: Float[Tensor, "batch dim"], at: Int[Tensor, " batch"]) -> Float[Tensor, ""]:
        seen.append((x.shape, x.device.type, at.device.type))
        return x.sum()

    overrides = {"at": lambda sizes: torch.arange(sizes["batch"])}
    testing.assert_launches(fn, "batch", sizes={"dim": 7}, at=(2, 5), overrides=overrides)
    assert {(tuple(shape), *devices) for shape, *devices in seen} == {
        ((2, 7), "meta", "meta"),
        ((5, 7), "meta", "meta"),
    }
    with pytest.raises(ValueError, match="fn has no axis n, only batch, dim"):
        testing.assert_launches(fn, "n")
    with pytest.raises(ValueError, match="the size of batch is that of a given tensor"):
        testing.assert_launches(fn, "batch", overrides={"at": torch.arange(3)})
    with pytest.raises(ValueError, match="needs sizes in at, got none"):
        testing.assert_launches(fn, "batch", at=())
