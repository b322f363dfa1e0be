"""Bad input on the command line, case by case of issue 2: the message names the file, the exit code says it, and nothing is lost."""

import os
import pickle
import resource
import shutil
import signal
import struct
import tempfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image
from safetensors.torch import load_file, save_file

SIZE = (24, 32)
COUNT = 12


def photograph(seed: int, size=SIZE) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)


def stripes(*values: int, size=SIZE) -> np.ndarray:
    return np.repeat(np.asarray(values, np.uint8), size[1] // len(values))[None].repeat(size[0], axis=0)


@pytest.fixture
def scenes(tmp_path) -> Path:
    """Twelve sound pairs of classes 0, 1, 2: images/00.png.., masks/00.png.."""
    for number in range(COUNT):
        for folder, pixels in (("images", photograph(number)), ("masks", stripes(0, 1, 1, 2))):
            (tmp_path / "set" / folder).mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(tmp_path / "set" / folder / f"{number:02d}.png")
    return tmp_path / "set"


@pytest.fixture
def train(command, scenes, tmp_path, tiny_settings):
    """`perpixel train` on the scenes for one step."""
    settings = [part for setting in (*tiny_settings, "model.options={width: 2}", "train.crop=[32, 32]") for part in ("--set", setting)]
    return lambda *more: command("train", scenes / "images", scenes / "masks", "-o", tmp_path / "run", "--steps", 1, *settings, *more)


@pytest.fixture
def check(command, scenes):
    return lambda *more: command("check", scenes / "images", scenes / "masks", *more)


@pytest.fixture
def evaluate(command, scenes, make_bundle):
    return lambda *more: command("evaluate", make_bundle(), scenes / "images", scenes / "masks", *more)


def cut(path: Path, content: bytes, share: float = 0.5) -> Path:
    path.write_bytes(content[: int(len(content) * share)])
    return path


def encoded(path: Path, pixels: np.ndarray, **options) -> bytes:
    """The bytes of a picture of the kind that the suffix says."""
    if path.suffix == ".tif":
        tifffile.imwrite(path, pixels, **options)
    else:
        Image.fromarray(pixels).save(path, **options)
    return path.read_bytes()


# ---- masks that do not belong


def test_a_mask_value_outside_the_classes_stops_check_and_train_and_is_left_out_by_evaluate(check, train, evaluate, scenes, tmp_path):
    (scenes / "classes.txt").write_text("sky\nsea\n")
    for number in range(COUNT):
        Image.fromarray(stripes(0, 1, 1, 77 if number in (3, 4) else 0)).save(scenes / "masks" / f"{number:02d}.png")
    for said in (check(), train()):
        assert said.code == 2
        text = said.out + said.err
        assert (
            "masks/03.png: value 77 in 2 files is not one of 2 classes. To make it class 1: --label 77=1; to ignore it: --label 77=ignore"
            in text
        )
    assert not (tmp_path / "run").exists()
    assert check("--label", "77=ignore").code == 0
    said = evaluate()
    assert said.code == 2
    assert "10 images" in said.out
    assert "masks/03.png: value 77" in said.out
    assert evaluate("--label", "77=ignore").code == 0


def test_one_pair_of_unequal_size_is_named_and_left_out(check, train, evaluate, scenes):
    Image.fromarray(stripes(0, 1, 2, 2, size=(20, 40))).save(scenes / "masks" / "07.png")
    sizes = ("images/07.png is 24x32 but", "masks/07.png is 20x40 pixels (height x width)")
    for said, code in ((check(), 0), (train(), 0), (evaluate(), 2)):
        assert said.code == code
        assert "07.png" in said.out
    for said in (check(), evaluate()):
        assert all(words in said.out for words in sizes)


def test_many_pairs_of_unequal_size_stop_check_and_train(check, train, scenes, tmp_path):
    for number in range(6):
        Image.fromarray(stripes(0, 1, 2, 2, size=(20, 40))).save(scenes / "masks" / f"{number:02d}.png")
    for said in (check(), train()):
        assert said.code == 2
        assert "6 of 12 masks have another size than their image" in said.out + said.err
        assert "images/00.png is 24x32" in said.out + said.err
    assert not (tmp_path / "run").exists()


def test_a_missing_mask_is_named_and_the_others_are_used(check, train, scenes):
    (scenes / "masks" / "05.png").unlink()
    for said in (check(), train()):
        assert said.code == 0
        assert "05.png" in said.out


def test_masks_that_are_all_missing_stop_check_and_train(command, scenes, tmp_path):
    for said in (command("check", scenes / "images"), command("train", scenes / "images", "-o", tmp_path / "run", "--steps", 1)):
        assert said.code == 2
        assert f"{scenes / 'images'}: images (12 .png), but no masks" in said.err
    assert not (tmp_path / "run").exists()


# ---- images that cannot be read


def damaged_jpeg(path):
    return cut(path.with_suffix(".jpg"), encoded(path.with_suffix(".jpg"), photograph(0, (64, 64))), 0.6)


def damaged_png(path):
    return cut(path, encoded(path, photograph(0)))


def damaged_tiff(path):
    return cut(path.with_suffix(".tif"), encoded(path.with_suffix(".tif"), photograph(0, (64, 64)), photometric="rgb", compression="zlib"))


def empty(path):
    path.write_bytes(b"")
    return path


def text(path):
    path.write_text("these are my notes\n" * 20)
    return path


def with_nan(path):
    pixels = np.full((*SIZE, 3), 0.5, np.float32)
    pixels[3, 4] = np.nan
    tifffile.imwrite(path.with_suffix(".tif"), pixels, photometric="rgb")
    return path.with_suffix(".tif")


def bomb(path):
    """A PNG that claims 60000x60000 pixels in a hundred bytes; decoding it would need gigabytes."""
    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(b"\0" * 1000)), (b"IEND", b""))
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n"
        + b"".join(struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body)) for kind, body in chunks)
    )
    return path


