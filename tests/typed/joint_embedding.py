"""What a type checker knows of the joint-embedding losses. Never run: pyright and mypy read it."""

from typing import assert_type

from torch import Generator, Tensor
from torch.distributed import ProcessGroup

from termwise.joint_embedding import (
    BarlowTwinsLoss,
    BarlowTwinsTerms,
    DecoupledContrastiveLoss,
    DecoupledContrastiveTerms,
    DINOLoss,
    DINOTerms,
    GramAnchorLoss,
    GramAnchorTerms,
    IBOTLoss,
    IBOTTerms,
    InfoNCELoss,
    InfoNCETerms,
    KoLeoLoss,
    KoLeoTerms,
    LeJEPALoss,
    LeJEPATerms,
    MMCRLoss,
    MMCRTerms,
    MultiViewVICRegLoss,
    MultiViewVICRegTerms,
    NTXentLoss,
    NTXentTerms,
    PredictiveCosineLoss,
    PredictiveCosineTerms,
    SigmoidContrastiveLoss,
    SigmoidContrastiveTerms,
    SIGRegLoss,
    SIGRegTerms,
    SupervisedContrastiveLoss,
    SupervisedContrastiveTerms,
    SwappedPredictionLoss,
    SwappedPredictionTerms,
    VarianceCovarianceLoss,
    VarianceCovarianceTerms,
    VICRegLoss,
    VICRegTerms,
    VISRegLoss,
    VISRegTerms,
    barlow_twins_loss,
    centered_softmax,
    decoupled_contrastive_loss,
    dino_loss,
    gram_anchor_loss,
    ibot_loss,
    info_nce_loss,
    koleo_loss,
    lejepa_loss,
    mmcr_loss,
    multi_view_vicreg_loss,
    nt_xent_loss,
    predictive_cosine_loss,
    sigmoid_contrastive_loss,
    sigreg_loss,
    sinkhorn,
    supervised_contrastive_loss,
    swapped_prediction_loss,
    updated_center,
    variance_covariance_loss,
    vicreg_loss,
    visreg_loss,
)


def functions(z1: Tensor, z2: Tensor, group: ProcessGroup) -> None:
    terms = vicreg_loss(z1, z2, variance_views="mean", batch_group=group)
    assert_type(terms, VICRegTerms)
    assert_type(terms.metrics(), dict[str, float])
    assert_type(terms.detach(), VICRegTerms)
    for name, value in terms.items():
        assert_type(name, str)
        assert_type(value, Tensor)
    for field in (terms.loss, terms.sim, terms.var, terms.cov, terms.std, terms.rank):
        assert_type(field, Tensor)


def modules(z1: Tensor, z2: Tensor, group: ProcessGroup) -> None:
    loss_fn = VICRegLoss(sim_weight=25, covariance_path="gram")
    assert_type(loss_fn(z1, z2), VICRegTerms)
    assert_type(loss_fn(z1, z2, batch_group=group), VICRegTerms)
    assert_type(loss_fn.gamma, float)


def pairs_and_patches(a: Tensor, b: Tensor, bias: Tensor, group: ProcessGroup) -> None:
    pairs = sigmoid_contrastive_loss(a, b, scale=10.0, bias=bias, batch_group=group)
    assert_type(pairs, SigmoidContrastiveTerms)
    for field in (pairs.loss, pairs.positive, pairs.negative, pairs.accuracy):
        assert_type(field, Tensor)
    spread = koleo_loss(a, top_k=2, group_size=16, batch_group=group)
    assert_type(spread, KoLeoTerms)
    for field in (spread.loss, spread.nearest_distance, spread.min_distance):
        assert_type(field, Tensor)
    patches = gram_anchor_loss(a, b, negatives="keep", level="batch", batch_group=group)
    assert_type(patches, GramAnchorTerms)
    for field in (patches.loss, patches.agreement):
        assert_type(field, Tensor)

    of_pairs = SigmoidContrastiveLoss(normalize=False)
    assert_type(of_pairs(a, b, scale=bias, bias=-10), SigmoidContrastiveTerms)
    assert_type(of_pairs.normalize, bool)
    assert_type(KoLeoLoss(eps=1e-6)(a, batch_group=group), KoLeoTerms)
    assert_type(GramAnchorLoss(negatives="teacher")(a, b), GramAnchorTerms)


