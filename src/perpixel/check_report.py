"""A diagnosis as a person likes to read it."""

from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from perpixel.check import Check

BAR = 24  # characters of the longest frequency bar
EIGHTHS = " ▏▎▍▌▋▊▉█"
ROWS = 30  # of the table of classes
SHOWN = 8  # files named of each kind of damage


def render(report: "Check", console: Console) -> None:
    """Print what was found, what is proposed and why, and what stands in the way."""
    _summary(report, console)
    if report.classes:
        console.print(_class_table(report))
        _label_map(report, console)
    told: dict[str, str] = {}  # message -> file, of those that are printed
    for title, files in (("Can't be used", report.damaged), ("Sizes differ", report.size_mismatches)):
        if files:
            console.print(f"[bold]{title}[/] ({len(files)})")
            for file, message in list(files.items())[:SHOWN]:
                told[message] = file
                console.print(Text(f"  {message if file in message else f'{file}: {message}'}"))
            if len(files) > SHOWN:
                console.print(f"  and {len(files) - SHOWN} more; --json names them all")
    for text in report.warnings:
        console.print(f"[yellow]![/] {escape(text)}", highlight=False)
    for text in report.problems:
        for message, file in told.items():
            text = text.replace(message, file)  # a problem that quotes it names the file instead
        console.print(f"[bold red]✗[/] {escape(text)}", highlight=False)
    if report.ready:
        count = len(report.split("train"))
        console.print(f"[bold green]✓[/] ready to train on {count} image{'s' * (count != 1)}", highlight=False)
    else:
        count = len(report.problems)
        console.print(f"[bold red]{count} problem{'s' * (count > 1)} to solve before training[/]", highlight=False)


def _summary(report: "Check", console: Console) -> None:
    """One line for each finding."""
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="bold")
    grid.add_column()
    splits = ", ".join(f"{len(report.split(split))} {split}" for split in report.pixels)
    count = len({(pair.image, pair.mask) for pair in report.pairs})
    splits += ", the same picture" if count < len(report.pairs) == 2 else ""
    grid.add_row("Pairs", f"{count} usable ({splits}); layout: {escape(report.layout)}" if report.pairs else "none usable")
    if report.sizes:
        grid.add_row("Images", f"{_sizes(report)}, {report.bands} band{'s' * (report.bands != 1)}, {report.dtype}")
        grid.add_row(
            "Values", "; ".join(f"{m:.3f} ± {s:.3f}" for m, s in zip(report.mean[:6], report.std[:6], strict=True)) + _unit(report)
        )
        void = f"{_percent(report.ignore_share)} of the pixels ignored" if report.ignore_share else "every pixel labelled"
        grid.add_row("Masks", f"{escape(report.encoding)}; {len(report.classes)} classes, {void}")
    console.print(grid, highlight=False)


def _sizes(report: "Check") -> str:
    """The commonest sizes, and the range of all."""
    sizes = list(report.sizes)
    if len(sizes) == 1:
        return f"{sizes[0][0]}x{sizes[0][1]} pixels (height x width)"
    low, *_, high = sorted(sizes, key=lambda size: (size[0] * size[1], size))  # of 213x320 and 320x213 one is each
    most = sizes[0]
    return f"{len(sizes)} sizes, {low[0]}x{low[1]} to {high[0]}x{high[1]} pixels (height x width), mostly {most[0]}x{most[1]}"


def _unit(report: "Check") -> str:
    more = f" and {len(report.mean) - 6} bands more" if len(report.mean) > 6 else ""
    return f"{more} (mean ± deviation; 1 = {report.scale:g})" if report.scale != 1 else f"{more} (mean ± deviation)"


def _class_table(report: "Check") -> Table:
    """Class, mask values, frequency bar, and the images of each part that show it."""
    table = Table(box=None, padding=(0, 1), header_style="bold", pad_edge=False)
    table.add_column("", justify="right")
    table.add_column("Class")
    table.add_column("Pixels", justify="right")
    table.add_column("", width=BAR)
    for split in report.pixels:
        table.add_column(f"in {split}", justify="right")
    total = [sum(counts) for counts in zip(*report.pixels.values(), strict=True)]
    everything, largest = max(1, sum(total)), max(1, *total)
    for index, name in enumerate(report.classes[:ROWS]):
        color = "#{:02x}{:02x}{:02x}".format(*report.colors[index])
        images = [_of(counts[index], len(report.split(split))) for split, counts in report.images_with.items()]
        table.add_row(
            str(index), Text.assemble(("■ ", color), name), _percent(total[index] / everything), bar(total[index] / largest), *images
        )
    if len(report.classes) > ROWS:
        table.add_row("", f"and {len(report.classes) - ROWS} more; --json names them all")
    return table


def _of(count: int, images: int) -> Text:
    return Text(f"{count}/{images}", style="bold yellow" if count == 0 else "")


def _percent(share: float) -> str:
    """Two digits that say something, down to where there is nothing."""
    return "0" if share == 0 else f"{share:.1%}" if share >= 0.001 else f"{share:.3%}" if share >= 0.00001 else "<0.001%"


def bar(share: float, width: int = BAR) -> str:
    """A bar of eighths of a character; whatever is not zero shows."""
    eighths = max(round(share * width * 8), 1 if share > 0 else 0)
    return "█" * (eighths // 8) + EIGHTHS[eighths % 8].strip()


def _label_map(report: "Check", console: Console) -> None:
    """Which mask value becomes which class, and why."""
    groups: dict[int, list[str]] = {}
    for value, label in report.label_map.values.items():
        groups.setdefault(label, []).append(f"#{value:06x}" if report.label_map.rgb else str(value))
    parts = []
    for label, values in sorted(groups.items()):
        name = "ignore" if label == report.label_map.ignore else report.classes[label] if label < len(report.classes) else str(label)
        shown = ", ".join(values[:4]) + (f" and {len(values) - 4} more" if len(values) > 4 else "")
        parts.append(f"{shown} → {name}")
    console.print(
        Text.assemble(("Label map  ", "bold"), "; ".join(parts[:24]) + (f"; and {len(parts) - 24} more" if len(parts) > 24 else ""))
    )
    for reason in report.reasons:
        console.print(Text(f"  · {reason}"), highlight=False)
