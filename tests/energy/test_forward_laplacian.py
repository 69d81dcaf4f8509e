"""No rule without a proof: each rule of the forward Laplacian against reverse mode, in float64."""

import math
import os

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import resolve_name

from termwise.energy import _forward_laplacian
from termwise.energy._forward_laplacian import RULES, Carrier, is_carrier
from termwise.energy._higher_order import higher_order_safe

D = 2


@pytest.fixture(autouse=True)
def _fresh_compiler():
    """Nothing here is compiled: no cache is emptied after each of hundreds of cases."""
    torch.set_num_threads(1)


def tensor(*shape, low=-1.5, high=1.5, seed=0):
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return low + (high - low) * torch.rand(shape, generator=generator, dtype=torch.float64)


def positive(*shape, seed=0):
    return tensor(*shape, low=0.3, high=1.7, seed=seed)


def unit(*shape, seed=0):
    return tensor(*shape, low=-0.7, high=0.7, seed=seed)


def spread(*shape):
    """Elements that lie apart, for functions that select."""
    count = math.prod(shape)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(1))
    return (order.double() - 0.4 * count).reshape(shape)


def definite(*batch):
    root = tensor(*batch, 3, 3)
    return root @ root.mT + 2 * torch.eye(3, dtype=torch.float64)


def matrix(*batch):
    return tensor(*batch, 3, 3) + 2 * torch.eye(3, dtype=torch.float64)


def call(*args, **kwargs):
    return args, kwargs


A, B, C = tensor(2, 4), tensor(2, 4, seed=1), tensor(2, 4, seed=2)
P, Q = positive(2, 4), positive(2, 4, seed=1)
IMAGE, LINE = tensor(2, 2, 4, 4), tensor(2, 2, 5)
VOLUME = tensor(1, 2, 3, 3, 3)
ZEROS = torch.cat([torch.zeros(1, 4, dtype=torch.float64), A[1:]])
MASK = torch.tensor([[True, False, True, True], [False, True, True, False]])
INDEX = torch.tensor([[0, 1, 1, 0], [1, 0, 1, 1]])
PICK = torch.tensor([1, 0, 1])
CLASSES = torch.tensor([1, 3])
WITH_IGNORED = torch.tensor([1, -100])

ONE = [call(A)]
POSITIVE = [call(P)]
UNIT = [call(unit(2, 4))]
TWO = [call(A, B), call(A, tensor(4)), call(tensor(2, 1), B), call(A, 0.7)]
COMPARED = [call(A, B), call(A, 0.1)]
AXIS = [call(A, 1), call(A, dim=0)]
PROBABILITIES = F.softmax(B, 1)
ADDED = [
    call(tensor(2, 3), tensor(2, 4), tensor(4, 3)),
    call(tensor(3), A, tensor(4, 3), beta=0.5, alpha=2),
]
SORTED = [call(spread(2, 4)), call(spread(2, 4), 0)]
SELECTED = [
    call(spread(2, 5), 1),
    call(spread(2, 5), 0, True),
    call(spread(2, 5), dim=-1, keepdim=True),
]
NORMS = [
    call(A),
    call(A, dim=1),
    call(A, 1, 1),
    call(A, 3, 1, True),
    call(A, math.inf, dim=0),
    call(ZEROS, 2, 1),
    call(ZEROS, 4, 1),
]
VARIANCES = [
    call(A),
    call(A, 1),
    call(A, dim=0, keepdim=True),
    call(A, 1, unbiased=False),
    call(A, (0, 1), correction=0),
    call(A, False),
]
PRODUCTS = [
    call(A, 1),
    call(ZEROS, 0),
    call(tensor(2, 5), dim=1),
    call(torch.cat([ZEROS, ZEROS]), 0),
]
LOSSES = [call(A, B), call(A, B, reduction="sum"), call(A, B, reduction="none")]
REDUCED = [call(A), call(A, 1), call(A, dim=(0, 1), keepdim=True)]
CONVOLVED = {
    1: [call(LINE, tensor(3, 2, 3), tensor(3)), call(LINE, tensor(3, 2, 3), stride=2, padding=1)],
    2: [
        call(IMAGE, tensor(3, 2, 2, 2), tensor(3)),
        call(IMAGE, tensor(2, 1, 3, 3), bias=tensor(2), padding=1, groups=2),
    ],
    3: [call(VOLUME, tensor(2, 2, 2, 2, 2), tensor(2))],
}
TRANSPOSED = {
    1: [call(LINE, tensor(2, 3, 3), tensor(3)), call(LINE, tensor(2, 3, 2), stride=2)],
    2: [call(IMAGE, tensor(2, 3, 2, 2), tensor(3))],
    3: [call(VOLUME, tensor(2, 2, 2, 2, 2), bias=tensor(2))],
}
POOLED = {
    1: [call(spread(2, 2, 6), 2), call(spread(2, 2, 6), kernel_size=3, stride=1)],
    2: [call(spread(2, 2, 4, 4), 2), call(spread(1, 1, 4, 4), 3, stride=1, padding=1)],
    3: [call(spread(1, 2, 4, 2, 2), 2)],
}
JOINED = [call([A, B]), call((A, B, A[:1]), dim=0)]
STACKED = [call([A, B]), call([A, B, C], dim=1), call([A, B], -1)]
ENTROPIES = [
    call(A, CLASSES),
    call(A, WITH_IGNORED),
    call(A, CLASSES, positive(4)),
    call(A, CLASSES, reduction="sum"),
    call(A, WITH_IGNORED, positive(4)),
    call(A, CLASSES, reduction="none"),
    call(tensor(2, 3, 4), torch.tensor([[0, 1, 2, 0], [1, 1, -100, 2]])),
    call(tensor(4), torch.tensor(2)),
]

