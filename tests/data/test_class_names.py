"""Class files as people and tools write them."""

from pathlib import Path

import pytest

from perpixel.data.class_names import ClassList, read_classes, refuse_other_names
from perpixel.data.layouts import find_layout
from perpixel.data.masks import LabelMap


@pytest.mark.parametrize(
    ("text", "names", "colors"),
    [
        ("sky\nroad marking\n", ["sky", "road marking"], None),
        ("\ufeffsky\r\n\r\n# comment\r\nroad\r\n", ["sky", "road"], None),
        ("name,r,g,b\nsky,1,2,3\nroad,4,5,6\n", ["sky", "road"], [(1, 2, 3), (4, 5, 6)]),
        ("1 2 3 sky\n4 5 6\troad marking\n", ["sky", "road marking"], [(1, 2, 3), (4, 5, 6)]),
        ("# label:color_rgb:parts:actions\nsky:1,2,3::\nroad:4,5,6::\n", ["sky", "road"], [(1, 2, 3), (4, 5, 6)]),
        ("0: sky\n1: road\n", ["sky", "road"], None),
        ("1 sky\n2 road\n", ["sky", "road"], None),
        ("area 51\narea 52\n", ["area 51", "area 52"], None),
    ],
)
def test_class_files_as_people_write_them(tmp_path: Path, text: str, names: list[str], colors: list[tuple[int, int, int]] | None) -> None:
    (tmp_path / "classes.txt").write_text(text, encoding="utf-8")
    known = read_classes(tmp_path / "classes.txt")
    assert (known.names, known.colors) == (names, colors)
    for name in ("images/a.jpg", "masks/a.png"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).touch()
    for paths in ((tmp_path,), (tmp_path / "images", tmp_path / "masks")):
        assert find_layout(*paths).classes_file == tmp_path / "classes.txt"


def test_names_on_the_command_line_and_every_mistake_in_them(tmp_path: Path) -> None:
    assert read_classes("sky, water,reeds") == ClassList(["sky", "water", "reeds"])
    cases = {
        "sky,sky": "'sky' comes twice",
        "sky,": "at least two",
        "clases.txt": "'clases.txt' without a comma is taken for a file, and there is no such file",
        "cat": "at least two names with commas: background,cat",
    }
    for spec, message in cases.items():
        with pytest.raises(ValueError, match=message):
            read_classes(spec)
    broken = {"sky,1,2,3\nroad,4,5,6\nsea\n": "'sea' has no colour", "sky,1,2,3\nroad,4,5,256\n": "above 255", "": "0 classes"}
    for text, message in broken.items():
        (tmp_path / "classes.csv").write_text(text)
        with pytest.raises(ValueError, match=message):
            read_classes(tmp_path / "classes.csv")
    (tmp_path / "classes.csv").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="UTF-8"):
        read_classes(tmp_path / "classes.csv")


@pytest.mark.parametrize(
    ("text", "names", "values"),
    [
        ("1: cat\n2: dog\n", ["cat", "dog"], {1: 0, 2: 1}),
        ("2: dog\n0: ground\n1: cat\n", ["ground", "cat", "dog"], {0: 0, 1: 1, 2: 2}),
        ("Pixel Value, Class\n0, ground\n1, cat\n7, dog\n", ["ground", "cat", "dog"], {0: 0, 1: 1, 7: 2}),  # Roboflow
        ("__ignore__\n_background_\ncat\n", ["_background_", "cat"], {-1: 255, 255: 255, 0: 0, 1: 1}),  # LabelMe
        ("sky\nroad\nvoid\n", ["sky", "road"], {0: 0, 1: 1, 2: 255}),
        ("sky\nroad\n", ["sky", "road"], {}),
    ],
)
def test_numbers_and_marks_in_a_class_file_say_what_mask_values_mean(tmp_path: Path, text: str, names: list[str], values: dict) -> None:
    (tmp_path / "classes.txt").write_text(text)
    known = read_classes(tmp_path / "classes.txt")
    assert (known.names, dict(known.values)) == (names, values)


def test_void_among_colours_is_ignored(tmp_path: Path) -> None:
    (tmp_path / "classes.csv").write_text("name,r,g,b\nsky,1,2,3\nVoid,0,0,0\nroad,4,5,6\n")
    known = read_classes(tmp_path / "classes.csv")
    assert (known.names, known.colors, dict(known.values)) == (["sky", "road"], [(1, 2, 3), (4, 5, 6)], {0: 255})


@pytest.mark.parametrize(("text", "message"), [("0: sky\nroad\n", "'road' has no number"), ("1: sky\n1: road\n", "number comes twice")])
def test_half_numbered_class_files_are_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "classes.txt").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_classes(tmp_path / "classes.txt")


def test_classes_of_colour_masks_are_compared_by_colour_whatever_the_order_of_the_lines(tmp_path: Path) -> None:
    path, label_map = tmp_path / "classes.csv", LabelMap({0xFF0000: 0, 0x00FF00: 1}, rgb=True)
    path.write_text("sea,0,255,0\nsky,255,0,0\n")
    refuse_other_names(path, ["sky", "sea"], label_map, {})
    path.write_text("sea,255,0,0\nsky,0,255,0\n")
    with pytest.raises(ValueError, match=r"another order.*--label '#ff0000=1' --label '#00ff00=0'"):
        refuse_other_names(path, ["sky", "sea"], label_map, {})
    refuse_other_names(path, ["sky", "sea"], label_map, {0xFF0000: 1, 0x00FF00: 0})


def test_a_list_names_the_values_that_the_model_has_for_its_classes_in_their_order(tmp_path: Path) -> None:
    """Binary masks of 0 and 255: the second name stands for 255, as in training."""
    path, label_map = tmp_path / "classes.txt", LabelMap({0: 0, 255: 1})
    path.write_text("background\ncell\n")
    with pytest.raises(ValueError, match=r"'cell' is class 1 of the set, and 'nucleus' that of the bundle.*--label 255=ignore"):
        refuse_other_names(path, ["background", "nucleus"], label_map, {})
    refuse_other_names(path, ["background", "nucleus"], label_map, {255: 1})
