"""Find training images that come again, whole or nearly, among the validation images: their scores would be memory, not skill."""

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b

import numpy as np
from PIL import Image

SIDE = 16  # pixels of the small grey picture that confirms a candidate
# Measured on MSRC-21 and CamVid: JPEG of quality 20, half size, noise or 20 % more light change up to 5 bits and leave a correlation of
# 0.99 in 95 of 100 images. The two most alike of 168 MSRC photographs differ in 13 bits and correlate by 0.85; frames of one CamVid drive
# can be closer than that, and count as near duplicates with reason.
NEAR_BITS = 8  # of 64 that may differ
NEAR_CORRELATION = 0.98
CELLS = 2**22  # comparisons at once: three arrays of float32, so 48 MB


@dataclass(frozen=True)
class Fingerprint:
    """What is kept of an image to compare it with others."""

    digest: bytes  # of the decoded values: equal for equal pictures whatever the file
    bits: np.ndarray  # (64,) bool, the difference hash
    small: np.ndarray  # (SIDE*SIDE,) float32, grey, mean 0 and length 1; all 0 for a flat image


def fingerprint(image: np.ndarray) -> Fingerprint:
    """The fingerprint of an image (C, H, W).

    Source of the difference hash: Krawetz 2013, "Kind of Like That": a 9x8 grey thumbnail, one bit for each pixel brighter than its left
    neighbour.
    """
    digest = blake2b(repr((image.shape, str(image.dtype))).encode(), digest_size=16)
    digest.update(np.ascontiguousarray(image).data)
    step = max(1, min(image.shape[1:]) // 144)  # a few thousand pixels are enough for a thumbnail
    grey = Image.fromarray(image[:, ::step, ::step].mean(axis=0, dtype=np.float32))
    tiny = np.asarray(grey.resize((9, 8), Image.Resampling.BOX))
    small = np.asarray(grey.resize((SIDE, SIDE), Image.Resampling.BOX)).ravel()
    small = small - small.mean()
    length = float(np.linalg.norm(small))
    return Fingerprint(digest.digest(), (tiny[:, 1:] > tiny[:, :-1]).ravel(), small / length if length > 1e-6 else np.zeros_like(small))


def find_duplicates(train: Sequence[Fingerprint], val: Sequence[Fingerprint]) -> list[tuple[str, int, int]]:
    """("exact" | "near", index in train, index in val), in the order of `val`; at most one for each validation image, the closest."""
    exact: dict[bytes, int] = {}
    for index, print_ in enumerate(train):
        exact.setdefault(print_.digest, index)
    found = {index: ("exact", exact[print_.digest], index) for index, print_ in enumerate(val) if print_.digest in exact}
    near = [index for index in range(len(val)) if index not in found and val[index].small.any()]
    if train and near:
        theirs = np.stack([val[index].bits for index in near])
        small = np.stack([val[index].small for index in near])
        best = np.full(len(near), NEAR_CORRELATION, dtype=np.float32)
        columns, rows = np.arange(len(near)), max(1, CELLS // len(near))
        for start in range(0, len(train), rows):
            block = train[start : start + rows]
            alike = np.stack([print_.small for print_ in block]) @ small.T
            alike[_hamming(np.stack([print_.bits for print_ in block]), theirs) > NEAR_BITS] = -1
            closest = alike.argmax(axis=0)
            highest = alike[closest, columns]
            for column in np.flatnonzero(highest > best):
                found[near[column]] = ("near", start + int(closest[column]), near[column])
            best = np.maximum(best, highest)
    return [found[index] for index in sorted(found)]


def _hamming(one: np.ndarray, two: np.ndarray) -> np.ndarray:
    """(N, 64) and (M, 64) bool -> (N, M) differing bits; as a product of signs, because a matrix product is the fastest loop there is."""
    differing = (2 * one.astype(np.float32) - 1) @ (2 * two.astype(np.float32) - 1).T
    np.subtract(64, differing, out=differing)
    return np.divide(differing, 2, out=differing)