def slices(z: Tensor, a: Tensor, generator: Generator, group: ProcessGroup) -> None:
    terms = sigreg_loss(z, slices=a, per_sample=True, batch_group=group)
    assert_type(terms, SIGRegTerms)
    for field in (terms.loss, terms.mean_square, terms.std, terms.worst_slice):
        assert_type(field, Tensor)
    assert_type(SIGRegLoss(knots=9)(z, generator=generator, batch_group=group), SIGRegTerms)
    views = lejepa_loss(z, num_global=2, centre="global", generator=generator)
    assert_type(views, LeJEPATerms)
    assert_type(views.invariance, Tensor)
    assert_type(LeJEPALoss(convex=False)(z, slices=a), LeJEPATerms)
    of_quantiles = visreg_loss(z, num_slices=64, grad_reduction="sum")
    assert_type(of_quantiles, VISRegTerms)
    for field in (of_quantiles.center, of_quantiles.scale, of_quantiles.shape):
        assert_type(field, Tensor)
    assert_type(VISRegLoss(weight=0.6)(z, batch_group=group), VISRegTerms)
    assert_type(VISRegLoss().eps, float)


def prototypes(logits: Tensor, index: Tensor, center: Tensor, group: ProcessGroup) -> None:
    probs = sinkhorn(logits, temperature=0.05, batch_group=group)
    assert_type(probs, Tensor)
    assert_type(centered_softmax(logits, center, temperature=0.04), Tensor)
    assert_type(updated_center(center, logits, batch_group=group), Tensor)
    terms = dino_loss(logits, probs, same_view="keep", over_pairs="sum", batch_group=group)
    assert_type(terms, DINOTerms)
    assert_type(terms.marginal_entropy, Tensor)
    assert_type(DINOLoss(temperature=0.2)(logits, probs, batch_group=group), DINOTerms)
    assert_type(ibot_loss(logits, probs, index, images=4, over="patches"), IBOTTerms)
    assert_type(IBOTLoss()(logits, probs, index, images=4, batch_group=group), IBOTTerms)
    assert_type(swapped_prediction_loss(logits, queue=logits), SwappedPredictionTerms)
    assert_type(SwappedPredictionLoss(num_global=2)(logits), SwappedPredictionTerms)


def second_moments(z: Tensor, z1: Tensor, z2: Tensor, group: ProcessGroup) -> None:
    many = multi_view_vicreg_loss(z, num_global=2, batch_group=group)
    assert_type(many, MultiViewVICRegTerms)
    assert_type(many.invariance, Tensor)
    assert_type(MultiViewVICRegLoss(num_global=None)(z, batch_group=group), MultiViewVICRegTerms)
    assert_type(variance_covariance_loss(z1, cov_weight=0.1).rank, Tensor)
    assert_type(VarianceCovarianceLoss(gamma=2)(z1), VarianceCovarianceTerms)
    barlow = barlow_twins_loss(z1, z2, correction=1, eps_added_to="deviation", batch_group=group)
    assert_type(barlow, BarlowTwinsTerms)
    assert_type(barlow.on_diagonal, Tensor)
    assert_type(BarlowTwinsLoss(loss_scale=0.025)(z1, z2), BarlowTwinsTerms)
    assert_type(mmcr_loss(z, local_weight=0.1), MMCRTerms)
    assert_type(MMCRLoss(local_weight=0)(z, batch_group=group).centroid_nuclear, Tensor)
    assert_type(predictive_cosine_loss(z1, z2, form="simsiam"), PredictiveCosineTerms)
    assert_type(PredictiveCosineLoss(stop_gradient=False)(z1, z2).cosine, Tensor)


def contrast(z1: Tensor, z2: Tensor, labels: Tensor, group: ProcessGroup) -> None:
    scale, queue = z1.sum(), z2
    clip = info_nce_loss(z1, z2, scale=scale, bias=-10.0, symmetric=True, batch_group=group)
    assert_type(clip, InfoNCETerms)
    assert_type(info_nce_loss(z1, z2, scale=5, negatives=queue, positives=labels), InfoNCETerms)
    assert_type(nt_xent_loss(z1, z2, temperature=0.1, batch_group=group), NTXentTerms)
    assert_type(
        supervised_contrastive_loss(z1, labels, positives="inside", batch_group=group),
        SupervisedContrastiveTerms,
    )
    assert_type(decoupled_contrastive_loss(z1, z2, sigma=0.5), DecoupledContrastiveTerms)
    for field in (clip.loss, clip.forward, clip.backward, clip.accuracy, clip.alignment):
        assert_type(field, Tensor)
    assert_type(InfoNCELoss(symmetric=True)(z1, z2, scale=scale), InfoNCETerms)
    assert_type(NTXentLoss(temperature=0.1)(z1, z2, batch_group=group), NTXentTerms)
    assert_type(
        SupervisedContrastiveLoss(positives="inside")(z1, labels).n_without_positive, Tensor
    )
    assert_type(DecoupledContrastiveLoss(sigma=0.5).sigma, float | None)
