"""The README's promises that a machine can check."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DEMO = "python -m pip install . && perpixel demo"
TESTS = "python -m pip install '.[test]' && python -m pytest"


def test_the_readme_has_exactly_the_two_set_up_commands_and_ci_runs_the_second():
    set_up = (ROOT / "README.md").read_text("utf-8").split("## Set up")[1].split("\n## ")[0]
    assert re.findall(r"```\n(.*?)\n```", set_up, re.S) == [DEMO, TESTS]
    assert TESTS in (ROOT / ".ci" / "run").read_text("utf-8")


def test_every_file_that_readme_and_docs_link_to_exists():
    for page in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")):
        for link in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text("utf-8")):
            assert (page.parent / link).exists(), f"{page.name}: {link}"


def test_the_readme_lists_every_page_of_docs_once():
    listed = re.findall(r"^- \[docs/(.+?)\]\(docs/\1\): ", (ROOT / "README.md").read_text("utf-8"), re.M)
    assert sorted(listed) == sorted(page.name for page in (ROOT / "docs").glob("*.md"))
