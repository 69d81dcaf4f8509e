"""Gradients that are accumulated over micro-batches are those of one batch, over ranks too."""

import contextlib
from types import SimpleNamespace

import pytest
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import termwise as tw
from termwise.joint_embedding import VICRegTerms, vicreg_loss


@tw.terms
class ScaledTerms(tw.Terms):
    apart: Float[Tensor, ""]


def scaled(z: Tensor, scale: Tensor, labels: Tensor | None = None) -> ScaledTerms:
    """Return a loss whose terms are of all rows, with a learnt scale."""
    apart = (scale * z @ z.T).logsumexp(1).mean()
    pulled = 0 if labels is None else (z[labels] - z).square().mean()
    return ScaledTerms(loss=apart + pulled, apart=apart)


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.layers = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4)).double()
        self.log_scale = nn.Parameter(torch.tensor(0.3, dtype=torch.float64))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.layers(x), self.log_scale.exp()


def rows(n: int = 11, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, 6, generator=generator, dtype=torch.float64)


def gradients(module: nn.Module) -> list[Tensor]:
    return [parameter.grad for parameter in module.parameters()]


def check(found: object, expected: object) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("sizes", [[11], [4, 0, 7], [1] * 11])
def test_one_encoder_and_a_scale_that_it_returns(sizes):
    whole, parts = Network(), Network()
    expected = scaled(*whole(rows()))
    expected.loss.backward()
    found = tw.cached_gradients(parts, rows().split(sizes), scaled)
    assert isinstance(found, ScaledTerms)
    assert not found.loss.requires_grad
    check(found.metrics(), expected.metrics())
    check(gradients(parts), gradients(whole))
    tw.cached_gradients(parts, rows().split(sizes), scaled)  # they add, as with `backward`
    check(gradients(parts), [2 * gradient for gradient in gradients(whole)])


def test_two_encoders_labels_and_a_scale_of_the_loss():
    whole, parts = ((Network(), Network(), Network()) for _ in "12")
    x, y, labels = rows(seed=1), rows(seed=2), torch.arange(11).roll(2)

    def loss(left, right, labels, scale):
        return scaled(torch.cat([left, right]), scale, torch.cat([labels, labels + 11]))

    loss(whole[0](x)[0], whole[1](y)[0], labels, whole[2].log_scale).loss.backward()
    tw.cached_gradients(
        lambda batch: [parts[0](batch[0])[0], parts[1](batch[1])[0], batch[2]],
        zip(x.split(3), y.split(3), labels.split(3), strict=True),
        lambda left, right, labels: loss(left, right, labels, parts[2].log_scale),
    )
    for found, expected in zip(parts, whole, strict=True):
        check(gradients(found), gradients(expected))


def test_random_numbers_are_those_of_one_pass():
    dropping = nn.Sequential(nn.Linear(6, 64), nn.Dropout(0.5), nn.Linear(64, 4)).double()
    torch.manual_seed(5)
    embeddings = [dropping(part) for part in rows().split(4)]
    vicreg_loss(torch.cat(embeddings), rows()[:, :4]).loss.backward()
    expected, after = gradients(dropping), torch.get_rng_state()
    dropping.zero_grad()
    torch.manual_seed(5)
    tw.cached_gradients(dropping, rows().split(4), lambda z: vicreg_loss(z, rows()[:, :4]))
    check(gradients(dropping), expected)
    assert torch.equal(torch.get_rng_state(), after)


def test_the_state_of_an_accelerator_is_restored_too(monkeypatch):
    device = SimpleNamespace(state=torch.zeros(()))
    device.get_rng_state = lambda: device.state
    device.set_rng_state = lambda state: setattr(device, "state", state)
    monkeypatch.setattr(
        torch.accelerator, "current_accelerator", lambda check_available: torch.device("cuda")
    )
    monkeypatch.setattr(torch, "get_device_module", lambda _: device)
    seen = []

    def embed(x):
        seen.append(device.state.item())
        device.state = device.state + 1
        return network(x)[0]

    network = Network()
    tw.cached_gradients(embed, rows().split(4), lambda z: vicreg_loss(z, 0 * z))
    assert seen == [0, 1, 2, 0, 1, 2]
    assert device.state == 3