SAMPLES = {
    # metadata
    **dict.fromkeys(
        "dim numel nelement ndimension is_floating_point is_complex element_size get_device stride is_contiguous "
        "is_signed storage_offset is_inference is_conj is_neg has_names is_tensor __len__ size shape dtype "
        "device ndim layout is_cpu is_cuda is_meta is_mps is_xpu is_xla is_sparse is_sparse_csr is_quantized "
        "is_nested is_mkldnn itemsize nbytes requires_grad retains_grad".split(), ONE),
    "is_same_size": COMPARED[:1], "result_type": COMPARED,
    # constants
    **dict.fromkeys(
        "isnan isinf isfinite isneginf isposinf signbit sign sgn floor ceil round trunc fix argmax argmin argsort "
        "logical_not tolist __repr__ any all zeros_like ones_like nonzero count_nonzero rand_like randn_like "
        "detach".split(), ONE),
    **dict.fromkeys(
        "lt le gt ge eq ne less less_equal greater greater_equal not_equal __lt__ __le__ __gt__ __ge__ __eq__ "
        "__ne__ isclose allclose equal logical_and logical_or".split(), COMPARED[:1]),
    **dict.fromkeys("item is_nonzero __bool__ __float__ __int__".split(), [call(tensor(1))]),
    "empty_like": ONE, "full_like": [call(A, 2.0)], "new_full": [call(A, (2,), 1.0)],
    **dict.fromkeys("new_zeros new_ones new_empty".split(), [call(A, (2, 3)), call(A, 2, 3)]),
    "__format__": [call(A, "")], "__contains__": [call(A, 0.5)],
    "searchsorted": [call(torch.arange(3.0).double(), A)], "bucketize": [call(A, torch.arange(3.0).double())],
    "data": ONE,
    # views
    "reshape": [call(A, (4, 2)), call(A, -1)], "view": [call(A, 4, 2), call(A, (-1,))],
    "flatten": [call(A), call(IMAGE, 1)], "unflatten": [call(A, 1, (2, 2))], "ravel": ONE,
    "squeeze": [call(tensor(2, 1, 3)), call(tensor(2, 1, 3), 1)], "unsqueeze": AXIS,
    **dict.fromkeys("transpose swapaxes swapdims movedim moveaxis".split(), [call(A, 0, 1)]),
    "permute": [call(IMAGE, (0, 2, 3, 1))], "t": ONE, "T": ONE, "mT": ONE, "adjoint": ONE,
    "expand": [call(tensor(2, 1), 2, 3), call(tensor(3), (2, 3))], "broadcast_to": [call(tensor(2, 1), (2, 3))],
    "expand_as": [call(tensor(2, 1), A)], "view_as": [call(A, tensor(4, 2))], "reshape_as": [call(A, tensor(4, 2))],
    "type_as": [call(A, B), call(A, B.float())],
    "repeat": [call(A, 2, 1)], "repeat_interleave": [call(A, 2), call(A, 3, dim=1)], "tile": [call(A, (2, 1))],
    "flip": [call(A, (1,))], "fliplr": ONE, "flipud": ONE, "roll": [call(A, 1, 1), call(A, 2)],
    "__getitem__": [
        call(A, 1), call(A, (slice(None), slice(1, 3))), call(A, (Ellipsis, None)), call(A, MASK),
        call(A, torch.tensor([1, 1, 0])),
    ],
    "index_select": [call(A, 1, PICK)], "select": [call(A, 1, 2)], "narrow": [call(A, 1, 1, 2)],
    "chunk": [call(A, 2, 1)], "unsafe_chunk": [call(A, 2, 1)], "split": [call(A, 3, 1), call(A, [1, 3], dim=1)],
    "unsafe_split": [call(A, 3, 1)], "tensor_split": [call(A, 3, 1)], "hsplit": [call(A, 2)],
    "vsplit": [call(A, 2)], "dsplit": [call(tensor(2, 2, 4), 2)], "unbind": [call(A), call(A, 1)],
    "diagonal": [call(A), call(IMAGE, dim1=2, dim2=3)], "rot90": [call(A)],
    **dict.fromkeys("atleast_1d atleast_2d atleast_3d".split(), [call(tensor(3))]),
    "take_along_dim": [call(A, INDEX, 1)], "gather": [call(A, 1, INDEX)], "take": [call(A, PICK)],
    "unfold": [call(A, 1, 2, 1)], "torch.nn.functional.unfold": [call(IMAGE, 2), call(IMAGE, (2, 3), padding=1)],
    "torch.nn.functional.fold": [call(tensor(1, 8, 4), (3, 3), (2, 2))],
    "pixel_shuffle": [call(tensor(1, 4, 2, 2), 2)], "pixel_unshuffle": [call(IMAGE, 2)],
    "channel_shuffle": [call(IMAGE, 2)],
    # conversions
    "to": [
        call(A, torch.float32), call(A, torch.float64), call(A, "cpu"), call(A, B.float()), call(A, torch.int64),
        call(IMAGE, memory_format=torch.channels_last), call(A, dtype=torch.float32),
    ],
    "type": [call(A, torch.float32), call(A, torch.float64), call(A), call(A, "torch.FloatTensor")],
    **dict.fromkeys("float double clone positive cpu long int short char byte bool".split(), ONE),
    **dict.fromkeys("half bfloat16 cuda".split(), ONE),
    "contiguous": [call(A), call(IMAGE, memory_format=torch.channels_last)],
    "requires_grad_": ONE,
    # linear
    "sum": [*REDUCED, call(A, 0, dtype=torch.float64)], "mean": REDUCED, "cumsum": AXIS, "trace": ONE,
    "tril": [call(A), call(A, 1)], "triu": [call(A), call(A, -1)], "diag_embed": ONE,
    "diag": [call(A), call(tensor(3))],
    "avg_pool1d": [call(LINE, 2)], "avg_pool2d": [call(IMAGE, 2), call(IMAGE, 3, 1, 1)], "avg_pool3d": [call(VOLUME, 2)],
    "adaptive_avg_pool1d": [call(LINE, 2)], "adaptive_avg_pool2d": [call(IMAGE, 2)],
    "adaptive_avg_pool3d": [call(VOLUME, 2)],
    "interpolate": [
        call(IMAGE, scale_factor=2), call(IMAGE, size=(3, 6), mode="bilinear"), call(IMAGE, scale_factor=2, mode="bicubic"),
        call(LINE, size=3, mode="linear"),
    ],
    "upsample": [call(IMAGE, scale_factor=2)],
    "matmul": [call(A, tensor(4, 3)), call(tensor(4), tensor(4, 3)), call(A, tensor(4)), call(tensor(2, 2, 4), tensor(2, 4, 3)),
               call(tensor(2, 4), tensor(2, 4, 3)), call(tensor(3, 2), A)],
    "__matmul__": [call(A, tensor(4, 3))], "__rmatmul__": [call(tensor(4, 3), A)],
    **dict.fromkeys(["mm", "spmm"], [call(A, tensor(4, 3))]), "bmm": [call(tensor(2, 2, 3), tensor(2, 3, 2))], "mv": [call(A, tensor(4))],
    "dot": [call(tensor(4), tensor(4, seed=1))], "vdot": [call(tensor(4), tensor(4, seed=1))], "inner": [call(A, B)],
    "outer": [call(tensor(2), tensor(3))], "ger": [call(tensor(2), tensor(3))],
    "einsum": [
        call("bi,ij->bj", A, tensor(4, 3)), call("bi,ij,bj->b", A, tensor(4, 4), B), call("bi->b", A), call("ij,ik->jk", [A, B]),
    ],
    "tensordot": [call(A, tensor(4, 3), 1), call(A, B, dims=([0, 1], [0, 1]))],
    "chain_matmul": [call(A, tensor(4, 3), tensor(3, 2)), call(A, tensor(4, 2), B, tensor(4, 2, seed=3))],
    "multi_dot": [call([A, tensor(4, 3), tensor(3, 2)])],
    "kron": [call(A, tensor(2, 2))], "cross": [call(tensor(2, 3), tensor(2, 3, seed=1), dim=1)],
    "vecdot": [call(A, B), call(A, B, dim=0)],
    "linear": [call(A, tensor(3, 4), tensor(3)), call(A, tensor(3, 4)), call(tensor(2, 2, 4), tensor(3, 4), bias=tensor(3)),
               call(tensor(4), tensor(3, 4))],
    "bilinear": [call(A, tensor(2, 3), tensor(2, 4, 3), tensor(2)), call(A, tensor(2, 3), tensor(2, 4, 3))],
    **{f"conv{n}d": samples for n, samples in CONVOLVED.items()},
    **{f"conv_transpose{n}d": samples for n, samples in TRANSPOSED.items()},
    "cat": JOINED, "concat": JOINED, "concatenate": JOINED, "stack": STACKED,
    **dict.fromkeys("hstack vstack dstack row_stack column_stack".split(), JOINED[:1]),
    # by steps
    "amax": [call(spread(2, 4), 1), call(spread(2, 4)), call(spread(2, 4), (0, 1), True)],
    "amin": [call(spread(2, 4), 1), call(spread(2, 4), dim=0)],
    **{f"max_pool{n}d": samples for n, samples in POOLED.items()},
    "adaptive_max_pool1d": [call(spread(2, 2, 6), 2)], "adaptive_max_pool2d": [call(spread(2, 2, 4, 4), 2)],
    "adaptive_max_pool3d": [call(spread(1, 1, 4, 4, 2), 2)],
    "pad": [call(A, (1, 2)), call(A, (1, 2), value=3.0), call(IMAGE, (1, 1, 0, 2), "reflect"), call(IMAGE, (1, 1, 1, 1), "replicate"),
            call(IMAGE, (1, 0, 2, 1), mode="circular")],
    "max": [call(spread(2, 4)), call(spread(2, 4), 1), call(spread(2, 4), 0, True), call(A, B)],
    "min": [call(spread(2, 4)), call(spread(2, 4), 1), call(spread(2, 4), dim=0, keepdim=True), call(A, B)],
    "median": SELECTED, "nanmedian": SELECTED, "mode": SELECTED, "cummax": SELECTED[:1], "cummin": SELECTED[:1],
    "sort": [*SORTED, call(spread(2, 4), dim=1, descending=True), call(spread(2, 4), stable=True)],
    "topk": [call(spread(2, 5), 2), call(spread(2, 3, 4), 2), call(spread(2, 5), 1, 0), call(spread(2, 5), k=3, dim=1, largest=False)],
    "kthvalue": [call(spread(2, 5), 2), call(spread(2, 5), 1, 0, True)],
    # elementwise
    **dict.fromkeys(
        "neg negative square exp exp2 expm1 sin cos tan sinh cosh tanh atan arctan asinh arcsinh sigmoid relu relu6 "
        "silu mish selu logsigmoid softsign tanhshrink hardswish erf erfc abs absolute i0 sinc deg2rad rad2deg "
        "nan_to_num frac __neg__ __abs__ expit ndtr log_ndtr hardsigmoid".split(), [call(A), call(4 * A)]),
    **dict.fromkeys(
        "reciprocal sqrt rsqrt log log2 log10 log1p lgamma digamma gammaln psi entr".split(), [call(P), call(5 * P)]),
    **dict.fromkeys("asin acos arcsin arccos atanh arctanh erfinv".split(), UNIT),
    **dict.fromkeys("acosh arccosh".split(), [call(1 + P)]), "logit": [call(unit(2, 4).square() + 0.2), call(P / 2, 0.2)],
    "gelu": [call(A), call(A, approximate="tanh")],
    "softplus": [call(A), call(A, 2.0), call(A, beta=0.5, threshold=1.0)],
    **dict.fromkeys("elu celu".split(), [call(A), call(A, 0.7)]), "leaky_relu": [call(A), call(A, 0.2)],
    "hardtanh": [call(A), call(A, -0.3, 0.8)], "softshrink": [call(A), call(A, 0.3)], "hardshrink": [call(A), call(A, 0.3)],
    "threshold": [call(A, 0.1, 0.5)], "relu6": [call(4 * A)],
    **dict.fromkeys("clamp clip".split(), [call(A, -0.5, 0.6), call(A, min=-0.2), call(A, B, B + 1)]),
    "clamp_min": [call(A, 0.1), call(A, B)], "clamp_max": [call(A, 0.1), call(A, B)],
    **dict.fromkeys("maximum minimum fmax fmin".split(), [call(A, B), call(A, tensor(4))]),
    **dict.fromkeys("logaddexp logaddexp2".split(), [call(A, B), call(tensor(2, 1), B)]),
    **dict.fromkeys("atan2 arctan2 hypot".split(), [call(A, B), call(A, tensor(4))]), "copysign": [call(A, B), call(A, -1.0)],
    "torch.Tensor.where": [call(A, MASK, B), call(A, MASK, 0.5)],
    "where": [call(MASK, A, B), call(MASK, A, 0.5), call(MASK, tensor(2, 1), B)],
    "lerp": [call(A, B, 0.3), call(A, B, unit(2, 4))], "addcmul": [call(A, B, C), call(A, B, C, value=0.5)],
    "addcdiv": [call(A, B, P), call(A, B, P, value=0.5)],
    **dict.fromkeys("xlogy xlog1py".split(), [call(A, P), call(A, 2.0), call(0.7, P)]),
    **dict.fromkeys("remainder fmod".split(), [call(4 * A, 0.7), call(4 * A, P)]),
    **dict.fromkeys("pow __pow__".split(), [call(A, 2), call(A, 3), call(P, 1.5), call(P, B), call(A, 1), call(A, 0)]),
    "torch.pow": [call(A, 2), call(P, B), call(2.0, A), call(P, 0.5)],
    "float_power": [call(P, 1.5), call(A, 2), call(P, B)], "__rpow__": [call(A, 2.0), call(A, P)],
    **dict.fromkeys("add sub subtract __add__ __radd__ __sub__".split(), [*TWO, call(A, torch.arange(4))]),
    "torch.add": [*TWO, call(A, B, alpha=2), call(A, A)], "torch.sub": [*TWO, call(A, B, alpha=-1.5)],
    "rsub": TWO, "__rsub__": TWO,
    **dict.fromkeys("mul multiply __mul__ __rmul__".split(), [*TWO, call(A, torch.arange(4))]),
    **dict.fromkeys(
        "div divide true_divide __truediv__ __div__".split(),
        [call(A, P), call(A, positive(4)), call(A, 0.7), call(A, torch.arange(1, 5)), call(A, P.float())]),
    **dict.fromkeys("__rdiv__ __rtruediv__".split(), [call(P, 2.0), call(P, A)]),
    # compositions
    **dict.fromkeys("softmax log_softmax".split(), [call(A, 1), call(A, dim=0), call(4 * A, -1, dtype=torch.float64)]),
    "softmin": [call(A, 1)], "logsumexp": [call(A, 1), call(A, (0, 1)), call(A, 0, True), call(A - 300, 1)], "glu": [call(A), call(A, 0)],
    "prelu": [call(A, tensor(4)), call(A, tensor(1)), call(IMAGE, tensor(2))],
    "masked_fill": [call(A, MASK, 0.5), call(A, MASK, tensor())],
    "norm": NORMS, "torch.linalg.norm": [*NORMS, call(A, "fro"), call(A, ord=2, dim=1), call(tensor(4), 2), call(A, 2)],
    "vector_norm": NORMS, "matrix_norm": [call(A), call(IMAGE, "fro", (1, 2)), call(A, "nuc")],
    "normalize": [call(A), call(A, dim=0), call(A, 1.0)], "cosine_similarity": [call(A, B), call(A, B, dim=0), call(A, tensor(4))],
    "pairwise_distance": [call(A, B), call(tensor(2, 3, 4), tensor(2, 3, 4, seed=1)), call(A, B, p=1.0, keepdim=True)],
    **dict.fromkeys("var std".split(), VARIANCES), **dict.fromkeys("var_mean std_mean".split(), VARIANCES),
    "prod": [call(A), *PRODUCTS, call(A, 1, keepdim=True)], "cumprod": [call(A, 1), call(ZEROS, dim=0), call(tensor(1, 7), 1)],
    "addmm": ADDED, "addmv": [call(tensor(2), A, tensor(4)), call(tensor(2), A, tensor(4), beta=0.5, alpha=2)],
    "addbmm": [call(tensor(2, 3), tensor(2, 2, 4), tensor(2, 4, 3)), call(tensor(2, 3), tensor(2, 2, 4), tensor(2, 4, 3), alpha=-1.0)],
    "baddbmm": [call(tensor(2, 2, 3), tensor(2, 2, 4), tensor(2, 4, 3)), call(tensor(3), tensor(2, 2, 4), tensor(2, 4, 3), beta=0)],
    "addr": [call(tensor(2, 3), tensor(2), tensor(3)), call(tensor(2, 3), tensor(2), tensor(3), beta=0.5, alpha=2)],
    "__setitem__": [call(A, 1, tensor(4)), call(A, (slice(None), 2), 0.5), call(A, MASK, 0.0), call(A, (slice(None), slice(0, 2)), tensor(2, 2))],
    "index_add": [call(A, 1, PICK, tensor(2, 3)), call(A, 0, PICK, tensor(3, 4), alpha=0.5)],
    "scatter_add": [call(A, 1, INDEX, B)],
    "broadcast_tensors": [call(A, tensor(2, 1)), call(tensor(4), tensor(2, 1), A)],
    "cross_entropy": [*ENTROPIES, call(A, PROBABILITIES), call(A, PROBABILITIES, positive(4), label_smoothing=0.2), call(A, CLASSES, label_smoothing=0.3),
                      call(A, WITH_IGNORED, positive(4), label_smoothing=0.3), call(A, PROBABILITIES, reduction="sum"), call(A, CLASSES, reduction="none", label_smoothing=0.1)],
    "nll_loss": ENTROPIES,
    "mse_loss": LOSSES, "l1_loss": LOSSES, "soft_margin_loss": [call(A, B.sign()), call(A, B)],
    "smooth_l1_loss": [*LOSSES, call(A, B, beta=0.5)], "huber_loss": [*LOSSES, call(A, B, delta=0.5)],
    "kl_div": [call(A, P, reduction="sum"), call(A, P, reduction="batchmean"), call(A, B, log_target=True, reduction="sum")],
    "binary_cross_entropy_with_logits": [*LOSSES[:0], call(A, P / 2), call(A, P / 2, positive(4), reduction="sum"), call(A, P / 2, reduction="none", pos_weight=positive(4))],
    **dict.fromkeys("dropout dropout1d dropout2d dropout3d alpha_dropout feature_alpha_dropout".split(), [call(IMAGE, 0.5, False)]),
    "torch.nn.functional.dropout1d": [call(LINE, 0.5, False)], "torch.nn.functional.dropout3d": [call(VOLUME, 0.5, False)],
    "solve": [call(matrix(), tensor(3)), call(matrix(2), tensor(2, 3)), call(matrix(), tensor(3, 2)), call(matrix(2), tensor(2, 3, 2)), call(matrix(), tensor(2, 3, 2))],
    "solve_triangular": [call(definite(), tensor(3, 2), upper=False), call(definite(2), tensor(2, 3, 1), upper=True), call(definite(2), tensor(3, 2), upper=False)],
    "inverse": [call(matrix()), call(matrix(2))], "inv": [call(matrix())], "logdet": [call(definite()), call(definite(2))],
    "slogdet": [call(matrix()), call(-matrix(2))], "det": [call(matrix()), call(matrix(2))], "cholesky": [call(definite()), call(definite(2))],
    # stand-ins
    "layer_norm": [call(A, (4,), tensor(4), tensor(4)), call(A, (2, 4)), call(A, (4,), eps=0.1)],
    "rms_norm": [call(A, (4,), tensor(4)), call(A, (4,))], "group_norm": [call(IMAGE, 2, tensor(2), tensor(2)), call(IMAGE, 1)],
    "instance_norm": [call(IMAGE, weight=tensor(2), bias=tensor(2)), call(IMAGE)],
    "torch.instance_norm": [call(IMAGE, tensor(2), tensor(2), None, None, True, 0.1, 1e-5, False)],
    "batch_norm": [call(A, tensor(4), positive(4), tensor(4), tensor(4))],
    "torch.batch_norm": [call(A, tensor(4), tensor(4), tensor(4), positive(4), False, 0.1, 1e-5, False)],
    "scaled_dot_product_attention": [call(tensor(2, 3, 4), tensor(2, 3, 4, seed=1), tensor(2, 3, 4, seed=2)), call(tensor(2, 3, 4), tensor(2, 3, 4, seed=1), tensor(2, 3, 4), is_causal=True),
                                     call(tensor(1, 2, 3), tensor(1, 2, 3, seed=1), tensor(1, 2, 3), tensor(2, 2))],
    "cdist": [call(A, B)], "pdist": [call(A), call(tensor(3, 2), 1.0), call(tensor(3, 2), p=3)],
    "multi_head_attention_forward": [call(tensor(3, 1, 4), tensor(3, 1, 4, seed=1), tensor(3, 1, 4, seed=2), 4, 2, tensor(12, 4), tensor(12), None, None, False, 0.0, tensor(4, 4), tensor(4))],
}  # fmt: skip


