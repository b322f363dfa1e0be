"""Streaming scores: counts are gathered picture by picture, and never all predictions at once."""

from perpixel.metrics.region import ABSENT_RULE, Confusion

__all__ = ["ABSENT_RULE", "Confusion"]
