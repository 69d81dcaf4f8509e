"""The laws: a right loss passes them, and each planted defect is found by the one meant for it."""

import re
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from jaxtyping import Float, Int
from torch import Tensor
from vicreg_like import DEFECTS, ViewTerms, formula, right

import termwise as tw
from termwise import testing

SIZES = {"sizes": {"batch": st.integers(2, 4)}}
WEIGHTS = {"sim": "sim_weight", "var": "var_weight", "cov": "cov_weight"}
EAGER = {"compiled": False, "max_examples": 3}
DEGREES = {"sim": 2, "cov": 4}

# Defect, the law that is meant to find it, what the law is given, and what it says.
FOUND = [
    ("not centred", "assert_shift_invariant", ("batch",), {}, r"(loss|var|cov|std) is .*shifted"),
    ("n for n-1", "assert_formula", (formula,), {}, r"cov is [\d.]+, the formula's [\d.]+"),
    ("diagonal kept", "assert_formula", (formula,), {}, r"cov is [\d.]+, the formula's 0\n"),
    ("one view ignored", "assert_symmetric", ("z1", "z2"), {}, "where z1 and z2 change places"),
    ("eps outside", "assert_finite", (), {}, r"gradient by z1 is nan for (zeros|arguments)"),
    ("repaired", "assert_finite", (), {}, "a NaN in z1 does not reach the result"),
    ("weights swapped", "assert_terms_sum", (WEIGHTS,), {}, r"loss is .*, the terms' sum "),
    ("diagnostic in graph", "assert_terms_sum", (WEIGHTS,), {}, "std is not detached"),
    ("dtype leak", "assert_contract", (), EAGER, r"loss is float32\[\], and the .* float64"),
    ("no contract", "assert_contract", (), EAGER, r"z[12] is broken \(.*\), and"),
    ("field's shape", "assert_contract", (), EAGER, r"the result's std needs .* got float"),
    (
        "field's shape, no contract",
        "assert_contract",
        (),
        EAGER,
        r'the result\'s std needs Float\[Tensor, " dim"\], got float32\[1, 1\]',
    ),
    ("in-place", "assert_pure", (), {}, "z1 is changed in place"),
    ("global noise", "assert_pure", (), {}, "the global generator's state is changed"),
    ("memory", "assert_pure", (), {}, r"of the same call is .*, then "),
    ("last row dropped", "assert_permutation_invariant", ("batch",), {}, r"in the order \[1, 0\]"),
    ("no square", "assert_scale", (("z1", "z2"), DEGREES), {}, "sim is .*for 2 times z1, z2.* 2"),
    ("wrong backward", "assert_gradients", (), {}, r"gradient by z1 is .*, by finite differences"),
    ("branch", "assert_compiles", (), {}, "compiled, Unsupported: "),
    ("no vmap rule", "assert_vmaps", (), {}, "under vmap, RuntimeError: .*autograd.Function"),
]


@pytest.mark.parametrize(("defect", "law", "given", "options", "says"), FOUND, ids=lambda v: v)
def test_defect_is_found_by_its_law(defect, law, given, options, says):
    check = getattr(testing, law)
    check(right, *given, **options, **SIZES)
    with pytest.raises(AssertionError) as failure:
        check(DEFECTS[defect], *given, **options, **SIZES)
    text = str(failure.value)
    problem, _, code = text.partition("\n\n")
    name = DEFECTS[defect].__name__
    assert re.match(f"{law}: {name}: ", problem)
    assert re.search(says, problem + "\n"), problem
    assert "\n" not in problem
    assert code.startswith(f"from vicreg_like import {name}\n")
    assert f"\n{name}(\n    z1=torch.tensor(" in code
