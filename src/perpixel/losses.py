"""Losses of single samples, and the cost of a batch.

Every loss maps logits (N, K, H, W) and labels (N, H, W) to N numbers, one a sample, and `cost` takes their mean: the reduction
is in one place and the loss of each image can be reported. Arithmetic is float32 (float64 for float64 logits), whatever the
precision of the model, inside autocast too. Where a sample has no labelled pixel its loss is 0 and so is its gradient.
"""

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from scipy import ndimage
from torch import Tensor


def cross_entropy(
    logits: Tensor,
    labels: Tensor,
    *,
    ignore: int = 255,
    class_weights: Tensor | None = None,
    pixel_weights: Tensor | None = None,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
) -> Tensor:
    """Weighted sum of the pixels' cross entropies, divided by the NUMBER of labelled pixels.

    Weights do not enter the division, as in Caffe (SegNet, U-Net, DeepLab; it divides once for a batch, this for each image);
    `torch.nn.CrossEntropyLoss(weight=w)` divides by their sum instead, which takes away much of what they do.

    Args:
        logits: (N, K, H, W), any floating type.
        labels: (N, H, W), any integer type: class indices 0..K-1, or `ignore`.
        ignore: the label of pixels that do not count; not one of the K classes.
        class_weights: (K,) factors by class of the pixel.
        pixel_weights: (N, H, W) factors by pixel; they multiply the class weights. A pixel of weight 0 still counts as labelled.
        label_smoothing: share of the target spread evenly over the classes, 0 to 1 (Szegedy et al. 2016, arXiv:1512.00567, section 7).
        reduction: "sum" leaves the division out, as in FCN and Caffe's `normalize: false`: a sample's pixels add up, samples average.

    Returns:
        (N,) losses in nats.

    Raises:
        ValueError: if shapes do not fit, or (CPU only: on a GPU the check would wait for it) a label is neither a class nor `ignore`.
        TypeError: if logits are not floating or labels not integer.
    """
    logits, labels = _checked(logits, labels, ignore)
    weight = _checked_class_weights(class_weights, logits)
    pixels = F.cross_entropy(logits, labels, weight, ignore_index=ignore, reduction="none", label_smoothing=label_smoothing)
    return _over_labelled(pixels, labels, ignore, pixel_weights, reduction)


def focal(
    logits: Tensor,
    labels: Tensor,
    *,
    ignore: int = 255,
    gamma: float = 2.0,
    class_weights: Tensor | None = None,
    pixel_weights: Tensor | None = None,
) -> Tensor:
    """Cross entropy of each pixel times (1 - p)^gamma, p the probability of its class, divided by the number of labelled pixels.

    Args, returns and errors as in `cross_entropy`; gamma >= 0, and 0 is cross entropy itself. `class_weights` are the paper's alpha.

    Source: Lin et al. 2017, arXiv:1708.02002, eq. 5 (which divides by the anchors assigned to an object: here all labelled pixels).
    """
    if gamma < 0:
        raise ValueError(f"gamma is {gamma}; it must be 0 or more (2 in the paper)")
    logits, labels = _checked(logits, labels, ignore)
    weight = _checked_class_weights(class_weights, logits)
    entropy = F.cross_entropy(logits, labels, ignore_index=ignore, reduction="none")
    # The floor keeps the gradient of x^gamma finite at x = 0 where gamma < 1.
    miss = (-torch.expm1(-entropy)).clamp_min(torch.finfo(entropy.dtype).tiny)
    pixels = miss**gamma * entropy
    if weight is not None:
        pixels = pixels * weight[labels.masked_fill(labels == ignore, 0)]
    return _over_labelled(pixels, labels, ignore, pixel_weights)


