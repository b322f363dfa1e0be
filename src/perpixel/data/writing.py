"""Files that are either complete or not there: a temporary name, fsync, rename."""

import contextlib
import errno
import io
import os
import secrets
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import tifffile
from PIL import Image
from PIL.PngImagePlugin import PngInfo

try:
    import fcntl
except ImportError:  # Windows: what a killed process leaves is not found again
    fcntl = None  # type: ignore[assignment]

PREDICTED = ("Description", "labels predicted by perpixel")  # a text in label images, which tells them from masks drawn by hand
VOID_COLOR = (224, 224, 192)  # index 255 of the Pascal VOC colour map: "void"
_UMASK = os.umask(0)
os.umask(_UMASK)
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary file name that becomes `path` when the block ends well.

    The temporary file lies in the same folder (which is made if missing), hidden, with the same suffix. When the block ends it
    is flushed to the disk and renamed onto `path`, with the mode of an older file there; whatever goes wrong before that, it is removed and
    the older file stays. What a killed process has left is taken over by the next that writes the same file.

    Raises:
        OSError: when the disk (or a quota, or a file size limit) is full, with a message that says so; the block's own
            exceptions pass through.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary, lock = _temporary(path)
    try:
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        os.chmod(temporary, _mode(path))  # some libraries write files that only their owner may read
        os.replace(temporary, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        if isinstance(error, Exception) and _is_full(error):
            free = shutil.disk_usage(path.parent).free / 2**20
            number = error.errno if isinstance(error, OSError) and error.errno else errno.ENOSPC
            message = f"disk is full while writing {path} ({free:.0f} MB free, or a quota or file size limit is reached)"
            raise OSError(number, f"{message}; nothing already written is lost. Make room and run the command again") from error
        raise
    finally:
        if lock is not None:
            os.close(lock)


@contextmanager
def replacing_folder(path: Path) -> Iterator[Path]:
    """As `replacing`, for an output that is a folder: a new, empty one, which becomes `path` when the block ends well.

    An older folder is renamed out of the way first and deleted last, so that something whole is always there but between two renames. One
    that came while the block ran is the work of another process at the same output, and stays.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    before = _identity(path)
    temporary, lock = _temporary_folder(path)
    old = temporary.with_name(temporary.name + ".old")
    shutil.rmtree(old, ignore_errors=True)  # what a process that was killed between two renames has left
    try:
        yield temporary
        while _identity(path) in (before, None):
            with contextlib.suppress(FileNotFoundError):
                os.rename(path, old)
            try:
                os.rename(temporary, path)
                break
            except OSError:
                if _identity(path) is None:  # else another process was quicker
                    raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)
        if lock is not None:
            os.close(lock)


def _mode(path: Path) -> int:
    """Who may read and write it: as before, and where it is new, as the umask has it."""
    try:
        return path.stat().st_mode & 0o777
    except OSError:
        return 0o666 & ~_UMASK


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        found = path.stat()
    except FileNotFoundError:
        return None
    return found.st_dev, found.st_ino


def _hidden(path: Path) -> str:
    """The begin of a temporary name: file systems allow 255 bytes, of which a character may take four."""
    return "." + path.stem.encode("utf-8", "ignore")[:100].decode("utf-8", "ignore")


def _temporary_folder(path: Path) -> tuple[Path, int | None]:
    """As `_temporary`; a folder that nobody has locked is what a killed process has left."""
    own = path.with_name(f"{_hidden(path)}.part{path.suffix}")
    lock: int | None = None
    with contextlib.suppress(AttributeError, OSError):
        own.mkdir(exist_ok=True)
        lock = os.open(own, os.O_RDONLY)
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.samestat(os.fstat(lock), os.stat(own)):
            for left in own.iterdir():
                shutil.rmtree(left) if left.is_dir() else left.unlink()
            return own, lock
    if lock is not None:
        os.close(lock)
    other = path.with_name(f"{_hidden(path)}.{secrets.token_hex(6)}.part{path.suffix}")
    other.mkdir()
    return other, None


def _temporary(path: Path) -> tuple[Path, int | None]:
    """A file name nobody else writes to, and what holds the lock on it.

    The name is always the same, so that no killed process leaves more than one file behind, and the system frees its lock; who finds it
    locked takes a name of its own.
    """
    own = path.with_name(f"{_hidden(path)}.part{path.suffix}")
    lock: int | None = None
    with contextlib.suppress(AttributeError, OSError):  # no fcntl; locked, renamed, not writable, or a file system without locks
        lock = os.open(own, os.O_RDWR | os.O_CREAT, 0o666)
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.samestat(os.fstat(lock), os.stat(own)):  # else whoever had it has just renamed it
            os.ftruncate(lock, 0)
            return own, lock
    if lock is not None:
        os.close(lock)
    return path.with_name(f"{_hidden(path)}.{secrets.token_hex(6)}{path.suffix}"), None


def _is_full(error: BaseException) -> bool:
    """Libraries wrap the system's error (safetensors, torch.save), so the text and the causes count too."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, OSError) and seen.errno in _FULL:
            return True
        if "No space left" in str(seen) or "disk quota exceeded" in str(seen).lower():
            return True
        seen = seen.__cause__
    return False


def refuse_foreign(path: Path) -> None:
    """ValueError where something is that does not say it was predicted: a mask drawn by hand, say, which nobody wants replaced."""
    if is_foreign(path):
        raise ValueError(f"{path} is there, and does not say that perpixel has predicted it: choose another folder, or remove it")


def is_foreign(path: Path) -> bool:
    """Whether something is there that does not say it was predicted, in the text PREDICTED of a PNG, a TIFF or a zarr array.

    An empty file is nobody's. Labels that were corrected in place by a tool that keeps such texts are not told from predicted ones.
    """
    for _ in range(3):
        with contextlib.suppress(FileNotFoundError):  # removed, or about to be replaced by another process: look again
            return _is_foreign(path)
        time.sleep(0.02)
    return os.path.exists(path)


def _is_foreign(path: Path) -> bool:
    if not os.path.exists(path):  # so too where the name is too long
        return False
    if path.is_dir():
        return PREDICTED[1] not in (path / "zarr.json").read_text("utf-8", "replace")
    if not path.stat().st_size:
        return False
    try:
        if path.suffix == ".tif":
            with tifffile.TiffFile(path) as file:
                return PREDICTED[1] not in file.pages.first.description
        with Image.open(path) as image:
            return image.info.get(PREDICTED[0]) != PREDICTED[1]
    except FileNotFoundError:
        raise
    except Exception:  # whatever a damaged file makes of the readers
        return True


def write_labels(path: Path, labels: np.ndarray, colors: Sequence[tuple[int, int, int]], predicted: bool = False) -> None:
    """Write class indices as a PNG: with the classes' palette when they are uint8, as 16-bit grey when they are uint16.

    Args:
        path: ends in .png.
        labels: (H, W) uint8 or uint16. uint8 255 (uint16 65535) means ignore; uint8 255 is shown in Pascal VOC's void colour
            (224, 224, 192), unless there are 256 colours.
        colors: one RGB colour per class, 0..255.
        predicted: say so in the file, so that another prediction may replace it (see `is_foreign`).

    Raises:
        ValueError: if shape or type is another, or a uint8 label is neither a class nor 255.
        OSError: see `replacing`.
    """
    if labels.ndim != 2 or labels.dtype not in (np.uint8, np.uint16):
        raise ValueError(f"{path}: labels have shape {labels.shape} and type {labels.dtype}; legal is (height, width), uint8 or uint16")
    note = PngInfo()
    if predicted:
        note.add_text(*PREDICTED)
    if labels.dtype == np.uint16:
        _write_image(path, Image.fromarray(labels), note)
        return
    if len(colors) > 256:
        raise ValueError(f"{path}: {len(colors)} colours do not fit a palette of 256; give the labels as uint16")
    highest = int(labels.max(where=labels != 255, initial=0))
    if labels.size and highest >= len(colors) and not (labels == 255).all():
        raise ValueError(f"{path}: labels hold class {highest}, but there are {len(colors)} colours; give one colour per class")
    palette = np.zeros((256, 3), np.uint8)
    palette[255] = VOID_COLOR
    palette[: len(colors)] = np.asarray(colors, np.uint8).reshape(-1, 3)
    image = Image.fromarray(labels).convert("L")
    image.putpalette(palette.tobytes())
    _write_image(path, image, note)


def write_rgb(path: Path, rgb: np.ndarray) -> None:
    """Write a picture for people to look at; the suffix chooses the format (.png, .jpg, ...).

    Args:
        path: where to.
        rgb: (H, W, 3) uint8.

    Raises:
        ValueError: if shape or type is another, or the suffix is not that of a picture.
        OSError: see `replacing`.
    """
    if rgb.ndim != 3 or rgb.shape[2] != 3 or rgb.dtype != np.uint8:
        raise ValueError(f"{path}: pixels have shape {rgb.shape} and type {rgb.dtype}; legal is (height, width, 3), uint8")
    _write_image(path, Image.fromarray(rgb))


def write_array(path: Path, array: np.ndarray) -> None:
    """A .npy file. Not by `np.save`, which does not say why a write fell short, so that a full disk could not be told."""
    array = np.ascontiguousarray(array)
    with replacing(path) as temporary, temporary.open("wb") as file:
        np.lib.format.write_array_header_1_0(file, np.lib.format.header_data_from_array_1_0(array))
        file.write(array.data)


def _write_image(path: Path, image: Image.Image, note: PngInfo | None = None) -> None:
    """Encode in memory first: Pillow reports a full disk without saying which error it was."""
    kind = Image.registered_extensions().get(Path(path).suffix.lower())
    if kind is None:
        raise ValueError(f"{path}: the suffix '{Path(path).suffix}' names no picture format; use .png")
    encoded = io.BytesIO()
    image.save(encoded, format=kind, pnginfo=note)
    with replacing(path) as temporary:
        temporary.write_bytes(encoded.getbuffer())