DAMAGE = {
    damaged_jpeg: "is damaged or cut off",
    damaged_png: "is damaged or cut off",
    damaged_tiff: "cut off",
    empty: "is empty (0 bytes)",
    text: "is not a picture perpixel can read",
    bomb: "guards against decompression bombs",
}


@pytest.mark.parametrize("harm", DAMAGE, ids=lambda harm: harm.__name__)
def test_a_picture_that_cannot_be_read_is_named_and_the_others_are_labelled(command, make_bundle, scenes, tmp_path, harm):
    (scenes / "images" / "04.png").unlink()
    broken = harm(scenes / "images" / "04.png")
    said = command("predict", make_bundle(), scenes / "images", "-o", tmp_path / "out", "--probabilities")
    assert said.code == 2
    assert "11 label images in" in said.out
    assert said.out.count("left out") == 1
    assert f"left out {broken}" in said.out
    assert DAMAGE[harm] in said.out
    assert sorted(path.stem for path in (tmp_path / "out").glob("*.png")) == [f"{n:02d}" for n in range(COUNT) if n != 4]


@pytest.mark.parametrize("harm", DAMAGE, ids=lambda harm: harm.__name__)
def test_an_image_or_mask_that_cannot_be_read_is_named_by_check_and_scored_without(check, evaluate, scenes, harm):
    for folder, number in (("images", "02"), ("masks", "09")):
        (scenes / folder / f"{number}.png").unlink()
    broken = [harm(scenes / "images" / "02.png"), harm(scenes / "masks" / "09.png")]
    looked, scored = check(), evaluate()
    assert (looked.code, scored.code) == (0, 2)
    assert "2 files can't be used" in looked.out
    assert "10 images" in scored.out
    for path in broken:
        assert str(path) in looked.out
        assert str(path) in scored.out
    assert DAMAGE[harm] in looked.out


def test_a_pixel_that_is_nan_spoils_a_file_for_check_and_only_itself_for_predict_and_evaluate(
    command, make_bundle, check, evaluate, scenes, tmp_path
):
    (scenes / "images" / "02.png").unlink()
    broken = with_nan(scenes / "images" / "02.png")
    looked, scored = check(), evaluate()
    assert "02.tif: 3 of 2304 values are NaN or infinite" in looked.out
    assert (scored.code, "12 images" in scored.out) == (0, True)
    assert command("predict", make_bundle(), broken, "-o", tmp_path / "out").code == 0
    assert np.argwhere(np.asarray(Image.open(tmp_path / "out" / "02.png")) == 255).tolist() == [[3, 4]]


