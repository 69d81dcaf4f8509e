"""`assert_masked`: what a mask leaves out reaches neither value nor gradient."""

import math
import re

import pytest
import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from jaxtyping import Bool, Float, Int
from torch import Tensor

import termwise as tw
from termwise import testing

LABELS = {"elements": {"labels": st.integers(-1, 1)}, "sizes": {"classes": 2}}
COUNTS = {"logits": lambda labels: labels >= 0}


def mean(each: Tensor, mask: Tensor | None) -> Tensor:
    return each.mean() if mask is None else each.where(mask, 0).sum() / mask.sum().clamp(min=1)


def right(
    x: Float[Tensor, "batch dim"],
    w: Float[Tensor, " dim"],
    mask: Bool[Tensor, " batch"] | None = None,
) -> Float[Tensor, ""]:
    kept = x if mask is None else x.where(mask[:, None], 0)
    return mean((kept @ w).square(), mask)


def multiplied(
    x: Float[Tensor, "batch dim"], mask: Bool[Tensor, " batch"] | None = None
) -> Float[Tensor, ""]:
    if mask is None:
        return x.square().mean()
    return (x.square().sum(1) * mask).sum() / mask.sum().clamp(min=1)


def selected_late(
    x: Float[Tensor, "batch dim"], w: Float[Tensor, " dim"], mask: Bool[Tensor, " batch"]
) -> Float[Tensor, ""]:
    return mean((x @ w).square(), mask)  # NaN * 0 in the gradients


def forgotten(x: Float[Tensor, "batch dim"], mask: Bool[Tensor, " batch"]) -> Float[Tensor, ""]:
    return x.where(mask[:, None], 0).square().sum() / mask.numel() + x.nan_to_num(0, 0, 0).mean()


def divided(x: Float[Tensor, "batch dim"], mask: Bool[Tensor, " batch"]) -> Float[Tensor, ""]:
    return x[mask].square().mean()


def repaired(x: Float[Tensor, "batch dim"], mask: Bool[Tensor, " batch"]) -> Float[Tensor, ""]:
    kept = x.where(~x.isnan(), 0) * mask[:, None]  # an infinity is not repaired
    return kept.sum() / mask.sum().clamp(min=1)


def detached(x: Float[Tensor, "batch dim"], mask: Bool[Tensor, " batch"]) -> Float[Tensor, ""]:
    centred = x - x.where(mask[:, None], 0).detach().amax(0)
    return mean(centred.square().sum(1), mask)


def segmented(
    logits: Float[Tensor, "batch classes pixels"], labels: Int[Tensor, "batch pixels"]
) -> Float[Tensor, ""]:
    counts = labels >= 0
    each = F.cross_entropy(
        logits.where(counts[:, None], 0), labels, ignore_index=-1, reduction="none"
    )
    return mean(each, counts)


def unguarded(
    logits: Float[Tensor, "batch classes pixels"], labels: Int[Tensor, "batch pixels"]
) -> Float[Tensor, ""]:
    return F.cross_entropy(logits, labels, ignore_index=-1)


def said(fn, *arguments, **options) -> str:
    with pytest.raises(AssertionError) as broken:
        testing.assert_masked(fn, *arguments, **options)
    text = str(broken.value)
    assert text.startswith(f"assert_masked: {fn.__name__}: ")
    assert f"\n{fn.__name__}(\n" in text  # the call as code
    return text.partition("\n")[0].removeprefix(f"assert_masked: {fn.__name__}: ")


def test_right_losses_pass():
    testing.assert_masked(right, max_examples=30)
    testing.assert_masked(right, "mask", arguments=["x"])
    testing.assert_masked(divided, nothing=math.nan)
    testing.assert_masked(segmented, "labels", arguments=COUNTS, **LABELS, max_examples=30)


@pytest.mark.parametrize(
    ("fn", "says"),
    [
        (
            multiplied,
            r"result is nan if mask excludes everything, with NaN in the excluded elements \(pass",
        ),
        (
            selected_late,
            r"the gradient with respect to x is nan if mask excludes everything, "
            r"with NaN in the excluded elements$",
        ),
        (
            forgotten,
            r"the gradient with respect to x is 0\.\d+ if"
            r"|the gradient with respect to x is .* for an element that",
        ),
        (divided, r"result is nan if mask excludes everything \(pass nothing= if this is expected"),
        (repaired, r"result is .*, but nan with inf in the elements of x that mask excludes"),
        (
            detached,
            r"the gradient with respect to x is nan if mask excludes everything, with NaN in",
        ),
    ],
)
def test_faults_are_found(fn, says):
    assert re.match(says, said(fn))


