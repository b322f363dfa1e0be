"""What a person sees of a run while it trains, and what stays of it: live progress, metrics.csv, TensorBoard events."""

import csv
import io
import math
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Self, TypeVar

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from perpixel.data.writing import replacing
from perpixel.evaluate import Evaluation
from perpixel.recipe import TrainSection

T = TypeVar("T")
COLUMNS = ("step", "seconds", "images_per_second", "lr", "cost", "val_cost", "val_miou", "val_pixel_accuracy")
EVERY = 20  # steps between rows of metrics.csv


class TrainingLog:
    """Live progress on `console`; one row of OUT/metrics.csv every 20 steps and at each validation.

    Args:
        first_step: where the run goes on; later rows of an interrupted run are dropped, as their steps are done again.
    """

    def __init__(self, out: Path, console: Console, section: TrainSection, first_step: int) -> None:
        self.path, self.console, self.section = out / "metrics.csv", console, section
        self.rows = _read_rows(self.path, first_step)
        self.board = _tensorboard(out) if not console.quiet else None
        self.started = self.window_start = time.monotonic()
        self.waited, self.costs, self.miou, self.last_step = 0.0, list[float](), math.nan, first_step
        self.first_step = first_step
        self.bar = Progress(TextColumn("{task.description}"), BarColumn(bar_width=24), TextColumn("{task.fields[text]}"), console=console)
        self.task = self.bar.add_task("training", total=1.0, text="first batch")

    def __enter__(self) -> Self:
        self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()
        if self.board is not None:
            self.board.close()
        seconds = time.monotonic() - self.started
        if self.last_step > self.first_step:
            self.console.print(f"[dim]{self.last_step - self.first_step} steps; {100 * self.waited / seconds:.1f} % of the time waiting for data[/]")

    def waiting(self, batches: Iterable[T]) -> Iterator[T]:
        """The batches, with the time that each is waited for counted."""
        iterator = iter(batches)
        while True:
            start = time.monotonic()
            batch = next(iterator)
            self.waited += time.monotonic() - start
            yield batch

    def step(self, step: int, progress: float, cost: float, lr: float, left: float) -> None:
        """Notes one finished update."""
        self.costs.append(cost)
        speed = len(self.costs) * self.section.batch / max(1e-9, time.monotonic() - self.window_start)
        of = f" of {self.section.steps}" if self.section.steps else ""
        miou = "" if math.isnan(self.miou) else f"   val mIoU {self.miou:.3f}"
        text = f"step {step}{of}   {speed:.1f} images/s   cost {cost:.3f}{miou}   {_clock(left)} left"
        self.bar.update(self.task, completed=progress, description="training", text=text)
        if step % EVERY == 0:
            self._row(step, speed, lr, sum(self.costs) / len(self.costs))
        self.last_step, self.lr, self.speed = step, lr, speed

    def validating(self, done: int, of: int, name: str) -> None:
        """Progress of a validation."""
        self.bar.update(self.task, description="validation", text=f"{done} of {of}   {name}")

    def validated(self, step: int, result: Evaluation) -> None:
        """Notes the scores of a validation."""
        self.miou = result.confusion.miou
        accuracy = result.confusion.pixel_accuracy
        scores = {"val_cost": result.cost, "val_miou": self.miou, "val_pixel_accuracy": accuracy}
        mean = sum(self.costs) / len(self.costs) if self.costs else math.nan
        self._row(step, getattr(self, "speed", math.nan), getattr(self, "lr", math.nan), mean, scores)
        self.console.print(f"step {step}: cost {mean:.3f}, on validation cost {result.cost:.3f}, mIoU {self.miou:.3f}, pixel accuracy {accuracy:.3f}")
        self.bar.update(self.task, description="training")

    def _row(self, step: int, speed: float, lr: float, cost: float, scores: dict[str, float] | None = None) -> None:
        now = time.monotonic()
        known = {"step": step, "seconds": now - self.started, "images_per_second": speed, "lr": lr, "cost": cost} | (scores or {})
        self.rows = [row for row in self.rows if row["step"] != str(step)]  # a validation completes the row of its step
        self.rows.append({name: _text(known[name]) if name in known else "" for name in COLUMNS})
        if not self.console.quiet:
            _write_rows(self.path, self.rows)
        if self.board is not None:
            for name, value in known.items():
                if name != "step":
                    self.board.add_scalar(name, value, step)
        self.costs, self.window_start = [], now


def _text(value: float) -> str:
    return str(value) if isinstance(value, int) else f"{value:.6g}"


def _read_rows(path: Path, first_step: int) -> list[dict[str, str]]:
    """The rows up to `first_step` of an earlier part of the run."""
    if first_step == 0 or not path.exists():
        return []
    with path.open(newline="") as file:
        return [row for row in csv.DictReader(file) if row["step"].isdigit() and int(row["step"]) <= first_step]


def _write_rows(path: Path, rows: list[dict[str, str]]) -> None:
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS)
    writer.writeheader()
    writer.writerows(rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        temporary.write_text(text.getvalue(), "utf-8")


def _tensorboard(out: Path) -> Any:
    """A writer of TensorBoard events below OUT/events, or None where TensorBoard is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(out / "events"))


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