def name_of(function):
    return resolve_name(function) or str(function)


def samples_of(name):
    """Return the arguments to try a function with, by its whole name or the last part of it."""
    if name in SAMPLES:
        return SAMPLES[name]
    parts = name.split(".")
    if parts[-1] in ("__get__", "__set__"):
        parts.pop()
    short = parts[-1]
    for candidate in (".".join(parts), short, short.removesuffix("_")):
        if candidate in SAMPLES:
            return SAMPLES[candidate]
    return []


def tensors_in(value):
    if isinstance(value, Tensor):
        return [value] if value.dtype == torch.float64 else []
    if isinstance(value, (tuple, list)):
        return [part for item in value for part in tensors_in(item)]
    if isinstance(value, dict):
        return tensors_in(tuple(value.values()))
    return []


def replaced(value, tensors):
    """Fill tensors in, in the order of `tensors_in`."""
    if isinstance(value, Tensor):
        return tensors.pop(0) if value.dtype == torch.float64 else value
    if isinstance(value, (tuple, list)):
        return type(value)(replaced(part, tensors) for part in value)
    if isinstance(value, dict):
        return {name: replaced(part, tensors) for name, part in value.items()}
    return value


def outputs(result):
    """Return what there is to compare in a result: all of its numbers."""
    if isinstance(result, Tensor):
        return [result if result.is_floating_point() else result.detach().double()]
    if isinstance(result, (tuple, list)):
        return [part for item in result for part in outputs(item)]
    return [torch.tensor(float(result))] if isinstance(result, (bool, int, float)) else []


