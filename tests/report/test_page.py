"""The page: what it says, what it must not let through, how large it gets; and in a browser, whether it works."""

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from report_scenes import COLORS, stream

from perpixel.bundle import load_bundle
from perpixel.evaluate import Evaluation
from perpixel.metrics.region import Region
from perpixel.report import figures
from perpixel.report.atlas import Entry
from perpixel.report.facts import commands, facts, read_run
from perpixel.report.findings import Findings
from perpixel.report.label_next import Proposal
from perpixel.report.page import BUDGET, Content, render_page
from perpixel.scores import DEFAULT_GROUPS, Scored, Scores

CLASSES = ["<b>&", '$x_1$ "quoted"', "</script><script>throw 1</script>"]
HOSTILE = "'\"><img src=x onerror=\"console.error('escaped')\">"
RUN = """# train.lr: 0.004 - AdamW <fast>
# model.name: unet - as you asked
data: {images: "pictures & more", masks: null}
model: {name: unet, start_from: null, encoder_weights: true}
train: {steps: 40, minutes: null, batch: 4, crop: [64, 96], optimizer: adamw, lr: 0.004, loss: [{name: dice, weight: 0.5}], seed: 7}
"""


class Page(HTMLParser):
    """Tags with their attributes, and the text outside of style and script."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.text, self.open = [], "", []
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self.open.append(tag)

    def handle_endtag(self, tag):
        if tag in self.open:
            while self.open.pop() != tag:
                pass

    def handle_data(self, data):
        if not {"style", "script"} & set(self.open):
            self.text += data

    def all(self, tag, **attributes):
        return [have for name, have in self.tags if name == tag and all(have.get(key) == value for key, value in attributes.items())]


@pytest.fixture(scope="module")
def content(tmp_path_factory):
    """Twelve images of three classes with hostile names, and a run beside them."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "recipe.yaml").write_text(RUN)
    (folder / "metrics.csv").write_text("step,cost,val_miou,val_cross_entropy\n20,1.5,,\n40,1.1,0.4,1.2\n40,nan,0.4")
    result, scores, findings = Evaluation(Region(3), CLASSES), Scores(DEFAULT_GROUPS, CLASSES, 1.7), Findings(COLORS)
    for image in stream(12, size=(40, 60)):
        result.region.update(image.labels, image.logits.argmax(0), 255, image.name)
        result.losses[image.name] = image.loss
        scores(image)
        findings(image)
    result.scores, result.damaged = scores, {"bad.png": f"bad.png: {HOSTILE}"}
    entries = [Entry(**{**vars(entry), "name": f"{entry.name}{HOSTILE}"}) for entry in findings.atlas.entries]
    run = read_run(folder)
    picture = entries[0]
    return Content(
        title=f"set {HOSTILE}", subtitle="unet", classes=CLASSES, colors=COLORS, scores=result.to_json(), intervals=result.intervals(),
        facts=[("Seed", "7")], commands=commands(run, folder, ["perpixel", "evaluate", "a b.safetensors"]), run=run,
        confusions=findings.confusions.worst(), atlas=entries, suspects=findings.suspects.ranked(),
        proposals=[Proposal(f"next{HOSTILE}", (40, 60), 0.5, picture.photo, picture.guess, picture.uncertainty)], looked_at="9 images.",
    )  # fmt: skip


@pytest.fixture(scope="module")
def html(content):
    return render_page(content)


def test_the_page_says_what_was_done_and_how_to_repeat_it(html, content):
    page = Page(html)
    assert "AdamW <fast>" in page.text
    assert "perpixel evaluate 'a b.safetensors'" in page.text
    assert "perpixel train 'pictures & more' -o" in page.text
    assert "bad.png" in page.text
    for heading in (
        "What was asked and done",
        "Scores",
        "Confusions",
        "Boundaries and trust",
        "Error atlas",
        "Suspected",
        "What to label next",
    ):
        assert heading in page.text


def test_every_score_stands_there_with_its_interval(html, content):
    text = Page(html).text
    for key in ("miou", "pixel_accuracy", "mean_accuracy", "fwiou", "mean_dice"):
        found = content.intervals[key]
        assert f"{100 * content.scores[key]:.1f} %" in text
        assert f"{100 * found.low:.1f} – {100 * found.high:.1f}" in text
    for row in content.scores["classes"]:
        assert row["name"] in text
        assert f"{100 * row['iou']:.1f} %" in text
    assert content.scores["absent_rule"] in text