def test_a_file_in_place_of_the_folder_for_labels_is_refused_by_name(command, make_bundle, scenes):
    said = command("predict", make_bundle(), scenes / "images" / "00.png", "-o", scenes / "images" / "01.png")
    assert (said.code, "01.png: is a file, and the labels need a folder; name another with -o" in said.err) == (2, True)


def test_what_is_left_of_a_tiff_that_was_cut_off_is_labelled_and_scored_and_check_and_strict_refuse_it(
    command, make_bundle, check, evaluate, scenes, tmp_path
):
    (scenes / "images" / "02.png").unlink()
    broken = scenes / "images" / "02.tif"
    cut(broken, encoded(broken, photograph(0), photometric="rgb", rowsperstrip=4), 0.75)
    with tifffile.TiffFile(broken) as tiff:
        rows = (broken.stat().st_size - tiff.pages[0].dataoffsets[0]) // (SIZE[1] * 3)  # rows lie one behind the other
    assert 0 < rows < SIZE[0]
    hole = f"02.tif: rows {rows} to {SIZE[0] - 1}, columns 0 to {SIZE[1] - 1} are damaged (the file is cut off after"
    looked, scored = check(), evaluate()
    assert "02.tif[0]: the file is cut off" in looked.out
    assert (scored.code, "12 images" in scored.out, hole in scored.out) == (2, True, True)
    said = command("predict", make_bundle(), broken, "-o", tmp_path / "out")
    assert (said.code, said.out.count("labelled as not known"), hole in said.out) == (2, 1, True)
    labels = np.asarray(Image.open(tmp_path / "out" / "02.png"))
    assert (labels[:rows] != 255).all()
    assert (labels[rows:] == 255).all()
    said = command("predict", make_bundle(), broken, "-o", tmp_path / "strict", "--strict")
    assert (said.code, hole in said.err) == (2, True)
    assert not (tmp_path / "strict" / "02.png").exists()


def test_training_goes_on_without_the_damaged_files_and_names_them(train, scenes):
    damaged_png(scenes / "images" / "02.png")
    empty(scenes / "masks" / "09.png")
    said = train()
    assert said.code == 0
    assert "2 files can't be used" in said.out
    assert all(name in said.out for name in ("02.png", "09.png"))


def test_where_every_file_is_damaged_check_and_train_stop_and_name_one(check, train, evaluate, scenes, tmp_path):
    for path in (scenes / "images").iterdir():
        empty(path)
    for said in (check(), train(), evaluate()):
        assert said.code == 2
        assert "images/00.png: is empty (0 bytes)" in said.out + said.err
    assert not (tmp_path / "run").exists()


# ---- images that are unusual, and fine


def cmyk(path):
    Image.fromarray(photograph(0)).convert("CMYK").save(path.with_suffix(".jpg"))
    return path.with_suffix(".jpg")


def sixteen_bit(path):
    Image.fromarray(np.random.default_rng(0).integers(0, 65536, SIZE).astype(np.uint16)).save(path)
    return path


def one_bit(path):
    Image.fromarray(photograph(0)[..., 0] > 127).save(path)
    return path


def alpha(path):
    Image.fromarray(np.dstack([photograph(0), photograph(1)[..., 0]])).save(path)
    return path


def animated(path):
    frames = [Image.fromarray(photograph(n)) for n in range(3)]
    frames[0].save(path.with_suffix(".gif"), save_all=True, append_images=frames[1:])
    return path.with_suffix(".gif")


