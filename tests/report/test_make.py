"""Reports from the command line: of a bundle on a set, and at the end of a run."""

import json
import re
import shutil

import pytest

from perpixel.train import train


@pytest.fixture
def scenes(sample_set, tmp_path):
    """The sample set, two of whose validation masks are missing."""
    shutil.copytree(sample_set, tmp_path / "set")
    for mask in sorted((tmp_path / "set" / "masks" / "val").iterdir())[:2]:
        mask.unlink()
    return tmp_path / "set"


def test_evaluate_writes_a_report_of_what_it_prints(command, run, scenes, tmp_path):
    page = tmp_path / "out" / "report.html"
    given = ("evaluate", run / "best.safetensors", scenes / "images", scenes / "masks")
    said = command(*given, "--report", page)
    assert said.code == 0
    assert f"report: {page}" in said.out
    html = page.read_text("utf-8")
    scores = json.loads(command(*given, "--json").out)
    assert f"{100 * scores['miou']:.1f} %" in html
    assert html.count("data-rank") == scores["images"] == 2
    assert "2 images without masks were looked at" in html
    assert f"perpixel evaluate {run / 'best.safetensors'}" in html
    assert "scored on 2 validation images" in html
    assert "Learning curves" in html
    assert "as you asked" in html


def test_unlabelled_images_of_another_folder_are_ranked(command, run, sample_set, tmp_path):
    page = tmp_path / "report.html"
    pool = sample_set / "images" / "train"
    command("evaluate", run / "best.safetensors", sample_set / "images", sample_set / "masks", "--report", page, "--unlabelled", pool)
    assert f"--unlabelled={pool} --report {page}" in page.read_text()  # the command that makes it again
    ranked = re.findall(r"<h3>\d+\. (\S+?)</h3><span class=\"small soft\">mean entropy", page.read_text("utf-8"))
    assert sorted(ranked) == sorted(path.stem for path in pool.iterdir())


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--unlabelled", "."), "add --report"),
        (("--report", "."), "is a folder"),
        (("--report", "x.html", "--unlabelled", "nowhere"), "no such file"),
    ],
)
def test_a_report_that_cannot_be_made_is_told_before_the_work(command, run, sample_set, tmp_path, monkeypatch, options, says):
    monkeypatch.chdir(tmp_path)
    said = command("evaluate", run / "best.safetensors", sample_set / "images", sample_set / "masks", *options)
    assert said.code == 2
    assert says in said.err
    assert list(tmp_path.iterdir()) == []


def test_a_finished_run_has_a_report_with_the_scores_of_its_best_bundle(sample_set, tmp_path, tiny_settings):
    settings = [*(setting for setting in tiny_settings if "report" not in setting), "train.report=true"]
    outcome = train(sample_set / "images", sample_set / "masks", out=tmp_path / "run", steps=8, settings=settings)
    html = (tmp_path / "run" / "report.html").read_text("utf-8")
    assert f"{100 * outcome.scores['miou']:.1f} %" in html
    assert "4 validation images" in html
    assert f"--recipe {tmp_path / 'run' / 'recipe.yaml'}" in html
    assert html.count("data-rank") == 4


def test_a_run_asked_for_none_has_no_report(run):
    assert not (run / "report.html").exists()
