"""Label costs learned from masks: which classes are likely neighbours, and which are not.

A refiner pays mu[l, l'] where a pixel labelled l lies beside one labelled l'. Potts' costs make every border equally dear; costs learned
from the masks of a training set make the borders that occur there cheap, and those that never do dear: next to sky, bird before fish.

Sources: pointwise mutual information, Church & Hanks 1990, Computational Linguistics 16(1), section 3; the additive (Laplace) smoothing
of counts that probabilities of rare pairs need, Manning et al. 2008, Introduction to Information Retrieval, section 11.3.2.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

METHODS = ("pmi", "conditional")


def fit_compatibility(
    masks: Iterable[Tensor | np.ndarray],
    classes: int,
    *,
    ignore: int = 255,
    neighbours: int = 8,
    distance: int = 1,
    method: str = "pmi",
    smoothing: float = 1.0,
    cheapest: float = 0.2,
    symmetric: bool = True,
) -> Tensor:
    """Label costs from the borders between classes in a set of masks: `border_counts`, then `label_costs`.

    Args:
        masks, classes, ignore, neighbours, distance: as in `border_counts`. The masks pass by once and are not kept.
        method, smoothing, cheapest, symmetric: as in `label_costs`.

    Returns:
        (K, K) float64 costs: never negative, diagonal 0, mean 1 off it (Potts' costs have 1 everywhere), so that a weight tuned for Potts
        keeps its meaning. Not a metric in general: `is_metric` tells, `as_metric` repairs.

    Raises:
        ValueError: if an option or a mask is not legal, no pixel is labelled, or no two classes ever touch.
    """
    if classes < 2:
        raise ValueError(f"classes is {classes}; label costs need at least 2 classes, since one class has no other to lie beside")
    counts = border_counts(masks, classes, ignore=ignore, neighbours=neighbours, distance=distance)
    return label_costs(counts, method=method, smoothing=smoothing, cheapest=cheapest, symmetric=symmetric)


def border_counts(
    masks: Iterable[Tensor | np.ndarray], classes: int, *, ignore: int = 255, neighbours: int = 8, distance: int = 1
) -> Tensor:
    """How often each two classes lie side by side.

    Args:
        masks: (H, W) integers each, of any sizes: class indices 0..K-1, or `ignore`.
        classes: K.
        ignore: label of pixels that do not count; not one of the K classes.
        neighbours: 4, or 8 with the diagonals.
        distance: pixels 1 to `distance` apart in those directions count as neighbours. More than 1 bridges the strip of `ignore` that
            many data sets leave along borders, and lets wider borders weigh more.

    Returns:
        (K, K) int64, symmetric: pairs of neighbouring pixels labelled l and l', each pair seen from both its ends.

    Raises:
        ValueError: if an option is out of range, a mask is not two-dimensional or has a value that is no class, there is no mask, or no
            pixel is labelled. Masks are numbered from 0 in the message.
        TypeError: if a mask is not of integers.
    """
    if classes < 1 or 0 <= ignore < classes:
        raise ValueError(f"{classes} classes with ignore = {ignore}; there must be a class, and ignore must not be one of them")
    if neighbours not in (4, 8) or distance < 1:
        raise ValueError(f"neighbours = {neighbours}, distance = {distance}; neighbours are 4 or 8, the distance is 1 pixel or more")
    directions = [(0, 1), (1, 0), (1, 1), (1, -1)][: neighbours // 2]
    # Void is a class of its own, dropped after counting: cheaper than picking the labelled pixels of every shift.
    counts = np.zeros((classes + 1, classes + 1), np.int64)
    labelled, number = 0, -1
    for number, mask in enumerate(masks):
        labels = _with_void_last(mask, classes, ignore, number)
        labelled += int((labels != classes).sum())
        for step in range(1, distance + 1):
            for down, right in directions:
                counts += _pairs(labels, down * step, right * step, classes + 1)
    if labelled == 0:
        raise ValueError(f"no pixel of {number + 1} masks is labelled with a class; label costs need masks with classes 0..{classes - 1}")
    counts = counts[:classes, :classes]
    return torch.from_numpy(counts + counts.T)


def label_costs(counts: Tensor, *, method: str = "pmi", smoothing: float = 1.0, cheapest: float = 0.2, symmetric: bool = True) -> Tensor:
    """Costs of label pairs from the counts of their borders. What happens inside a class (the diagonal) plays no part.

    Args:
        counts: (K, K) of `border_counts`, of several sets added up if need be.
        method: with P over all borders between different classes,
            "pmi": c - log(P(l, l') / (P(l) P(l'))): dear where two classes touch less often than their borders' lengths would make them;
            "conditional": -log P(l' | l): dear where l' is a small part of l's border, so that rare classes are dear to everyone.
        smoothing: borders added to every pair (Laplace), in pairs of pixels, more than 0. More of it draws pairs that were rarely or
            never seen towards the others.
        cheapest: "pmi" only: cost of the likeliest pair where the mean is 1, 0 <= cheapest < 1; it decides c. At 0 that border is free.
        symmetric: False keeps -log P(l' | l) as it is, [l, l'] the cost that l pays beside l'; True averages it with its transpose.

    Returns:
        (K, K) float64 as `fit_compatibility` says. A class that touched no other gets 1 with every class: nothing is known about it.

    Raises:
        ValueError: if an option is out of range, `counts` is not square, not symmetric or negative, or holds no border at all.
    """
    _check_options(method, smoothing, cheapest, symmetric)
    borders = _borders(counts)
    known = borders.sum(1) > 0
    off = ~torch.eye(len(borders), dtype=torch.bool)
    evident = off & known[:, None] & known[None, :]
    smooth = torch.where(off, borders + smoothing, 0.0)
    share = smooth.sum(1, keepdim=True)
    if method == "pmi":
        # Products before quotients, so that the costs are symmetric to the last bit.
        costs = torch.where(off, (share * share.T) / (smooth * smooth.sum()), 1.0).log()
        low, mean = costs[evident].min(), costs[evident].mean()
        costs = costs + (cheapest * mean - low) / (1 - cheapest)  # then the least is `cheapest` times the mean
    else:
        costs = -torch.where(off, smooth / share, 1.0).log()
        costs = (costs + costs.T) / 2 if symmetric else costs
    mean = costs[evident].mean()
    # Costs that are all alike, as of two classes, are Potts'; their common value may be 0, and cannot be divided by.
    alike = bool(costs[evident].max() - costs[evident].min() <= 1e-12)
    costs = torch.ones_like(costs) if alike else (costs / mean).clamp_min(0.0)
    return torch.where(evident, costs, 1.0).fill_diagonal_(0.0)


def as_metric(costs: Tensor) -> Tensor:
    """The greatest metric that is nowhere above `costs`: the cheapest way from each label to each other, over other labels if need be.

    Alpha-expansion needs one. Costs only fall, so their mean off the diagonal may end below 1; nothing is scaled back.

    Args:
        costs: (K, K), not negative, symmetric, diagonal 0.

    Returns:
        (K, K) of the same dtype.

    Raises:
        ValueError: if `costs` are not such.
    """
    costs = _checked_costs(costs)
    if not torch.equal(costs, costs.T):
        raise ValueError("costs are asymmetric, and a metric is not; average them with their transpose first: (costs + costs.T) / 2")
    return shortest_paths(costs)


def shortest_paths(costs: Tensor) -> Tensor:
    """(K, K) the cheapest way from each label to each other, over others if need be, for `costs` (K, K) that are not negative.

    Source: Floyd 1962, Algorithm 97, Communications of the ACM 5(6).
    """
    closed = costs.clone()
    for middle in range(len(closed)):
        torch.minimum(closed, closed[:, middle, None] + closed[None, middle, :], out=closed)
    return closed


def is_metric(costs: Tensor, tolerance: float = 1e-9) -> bool:
    """Whether costs are symmetric and no detour over a third label is cheaper, up to `tolerance` of the dearest.

    Two labels may cost nothing (a pseudometric), which alpha-expansion bears. ValueError as in `as_metric`, but for asymmetry.
    """
    costs = _checked_costs(costs)
    slack = tolerance * float(costs.max())
    if float((costs - costs.T).abs().max()) > slack:
        return False
    return bool((costs - as_metric((costs + costs.T) / 2) <= slack).all())


class Neighbours(NamedTuple):
    """A class, and names and costs of those it lies beside most and least willingly, best and worst first."""

    name: str
    likeliest: list[tuple[str, float]]
    unlikeliest: list[tuple[str, float]]

    def __str__(self) -> str:
        likely, unlikely = (", ".join(f"{name} {cost:.2f}" for name, cost in pairs) for pairs in (self.likeliest, self.unlikeliest))
        return f"next to {self.name}: likeliest {likely}; unlikeliest {unlikely}"


def likeliest_neighbours(costs: Tensor, names: Sequence[str], count: int = 3) -> list[Neighbours]:
    """Which neighbours are cheap and which are dear, for people: one row a class, in order.

    Args:
        costs: (K, K) label costs; row l is what l pays.
        names: of the K classes.
        count: how many to list at each end, at most K - 1.

    Raises:
        ValueError: if there are not as many names as costs, or `count` is below 1.
    """
    costs = _checked_costs(costs)
    if len(names) != len(costs) or count < 1:
        raise ValueError(f"{len(names)} names for costs of {len(costs)} classes, count {count}; one name each, and a count of 1 or more")
    rows = []
    for label, name in enumerate(names):
        others = [(other, float(cost)) for i, (other, cost) in enumerate(zip(names, costs[label], strict=True)) if i != label]
        ranked = sorted(others, key=lambda pair: pair[1])
        rows.append(Neighbours(name, ranked[:count], ranked[::-1][:count]))
    return rows


def _with_void_last(mask: Tensor | np.ndarray, classes: int, ignore: int, number: int) -> np.ndarray:
    """(H, W) int64 labels with K in place of `ignore`; errors where a value is neither."""
    labels = mask.detach().cpu().numpy() if isinstance(mask, Tensor) else np.asarray(mask)
    if not (np.issubdtype(labels.dtype, np.integer) or labels.dtype == bool):
        raise TypeError(f"mask {number} is {labels.dtype}; labels must be integers (logits need argmax over the classes first)")
    if labels.ndim != 2:
        raise ValueError(f"mask {number} has shape {labels.shape}; border_counts takes (height, width)")
    labels = labels.astype(np.int64)
    void = labels == ignore
    wrong = labels[((labels < 0) | (labels >= classes)) & ~void]
    if wrong.size:
        found = ", ".join(str(value) for value in np.unique(wrong)[:5])
        raise ValueError(
            f"mask {number}: {wrong.size} pixels have a value that is neither one of the {classes} classes 0..{classes - 1} "
            f"nor ignore = {ignore} ({found})"
        )
    return np.where(void, classes, labels)


def _pairs(labels: np.ndarray, down: int, right: int, values: int) -> np.ndarray:
    """(values, values) counts of labels and the labels `down` and `right` of them."""
    height, width = labels.shape
    rows, columns = max(height - down, 0), max(width - abs(right), 0)
    left, start = max(-right, 0), max(right, 0)
    here, there = labels[:rows, left : left + columns], labels[down : down + rows, start : start + columns]
    cells = np.ravel(here * values + there)
    return np.bincount(cells, minlength=values**2).reshape(values, values)


def _check_options(method: str, smoothing: float, cheapest: float, symmetric: bool) -> None:
    if method not in METHODS:
        raise ValueError(f"unknown method {method!r}; known: {', '.join(METHODS)}")
    if not 0 < smoothing < float("inf"):
        raise ValueError(f"smoothing is {smoothing}; it must be more than 0, or pairs never seen would cost infinitely much")
    if not 0 <= cheapest < 1:
        raise ValueError(f"cheapest is {cheapest}; it must be 0 or more and less than 1, the mean of the costs")
    if method == "pmi" and not symmetric:
        raise ValueError('"pmi" is symmetric by its definition; for costs that are not, use method="conditional" with symmetric=False')


def _borders(counts: Tensor) -> Tensor:
    """The counts as float64 with an empty diagonal."""
    if counts.ndim != 2 or counts.shape[0] != counts.shape[1] or len(counts) < 2:
        raise ValueError(f"counts have shape {tuple(counts.shape)}; they must be (classes, classes) of at least 2 classes")
    if bool((counts < 0).any()) or not torch.equal(counts, counts.T):
        raise ValueError("counts must be symmetric and not negative, as border_counts makes them")
    borders = counts.detach().cpu().double().fill_diagonal_(0.0)
    if not bool(borders.any()):
        raise ValueError(
            "no two classes touch in these masks, so there is no border to learn from: use Potts' costs, or a larger distance, "
            "which bridges strips of ignored pixels between objects"
        )
    return borders


def _checked_costs(costs: Tensor) -> Tensor:
    if costs.ndim != 2 or costs.shape[0] != costs.shape[1] or not costs.is_floating_point() or not len(costs):
        raise ValueError(f"costs are {costs.dtype} of shape {tuple(costs.shape)}; they must be float (classes, classes)")
    if not bool(torch.isfinite(costs).all()) or bool((costs < 0).any()) or bool(costs.diagonal().any()):
        raise ValueError("costs must be finite and not negative, with a diagonal of 0: a label beside itself costs nothing")
    return costs.detach()