def test_names_of_classes_and_files_are_text_never_markup(html):
    page = Page(html)
    assert "<b>&" in page.text
    assert not page.all("b")
    assert [have for have in page.all("img") if have.get("src") == "x" or "onerror" in have] == []
    assert len(page.all("script")) == 2
    names = [have["data-name"] for have in page.all("article") if "data-name" in have]
    assert len(names) == 12
    assert all(name.endswith(HOSTILE) for name in names)
    assert json.loads(html.split('id="classes">')[1].split("</script>")[0])["0,0,200"] == CLASSES[2]


def test_the_page_asks_nothing_of_a_network(html):
    page = Page(html)
    used = [
        have[key] for _, have in page.tags for key in ("src", "href", "xlink:href", "action", "data", "poster", "srcset") if have.get(key)
    ]
    assert used
    assert [link for link in used if not link.startswith(("data:", "#"))] == []
    assert [link for link in re.findall(r"url\(['\"]?(.{5})", html) if not link.startswith(("data:", "#"))] == []
    assert "@import" not in html
    assert "http" not in html


def test_pictures_have_words_for_those_who_do_not_see_them(html):
    page = Page(html)
    assert all("alt" in have for have in page.all("img"))
    assert all(have.get("aria-label") for have in page.all("svg"))
    drawn = [have for _, have in page.tags if "panel" in have.get("class", "").split()]
    assert all(have.get("aria-label") or have.get("aria-labelledby") for have in drawn)
    labelled = {have["for"] for have in page.all("label")}
    assert {have["id"] for have in [*page.all("select"), *page.all("input")]} <= labelled
    known = {have["id"] for _, have in page.tags if "id" in have}
    assert {have["href"][1:] for have in page.all("a")} <= known


def test_the_page_stays_below_20_mb_however_many_pictures_there_are(content):
    big = bytes(np.random.default_rng(0).integers(0, 256, 200_000, np.uint8))
    entry = content.atlas[0]
    entries = [Entry(**{**vars(entry), "photo": big, "truth": big}) for _ in range(300)]
    proposals = [Proposal("n", (40, 60), 0.5, big, big, big) for _ in range(300)]
    html = render_page(Content(**{**vars(content), "atlas": entries, "proposals": proposals}))
    assert len(html.encode()) < 20_000_000
    assert len(re.findall("data-rank", html)) == BUDGET["atlas"] // entries[0].bytes


def test_a_set_without_anything_to_show_still_makes_a_page(content):
    bare = Evaluation(Region(3), CLASSES)
    bare.losses["a"] = float("nan")
    bare.region.update(np.array([[0]]), np.array([[0]]), 255, "a")
    empty = {"confusions": [], "atlas": [], "suspects": [], "proposals": [], "looked_at": ""}
    page = Page(render_page(Content(**{**vars(content), **empty, "scores": bare.to_json(), "intervals": bare.intervals()})))
    assert "What to label next" not in page.text
    assert "No pixel is wrong" in page.text


def test_plots_keep_names_as_they_are_and_take_the_ink_of_the_page():
    svg = figures.confusion_matrix(np.array([[5, 1], [0, 4]]), ["$x$ <&>", "y"])
    assert "$x$ &lt;&amp;&gt;" in svg
    assert "currentColor" in svg
    assert figures.INK not in svg
    assert figures.learning_curves([]) == ""


def test_names_in_letters_that_our_font_lacks_are_kept_without_a_word(recwarn):
    """The browser's fonts draw them."""
    svg = figures.confusion_matrix(np.array([[5, 1], [0, 4]]), ["膜", "細胞"])
    assert "細胞" in svg
    assert [str(warning.message) for warning in recwarn] == []


def squeezed(text):
    """Without spaces, which do not stand between the cells of a table."""
    return "".join(text.split())


def test_the_confusion_matrix_stands_there_in_words_too(html, content):
    """Beside a loop over the matrix."""
    text = squeezed(Page(html).text)
    for k, row in enumerate(content.scores["confusion"]):
        others = sorted(((n / sum(row), CLASSES[j]) for j, n in enumerate(row) if j != k and n >= sum(row) / 100), key=lambda o: -o[0])
        taken = ", ".join(f"{name} {100 * share:.1f} %" for share, name in others)
        assert squeezed(f"{CLASSES[k]} {sum(row):,} {100 * row[k] / sum(row):.1f} % {taken}") in text
    assert squeezed("The matrix as a table of words") in text


