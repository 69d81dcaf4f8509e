"""A small student trained on text alone, and with a teacher that has another tokenizer.

The student sees a small part of the text that the teacher saw: what the teacher knows of the rest
can only reach it across the two tokenizations.
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
_HELD_OUT = 128  # passages that are measured on
_SEEN = 100  # passages that the students are trained on; the teacher is trained on all
_BATCH = 8
_TEACHER_TOKENS, _STUDENT_TOKENS = 512, 1024
_TEACHER_WIDTH, _STUDENT_WIDTH = 96, 48
_TEACHER_RATE, _STUDENT_RATE = 6e-3, 4e-3
_WEIGHT = 1.0  # of the distillation, beside the cross-entropy
_MEASURED = 8  # times along a training, held out
_BATCH_MEASURED = 64
_START = "<s>"
_MARKS = ((_report.GREY, "o"), (_report.BLUE, "s"), (_report.ORANGE, "^"))

Taught = lm.ProjectedKLTerms | lm.PartitionedTerms
Distill = Callable[[Tensor, Tensor, lm.Alignment], Taught]


@terms
class StudentTerms(Terms):
    """A loss of our own, made of a cross-entropy and a loss of the library."""

    loss: Float[Tensor, ""]
    """cross_entropy + weight * distillation."""
    cross_entropy: Float[Tensor, ""]
    """Of the next token, in nats, mean over tokens."""
    distillation: Float[Tensor, ""] | None = None
    """The library's loss, mean over chunks. None: a student without a teacher."""
    top1_agreement: Float[Tensor, ""] | None = None
    """Share of chunks in which student and teacher put the same token first."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Student:
    """One of the trainings of the student."""

    terms: Curves
    held_out: dict[int, float]
    """Bits for each byte of held-out text, after so many steps."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chunk:
    """A span of a sentence that both tokenizers cut at the same two places."""

    student: list[tuple[int, int]]
    """Where each token starts and stops in the sentence."""
    teacher: list[tuple[int, int]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Distillation:
    """A student's trainings, with a teacher and without."""

    students: dict[str, Student]
    teacher: Curves
    aligned: str
    """A sentence."""
    chunks: list[Chunk]
    """Its alignment."""
    measured: dict[str, float]
    sentence: str
    """What was measured on held-out data, in words."""

    def table(self, name: str, seconds: float) -> "_report.Table":
        terms = ("cross_entropy", "distillation", "top1_agreement")
        headings = [term.replace("_", "\n", 1) for term in terms]
        title = f"{name}: {_report.length(self.teacher)} steps each, {seconds:.1f} s"
        table = _report.new_table(title, "\nstudent", *headings, "held-out\nbits per byte")
        for training, student in self.students.items():
            ends = [f"{student.terms[t][-1]:.4g}" if t in student.terms else "" for t in terms]
            table.add_row(training, *ends, f"{_report.last(student.held_out):.3f}")
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
        """Draw bits per byte, two of the terms, and the alignment of a sentence."""
        figure = _report.new_figure(11, 6.7)
        grid = figure.add_gridspec(3, 3, height_ratios=(1, 1, 0.6))
        bits = figure.add_subplot(grid[:2, :2])
        seen, taught = (figure.add_subplot(grid[row, 2]) for row in range(2))
        for (training, student), (color, marker) in zip(self.students.items(), _MARKS, strict=True):
            _report.draw_curve(bits, student.held_out, training, color, marker=marker)
            _report.draw_curve(seen, student.terms["cross_entropy"], training, color)
            if "distillation" in student.terms:
                _report.draw_curve(taught, student.terms["distillation"], training, color)
        self._mark_ends(bits)
        _report.label_panel(bits, "held-out text (lower is better)", "bits per byte")
        _report.label_panel(seen, "training text, nats a token", "cross_entropy")
        _report.label_panel(taught, "student from teacher, nats a chunk", "distillation")
        bits.grid(color=_report.GREY, alpha=0.25, linewidth=0.5)
        _draw_alignment(figure.add_subplot(grid[2, :]), self.aligned, self.chunks)
        _report.draw_legend(figure, bits)
        return figure

    def _mark_ends(self, panel: "_report.Axes") -> None:
        """Write what each training ends at beside its curve, and where the teacher is."""
        teacher = self.measured["bits_per_byte_teacher"]
        panel.axhline(teacher, color=_report.GREY, linewidth=1, linestyle=":", zorder=0)
        ends = {teacher: (f"{teacher:.3f} the teacher", _report.GREY)}
        for student, (color, _) in zip(self.students.values(), _MARKS, strict=True):
            ends[_report.last(student.held_out)] = (f"{_report.last(student.held_out):.3f}", color)
        bottom, top = panel.get_ylim()
        above = math.inf
        for value, (text, color) in sorted(ends.items(), reverse=True):
            above = min(value, above - 0.04 * (top - bottom))  # where it covers none above it
            look: dict[str, Any] = {"va": "center", "color": color, "fontsize": 9}
            panel.text(1.01, above, text, transform=panel.get_yaxis_transform(), **look)


def _draw_alignment(panel: "_report.Axes", sentence: str, chunks: list[Chunk]) -> None:
    """Draw a sentence's tokens on either side, and between them the chunks that they form."""
    for chunk in chunks:
        several = max(len(chunk.student), len(chunk.teacher)) > 1
        color = _report.GREEN if several else "#5A5A5A"
        gap = 0.06  # characters, on either side, so that tokens show where they end
        for spans, bottom, top, alpha in (
            ([(chunk.student[0][0], chunk.student[-1][1])], 0.8, 1.2, 0.25),
            (chunk.student, 1.2, 2.0, 1.0),
            (chunk.teacher, 0.0, 0.8, 1.0),
        ):
            for first, end in spans:
                ends = [first + gap, end - gap]
                panel.fill_between(ends, bottom, top, color=color, alpha=alpha, linewidth=0)
    look: dict[str, Any] = {"fontsize": 9.5, "color": "white", "ha": "center", "va": "center"}
    for place, character in enumerate(sentence.replace(" ", "\N{MIDDLE DOT}")):
        for middle in (1.58, 0.38):
            panel.text(place + 0.5, middle, character, family="monospace", **look)
    panel.set_xlim(0, len(sentence))
    panel.set_ylim(-0.05, 2.05)
    panel.set_yticks([0.4, 1.6], ["teacher", "student"], fontsize=9, fontweight="bold")
    panel.tick_params(axis="y", length=0)
    panel.xaxis.set_visible(False)
    panel.spines[:].set_visible(False)
    panel.set_title(
        "a held-out sentence as its tokens: a chunk is the shortest text that both cut alike "
        "(green: into different tokens)",
        fontsize=9,
    )


def run(setting: Setting) -> Distillation:
    """Train a teacher, then the same student three ways."""
    kept, held_out = _passages(setting)
    student_side, teacher_side = (
        _Side(tokens, kept, held_out) for tokens in (_STUDENT_TOKENS, _TEACHER_TOKENS)
    )
    teacher = _Model(len(teacher_side.tokens), teacher_side.longest, _TEACHER_WIDTH, setting)
    teacher_curves = _train_teacher(teacher, teacher_side, setting)
    teacher_bits = _bits_per_byte(teacher, teacher_side.held_out, held_out, setting)

    lesson = _Lesson(teacher, student_side, teacher_side, kept[:_SEEN], setting)
    projection = lm.VocabProjection.from_tokens(student_side.tokens, teacher_side.tokens)
    partition = lm.vocab_partition(projection, rule="strict").to(setting.device)
    projection = projection.to(setting.device)

    def projected(student: Tensor, teacher: Tensor, alignment: lm.Alignment) -> Taught:
        return lm.projected_kl_loss(student, teacher, alignment=alignment, projection=projection)

    def partitioned(student: Tensor, teacher: Tensor, alignment: lm.Alignment) -> Taught:
        return lm.partitioned_loss(student, teacher, alignment=alignment, partition=partition)

    ways: dict[str, Distill | None] = {
        "cross-entropy only": None,
        "projected KL": projected,
        "partitioned": partitioned,
    }
    students = {
        name: _train_student(name, way, lesson, student_side, held_out, setting)
        for name, way in ways.items()
    }
    bits = {name: _report.last(student.held_out) for name, student in students.items()}
    size = sum(len(passage.encode()) for passage in held_out)
    aligned = _sentence_of("".join(held_out))
    return Distillation(
        students=students,
        teacher=teacher_curves,
        aligned=aligned,
        chunks=_align(aligned, student_side, teacher_side),
        measured={
            "bits_per_byte_teacher": teacher_bits,
            **{
                f"bits_per_byte_{re.sub('[^a-z]', '_', name.lower())}": value
                for name, value in bits.items()
            },
            "common_tokens": float(len(partition.common_student)),
        },
        sentence=(
            f"Bits per byte on {size:,} held-out bytes, for one student trained three ways on "
            f"{_SEEN} of the {len(kept):,} passages that its teacher saw: "
            f"{', '.join(f'{name} {value:.3f}' for name, value in bits.items())}; the teacher "
            f"itself {teacher_bits:.3f}. The student has {_STUDENT_TOKENS:,} tokens, the teacher "
            f"{_TEACHER_TOKENS}; they share {len(partition.common_student)}."
        ),
    )


RUN = Run(
    about="a small language model taught by one with another tokenizer, or not at all",
    train=run,
    steps=160,
)


def _passages(setting: Setting) -> tuple[list[str], list[str]]:
    """Cut the paragraphs of `help()`, each once, into passages, a tenth of them held out."""
    kept, held_out = help_paragraphs(setting)
    return _cut("\n\n".join(kept)), _cut("\n\n".join(held_out))[:_HELD_OUT]


def _cut(text: str) -> list[str]:
    starts = range(0, len(text) - _PASSAGE + 1, _PASSAGE)
    return [text[start : start + _PASSAGE] for start in starts]


class _Side:
    """A tokenizer of so many tokens, trained on the kept text, and the passages as its tokens."""

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
        """Return the span of each token in its text, which is empty for padding and the start."""
        return [one.offsets for one in self.tokenizer.encode_batch(texts)]


class _Model(nn.Module):
    """A transformer of one layer that reads tokens from left to right."""

    def __init__(self, tokens: int, longest: int, width: int, setting: Setting) -> None:
        super().__init__()
        torch.manual_seed(setting.seed)  # the same weights in all trainings of the student
        self.embedding = nn.Embedding(tokens, width)
        self.position = nn.Parameter(0.02 * torch.randn(longest, width))
        nn.init.normal_(self.embedding.weight, std=0.5)  # for so few steps: far above positions'
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


def _train_teacher(model: _Model, side: _Side, setting: Setting) -> Curves:
    generator = setting.generator()

    def step_terms() -> Terms:
        rows = torch.randint(len(side.kept), (_BATCH,), generator=generator)
        ids = side.kept[rows].to(setting.device)
        return Terms(loss=_cross_entropy(model(ids), ids))

    return train("teacher", setting, [(model.parameters(), _TEACHER_RATE)], step_terms)


class _Lesson:
    """The students' passages: their tokens, the teacher's logits, and how the two align."""

    def __init__(
        self, teacher: _Model, student: _Side, other: _Side, texts: list[str], setting: Setting
    ) -> None:
        self.ids = student.kept[: len(texts)].to(setting.device)
        # Cut to one width for all passages, as the ids are.
        offsets = [
            [row[: ids.shape[1]] for row in side.offsets(texts)]
            for side, ids in ((student, student.kept), (other, other.kept))
        ]
        self.alignment = lm.align_spans(offsets[0], offsets[1]).check().to(setting.device)
        read = other.kept[: len(texts), : self.alignment.teacher_chunk_id.shape[1]]
        self.ids = self.ids[:, : self.alignment.student_chunk_id.shape[1]]
        with torch.no_grad():
            parts = cast("tuple[Tensor, ...]", read.to(setting.device).split(_BATCH_MEASURED))
            self.logits = torch.cat([teacher(part) for part in parts])

    def __len__(self) -> int:
        return len(self.ids)

    def rows(self, rows: Tensor) -> tuple[Tensor, Tensor, lm.Alignment]:
        """Return tokens, the teacher's logits and the alignment of some passages."""
        rows = rows.to(self.ids.device)
        fields = dataclasses.fields(self.alignment)
        parts = {field.name: getattr(self.alignment, field.name)[rows] for field in fields}
        return self.ids[rows], self.logits[rows], lm.Alignment(**parts)


def _train_student(
    name: str,
    way: Distill | None,
    lesson: _Lesson,
    side: _Side,
    held_out: list[str],
    setting: Setting,
) -> Student:
    model = _Model(len(side.tokens), side.longest, _STUDENT_WIDTH, setting)
    generator = setting.generator()
    measured: dict[int, float] = {}
    often = max(1, setting.steps // _MEASURED)
    steps = 0

    def step_terms() -> Terms:
        nonlocal steps
        if steps % often == 0:
            measured[steps] = _bits_per_byte(model, side.held_out, held_out, setting)
        steps += 1
        ids, logits, alignment = lesson.rows(
            torch.randint(len(lesson), (_BATCH,), generator=generator)
        )
        guessed = model(ids)
        cross_entropy = _cross_entropy(guessed, ids)
        if way is None:
            return StudentTerms(loss=cross_entropy, cross_entropy=cross_entropy)
        taught = way(guessed, logits, alignment)
        return StudentTerms(
            loss=cross_entropy + _WEIGHT * taught.loss,
            cross_entropy=cross_entropy,
            distillation=taught.loss,
            top1_agreement=taught.top1_agreement,
        )

    curves = train(name, setting, [(model.parameters(), _STUDENT_RATE)], step_terms)
    measured[setting.steps] = _bits_per_byte(model, side.held_out, held_out, setting)
    return Student(terms=curves, held_out=measured)


def _sentence_of(text: str) -> str:
    """Return the first sentence that fits a line, or else the start of the text."""
    text = " ".join(text.split())
    found = re.search(r"(?<=\. )[A-Z][^.]{60,80}\.(?= )", text)
    return found.group() if found else text[:80]


def _align(sentence: str, student: _Side, teacher: _Side) -> list[Chunk]:
    offsets = student.offsets([sentence]), teacher.offsets([sentence])
    found = lm.align_spans(*offsets)

    def tokens(side: int, ids: Tensor, chunk: int) -> list[tuple[int, int]]:
        return [offsets[side][0][int(place)] for place in ids[0].eq(chunk).nonzero()[:, 0]]

    return [
        Chunk(
            student=tokens(0, found.student_chunk_id, chunk),
            teacher=tokens(1, found.teacher_chunk_id, chunk),
        )
        for chunk in range(found.max_chunks)
    ]
