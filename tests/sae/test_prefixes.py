"""The prefix lengths of a Matryoshka step: what they are, how they are spread, what is refused."""

import collections
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import termwise as tw
from termwise.sae._prefixes import sample_prefixes

LAWS = ("nabeshima", "saev")


def probabilities(d_sae, law):
    """Write the law out: length -> probability of the first draw."""
    if law == "nabeshima":
        shares = {m: math.sqrt(m) - math.sqrt(m - 1) for m in range(1, d_sae)}
    else:
        shares = {m: (m - 1) ** -0.5 - m**-0.5 for m in range(2, d_sae)}
    total = sum(shares.values())
    return {m: share / total for m, share in shares.items()}


def draws(d_sae, n, law, times, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [sample_prefixes(d_sae, n, law=law, generator=generator) for _ in range(times)]


@given(
    d_sae=st.integers(1, 300),
    law=st.sampled_from(LAWS),
    seed=st.integers(0, 2**30),
    data=st.data(),
)
def test_lengths_increase_up_to_the_whole(d_sae, law, seed, data):
    n = data.draw(st.integers(1, max(1, d_sae - (law == "saev"))))
    prefixes = sample_prefixes(d_sae, n, law=law, generator=torch.Generator().manual_seed(seed))
    assert type(prefixes) is tuple
    assert all(type(prefix) is int for prefix in prefixes)
    assert len(prefixes) == n
    assert prefixes[-1] == d_sae
    assert list(prefixes) == sorted(set(prefixes))
    assert prefixes[0] >= (1 if law == "nabeshima" else min(2, d_sae))


def test_known_values():
    assert sample_prefixes(1, 1) == (1,)
    assert sample_prefixes(7, 1, law="saev") == (7,)
    assert sample_prefixes(5, 5) == (1, 2, 3, 4, 5)
    assert sample_prefixes(5, 4, law="saev") == (2, 3, 4, 5)


@pytest.mark.parametrize("law", LAWS)
def test_one_draw_follows_the_law(law):
    d_sae, times = 24, 2500
    counts = collections.Counter(first for first, _ in draws(d_sae, 2, law, times))
    expected = probabilities(d_sae, law)
    assert set(counts) <= set(expected)
    statistic = sum(
        (counts[m] - times * share) ** 2 / (times * share) for m, share in expected.items()
    )
    freedom = len(expected) - 1
    assert statistic < freedom + 4 * math.sqrt(2 * freedom)


@pytest.mark.parametrize("law", LAWS)
def test_further_draws_are_without_replacement(law):
    # P{a, b} = P(a) P(b) / (1 - P(a)) + P(b) P(a) / (1 - P(b))
    d_sae, times = 8, 2500
    counts = collections.Counter(drawn[:2] for drawn in draws(d_sae, 3, law, times))
    share = probabilities(d_sae, law)
    expected = {
        (a, b): share[a] * share[b] * (1 / (1 - share[a]) + 1 / (1 - share[b]))
        for a in share
        for b in share
        if a < b
    }
    assert sum(expected.values()) == pytest.approx(1)
    statistic = sum(
        (counts[pair] - times * part) ** 2 / (times * part) for pair, part in expected.items()
    )
    freedom = len(expected) - 1
    assert statistic < freedom + 4 * math.sqrt(2 * freedom)


@pytest.mark.parametrize("d_sae", [1024, 16384])
def test_medians(d_sae):
    times = 401
    middle = {law: sorted(p for p, _ in draws(d_sae, 2, law, times))[times // 2] for law in LAWS}
    assert middle["nabeshima"] == pytest.approx(d_sae / 4, rel=0.2)
    assert 3 <= middle["saev"] <= 5


def test_nothing_is_cancelled_at_a_large_width():
    # 1 / sqrt(m - 1) - 1 / sqrt(m) is 0 in float32 from about a million on.
    assert len(set(sample_prefixes(2**21, 4000, law="saev"))) == 4000


def test_the_generator_decides():
    one, two = draws(512, 5, "nabeshima", 2)
    assert one != two
    assert draws(512, 5, "nabeshima", 2) == [one, two]
    torch.manual_seed(3)
    globally = sample_prefixes(512, 5)
    assert globally == draws(512, 5, "nabeshima", 1, seed=3)[0]


@pytest.mark.parametrize(
    ("arguments", "law", "message"),
    [
        ((0, 1), "nabeshima", "sample_prefixes needs d_sae >= 1, got 0"),
        (
            (4, 0),
            "nabeshima",
            'sample_prefixes needs n in 1..4 for d_sae 4 under "nabeshima", got 0',
        ),
        (
            (4, 5),
            "nabeshima",
            'sample_prefixes needs n in 1..4 for d_sae 4 under "nabeshima", got 5',
        ),
        ((4, 4), "saev", 'sample_prefixes needs n in 1..3 for d_sae 4 under "saev", got 4'),
        ((1, 2), "saev", 'sample_prefixes needs n in 1..1 for d_sae 1 under "saev", got 2'),
    ],
)
def test_values_that_make_no_sense_are_refused(arguments, law, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        sample_prefixes(*arguments, law=law)


def test_wrong_types_are_refused():
    with pytest.raises(tw.ContractError, match=r'sample_prefixes: law needs Literal\["nabeshima"'):
        sample_prefixes(8, 2, law="pareto")
    with pytest.raises(tw.ContractError, match="sample_prefixes: n needs int, got float 2.0"):
        sample_prefixes(8, 2.0)
    with pytest.raises(ValueError, match="needs a generator on cpu, got meta"):
        sample_prefixes(8, 2, generator=_Elsewhere())


class _Elsewhere(torch.Generator):
    device = torch.device("meta")
