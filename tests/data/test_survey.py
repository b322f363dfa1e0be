"""A set is read in threads, and never more of it at once than fits."""

import threading
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from perpixel.data import survey as module
from perpixel.data.images import Picture, read_image
from perpixel.data.layouts import Pair
from perpixel.data.survey import Budget, survey


def pairs_in(folder: Path, count: int, side: int = 16) -> list[Pair]:
    rng = np.random.default_rng(0)
    for index in range(count):
        Image.fromarray(rng.integers(0, 256, (side, side, 3), dtype=np.uint8)).save(folder / f"{index}.png")
        Image.fromarray(np.eye(side, dtype=np.uint8)).save(folder / f"{index}_mask.png")
    return [Pair(Picture(folder / f"{i}.png"), Picture(folder / f"{i}_mask.png")) for i in range(count)]


@pytest.mark.parametrize(("room", "threads"), [(1, 1), (2, 2), (100, 4)])
def test_no_more_images_are_decoded_at_once_than_the_bytes_allow(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, room: int, threads: int
) -> None:
    """An image of 16x16x3 bytes and its mask count 2 * 16 * 16 * (3 + 4) bytes."""
    lock, reading, most = threading.Lock(), [], [0]

    def slowly(picture: Picture) -> np.ndarray:
        with lock:
            reading.append(picture)
            most[0] = max(most[0], len(reading))
        time.sleep(0.02)
        with lock:
            reading.remove(picture)
        return read_image(picture)

    monkeypatch.setattr(module, "read_image", slowly)
    monkeypatch.setattr(module, "BYTES_IN_FLIGHT", room * 2 * 16 * 16 * 7)
    monkeypatch.setattr(module.os, "cpu_count", lambda: 4)
    readings, faults, _ = survey(pairs_in(tmp_path, 12))
    assert (len(readings), faults) == (12, [])
    assert most[0] == threads


def test_what_is_larger_than_the_budget_is_let_in_alone_and_room_is_given_back_after_an_error() -> None:
    budget = Budget(10)
    with pytest.raises(ZeroDivisionError), budget.room(11):
        _ = 1 / 0
    with budget.room(11):
        late = threading.Thread(target=lambda: budget.room(1).__enter__(), daemon=True)
        late.start()
        late.join(0.05)
        assert late.is_alive()
    late.join(5)
    assert not late.is_alive()


def test_readings_that_hold_arrays_can_be_searched_for(tmp_path: Path) -> None:
    """Two of one pair hold equal arrays, which have no one truth value."""
    one, two = survey(pairs_in(tmp_path, 1) * 2)[0]
    assert two in [one, two]
    assert two not in [one]


def test_a_damaged_header_is_a_fault_that_names_the_file(tmp_path: Path) -> None:
    pairs = pairs_in(tmp_path, 2)
    pairs[0].image.path.write_bytes(b"")
    readings, faults, _ = survey(pairs)
    assert len(readings) == 1
    assert "0.png: is empty" in faults[0].message
