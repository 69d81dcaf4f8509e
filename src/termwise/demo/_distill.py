"""Train a small student with and without a teacher that has another tokenizer.

The student's text is a small part of the teacher's. What the teacher learnt from the rest can reach
the student only through the distillation across tokenizers.
"""

import dataclasses
import importlib
import math
import re
from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from .. import lm
from .._terms import Terms, terms
from . import _report
from ._training import Curves, Run, Setting, help_paragraphs, train

_PASSAGE = 128  # characters
_HELD_OUT = 128  # passages to evaluate on
_SEEN = 100  # training passages of the students; the teacher is trained on all
_BATCH = 8
_TEACHER_TOKENS, _STUDENT_TOKENS = 512, 1024
_TEACHER_WIDTH, _STUDENT_WIDTH = 96, 48
_TEACHER_RATE, _STUDENT_RATE = 6e-3, 4e-3
_WEIGHT = 1.0  # of the distillation loss, which is added to the cross-entropy
_MEASURED = 8  # evaluations during a training
_BATCH_MEASURED = 64
_START = "<s>"
_MARKS = ((_report.GREY, "o"), (_report.BLUE, "s"), (_report.ORANGE, "^"))

DistillTerms = lm.ProjectedKLTerms | lm.PartitionedTerms
Distill = Callable[[Tensor, Tensor, lm.Alignment], DistillTerms]