def test_distances_neurite_scores_and_damaged_pieces_stand_there_when_there_are_any(content):
    """Scores of two classes with a piece of an image missing; and none of it on the other page."""
    made, scores = Evaluation(Region(2), ["membrane", "cell"]), Scores(("surface", "neurite"), ["membrane", "cell"])
    for number in range(4):
        labels = torch.from_numpy(np.random.default_rng(number).integers(0, 2, (6, 6)).repeat(6, 0).repeat(6, 1))
        logits = 3.0 * torch.eye(2)[labels.roll(1, 0)].movedim(-1, 0)
        made.region.update(labels, logits.argmax(0), 255, f"{number}")
        made.losses[f"{number}"] = 0.1
        scores(Scored(f"{number}", None, torch.zeros(1, 36, 36), labels, logits, 0.1, 255))
    made.scores, made.holes = scores, {"a.tif": [f"a.tif: rows 0 to 64 {HOSTILE}"]}
    empty = {"confusions": [], "atlas": [], "suspects": [], "proposals": [], "classes": made.classes, "colors": COLORS[:2]}
    page = Page(render_page(Content(**{**vars(content), **empty, "scores": made.to_json(), "intervals": made.intervals()})))
    text = squeezed(page.text)
    found = made.to_json()
    best = found["neurite"]["board"]["best"]["rand_error"]["value"]
    low, high = found["intervals"]["board_rand_error"]
    assert squeezed(f"Rand error, best threshold {best:.4f} {low:.4f} – {high:.4f}") in text
    assert squeezed(f"adapted Rand error {found['intervals']['rand_error'][0]:.4f} – {found['intervals']['rand_error'][1]:.4f}") in text
    assert squeezed(f"cell {found['surface']['assd_classes'][1]:.1f} {found['surface']['hausdorff_classes'][1]:.1f} 0 0") in text
    at = found["neurite"]["board"]["best"]["rand_error"]["threshold"]
    assert squeezed(f"Best thresholds of the probability of cell: rand error {at:g},") in text
    assert squeezed("Damaged pieces that do not count (1)") in text
    assert squeezed(f"rows 0 to 64 {HOSTILE}") in text
    assert not page.all("img", src="x")
    other = Page(render_page(content)).text
    assert "Damaged pieces" not in other
    assert "Surface distances" not in other


def test_a_run_folder_with_damaged_files_leaves_out_what_cannot_be_read(tmp_path):
    (tmp_path / "recipe.yaml").write_text("# a: b\n{:")
    (tmp_path / "metrics.csv").write_bytes(b"\xff\xfe\x00")
    assert read_run(tmp_path).recipe == ""
    assert read_run(tmp_path / "nowhere").rows == ()


@pytest.mark.parametrize(
    "text",
    [
        "data: {}\nmodel: {}\ntrain: {}",  # valid, but of no run: it states nothing
        RUN.replace("lr: 0.004", "lr: much"),
        RUN.replace("batch: 4", "crop_size: 4"),
        "data: {images: 3}\nmodel: {name: resnet}\ntrain: {loss: 1}",  # somebody else's
        "a: [",
        "- 1",
    ],
)
def test_a_recipe_that_is_no_run_s_leaves_a_page_without_one(tmp_path, text, make_bundle):
    (tmp_path / "recipe.yaml").write_text(text)
    card, run = load_bundle(make_bundle()).card, read_run(tmp_path)
    assert run.recipe == ""
    assert "Training" not in dict(facts(card, run, tmp_path / "best.safetensors", "images", "none"))
    assert [words for words, _ in commands(run, tmp_path, ["perpixel"])] == ["To score it again"]


def test_the_recipe_of_a_run_is_told(tmp_path, make_bundle):
    (tmp_path / "recipe.yaml").write_text(RUN)
    told = dict(facts(load_bundle(make_bundle()).card, read_run(tmp_path), tmp_path / "best.safetensors", "images", "none"))
    assert told["Training"] == "40 steps; batches of 4 crops of 64x96; adamw, rate 0.004"
    assert told["Loss"] == "0.5 dice"


