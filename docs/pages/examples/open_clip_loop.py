"""A tiny CLIP of open_clip on digits and their names, with the contrastive loss over all ranks.

torchrun --nproc-per-node 2 docs/pages/examples/open_clip_loop.py
"""

import math

import torch
import torch.distributed as dist
from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg
from sklearn.datasets import load_digits
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from termwise.joint_embedding import info_nce_loss

TRAINED, BATCH, STEPS = 1500, 60, 120
DIGITS = load_digits()


def clip() -> CLIP:
    """Return a model for images of 8 x 8 pixels and captions of 3 tokens."""
    torch.manual_seed(0)
    vision = CLIPVisionCfg(layers=2, width=32, head_width=16, patch_size=4, image_size=8)
    text = CLIPTextCfg(context_length=3, vocab_size=12, width=32, heads=2, layers=1)
    return CLIP(16, vision, text)


def images_of(samples: Tensor) -> Tensor:
    """Return images in the form that the model takes."""
    pixels = torch.as_tensor(DIGITS.images, dtype=torch.get_default_dtype())[samples] / 8 - 1
    return pixels[:, None].expand(-1, 3, -1, -1)


def captions_of(names: Tensor) -> Tensor:
    """Return for each digit's name the tokens start, name, end."""
    return torch.stack([torch.full_like(names, 10), names, torch.full_like(names, 11)], 1)


def train(group: dist.ProcessGroup | None) -> CLIP:
    """Train on this rank's part of each batch, or on all of it without a group."""
    names = torch.as_tensor(DIGITS.target)
    generator = torch.Generator().manual_seed(0)  # every rank draws the whole batch
    model = clip()
    # --8<-- [start:train]
    ddp = model if group is None else DistributedDataParallel(model, process_group=group)
    decayed = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]  # logit_scale is one of them
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.2}, {"params": others, "weight_decay": 0.0}], lr=3e-3
    )
    for step in range(STEPS):
        samples = torch.randint(TRAINED, (BATCH,), generator=generator)
        if group is not None:
            samples = samples.tensor_split(group.size())[group.rank()]
        images, texts, scale = ddp(images_of(samples), captions_of(names[samples]))
        terms = info_nce_loss(
            images,  # already of norm 1, as the texts are
            texts,
            scale=scale,  # already the exponential of logit_scale
            symmetric=True,
            normalize=False,
            batch_group=group,
        )
        optimizer.zero_grad()
        terms.loss.backward()
        optimizer.step()
        with torch.no_grad():
            model.logit_scale.clamp_(0, math.log(100))  # as CLIP does after each step
        if step % 40 == 39 and (group is None or group.rank() == 0):
            print(step, terms.metrics())  # of all ranks, on every rank
    # --8<-- [end:train]
    return model


@torch.no_grad()
def held_out_accuracy(model: CLIP) -> float:
    """Return the share of images, not trained on, whose nearest caption is their name."""
    samples = torch.arange(TRAINED, len(DIGITS.target))
    images = model.encode_image(images_of(samples), normalize=True)
    texts = model.encode_text(captions_of(torch.arange(10)), normalize=True)
    found = (images @ texts.T).argmax(1)
    return (found == torch.as_tensor(DIGITS.target)[samples]).double().mean().item()


if __name__ == "__main__":
    dist.init_process_group("gloo")
    trained = train(dist.group.WORLD)
    if dist.get_rank() == 0:
        print(f"held-out accuracy {held_out_accuracy(trained):.3f}")
    dist.destroy_process_group()
