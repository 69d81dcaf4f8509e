"""TRL's GKD trainer with the distillation loss of this library, and its terms in the log.

python docs/pages/examples/trl_gkd.py
"""

import random
import tempfile
from typing import Any

import torch
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl.experimental.gkd import GKDConfig, GKDTrainer

import termwise as tw
from termwise.lm import distillation_loss


# --8<-- [start:trainer]
class Distiller(GKDTrainer):
    """GKDTrainer whose divergence is `distillation_loss`, at any beta of its configuration."""

    average = tw.TermAverage()

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | None = None,
    ) -> Any:
        """Return the loss of a micro-batch; tokens whose label is -100 do not count."""
        sees = {name: inputs[name] for name in ("input_ids", "attention_mask")}
        outputs = model(**sees)
        with torch.no_grad():
            teacher = self.teacher_model.eval()(**sees)
        inside = 0 < self.beta < 1
        terms = distillation_loss(
            outputs.logits,
            teacher.logits,
            mask=inputs["labels"] != -100,  # both whole: the loss shifts them itself
            divergence="jensen_shannon" if inside else "reverse" if self.beta else "forward",
            beta=self.beta if inside else 0.5,
        )
        if model.training:
            self.average = self.average.update(terms, weight=terms.num_tokens)
        loss = terms.loss
        if num_items_in_batch is not None:  # tokens of all micro-batches of the optimizer step
            loss = loss * (terms.num_tokens / num_items_in_batch)
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log the mean of each term since the last log, beside what TRL logs."""
        super().log({**logs, **self.average.metrics("terms/")}, start_time)
        self.average = tw.TermAverage()


# --8<-- [end:trainer]

WORDS = ["the", "losses", "of", "language", "models", "have", "names", "and", "shapes"]
TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def sentences(count: int, generator: random.Random) -> list[str]:
    """Return sentences of 2 to 7 words."""
    return [" ".join(generator.choices(WORDS, k=generator.randint(2, 7))) for _ in range(count)]


def tokenizer() -> PreTrainedTokenizerFast:
    """Train a tokenizer with a chat template, so that nothing is downloaded."""
    learned = Tokenizer(models.BPE())
    learned.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    learned.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<|pad|>", "<|end|>", "<|user|>", "<|assistant|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    learned.train_from_iterator(sentences(200, random.Random(0)), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=learned,
        pad_token="<|pad|>",
        eos_token="<|end|>",
        chat_template=TEMPLATE,
    )


def model(seed: int, width: int, dtype: torch.dtype) -> LlamaForCausalLM:
    """Return a tiny random model."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=320,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=128,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
    )
    return LlamaForCausalLM(config).to(dtype)


def main(
    kind: type[GKDTrainer] = Distiller, dtype: torch.dtype = torch.float32, **options: Any
) -> GKDTrainer:
    """Train ten steps of two micro-batches each, and return the trainer."""
    chooser = random.Random(1)
    pairs = zip(sentences(40, chooser), sentences(40, chooser), strict=True)
    roles = ("user", "assistant")
    rows = [
        {"messages": [{"role": r, "content": c} for r, c in zip(roles, pair, strict=True)]}
        for pair in pairs
    ]
    random.seed(3)
    with tempfile.TemporaryDirectory() as folder:
        settings: dict[str, Any] = {
            "output_dir": folder,
            "max_steps": 10,
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 2,
            "learning_rate": 1e-2,
            "lr_scheduler_type": "constant",
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": "none",
            "use_cpu": True,
            "bf16": False,
            "disable_tqdm": True,
            "seed": 3,
            "lmbda": 0.0,  # on the answers of the data set; 1: on those that the student samples
            "max_new_tokens": 6,
            "max_length": 64,
        }
        trainer = kind(
            model=model(1, 32, dtype),
            teacher_model=model(2, 48, dtype),
            args=GKDConfig(**settings | options),
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer(),
        )
        trainer.train()
    return trainer


if __name__ == "__main__":
    for entry in main().state.log_history:
        print(entry)