# ---- in a browser


@pytest.fixture(scope="module")
def browse(tmp_path_factory):
    """`browse(html, script, hash)` -> what the console said, and the page as it stands after `script` ran in it."""
    folder = tmp_path_factory.mktemp("chromium")

    def call(html, script="", address=""):
        path = folder / "page.html"
        path.write_text(html + f"<script>{script}</script>", "utf-8")
        done = subprocess.run(
            [shutil.which("chromium"), "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--enable-logging=stderr",
             f"--user-data-dir={folder / 'profile'}", "--window-size=1200,900", "--virtual-time-budget=3000", "--dump-dom",
             f"{path.as_uri()}{address}"],
            capture_output=True, text=True, timeout=120, check=True,
        )  # fmt: skip
        return [line for line in done.stderr.splitlines() if "CONSOLE" in line], Page(done.stdout)

    return call


def shown(page):
    """Numbers of the images that the atlas shows, in order."""
    return [int(re.match(r"im(\d+)", have["data-name"])[1]) for have in page.all("article") if "data-name" in have and "hidden" not in have]


def name(entry):
    return int(re.match(r"im(\d+)", entry.name)[1])


def order(content, key, reverse=False):
    return [name(entry) for entry in sorted(content.atlas, key=key, reverse=reverse)]


@pytest.mark.chromium
def test_the_page_opens_without_a_word_on_the_console_worst_loss_first(browse, html, content):
    console, page = browse(html)
    assert console == []
    assert shown(page) == order(content, lambda entry: entry.loss, reverse=True)[:8]
    console, _ = browse("<p>", "throw new Error('so that the check can fail')")
    assert any("so that the check can fail" in line for line in console)


@pytest.mark.chromium
def test_an_address_with_a_view_sorts_and_filters_the_atlas(browse, html, content):
    least = 40 * max(entry.loss for entry in content.atlas) / 100  # on a step of the slider
    console, page = browse(html, address=f"#sort=accuracy&class=1&loss={least:.5f}")
    fitting = [name(entry) for entry in content.atlas if entry.loss > least and 1 in entry.iou]
    assert console == []
    assert 1 < len(fitting) < len(content.atlas)
    assert shown(page) == [n for n in order(content, lambda entry: entry.accuracy) if n in fitting][:8]


@pytest.mark.chromium
def test_choosing_by_hand_sorts_shows_more_and_compares_truth_with_prediction(browse, html, content):
    """What a person does: choose an order, ask for more, open an image, move the slider by key, go on, close."""
    script = """
    const pick = (id, value) => {
      const element = document.getElementById(id);
      element.value = value;
      element.dispatchEvent(new Event("input", {bubbles: true}));
    };
    pick("class", "2"); pick("sort", "class");
    document.getElementById("more").click();
    document.querySelector("article:not([hidden]) button.compare").click();
    pick("split", "25");
    const dialog = document.getElementById("compare");
    const said = {open: dialog.open, clip: dialog.querySelectorAll("img")[1].style.clipPath, first: dialog.querySelector("h2").textContent};
    dialog.dispatchEvent(new KeyboardEvent("keydown", {key: "n"}));
    said.second = dialog.querySelector("h2").textContent;
    (async () => {
      await new Promise((go) => setTimeout(go, 300));
      const panel = dialog.querySelector(".panel");
      const box = panel.getBoundingClientRect();
      panel.dispatchEvent(new PointerEvent("pointermove", {clientX: box.left + 0.5 * box.width, clientY: box.top + 0.5 * box.height}));
      said.below = document.getElementById("below").textContent;
      document.getElementById("close").click();
      said.closed = !dialog.open;
      document.body.dataset.said = JSON.stringify(said);
    })();
    """
    console, page = browse(html, script)
    assert console == []
    expected = order(content, lambda entry: entry.iou[2])
    assert shown(page) == expected
    said = json.loads(page.all("body")[0]["data-said"])
    assert said["open"]
    assert said["closed"]
    assert "25%" in said["clip"]
    assert said["first"].startswith(f"im{expected[0]}'")
    assert said["second"].startswith(f"im{expected[1]}'")
    classes = [*CLASSES, "not labelled"]
    assert said["below"] in {f"truth: {truth}\u2003prediction: {guess}" for truth in classes for guess in classes}