def called(function, sample, chosen, tensors):
    """Call a function with some of its tensors replaced; return its numbers."""
    filled = [part.clone() for part in tensors_in(sample)]
    for i, part in zip(chosen, tensors, strict=True):
        filled[i] = part
    args, kwargs = replaced(sample, filled)
    torch.default_generator.manual_seed(0)  # torch.manual_seed looks at the stack first
    result = function(*args, **kwargs)
    found = outputs(args[0] if result is None else result)
    if "empty" in name_of(function):  # what is in it may be anything
        found = [torch.tensor(float(part.numel())) for part in found]
    return found


def contracted(part, sum_over=0):
    """Return a sum with factors over all axes but the first ones."""
    flat = part.double().reshape(*part.shape[:sum_over], -1)
    return flat @ torch.linspace(0.5, 1.5, flat.shape[-1], dtype=torch.float64)


def slopes_of(weight, sizes):
    """Return, of each argument, its slopes along the axes of x and its curvature."""
    return [(part[:D], part[D]) for part in weight.split(sizes, 1)]


def points(parts, x, starts):
    """Return arguments that have derivatives of first and second order."""
    return [
        start + (x @ slopes + 0.5 * x.square().sum() * curvature).reshape(start.shape)
        for (slopes, curvature), start in zip(parts, starts, strict=True)
    ]


