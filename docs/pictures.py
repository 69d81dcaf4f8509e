"""A hook of mkdocs: each loss's page has a picture of it, drawn from the function by the build.

The table says what is varied, over which range, and which terms are drawn. Where nothing that a
user passes is a single number, the sentence says what was chosen instead.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from drawing import Picture, figure
from names import loss_of
from torch import Tensor

import termwise as tw

torch.set_num_threads(1)  # each call is of a few numbers

joint, sae, energy, lm = tw.joint_embedding, tw.sae, tw.energy, tw.lm


def on_page_content(content: str, page: Any, **_: Any) -> str:
    """Put the picture above the formula."""
    picture = PICTURES.get(page.file.src_uri)
    if picture is None:
        return content
    drawn = figure(picture, loss_of(page.file.src_uri))
    return content.replace('<h2 id="formula">', f'{drawn}<h2 id="formula">', 1)


# What the calls are made on. Nothing is random from build to build.


def spread(n: int) -> Tensor:
    """Return n samples of a normal distribution at even steps of probability, one column."""
    at = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    x = torch.special.ndtri(at)
    return (x / x.square().mean().sqrt())[:, None]


def drawn(*shape: int, seed: int = 0) -> Tensor:
    """Return standard normal numbers, always the same ones."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def white(n: int, d: int) -> Tensor:
    """Return n rows whose d columns have mean 0, variance 1, and no covariance."""
    q = torch.linalg.qr(drawn(n, d) - drawn(n, d).mean(0)).Q
    return q * math.sqrt(n - 1)


def at_cosine(c: Tensor, n: int = 8) -> tuple[Tensor, Tensor]:
    """Return two views of n samples: c is the cosine within a pair, all others are 0."""
    eye = torch.eye(2 * n, dtype=torch.float64)
    return eye[:n], c * eye[:n] + (1 - c * c).clamp(min=0).sqrt() * eye[n:]


def at_angle(degrees: Tensor, n: int = 1) -> tuple[Tensor, Tensor]:
    """Return two views of n samples, at an angle to each other and at right angles to others."""
    eye, radians = torch.eye(2 * n, dtype=torch.float64), degrees * (math.pi / 180)
    return eye[:n], radians.cos() * eye[:n] + radians.sin() * eye[n:]


def one_logit(x: Tensor, *rest: float) -> Tensor:
    """Return logits of a vocabulary, the first of which is x: two positions of one sample."""
    row = torch.cat((x[None], torch.tensor(rest, dtype=torch.float64)))
    return torch.stack((row, row))[None]


def gauss(a: Tensor) -> Callable[[Tensor], Tensor]:
    """Return the energy of a normal distribution with standard deviation a."""
    return lambda x: x.square().sum(1) / (2 * a * a)


def log_normal(x: Tensor, a: float | Tensor) -> Tensor:
    """Return the logarithm of the normal density with standard deviation a."""
    return -x.square().sum(-1) / (2 * a * a) - torch.as_tensor(a).log() - math.log(2 * math.pi) / 2


VIEW1 = white(64, 8)[:, :4] @ (torch.eye(4, dtype=torch.float64) + 0.1)
VIEW2 = VIEW1 + 0.4 * white(64, 8)[:, 4:]
VIEW1, VIEW2 = VIEW1 / VIEW1.std(0), VIEW2 / VIEW2.std(0)
WHITE = white(64, 8)
DATA = spread(128)
MIXED = DATA[torch.randperm(128, generator=torch.Generator().manual_seed(1))]
NOISE = torch.stack([DATA[torch.randperm(128, generator=torch.Generator().manual_seed(s))]
                     for s in range(2, 18)])  # fmt: skip
ONE, TOKENS = torch.ones(1, 1, dtype=torch.float64), torch.zeros(1, 2, dtype=torch.int64)
TEACHER = one_logit(torch.tensor(2.0, dtype=torch.float64), 0, 0, 0)
IN_ORDER = lm.align_in_order(*[torch.ones(1, 2, dtype=torch.bool)] * 2)
TO_THREE = lm.VocabProjection.from_pairs(
    {(0, 0): 1.0, (1, 1): 0.5, (1, 2): 0.5}, student_vocab=2, teacher_vocab=3
)
THREE = one_logit(torch.tensor(2.0, dtype=torch.float64), 0, 0)
PAIRED = lm.vocab_partition(TO_THREE, rule="strict")

MODEL = "standard deviation of the model (that of the data is 1)"
COLUMN = "standard deviation of each column (units of z)"
COSINE = "cosine of the two views of a sample"
LOGIT = "student's logit of the token"
ENERGY = "The energy is x² / 2a², the data are normal. "


