"""Losses along slices over ranks: the slices are the same, and verified; what is sent."""

import pytest
import slices_cases as cases
import torch

NAMES = list(cases.LOSSES)
EXACT = {"rtol": 1e-12, "atol": 1e-12}
SIZES = [5, 0, 11]


def shards(sizes=SIZES, dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    z = torch.randn(2, sum(sizes), 4, generator=generator, dtype=torch.float64) * 2 + 1
    return [part.to(dtype) for part in z.split(sizes, dim=1)]


def unit(count=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.nn.functional.normalize(torch.randn(4, count, generator=generator), dim=0)


@pytest.mark.parametrize("name", NAMES)
def test_generators_of_one_seed_are_one_process(ranks, name):
    parts = shards()
    expected, gradient = cases.seeded(None, name, torch.cat(parts, 1), 3)
    results = ranks(cases.seeded, [name] * 3, parts, [3] * 3)
    for terms, _ in results:
        torch.testing.assert_close(terms, expected, **EXACT)
    total = torch.cat([own for _, own in results], 1) / 3
    torch.testing.assert_close(total, gradient, **EXACT)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("seeds", "counts"), [((3, 3, 4), (5, 5, 5)), ((3, 3, 3), (5, 5, 6))])
def test_generators_of_other_seeds_are_refused_on_every_rank(ranks, name, seeds, counts):
    said = ranks(cases.seeded, [name] * 3, shards(), list(seeds), list(counts))
    message = f"{name}_loss needs the same slices on every rank, got different ones: pass slices"
    assert all(one.startswith(message) for one in said)


def changed(how):
    slices = unit()
    if how == "a bit":
        slices[1, 2] = torch.nextafter(slices[1, 2], torch.tensor(9.0))
    return {"columns": slices.flip(1), "rows": slices.flip(0)}.get(how, slices)


@pytest.mark.parametrize("how", ["a bit", "columns", "rows"])
def test_other_slices_are_refused_on_every_rank(ranks, how):
    own = [unit(), unit(), changed(how)]
    said = ranks(cases.refusal, ["sigreg"] * 3, shards(), own)
    assert ["the same slices on every rank" in one for one in said] == [True] * 3


def test_compiled_the_terms_are_nan_where_slices_differ(ranks):
    for other in ("nothing", "a bit"):
        results = ranks(cases.compiled, ["sigreg"] * 2, shards([3, 2]), [unit(), changed(other)])
        for terms, gradient in results:
            for value in (*terms.values(), gradient):
                assert value.isnan().all() == (other == "a bit")


def test_rows_are_counted_as_integers(ranks):
    # 1001 rows are 1000 in bfloat16, and 777 + 224 are 1000 too.
    parts = [torch.zeros(2, n, 4, dtype=torch.bfloat16) for n in (777, 0, 224)]
    for terms, _ in ranks(cases.seeded, ["sigreg"] * 3, parts, [3] * 3):
        assert terms["loss"].item() == pytest.approx(0.4020475797316646 * 1001, rel=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_ranks_may_differ_in_grad_mode(ranks, name):
    expected = cases.LOSSES[name](torch.cat(shards(), 1), slices=unit())
    for terms in ranks(cases.without_gradients_on_one_rank, [name] * 3, shards(), [unit()] * 3):
        torch.testing.assert_close(terms, cases.values(expected), **EXACT)


@pytest.mark.parametrize("name", NAMES)
def test_second_derivatives_are_refused_by_name(ranks, name):
    for said in ranks(cases.second_derivative, [name] * 2, shards([3, 2]), [unit()] * 2):
        assert "has no second derivative" in said


@pytest.mark.parametrize("name", NAMES)
def test_traffic_is_what_the_docstring_says(ranks, name):
    sizes, views, dim, count, world, knots = [6, 2], 2, 4, 10, 2, 17
    parts = shards(sizes, torch.float32)
    for rank, sent in enumerate(ranks(cases.traffic, [name] * 2, parts, [unit(count)] * 2)):
        assert sent["torch.int64"] == 2 * world
        waves = 2 * views * count * (knots - 1)
        columns = 2 * views * dim
        assert (
            sent["torch.float64"]
            == {
                "sigreg": waves + columns,
                "lejepa": waves,
                "visreg": columns + 1,
            }[name]
        )
        assert sent.get("torch.float32", 0) == {"sigreg": 0, "lejepa": 1, "visreg": 1}[name]
        share, own = sum(sizes) * views * count // world, sizes[rank] * views * count
        exchanged = own + share if name == "visreg" else 0
        assert sent["out"] == sent["in"] == exchanged
