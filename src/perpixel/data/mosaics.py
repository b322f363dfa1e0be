"""An output that is made block by block: each block is a small file of encoded tiles until all are there and the whole can be put together.

The folder of parts is the journal of an interrupted prediction: a part is whole or not there, so what exists is what need not be done
again, and several processes can add to it without talking to each other. Whoever finds all parts there puts the output together; two
that find it at once do the same work and one of them renames last, onto the same content.
"""

import contextlib
import hashlib
import json
import os
import secrets
import shutil
import time
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import product
from pathlib import Path

import numpy as np

from perpixel.data.writing import replacing

LEVEL = 6  # of deflate: labels are runs, and shrink well
STALE = 30 * 24 * 3600  # seconds after which nobody goes on with parts that were begun
MAX_TILE = 512  # pixels; the side of the tiles of a label TIFF is the largest multiple of 16 that divides a block


@dataclass(frozen=True)
class Block:
    """A rectangle of the output, in pixels."""

    top: int
    left: int
    height: int
    width: int


@dataclass(frozen=True)
class Grid:
    """The blocks of an image: `block` (height, width) in multiples of 16, smaller at the right and below."""

    size: tuple[int, int]
    block: tuple[int, int]

    @cached_property
    def blocks(self) -> list[Block]:
        """Row by row."""
        (rows, columns), (height, width) = self.size, self.block
        corners = product(range(0, rows, height), range(0, columns, width))
        return [Block(top, left, min(height, rows - top), min(width, columns - left)) for top, left in corners]

    @cached_property
    def tile(self) -> int:
        """Side of the tiles that a block is whole of."""
        return next(side for side in range(MAX_TILE, 0, -16) if self.block[0] % side == 0 and self.block[1] % side == 0)


@dataclass(frozen=True)
class Layer:
    """One map of the output: labels (0 bands: (H, W)), probabilities ((K, H, W)), entropy, uncertainty."""

    name: str
    bands: int
    dtype: str


def agreed(folder: Path, proposal: dict[str, int]) -> dict[str, int]:
    """What the first process that works on a picture proposed: all others, now and after an interruption, do as it says."""
    path = folder / "plan.json"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        mine = folder / f"plan.{secrets.token_hex(6)}"
        with mine.open("w", encoding="utf-8") as file:
            json.dump(proposal, file)
            file.flush()
            os.fsync(file.fileno())  # a power cut must not leave the name without its content
        try:
            os.link(mine, path)  # unlike a rename it does not replace what another process has put there meanwhile
        except FileExistsError:
            pass
        except OSError:  # a file system without links
            os.replace(mine, path)
        mine.unlink(missing_ok=True)
    try:
        found: dict[str, int] = json.loads(path.read_text("utf-8"))
    except ValueError:  # damaged, and how the parts beside it were cut is lost with it
        shutil.rmtree(folder)
        return agreed(folder, proposal)
    return found