@pytest.mark.parametrize("kind", [cmyk, sixteen_bit, one_bit, alpha, animated], ids=lambda kind: kind.__name__)
def test_an_unusual_picture_is_checked_trained_on_and_labelled_like_any_other(command, check, train, make_bundle, scenes, tmp_path, kind):
    (scenes / "images" / "00.png").unlink()
    path = kind(scenes / "images" / "00.png")
    for said in (check(), train()):
        assert said.code == 0
        assert "can't be used" not in said.out
        assert kind is not animated or f"{path}: holds an animation; only its first picture is used" in said.out
    said = command("predict", make_bundle(), path, "-o", tmp_path / "out")
    assert said.code == 0
    assert Image.open(tmp_path / "out" / "00.png").size == SIZE[::-1]
    assert kind is not animated or f"warning: {path}: holds an animation; only its first picture is used" in said.err


# ---- folders


def test_a_folder_without_images_is_named_by_every_command(command, make_bundle, scenes, tmp_path):
    folder = tmp_path / "nothing"
    folder.mkdir()
    (folder / "notes.txt").write_text("nothing here")
    for arguments in (
        ("check", folder),
        ("check", folder, scenes / "masks"),
        ("check", scenes / "images", folder),
        ("train", folder, "-o", tmp_path / "run", "--steps", 1),
        ("evaluate", make_bundle(), folder),
        ("predict", make_bundle(), folder, "-o", tmp_path / "out"),
        ("predict", make_bundle(), f"{folder}/*.png", "-o", tmp_path / "out"),
    ):
        said = command(*arguments)
        assert said.code == 2
        assert said.err.startswith(f"error: {folder}")
    assert not (tmp_path / "run").exists()
    assert not (tmp_path / "out").exists()


@contextmanager
def as_nobody() -> Iterator[None]:
    """Root may read everything, so a root process steps down for a while."""
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)


def test_an_unreadable_folder_is_named_by_every_command(command, run):
    place = Path(tempfile.mkdtemp(dir="/tmp"))  # not below pytest's own folders, which nobody else may enter
    place.chmod(0o755)
    folder, bundle = place / "forbidden", place / "model.safetensors"
    shutil.copyfile(run / "best.safetensors", bundle)
    folder.mkdir()
    Image.new("RGB", (4, 4)).save(folder / "a.png")
    commands = (
        ("check", folder),
        ("check", folder, folder),
        ("train", folder, "-o", place / "run", "--steps", 1),
        ("evaluate", bundle, folder),
        ("predict", bundle, folder, "-o", place / "out"),
    )
    for arguments in commands:  # now, because nobody may import what only root may read
        command(*arguments)
    shutil.rmtree(place / "out")
    folder.chmod(0)
    try:
        for arguments in commands:
            with as_nobody():
                said = command(*arguments)
            assert said.code == 2
            assert said.err.startswith("error: ")
            assert str(folder) in said.err
            assert "Permission denied" in said.err
    finally:
        folder.chmod(0o755)
        shutil.rmtree(place)


# ---- a disk that fills up


