"""From image files to label files, in the eight steps of docs/pipeline.md."""

import json
import os
import shutil
import warnings
from collections.abc import Callable, Sequence
from contextlib import closing, suppress
from copy import copy
from dataclasses import dataclass, field, replace
from functools import partial
from hashlib import blake2b
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from perpixel import __version__
from perpixel.budget import Limits, Plan, one_block
from perpixel.data.decoding import PictureError, read_header
from perpixel.data.display import overlay
from perpixel.data.geo import files_of
from perpixel.data.images import FULL_SCALE, Picture, pixel_limit
from perpixel.data.mosaics import Grid, Journal, Layer, Mosaic, agreed
from perpixel.data.outputs import FORMATS, OVERLAY_SIDE, Legend, format_of, thinned, write_layer
from perpixel.data.sources import files_behind, find_sources, open_source
from perpixel.data.windows import Source, hole_lines
from perpixel.data.writing import is_foreign, refuse_foreign, write_array, write_labels, write_rgb
from perpixel.segmenter import Segmenter, load, sampled
from perpixel.streaming import WAITING, Region, Streamer, ahead, behind, labels_of, maps_of, noted_in
from perpixel.tiling import at_once

__all__ = ["Limits", "Predicted", "Segmenter", "Task", "load", "predict_files"]
Progress = Callable[[float, int, str], None]  # (pictures done, with the share of blocks of the one in hand; of how many; what)
Tell = Callable[[str], None]
FAINT = 4096 / 65536  # of the range of 16 bits: what 12-bit cameras use of it
ORDINARY = {".png", ".jpg", ".jpeg", ".bmp", ".webp"}  # decoded whole, never georeferenced


@dataclass
class Predicted:
    """What a run of `predict_files` wrote."""

    written: list[Path] = field(default_factory=list)
    damaged: dict[str, str] = field(default_factory=dict)  # file -> why there is no prediction for it
    holes: dict[str, list[str]] = field(default_factory=dict)  # file -> its damaged pieces, whose labels say "not known"
    before: int = 0  # of the written ones, those that an interrupted run or another share had made
    shared: int = 0  # pictures of which this process made its share, and others have not finished theirs


@dataclass(frozen=True)
class Task:
    """What `predict_files` writes for each picture, and how.

    Attributes:
        overlay: also OUT/overlays/<name>.jpg, the labels' colours over the image (of a very large one, over every n-th pixel).
        probabilities: also OUT/probabilities/<name>.npy, (K, H, W) float16; TIFF or zarr where the labels are.
        entropy: also OUT/entropy/<name>.npy, (H, W) float16: of the probabilities, in nats.
        samples: labels and probabilities from the mean of so many predictions with dropout on; also OUT/uncertainty/<name>.npy,
            (H, W) float16, the variance of the probabilities, mean over the classes.
        format: of the labels: png, tif, zarr; auto: png for ordinary pictures, zarr for zarr, tif for very large and georeferenced ones.
        strict: stop at the first damaged picture or piece of one, instead of leaving it out.
        limits: on memory.
        shard: (i, n): only the i-th (from 0) of n shares of the blocks. The process that comes last puts a shared output together.
    """

    overlay: bool = False
    probabilities: bool = False
    entropy: bool = False
    samples: int | None = None
    format: str = "auto"
    strict: bool = False
    limits: Limits = field(default_factory=Limits)
    shard: tuple[int, int] = (0, 1)

    def __post_init__(self) -> None:
        part, parts = self.shard
        if not 0 <= part < parts:
            raise ValueError(f"shard is {part} of {parts}; legal is 0 to {parts - 1}, counted from 0")
        if self.format not in FORMATS:
            raise ValueError(f"format is {self.format!r}; legal is {', '.join(FORMATS)}")

    def layers(self, classes: int) -> list[Layer]:
        """The maps that are written."""
        wanted = [Layer("labels", 0, "uint8" if classes <= 255 else "uint16")]
        wanted += [Layer("probabilities", classes, "float16")] if self.probabilities else []
        wanted += [Layer("entropy", 0, "float16")] if self.entropy else []
        return wanted + ([Layer("uncertainty", 0, "float16")] if self.samples is not None else [])

    def files(self, out: Path, name: str, kind: str) -> dict[str, Path]:
        """Layer, or "overlays" -> the file that is written for a picture of this name, if its labels are a `kind` (png, tif, zarr)."""
        found = {layer.name: out / layer.name / f"{name}.{'npy' if kind == 'png' else kind}" for layer in self.layers(1)}
        found["labels"] = out / f"{name}.{kind}"
        return found | ({"overlays": out / "overlays" / f"{name}.jpg"} if self.overlay else {})


