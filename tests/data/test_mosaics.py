"""The plan and the journal of an output in parts, and names that are no UTF-8."""

import os

import pytest

from perpixel.data.mosaics import Journal, agreed


def test_the_plan_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    """Else a power cut may leave the name without the content."""
    synced, sync = [], os.fsync
    monkeypatch.setattr(os, "fsync", lambda number: (synced.append((tmp_path / "parts" / "plan.json").exists()), sync(number)))
    assert agreed(tmp_path / "parts", {"tile": 64}) == {"tile": 64}
    assert synced == [False]
    assert agreed(tmp_path / "parts", {"tile": 32}) == {"tile": 64}


@pytest.mark.parametrize("content", [b"", b"\0" * 40, b"\xff\xfe"])
def test_a_damaged_plan_is_made_anew_without_the_parts_that_were_cut_by_it(tmp_path, content):
    (tmp_path / "parts").mkdir()
    (tmp_path / "parts" / "plan.json").write_bytes(content)
    (tmp_path / "parts" / "0000000_0000000.labels").write_bytes(b"cut otherwise")
    assert agreed(tmp_path / "parts", {"tile": 32}) == {"tile": 32}
    assert [path.name for path in (tmp_path / "parts").iterdir()] == ["plan.json"]


def test_the_journal_knows_pictures_whose_names_are_no_utf_8(tmp_path):
    names = [os.fsdecode(b"caf\xe9"), os.fsdecode(b"caf\xe8")]
    journal = Journal(tmp_path, "settings")
    journal.settle(names[0], ["a hole"])
    again = Journal(tmp_path, "settings")
    assert again.settled(names[0])
    assert again.holes(names[0]) == ["a hole"]
    assert not again.settled(names[1])