@terms
class StudentTerms(Terms):
    """A custom loss: a cross-entropy plus a loss of this library."""

    loss: Float[Tensor, ""]
    """cross_entropy + weight * distillation."""
    cross_entropy: Float[Tensor, ""]
    """Of the next token, in nats, mean over tokens."""
    distillation: Float[Tensor, ""] | None = None
    """The distillation loss, mean over chunks. None for a student without a teacher."""
    top1_agreement: Float[Tensor, ""] | None = None
    """Share of chunks in which student and teacher agree on the most likely token."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Student:
    """One training of the student."""

    terms: Curves
    held_out: dict[int, float]
    """Bits per byte of held-out text, by step."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chunk:
    """A span of a sentence between two token boundaries that both tokenizers have."""

    student: list[tuple[int, int]]
    """Start and end of each token in the sentence."""
    teacher: list[tuple[int, int]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Distillation:
    """Trainings of a student with and without a teacher."""

    students: dict[str, Student]
    teacher: Curves
    aligned: str
    """The sentence whose alignment is drawn."""
    chunks: list[Chunk]
    """The chunks of that sentence."""
    measured: dict[str, float]
    sentence: str
    """The result on held-out data, in words."""

    def table(self, name: str, seconds: float) -> "_report.Table":
        terms = ("cross_entropy", "distillation", "top1_agreement")
        headings = [term.replace("_", "\n", 1) for term in terms]
        title = f"{name}: {_report.length(self.teacher)} steps each, {seconds:.1f} s"
        table = _report.new_table(title, "\nstudent", *headings, "held-out\nbits per byte")
        for training, student in self.students.items():
            ends = [f"{student.terms[t][-1]:.4g}" if t in student.terms else "" for t in terms]
            table.add_row(training, *ends, f"{_report.last(student.held_out):.3f}")
        table.caption = "Terms of the last step."
        return table

    def as_json(self) -> dict[str, object]:
        return {
            "teacher": {"terms": _report.json_curves(self.teacher)},
            "students": {
                training: {
                    "terms": _report.json_curves(student.terms),
                    "held_out_bits_per_byte": _report.json_numbers(student.held_out),
                }
                for training, student in self.students.items()
            },
            "measured": _report.json_numbers(self.measured),
        }

    def figure(self) -> "_report.Figure":
        """Draw the bits per byte, two of the terms, and the alignment of a sentence."""
        figure = _report.new_figure(11, 6.7)
        grid = figure.add_gridspec(3, 3, height_ratios=(1, 1, 0.6))
        bits = figure.add_subplot(grid[:2, :2])
        cross_entropy, distillation = (figure.add_subplot(grid[row, 2]) for row in range(2))
        for (training, student), (color, marker) in zip(self.students.items(), _MARKS, strict=True):
            _report.draw_curve(bits, student.held_out, training, color, marker=marker)
            _report.draw_curve(cross_entropy, student.terms["cross_entropy"], training, color)
            if "distillation" in student.terms:
                _report.draw_curve(distillation, student.terms["distillation"], training, color)
        self._mark_ends(bits)
        _report.label_panel(bits, "held-out text (lower is better)", "bits per byte")
        title = "training text, nats per token"
        _report.label_panel(cross_entropy, title, "cross_entropy")
        title = "divergence, nats per chunk"
        _report.label_panel(distillation, title, "distillation")
        bits.grid(color=_report.GREY, alpha=0.25, linewidth=0.5)
        _draw_alignment(figure.add_subplot(grid[2, :]), self.aligned, self.chunks)
        _report.draw_legend(figure, bits)
        return figure

    def _mark_ends(self, panel: "_report.Axes") -> None:
        """Write the last value of each training beside its curve, and draw the teacher's value."""
        teacher = self.measured["bits_per_byte_teacher"]
        panel.axhline(teacher, color=_report.GREY, linewidth=1, linestyle=":", zorder=0)
        ends = {teacher: (f"{teacher:.3f} teacher", _report.GREY)}
        for student, (color, _) in zip(self.students.values(), _MARKS, strict=True):
            ends[_report.last(student.held_out)] = (f"{_report.last(student.held_out):.3f}", color)
        bottom, top = panel.get_ylim()
        height = math.inf
        for value, (text, color) in sorted(ends.items(), reverse=True):
            height = min(value, height - 0.04 * (top - bottom))  # below the previous text
            look: dict[str, Any] = {"va": "center", "color": color, "fontsize": 9}
            panel.text(1.01, height, text, transform=panel.get_yaxis_transform(), **look)


def _draw_alignment(panel: "_report.Axes", sentence: str, chunks: list[Chunk]) -> None:
    """Draw the student's tokens of a sentence above, the teacher's below, and chunks between."""
    for chunk in chunks:
        several = max(len(chunk.student), len(chunk.teacher)) > 1
        color = _report.GREEN if several else "#5A5A5A"
        gap = 0.06  # characters on either side of a token
        for spans, bottom, top, alpha in (
            ([(chunk.student[0][0], chunk.student[-1][1])], 0.8, 1.2, 0.25),
            (chunk.student, 1.2, 2.0, 1.0),
            (chunk.teacher, 0.0, 0.8, 1.0),
        ):
            for first, end in spans:
                ends = [first + gap, end - gap]
                panel.fill_between(ends, bottom, top, color=color, alpha=alpha, linewidth=0)
    look: dict[str, Any] = {"fontsize": 9.5, "color": "white", "ha": "center", "va": "center"}
    for index, character in enumerate(sentence.replace(" ", "\N{MIDDLE DOT}")):
        for middle in (1.58, 0.38):
            panel.text(index + 0.5, middle, character, family="monospace", **look)
    panel.set_xlim(0, len(sentence))
    panel.set_ylim(-0.05, 2.05)
    panel.set_yticks([0.4, 1.6], ["teacher", "student"], fontsize=9, fontweight="bold")
    panel.tick_params(axis="y", length=0)
    panel.xaxis.set_visible(False)
    panel.spines[:].set_visible(False)
    panel.set_title(
        "tokens of a held-out sentence: a chunk is the shortest text between boundaries of both "
        "tokenizers (green: its tokens differ)",
        fontsize=9,
    )


def run(setting: Setting) -> Distillation:
    """Train a teacher, then the same student in three ways."""
    kept, held_out = _passages(setting)
    student_text, teacher_text = (
        _Tokenized(tokens, kept, held_out) for tokens in (_STUDENT_TOKENS, _TEACHER_TOKENS)
    )
    teacher = _Model(len(teacher_text.tokens), teacher_text.longest, _TEACHER_WIDTH, setting)
    teacher_curves = _train_teacher(teacher, teacher_text, setting)
    teacher_bits = _bits_per_byte(teacher, teacher_text.held_out, held_out, setting)

    data = _StudentData(teacher, student_text, teacher_text, kept[:_SEEN], setting)
    projection = lm.VocabProjection.from_tokens(student_text.tokens, teacher_text.tokens)
    partition = lm.vocab_partition(projection, rule="strict").to(setting.device)
    projection = projection.to(setting.device)

    def projected(student: Tensor, teacher: Tensor, alignment: lm.Alignment) -> DistillTerms:
        return lm.projected_kl_loss(student, teacher, alignment=alignment, projection=projection)

    def partitioned(student: Tensor, teacher: Tensor, alignment: lm.Alignment) -> DistillTerms:
        return lm.partitioned_loss(student, teacher, alignment=alignment, partition=partition)

    losses: dict[str, Distill | None] = {
        "cross-entropy only": None,
        "projected KL": projected,
        "partitioned": partitioned,
    }
    students = {
        name: _train_student(name, distill, data, student_text, held_out, setting)
        for name, distill in losses.items()
    }
    bits = {name: _report.last(student.held_out) for name, student in students.items()}
    size = sum(len(passage.encode()) for passage in held_out)
    aligned = _sentence_of("".join(held_out))
    return Distillation(
        students=students,
        teacher=teacher_curves,
        aligned=aligned,
        chunks=_align(aligned, student_text, teacher_text),
        measured={
            "bits_per_byte_teacher": teacher_bits,
            **{
                f"bits_per_byte_{re.sub('[^a-z]', '_', name.lower())}": value
                for name, value in bits.items()
            },
            "common_tokens": float(len(partition.common_student)),
        },
        sentence=(
            f"Bits per byte on {size:,} bytes of held-out text, for one student trained in three "
            f"ways: {', '.join(f'{name} {value:.3f}' for name, value in bits.items())}. The "
            f"teacher reaches {teacher_bits:.3f}. The student is trained on {_SEEN} of the "
            f"teacher's {len(kept):,} passages. It has {_STUDENT_TOKENS:,} tokens, the teacher has "
            f"{_TEACHER_TOKENS}, and {len(partition.common_student)} are in both vocabularies."
        ),
    )


RUN = Run(
    about="distillation of a small language model from a teacher with another tokenizer",
    train=run,
    steps=160,
)


def _passages(setting: Setting) -> tuple[list[str], list[str]]:
    """Split the text of Python's `help()` into passages, a tenth of them held out."""
    kept, held_out = help_paragraphs(setting)
    return _cut("\n\n".join(kept)), _cut("\n\n".join(held_out))[:_HELD_OUT]


def _cut(text: str) -> list[str]:
    starts = range(0, len(text) - _PASSAGE + 1, _PASSAGE)
    return [text[start : start + _PASSAGE] for start in starts]


class _Tokenized:
    """A tokenizer that is trained on the training text, and all passages as its tokens."""

    def __init__(self, tokens: int, kept: list[str], held_out: list[str]) -> None:
        tokenizers = importlib.import_module("tokenizers")
        self.tokenizer = tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
        tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
            single=f"{_START} $A", special_tokens=[(_START, 0)]
        )
        trainer = tokenizers.trainers.BpeTrainer(
            vocab_size=tokens,
            initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
            special_tokens=[_START],
            show_progress=False,
        )
        tokenizer.train_from_iterator(kept, trainer)
        tokenizer.enable_padding(pad_id=0, pad_token=_START)
        names: dict[str, int] = tokenizer.get_vocab()
        ordered = sorted(names, key=names.__getitem__)
        self.tokens = [None if name == _START else name for name in ordered]
        self.kept = self.encode(kept)
        self.held_out = self.encode(held_out)
        self.longest = max(self.kept.shape[1], self.held_out.shape[1])

    def encode(self, texts: list[str]) -> Tensor:
        """Return token ids, padded with -1."""
        encodings = self.tokenizer.encode_batch(texts)
        ids = torch.tensor([one.ids for one in encodings])
        return ids.where(torch.tensor([one.attention_mask for one in encodings]) == 1, -1)

    def offsets(self, texts: list[str]) -> list[list[tuple[int, int]]]:
        """Return the span of each token in its text; empty for padding and the start token."""
        return [one.offsets for one in self.tokenizer.encode_batch(texts)]


