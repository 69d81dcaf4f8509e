"""The vanilla objective: known values and refusals, and what all objectives share."""

import pytest
import torch

import termwise as tw
from termwise.sae import SparseLatents, Vanilla, VanillaObjective, VanillaTerms, vanilla_loss


def tensors(n, d, m, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    x, x_hat = (torch.randn(n, d, generator=generator, dtype=torch.float64) for _ in range(2))
    f = torch.randn(n, m, generator=generator, dtype=torch.float64)
    f = f * (torch.rand(n, m, generator=generator) < 0.6)
    norm = torch.rand(m, generator=generator, dtype=torch.float64) + 0.5
    return [t.to(dtype).requires_grad_() for t in (x, f, x_hat, norm)]


def test_signed_latents_count_and_cost():
    x = torch.zeros(1, 2)
    terms = vanilla_loss(x, torch.tensor([[1.0, 0.0, -3.0]]), x, sparsity_coeff=0.5)
    assert terms.metrics() == {"loss": 2.0, "mse": 0.0, "sparsity": 2.0, "l0": 2.0, "l1": 4.0}


def test_a_sum_over_features_is_d_model_times_the_mean():
    x, f, x_hat, _ = tensors(4, 5, 3)
    mean = vanilla_loss(x, f, x_hat, sparsity_coeff=0.1)
    total = vanilla_loss(x, f, x_hat, sparsity_coeff=0.5, feature_reduction="sum")
    torch.testing.assert_close(total.loss, 5 * mean.loss)


def test_a_transcoder_compares_with_its_target():
    x, f, x_hat, _ = tensors(4, 5, 3)
    target = x.detach() + 1
    assert (
        vanilla_loss(x, f, x_hat, sparsity_coeff=0.1, target=target).metrics()
        == vanilla_loss(target, f, x_hat, sparsity_coeff=0.1).metrics()
    )


def sparse(f, k):
    indices = f.detach().abs().topk(k, dim=1).indices
    return SparseLatents(f.gather(1, indices), indices)


@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_sparse_latents_are_the_dense_ones(normed, masked):
    x, f, x_hat, norm = tensors(5, 4, 8)
    options = {
        "sparsity_coeff": 0.3,
        "decoder_norm": norm if normed else None,
        "mask": torch.arange(5) != 2 if masked else None,
    }
    dense = vanilla_loss(x, f, x_hat, **options)
    few = vanilla_loss(x, sparse(f, 8), x_hat, **options)
    torch.testing.assert_close(dict(few.items()), dict(dense.items()))
    inputs = (f, norm) if normed else (f,)
    torch.testing.assert_close(
        torch.autograd.grad(few.loss, inputs), torch.autograd.grad(dense.loss, inputs)
    )


def test_no_rows_are_no_number():
    x, f, x_hat, _ = tensors(2, 3, 5)
    nothing = torch.zeros(2, dtype=torch.bool)
    assert vanilla_loss(x, f, x_hat, sparsity_coeff=0.3, mask=nothing).loss.isnan()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_halves_are_lifted_before_the_difference(dtype):
    x = torch.full((2, 4), 300.0, dtype=dtype)
    x_hat = torch.full((2, 4), -300.0, dtype=dtype)
    f = torch.full((2, 4096), 40.0, dtype=dtype)
    terms = vanilla_loss(x, f, x_hat, sparsity_coeff=1.0)  # 600^2 and 4096 * 40 overflow in fp16
    assert terms.mse.item() == 360_000.0
    assert terms.l1.item() == 163_840.0
    assert terms.loss.dtype == torch.float32


def test_the_error_is_finite_wherever_its_mean_is():
    x = torch.full((1, 768), 1.5e19)  # the sum of squares is 1.7e41, the mean 2.25e38
    f = torch.zeros(1, 3)
    assert vanilla_loss(x, f, torch.zeros_like(x), sparsity_coeff=0.0).mse.item() == pytest.approx(
        2.25e38
    )


def test_no_features_have_no_error():
    x = torch.zeros(4, 0)
    assert vanilla_loss(x, torch.ones(4, 2), x, sparsity_coeff=1.0).metrics()["loss"] == 2.0


def test_refusals():
    x, f, x_hat, norm = tensors(4, 3, 5)
    with pytest.raises(ValueError, match="^vanilla_loss needs p > 0, got 0$"):
        vanilla_loss(x, f, x_hat, sparsity_coeff=0.1, p=0)
    with pytest.raises(TypeError, match=r"f\.values needs .* batch is 3, but it is 4 in x$"):
        vanilla_loss(x, sparse(f[:3], 2), x_hat, sparsity_coeff=0.1)
    with pytest.raises(tw.ContractError, match="x_hat needs .* axis batch is 3, but it is 4 in x"):
        vanilla_loss(x, f, x_hat[:3], sparsity_coeff=0.1)
    with pytest.raises(tw.ContractError, match="decoder_norm needs .* d_sae is 4, but it is 5 in"):
        vanilla_loss(x, f, x_hat, sparsity_coeff=0.1, decoder_norm=norm[:4])
    with pytest.raises(
        tw.ContractError,
        match=r'f needs Float\[Tensor, "batch d_sae"\] \| SparseLatents, got float64\[5\]: 1 axis',
    ):
        vanilla_loss(x, f[0], x_hat, sparsity_coeff=0.1)
    with pytest.raises(ValueError, match=r"one shape, got \[4, 2\] and \[4, 3\]"):
        SparseLatents(f[:, :2], torch.zeros(4, 3, dtype=torch.int64))


def test_the_module_is_the_function():
    x, f, x_hat, _ = tensors(4, 3, 5)
    objective = VanillaObjective(Vanilla(sparsity_coeff=0.2, p=2.0, feature_reduction="sum"))
    terms = objective(x, f, x_hat)
    assert isinstance(terms, VanillaTerms)
    expected = vanilla_loss(x, f, x_hat, sparsity_coeff=0.2, p=2.0, feature_reduction="sum")
    assert terms.metrics() == expected.metrics()
    assert "sparsity_coeff=0.2, p=2.0" in repr(objective)
    with pytest.raises(tw.ContractError, match="cfg needs Vanilla, got float 0.2"):
        VanillaObjective(0.2)
