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
COLUMNS = ("step", "seconds", "images_per_second", "lr", "cost", "val_cross_entropy", "val_miou", "val_pixel_accuracy")
EVERY = 20  # steps between rows of metrics.csv
FIRST, SETTLED = 5, 10.0  # steps, and seconds of steps, after which the time left of a run by steps is told, once,
WORTH_TELLING = 60.0  # where it is more than that


class TrainingLog:
    """Live progress on `console`; one row of OUT/metrics.csv every 20 steps and at each validation.

    Args:
        first_step: where the run goes on; later rows of an interrupted run are dropped, as their steps are done again.
        writes: whether this process keeps the files; one of several does.
    """

    def __init__(self, out: Path, console: Console, section: TrainSection, first_step: int, writes: bool = True) -> None:
        self.path, self.console, self.section, self.writes = out / "metrics.csv", console, section, writes
        self.rows = _read_rows(self.path, first_step)
        self.board = _tensorboard(out, first_step) if writes else None
        self.asked = self.came = 0.0  # when the batch at hand was asked for, and when it came
        self.busy = 0.0  # seconds spent on the steps of this row
        self.waited = self.stepping = 0.0  # seconds waited for the batches of all steps; seconds of these steps, waiting included
        self.fastest = math.inf  # seconds of the fastest step, waiting left out
        self.scoring, self.rounds = 0.0, 0  # seconds of validations while training, and their number
        self.end_began, self.end, self.total = math.nan, 0.0, 0.0  # when the end began; seconds of it; of all
        self.foreseen = self.told = False
        self.left = math.nan  # seconds until the end, as far as one can tell
        self.costs, self.miou = list[float](), math.nan
        self.first_step = self.last_step = first_step
        self.latest = dict.fromkeys(("seconds", "images_per_second", "lr", "cost"), math.nan)
        self.bar = Progress(TextColumn("{task.description}"), BarColumn(bar_width=24), TextColumn("{task.fields[text]}"), console=console)
        self.task = self.bar.add_task("training", total=1.0, text="first batch")

    def __enter__(self) -> Self:
        self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()
        if self.board is not None:
            self.board.close()
        if self.last_step > self.first_step:
            share = 100 * self.waited / max(1e-9, self.stepping)
            self.console.print(f"[dim]{self.last_step - self.first_step} steps; {share:.1f} % of their time waiting for data[/]")
        if self.total:
            self.console.print(f"[dim]{self._spent()}[/]", soft_wrap=True)

    def waiting(self, batches: Iterable[T]) -> Iterator[T]:
        """The batches, with the time that each is waited for noted: read and augmented in this process, or by workers that are late."""
        iterator = iter(batches)
        while True:
            self.asked = time.monotonic()
            batch = next(iterator)
            self.came = time.monotonic()
            yield batch

    def step(self, step: int, progress: float, seconds: float, cost: float, lr: float, left: float) -> None:
        """Notes one finished update, `seconds` after the start of the run."""
        self.costs.append(cost)
        self.busy += (spent := time.monotonic() - self.asked)
        self.fastest = min(self.fastest, spent - (self.came - self.asked))
        self.waited, self.stepping = self.waited + self.came - self.asked, self.stepping + spent
        speed = len(self.costs) * self.section.batch / max(1e-9, self.busy)
        self.left = left
        miou = "" if math.isnan(self.miou) else f"   val mIoU {self.miou:.3f}"
        text = f"step {self._of(step)}   {speed:.1f} images/s   cost {cost:.3f}{miou}{self._left('   ')}"
        self.bar.update(self.task, completed=progress, description="training", text=text)
        self.last_step = step
        self.latest = {"seconds": seconds, "images_per_second": speed, "lr": lr, "cost": sum(self.costs) / len(self.costs)}
        known = step - self.first_step >= FIRST and self.stepping > SETTLED
        if self.section.steps and known and not self.told and left > WORTH_TELLING:
            self.told = True
            self.console.print(f"[dim]step {self._of(step)}{self._left()}, all scores included[/]", soft_wrap=True)
        if step % EVERY == 0:
            self._row(step, self.latest)
            self.costs, self.busy = [], 0.0

    def validating(self, done: int, of: int, name: str) -> None:
        """Progress of a validation."""
        self.bar.update(self.task, description="validation", text=f"{done} of {of}   {name}")

    def validated(self, step: int, result: Evaluation) -> None:
        """Notes the scores of a validation."""
        self.miou = result.confusion.miou
        accuracy = result.confusion.pixel_accuracy
        scores = {"val_cross_entropy": result.cost, "val_miou": self.miou, "val_pixel_accuracy": accuracy}
        self._row(step, self.latest | scores)
        words = f"cross-entropy {result.cost:.3f}, mIoU {self.miou:.3f}, pixel accuracy {accuracy:.3f}"
        self.console.print(f"step {self._of(step)}: cost {self.latest['cost']:.3f}; on validation {words}{self._left()}", soft_wrap=True)
        self.bar.update(self.task, description="training")

    def validated_for(self, seconds: float) -> None:
        """Notes what a validation while training took."""
        self.scoring, self.rounds = self.scoring + seconds, self.rounds + 1

    def foresee(self, overrun: float) -> None:
        """Says once, early, that the end of the run will take longer than the minutes given."""
        known = self.last_step - self.first_step > 1  # the first step is slower than the others
        if known and not self.foreseen and overrun > 0.1 * 60 * (self.section.minutes or math.inf):
            self.foreseen = True
            self.console.print(
                f"[yellow]warning:[/] the validation part is large for {self.section.minutes:g} minutes: its last scores will take about "
                f"{_clock(overrun)} more than that",
                soft_wrap=True,
            )

    def ending(self) -> None:
        """Training is over; what follows is the last validation, the final scores and the report."""
        self.end_began = time.monotonic()

    def ended(self, total: float) -> None:
        """Notes that all is done, `total` seconds after the call of the command."""
        self.end, self.total = time.monotonic() - self.end_began, total

    def _of(self, step: int) -> str:
        return f"{step} of {self.section.steps}" if self.section.steps else str(step)

    def _left(self, between: str = "; ") -> str:
        return "" if math.isnan(self.left) else f"{between}{_clock(self.left)} left"

    def _spent(self) -> str:
        """Where the time went."""
        other = max(0.0, self.total - self.stepping - self.scoring - self.end)
        validations = f"{self.rounds} validation{'s' * (self.rounds != 1)} meanwhile {_clock(self.scoring)}"
        parts = f"steps {_clock(self.stepping)}, {validations}, last validation, final scores and report {_clock(self.end)}"
        return f"{_clock(self.total)} in all: {parts}, reading and the rest {_clock(other)}"

    def _row(self, step: int, values: dict[str, float]) -> None:
        self.rows = [row for row in self.rows if row["step"] != str(step)]  # a validation completes the row of its step
        self.rows.append({"step": str(step)} | {name: f"{values[name]:.6g}" if name in values else "" for name in COLUMNS[1:]})
        if self.writes:
            _write_rows(self.path, self.rows)
        if self.board is not None:
            for name, value in values.items():
                self.board.add_scalar(name, value, step)


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


def _tensorboard(out: Path, first_step: int) -> Any:
    """A writer of TensorBoard events below OUT/events, or None where TensorBoard is not installed. Later events there are dropped."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(out / "events"), purge_step=first_step + 1)


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