def predict_files(
    segmenter: Segmenter,
    inputs: Sequence[str | Path],
    out: Path,
    task: Task | None = None,
    progress: Progress | None = None,
    tell: Tell | None = None,
) -> Predicted:
    """Writes OUT/<name>.png (.tif, .zarr) with class indices for each picture of files, folders, globs, stacks and zarr stores.

    What was done is noted in a hidden folder of OUT until all is: after an interruption the same call goes on where it was.

    Args:
        task: what to write, and how; None: labels only.
        progress: called after each picture, and each block of a large one.
        tell: called with the plan of each picture of several blocks before it starts.

    Returns:
        The label images written, and the damaged inputs, which are named and left out: one bad file does not stop the others.

    Raises:
        ValueError: no pictures, two that would be written to the same file, one that would overwrite an input or labels that no
            prediction has written (a mask drawn by hand), `samples` of a model without dropout or with a refiner asked for by name,
            limits that nothing fits; with `strict`, a damaged input.
        OSError: the disk is full.
    """
    task = task or Task()
    if task.samples is not None:
        segmenter.refuse_samples()
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out}: is a file, and the labels need a folder; name another with -o")
    pictures = find_sources(inputs, segmenter.bundle.card.bands)
    read = {file.resolve() for path in {picture.path for picture in pictures} for file in files_of(path)}
    _refuse_collisions(pictures, out, task, read)
    run = _Run(segmenter, task, out, pictures, read, progress or (lambda *_: None), tell or (lambda _: None))
    run.refuse_foreign()
    with closing(run), ahead(map(run.opened, enumerate(pictures)), WAITING) as sources, behind(WAITING) as do:
        for number, source in sources:
            run.picture(number, source, partial(do, _writing))
    run.journal.close([run.key(picture) for picture in pictures if str(picture) not in run.result.damaged], task.shard)
    return run.result


