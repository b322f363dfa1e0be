"""A scored image with all that the parts of a report ask of it, computed once."""

import math
from dataclasses import dataclass

import numpy as np
import torch

from perpixel.evaluate import Scored


@dataclass(frozen=True)
class Seen:
    """One image of a set, on the CPU; arrays are (H, W) and not to be kept.

    Attributes:
        name: of the file, or of the page of a stack.
        image: (C, H, W) as read.
        truth: int64 class indices, -1 where nothing is known.
        guess: int64 most probable class.
        confidence: float32 probability of `guess`.
        truth_probability: float32 probability of `truth`, 0 where nothing is known.
        entropy: float32, as a share of ln K: 0 sure, 1 all classes equally probable.
        loss: of the image, mean cross-entropy in nats.
    """

    name: str
    image: np.ndarray
    truth: np.ndarray
    guess: np.ndarray
    confidence: np.ndarray
    truth_probability: np.ndarray
    entropy: np.ndarray
    loss: float

    @property
    def known(self) -> np.ndarray:
        """(H, W) bool: where the truth is known."""
        return self.truth >= 0

    @property
    def wrong(self) -> np.ndarray:
        """(H, W) bool: known, and predicted as something else."""
        return self.known & (self.truth != self.guess)

    @property
    def pixel_losses(self) -> np.ndarray:
        """(H, W) float64: -ln of the truth's probability in nats, 0 where nothing is known. Rounding to 0 counts as the least float32."""
        least = np.finfo(np.float32).tiny
        return np.where(self.known, -np.log(np.maximum(self.truth_probability, least).astype(np.float64)), 0.0)


def look(scored: Scored) -> Seen:
    """The view of a scored image, wherever its logits lie."""
    probability = scored.logits.softmax(0)
    confidence, guess = probability.max(0)
    void = scored.labels == scored.ignore
    labels = scored.labels.masked_fill(void, 0)
    chosen = probability.gather(0, labels[None])[0].masked_fill(void, 0.0)
    entropy = torch.special.entr(probability).sum(0) / max(math.log(len(probability)), 1e-9)
    return Seen(
        scored.name,
        scored.image.numpy(),
        labels.masked_fill(void, -1).cpu().numpy(),
        guess.cpu().numpy(),
        confidence.cpu().numpy(),
        chosen.cpu().numpy(),
        entropy.clamp(0, 1).cpu().numpy(),
        scored.loss,
    )