class Mosaic:
    """The parts of one picture's output in a folder.

    Args:
        folder: made with the first part.
        grid: the blocks.
        layers: what each block has; labels first. A block is done when its labels are there, which are written last.
    """

    def __init__(self, folder: Path, grid: Grid, layers: Sequence[Layer]) -> None:
        self.folder, self.grid, self.layers = folder, grid, {layer.name: layer for layer in layers}
        self._index = lru_cache(maxsize=4096)(self._read_index)

    def has(self, block: Block) -> bool:
        """Whether a block need not be made again."""
        return self._part(block, "labels").is_file()

    def complete(self) -> bool:
        """Whether every block is there."""
        return all(self.has(block) for block in self.grid.blocks)

    def put(self, block: Block, arrays: Mapping[str, np.ndarray], damage: Mapping[tuple[int, int, int, int], str] | None = None) -> None:
        """Write a block: arrays (h, w) or (bands, h, w) by layer, and where its input was damaged.

        Raises:
            OSError: see `replacing`.
        """
        if damage:
            with replacing(self._part(block, "damage")) as temporary:
                temporary.write_text(json.dumps([[*where, why] for where, why in damage.items()]), "utf-8")
        for name in reversed(self.layers):
            tiles = [zlib.compress(tile, LEVEL if name == "labels" else 1) for tile in self._tiles(arrays[name])]
            ends = np.cumsum([0, *map(len, tiles)], dtype="<u8") + 8 * (len(tiles) + 1)
            with replacing(self._part(block, name)) as temporary, temporary.open("wb") as file:
                file.write(ends.tobytes())
                file.writelines(tiles)

    def damage(self) -> dict[tuple[int, int, int, int], str]:
        """Damaged pieces of the input that any block met, in reading order."""
        found: dict[tuple[int, int, int, int], str] = {}
        for part in self.folder.glob("[!.]*.damage"):
            found.update({(top, left, height, width): why for top, left, height, width, why in json.loads(part.read_text("utf-8"))})
        return dict(sorted(found.items()))

    def encoded(self, name: str) -> Iterator[bytes]:
        """Tiles of a layer as a TIFF holds them: deflated, band after band, row by row over the whole image."""
        side, (height, width) = self.grid.tile, self.grid.block
        rows, columns = self.grid.size
        for band, top, left in product(range(max(self.layers[name].bands, 1)), range(0, rows, side), range(0, columns, side)):
            y, x = top // height * height, left // width * width
            block = Block(y, x, min(height, rows - y), min(width, columns - x))
            across, down = -(-block.width // side), -(-block.height // side)
            number = (band * down + (top - y) // side) * across + (left - x) // side
            path = self._part(block, name)
            ends = self._index(path)
            with path.open("rb") as file:
                file.seek(int(ends[number]))
                yield file.read(int(ends[number + 1] - ends[number]))

    def encoded_size(self, name: str) -> int:
        """Bytes of all of them."""
        return sum(self._part(block, name).stat().st_size for block in self.grid.blocks)

    def array(self, block: Block, name: str) -> np.ndarray:
        """(h, w) or (bands, h, w) of a block that is there."""
        layer, side, path = self.layers[name], self.grid.tile, self._part(block, name)
        ends, data = self._index(path), path.read_bytes()
        out = np.empty((max(layer.bands, 1), block.height, block.width), layer.dtype)
        places = product(range(len(out)), range(0, block.height, side), range(0, block.width, side))
        for number, (band, top, left) in enumerate(places):
            tile = np.frombuffer(zlib.decompress(data[int(ends[number]) : int(ends[number + 1])]), layer.dtype).reshape(side, side)
            into = out[band, top : top + side, left : left + side]
            into[:] = tile[: into.shape[0], : into.shape[1]]
        return out if layer.bands else out[0]

    def remove(self) -> None:
        """The parts, when the output is there: all at once, so that who joins them too finds all or none."""
        away = self.folder.with_name(f"{self.folder.name}.{secrets.token_hex(6)}")
        with contextlib.suppress(OSError):
            os.rename(self.folder, away)
        shutil.rmtree(away, ignore_errors=True)

    def _tiles(self, array: np.ndarray) -> Iterator[bytes]:
        side = self.grid.tile
        bands = array if array.ndim == 3 else array[None]
        for band in bands:
            for top, left in product(range(0, band.shape[0], side), range(0, band.shape[1], side)):
                tile = np.zeros((side, side), band.dtype)
                part = band[top : top + side, left : left + side]
                tile[: part.shape[0], : part.shape[1]] = part
                yield tile.tobytes()

    def _part(self, block: Block, name: str) -> Path:
        return self.folder / f"{block.top:07d}_{block.left:07d}_{block.height}x{block.width}.{name}"

    @staticmethod
    def _read_index(path: Path) -> np.ndarray:
        with path.open("rb") as file:
            first = np.frombuffer(file.read(8), "<u8")
            return np.concatenate([first, np.frombuffer(file.read(int(first[0]) - 8), "<u8")])


class Journal:
    """What one command has done of its pictures, in a hidden folder of its output; removed when all are settled.

    Args:
        out: folder of the outputs.
        settings: everything that changes what is written; another bundle or option has another journal.
    """

    def __init__(self, out: Path, settings: str) -> None:
        self.folder = out / f".perpixel-{_digest(settings)}"
        for other in out.glob(".perpixel-*/*.done"):
            if other.parent != self.folder:  # what another bundle or option has written is about to be replaced
                other.unlink(missing_ok=True)
        self._remove_stale(out)

    def _remove_stale(self, out: Path) -> None:
        """Parts that another bundle, option or state of a picture has left for good, and what a kill has left while it was removed."""
        for parts in [*out.glob(".perpixel-*/*.parts"), *out.glob(".perpixel-*/*.parts.*")]:
            with contextlib.suppress(OSError):  # another process is faster
                if parts.suffix != ".parts" or time.time() - parts.stat().st_mtime > STALE:
                    shutil.rmtree(parts, ignore_errors=True)
                    if parts.parent != self.folder:
                        parts.parent.rmdir()  # where it is empty now

    def parts(self, key: str) -> Path:
        """The folder for the parts of a picture."""
        return self.folder / f"{_digest(key)}.parts"

    def settled(self, key: str) -> bool:
        """Whether a picture needs nothing more."""
        return (self.folder / f"{_digest(key)}.done").is_file()

    def settle(self, key: str, holes: Sequence[str] = ()) -> None:
        """Note that a picture needs nothing more: its outputs are there, or it cannot be read; and what is damaged of it."""
        with replacing(self.folder / f"{_digest(key)}.done") as temporary:
            temporary.write_text(json.dumps(list(holes)), "utf-8")

    def holes(self, key: str) -> list[str]:
        """What `settle` was told to be damaged of a picture."""
        found: list[str] = json.loads((self.folder / f"{_digest(key)}.done").read_text("utf-8"))
        return found

    def close(self, keys: Sequence[str], share: tuple[int, int] = (0, 1)) -> None:
        """Remove the notes on these pictures, if every one is settled; and the folder, unless it holds parts or notes of others.

        Of several shares (number, count) the last one to end does so: whoever comes later has to find what was done without it.
        """
        number, count = share
        ended = [self.folder / f"share-{one + 1}-of-{count}.ended" for one in range(count)]
        if count > 1:
            self.folder.mkdir(parents=True, exist_ok=True)
            ended[number].touch()
        if all(self.settled(key) for key in keys) and (count == 1 or all(mark.exists() for mark in ended)):
            for key in keys:
                (self.folder / f"{_digest(key)}.done").unlink(missing_ok=True)
                for left in [self.parts(key), *self.folder.glob(f"{_digest(key)}.parts.*")]:
                    shutil.rmtree(left, ignore_errors=True)
            for mark in self.folder.glob("share-*.ended"):
                mark.unlink(missing_ok=True)
            with contextlib.suppress(OSError):
                self.folder.rmdir()


def _digest(text: str) -> str:
    return hashlib.blake2b(text.encode("utf-8", "surrogateescape"), digest_size=8).hexdigest()
