"""The example of Hugging Face's Trainer over ranks: with the model's own loss, and with ours.

Rank 0 saves in the file `found` how far the two models are apart, and the mean of the terms.
"""

import hf_trainer
import torch
import torch.distributed as dist

if __name__ == "__main__":
    loss = hf_trainer.Loss()
    ours, _ = hf_trainer.main(loss)
    theirs, _ = hf_trainer.main(None)
    pairs = zip(ours.parameters(), theirs.parameters(), strict=True)
    apart = max((one - other).detach().abs().max().item() for one, other in pairs)
    terms = loss.average.metrics(group=dist.group.WORLD)
    if dist.get_rank() == 0:
        torch.save({"apart": apart, **terms}, "found")
    dist.destroy_process_group()
