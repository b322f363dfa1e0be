"""The README's promises that a machine can check."""

import re
from collections.abc import Iterator
from pathlib import Path

from pydantic import BaseModel

from perpixel.recipe import OptionsSection, Recipe

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


def keys_of(section: type[BaseModel], at: str = "") -> Iterator[str]:
    for name, field in section.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from keys_of(field.annotation, f"{at}{name}.")
        else:
            yield f"{at}{name}"


def test_docs_have_every_key_of_a_recipe_and_no_other():
    page = (ROOT / "docs" / "recipe.md").read_text("utf-8")
    listed = {key for row in re.findall(r"^\| (`[a-z]+\..*?) \|", page, re.M) for key in re.findall(r"`(.+?)`", row)}
    options = set(re.findall(r"`(\w+)`", re.search(r"^\| `model\.options\.NAME` .*?\[api", page, re.M)[0]))
    assert options == OptionsSection.model_fields.keys()
    assert (listed - {"model.options.NAME"}) | {f"model.options.{name}" for name in options} == set(keys_of(Recipe))