def by_reverse(function, sample, chosen, weight, starts):
    x = torch.full((D,), 0.1, dtype=torch.float64, requires_grad=True)
    parts = slopes_of(weight, [start.numel() for start in starts])
    with higher_order_safe():
        found = called(function, sample, chosen, points(parts, x, starts))
    value = sum(contracted(part) for part in found) + 0 * x.square().sum()
    (score,) = torch.autograd.grad(value, x, create_graph=True)
    rows = [torch.autograd.grad(score[i], x, create_graph=True)[0][i] for i in range(D)]
    return value, score, sum(rows)


def by_carriers(function, sample, chosen, weight, starts):
    x = torch.full((D,), 0.1, dtype=torch.float64)
    parts = slopes_of(weight, [start.numel() for start in starts])
    carriers = []
    for value, (slopes, curvature) in zip(points(parts, x, starts), parts, strict=True):
        base = (slopes + x[:, None] * curvature).reshape(D, *value.shape) / 2
        laplacian = (D * curvature).reshape(value.shape)
        scale = torch.full_like(value, 2)
        carriers.append(Carrier(value, base, scale, laplacian, None, True, False))
    value, score, laplacian = 0, torch.zeros(D, dtype=torch.float64), 0
    for part in called(function, sample, chosen, carriers):
        if not is_carrier(part):
            value = value + contracted(part)
            continue
        assert part.shape == part.value.shape
        value = value + contracted(part.value)
        score = score + contracted(part.jacobian, 1)
        if part.laplacian is not None:
            laplacian = laplacian + contracted(part.laplacian)
    return value, score, laplacian