def test_backward_may_scale_the_loss():
    plain, large = Network(), Network()
    tw.cached_gradients(plain, rows().split(4), scaled)
    terms = tw.cached_gradients(
        large, rows().split(4), scaled, backward=lambda loss: (1024 * loss).backward()
    )
    check(gradients(large), [1024 * gradient for gradient in gradients(plain)])
    assert terms.loss < 100


def test_halves_in_autocast_have_the_gradients_of_one_pass():
    whole, parts = Network().float(), Network().float()
    x = rows().float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        vicreg_loss(whole(x)[0], x[:, :4]).loss.backward()
        tw.cached_gradients(lambda x: parts(x)[0], x.split(4), lambda z: vicreg_loss(z, x[:, :4]))
    for found, expected in zip(gradients(parts.layers), gradients(whole.layers), strict=True):
        torch.testing.assert_close(found, expected, rtol=2e-2, atol=2e-2)


def test_all_but_the_last_second_pass_is_inside_no_sync():
    network, inside, seen = Network(), [], []

    @contextlib.contextmanager
    def no_sync():
        inside.append(1)
        yield
        inside.pop()

    def embed(x):
        seen.append((torch.is_grad_enabled(), len(inside)))
        return network(x)

    tw.cached_gradients(embed, rows().split(4), scaled, no_sync=[no_sync, no_sync])
    assert seen == [(False, 2)] * 3 + [(True, 2)] * 2 + [(True, 0)]
    assert not inside


@pytest.mark.parametrize(
    ("embed", "parts", "loss", "error", "message"),
    [
        (Network(), [], scaled, ValueError, "at least one micro-batch, got none"),
        (lambda x: {"z": x}, [3], scaled, TypeError, "a tensor, or a tuple or list of t.*got dict"),
        (lambda x: [x, 2.0], [3], scaled, TypeError, "a tensor, or a tuple or list .*, got list"),
        (lambda x: [x] * len(x), [2, 3], scaled, ValueError, r"as many .*, got \[2, 3\]"),
        (Network(), [3], lambda z, s: z.sum() * s, TypeError, "a termwise.Terms, got Tensor"),
        (lambda x: (x, x.sum()), [3], scaled, ValueError, "a tensor of embed that requires a grad"),
    ],
)
def test_refuses(embed, parts, loss, error, message):
    with pytest.raises(error, match=f"^cached_gradients needs .*{message}"):
        tw.cached_gradients(embed, [rows(part) for part in parts], loss)


def on_a_rank(group, parts) -> tuple[VICRegTerms | None, list[Tensor], int]:
    """Return terms, gradients, and how often gradients were sent."""
    network = Network()
    sent = []
    embed = network
    if group is not None:
        embed = DistributedDataParallel(network, process_group=group)

        def count(_, bucket):
            sent.append(bucket)
            flat = bucket.buffer()
            torch.distributed.all_reduce(flat, group=group)
            done = torch.futures.Future()
            done.set_result(flat / group.size())
            return done

        embed.register_comm_hook(None, count)

    terms = tw.cached_gradients(
        embed,
        parts,
        lambda z, scale: vicreg_loss(z * scale, z.flip(1), batch_group=group),
        no_sync=[] if group is None else [embed.no_sync],
    )
    return terms.metrics(), gradients(network), len(sent)


def test_over_ranks_they_are_those_of_one_process_and_are_sent_once(ranks):
    expected, of_one, _ = on_a_rank(None, [rows()])
    parts = rows().split([2, 3, 0, 4, 2])
    for metrics, found, sent in ranks(on_a_rank, [parts[:2], parts[2:3], parts[3:]]):
        check(metrics, expected)
        check(found, of_one)
        assert sent == 1
