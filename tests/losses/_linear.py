"""What the losses of a linear head share."""

from hypothesis import strategies as st

SOFTCAPS = st.sampled_from((None, 2.0))
# Over a sequence_group the gradient of a weight is a share, to be summed: tests/distributed.
HEAD_GROUPS = {"batch_group": ("batch", {}), "vocab_group": None, "sequence_group": None}
# Few logits are computed as written, more in blocks.
HEAD_PATHS = ({}, {"termwise.lm._linear_rows.FEW": 0})


def head(hidden, weight, bias, softcap):
    """Return the logits."""
    x = hidden @ weight.T
    x = x if bias is None else x + bias
    return x if softcap is None else softcap * (x / softcap).tanh()