PICTURES: dict[str, Picture] = {
    # Joint embedding.
    "api/joint_embedding/vicreg.md": Picture(
        lambda loss, s: (
            lambda terms: {
                "loss": terms.loss, "25 sim": 25 * terms.sim, "25 var": 25 * terms.var,
                "cov": terms.cov,
            }
        )(loss(s * VIEW1, s * VIEW2)),
        COLUMN, (0.02, 2), ("loss", "25 sim", "25 var", "cov"), "each term with its weight",
        "Two views of 64 samples are scaled together. var is a hinge: it pushes columns apart "
        "until their standard deviation is gamma = 1 and is flat beyond, while sim and cov "
        "always pull the scale down, and more the larger it is.",
    ),
    "api/joint_embedding/multi_view_vicreg.md": Picture(
        lambda loss, m: {
            f"a {kind} view is moved": loss(
                torch.stack([VIEW1 + m * (view == moved) for view in range(4)]), num_global=2
            ).invariance
            for kind, moved in (("global", 0), ("local", 3))
        },
        "distance by which one view is moved (units of z)", (-2, 2),
        ("a global view is moved", "a local view is moved"), "invariance, squared units of z",
        "Four equal views of 64 samples, the first two of them global; one view is moved off. A "
        "global view is compared with every other, a local one with the two global ones alone, so "
        "it pulls with a smaller force.",
    ),
    "api/joint_embedding/variance_covariance.md": Picture(
        lambda loss, r: loss(
            0.7 * torch.stack((WHITE[:, 0], r * WHITE[:, 0] + (1 - r * r).sqrt() * WHITE[:, 1]), 1)
        ),
        "correlation of the two columns", (-0.98, 0.98), ("cov", "var", "rank"),
        "squared units of z; rank: directions",
        "Two columns with a standard deviation of 0.7. cov grows with the square of their "
        "correlation and pulls it to 0; var is 0.3 whatever the correlation is, and the "
        "effective rank, which is detached, falls from 2 to 1.",
    ),
    "api/joint_embedding/barlow_twins.md": Picture(
        lambda loss, r: loss(
            VIEW1, r * VIEW1 + (1 - r * r).sqrt() * WHITE[:, 4:]
        ),
        "correlation of the two views of a column", (-0.98, 0.98), ("on_diagonal", "off_diagonal"),
        "sums of squared correlations",
        "Four columns with correlations of 0.2, whose second view agrees with the first more or "
        "less. on_diagonal is 4 (1 - correlation)²: 0 where the views agree, and largest for a "
        "view of the opposite sign. off_diagonal, here without its weight of 0.005, sees the "
        "correlations between columns only as far as the views agree.",
    ),
    "api/joint_embedding/mmcr.md": Picture(
        lambda loss, a: loss(torch.stack(at_angle(a, 8)), local_weight=1.0),
        "angle between the two views of a sample (degrees)", (2, 178),
        ("loss", "centroid_nuclear", "local_nuclear"), "sum of singular values",
        "Two views of 8 samples at right angles to each other. Views that part make their "
        "centroids shorter, so centroid_nuclear falls. local_nuclear is largest at a right "
        "angle; with local_weight = 1 the loss is smallest where the views agree.",
    ),
    "api/joint_embedding/sigmoid_contrastive.md": Picture(
        lambda loss, c: loss(*at_cosine(c), scale=10.0, bias=-5.0),
        COSINE, (-0.99, 0.99), ("positive", "negative"), "nats for each sample",
        "8 pairs, with everything that is not a pair at a cosine of 0; scale 10, bias -5. positive "
        "is a softplus: nearly a line with a slope of -10 up to a cosine of 0.5, where the logit "
        "is 0, and flat beyond. The negatives do not depend on the pairs.",
    ),
    "api/joint_embedding/info_nce.md": Picture(
        lambda loss, c: {
            f"scale {scale}": loss(
                at_cosine(torch.tensor(0.7, dtype=torch.float64), 4)[0][:1],
                torch.stack((
                    at_cosine(torch.tensor(0.7, dtype=torch.float64), 4)[1][0],
                    at_cosine(c, 4)[1][0].roll(1) * 0 + c * torch.eye(8, dtype=torch.float64)[0]
                    + (1 - c * c).sqrt() * torch.eye(8, dtype=torch.float64)[7],
                )),
                scale=float(scale),
            ).loss
            for scale in (5, 20, 50)
        },
        "cosine of a query and its negative (that of its key is 0.7)", (-0.2, 0.99),
        ("scale 5", "scale 20", "scale 50"), "nats",
        "One query, its key at a cosine of 0.7 and one negative. A small scale pushes every "
        "negative a little; a large one leaves easy negatives alone and pushes those that are "
        "nearer than the key, with a force that is the scale itself.",
    ),
    "api/joint_embedding/nt_xent.md": Picture(
        lambda loss, c: {
            f"temperature {t}": loss(*at_cosine(c), temperature=t).loss
            for t in (0.1, 0.2, 0.5)
        },
        COSINE, (-0.99, 0.99), ("temperature 0.1", "temperature 0.2", "temperature 0.5"), "nats",
        "8 samples, with all others at a cosine of 0. A low temperature pulls the views together "
        "with a large force until they are a little nearer than the others, and then stops; at "
        "0.5 they are pulled all the way.",
    ),
    "api/joint_embedding/decoupled_contrastive.md": Picture(
        lambda loss, c: {
            "decoupled": loss(*at_cosine(c), temperature=0.2).loss,
            "NT-Xent": joint.nt_xent_loss(*at_cosine(c), temperature=0.2).loss,
        },
        COSINE, (-0.99, 0.99), ("decoupled", "NT-Xent"), "nats",
        "8 samples, with all others at a cosine of 0, at a temperature of 0.2. NT-Xent stops "
        "pulling where the pair is found already; without the positive in the denominator the pull "
        "is 1 / temperature, however near the views are.",
    ),
    "api/joint_embedding/supervised_contrastive.md": Picture(
        lambda loss, c: {
            where: loss(
                torch.stack((
                    torch.eye(6, dtype=torch.float64)[0],
                    torch.eye(6, dtype=torch.float64)[0],
                    c * torch.eye(6, dtype=torch.float64)[0]
                    + (1 - c * c).sqrt() * torch.eye(6, dtype=torch.float64)[1],
                    *torch.eye(6, dtype=torch.float64)[2:],
                )),
                torch.tensor([0, 0, 0, 1, 1, 1, 1]), temperature=0.2, positives=where,
            ).loss
            for where in ("outside", "inside")
        },
        "cosine of one sample with the two others of its class", (-0.99, 0.99),
        ("outside", "inside"), "nats",
        "A class of three, two of which are equal, beside a class of four at right angles; "
        "temperature 0.2. With the sum over positives outside the logarithm the third sample is "
        "pulled wherever it is; inside, one near positive is enough for the others.",
    ),
    "api/joint_embedding/predictive_cosine.md": Picture(
        lambda loss, a: {
            form: loss(
                at_angle(a)[1], at_angle(a)[0], form=form
            ).loss
            for form in ("byol", "simsiam")
        },
        "angle between prediction and target (degrees)", (0.5, 179.5), ("byol", "simsiam"),
        "of the squared distance, or of the cosine",
        "A prediction is turned away from its target. Both are 1 - cosine up to a factor and a "
        "constant, so the gradient is largest at a right angle and vanishes at the opposite "
        "direction too.",
    ),
    "api/joint_embedding/tico.md": Picture(
        lambda loss, a: (
            lambda terms: {
                "loss": terms.loss,
                "invariance": terms.invariance,
                "8 contrast": 8 * terms.contrast,
            }
        )(
            loss(
                at_angle(a)[1], at_angle(a)[0],
                torch.diag(torch.tensor([0.1, 0.0], dtype=torch.float64)),
            )
        ),
        "angle between the embedding and its target (degrees)", (0, 90),
        ("loss", "invariance", "8 contrast"), "each term with its weight",
        "Earlier embeddings have all lain in the direction of the target: C is 0.1 there and 0 "
        "elsewhere. invariance pulls the embedding to its target, contrast pushes it to a "
        "direction that is not used yet. They balance at 51 degrees.",
    ),
    "api/joint_embedding/koleo.md": Picture(
        lambda loss, a: loss(torch.cat(at_angle(a))),
        "angle between the two embeddings (degrees)", (2, 178), ("loss", "nearest_distance"),
        "nats; distance: radii of the sphere",
        "Two embeddings on the unit sphere. The nearer they are, the larger is the force between "
        "them, without a bound; it fades to 0 where they are opposite. nearest_distance is "
        "detached.",
    ),
    "api/joint_embedding/gram_anchor.md": Picture(
        lambda loss, c: {
            kind: loss(
                torch.stack((at_cosine(c, 1)[0][0], at_cosine(c, 1)[1][0]))[None],
                torch.tensor([[[1.0, 0.0], [-0.5, 0.75**0.5]]], dtype=torch.float64),
                negatives=kind,
            ).loss
            for kind in ("both", "keep")
        },
        "cosine of two patches, of the student", (-0.98, 0.98), ("both", "keep"),
        "squared cosine, mean over pairs",
        "Two patches whose cosine is -0.5 in the teacher. With negatives=\"both\" negative "
        "similarities count as 0, so the student is left alone below 0; with \"keep\" it is "
        "pulled to the teacher's -0.5.",
    ),
    "api/joint_embedding/sigreg.md": Picture(
        lambda loss, s: loss(s * DATA, slices=ONE),
        "standard deviation of the embeddings (N(0, I) has 1)", (0, 3), ("loss",),
        "statistic, no unit",
        "128 normal embeddings along one direction. The statistic is smallest at a standard "
        "deviation of 1. Its slope is 0 at complete collapse and fades for a wide spread: it is "
        "largest at about a half.",
    ),
    "api/joint_embedding/lejepa.md": Picture(
        lambda loss, s: (
            lambda terms: {
                "loss": terms.loss,
                "0.95 invariance": 0.95 * terms.invariance,
                "0.05 sigreg": 0.05 * terms.sigreg,
            }
        )(
            loss(
                torch.stack((s * VIEW1, s * VIEW2)), slices=torch.eye(4, dtype=torch.float64)
            )
        ),
        COLUMN, (0, 2.5), ("loss", "0.95 invariance", "0.05 sigreg"), "each term with its weight",
        "Two views of 64 samples are scaled together, with the default weight. invariance pulls "
        "them to 0, where the loss would collapse; sigreg pulls to a standard deviation of 1. The "
        "sum is smallest a little below 1.",
    ),
    "api/joint_embedding/visreg.md": Picture(
        lambda loss, s: loss(
            torch.stack((s * VIEW1, s * VIEW2)), slices=torch.eye(4, dtype=torch.float64)
        ),
        COLUMN, (0.02, 2.5), ("scale", "invariance"), "squared units of z",
        "Two views of 64 samples are scaled together. scale is the parabola (1 - s)², whose slope "
        "is largest at collapse, where that of sigreg_loss vanishes; invariance grows with the "
        "square of the scale. center is 0, and shape does not move: the scale is divided out.",
    ),
    "api/joint_embedding/dino.md": Picture(
        lambda loss, m: loss(
            one_logit(m, *[0.0] * 7).transpose(0, 1),
            torch.tensor([0.9, *[0.1 / 7] * 7], dtype=torch.float64).expand(2, 1, 8),
        ),
        "student's logit of the teacher's prototype (others: 0)", (-0.2, 1),
        ("cross_entropy", "kl", "teacher_entropy"), "nats",
        "Eight prototypes, of which the teacher gives one a probability of 0.9; the student's "
        "temperature is 0.1. cross_entropy is teacher_entropy, which does not train, and kl, "
        "which is 0 where the student gives 0.9 too, at a logit of 0.41. Beyond it pulls back.",
    ),
    "api/joint_embedding/ibot.md": Picture(
        lambda loss, m: {
            f"mean over {over}": loss(
                torch.cat((
                    one_logit(m, *[0.0] * 7)[0, :1], torch.zeros(7, 8, dtype=torch.float64)
                )),
                torch.tensor([0.9, *[0.1 / 7] * 7], dtype=torch.float64).expand(8, 8),
                torch.tensor([0, *[1] * 7]), images=2, over=over,
            ).loss
            for over in ("images", "patches")
        },
        "student's logit of the teacher's prototype, at one patch", (-0.2, 1),
        ("mean over images", "mean over patches"), "nats",
        "One image with a single masked patch, which is varied, and one with seven, where the "
        "student is uniform. In the mean over images the single patch has half the weight, in "
        "the mean over patches an eighth: the same curve with a quarter of the gradient.",
    ),
    "api/joint_embedding/swapped_prediction.md": Picture(
        lambda loss, t: loss(
            0.3 * torch.stack((drawn(32, 8), drawn(32, 8) + 0.7 * drawn(32, 8, seed=1))),
            sinkhorn_temperature=t.item(),
        ),
        "temperature of Sinkhorn's assignments", (0.02, 0.5),
        ("cross_entropy", "teacher_entropy", "kl"), "nats",
        "Two views of 32 samples and 8 prototypes; no input is a single number, so the value is "
        "drawn against a setting. Assignments are sharp at low temperatures and tend to uniform, "
        "log 8 = 2.08 nats, at high ones. Near the student's temperature of 0.1 kl is small.",
        slope=False,
    ),
    # Energy-based models.
    "api/energy/maximum_likelihood.md": Picture(
        lambda loss, a: loss(gauss(a), DATA, a.detach() * MIXED),
        MODEL, (0.6, 2.5), ("loss", "energy_data", "energy_model"), "nats",
        ENERGY + "The negatives are samples of the model. The value does not say how good the "
        "model is, since log Z is not in it: look at the derivative of the loss, which is that of "
        "the negative log-likelihood and crosses 0 at the truth, 1. Derivatives hold the samples.",
    ),
    "api/energy/contrastive_divergence.md": Picture(
        lambda loss, a: {
            f"chains keep {keep:g} of x": loss(
                gauss(a), DATA, keep * DATA + (1 - keep**2) ** 0.5 * a.detach() * MIXED
            ).loss
            for keep in (0, 0.5, 0.9)
        },
        MODEL, (0.6, 2.5), tuple(f"chains keep {keep} of x" for keep in ("0", "0.5", "0.9")),
        "nats",
        ENERGY + "Chains start at the data and forget them (0) or keep part of where they were. "
        "The derivative, which holds the chains, is 0 at the truth, 1, for chains of any length; "
        "short chains make it smaller.",
    ),
    "api/energy/contrastive_divergence_kl_term.md": Picture(
        lambda loss, s: loss(gauss(torch.ones(())), s * DATA),
        "standard deviation of the samples (that of the model is 1)", (0.2, 2.5),
        ("loss", "energy", "entropy"), "nats",
        "128 samples of a normal density are scaled; the model is N(0, 1). energy pulls the "
        "samples together and entropy, which enters with a minus, apart: the sum is smallest "
        "where the samples have the model's spread.",
    ),
    "api/energy/noise_contrastive.md": Picture(
        lambda loss, a: loss(
            gauss(a), DATA, 2 * MIXED, log_noise_x=log_normal(DATA, 2.0),
            log_noise_noise=log_normal(2 * MIXED, 2.0),
            log_z=(a * math.sqrt(2 * math.pi)).log(),
        ),
        MODEL, (0.5, 2.5), ("loss", "data", "noise"), "nats",
        ENERGY + "The noise is normal with a standard deviation of 2, log Z is right for each a. "
        "Their sum, the loss, is smallest at the truth, 1; it is 2 log 2 = 1.39, that of guessing, "
        "where the model is the noise, at 2.",
    ),
    "api/energy/ranking_noise_contrastive.md": Picture(
        lambda loss, a: {
            f"{k} noise{'s' * (k > 1)}": loss(
                gauss(a), DATA, 2 * NOISE[:k], log_noise_x=log_normal(DATA, 2.0),
                log_noise_noise=log_normal(2 * NOISE[:k], 2.0),
            ).loss
            for k in (1, 4, 16)
        },
        MODEL, (0.5, 2.5), ("1 noise", "4 noises", "16 noises"), "nats",
        ENERGY + "The noises are normal with a standard deviation of 2. The loss is smallest near "
        "the truth, 1, for any number of noises, is log(noises + 1) where the model is the noise, "
        "and more noises give more curvature: a more certain estimate.",
    ),
    "api/energy/conditional_noise_contrastive.md": Picture(
        lambda loss, a: {
            f"noise {eps}": loss(
                gauss(a), DATA, DATA + eps * NOISE
            ).loss
            for eps in (0.2, 0.5, 1.0)
        },
        MODEL, (0.5, 2.5), ("noise 0.2", "noise 0.5", "noise 1.0"), "nats",
        ENERGY + "Noise of three sizes is added to them. The loss is smallest at the truth, 1, for "
        "each; the smaller the noise, the nearer the curve is to the constant 2 log 2 = 1.39, and "
        "the smaller is the gradient.",
    ),
    "api/energy/energy_discrepancy.md": Picture(
        lambda loss, a: {
            f"t = {t}": loss(
                gauss(a), DATA.repeat(2, 1), t=t, copies=15, w_stable=0.0,
                noise=torch.cat((NOISE, -NOISE), 1),
            ).loss
            for t in (0.1, 0.5, 2.0)
        },
        MODEL, (0.6, 2.5), ("t = 0.1", "t = 0.5", "t = 2.0"), "nats",
        ENERGY + "15 copies of each are disturbed with variance t there and back. A small t "
        "gives a shallow curve with its minimum at the truth, 1, as score matching has. A large t "
        "gives a deep curve and needs more copies: with 15 its minimum is below 1.",
    ),
    "api/energy/score_matching.md": Picture(
        lambda loss, a: loss(gauss(a), DATA),
        MODEL, (0.7, 2.5), ("loss", "score_square", "laplacian"), "1 / squared units of x",
        ENERGY + "score_square falls as 1 / a⁴ and laplacian as 1 / a². The loss, half the first "
        "less the second, is smallest at the truth, 1. It rises steeply for a model that is too "
        "narrow and has little gradient for one that is far too wide.",
    ),
    "api/energy/sliced_score_matching.md": Picture(
        lambda loss, a: {
            **{
                f"{k} projection{'s' * (k > 1)}": loss(
                    gauss(a), WHITE[:8], projections=drawn(k, 8, 8), variance_reduced=False
                ).loss
                for k in (1, 16)
            },
            "exact": energy.score_matching_loss(gauss(a), WHITE[:8]).loss,
        },
        "standard deviation of the model, in 8 dimensions", (0.7, 2.5),
        ("1 projection", "16 projections", "exact"), "1 / squared units of x",
        "Eight samples in eight dimensions and the energy |x|² / 2a², with normal projections and "
        "without variance reduction, the noisiest choice. The estimate has the shape of the "
        "exact loss; few projections move its smallest value, 16 are close.",
    ),
    "api/energy/finite_difference_score_matching.md": Picture(
        lambda loss, step: {
            "by finite differences": loss(
                lambda x: x.square().sum(1) / 2 + x.pow(4).sum(1) / 4, DATA,
                step=step.item(), projections=torch.ones(1, 128, 1, dtype=torch.float64),
            ).loss,
            "exact": energy.score_matching_loss(
                lambda x: x.square().sum(1) / 2 + x.pow(4).sum(1) / 4, DATA
            ).loss,
        },
        "step (units of x; the data have a standard deviation of 1)", (0.01, 0.5),
        ("by finite differences", "exact"), "1 / squared units of x",
        "The energy is x² / 2 + x⁴ / 4. The step is a setting, and what is seen is its error: it "
        "grows with the square of the step, and is small at the default, 0.05. For a quadratic "
        "energy there is none.",
        slope=False,
    ),
    "api/energy/denoising_score_matching.md": Picture(
        lambda loss, a: {
            f"sigma {sigma}": loss(
                gauss(a), DATA, sigma=sigma, noise=MIXED, weighting="sigma2"
            ).loss
            for sigma in (0.3, 0.6, 1.0)
        },
        MODEL, (0.9, 2.5), ("sigma 0.3", "sigma 0.6", "sigma 1.0"),
        "squared error of the noise, standard deviations",
        ENERGY + "Noise of three sizes is added, each loss weighted with sigma². The smallest "
        "value is at sqrt(1 + sigma²), the standard deviation of the noisy data, not at that of "
        "the data: what is learnt is the density of data with noise.",
    ),
    "api/energy/flow_matching.md": Picture(
        lambda loss, v: loss(
            lambda x: -v * x.sum(1), DATA, 3 + 0.5 * MIXED, torch.full((128,), 0.5).double()
        ),
        "velocity of the model (units of x for each unit of time)", (-1, 6),
        ("loss", "velocity_square", "target_square"), "squared velocity",
        "Noise of N(0, 1) is carried to data around 3 by an energy with a constant slope. The "
        "loss is a parabola that is smallest at the mean velocity of the pairs, 3. Its smallest "
        "value is the variance of the pairs' velocities, not 0.",
    ),
    "api/energy/equilibrium_matching.md": Picture(
        lambda loss, t: {
            f"cutoff {cutoff}": loss(
                lambda x: 0 * x.sum(1), torch.zeros(1, 1), torch.ones(1, 1),
                t.detach().float()[None], cutoff=cutoff,
            ).target_square.sqrt()
            for cutoff in (0.5, 0.8)
        },
        "time (0: noise, 1: data)", (0, 1), ("cutoff 0.5", "cutoff 0.8"),
        "length of the target gradient, units of x",
        "The energy is learned, so the target of its gradient is drawn, for a pair at a distance "
        "of 1: multiplier = 4 times the distance from noise up to the cutoff, then a line to 0 at "
        "the data, where descent comes to rest.",
        slope=False,
    ),
    "api/energy/energy_matching.md": Picture(
        lambda loss, v: loss(
            lambda x: -v * x.sum(1), DATA, 3 + 0.5 * MIXED, torch.full((128,), 0.5).double(), DATA
        ),
        "slope of the energy downwards (1 / units of x)", (-1, 7), ("loss", "flow", "contrast"),
        "squared velocity; contrast: energy",
        "Noise of N(0, 1) and data around 3, an energy with a constant slope, and negatives that "
        "still are noise. flow is smallest at the mean velocity, 3; contrast lowers the energy of "
        "the data as long as negatives lie elsewhere: the sum is smallest beyond, at 4.5.",
    ),
    "api/energy/energy_square_penalty.md": Picture(
        lambda loss, c: loss(lambda x: c + 0.5 * x.sum(1), DATA),
        "constant added to the energy (nats)", (-3, 3), ("loss", "energy"), "squared nats; nats",
        "An energy that varies over the data, with a constant added. The penalty pulls the mean "
        "energy to 0, with a force of twice the mean; the variance of the energies, 0.25, is "
        "what remains.",
    ),
    "api/energy/gradient_penalty.md": Picture(
        lambda loss, s: {
            f"target {target:g}": loss(
                lambda x: s * x.sum(1), DATA, target=target
            ).loss
            for target in (0.0, 1.0)
        },
        "slope of the energy (1 / units of x)", (-2.5, 2.5), ("target 0", "target 1"),
        "squared slope",
        "An energy with a constant slope. With the default target of 0 every slope is pulled down; "
        "with a target of 1 the penalty is 0 at slopes of 1 and -1, and pushes away from 0.",
        points=40,
    ),
    # Sparse autoencoders.
    "api/sae/vanilla.md": Picture(
        lambda loss, f: loss(1.5 * ONE, f * ONE, f * ONE, sparsity_coeff=1.0),
        "latent f, which decodes to itself (the activation is 1.5)", (-1, 3),
        ("loss", "mse", "sparsity"), "squared units of x",
        "One latent and one feature, sparsity_coeff = 1. The penalty pulls with the same force "
        "however large the latent is, so the sum is smallest at 1 instead of 1.5: L1 shrinks "
        "active latents.",
        points=40,
    ),
    "api/sae/topk.md": Picture(
        lambda loss, k: (
            lambda f: loss(WHITE, f, f)
        )(WHITE * (WHITE.abs() >= WHITE.abs().topk(round(k.item())).values[:, -1:])),
        "latents that are kept of 8", (1, 8), ("mse",), "squared units of x",
        "A dictionary of 8 orthogonal latents on white activations; the number of latents is a "
        "setting. Each latent more takes less of the error away, since the largest come first. "
        "There is no penalty: l0 is what was asked for.",
        slope=False, points=8,
    ),
    "api/sae/jumprelu.md": Picture(
        lambda loss, theta: loss(
            ONE, ONE, ONE, threshold=theta * ONE[0], sparsity_coeff=0.25, bandwidth=0.4
        ),
        "threshold (units of the pre-activation, which is 1)", (0.2, 1.8),
        ("loss", "mse", "sparsity"), "squared units of x",
        "One latent that reconstructs x = 1, with sparsity_coeff = 0.25 and a bandwidth of 0.4. "
        "The value jumps where the threshold passes the pre-activation and is flat elsewhere; the "
        "gradient is that of a kernel as wide as the bandwidth instead: sparsity pushes the "
        "threshold up there, and mse pulls it down where the latent has just been lost.",
        points=81,
    ),
    "api/sae/gated.md": Picture(
        lambda loss, gate: loss(
            1.5 * ONE, 1.5 * ONE, 1.5 * ONE, gate * ONE, ONE, sparsity_coeff=1.0
        ),
        "gate's pre-activation (units of x, which is 1.5)", (-1, 3), ("loss", "sparsity", "aux"),
        "squared units of x",
        "One latent whose reconstruction is right, sparsity_coeff = 1. The penalty pulls the gate "
        "down and the auxiliary reconstruction holds it: the sum is smallest at 1. The latent "
        "itself is not shrunk. Below 0 neither has a gradient.",
        points=40,
    ),
    "api/sae/matryoshka.md": Picture(
        lambda loss, f: (
            lambda terms: {
                "prefix of 1": terms.mse_per_prefix[0],
                "prefix of 2": terms.mse_per_prefix[1],
                "mse": terms.mse,
            }
        )(
            loss(
                2 * ONE, torch.cat((f[None], 2 - f[None]))[None], torch.ones(2, 1).double(), None,
                prefixes=(1, 2),
            )
        ),
        "first latent; the second one holds the rest of x = 2", (0, 4),
        ("prefix of 1", "prefix of 2", "mse"), "squared units of x",
        "Two latents with the same decoder share x. All latents together reconstruct it whatever "
        "the share is; the prefix of the first one alone pulls x into that latent, so that "
        "what is general comes first.",
    ),
    "api/sae/crosscoder.md": Picture(
        lambda loss, a: {
            norm: loss(
                torch.zeros(1, 2, 1).double(), ONE, torch.zeros(1, 2, 1).double(),
                torch.stack(((a * math.pi / 180).cos(), (a * math.pi / 180).sin()))[None, :, None],
                sparsity_coeff=1.0, decoder_norm=norm,
            ).sparsity
            for norm in ("l1", "l2")
        },
        "angle of the decoder (0: layer 1 alone, 90: layer 2, degrees)", (1, 89), ("l1", "l2"),
        "penalty, units of the latent times its decoder",
        "One latent of 1 that writes to two layers with a decoder of length 1. With the sum of the "
        "layers' norms (l1) it costs more to write to both, and the gradient pushes to one "
        "layer; with their joint norm (l2) it costs the same.",
    ),
    "api/sae/end_to_end.md": Picture(
        lambda loss, v: loss(
            one_logit(v, 0, 0, 0)[0, :1], TEACHER[0, :1], x=[2 * ONE], x_hat=[v * ONE],
            reconstruction_coeff=0.1,
        ),
        "logit of a token in the patched model (2 in the original)", (-3, 7),
        ("loss", "kl", "reconstruction"), "nats; reconstruction: squared units",
        "A vocabulary of four and a layer whose activation is that logit. Both terms are 0 "
        "where the reconstruction is right. kl grows as a line on both sides, since only the "
        "output counts; the reconstruction, here with a coefficient of 0.1, grows with the square.",
    ),
    # Language models.
    "api/lm/next_token.md": Picture(
        lambda loss, x: loss(one_logit(x, *[0.0] * 7), TOKENS),
        "logit of the token that comes next, the others at 0 (nats)", (-6, 8),
        ("loss", "accuracy"), "nats; accuracy: share of positions",
        "A vocabulary of eight. The loss falls as a line while the token has little probability, "
        "is log 8 = 2.08 at equal logits, and fades to 0; the derivative is the probability less "
        "1. accuracy jumps and is detached.",
    ),
    "api/lm/linear_next_token.md": Picture(
        lambda loss, x: {
            name: loss(
                x * torch.eye(8).double()[:1].expand(1, 2, 8), torch.eye(8).double(), TOKENS,
                softcap=cap,
            ).loss
            for name, cap in (("no softcap", None), ("softcap 5", 5.0))
        },
        "hidden state along the row of the next token (units)", (-12, 12),
        ("no softcap", "softcap 5"), "nats",
        "A vocabulary of eight whose rows are unit vectors. Without a cap the loss is that of the "
        "logits; with softcap = 5 the logits stay within -5 and 5, so the loss levels off at "
        "both ends and so does the gradient to 0.",
    ),
    "api/lm/distillation.md": Picture(
        lambda loss, x: {
            kind: loss(one_logit(x, 0, 0, 0), TEACHER, divergence=kind).loss
            for kind in ("forward", "reverse", "jensen_shannon")
        },
        LOGIT + " (2 in the teacher)", (-4, 8), ("forward", "reverse", "jensen_shannon"), "nats",
        "A vocabulary of four, the other logits at 0. Each is 0 where the student equals the "
        "teacher. forward grows as a line on both sides; reverse and jensen_shannon level off, "
        "so a student that is far from its teacher gets little gradient from them.",
    ),
    "api/lm/linear_distillation.md": Picture(
        lambda loss, x: loss(
            one_logit(x, 0, 0, 0), torch.eye(4).double(), TEACHER, torch.eye(4).double(),
            tokens=TOKENS,
        ),
        "student's hidden state = logit of the next token (2 in the teacher)", (-4, 8),
        ("loss", "divergence", "cross_entropy"), "nats",
        "A vocabulary of four whose rows are unit vectors. divergence is 0 at the teacher's logit, "
        "cross_entropy falls on and on: the sum is smallest where the student is surer than the "
        "teacher, but not certain.",
    ),
    "api/lm/projected_kl.md": Picture(
        lambda loss, x: {
            kind: loss(
                one_logit(x, 0), THREE, alignment=IN_ORDER, projection=TO_THREE, divergence=kind
            ).loss
            for kind in ("forward", "reverse")
        },
        LOGIT + " that both have (2 in the teacher)", (-3, 6), ("forward", "reverse"), "nats",
        "A student with two tokens; the second one stands for two of the teacher's three. Both "
        "divergences are 0 at 2 - log 2 = 1.31, where the projected probabilities are the "
        "teacher's, and not where the logits are equal.",
    ),
    "api/lm/linear_projected_kl.md": Picture(
        lambda loss, x: {
            f"temperature {t:g}": loss(
                one_logit(x, 0), torch.eye(2).double(), THREE, alignment=IN_ORDER,
                projection=TO_THREE, temperature=t,
            ).loss
            for t in (1.0, 2.0, 4.0)
        },
        "student's hidden state = logit of the token that both have", (-3, 6),
        ("temperature 1", "temperature 2", "temperature 4"), "nats times temperature²",
        "A student of two tokens and a teacher of three, as for projected_kl_loss. The "
        "temperature flattens both distributions, and the factor of temperature² keeps the "
        "gradient's size. The loss is 0 at 2 - temperature log 2: to split a token in two is no "
        "shift of its logit.",
    ),
    "api/lm/partitioned.md": Picture(
        lambda loss, x: loss(
            one_logit(x, 0), THREE, alignment=IN_ORDER, partition=PAIRED
        ),
        LOGIT + " that both have (2 in the teacher)", (-3, 6), ("loss", "kl_common", "l1_tail"),
        "nats; l1_tail: probability",
        "The token is paired by name; the student's one other token and the teacher's two are the "
        "tails. kl_common falls below 0 for a student that gives the common token more than "
        "the teacher does; l1_tail is 0 where the tails hold as much and has a kink there. The "
        "loss alone has a gradient.",
        points=81,
    ),
    "api/lm/universal_logit.md": Picture(
        lambda loss, x: {
            "student sure of the same token": loss(
                one_logit(x, 0, 0, 0), TEACHER, alignment=IN_ORDER
            ).loss,
            "of another token": loss(
                one_logit(x, 0, 0, 0).roll(1, -1), TEACHER, alignment=IN_ORDER
            ).loss,
        },
        "the student's largest logit (2 in the teacher)", (0.02, 7),
        ("student sure of the same token", "of another token"), "difference of probabilities",
        "A vocabulary of four. The two curves are one: the loss compares sorted probabilities, and "
        "is 0 for a student that is as sure as its teacher, of whichever token. The slope jumps "
        "at 2.",
        points=61,
    ),
    "api/lm/cross_tokenizer.md": Picture(
        lambda loss, x: loss(
            one_logit(x, 0, 0, 0), TOKENS, lm.Teacher(TEACHER.roll(1, -1))
        ),
        LOGIT + " that the text has next", (-4, 8), ("loss", "kd", "cross_entropy"), "nats",
        "A vocabulary of four and one teacher, who is sure of another token. cross_entropy pulls "
        "the logit of the text's token up, kd down; the sum is smallest in between, at a "
        "compromise that kd_weight and ce_weight move.",
    ),
    "api/lm/targeted_variance.md": Picture(
        lambda loss, s: loss(s * WHITE.T, coefficient=0.1, target=1.0),
        "standard deviation of each row (units of weight)", (0, 2),
        ("loss", "squared_error"), "squared variance",
        "Rows are scaled together; the target is 1 and the coefficient 0.1. squared_error is "
        "(s² - 1)²: the pull to the target fades for rows near 0 and grows with the cube of the "
        "scale beyond it.",
    ),
}  # fmt: skip