class _Model(nn.Module):
    """A causal transformer with one layer."""

    def __init__(self, tokens: int, longest: int, width: int, setting: Setting) -> None:
        super().__init__()
        torch.manual_seed(setting.seed)  # the same initial weights in all trainings of the student
        self.embedding = nn.Embedding(tokens, width)
        self.position = nn.Parameter(0.02 * torch.randn(longest, width))
        # Larger than the position embeddings, because there are few steps.
        nn.init.normal_(self.embedding.weight, std=0.5)
        layer = nn.TransformerEncoderLayer(
            width,
            nhead=width // 24,
            dim_feedforward=2 * width,
            dropout=0.0,
            activation="gelu",
            batch_first=True,
            norm_first=True,
        )
        self.body = nn.TransformerEncoder(
            layer, 1, norm=nn.LayerNorm(width), enable_nested_tensor=False
        )
        self.head = nn.Linear(width, tokens)
        self.to(setting.device)

    def forward(self, ids: Tensor) -> Tensor:
        length = ids.shape[1]
        mask = nn.Transformer.generate_square_subsequent_mask(length, device=ids.device)
        embedded = self.embedding(ids.clamp_min(0)) + self.position[:length]
        return cast("Tensor", self.head(self.body(embedded, mask=mask, is_causal=True)))


def _cross_entropy(logits: Tensor, ids: Tensor, reduction: str = "mean") -> Tensor:
    targets = ids[:, 1:].flatten()
    return F.cross_entropy(
        logits[:, :-1].flatten(0, 1), targets, ignore_index=-1, reduction=reduction
    )