def dice(logits: Tensor, labels: Tensor, *, ignore: int = 255) -> Tensor:
    """1 - the mean soft Dice coefficient of the classes present in the sample's labels.

    Dice of a class is 2 sum(p g) / (sum(p) + sum(g)) over labelled pixels, p its softmax probability, g 1 where it is the label.
    Classes that are absent are left out (their Dice would be 0 for any p > 0), so no smoothing constant is needed.

    Args, returns and errors as in `cross_entropy`; losses lie in [0, 1).

    Source: Milletari et al. 2016, arXiv:1606.04797, section 3, with plain instead of squared sums in the denominator
    (Drozdzal et al. 2016, arXiv:1608.04117, eq. 1).
    """
    logits, labels = _checked(logits, labels, ignore)
    probability = logits.softmax(1).flatten(2)
    labelled, index = _flat(labels, ignore)
    truth = _class_sums(labelled, index, logits.shape[1])
    # Sums, not matrix products: autocast would run those in bfloat16.
    predicted = (probability * labelled[:, None]).sum(2)
    overlap = _class_sums(probability.gather(1, index[:, None])[:, 0] * labelled, index, logits.shape[1])
    present = truth > 0
    miss = (1 - 2 * overlap / (predicted + truth).where(present, 1)) * present
    return miss.sum(1) / present.sum(1).clamp_min(1)


def lovasz_softmax(logits: Tensor, labels: Tensor, *, ignore: int = 255) -> Tensor:
    """Convex surrogate of 1 - mean IoU over the classes present in the sample's labels.

    For each present class the pixels' errors |g - p| go through the Lovasz extension of the Jaccard loss. Only present classes are
    sorted, so the time is that of sorting (classes present) x (pixels) numbers a sample.

    Args, returns and errors as in `cross_entropy`; losses lie in [0, 1].

    Source: Berman et al. 2018, arXiv:1705.08790, section 3 (`classes='present'`, `per_image=True` in the authors' code).
    """
    logits, labels = _checked(logits, labels, ignore)
    samples, classes = logits.shape[:2]
    labelled, index = _flat(labels, ignore)
    present = _class_sums(labelled, index, classes) > 0
    sample, klass = present.nonzero(as_tuple=True)  # one row of what follows for each class of each sample
    probability = logits.softmax(1).flatten(2).flatten(0, 1).index_select(0, sample * classes + klass)
    truth = (index[sample] == klass[:, None]) & labelled[sample]
    errors = torch.where(truth, 1 - probability, probability)
    slopes = _lovasz_slopes(errors.detach(), truth, labelled[sample])
    losses = logits.new_zeros(samples).index_add(0, sample, (errors * slopes).sum(1))
    return losses / present.sum(1).clamp_min(1)


LOSSES: dict[str, Callable[..., Tensor]] = {
    "cross_entropy": cross_entropy,
    "dice": dice,
    "focal": focal,
    "lovasz_softmax": lovasz_softmax,
}
PIXEL_LOSSES = ("cross_entropy", "focal")  # those that weights of classes and pixels reach


@dataclass(frozen=True)
class CombinedLoss:
    """A weighted sum of losses; made by `combined`."""

    terms: tuple[tuple[str, float], ...]
    ignore: int = 255
    class_weights: Tensor | None = None
    label_smoothing: float = 0.0
    gamma: float = 2.0
    reduction: str = "mean"

    def __call__(self, logits: Tensor, labels: Tensor, pixel_weights: Tensor | None = None) -> Tensor:
        """(N,) losses of logits (N, K, H, W) against labels (N, H, W); pixel_weights (N, H, W) reach cross entropy and focal."""
        if pixel_weights is not None and not any(name in PIXEL_LOSSES for name, _ in self.terms):
            raise ValueError(f"pixel weights do nothing to {self._names()}; add the term cross_entropy or focal, or leave them out")
        total = logits.new_zeros(len(logits), dtype=torch.promote_types(logits.dtype, torch.float32))
        for name, factor in self.terms:
            total = total + factor * self._term(name, logits, labels, pixel_weights)
        return total

    def _term(self, name: str, logits: Tensor, labels: Tensor, pixel_weights: Tensor | None) -> Tensor:
        if name == "cross_entropy":
            return cross_entropy(
                logits,
                labels,
                ignore=self.ignore,
                class_weights=self.class_weights,
                pixel_weights=pixel_weights,
                label_smoothing=self.label_smoothing,
                reduction=self.reduction,
            )
        if name == "focal":
            weights = self.class_weights
            return focal(logits, labels, ignore=self.ignore, gamma=self.gamma, class_weights=weights, pixel_weights=pixel_weights)
        return LOSSES[name](logits, labels, ignore=self.ignore)

    def _names(self) -> str:
        return " + ".join(name for name, _ in self.terms)


