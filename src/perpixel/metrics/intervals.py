"""How far a score of a set can be trusted: bootstrap over its images.

Images are drawn with replacement and the score is computed from the sums of their counts, so a score of the whole set (mIoU) is resampled
as what it is, and no prediction is looked at again. Sources: percentile intervals, Efron & Tibshirani 1993 ("An introduction to the
bootstrap"), chapter 13, and the estimate of bias, chapter 10; both runs on the same draws, that is paired, chapter 8; for few images the
percentiles are taken further out, as Student's t lies further out than the normal distribution, Hesterberg 2015, arXiv:1411.5279, section
4.3 ("expanded percentiles"). Of fewer than FEW images no resample reaches far enough, since none goes beyond the best and the worst of
them: there the interval is the score with Student's t times the spread of the resamples to either side.

A mean over classes rests on as many images as each class is in (`_reach`), and rare classes pull it down: an image of a class that is drawn
twice stands for one that is missing. What resamples lie below the set, the set lies below the truth, so the percentiles are moved by both.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from scipy import special

Score = Callable[[np.ndarray], np.ndarray]  # sums of counts (..., *shape) -> (...) or (..., K); NaN where there is none
FEW = 6  # images; where fewer all agree, chance does so in more than 5 of 100 cases (two sides of five coins: 1 in 16)
_DRAWS = 1_000_000  # indices drawn at a time: bounds the memory whatever the number of images


@dataclass(frozen=True)
class Interval:
    """A score of a set and where it would lie, on other images of the same kind, in `level` of all cases.

    `value`, `low` and `high` are floats for a single score, and arrays (K,) for a score of each class. Where a class is missing from a
    resampled set, that resample is left out for the class. The bounds are NaN for fewer than two images, which tell nothing of others.
    `images` is the number that the score rests on: those with any count, or of each class (K,) where that was said.
    """

    value: np.ndarray | float
    low: np.ndarray | float
    high: np.ndarray | float
    level: float
    images: np.ndarray | int

    @property
    def above_zero(self) -> np.ndarray | bool:
        """Whether the whole interval is above zero: for a difference, a gain that is real at this level. Never of fewer than FEW images."""
        return (self.low > 0) & (self.images >= FEW)

    @property
    def below_zero(self) -> np.ndarray | bool:
        """Whether the whole interval is below zero. Never of fewer than FEW images."""
        return (self.high < 0) & (self.images >= FEW)


def interval(
    table: np.ndarray,
    score: Score,
    resamples: int = 1000,
    seed: int = 0,
    level: float = 0.95,
    held: np.ndarray | None = None,
    bounds: tuple[float, float] = (-math.inf, math.inf),
) -> Interval:
    """Interval of a score computed from counts summed over the set.

    Args:
        table: (N, *shape) counts of each image, such as `PerImage.table`. An image with no count at all, as one of void alone, says
            nothing: it is not drawn, and is none of the images that the score rests on.
        score: of summed counts, such as `tallies.miou` or `tallies.iou`; it is called with a leading axis of resamples.
        resamples: sets drawn.
        seed: same seed, same N: same draws.
        level: in how many cases of all the interval is meant to hold the score of other such images.
        held: (K,) in how many images each class is (`tallies.holding`), for a score of each class or a mean over classes; for M scores at
            once (M, K), of each score the classes that it is a mean of, and 0 for others; None: in all.
        bounds: least and largest value that the score can have.
    """
    (table,) = _with_content(table)
    drawn = [score(sums) for (sums,) in _resampled(resamples, seed, table)]
    return _interval(score(table.sum(0)), drawn, level, len(table), held, bounds)


def difference(
    first: np.ndarray,
    second: np.ndarray,
    score: Score,
    resamples: int = 1000,
    seed: int = 0,
    level: float = 0.95,
    held: np.ndarray | None = None,
    bounds: tuple[float, float] = (-math.inf, math.inf),
) -> Interval:
    """Interval of score(second) - score(first) of two runs on the same images, in the same order (`PerImage.paired_with`).

    Each resample draws the same images for both, so what makes an image hard or easy for both cancels. Arguments as in `interval`.

    Raises:
        ValueError: if the tables differ in shape.
    """
    if first.shape != second.shape:
        raise ValueError(f"counts of shape {first.shape} and {second.shape} cannot be paired; score both runs on the same images")
    first, second = _with_content(first, second)
    drawn = [score(b) - score(a) for a, b in _resampled(resamples, seed, first, second)]
    return _interval(score(second.sum(0)) - score(first.sum(0)), drawn, level, len(first), held, bounds)


def values_table(values: np.ndarray) -> np.ndarray:
    """(N, ..., 2) a table for `value_mean` from a value of each image (N, ...); NaN where an image has none.

    For scores that are means over images, such as BF and surface distances:
    `interval(values_table(bf.per_image), value_mean)`.
    """
    has = ~np.isnan(values)
    return np.stack([np.where(has, values, 0.0), has], -1)


def value_mean(sums: np.ndarray) -> np.ndarray:
    """(...): mean over the images that have a value, from sums over a `values_table`."""
    return np.divide(sums[..., 0], sums[..., 1], out=np.full(sums.shape[:-1], np.nan), where=sums[..., 1] > 0)


def _with_content(*tables: np.ndarray) -> list[np.ndarray]:
    """The images of which any of the tables holds something."""
    kept = np.any([table.reshape(len(table), math.prod(table.shape[1:])).any(1) for table in tables], axis=0)
    return [table[kept] for table in tables]


def _resampled(resamples: int, seed: int, *tables: np.ndarray) -> Iterator[tuple[np.ndarray, ...]]:
    """Sums (R', *shape) of each table over the same drawn images, a block of resamples at a time."""
    if resamples < 1:
        raise ValueError(f"resamples is {resamples}; draw at least 1 (1000 for an interval)")
    images, shape = len(tables[0]), tables[0].shape[1:]
    flat = [np.asarray(table, np.float64).reshape(images, math.prod(shape)) for table in tables]  # sums of counts are exact up to 2^53
    random = np.random.default_rng(seed)
    block = max(1, min(resamples, _DRAWS // max(images, 1)))
    for start in range(0, resamples, block):
        size = min(block, resamples - start)
        if images == 0:
            yield tuple(np.zeros((size, *shape)) for _ in tables)
            continue
        drawn = random.integers(0, images, (size, images)) + images * np.arange(size)[:, None]
        times = np.bincount(drawn.ravel(), minlength=size * images).reshape(size, images).astype(np.float64)
        yield tuple((times @ rows).reshape(size, *shape) for rows in flat)


def _interval(
    value: np.ndarray, blocks: list[np.ndarray], level: float, images: int, held: np.ndarray | None, bounds: tuple[float, float]
) -> Interval:
    if not 0 < level < 1:
        raise ValueError(f"level is {level}; it must lie between 0 and 1 (0.95)")
    drawn, value = np.concatenate(blocks), np.asarray(value)
    columns, scores = drawn.reshape(len(drawn), -1), value.reshape(-1)
    low, high = np.full(scores.shape, np.nan), np.full(scores.shape, np.nan)
    rests = np.full((1, 1), images) if held is None else held if held.ndim == 2 else held[:, None] if drawn.ndim == 2 else held[None]
    rests = np.broadcast_to(rests, (len(scores), rests.shape[1]))
    for row in np.unique(rests, axis=0):
        place = (rests == row).all(1) & ~np.isnan(columns).all(0)
        freedom, widening = _reach(row, images)
        if freedom > 0 and place.any():
            reach = special.stdtrit(freedom, (1 + level) / 2) * widening
            low[place], high[place] = np.clip(_ends(columns[:, place], scores[place], reach, freedom, (row > 0).sum() > 1), *bounds)
    if drawn.ndim == 1:
        return Interval(float(scores[0]), float(low[0]), float(high[0]), level, images)
    return Interval(value, low, high, level, held if held is not None and held.ndim == 1 else images)


def _reach(held: np.ndarray, images: int) -> tuple[float, float]:
    """Degrees of freedom of a mean over classes, and how much further than resamples it varies; 0 where nothing can be said.

    A class in h images adds v / h to the variance of the mean, of which resamples show (h - 1) / h, and nothing where h is 1; the classes'
    v are taken to be alike. Degrees of freedom as Welch and Satterthwaite have them for a sum of variances (Satterthwaite 1946). Of one
    class alone that is h - 1, and h / (h - 1) of the variance.
    """
    held = held[held > 0].astype(np.float64)
    several = held[held > 1]
    if not len(several):
        return 0.0, math.nan
    freedom = (1 / several).sum() ** 2 / (1 / (several**2 * (several - 1))).sum()
    return min(float(freedom), max(images, held.max()) - 1.0), math.sqrt((1 / held).sum() / ((several - 1) / several**2).sum())


def _ends(drawn: np.ndarray, value: np.ndarray, reach: float, freedom: float, of_classes: bool) -> np.ndarray:
    """(2, M): the ends, `reach` standard deviations of a normal distribution away, from resamples (R, M) of scores (M,)."""
    bias = np.nanmean(drawn, axis=0) - value if of_classes else np.zeros(value.shape)
    spread = reach * np.nanstd(drawn, axis=0)
    if freedom + 1.5 < FEW:  # fewer than FEW images, whatever the rounding
        low, high = value - bias - spread, value - bias + spread
    else:
        low, high = np.nanquantile(drawn, (special.ndtr(-reach), special.ndtr(reach)), axis=0) - 2 * bias
    if of_classes:  # a bias of more than half the reach is itself not known well
        low, high = np.minimum(low, value - spread / 2), np.maximum(high, value + spread / 2)
    return np.stack([low, high])
