"""Sums, counts, means and maxima over the ranks of a process group, with the correct gradient."""

from ._over_ranks import GradReduction as GradReduction
from ._over_ranks import count_over_ranks as count_over_ranks
from ._over_ranks import max_over_ranks as max_over_ranks
from ._over_ranks import mean_over_ranks as mean_over_ranks
from ._over_ranks import sum_over_ranks as sum_over_ranks
from ._over_ranks import sum_over_ranks_both_ways as sum_over_ranks_both_ways