def combined(
    terms: Sequence[tuple[str, float]],
    *,
    ignore: int = 255,
    class_weights: Tensor | None = None,
    label_smoothing: float = 0.0,
    gamma: float = 2.0,
    reduction: str = "mean",
) -> CombinedLoss:
    """A function (logits, labels, pixel_weights=None) -> (N,) losses: the sum of factor * loss over `terms`.

    Args:
        terms: (name in LOSSES, factor > 0), for example [("cross_entropy", 1.0), ("lovasz_softmax", 0.5)].
        ignore, class_weights, label_smoothing, gamma, reduction: as in the single losses. Class weights reach cross entropy and focal only:
            Dice and Lovasz give each class the same say by themselves.

    Raises:
        ValueError: on an unknown name, a factor that is not positive and finite, no term at all, or a setting that no term uses.
    """
    if not terms:
        raise ValueError(f"no loss given; choose one or more of {', '.join(LOSSES)}")
    for name, factor in terms:
        if name not in LOSSES:
            raise ValueError(f"unknown loss {name!r}. Known: {', '.join(LOSSES)}")
        if not (math.isfinite(factor) and factor > 0):
            raise ValueError(f"the factor of {name} is {factor}; it must be a positive number. To leave a loss out, remove its term")
    loss = CombinedLoss(tuple((name, float(factor)) for name, factor in terms), ignore, class_weights, label_smoothing, gamma, reduction)
    if class_weights is not None and not any(name in PIXEL_LOSSES for name, _ in terms):
        raise ValueError(f"class weights do nothing to {loss._names()}; add the term cross_entropy or focal, or use class weights none")
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"label_smoothing is {label_smoothing}; it must lie in 0 to 1")
    if label_smoothing and not any(name == "cross_entropy" for name, _ in terms):
        raise ValueError(f"label_smoothing does nothing to {loss._names()}; add the term cross_entropy, or set it to 0")
    if reduction not in ("mean", "sum"):
        raise ValueError(f"reduction is {reduction!r}; it must be 'mean' or 'sum'")
    if reduction != "mean" and [name for name, _ in terms] != ["cross_entropy"]:
        raise ValueError(f"reduction {reduction!r} is for cross_entropy alone: beside it, {loss._names()} would not be felt; use 'mean'")
    return loss


def cost(losses: Tensor) -> Tensor:
    """The mean of the losses (N,) over all samples, as a scalar.

    A sample without labelled pixels is a sample and counts, with loss 0. The divisor is therefore N and depends on no label, so with
    equally many samples in each of several processes the mean of their costs, and of their gradients, is that of the whole batch.
    """
    return losses.mean()


def labels_at(labels: Tensor, size: tuple[int, int]) -> Tensor:
    """(N, H, W) -> (N, *size): the labels under the pixels of a smaller map whose corners lie on the corners of the image.

    A map of 41x41 pixels gets every eighth label of 321x321, as in DeepLab v1 and v2, whose loss is taken there.
    """
    if labels.shape[-2:] == size:
        return labels
    for axis, (side, target) in enumerate(zip(labels.shape[-2:], size, strict=True), start=1):
        labels = labels.index_select(axis, torch.linspace(0, side - 1, target, device=labels.device).round().long())
    return labels