def test_a_label_is_a_mask():
    text = said(unguarded, "labels", arguments=COUNTS, **LABELS)
    assert text.startswith("result is nan if labels excludes everything")
    text = said(unguarded, "labels", arguments=COUNTS, **LABELS, nothing=math.nan)
    assert re.match(
        r"the gradient with respect to logits is .*, but nan with nan in the elements of log", text
    )


def test_what_nothing_gives_is_as_documented():
    assert said(right, nothing=1.0) == (
        "result is 0 if mask excludes everything, but nothing= says 1"
    )
    assert "no ValueError is raised if mask excludes everything" in said(right, nothing=ValueError)

    def refusing(x: Float[Tensor, "batch dim"], mask: Bool[Tensor, " batch"]) -> Float[Tensor, ""]:
        if not mask.any():
            raise ValueError("refusing needs a row that counts")
        return divided(x, mask)

    testing.assert_masked(refusing, nothing=ValueError)
    assert "ValueError: refusing needs" in said(refusing)


@tw.terms
class HingeTerms(tw.Terms):
    each: Float[Tensor, " batch"]
    share: Float[Tensor, ""]


def hinge(x: Float[Tensor, "batch dim"], mask: Bool[Tensor, " batch"]) -> HingeTerms:
    each = x.where(mask[:, None], 0).relu().sum(1)
    share = mask.sum() / max(len(mask), 1)
    return HingeTerms(loss=mean(each, mask), each=each.detach(), share=share.to(x.dtype))


def test_terms_and_rows_of_the_result():
    testing.assert_masked(hinge, nothing={"loss": 0.0, "share": 0.0})
    assert "share is 0 if mask" in said(hinge, nothing={"share": 1.0})
    with pytest.raises(ValueError, match="the result of hinge has no total, only loss, each"):
        testing.assert_masked(hinge, nothing={"total": 1.0})

    def each(
        x: Float[Tensor, "batch dim"], mask: Bool[Tensor, " batch"]
    ) -> Float[Tensor, " batch"]:
        return x.where(mask[:, None], 0).exp().sum(1) + torch.where(mask, 0, torch.nan)

    testing.assert_masked(each)  # what it returns in these places is its own


def test_axes_by_name_and_padding():
    def transposed(
        x: Float[Tensor, "time dim batch"], mask: Bool[Tensor, "batch time"]
    ) -> Float[Tensor, ""]:
        return x.where(mask.T[:, None], 0).square().sum()

    def pairs(d: Float[Tensor, "n n"], mask: Bool[Tensor, " n"]) -> Float[Tensor, ""]:
        return d.where(mask[:, None] & mask, 0).square().sum()

    def padded(x: Float[Tensor, "*batch d"], padding: Bool[Tensor, "*batch"]) -> Float[Tensor, ""]:
        return x.where(~padding[..., None], 0).square().sum()

    testing.assert_masked(transposed)
    testing.assert_masked(pairs)
    testing.assert_masked(padded, "padding", arguments={"x": lambda padding: ~padding})
    assert "if padding excludes everything, with NaN in the excluded elements" in said(
        padded, "padding"
    )

    def by_column(d: Float[Tensor, "n n"], mask: Bool[Tensor, " n"]) -> Float[Tensor, ""]:
        return d.where(mask, 0).square().sum()

    assert re.search("d is .* for an element that|with nan in the elements of d", said(by_column))


def unmasked(x: Float[Tensor, " dim"], mask: Bool[Tensor, " batch"]) -> Float[Tensor, ""]:
    return x.sum()


@pytest.mark.parametrize(
    ("fn", "given", "options", "says"),
    [
        (right, ["maks"], {}, "assert_masked: right takes no maks, only x, w, mask"),
        (right, ["mask"], {"arguments": ["z"]}, "assert_masked: right takes no z, only x, w, mask"),
        (
            right,
            ["mask"],
            {"arguments": ["w"]},
            "w of right is float64[1], without the axes of mask, bool[1]",
        ),
        (
            right,
            ["mask"],
            {"overrides": {"mask": None}},
            "mask kept all or no elements in every call of right",
        ),
        (right, ["mask"], {"sizes": {"batch": 1}}, "in every call of right: pass sizes"),
        (segmented, ["labels"], LABELS, "labels of segmented is int64[1, 1], not boolean"),
        (unmasked, ["mask"], {}, "no floating tensor of unmasked has the axes of mask"),
    ],
)
def test_what_it_says_nothing_about_is_refused(fn, given, options, says):
    with pytest.raises(ValueError, match=re.escape(says)):
        testing.assert_masked(fn, *given, **options)
