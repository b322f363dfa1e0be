"""A comparison as one HTML page that needs no network."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from perpixel import __version__
from perpixel.data.writing import replacing
from perpixel.metrics.measures import MEASURES, Measure

if TYPE_CHECKING:
    from perpixel.compare import Pairing

UNITS = {"points": "score (points)", "nats": "loss (nats)", "pixels": "distance (pixels)", "": "neurites"}
WIDTH, HEIGHT = 200, 18  # of the drawing of an interval, in CSS pixels

PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>perpixel compare</title>
<style>
:root { color-scheme: light dark; --ink: #1a1c20; --soft: #5b616b; --paper: #fff; --line: #d9dce1; --up: #0b62b0; --down: #b04a00; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e8eaed; --soft: #a3aab5; --paper: #14161a; --line: #363b43; --up: #7db7f5; --down: #ff9d5c; }
}
body { margin: 0 auto; max-width: 1100px; padding: 1rem; background: var(--paper); color: var(--ink); }
body { font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.2rem; margin-top: 2.5rem; overflow-wrap: anywhere; }
.soft { color: var(--soft); font-size: .86rem; } .scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; margin: 1rem 0; }
th, td { padding: .25rem .9rem .25rem 0; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
td svg { display: block; } .zero { stroke: var(--soft); stroke-dasharray: 2 2; }
.up { stroke: var(--up); fill: var(--up); } .down { stroke: var(--down); fill: var(--down); }
.open { stroke: var(--soft); fill: var(--soft); }
li { overflow-wrap: anywhere; }
</style>
</head>
<body>
<h1>Runs side by side</h1>
{% for pair in pairs %}
<h2>{{ pair.verdict }}</h2>
{% for note in pair.notes %}<p class="soft">{{ note }}</p>{% endfor %}
{% for table in pair.tables %}
{% if table.folded %}<details><summary>{{ table.title }}</summary>{% endif %}
<div class="scroll"><table>
<tr><th>{{ table.title }}</th><th>first</th><th>second</th><th>difference</th><th>95 %</th>
<th style="text-align: center"><span class="soft">worse | better</span></th></tr>
{% for row in table.rows %}
<tr><td>{{ row.name }}</td><td>{{ row.first }}</td><td>{{ row.second }}</td><td>{{ row.difference }}</td><td>{{ row.between }}</td>
<td>{% if row.drawn %}<svg width="{{ width }}" height="{{ height }}" role="img" aria-label="{{ row.between }}">
<line class="zero" x1="{{ width / 2 }}" x2="{{ width / 2 }}" y1="0" y2="{{ height }}"/>
<line class="{{ row.side }}" x1="{{ row.drawn[0] }}" x2="{{ row.drawn[2] }}" y1="{{ height / 2 }}" y2="{{ height / 2 }}" stroke-width="3"/>
<circle class="{{ row.side }}" cx="{{ row.drawn[1] }}" cy="{{ height / 2 }}" r="4"/></svg>{% endif %}</td></tr>
{% endfor %}
</table></div>
{% if table.folded %}</details>{% endif %}
{% endfor %}
{% for who, won in pair.won %}
<details><summary>{{ who }} is better on {{ won | length }} of {{ pair.images }} images</summary>
<ol>{% for name, gain in won %}<li>{{ gain }} points: {{ name }}</li>{% endfor %}</ol></details>
{% endfor %}
<p class="soft">{{ pair.absent_rule }} Of twenty classes that do not differ, one interval will leave zero out by chance.</p>
{% endfor %}
<p class="soft">Differences are the second run's minus the first's; 95 % intervals from 1,000 bootstrap resamples of the images, the same
for both runs. Points are hundredths. Less is better of errors, distances and cost, and drawn to the right; neurite
scores each to a scale of its own. Blue: the whole interval is better;
orange: worse; grey: it holds zero, or fewer than six images have a say. perpixel {{ version }}</p>
</body>
</html>
"""


def write_page(pairings: "Sequence[Pairing]", path: Path) -> None:
    """Writes the page, whole or not at all."""
    from jinja2 import Environment  # loaded here: only who wants a page waits for it

    template = Environment(autoescape=True, trim_blocks=True).from_string(PAGE)
    pairs = [_content(pairing.to_json()) for pairing in pairings]
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        page = template.render(pairs=pairs, width=WIDTH, height=HEIGHT, version=__version__)
        temporary.write_bytes(page.encode("utf-8", "replace"))  # a file's name may hold bytes that are no text


def _content(told: Mapping[str, Any]) -> dict[str, Any]:
    sides = ((told["second"], told["won_by_second"]), (told["first"], told["won_by_first"]))
    won = [(who, [(name, f"{100 * gain:.1f}") for name, gain in images.items()]) for who, images in sides]
    kinds: dict[str, list[str]] = {}
    for name in told["scores"]:
        kinds.setdefault(UNITS[MEASURES[name].unit], []).append(name)
    tables = [
        # Neurite scores have sizes of their own: a warping error would not be seen beside a Rand error.
        {
            "title": title,
            "folded": False,
            "rows": [
                row
                for part in ([[name] for name in names] if title == "neurites" else [names])
                for row in _rows([(MEASURES[name], MEASURES[name].words, told["scores"][name]) for name in part])
            ],
        }
        for title, names in kinds.items()
    ]
    iou = MEASURES["miou"]
    tables.append({"title": "IoU of class", "folded": False, "rows": _rows([(iou, row["name"], row) for row in told["classes"]])})
    for name, rows in told["class_scores"].items():
        words = "accuracy" if name == "mean_accuracy" else MEASURES[name].words
        tables.append({"title": f"{words} of class", "folded": True, "rows": _rows([(MEASURES[name], row["name"], row) for row in rows])})
    return {**told, "tables": tables, "won": won}


def _rows(named: Sequence[tuple[Measure, str, Mapping[str, Any]]]) -> list[dict[str, Any]]:
    """Rows as text, and where their intervals lie in a drawing that all of them share, better to the right."""
    bounds = [abs(row[key]) for _, _, row in named for key in ("low", "difference", "high") if row[key] is not None]
    scale = (WIDTH / 2 - 6) / max([*bounds, 1e-9])

    rows = []
    for measure, name, row in named:
        ends = [row[key] for key in ("low", "difference", "high")]
        known = None not in ends
        gain = ([-end for end in ends[::-1]] if measure.less else ends) if known else []
        rows.append(
            {
                "name": name,
                "first": measure.text(row["first"]),
                "second": measure.text(row["second"]),
                "difference": measure.text(row["difference"], "+"),
                "between": f"{measure.text(row['low'], '+')} to {measure.text(row['high'], '+')}" if known else "-",
                "drawn": [round(WIDTH / 2 + scale * end, 1) for end in gain],
                "side": "open" if not row["real"] else "up" if gain[0] > 0 else "down",
            }
        )
    return rows