def class_weights(kind: str, pixels: Sequence[int], pixels_where_present: Sequence[int] | None = None) -> Tensor:
    """(K,) float32 class weights for `cross_entropy` from counts over the training set.

    Args:
        kind: "none": 1 for every class. "median_frequency": median(f) / f, f = pixels / pixels_where_present (Eigen & Fergus 2015,
            arXiv:1411.4734, section 6.3.2), the median over classes seen; without the third argument f is the share of all pixels,
            as in the text of SegNet (arXiv:1511.00561, section 4). "inverse_log": 1 / ln(1.02 + share of all pixels) (ENet,
            Paszke et al. 2016, arXiv:1606.02147, section 5.2), from 1.42 for a class that is everything to 50.5.
        pixels: (K,) labelled pixels of each class.
        pixels_where_present: (K,) labelled pixels of all the images in which the class occurs.

    Returns:
        As published, not rescaled. A class that was never seen weighs 1.

    Raises:
        ValueError: on another kind, negative counts, or counts that contradict each other.
    """
    if kind not in ("none", "median_frequency", "inverse_log"):
        raise ValueError(f"unknown class weights {kind!r}. Known: none, median_frequency, inverse_log")
    count = torch.as_tensor(list(pixels), dtype=torch.float64)
    if not len(count) or bool((count < 0).any()):
        raise ValueError(f"pixels is {list(pixels)}; it must have one count of 0 or more for each class")
    seen = count > 0
    if kind == "none" or not bool(seen.any()):
        return torch.ones(len(count))
    share = count / count.sum()
    if kind == "inverse_log":
        return torch.where(seen, 1 / torch.log(1.02 + share), 1).float()
    frequency = share
    if pixels_where_present is not None:
        reach = torch.as_tensor(list(pixels_where_present), dtype=torch.float64)
        if reach.shape != count.shape or bool((reach < count).any()):
            raise ValueError(
                f"pixels_where_present is {list(pixels_where_present)}; it must be at least pixels ({list(pixels)}), class by class"
            )
        frequency = count / reach.clamp_min(1)
    # quantile, not Tensor.median, which takes the lower of the two middle values of an even number
    return torch.where(seen, frequency[seen].quantile(0.5) / frequency.where(seen, 1), 1).float()


def border_weights(labels: np.ndarray, w0: float = 10.0, sigma: float = 5.0, background: int = 0, ignore: int = 255) -> np.ndarray:
    """U-Net's extra weight of the background between neighbouring cells: w0 * exp(-(d1 + d2)^2 / (2 sigma^2)).

    Cells are the 4-connected components of equal label, `background` and `ignore` apart. d1 and d2 are the distances, in pixels, from
    a background pixel's centre to the nearest pixel centre of the nearest and the second nearest cell, exact up to 6.5 sigma; beyond,
    where the term is below 1e-9 of w0, it is 0.

    Args:
        labels: (H, W) integers.
        w0, sigma: height, and reach in pixels.

    Returns:
        (H, W) float32, 0 in cells, in ignored pixels and everywhere if there are fewer than two cells. It is the second summand of the
        paper's weight map, the first being the class weight: pass `class_weights[labels] + border_weights(labels)` as `pixel_weights` to
        `cross_entropy`, and no class_weights. (`cross_entropy` would multiply them.)

    Raises:
        ValueError: if labels are not two-dimensional integers or sigma is not positive.

    Source: Ronneberger et al. 2015, arXiv:1505.04597, section 3, eq. 2. The restriction to background is ours: the formula is not quite
    0 at the rim inside a cell.
    """
    if labels.ndim != 2 or labels.dtype.kind not in "iub":
        raise ValueError(f"labels are {labels.dtype} {labels.shape}; border weights need (H, W) integers")
    if sigma <= 0:
        raise ValueError(f"sigma is {sigma}; it must be a positive number of pixels (5 in the paper)")
    reach = 6.5 * sigma
    nearest = np.full(labels.shape, np.inf)
    second = np.full(labels.shape, np.inf)
    for window, cell in _cells(labels, (background, ignore), math.ceil(reach)):
        distance = ndimage.distance_transform_edt(~cell)
        second[window] = np.minimum(second[window], np.maximum(nearest[window], distance))
        nearest[window] = np.minimum(nearest[window], distance)
    weights = w0 * np.exp(-((nearest + second) ** 2) / (2 * sigma**2))
    weights[(nearest + second > reach) | (labels != background)] = 0
    return weights.astype(np.float32)


