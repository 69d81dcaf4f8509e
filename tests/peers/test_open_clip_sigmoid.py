"""open_clip's SigLIP loss beside ours; its embeddings come normalised."""

import pytest
import torch
import torch.nn.functional as F
from open_clip.loss import SigLipLoss
from torch.testing import assert_close

from termwise.joint_embedding import sigmoid_contrastive_loss


@pytest.mark.parametrize("n", [2, 7, 600])  # the last in tiles
def test_value_and_gradients(n):
    generator = torch.Generator().manual_seed(0)
    shapes = [(n, 5), (n, 5), (), ()]
    a, b, log_scale, bias = (
        torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()
        for shape in shapes
    )
    inputs = [a, b, log_scale, bias]
    theirs = SigLipLoss()(F.normalize(a, dim=1), F.normalize(b, dim=1), log_scale.exp(), bias)
    ours = sigmoid_contrastive_loss(a, b, scale=log_scale.exp(), bias=bias).loss
    assert_close(ours, theirs)
    assert_close(torch.autograd.grad(ours, inputs), torch.autograd.grad(theirs, inputs))