def with_gradient(results, weight):
    value, score, laplacian = (torch.as_tensor(part, dtype=torch.float64) for part in results)
    total = 0.3 * value + 0.5 * score.square().sum() - laplacian + 0 * weight.sum()
    (gradient,) = torch.autograd.grad(total, weight)
    return value, score, laplacian, gradient


def choices(count):
    """Each tensor argument alone, and all of them."""
    alone = [(i,) for i in range(count)]
    return [*alone, tuple(range(count))] if count > 1 else alone


TOLERANCES = {
    "float": 1e-5, "to": 1e-5, "type": 1e-5, "type_as": 1e-5, "half": 2e-2, "bfloat16": 2e-1, "celu_": 1e-7,  # torch's own, in place
}  # fmt: skip
HELD = (RuntimeError, TypeError, ValueError, IndexError, NotImplementedError, AttributeError)


FULL = os.environ.get("TERMWISE_SWEEP") == "full"


def short_of(name):
    return name.removesuffix(".__get__").rpartition(".")[2]


def functions_by_name():
    """Group functions of one name, such as torch's, Tensor's and the one in place."""
    groups = {}
    for function in RULES:
        short = short_of(name_of(function))
        plain = short if short == "requires_grad_" else short.removesuffix("_")
        groups.setdefault(plain, []).append(function)
    return groups