@pytest.fixture
def disk():
    """`disk(bytes)`: from now on no file may grow beyond that, as on a disk that is full; lifted at the end of the test."""
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    yield lambda limit: resource.setrlimit(resource.RLIMIT_FSIZE, (old[0] if limit is None else limit, old[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, old)
    signal.signal(signal.SIGXFSZ, handler)


def test_a_disk_that_fills_up_while_predicting_loses_nothing_already_written(command, make_bundle, tmp_path, disk):
    (tmp_path / "in").mkdir()
    for name, size in (("a", (8, 8)), ("b", (200, 200)), ("c", (8, 8))):
        Image.fromarray(photograph(0, size)).save(tmp_path / "in" / f"{name}.png")
    call = ("predict", make_bundle(), tmp_path / "in", "-o", tmp_path / "out", "--probabilities")
    disk(40_000)  # the probabilities of b take 240 kB
    said = command(*call)
    disk(None)
    assert said.code == 2
    assert f"disk is full while writing {tmp_path}/out/probabilities/b.npy" in said.err
    assert "nothing already written is lost" in said.err
    assert Image.open(tmp_path / "out" / "a.png").size == (8, 8)
    assert np.load(tmp_path / "out" / "probabilities" / "a.npy").shape == (3, 8, 8)
    files = {path.name for path in (tmp_path / "out").rglob("*") if path.is_file() and path.suffix != ".done"}
    assert files == {"a.png", "a.npy", "b.png"}, "no half file; beside them only the note of what is done"
    assert command(*call).code == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["a.png", "b.png", "c.png", "probabilities"]
    assert command(*call).code == 0
    assert np.load(tmp_path / "out" / "probabilities" / "b.npy").shape == (3, 200, 200)


def test_a_disk_that_fills_up_while_training_leaves_the_last_weights_whole_and_the_run_goes_on_later(train, tmp_path, disk, monkeypatch):
    from perpixel.train import Run

    run, save, kept = tmp_path / "run", Run.save, dict[Path, bytes]()

    def save_then_fill(self: Run) -> None:
        save(self)
        kept.update({path: path.read_bytes() for path in run.glob("*.safetensors")})
        disk(20_000)  # a checkpoint takes more than ten times that

    with monkeypatch.context() as during:
        during.setattr(Run, "save", save_then_fill)
        said = train("--steps", 4)
    disk(None)
    assert said.code == 2
    assert f"disk is full while writing {run}/" in said.err
    assert {path.name for path in kept} == {"best.safetensors", "last.safetensors", "resume.safetensors"}
    assert {path: path.read_bytes() for path in run.glob("*.safetensors")} == kept
    assert not list(run.glob(".*"))
    assert train("--steps", 4, "--resume").code == 0


# ---- bundles and recipes


class Planted:
    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


def no_bundle(path):
    path.write_text("not a bundle at all\n" * 10)
    return "not a bundle"


def truncated(path):
    cut(path, path.read_bytes())
    return "not a bundle: it is damaged or cut short"


def newer(path):
    from perpixel.bundle import FORMAT, read_tensors

    card = read_tensors(path)[1]["perpixel"].replace(f'"format":{FORMAT}', f'"format":{FORMAT + 1}').replace("0.1.0", "7.0.0")
    save_file(load_file(path), path, {"perpixel": card})
    return "made by perpixel 7.0.0 (bundle format 2); this one reads up to format 1. Update perpixel"


def pickled(path):
    path.write_bytes(pickle.dumps(Planted(path.parent / "executed")))
    return "it looks like a pickle, which perpixel never executes"


def of_others(path):
    save_file(load_file(path), path, {"format": "pt"})
    return "not a bundle: safetensors without perpixel's metadata"


@pytest.mark.parametrize("harm", [no_bundle, truncated, newer, pickled, of_others], ids=lambda harm: harm.__name__)
def test_a_file_that_is_no_bundle_of_ours_is_refused_before_anything_is_read_or_written(command, make_bundle, scenes, tmp_path, harm):
    path = make_bundle()
    message = harm(path)
    for arguments in (
        ("predict", path, scenes / "images", "-o", tmp_path / "out"),
        ("evaluate", path, scenes / "images", scenes / "masks"),
        ("evaluate", path, scenes / "images", scenes / "masks", "--json"),
    ):
        said = command(*arguments)
        assert (said.code, said.out.strip()) == (2, "")
        assert said.err.startswith(f"error: {path}: ")
        assert message in said.err
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ("model:\n  encodr: resnet34\n", "my.yaml: model.encodr: unknown key; did you mean 'encoder'?"),
        ("trian:\n  steps: 3\n", "my.yaml: trian: unknown key; did you mean 'train'?"),
        ("train:\n  lr: fast\n", "my.yaml: train.lr is 'fast'; legal is a number"),
        ("train: [", "my.yaml: not valid YAML"),
    ],
)
def test_a_misspelt_recipe_is_refused_by_file_and_key(train, tmp_path, recipe, message):
    (tmp_path / "my.yaml").write_text(recipe)
    said = train("--recipe", tmp_path / "my.yaml")
    assert said.code == 2
    assert message in said.err
    assert not (tmp_path / "run").exists()


def test_a_misspelt_setting_is_refused_by_key(train, tmp_path):
    said = train("--set", "train.bach=3")
    assert said.code == 2
    assert "--set: train.bach: unknown key; did you mean 'batch'?" in said.err
    assert not (tmp_path / "run").exists()
