"""The functions of `pydensecrf.utils`: energies from labels and probabilities, features from images. The file has that module's name."""

import warnings
from collections.abc import Sequence
from numbers import Number

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]


def unary_from_labels(labels: NDArray[np.integer], n_labels: int, gt_prob: float, zero_unsure: bool = True) -> Array:
    """Energies that trust a labelling by a given probability.

    Args:
        labels: integers of any shape. With `zero_unsure` 0 means unknown and 1..n_labels are the labels; without it 0..n_labels - 1 are.
        n_labels: number of labels, the unknown not counted.
        gt_prob: probability of the given label, in (0, 1); the other labels share the rest. Where unknown, all are equally likely.

    Returns:
        (n_labels, labels.size) negative logarithms of probabilities.
    """
    if not 0 < gt_prob < 1:
        raise ValueError(f"gt_prob={gt_prob}; a probability that leaves room for doubt lies in (0, 1)")
    flat = np.asarray(labels).reshape(-1).astype(np.int64) - (1 if zero_unsure else 0)
    lowest = -1 if zero_unsure else 0
    if flat.size and not lowest <= flat.min() <= flat.max() < n_labels:
        shift = 1 if zero_unsure else 0
        raise ValueError(
            f"labels reach from {flat.min() + shift} to {flat.max() + shift}; with n_labels={n_labels} and zero_unsure={zero_unsure} "
            f"they lie in 0..{n_labels - 1 + shift}"
        )
    probability = np.full((n_labels, flat.size), (1 - gt_prob) / max(n_labels - 1, 1))
    probability[flat, np.arange(flat.size)] = gt_prob
    probability[:, flat < 0] = 1 / n_labels
    return (-np.log(probability)).astype(np.float32)


def unary_from_softmax(sm: NDArray[np.floating], scale: float | None = None, clip: float | None = 1e-5) -> Array:
    """Energies from probabilities.

    Args:
        sm: (n_labels, ...) probabilities.
        scale: in (0, 1]; how far to trust them: they are mixed with the uniform distribution, scale to 1 - scale. None trusts them.
        clip: probabilities below are raised to it, so that energies stay finite; None leaves them.

    Returns:
        (n_labels, points) negative logarithms.
    """
    if scale is not None:
        if not 0 < scale <= 1:
            raise ValueError(f"scale={scale}; it lies in (0, 1]")
        sm = scale * sm + (1 - scale) / len(sm)
    if clip is not None:
        sm = np.clip(sm, clip, 1.0)
    return -np.log(sm).reshape(len(sm), -1).astype(np.float32)


def create_pairwise_gaussian(sdims: Sequence[float], shape: Sequence[int]) -> Array:
    """Positions in an array of any number of dimensions, divided by a bandwidth per dimension: (len(shape), points)."""
    if len(sdims) != len(shape):
        raise ValueError(f"{len(sdims)} bandwidths sdims for {len(shape)} dimensions; give one each")
    grid = np.indices(shape, np.float32)
    return grid.reshape(len(shape), -1) / _column(sdims, len(shape))


def create_pairwise_bilateral(sdims: Sequence[float], schan: float | Sequence[float], img: NDArray[np.generic], chdim: int = -1) -> Array:
    """Positions and colours of an array of any number of dimensions, divided by their bandwidths: (dimensions + channels, points).

    Args:
        sdims: a bandwidth per dimension, channels not counted.
        schan: a bandwidth per channel, or one for all.
        img: the image, volume, ...
        chdim: which axis is the channels; -1 says that there is none (not that it is the last).
    """
    channels = np.asarray(img)[None] if chdim == -1 else np.moveaxis(np.asarray(img), chdim, 0)
    flat = channels.reshape(len(channels), -1).astype(np.float32)
    scale = np.float32(schan) if isinstance(schan, Number) else _column(schan, len(flat))  # type: ignore[arg-type]
    return np.concatenate([create_pairwise_gaussian(sdims, channels.shape[1:]), flat / scale])


def compute_unary(labels: NDArray[np.integer], M: int, GT_PROB: float = 0.5) -> Array:  # noqa: N803
    """Old name of `unary_from_labels`."""
    warnings.warn("compute_unary is the old name of unary_from_labels", DeprecationWarning, stacklevel=2)
    return unary_from_labels(labels, M, GT_PROB)


def softmax_to_unary(sm: NDArray[np.floating], GT_PROB: float = 1) -> Array:  # noqa: N803
    """Old name of `unary_from_softmax`, without clipping."""
    warnings.warn("softmax_to_unary is the old name of unary_from_softmax", DeprecationWarning, stacklevel=2)
    return unary_from_softmax(sm, None if GT_PROB == 1 else GT_PROB, clip=None)


def _column(bandwidths: Sequence[float], count: int) -> Array:
    if len(bandwidths) != count:
        raise ValueError(f"{len(bandwidths)} bandwidths {list(bandwidths)} for {count} dimensions or channels; give one each")
    return np.array(bandwidths, np.float32)[:, None]
