"""A causal language model under Hugging Face's Trainer, with the loss of this library.

python docs/pages/examples/hf_trainer.py
"""

import tempfile

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments
from transformers.modeling_outputs import CausalLMOutput

import termwise as tw
from termwise.lm import next_token_loss


# --8<-- [start:loss]
class Loss:
    """What `Trainer(compute_loss_func=...)` calls; keeps a mean of the terms between two logs."""

    def __init__(self) -> None:
        self.average = tw.TermAverage()

    def __call__(
        self, outputs: CausalLMOutput, labels: Tensor, num_items_in_batch: Tensor | None = None
    ) -> Tensor:
        """Return a micro-batch's part of the loss of a step; labels of -100 do not count.

        The terms are means over the tokens of the micro-batch. `num_items_in_batch` counts those of
        all micro-batches of the step, so that the parts add up, however unequal they are.
        """
        terms = next_token_loss(outputs.logits, labels)
        self.average = self.average.update(terms, weight=terms.num_tokens)
        if num_items_in_batch is None:
            return terms.loss
        return terms.loss * (terms.num_tokens / num_items_in_batch)


# --8<-- [end:loss]


def main(loss: Loss | None) -> tuple[LlamaForCausalLM, float]:
    """Train three steps of two micro-batches, with the loss given or with the model's own.

    Return the model, and the mean loss of the steps as the trainer reports it.
    """
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        pad_token_id=0,
    )
    model = LlamaForCausalLM(config)
    tokens = torch.randint(1, 64, (12, 10), generator=torch.Generator().manual_seed(1))
    lengths = torch.arange(12) % 7 + 4  # sequences of other lengths: padding does not count
    labels = tokens.where(torch.arange(10) < lengths[:, None], -100)
    rows = [{"input_ids": x, "labels": y} for x, y in zip(tokens, labels, strict=True)]
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            max_steps=3,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            learning_rate=1e-2,
            use_cpu=True,
            report_to=[],
            save_strategy="no",
            disable_tqdm=True,
        )
        trainer = Trainer(model, arguments, train_dataset=rows, compute_loss_func=loss)
        return model, trainer.train().training_loss


if __name__ == "__main__":
    used = Loss()
    main(used)
    print(used.average.metrics())