def _checked(logits: Tensor, labels: Tensor, ignore: int) -> tuple[Tensor, Tensor]:
    """Logits as float32 (float64 stays), labels as int64 on the logits' device."""
    if not logits.is_floating_point() or labels.is_floating_point() or labels.is_complex():
        raise TypeError(f"logits are {logits.dtype} and labels {labels.dtype}; a loss needs floating logits and integer labels")
    if logits.ndim != 4 or labels.shape != (len(logits), *logits.shape[2:]):
        shapes = f"logits are {tuple(logits.shape)} and labels {tuple(labels.shape)}"
        raise ValueError(f"{shapes}; a loss needs (N, K, H, W) and (N, H, W) of equal N, H and W. Crop the labels by the model's margin")
    classes = logits.shape[1]
    if 0 <= ignore < classes:
        raise ValueError(f"ignore = {ignore} is one of the {classes} classes; use a value that is not (65535 above 255 classes)")
    labels = labels.to(logits.device, torch.int64)
    if labels.device.type == "cpu":
        wrong = ((labels < 0) | (labels >= classes)) & (labels != ignore)
        if wrong.any():
            found = ", ".join(str(value) for value in labels[wrong].unique()[:5].tolist())
            raise ValueError(
                f"{int(wrong.sum())} labels are not one of the {classes} classes 0..{classes - 1} nor {ignore} = ignore ({found})"
            )
    return logits.to(torch.promote_types(logits.dtype, torch.float32)), labels


def _checked_class_weights(weights: Tensor | None, logits: Tensor) -> Tensor | None:
    if weights is None:
        return None
    if weights.shape != logits.shape[1:2]:
        raise ValueError(f"class_weights are {tuple(weights.shape)}; {logits.shape[1]} classes need ({logits.shape[1]},)")
    return weights.to(logits.device, logits.dtype)


def _over_labelled(pixels: Tensor, labels: Tensor, ignore: int, weights: Tensor | None, reduction: str = "mean") -> Tensor:
    """(N,): sum of the pixels' losses (N, H, W), which are 0 where ignored; "mean": over the count of labelled pixels."""
    if reduction not in ("mean", "sum"):
        raise ValueError(f"reduction is {reduction!r}; it must be 'mean' or 'sum'")
    if weights is not None:
        if weights.shape != pixels.shape:
            raise ValueError(f"pixel_weights are {tuple(weights.shape)}; these labels need {tuple(pixels.shape)}")
        pixels = pixels * weights.to(pixels.device, pixels.dtype)
    total = pixels.sum((1, 2))
    return total if reduction == "sum" else total / (labels != ignore).sum((1, 2)).clamp_min(1)


def _flat(labels: Tensor, ignore: int) -> tuple[Tensor, Tensor]:
    """(N, H*W) each: which pixels are labelled, and class indices with 0 where they are not."""
    labels = labels.flatten(1)
    labelled = labels != ignore
    return labelled, labels.masked_fill(~labelled, 0)


def _class_sums(values: Tensor, index: Tensor, classes: int) -> Tensor:
    """(N, K): sums of values (N, P) by class index (N, P); counts if values are bool."""
    if values.dtype == torch.bool:
        values = values.to(torch.float32)  # exact up to 2^24 pixels a sample
    return values.new_zeros(len(values), classes).scatter_add(1, index, values)


