"""InfoNCE: classify the key of each query, as in CLIP, MoCo and dense retrieval."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from .._coefficients import is_zero
from .._contract import contract
from .._groups import GradReduction, ProcessGroup
from .._means import means_over_rows
from .._module import LossModule
from .._numbers import alike, lifted
from .._terms import Terms, terms
from ._contrast import contrast, row_products, unit_rows


@terms
class InfoNCETerms(Terms):
    """Terms of [`info_nce_loss`][termwise.joint_embedding.info_nce_loss]."""

    loss: Float[Tensor, ""]
    """(forward + backward) / 2, in nats."""
    forward: Float[Tensor, ""]
    """Cross-entropy of a query's key among the candidates, mean over the queries; detached."""
    backward: Float[Tensor, ""]
    """Cross-entropy of a key's query among the queries, mean over the keys; equal to `forward`
    unless symmetric; detached."""
    accuracy: Float[Tensor, ""]
    """Fraction of queries whose most similar candidate (or a tied one) is their key; detached."""
    alignment: Float[Tensor, ""]
    """Cosine of a query and its key, mean over the queries; detached."""


@contract
def info_nce_loss(
    queries: Float[Tensor, "batch dim"],
    keys: Float[Tensor, "candidates dim"],
    *,
    scale: float | Float[Tensor, ""],
    bias: float | Float[Tensor, ""] = 0.0,
    positives: Int[Tensor, " batch"] | None = None,
    negatives: Float[Tensor, "queue dim"] | None = None,
    symmetric: bool = False,
    normalize: bool = True,
    batch_group: ProcessGroup | None = None,
    grad_reduction: GradReduction = "mean",
) -> InfoNCETerms:
    r"""Classify which candidate belongs to each query, by the cosines of their embeddings.

    $$L_{ij} = \mathrm{scale} \cdot \cos(q_i, k_j) + \mathrm{bias}, \qquad
    \mathrm{forward} = \frac{1}{n} \sum_i \log \sum_j e^{L_{ij}} - L_{i p_i}$$

    $$\mathrm{backward} = \frac{1}{n} \sum_j \log \sum_i e^{L_{ij}} - L_{jj}
    \quad \text{(symmetric)}$$

    with $p_i$ the key of query i, and `loss = (forward + backward) / 2`, which is `forward` unless
    symmetric. For CLIP, pass `symmetric=True`; for ranking with hard negatives, more keys than
    queries; for MoCo, the queue as `negatives`.

    Above 2^17 logits, and with a group, they are formed in strips, and no batch x candidates tensor
    is stored. Near convergence the value and the gradient in float32 keep their relative precision,
    up to the rounding of the logits, which grows with scale: see `tests/bench/bench_contrast.py`.
    Half precision is converted to float32 first, with or without autocast. A non-finite input makes
    the loss non-finite.

    Args:
        queries (Float[Tensor, "batch dim"]): one embedding for each sample. For a feature map, or
            tokens, `einops.rearrange(x, "b c h w -> (b h w) c")` makes each position a sample,
            whose key is that of the same position; if pooled to "b c", each image is one.
        keys (Float[Tensor, "candidates dim"]): embeddings that each query is compared with,
            including the keys of other queries. With `negatives`, only its own key.
        scale (float | Float[Tensor, ""]): factor of the cosines, 1 / temperature: exp(logit_scale)
            in CLIP, initially 1 / 0.07; 1 / 0.2 in MoCo v2. Pass a tensor to learn it.
        bias (float | Float[Tensor, ""]): added to every logit, for models that were trained with a
            sigmoid loss. It cancels: it has no effect, and its gradient is 0.
        positives (Int[Tensor, " batch"] | None): for each query, which of *this rank's* keys is its
            own. None: the key with the same index. An index out of range makes the loss NaN.
        negatives (Float[Tensor, "queue dim"] | None): embeddings that every query is compared with
            instead of the other queries' keys, such as MoCo's queue; the same on every rank. No
            gradient.
        symmetric: whether to average with the loss of classifying the query of each key.
        normalize: whether to divide embeddings by their norms. False: logits are scale * q k^T +
            bias.
        batch_group: process group whose ranks hold different samples, in any numbers, 0 included.
            None: no communication. A sample is a query with its keys.
        grad_reduction: how the trainer combines the ranks' gradients: "mean" (DDP, FSDP) or "sum".
            Without a group it has no effect.

    Returns:
        The terms over the queries of all ranks, each compared with the keys of all ranks; the same
        on every rank. Gradients, combined over ranks as `grad_reduction` says, equal those of one
        process that holds all rows; that with respect to a learnt scale is each rank's share,
        combined like those of other parameters. Second derivatives are correct up to 2^17 logits
        without a group, and raise NotImplementedError beyond and with one.

        Communication of each rank, for d = dim, N keys over all ranks, n of this rank, in elements
        of the embeddings' dtype (float32 for half precision) but for counts: its n * d keys are
        sent to the others and (N - n) * d received, the gradients of N * d keys are
        reduce-scattered; symmetric, 3 sums of N (2 of them in float64); 2 sums of at most 5; also
        under `torch.no_grad()`. With `negatives` only those 2 sums. The numbers of keys are read on
        the host, so with a group and without `negatives` a call synchronizes with the device.

    Raises:
        ContractError: an argument does not have the shape or dtype of its annotation.
        ValueError: fewer keys than queries without `positives`; no keys; dim of 0; symmetric with
            `positives`, `negatives` or other numbers of keys and queries.

    References:
        van den Oord et al., Representation learning with contrastive predictive coding (2018),
        https://arxiv.org/abs/1807.03748, equation 4. Radford et al., CLIP (2021),
        https://arxiv.org/abs/2103.00020, figure 3: symmetric, with a scale that multiplies, as in
        open_clip 3.3.0 (`ClipLoss`), whose side we take; SimCLR, MoCo, lightly and
        pytorch-metric-learning divide by a temperature. He et al., MoCo (2020),
        https://arxiv.org/abs/1911.05722, equation 1: a query against its key and the queue; MoCo
        v3 multiplies the loss by 2 * temperature.

    Examples:
        >>> import torch
        >>> from termwise.joint_embedding import info_nce_loss
        >>> images = texts = torch.eye(4)  # the loss is log(1 + 3 exp(-scale))
        >>> terms = info_nce_loss(images, texts, scale=2.0, symmetric=True)
        >>> terms.loss, terms.accuracy
        (tensor(0.3408), tensor(1.))
    """
    batch, candidates = queries.shape[0], keys.shape[0]
    if positives is None and candidates < batch:
        raise ValueError(
            f"info_nce_loss needs a key for each query, got {batch} queries and {candidates} keys: "
            f"pass positives where queries share keys"
        )
    if symmetric and (positives is not None or negatives is not None or candidates != batch):
        raise ValueError(
            f"info_nce_loss needs one key for each query and neither positives nor negatives if "
            f"symmetric, got {batch} queries and {candidates} keys"
        )
    together = (queries, keys) if negatives is None else (queries, keys, negatives.detach())
    rows, columns, *queue = map(lifted, alike(*together))
    if normalize:
        rows, columns, *queue = map(unit_rows, (rows, columns, *queue))
    if positives is None:
        own = columns if candidates == batch else columns[:batch]
        positives = torch.arange(batch, device=rows.device)
    else:
        stray = (positives < 0) | (positives >= candidates)
        rows = rows.masked_fill(stray[:, None], torch.nan)
        positives = positives.clamp(0, max(candidates - 1, 0))
        own = columns[positives]
    if negatives is None:
        found = contrast(
            rows,
            columns,
            scale,
            positive=positives,
            symmetric=symmetric,
            group=batch_group,
            grad_reduction=grad_reduction,
            caller="info_nce_loss",
        )
    else:
        found = contrast(
            rows,
            queue[0],
            scale,
            given=row_products(rows, own) * scale,
            group=batch_group,
            grad_reduction=grad_reduction,
            caller="info_nce_loss",
        )
    pair = rows.detach(), own.detach()
    cosines = row_products(*(pair if normalize else map(unit_rows, pair)))
    (alignment,) = means_over_rows([cosines], None, batch_group, grad_reduction)
    return InfoNCETerms(
        # The bias is added to every logit, and cancels; if it is not finite the loss is NaN.
        loss=found.loss if is_zero(bias) else found.loss + (bias - bias),
        forward=found.forward,
        backward=found.backward,
        accuracy=found.accuracy,
        alignment=alignment,
    )


