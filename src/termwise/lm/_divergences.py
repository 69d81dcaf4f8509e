"""Options of losses: divergences of two distributions, and means of the teacher's."""

from typing import Literal, TypeAlias

KLDivergence: TypeAlias = Literal["forward", "reverse"]
"""KL(teacher || student), or KL(student || teacher)."""

TeacherMean: TypeAlias = Literal["log", "log_normalized", "prob"]
"""Mean of the teacher's log-probabilities in a chunk, or of its probabilities."""
