"""Files are complete or not there."""

import errno
import os
import resource
import signal
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from perpixel.data import writing
from perpixel.data.display import default_colors
from perpixel.data.writing import replacing, write_labels, write_rgb

LABELS = np.random.default_rng(0).integers(0, 5, (9, 11), dtype=np.uint8)


def test_labels_come_back_as_they_were_with_the_classes_palette(tmp_path):
    labels = LABELS.copy()
    labels[0, 0] = 255
    colors = [(10 * i, 20, 30) for i in range(5)]
    write_labels(tmp_path / "new" / "a.png", labels, colors)
    with Image.open(tmp_path / "new" / "a.png") as image:
        assert image.mode == "P"
        np.testing.assert_array_equal(np.asarray(image), labels)
        painted = np.asarray(image.convert("RGB"))
    np.testing.assert_array_equal(painted[labels < 255], np.array(colors)[labels[labels < 255]])
    assert tuple(painted[0, 0]) == default_colors(256)[255] == (224, 224, 192)


def test_labels_of_many_classes_are_written_with_16_bits(tmp_path):
    labels = LABELS.astype(np.uint16) * 13000 + 1
    write_labels(tmp_path / "a.png", labels, default_colors(300))
    with Image.open(tmp_path / "a.png") as image:
        assert image.mode.startswith("I;16")
        np.testing.assert_array_equal(np.asarray(image), labels)


@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (5, 1)])
def test_the_smallest_pictures_can_be_written(tmp_path, shape):
    write_labels(tmp_path / "a.png", np.full(shape, 255, np.uint8), [])
    write_rgb(tmp_path / "b.png", np.zeros((*shape, 3), np.uint8))
    assert Image.open(tmp_path / "a.png").size == Image.open(tmp_path / "b.png").size == shape[::-1]


def test_what_cannot_be_written_is_refused_by_name(tmp_path):
    with pytest.raises(ValueError, match=r"a\.png: labels hold class 4, but there are 3 colours"):
        write_labels(tmp_path / "a.png", LABELS, default_colors(3))
    with pytest.raises(ValueError, match=r"a\.png: labels have shape \(9, 11\) and type int64"):
        write_labels(tmp_path / "a.png", LABELS.astype(np.int64), default_colors(5))
    with pytest.raises(ValueError, match=r"a\.png: pixels have shape \(9, 11\)"):
        write_rgb(tmp_path / "a.png", LABELS)
    with pytest.raises(ValueError, match=r"a\.xyz: the suffix '\.xyz' names no picture format"):
        write_rgb(tmp_path / "a.xyz", np.zeros((2, 2, 3), np.uint8))
    assert list(tmp_path.iterdir()) == []


def test_a_file_appears_only_when_it_is_complete(tmp_path):
    path = tmp_path / "out.txt"
    path.write_text("old")
    with replacing(path) as temporary:
        assert temporary.parent == path.parent
        assert temporary.suffix == ".txt"
        temporary.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


def failing(path):
    with replacing(path) as temporary:
        temporary.write_text("half")
        raise KeyboardInterrupt


def test_an_interrupted_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "out.txt"
    path.write_text("old")
    with pytest.raises(KeyboardInterrupt):
        failing(path)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_what_a_killed_process_left_is_taken_over_by_the_next_that_writes_the_file(tmp_path):
    path = tmp_path / "out.txt"
    code = "import os, sys; from pathlib import Path; from perpixel.data.writing import replacing\nwith replacing(Path(sys.argv[1])) as t: "
    code += "t.write_text('half and more'); os.kill(os.getpid(), 9)"
    for _ in range(2):
        assert subprocess.run([sys.executable, "-c", code, str(path)]).returncode == -signal.SIGKILL
    assert len(list(tmp_path.iterdir())) == 1
    with replacing(path) as temporary:
        temporary.write_text("new")
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


def test_two_at_once_do_not_write_to_the_same_file(tmp_path):
    path = tmp_path / "out.txt"
    with replacing(path) as one:
        one.write_text("one")
        with replacing(path) as two:
            assert one != two
            two.write_text("two")
        assert path.read_text() == "two"
    assert path.read_text() == "one"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_disk_that_fills_up_is_named_and_loses_nothing(tmp_path, monkeypatch, number):
    path = tmp_path / "out.png"
    write_labels(path, LABELS, default_colors(5))
    before = path.read_bytes()

    def full(_file):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(writing.os, "fsync", full)
    with pytest.raises(OSError, match=r"disk is full while writing .*out\.png \(\d+ MB free.*nothing already written is lost") as caught:
        write_labels(path, LABELS * 0, default_colors(5))
    assert caught.value.errno == number
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_a_real_limit_of_the_system_is_told_the_same_way(tmp_path):
    """RLIMIT_FSIZE makes the write itself fail, halfway."""
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    noise = np.random.default_rng(1).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, old[1]))
    try:
        with pytest.raises(OSError, match=r"disk is full while writing .*big\.png"):
            write_rgb(tmp_path / "big.png", noise)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
        signal.signal(signal.SIGXFSZ, handler)
    assert list(tmp_path.iterdir()) == []


def failing_with(path, error):
    with replacing(path):
        raise error


def test_a_full_disk_is_recognised_behind_a_librarys_own_error(tmp_path):
    with pytest.raises(OSError, match="disk is full while writing"):
        failing_with(tmp_path / "a.safetensors", RuntimeError("Error while serializing: No space left on device (os error 28)"))


def test_other_errors_pass_through_unchanged(tmp_path):
    with pytest.raises(ZeroDivisionError):
        failing_with(tmp_path / "a", ZeroDivisionError())
    with pytest.raises(IsADirectoryError):
        failing_with(tmp_path / "a", IsADirectoryError(errno.EISDIR, "Is a directory"))
