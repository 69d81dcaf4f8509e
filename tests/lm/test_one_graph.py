"""Losses over rows of logits compile once for all sizes, and export with a batch of any size.

`tests/core/test_every_loss.py` compiles every loss once; these are its other ways through the rows.
"""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from termwise import lm
from termwise.lm import Teacher

SIZES = [(2, 3), (3, 5), (4, 2), (5, 7), (2, 9), (7, 4), (3, 8), (6, 6), (8, 3), (4, 11)]


def draw(batch, time):
    generator = torch.Generator().manual_seed(batch * time)
    x, y = (torch.randn(batch, time, 7, generator=generator) for _ in range(2))
    tokens = torch.randint(-1, 7, (batch, time), generator=generator)
    return x.requires_grad_(), y, tokens, tokens % 3 != 1


LOSSES = {
    "next token": lambda x, y, tokens, mask: lm.next_token_loss(x, tokens, mask=mask),
    "jensen shannon": lambda x, y, tokens, mask: lm.distillation_loss(
        x, y, divergence="jensen_shannon", temperature=2.0, mask=mask
    ),
    "bucket": lambda x, y, tokens, mask: lm.distillation_loss(
        x, y, teacher_top_k=2, tail="bucket", mask=mask
    ),
    "crossed": lambda x, y, tokens, mask: lm.cross_tokenizer_loss(
        x, tokens, Teacher(y), score="entropy", mask=mask
    ),
    "averaged": lambda x, y, tokens, mask: lm.cross_tokenizer_loss(
        x, tokens, [Teacher(y), Teacher(y.flip(2))], combine="average_logits", mask=mask
    ),
}


@pytest.mark.parametrize("name", ["bucket", "crossed", "averaged"])
def test_ten_sizes_make_one_graph(name):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(LOSSES[name], fullgraph=True, dynamic=True, backend=counter)
    for sizes in SIZES:
        inputs = draw(*sizes)
        found = compiled(*inputs).loss
    torch.testing.assert_close(found, LOSSES[name](*inputs).loss)
    assert counter.frame_count == 1


def test_a_graph_does_not_grow_with_the_data():
    name, counts = "jensen shannon", []
    for sizes in ((2, 3), (64, 128)):
        torch._dynamo.reset()
        counter = CompileCounterWithBackend("eager")
        compiled = torch.compile(LOSSES[name], fullgraph=True, backend=counter, dynamic=False)
        compiled(*draw(*sizes))
        counts.append(len(counter.graphs[0].graph.nodes))
    assert counts[0] == counts[1]


class Model(torch.nn.Module):
    def __init__(self, loss):
        super().__init__()
        self.loss = loss

    def forward(self, x, y, tokens, mask):
        return self.loss(x, y, tokens, mask).loss


@pytest.mark.parametrize("name", ["next token", "jensen shannon"])
def test_it_exports_with_a_batch_of_any_size(name):
    batch, time = torch.export.Dim("batch"), torch.export.Dim("time", min=3)
    dims = tuple({0: batch, 1: time} for _ in range(4))
    inputs = tuple(x.detach() for x in draw(2, 3))
    exported = torch.export.export(Model(LOSSES[name]), inputs, dynamic_shapes=dims).module()
    for sizes in ((3, 5), (7, 4)):
        other = tuple(x.detach() for x in draw(*sizes))
        torch.testing.assert_close(exported(*other), LOSSES[name](*other).loss)
