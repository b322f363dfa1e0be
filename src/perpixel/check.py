"""What is in these folders? Finds the pairs, reads every file once, proposes classes and label map, and names what is damaged."""

import warnings as python_warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from perpixel.check_report import render
from perpixel.data.class_names import ClassList, read_classes
from perpixel.data.duplicates import find_duplicates
from perpixel.data.images import FULL_SCALE, Picture, default_colors
from perpixel.data.layouts import SPLITS, Layout, Pair, find_layout, split_pairs
from perpixel.data.masks import MASK_VALUES, LabelMap, read_mask
from perpixel.data.proposals import Proposal, propose_label_map
from perpixel.data.survey import Fault, Reading, common_form, pooled_moments, survey

__all__ = ["Check", "Progress", "check", "render"]
Progress = Callable[[int, int, str], None]  # files done, files in all, name of the file just read
FORMAT = 1  # of the JSON; a key that goes or changes its meaning makes it 2
MISMATCH_LIMIT = 0.1  # of the pairs; more sizes that differ are no accident but the wrong masks


@dataclass
class Check:
    """Everything that training needs to know of a data set, and everything that a person should know of it."""

    layout: str
    pairs: list[Pair] = field(default_factory=list)  # only usable ones: readable, sizes equal; each with a mask and a split
    classes: list[str] = field(default_factory=list)
    classes_from: str = "the masks' values"  # where their names come from
    colors: list[tuple[int, int, int]] = field(default_factory=list)
    label_map: LabelMap = field(default_factory=lambda: LabelMap({0: 0}))
    encoding: str = "unknown"
    reasons: list[str] = field(default_factory=list)
    bands: int = 0
    dtype: str = ""
    scale: float = 1.0  # the stored value that stands for 1.0: 255, 65535, or 1 for float images
    mean: list[float] = field(default_factory=list)  # per band, over the training images, in units of `scale`
    std: list[float] = field(default_factory=list)  # likewise; 1 for a band that never changes, so that it can be divided by
    sizes: dict[tuple[int, int], int] = field(default_factory=dict)  # (height, width) in pixels -> images, most frequent first
    pixels: dict[str, list[int]] = field(default_factory=dict)  # split -> pixels of each class
    images_with: dict[str, list[int]] = field(default_factory=dict)  # split -> images that show each class
    pixels_where_present: dict[str, list[int]] = field(default_factory=dict)  # split -> labelled pixels of the images that show each class
    ignore_share: float = 0.0  # of all mask pixels of usable pairs, 0..1
    unlabelled: list[Picture] = field(default_factory=list)
    orphan_masks: list[Picture] = field(default_factory=list)
    damaged: dict[str, str] = field(default_factory=dict)  # file -> message
    size_mismatches: dict[str, str] = field(default_factory=dict)  # image file -> message
    absent: dict[str, list[str]] = field(default_factory=dict)  # split -> names of classes never seen in it
    duplicates: list[tuple[str, str, str]] = field(default_factory=list)  # ("exact" | "near", train file, val file)
    warnings: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)  # training cannot start; each says what to do

    @property
    def ready(self) -> bool:
        """True where training can start."""
        return not self.problems

    def split(self, name: str) -> list[Pair]:
        """The pairs of one split ("train", "val" or "test")."""
        return [pair for pair in self.pairs if pair.split == name]

    @property
    def validation_pixels(self) -> float:
        """Pixels of the validation part; about as many as that are ignored count too, since they are predicted."""
        return sum(self.pixels.get("val", ())) / max(1e-9, 1 - self.ignore_share)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON types under stable names; lists and numbers are complete, nothing is shortened as it is for people."""
        return {
            "format": FORMAT,
            "ready": self.ready,
            "problems": self.problems,
            "warnings": self.warnings,
            "layout": self.layout,
            "splits": {split: len(self.split(split)) for split in self.pixels},
            "images": {
                "bands": self.bands,
                "dtype": self.dtype,
                "scale": self.scale,
                "mean": self.mean,
                "std": self.std,
                "sizes": [{"height": height, "width": width, "images": count} for (height, width), count in self.sizes.items()],
            },
            "masks": {
                "encoding": self.encoding,
                "reasons": self.reasons,
                "label_map": self.label_map.to_dict(),
                "ignore_share": self.ignore_share,
            },
            "classes": [
                {
                    "index": index,
                    "name": name,
                    "color": list(self.colors[index]),
                    "pixels": {split: counts[index] for split, counts in self.pixels.items()},
                    "images": {split: counts[index] for split, counts in self.images_with.items()},
                }
                for index, name in enumerate(self.classes)
            ],
            "absent": self.absent,
            "unlabelled": [str(picture) for picture in self.unlabelled],
            "orphan_masks": [str(picture) for picture in self.orphan_masks],
            "damaged": self.damaged,
            "size_mismatches": self.size_mismatches,
            "duplicates": [{"kind": kind, "train": train, "val": val} for kind, train, val in self.duplicates],
            "pairs": [{"image": str(pair.image), "mask": str(pair.mask), "split": pair.split} for pair in self.pairs],
        }


def check(
    images: str | Path,
    masks: str | Path | None = None,
    *,
    classes: str | Sequence[str] | None = None,
    labels: Mapping[int, int] | None = None,
    label_map: LabelMap | None = None,
    val_fraction: float = 0.2,
    seed: int = 0,
    progress: Progress | None = None,
) -> Check:
    """Diagnose a data set: every pair is read once, in threads.

    Args:
        images, masks: any layout of `perpixel.data.layouts`.
        classes: a file of class names, the names with commas, or a list of names; None takes the file that lies beside the images, if any.
        labels: what mask values mean, where the proposal is to be overruled: value -> class index, or 255 to ignore.
        label_map: what every mask value means, as an earlier check found it: taken as it is, nothing is proposed. Needs a list of classes.
        val_fraction, seed: for sets that bring no split; see `split_pairs`.

    Raises:
        ValueError: if no pairs are found at all, the classes can't be read, or `val_fraction` is out of range. Whatever is found in the
            files themselves ends up in `damaged`, `warnings` and `problems` instead.
    """
    if not isinstance(labels or {}, Mapping) or any(not isinstance(number, int) for pair in (labels or {}).items() for number in pair):
        raise TypeError(f"labels is {labels!r}; give mask values and their classes by number, or 255 to ignore: {{255: 1}}")
    with python_warnings.catch_warnings(record=True) as found:
        python_warnings.simplefilter("always")
        layout = find_layout(images, masks)
    source = classes or layout.classes_file
    known = read_classes(source) if isinstance(source, str | Path) else ClassList(list(source or ()))
    labelled = [pair for pair in split_pairs(layout.pairs, val_fraction, seed) if pair.mask is not None]
    report = Check(
        layout.kind,
        classes_from="the classes given" if classes else layout.classes_file.name if layout.classes_file else "the masks' values",
        unlabelled=[pair.image for pair in layout.pairs if pair.mask is None],
        orphan_masks=list(layout.orphan_masks),
        damaged=dict(layout.damaged),
        warnings=list(layout.notes),
        problems=_in_two_parts(layout),
    )
    with python_warnings.catch_warnings(record=True) as caught:
        python_warnings.simplefilter("always")
        once = list(dict.fromkeys(replace(pair, split=None) for pair in labelled))  # a pair that is alone serves two parts
        sound, faults, counter = survey(once, progress)
    report.warnings += sorted({str(warning.message) for warning in [*found, *caught]})  # threads give them in any order
    _note_faults(report, faults, len(once))
    by_pair = {reading.pair: reading for reading in sound}
    readings = [replace(by_pair[key], pair=pair) for pair in labelled if (key := replace(pair, split=None)) in by_pair]
    readings = _of_one_form(report, readings)
    readings = _with_both_parts(readings, layout, val_fraction, seed)
    report.pairs = [reading.pair for reading in readings]
    if not report.split("train") and not report.problems:
        report.problems.append(_no_training_pair(report, layout))
    if readings:
        if label_map is None:
            proposal = propose_label_map(counter.evidence(), known.names, known.colors, labels, known.values)
        else:
            proposal = _stated(label_map, known.names, readings)
        report.label_map, report.encoding = proposal.label_map, proposal.encoding
        report.reasons = list(proposal.reasons)
        report.problems += proposal.problems
        report.classes = list(proposal.names)
        report.colors = list(proposal.colors or default_colors(len(proposal.names)))
        _count_classes(report, readings)
        report.problems += _without_labels(report)
        _describe_images(report, readings)
        _compare_parts(report, readings)
    if report.problems and masks is not None and readings and all(_swapped(reading) for reading in readings[:3]):
        # What else is wrong follows from it.
        report.problems = [f"the images look like masks and the masks like photographs: swapped? Try {masks} {images}"]
    _warn(report)
    return report


def _stated(label_map: LabelMap, names: Sequence[str], readings: Sequence[Reading]) -> Proposal:
    """A label map that is known already; a mask value that it lacks is a problem."""
    problems = []
    for reading in readings:
        try:
            label_map(reading.values[None], str(reading.pair.mask))
        except ValueError as error:
            problems.append(str(error))
    return Proposal(label_map, "values as stated before", (), tuple(problems[:1]), tuple(names), ())


def _swapped(reading: Reading) -> bool:
    """Whether the image has few values, as masks have, and its mask many, as photographs have."""
    if len(reading.values) <= MASK_VALUES:
        return False
    try:
        return len(np.unique(read_mask(reading.pair.image))) <= MASK_VALUES
    except ValueError:  # of a kind that no mask is
        return False


# ---- what can be used


def _in_two_parts(layout: Layout) -> list[str]:
    """A problem where lists put an image in two parts: its score would be memory, not skill."""
    parts: dict[Picture, set[str]] = defaultdict(set)
    for pair in layout.pairs:
        if pair.split is not None:
            parts[pair.image].add(pair.split)
    twice = [picture for picture, splits in parts.items() if len(splits) > 1]
    if not twice:
        return []
    named = " and ".join(split for split in SPLITS if split in parts[twice[0]])
    return [f"{_count(len(twice), 'image')} in more than one part, first {twice[0]} in {named}. Keep each in one list only."]


def _note_faults(report: Check, faults: Sequence[Fault], total: int) -> None:
    """Damaged files, and pairs whose sizes differ: a few are left out, many are a problem."""
    for fault in faults:
        (report.size_mismatches if fault.mismatch else report.damaged)[fault.file] = fault.message
    count = len(report.size_mismatches)
    if count and count > MISMATCH_LIMIT * total:
        first = next(iter(report.size_mismatches.values()))
        report.problems.append(f"{count} of {total} masks have another size than their image, so they are not its masks: {first}")
    elif count:
        report.warnings.append(f"{_count(count, 'pair')} of unequal size left out: {_some(report.size_mismatches)}")


def _of_one_form(report: Check, readings: list[Reading]) -> list[Reading]:
    """The pairs whose bands one model can take; grey images among colour ones are repeated in three bands when they are read."""
    if not readings:
        return []
    report.bands, report.dtype = common_form(readings)
    report.scale = FULL_SCALE[report.dtype]
    legal = {report.bands, 1} if report.bands == 3 else {report.bands}
    usable = [reading for reading in readings if reading.bands in legal]
    odd = [reading for reading in readings if reading.bands not in legal]
    for reading in odd:
        report.damaged[str(reading.pair.image)] = (
            f"{reading.pair.image}: has {reading.bands} bands, most others have {report.bands}. "
            f"Take it out, or store it with {report.bands} bands."
        )
    if len(odd) > MISMATCH_LIMIT * len(readings):
        kinds = Counter(reading.bands for reading in readings)
        mix = ", ".join(f"{count} with {bands}" for bands, count in sorted(kinds.items()))
        report.problems.append(f"the images differ in their number of bands: {mix}. One model takes one number; check each kind by itself.")
    if grey := sum(reading.bands == 1 for reading in usable) if report.bands == 3 else 0:
        report.warnings.append(f"{_count(grey, 'grey image')} among colour ones: read as colour, with three equal bands")
    if other := sum(reading.dtype != report.dtype for reading in usable):
        report.warnings.append(f"{_count(other, 'image')} not {report.dtype} like the others: converted by full range when read")
    return usable


def _with_both_parts(readings: list[Reading], layout: Layout, val_fraction: float, seed: int) -> list[Reading]:
    """Readings with splits. They were split before they were read, so that one damaged file does not move all others; only where nothing
    sound is left of one part, and the set brings no split of its own, the sound ones are split anew."""
    parts = {reading.pair.split for reading in readings}
    if {"train", "val"} <= parts or not readings or any(pair.split == "val" for pair in layout.pairs):
        return readings
    sound = {reading.pair.image: reading for reading in readings}
    pairs = [Pair(pair.image, pair.mask, "test" if pair.split == "test" else None) for pair in (r.pair for r in sound.values())]
    return [replace(sound[pair.image], pair=pair) for pair in split_pairs(pairs, val_fraction, seed)]


def _no_training_pair(report: Check, layout: Layout) -> str:
    if report.pairs:
        parts = ", ".join(_parts(report))
        return f"no usable pair for training: all {len(report.pairs)} belong to {parts}. Name training images in train.txt."
    broken = list(report.damaged.values()) + list(report.size_mismatches.values())
    first = f", first: {broken[0]}" if broken else ""
    return f"no usable pair of image and mask among {len(layout.pairs)} images ({len(broken)} files can't be used{first})"


# ---- what is in it


def _count_classes(report: Check, readings: Sequence[Reading]) -> None:
    """Pixels and images of each class in each part, and the share that is ignored."""
    count = len(report.classes)
    ignored = total = 0
    for split in _parts(report):
        pixels, images, where = (np.zeros(count, dtype=np.int64) for _ in range(3))
        for reading in readings:
            if reading.pair.split == split:
                own, void = _class_pixels(reading, report.label_map, count)
                pixels += own
                images += own > 0
                where += np.where(own > 0, own.sum(), 0)
                ignored, total = ignored + void, total + int(reading.counts.sum())
        report.pixels[split], report.images_with[split] = pixels.tolist(), images.tolist()
        report.pixels_where_present[split] = where.tolist()
        if missing := [name for name, number in zip(report.classes, pixels, strict=True) if not number]:
            report.absent[split] = missing
    report.ignore_share = ignored / total if total else 0.0


def _class_pixels(reading: Reading, label_map: LabelMap, count: int) -> tuple[np.ndarray, int]:
    """(K,) pixels of each class in one mask, and the ignored ones; values that the map lacks count as neither (they are a problem)."""
    values, counts = reading.values, reading.counts
    colored = values.dtype == np.int32
    if colored and not label_map.rgb:
        return np.zeros(count, dtype=np.int64), 0
    if not label_map.nearest:
        grey_in_colors = label_map.rgb and not colored  # counts as the colours (v, v, v)
        as_listed = values.astype(np.int64) * 0x010101 if grey_in_colors else values
        known = np.isin(as_listed, list(label_map.values))
        values, counts = values[known], counts[known]
    labels = label_map(values[None])[0]
    kept = labels < count
    return np.bincount(labels[kept], weights=counts[kept], minlength=count).astype(np.int64), int(counts[labels == label_map.ignore].sum())


def _without_labels(report: Check) -> list[str]:
    """A problem for a part that has nothing to learn from, or nothing to score; where there are no classes at all, that is said already."""
    problems = []
    for split, masks in (("train", "training"), ("val", "validation")):
        if report.classes and split in report.pixels and not any(report.pixels[split]):
            problems.append(f"no labelled pixel in the {masks} masks: every one is ignored. Give a value a class with --label VALUE=CLASS")
    if report.split("train") and not report.split("val"):
        problems.append("no usable pair for validation, so nothing can be scored. Mend its files, or name other images in val.txt.")
    return problems


def _describe_images(report: Check, readings: Sequence[Reading]) -> None:
    """Sizes; mean and deviation of the training images."""
    unique = {reading.pair.image: reading for reading in readings}
    report.sizes = dict(Counter(reading.size for reading in unique.values()).most_common())
    train = [reading for reading in readings if reading.pair.split == "train"] or readings
    mean, std = pooled_moments(train, report.bands)
    flat = [str(band) for band in np.flatnonzero(std < 1e-9)]
    if flat:
        report.warnings.append(f"band {', '.join(flat)} has one value in all training images, so it tells a model nothing")
    report.mean, report.std = mean.tolist(), np.where(std < 1e-9, 1.0, std).tolist()


def _compare_parts(report: Check, readings: Sequence[Reading]) -> None:
    """Duplicates between training and validation."""
    train = [reading for reading in readings if reading.pair.split == "train"]
    val = [reading for reading in readings if reading.pair.split == "val"]
    if len({reading.pair.image for reading in readings}) > 1:
        found = find_duplicates([reading.fingerprint for reading in train], [reading.fingerprint for reading in val])
        report.duplicates = [(kind, str(train[i].pair.image), str(val[j].pair.image)) for kind, i, j in found]


# ---- what to say of it


def _warn(report: Check) -> None:
    """One line for each finding that a person should know before training."""
    say = report.warnings.append
    train, val = report.split("train"), report.split("val")
    if train and [pair.image for pair in train] == [pair.image for pair in val]:
        say("one pair only: train and val are the same picture, so the scores say nothing about new images")
    if report.damaged:
        say(f"{_count(len(report.damaged), 'file')} can't be used: {_some(report.damaged)}")
    if report.unlabelled:
        say(f"{_count(len(report.unlabelled), 'image')} without a mask, not used: {_some(map(str, report.unlabelled))}")
    if report.orphan_masks:
        say(f"{_count(len(report.orphan_masks), 'mask')} without an image: {_some(map(str, report.orphan_masks))}")
    nowhere = [name for name in report.classes if all(name in report.absent.get(split, []) for split in report.pixels)]
    if nowhere:
        say(f"{_classes(nowhere)} in no mask, so can't be learned")
    for split, text in (("train", "can't be learned"), ("val", "can't be scored there")):
        if names := [name for name in report.absent.get(split, []) if name not in nowhere]:
            say(f"{_classes(names)} in no {split} mask, so {text}")
    for kind, text in (("exact", "the same, pixel by pixel, as one in train"), ("near", "nearly the same as one in train")):
        if found := [val_file for kind_found, _, val_file in report.duplicates if kind_found == kind]:
            say(f"{len(found)} of {_count(len(val), 'val image')} {text}, so the scores flatter: {_some(found)}")
    if report.ignore_share > 0.5:
        say(f"{report.ignore_share:.0%} of the mask pixels are ignored; if that is the background, give its value a class with --label")


def _parts(report: Check) -> list[str]:
    """The splits that have pairs, in the usual order."""
    there = {pair.split for pair in report.pairs}
    return [split for split in SPLITS if split in there]


def _some(files: Any, limit: int = 3) -> str:
    """The first few names, and how many more."""
    names = [Path(name).name for name in files]
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")


def _count(number: int, what: str) -> str:
    """1 file; 2 files."""
    return f"{number} {what}{'s' * (number != 1)}"


def _classes(names: Sequence[str]) -> str:
    """'fish' is; 'bird', 'fish' are."""
    shown = ", ".join(repr(name) for name in names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
    return f"{shown} {'is' if len(names) == 1 else 'are'}"