def equal(ours, expected, exact):
    one, other = (torch.cat([part.reshape(-1) for part in parts]) for parts in (ours, expected))
    return torch.allclose(one, other, rtol=exact, atol=exact)


@pytest.mark.filterwarnings("ignore:Converting a tensor with requires_grad=True to a scalar")
@pytest.mark.parametrize("functions", functions_by_name().values(), ids=functions_by_name())
def test_a_rule_is_what_reverse_mode_gives(functions):
    """All samples, each tensor alone and all of them; once a rule is proven, one call of others.

    Functions of one name share the reference, unless TERMWISE_SWEEP=full.
    """
    proven, references = set(), {}
    for function in functions:
        name = name_of(function)
        if name.endswith(".cuda") and not torch.cuda.is_available():
            continue
        short = short_of(name)
        exact = TOLERANCES.get(short, 1e-9)
        in_place = short.endswith("_") and not short.endswith("__")
        samples = samples_of(name)
        assert samples, f"{name} has a rule, and no arguments to try it with"
        samples = samples[:1] if in_place else samples
        count = 0
        cases = [(one, k) for one in samples for k in reversed(choices(len(tensors_in(one))))]
        for sample, chosen in cases:
            tensors = tensors_in(sample)
            starts = [tensors[i] for i in chosen]
            size = sum(start.numel() for start in starts)
            generator = torch.Generator().manual_seed(5)
            weight = 0.3 * torch.randn(D + 1, size, generator=generator, dtype=torch.float64)
            problem = function, sample, chosen, weight.requires_grad_(), starts
            key = function if FULL else None, id(sample), chosen
            try:
                if key not in references:
                    references[key] = with_gradient(by_reverse(*problem), weight)
            except HELD:
                continue  # torch does not take these arguments, or cannot differentiate them
            try:
                ours = with_gradient(by_carriers(*problem), weight)
            except _forward_laplacian.UnknownFunctionError:
                continue  # what is not known is differentiated backward
            count += 1
            if not equal(ours, references[key], exact):
                torch.testing.assert_close(
                    ours,
                    references[key],
                    rtol=exact,
                    atol=exact,
                    msg=lambda m: f"{name}: {m}",  # noqa: B023
                )
            if RULES[function] in proven and not FULL:
                break
        assert count, f"no arguments of {name} went through"
        proven.add(RULES[function])