@torch.no_grad()
def _bits_per_byte(model: _Model, ids: Tensor, texts: list[str], setting: Setting) -> float:
    parts = cast("tuple[Tensor, ...]", ids.to(setting.device).split(_BATCH_MEASURED))
    nats = sum(float(_cross_entropy(model(part), part, "sum")) for part in parts)
    return nats / math.log(2) / sum(len(text.encode()) for text in texts)


def _train_teacher(model: _Model, text: _Tokenized, setting: Setting) -> Curves:
    generator = setting.generator()

    def step_terms() -> Terms:
        rows = torch.randint(len(text.kept), (_BATCH,), generator=generator)
        ids = text.kept[rows].to(setting.device)
        return Terms(loss=_cross_entropy(model(ids), ids))

    return train("teacher", setting, [(model.parameters(), _TEACHER_RATE)], step_terms)


class _StudentData:
    """The students' training passages: tokens, logits of the teacher, and their alignment."""

    def __init__(
        self,
        teacher: _Model,
        student_text: _Tokenized,
        teacher_text: _Tokenized,
        texts: list[str],
        setting: Setting,
    ) -> None:
        self.ids = student_text.kept[: len(texts)].to(setting.device)
        # Truncate to the width of the ids, which is the same for all passages.
        offsets = [
            [row[: text.kept.shape[1]] for row in text.offsets(texts)]
            for text in (student_text, teacher_text)
        ]
        self.alignment = lm.align_spans(offsets[0], offsets[1]).check().to(setting.device)
        ids = teacher_text.kept[: len(texts), : self.alignment.teacher_chunk_id.shape[1]]
        self.ids = self.ids[:, : self.alignment.student_chunk_id.shape[1]]
        with torch.no_grad():
            parts = cast("tuple[Tensor, ...]", ids.to(setting.device).split(_BATCH_MEASURED))
            self.logits = torch.cat([teacher(part) for part in parts])

    def __len__(self) -> int:
        return len(self.ids)

    def rows(self, rows: Tensor) -> tuple[Tensor, Tensor, lm.Alignment]:
        """Return the tokens, the teacher's logits and the alignment of some passages."""
        rows = rows.to(self.ids.device)
        fields = dataclasses.fields(self.alignment)
        parts = {field.name: getattr(self.alignment, field.name)[rows] for field in fields}
        return self.ids[rows], self.logits[rows], lm.Alignment(**parts)


def _train_student(
    name: str,
    distill: Distill | None,
    data: _StudentData,
    text: _Tokenized,
    held_out: list[str],
    setting: Setting,
) -> Student:
    model = _Model(len(text.tokens), text.longest, _STUDENT_WIDTH, setting)
    generator = setting.generator()
    measured: dict[int, float] = {}
    interval = max(1, setting.steps // _MEASURED)
    steps = 0

    def step_terms() -> Terms:
        nonlocal steps
        if steps % interval == 0:
            measured[steps] = _bits_per_byte(model, text.held_out, held_out, setting)
        steps += 1
        ids, teacher_logits, alignment = data.rows(
            torch.randint(len(data), (_BATCH,), generator=generator)
        )
        logits = model(ids)
        cross_entropy = _cross_entropy(logits, ids)
        if distill is None:
            return StudentTerms(loss=cross_entropy, cross_entropy=cross_entropy)
        terms = distill(logits, teacher_logits, alignment)
        return StudentTerms(
            loss=cross_entropy + _WEIGHT * terms.loss,
            cross_entropy=cross_entropy,
            distillation=terms.loss,
            top1_agreement=terms.top1_agreement,
        )

    curves = train(name, setting, [(model.parameters(), _STUDENT_RATE)], step_terms)
    measured[setting.steps] = _bits_per_byte(model, text.held_out, held_out, setting)
    return Student(terms=curves, held_out=measured)


def _sentence_of(text: str) -> str:
    """Return the first sentence that fits on a line, or else the start of the text."""
    text = " ".join(text.split())
    found = re.search(r"(?<=\. )[A-Z][^.]{60,80}\.(?= )", text)
    return found.group() if found else text[:80]


def _align(sentence: str, student: _Tokenized, teacher: _Tokenized) -> list[Chunk]:
    """Return the chunks of a sentence."""
    offsets = student.offsets([sentence]), teacher.offsets([sentence])
    alignment = lm.align_spans(*offsets)

    def spans(which: int, ids: Tensor, chunk: int) -> list[tuple[int, int]]:
        return [offsets[which][0][int(index)] for index in ids[0].eq(chunk).nonzero()[:, 0]]

    return [
        Chunk(
            student=spans(0, alignment.student_chunk_id, chunk),
            teacher=spans(1, alignment.teacher_chunk_id, chunk),
        )
        for chunk in range(alignment.max_chunks)
    ]