def _lovasz_slopes(errors: Tensor, truth: Tensor, labelled: Tensor) -> Tensor:
    """Gradient of the Lovasz extension of the Jaccard loss, for each row of errors (M, P), truth and labelled (M, P) bool.

    With F true and B other pixels among those of larger error, G true pixels in all, the loss grows by 1 / (G + B) at a true pixel
    and by (G - F) / ((G + B) (G + B + 1)) at another. Written so, not as the difference of two Jaccard losses as in the paper's
    Algorithm 1, it does not cancel in float32.
    """
    if errors.device.type == "cpu" and errors.dtype == torch.float32:
        rows = [array.contiguous().numpy() for array in (errors, truth, labelled)]
        slopes = np.empty_like(rows[0])
        with ThreadPoolExecutor(torch.get_num_threads()) as pool:
            list(pool.map(_compiled_row_slopes(), *rows, slopes))  # a list, so that an error in a thread is not lost
        return torch.from_numpy(slopes)
    order = errors.masked_fill(~labelled, -1).argsort(1, descending=True)
    hit = truth.gather(1, order)
    hits = hit.cumsum(1, dtype=torch.int32)
    place = torch.arange(1, hits.shape[1] + 1, dtype=torch.int32, device=errors.device)
    total = truth.sum(1, keepdim=True, dtype=torch.int32)
    union = (total + place - hits).to(errors.dtype)  # G + B, this pixel included
    slope = torch.where(hit, 1 / union, (total - hits).to(errors.dtype) / (union * (union - 1)))
    return torch.empty_like(slope).scatter_(1, order, slope).masked_fill_(~labelled, 0)


@functools.cache
def _compiled_row_slopes() -> Callable[..., None]:
    from numba import njit  # here, because most runs never need it

    return njit(nogil=True)(_row_slopes)


def _row_slopes(errors: np.ndarray, truth: np.ndarray, labelled: np.ndarray, slopes: np.ndarray) -> None:
    """One row of `_lovasz_slopes`, compiled: a radix sort of float32 bits, several times as fast as a comparison sort.

    Bits of floats >= 0 rise with the float; those up to 1 fit 30 bits, sorted in three passes of ten from the lowest.
    """
    bits = errors.view(np.uint32)
    pixels = np.flatnonzero(labelled).astype(np.int32)
    spare = np.empty_like(pixels)
    starts = np.zeros((3, 1025), np.int64)
    top = np.uint32(0x3F800000)  # 1.0; whatever is above (NaN) must not leave the table
    for pixel in pixels:
        key = top - min(bits[pixel], top)  # turned round: largest error first
        for digit in range(3):
            starts[digit, ((key >> np.uint32(10 * digit)) & np.uint32(1023)) + 1] += 1
    for digit in range(3):
        start = starts[digit].cumsum()
        for pixel in pixels:
            bucket = ((top - min(bits[pixel], top)) >> np.uint32(10 * digit)) & np.uint32(1023)
            spare[start[bucket]] = pixel
            start[bucket] += 1
        pixels, spare = spare, pixels
    slopes[:] = 0
    left = np.int64(truth.sum())  # G - F
    union = left  # G + B
    for pixel in pixels:
        if truth[pixel]:
            slopes[pixel] = 1 / union
            left -= 1
        else:
            slopes[pixel] = left / (np.float64(union) * (union + 1))
            union += 1


def _cells(labels: np.ndarray, not_cells: Sequence[int], reach: int) -> Iterator[tuple[tuple[slice, slice], np.ndarray]]:
    """Each cell as a mask within its bounding box widened by `reach` pixels, with the box."""
    for value in np.setdiff1d(labels, not_cells):
        components, _ = ndimage.label(labels == value)
        for number, box in enumerate(ndimage.find_objects(components), 1):
            rows, columns = (slice(max(side.start - reach, 0), side.stop + reach) for side in box)
            yield (rows, columns), components[rows, columns] == number