class _Run:
    """One call of `predict_files`: its pictures, journal and result."""

    def __init__(
        self, segmenter: Segmenter, task: Task, out: Path, pictures: list[Picture], inputs: set[Path], progress: Progress, tell: Tell
    ) -> None:
        self.segmenter, self.task, self.out, self.progress, self.tell = segmenter, task, out, progress, tell
        self.pictures, self.inputs = pictures, inputs
        self._states: dict[Path, str] = {}  # digest of the names, sizes and times of the files of a path
        self.legend, self.layers = Legend(segmenter.classes, segmenter.colors), task.layers(len(segmenter.classes))
        self.result = Predicted()
        bundle = segmenter.bundle
        model = [bundle.card.model_dump_json(), bundle.digest()]
        settings = [*model, segmenter.refine, segmenter.precision, segmenter.augment, task.format, task.samples, task.overlay, task.strict]
        self.journal = Journal(out, json.dumps([*settings, __version__, [layer.name for layer in self.layers]]))
        self.warned_of_faint = False
        self._plans: dict[tuple[object, ...], Plan] = {}  # of pictures of one size
        self._open: dict[Picture, Source] = {}

    def key(self, picture: Picture) -> str:
        """A picture as it was when this run first asked; one that was replaced before is another. Each file is looked at once a run.

        By its name, which no two pictures of a run share, not by its path: the shares of a work may come by different ways to one file.
        """
        path = picture.path
        if path not in self._states:
            states = [(name, file.stat().st_size, file.stat().st_mtime_ns) for name, file in files_behind(path)]
            self._states[path] = blake2b(str(states).encode(), digest_size=16).hexdigest()
        return f"{picture.name} {picture.page} {self._states[path]}"

    def opened(self, numbered: tuple[int, Picture]) -> tuple[int, Source | ValueError | None]:
        """The picture, or why it cannot be read, or None where there is nothing to do for this process."""
        number, picture = numbered
        key = self.key(picture)
        if self.journal.settled(key) and self._is_written(picture):
            if holes := self.journal.holes(key):
                self.result.holes[str(picture)] = holes
            return number, None
        if self._is_of_another_share(number, picture):
            return number, None
        try:
            self._open[picture] = open_source(picture, self.segmenter.bundle.card.bands)
            return number, self._open[picture]
        except ValueError as error:
            return number, error
        except MemoryError:
            return number, PictureError(f"{picture}: does not fit into memory, decoded whole; write it as a tiled TIFF, read in parts")

    def refuse_foreign(self) -> None:
        """Before any work: see `refuse_foreign`."""
        for picture in self.pictures:
            if self.journal.settled(self.key(picture)):
                continue
            ordinary = "png" if picture.path.suffix.lower() in ORDINARY else "auto"
            kind = ordinary if self.task.format == "auto" else self.task.format
            targets = [self.task.files(self.out, picture.name, one)["labels"] for one in (FORMATS[1:] if kind == "auto" else (kind,))]
            if kind == "auto" and any(map(is_foreign, targets)):  # rare, so that such a picture may be opened twice
                with suppress(ValueError), closing(open_source(picture, self.segmenter.bundle.card.bands)) as source:
                    kind = format_of("auto", picture.path, source.size, source.place)
            for target in targets:
                if target.suffix == f".{kind}":
                    refuse_foreign(target)

    def close(self) -> None:
        """Close what an error has left open: of the picture in hand, those that wait, and those whose writing was dropped."""
        for picture in list(self._open):
            self._release(picture)

    def _release(self, picture: Picture) -> None:
        if (source := self._open.pop(picture, None)) is not None:
            source.close()

    def _is_of_another_share(self, number: int, picture: Picture) -> bool:
        """Whether an ordinary picture, which is one block, falls to another process: it need not even be decoded."""
        part, parts = self.task.shard
        if number % parts == part or picture.path.suffix.lower() not in ORDINARY or self.task.limits != Limits():
            return False
        with suppress(ValueError):
            header = read_header(picture.path, picture.page, pixel_limit())
            return self.segmenter.is_small((header.height, header.width))
        return False

    def picture(self, number: int, source: Source | ValueError | None, write: Callable[..., None]) -> None:
        """Predict one picture: all of its blocks that are this process's and not there yet."""
        picture = self.pictures[number]
        try:
            if isinstance(source, ValueError):
                raise source
            if source is not None:
                self._predict(number, picture, source, write)
        except ValueError as error:
            self._release(picture)
            if self.task.strict or isinstance(error, _HopelessError):
                raise
            self.result.damaged[str(picture)] = str(error)
        self.progress(number + 1, len(self.pictures), picture.name)

    def _predict(self, number: int, picture: Picture, source: Source, write: Callable[..., None]) -> None:
        task, parts = self.task, self.journal.parts(self.key(picture))
        targets = self._targets(picture, source)
        planned = self._planned(source, parts)
        alone = len(planned.grid.blocks) == 1 and targets["labels"].suffix == ".png" and not parts.exists()
        if not alone:
            planned = self._agreed(planned, source, parts)
        mosaic = Mosaic(parts, planned.grid, self.layers)
        mine = [block for n, block in enumerate(mosaic.grid.blocks) if (n + number) % task.shard[1] == task.shard[0]]
        due = [block for block in mine if not mosaic.has(block)]
        self._tell_plan(picture, planned, len(due), len(mine))
        if due:
            noted = at_once if alone else noted_in(mosaic.folder, lambda what: self._tell_first_pass(number, picture, what))
            streamer = self.segmenter.streamer(
                source, str(picture), planned.grid, planned.tiler, task.samples is None, noted, task.shard[0] / task.shard[1]
            )
            brightest = 0.0
            with ahead(map(streamer.region, due), WAITING) as regions:
                for done, region in enumerate(regions, 1):  # 1 read
                    brightest = max(brightest, float(region.pixels.max(initial=0)))
                    if done == len(mosaic.grid.blocks):  # of an image that was seen in part, the rest may be bright
                        self._warn_of_faint(picture, source, brightest)
                    if task.strict and region.damage:
                        raise ValueError(hole_lines(picture, region.damage)[0])
                    arrays = self._maps(streamer, region)  # 2 normalise, 3 tile, 4 model, 5 stitch, 6 refine, 7 argmax
                    if alone:
                        write(self._write_whole, picture, source, targets, arrays, region)  # 8 write
                    else:
                        write(mosaic.put, region.block, arrays, region.damage)  # 8 write, a part of it
                        so_far = len(mine) - len(due) + done
                        self.progress(number + so_far / len(mine), len(self.pictures), f"{picture.name}, block {so_far} of {len(mine)}")
        if not alone:
            write(self._join, picture, source, targets, mosaic)
        elif not due:
            self._release(picture)

    def _tell_first_pass(self, number: int, picture: Picture, what: str) -> None:
        self.progress(number, len(self.pictures), f"{picture.name}, first pass over the image, {what.replace('-', ' ')}")

    def _tell_plan(self, picture: Picture, planned: Plan, due: int, mine: int) -> None:
        """The plan of a picture of several blocks, with the time of those that are not there yet."""
        if due and len(planned.grid.blocks) > 1:
            if due < mine:
                self.tell(f"{picture}: {mine - due} of {mine} blocks are there, going on")
            self.tell(str(replace(planned, seconds=planned.seconds * due / mine, shares=self.task.shard[1])))

    def _warn_of_faint(self, picture: Picture, source: Source, brightest: float) -> None:
        """Says once where 16-bit pictures are far darker than what the model was trained on, as 12-bit data in 16-bit files are.

        `brightest` is the largest value, in the number type of the model's data, to which pictures were rounded.
        """
        bundle = self.segmenter.bundle
        full = FULL_SCALE[bundle.card.dtype]
        if self.warned_of_faint or not 0 < brightest <= FAINT * full + 0.5 or not bundle.saw_above(FAINT):
            return
        if source.read(0, 0, 1, 1).pixels.dtype == np.uint16:
            self.warned_of_faint = True
            warnings.warn(
                f"{picture}: a 16-bit image whose largest value is about {round(65535 * brightest / full)} of 65535; the model was trained "
                "on fuller data. Multiply values of 12 bits by 16, of 8 bits by 257, or the labels mean little. Others are not named.",
                stacklevel=2,
            )

    def _maps(self, streamer: Streamer, region: Region) -> dict[str, np.ndarray]:
        task, classes = self.task, len(self.segmenter.classes)
        if task.samples is None:
            scores = streamer.scores(region)
            maps = maps_of(scores, task.probabilities, task.entropy, self.segmenter.temperature)
        else:
            drawn = sampled(streamer, region, task.samples)
            scores = drawn.mean
            maps = maps_of(scores, task.probabilities, task.entropy, None)
            maps["uncertainty"] = drawn.uncertainty.half().cpu().numpy()
        if region.known is not None:
            for values in maps.values():
                values[..., ~region.known] = np.nan
        return {"labels": labels_of(scores, classes, region.known), **maps}

    def _planned(self, source: Source, parts: Path) -> Plan:
        """A picture of one block needs no plan, and those of one size are planned alike."""
        if self.segmenter.is_small(source.size) and self.task.limits == Limits() and not parts.exists():
            return Plan(self.segmenter.tiler(source.size), one_block(source.size), 0, 0, 0, 0.0)
        return self._plan(source)

    def _plan(self, source: Source, cut: tuple[int, Grid] | None = None) -> Plan:
        """What a picture takes; as the limits have it, or cut as others have begun it."""
        alike = (source.size, source.bands, source.segment, cut)
        if alike not in self._plans:
            try:
                maps = sum(max(layer.bands, 1) for layer in self.layers) - 1
                self._plans[alike] = self.segmenter.plan(source, self.task.limits, maps, self.task.samples, cut)
            except ValueError as error:
                raise _HopelessError(str(error)) from error
        return replace(self._plans[alike], tiler=copy(self._plans[alike].tiler))

    def _agreed(self, planned: Plan, source: Source, parts: Path) -> Plan:
        """What goes through parts is cut as its first process, or its first run, decided; anew where a limit asks for less than that."""
        own = {"tile": planned.tiler.tile, "height": planned.grid.block[0], "width": planned.grid.block[1]}
        said = agreed(parts, own)
        if self.task.limits != Limits() and self.task.shard[1] == 1 and any(own[key] < said[key] for key in own):
            shutil.rmtree(parts)
            said = agreed(parts, own)
        return planned if said == own else self._plan(source, (said["tile"], Grid(source.size, (said["height"], said["width"]))))

    def _targets(self, picture: Picture, source: Source) -> dict[str, Path]:
        kind = format_of(self.task.format, picture.path, source.size, source.place)
        targets = self.task.files(self.out, picture.name, kind)
        if kind == "zarr" and find_spec("zarr") is None:
            raise _HopelessError(f"{targets['labels']}: writing zarr needs zarr; pip install 'perpixel[zarr]' adds it")
        _refuse_overwriting(picture, targets, self.inputs)
        refuse_foreign(targets["labels"])
        if long := [target.name for target in targets.values() if len(os.fsencode(target.name)) > 255]:
            raise ValueError(f"{picture}: its output {long[0]} would have more than the 255 bytes of a file name; rename the picture")
        return targets

    def _write_whole(
        self, picture: Picture, source: Source, targets: dict[str, Path], arrays: dict[str, np.ndarray], region: Region
    ) -> None:
        write_labels(targets["labels"], arrays["labels"], self.segmenter.colors, predicted=True)
        for name in arrays.keys() - {"labels"}:
            write_array(targets[name], arrays[name])
        if self.task.overlay:
            self._write_overlay(targets["overlays"], source.read(0, 0, *source.size).pixels, arrays["labels"])
        self._finish(picture, targets["labels"], region.damage)

    def _join(self, picture: Picture, source: Source, targets: dict[str, Path], mosaic: Mosaic) -> None:
        """Put the parts together, if all are there; another process may do so at the same time, and remove them first."""
        if not mosaic.complete():
            if self.task.shard[1] == 1:
                raise _HopelessError(f"{picture}: parts in {mosaic.folder} were removed while it was predicted; run the command again")
            self._release(picture)
            settled = self.journal.settled(self.key(picture))
            if targets["labels"].exists() and (settled or not mosaic.folder.exists()):  # another process was first
                self.result.written.append(targets["labels"])
                mosaic.remove()  # what was begun anew after the other had tidied up
            else:
                self.result.shared += 1
            return
        try:
            for layer in self.layers[1:]:  # labels last: where they are, all is
                write_layer(targets[layer.name], mosaic, layer.name, self.legend, source.place)
            if self.task.overlay:
                self._write_overlay(targets["overlays"], *thinned(source, mosaic))
            damage = mosaic.damage()
            write_layer(targets["labels"], mosaic, "labels", self.legend, source.place)
        except FileNotFoundError:
            if mosaic.folder.exists() or not targets["labels"].exists():
                raise
            self._release(picture)
            self.result.written.append(targets["labels"])  # the other process has noted it, and tells what is damaged
            return
        self._finish(picture, targets["labels"], damage)
        mosaic.remove()

    def _write_overlay(self, path: Path, image: np.ndarray, labels: np.ndarray) -> None:
        unseen, step = int(np.iinfo(labels.dtype).max), -(-max(labels.shape) // OVERLAY_SIDE)
        image, labels = image[:, ::step, ::step], labels[::step, ::step]
        write_rgb(path, overlay(image, labels, self.segmenter.colors, ignore=unseen))

    def _finish(self, picture: Picture, target: Path, damage: dict[tuple[int, int, int, int], str]) -> None:
        self._release(picture)
        holes = hole_lines(picture, damage)
        if holes:
            self.result.holes[str(picture)] = holes
        self.result.written.append(target)
        self._settle(picture, holes)

    def _settle(self, picture: Picture, holes: Sequence[str] = ()) -> None:
        """One ordinary picture needs no journal."""
        if len(self.pictures) > 1 or self.task.shard[1] > 1 or self.journal.folder.exists():
            self.journal.settle(self.key(picture), holes)

    def _is_written(self, picture: Picture) -> bool:
        """Noted among the written ones, where its labels are there."""
        found = [path for kind in ("png", "tif", "zarr") if os.path.exists(path := self.out / f"{picture.name}.{kind}")]
        self.result.written += found[:1]
        self.result.before += bool(found)
        return bool(found)


class _HopelessError(ValueError):
    """What would be wrong with the next picture too."""


def _writing(function: Callable[..., None], *arguments: Any) -> None:
    """An error of the writer is none of the picture that is read or predicted meanwhile."""
    try:
        function(*arguments)
    except ValueError as error:
        raise _HopelessError(str(error)) from error


def _refuse_overwriting(picture: Picture, targets: dict[str, Path], inputs: set[Path]) -> None:
    if hit := [target for target in targets.values() if target.resolve() in inputs]:
        raise _HopelessError(f"{hit[0]} is an input, and what is written for {picture} would overwrite it; choose another folder.")


def _refuse_collisions(pictures: Sequence[Picture], out: Path, task: Task, inputs: set[Path]) -> None:
    seen: dict[str, Picture] = {}
    for picture in pictures:
        targets = task.files(out, picture.name, "png" if task.format == "auto" else task.format)
        _refuse_overwriting(picture, targets, inputs)
        if (first := seen.setdefault(picture.name, picture)) is not picture:
            raise ValueError(f"{first} and {picture} would both be written to {targets['labels']}; predict them into two folders.")
