"""Streaming scores: counts are gathered picture by picture, and never all predictions at once.

`region` and `tallies` load at once; the scores of shape are imported from their own modules, because numba and scipy take as long to load
as a small evaluation takes to run.
"""

from perpixel.metrics.region import Confusion
from perpixel.metrics.tallies import ABSENT_RULE, ABSENT_RULES

__all__ = ["ABSENT_RULE", "ABSENT_RULES", "Confusion"]
