"""Which divergence of two distributions, and which mean of the teacher's, losses may take."""

from typing import Literal, TypeAlias

KLDivergence: TypeAlias = Literal["forward", "reverse"]
"""KL(teacher || student), or KL(student || teacher)."""

TeacherMean: TypeAlias = Literal["log", "log_normalized", "prob"]
"""Of the teacher's log-probabilities in a chunk, of the same normalized again, or of its
probabilities."""