class InfoNCELoss(LossModule):
    """[`info_nce_loss`][termwise.joint_embedding.info_nce_loss] as a module.

    Has no parameters and stores no process group: pass a learnt scale and the group with each call.

    Examples:
        >>> import torch
        >>> from termwise.joint_embedding import InfoNCELoss
        >>> loss_fn = InfoNCELoss(symmetric=True)
        >>> logit_scale = torch.tensor(2.0).log().requires_grad_()
        >>> loss_fn(torch.eye(4), torch.eye(4), scale=logit_scale.exp()).metrics()["loss"]
        0.340...
    """

    symmetric: bool = False
    normalize: bool = True
    grad_reduction: GradReduction = "mean"

    def __call__(
        self,
        queries: Float[Tensor, "batch dim"],
        keys: Float[Tensor, "candidates dim"],
        *,
        scale: float | Float[Tensor, ""],
        bias: float | Float[Tensor, ""] = 0.0,
        positives: Int[Tensor, " batch"] | None = None,
        negatives: Float[Tensor, "queue dim"] | None = None,
        batch_group: ProcessGroup | None = None,
    ) -> InfoNCETerms:
        """Compute the terms of the loss of queries and keys."""
        return info_nce_loss(
            queries,
            keys,
            scale=scale,
            bias=bias,
            positives=positives,
            negatives=negatives,
            batch_group=batch_group,
            **self.hyperparameters(),
        )
