"""Bundles: what is saved comes back exactly, what is no bundle is refused by name and never executed, a failed save loses nothing."""

import errno
import io
import json
import os
import pickle
import re
import resource
import signal
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from perpixel import bundle as bundle_module
from perpixel.bundle import FORMAT, load_bundle, read_tensors, save_bundle, save_tensors
from perpixel.models import build
from perpixel.predict import load

WEIGHTS = {"a": torch.arange(60_000, dtype=torch.float32)}  # 240 kB


class Planted:
    """Unpickling it makes a file."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


def card_of(path):
    return json.loads(read_tensors(path)[1]["perpixel"])


def rewrite(path, changes=None, *, metadata=None, tensors=None):
    """The bundle again with another card (changed keys, or a whole other text) or other tensors."""
    text = json.dumps({**card_of(path), **(changes or {})}) if metadata is None else metadata
    save_file(load_file(path) if tensors is None else tensors, path, {"perpixel": text})


@pytest.mark.parametrize("model", ["unet", "unet_paper"])
def test_weights_card_and_logits_come_back_exactly(make_bundle, tmp_path, model):
    first = load_bundle(make_bundle(model=model, bands=2, dtype="uint16", classes=4))
    with torch.no_grad():
        for tensor in first.model.state_dict().values():
            tensor.copy_(torch.randn_like(tensor).abs() if tensor.is_floating_point() else tensor + 3)
    save_bundle(tmp_path / "again.safetensors", first.model.state_dict(), first.card)
    again = load_bundle(tmp_path / "again.safetensors")
    assert again.card == first.card
    assert not again.model.training
    before, after = first.model.state_dict(), again.model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) and before[name].dtype == after[name].dtype for name in before)
    side = again.model.geometry.fit(32)
    image = torch.randn(1, 2, side, side)
    with torch.inference_mode():
        assert torch.equal(first.model(image), again.model(image))


def test_what_a_run_writes_is_a_bundle_of_the_model_and_data_it_was_trained_on(run):
    bundle = load_bundle(run / "best.safetensors")
    assert bundle.card.classes == ["sky", "water", "reeds", "bird", "fish"]
    assert bundle.label_map.values == {k: k for k in range(5)}
    image = torch.randint(0, 256, (3, 64, 64), dtype=torch.uint8)
    mean, std = torch.tensor(bundle.card.mean)[:, None, None], torch.tensor(bundle.card.std)[:, None, None]
    torch.testing.assert_close(bundle.normalize(image), (image / 255 - mean) / std)


def test_classes_get_other_names_as_the_docs_say_and_the_labels_stay(make_bundle, tmp_path):
    path = make_bundle(classes=2)
    page = (Path(__file__).parent.parent / "docs" / "api.md").read_text("utf-8")
    snippet = next(code for code in re.findall(r"```python\n(.+?)```", page, re.S) if "save_bundle(" in code)
    renamed = tmp_path / "renamed.safetensors"
    exec(snippet.replace("run/best.safetensors", str(path)).replace("run/renamed.safetensors", str(renamed)), {})
    before, after = load(path), load(renamed)
    assert after.classes == ["membrane", "cell"]
    image = np.random.default_rng(0).integers(0, 256, (40, 50, 3), np.uint8)
    assert np.array_equal(before.predict(image), after.predict(image))


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"classes": ["one"]}, "colors: .*2 for 1 classes"),
        ({"tile": 0}, "tile: "),
        ({"classes": "sky"}, "classes: "),
        ({"mean": 3}, "mean: "),
    ],
)
def test_a_card_changed_in_python_into_nonsense_is_refused_and_the_file_stays(make_bundle, changes, told):
    path = make_bundle(classes=2)
    bundle, content = load_bundle(path), path.read_bytes()
    for name, value in changes.items():
        setattr(bundle.card, name, value)
    with pytest.raises(ValueError, match=told):
        save_bundle(path, bundle.model.state_dict(), bundle.card)
    assert path.read_bytes() == content


@pytest.mark.parametrize("length", [640, 896, 1152, 1408])
def test_a_bundle_whose_first_bytes_are_those_of_a_pickle_is_read(tmp_path, length):
    """Safetensors begin with the length of the header, pickles with 0x80 and their version."""
    path = tmp_path / "model.safetensors"
    for padding in range(length):
        save_tensors(path, {"a": torch.ones(3)}, {"padding": "x" * padding})
        if int.from_bytes(path.read_bytes()[:8], "little") >= length:
            break
    assert path.read_bytes()[:2] == bytes([0x80, length >> 8])
    assert torch.equal(read_tensors(path)[0]["a"], torch.ones(3))


@pytest.mark.parametrize("share", [1e-5, 1e-4, 0.01, 0.5, 0.999])
def test_a_bundle_cut_off_anywhere_is_refused_by_name(make_bundle, share):
    path = make_bundle()
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(ValueError, match=r"model\.safetensors: not a bundle: it is damaged or cut short"):
        load_bundle(path)


def test_a_bundle_with_one_changed_byte_is_refused_by_name(make_bundle):
    path = make_bundle()
    content = bytearray(path.read_bytes())
    content[-100] ^= 1  # among the weights, which stand last
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"{path.name}: the weights are damaged"):
        load_bundle(path)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"", "the file is empty"),
        (b"<!DOCTYPE html><html>not found</html>", "it holds a web page"),
        (b"\xff\xd8\xff\xe0\0\x10JFIF\0\1\1", "no file of weights"),
    ],
)
def test_a_file_that_holds_no_weights_is_told_from_a_damaged_bundle(tmp_path, content, told):
    path = tmp_path / "best.safetensors"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"best\.safetensors: not a bundle: {told}.*RUN/best\.safetensors"):
        load_bundle(path)


@pytest.mark.parametrize("content", [b"", b"hello\n" * 40, b"\xff" * 500, b"{}", b"\x02\0\0\0\0\0\0\0{}"])
def test_a_file_of_another_kind_is_refused_by_name(tmp_path, content):
    path = tmp_path / "notes.txt"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"notes\.txt: not a bundle"):
        load_bundle(path)


def test_a_picture_a_folder_and_a_missing_file_are_refused_by_name(tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    with pytest.raises(ValueError, match=r"a\.png: not a bundle"):
        load_bundle(tmp_path / "a.png")
    with pytest.raises(ValueError, match=r"there\.safetensors: no such file.*RUN/best\.safetensors"):
        load_bundle(tmp_path / "not" / "there.safetensors")
    with pytest.raises(ValueError, match=r": a folder\. .*RUN/best\.safetensors"):
        load_bundle(tmp_path)


@pytest.mark.parametrize("kind", ["torch.save", "torch.save legacy", *range(pickle.HIGHEST_PROTOCOL + 1)])
def test_a_pickle_is_refused_and_not_executed(tmp_path, kind):
    """The same bytes do make the file when they are unpickled: the trap works, and load_bundle does not step into it."""
    path, trap = tmp_path / "model.safetensors", tmp_path / "executed"
    content = {"weights": Planted(trap), "more": [0.0] * 200}
    if isinstance(kind, int):
        path.write_bytes(pickle.dumps(content, protocol=kind))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=kind == "torch.save")
    with pytest.raises(ValueError, match=r"model\.safetensors: not a bundle") as caught:
        load_bundle(path)
    assert not trap.exists()
    assert kind in (0, 1) or "looks like a pickle, which perpixel never executes" in str(caught.value)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.load(io.BytesIO(path.read_bytes()), weights_only=False) if isinstance(kind, str) else pickle.loads(path.read_bytes())
    assert trap.exists()


def test_a_bundle_of_a_newer_format_says_who_made_it_and_to_update(make_bundle):
    path = make_bundle()
    rewrite(path, {"format": FORMAT + 1, "perpixel": "9.3.0", "bands": "as many as there are"})
    with pytest.raises(ValueError, match=r"model\.safetensors: made by perpixel 9\.3\.0 \(bundle format 2\).*format 1\. Update perpixel"):
        load_bundle(path)


def test_a_newer_perpixel_of_the_same_format_may_say_more(make_bundle):
    path = make_bundle()
    before = load_bundle(path).card
    rewrite(path, {"perpixel": "0.9.0", "owner": "somebody"})
    assert load_bundle(path).card == before.model_copy(update={"perpixel": "0.9.0"})


def test_safetensors_without_our_metadata_are_refused_by_name(tmp_path):
    save_file(WEIGHTS, tmp_path / "other.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"other\.safetensors: not a bundle: safetensors without perpixel's metadata"):
        load_bundle(tmp_path / "other.safetensors")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "unett"}, "unknown model 'unett'. Did you mean 'unet'"),
        ({"options": {"depth": 3}}, "depth"),
        ({"encoder": "resnet_of_next_year"}, "resnet_of_next_year"),
        ({"dtype": "complex64"}, "damaged: dtype"),
        ({"bands": "many"}, "damaged: bands"),
        ({"std": [0.0, 1.0, 1.0]}, "std"),
        ({"mean": [0.0]}, "1 means and 3 standard deviations"),
        ({"label_map": {}}, "label map"),
        ({"format": "new"}, "damaged"),
        ({"tile": 0}, "damaged: tile"),
        ({"colors": [(0, 0, 0), (300, 0, 0), (0, 0, 0)]}, "damaged: colors.1.0"),
        ({"colors": [(0, 0, 0)]}, "damaged: colors: Value error, 1 for 3 classes"),
    ],
)
def test_a_card_that_makes_no_sense_is_refused_by_name(make_bundle, changes, message):
    path = make_bundle()
    rewrite(path, changes)
    with pytest.raises(ValueError, match=r"model\.safetensors: ") as caught:
        load_bundle(path)
    assert message in str(caught.value)


@pytest.mark.parametrize("weights", [True, "/etc/hostname"])
def test_a_bundle_that_asks_for_other_weights_is_refused_before_anything_is_fetched_or_opened(make_bundle, monkeypatch, weights):
    path = make_bundle()
    rewrite(path, {"encoder": "resnet18", "options": {"encoder_weights": weights}})
    monkeypatch.setattr(bundle_module, "build", lambda *_, **__: pytest.fail("built"))
    with pytest.raises(ValueError, match=r"model\.safetensors: .*options\.encoder_weights: a bundle holds its weights itself"):
        load_bundle(path)


def test_a_model_that_torch_cannot_make_is_refused_by_name(make_bundle):
    path = make_bundle()
    rewrite(path, {"options": {"width": 2**40}})
    with pytest.raises(ValueError, match=r"model\.safetensors: the model or data that the bundle describes can't be made"):
        load_bundle(path)


@pytest.mark.parametrize("text", ["", "{", "[1, 2]", "null", "{}"])
def test_metadata_that_is_no_card_is_refused_by_name(make_bundle, text):
    path = make_bundle()
    rewrite(path, metadata=text)
    with pytest.raises(ValueError, match=r"model\.safetensors: the bundle's metadata is damaged"):
        load_bundle(path)


@pytest.mark.parametrize("wrong", ["another width", "one missing", "one too many"])
def test_weights_of_another_model_are_refused_by_name(make_bundle, wrong):
    path = make_bundle()
    tensors = load_file(path)
    if wrong == "another width":
        tensors = build("unet", 3, encoder="plain", in_channels=3, width=3).state_dict()
    elif wrong == "one missing":
        tensors.popitem()
    else:
        tensors["more"] = torch.zeros(1)
    rewrite(path, tensors=tensors)
    with pytest.raises(ValueError, match=r"model\.safetensors: the weights do not belong to the model 'unet'") as caught:
        load_bundle(path)
    assert "\n" not in str(caught.value)


def test_views_and_tied_tensors_are_saved_as_what_they_show(tmp_path):
    whole = torch.arange(24.0).reshape(4, 6)
    save_tensors(tmp_path / "a.safetensors", {"part": whole[:, ::2], "turned": whole.T, "tied": whole, "again": whole}, {})
    read = read_tensors(tmp_path / "a.safetensors")[0]
    assert torch.equal(read["part"], whole[:, ::2])
    assert torch.equal(read["turned"], whole.T)
    assert torch.equal(read["tied"], read["again"])


def test_saving_on_a_link_replaces_what_it_leads_to_and_keeps_link_and_mode(make_bundle, tmp_path):
    bundle, shelf = load_bundle(make_bundle()), tmp_path / "shelf"
    shelf.mkdir()
    (shelf / "net.safetensors").write_bytes(b"old")
    (shelf / "net.safetensors").chmod(0o640)
    link = tmp_path / "link.safetensors"
    link.symlink_to(shelf / "net.safetensors")
    save_bundle(link, bundle.model.state_dict(), bundle.card)
    assert link.is_symlink()
    assert load_bundle(shelf / "net.safetensors").card == bundle.card
    assert (shelf / "net.safetensors").stat().st_mode & 0o777 == 0o640


# ---- a save that does not come to its end


@pytest.fixture
def old(tmp_path) -> Path:
    path = tmp_path / "best.safetensors"
    save_tensors(path, {"a": torch.ones(3)}, {"which": "old"})
    return path


def half_written(tensors, path, metadata):
    Path(path).write_bytes(b"\0" * 1000)


def test_a_full_disk_while_saving_leaves_the_old_bundle_whole_and_nothing_else(old, monkeypatch):
    before = old.read_bytes()

    def full(*arguments):
        half_written(*arguments)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(bundle_module, "save_file", full)
    with pytest.raises(OSError, match=r"disk is full while writing .*best\.safetensors.*nothing already written is lost") as caught:
        save_tensors(old, WEIGHTS, {})
    assert caught.value.errno == errno.ENOSPC
    assert old.read_bytes() == before
    assert list(old.parent.iterdir()) == [old]


def test_a_limit_met_within_the_library_that_writes_is_told_the_same_way(old):
    """RLIMIT_FSIZE stops the library's own write halfway; its error is no OSError."""
    before, limit = old.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limit[1]))
    try:
        with pytest.raises(OSError, match=r"disk is full while writing .*best\.safetensors"):
            save_tensors(old, WEIGHTS, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, handler)
    assert old.read_bytes() == before
    assert list(old.parent.iterdir()) == [old]


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize("moment", ["while it writes", "before it renames"])
def test_killed_while_saving_the_old_bundle_stays_whole(old, monkeypatch, moment):
    before = old.read_bytes()

    def die(*arguments):
        if moment == "while it writes":
            half_written(*arguments)
        os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(*((bundle_module, "save_file", die) if moment == "while it writes" else (os, "replace", die)))
    child = os.fork()
    if child == 0:
        signal.alarm(20)  # torch's threads did not come along: a few numbers need none of them, and nothing may wait for one
        try:
            save_tensors(old, {"a": torch.zeros(3)}, {})
        finally:
            os._exit(1)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    assert old.read_bytes() == before
    assert read_tensors(old)[1] == {"which": "old"}
