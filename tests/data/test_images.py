"""Reading pictures: every kind of file, whole and damaged."""

import os
import struct
import subprocess
import sys
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image, ImageOps

from perpixel.data.images import Picture, expand, find_pictures, inspect, read_image

RNG = np.random.default_rng(0)
GREY = RNG.integers(0, 256, (13, 17), dtype=np.uint8)
RGB = RNG.integers(0, 256, (13, 17, 3), dtype=np.uint8)
GREY16 = RNG.integers(0, 65536, (13, 17), dtype=np.uint16)


def bands_first(array: np.ndarray) -> np.ndarray:
    return array[None] if array.ndim == 2 else array.transpose(2, 0, 1)


def png(height: int, width: int, bits: int, color: int, rows: list[bytes], step: int = 0) -> bytes:
    """A PNG written by hand (W3C PNG, section 5), for depths that Pillow does not write; `step`: filter "Sub" over so many bytes."""
    if step:
        rows = [bytes((b - (row[i - step] if i >= step else 0)) & 255 for i, b in enumerate(row)) for row in rows]

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, bits, color, 0, 0, 0)
    pixels = zlib.compress(b"".join((b"\1" if step else b"\0") + row for row in rows))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def write_every_kind(folder: Path) -> dict[str, np.ndarray]:
    """File name -> the (C, H, W) array that reading it must give, written with Pillow and tifffile."""
    Image.fromarray(GREY).save(folder / "grey.png")
    Image.fromarray(RGB).save(folder / "rgb.png")
    Image.fromarray(np.dstack([RGB, GREY])).save(folder / "alpha.png")
    Image.fromarray(np.dstack([GREY, GREY[::-1]]), "LA").save(folder / "grey_alpha.png")
    Image.fromarray(GREY > 99).save(folder / "bit.png")
    Image.fromarray(GREY > 99).save(folder / "bit.tif")
    Image.fromarray(GREY16).save(folder / "grey16.png")
    rgb16 = RNG.integers(0, 65536, (13, 17, 3), dtype=np.uint16)
    (folder / "rgb16.png").write_bytes(png(13, 17, 16, 2, [row.astype(">u2").tobytes() for row in rgb16]))
    rgba16 = np.dstack([rgb16, GREY16])
    (folder / "rgba16.png").write_bytes(png(13, 17, 16, 6, [row.astype(">u2").tobytes() for row in rgba16], step=8))
    four = RNG.integers(0, 16, (5, 6), dtype=np.uint8)
    (folder / "grey4.png").write_bytes(png(5, 6, 4, 0, [(row[::2] << 4 | row[1::2]).tobytes() for row in four]))
    palette = Image.fromarray(GREY % 3)
    palette.putpalette([1, 2, 3, 100, 110, 120, 250, 251, 252])
    palette.save(folder / "palette.png")
    painted = np.array([[1, 2, 3], [100, 110, 120], [250, 251, 252]], np.uint8)[GREY % 3]
    (folder / "grey16.pgm").write_bytes(b"P5 17 13 65535\n" + GREY16.astype(">u2").tobytes())
    Image.fromarray(RGB).save(folder / "rgb.bmp")
    Image.fromarray(RGB).save(folder / "rgb.webp", lossless=True)
    many = RNG.integers(0, 65536, (5, 13, 17), dtype=np.uint16)
    tifffile.imwrite(folder / "planar.tif", many, planarconfig="separate", photometric="minisblack")
    tifffile.imwrite(folder / "interleaved.tif", many.transpose(1, 2, 0), planarconfig="contig", photometric="minisblack")
    tifffile.imwrite(folder / "big_endian.tif", GREY16, byteorder=">")
    tifffile.imwrite(folder / "float.tif", GREY16.astype(np.float64) / 7)
    tifffile.imwrite(folder / "signed.tif", GREY16.astype(np.int16))
    tifffile.imwrite(folder / "alpha.tif", np.dstack([RGB, GREY]), photometric="rgb", extrasamples=["unassalpha"])
    tifffile.imwrite(folder / "inverted.tif", GREY, photometric="miniswhite")
    colormap = RNG.integers(0, 65536, (3, 256), dtype=np.uint16)
    tifffile.imwrite(folder / "palette.tif", GREY, photometric="palette", colormap=colormap)
    return {
        "grey.png": GREY[None],
        "rgb.png": bands_first(RGB),
        "alpha.png": bands_first(RGB),
        "grey_alpha.png": GREY[None],
        "bit.png": (GREY > 99)[None].astype(np.uint8) * np.uint8(255),
        "bit.tif": (GREY > 99)[None].astype(np.uint8) * np.uint8(255),
        "grey16.png": GREY16[None],
        "rgb16.png": bands_first(rgb16),
        "rgba16.png": bands_first(rgb16),
        "grey4.png": four[None] * np.uint8(17),
        "palette.png": bands_first(painted),
        "grey16.pgm": GREY16[None],
        "rgb.bmp": bands_first(RGB),
        "rgb.webp": bands_first(RGB),
        "planar.tif": many,
        "interleaved.tif": many,
        "big_endian.tif": GREY16[None],
        "float.tif": (GREY16.astype(np.float64) / 7).astype(np.float32)[None],
        "signed.tif": GREY16.astype(np.int16).astype(np.float32)[None],
        "alpha.tif": bands_first(RGB),
        "inverted.tif": 255 - GREY[None],
        "palette.tif": (colormap[:, GREY] >> 8).astype(np.uint8),
    }


def test_every_kind_of_file_reads_as_the_pixels_that_were_written(tmp_path):
    for name, wanted in write_every_kind(tmp_path).items():
        image = read_image(tmp_path / name)
        assert (image.dtype, image.shape) == (wanted.dtype, wanted.shape), name
        np.testing.assert_array_equal(image, wanted, err_msg=name)
        assert image.flags.c_contiguous, name
        assert image.flags.writeable, name
        assert image.dtype.isnative, name


def test_the_header_announces_what_reading_gives(tmp_path):
    for name, wanted in write_every_kind(tmp_path).items():
        info = inspect(Picture(tmp_path / name))
        assert (info.bands, info.height, info.width) == wanted.shape, name
        assert info.dtype == ("bool" if name.startswith("bit") else str(wanted.dtype)), name
        assert info.pages == 1, name


def test_a_cmyk_jpeg_becomes_the_rgb_picture_it_shows(tmp_path):
    flat = np.zeros((16, 16, 3), np.uint8) + np.array([200, 60, 20], np.uint8)
    Image.fromarray(flat).convert("CMYK").save(tmp_path / "print.jpg", quality=100)
    assert inspect(tmp_path / "print.jpg").mode == "CMYK"
    np.testing.assert_allclose(read_image(tmp_path / "print.jpg"), bands_first(flat), atol=3)


def test_a_cmyk_tiff_becomes_the_rgb_picture_it_shows(tmp_path):
    flat = np.zeros((16, 16, 3), np.uint8) + np.array([200, 60, 20], np.uint8)
    Image.fromarray(flat).convert("CMYK").save(tmp_path / "print.tif")
    np.testing.assert_allclose(read_image(tmp_path / "print.tif"), bands_first(flat), atol=1)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_a_picture_taken_sideways_is_read_upright(tmp_path, orientation, suffix):
    """All eight values of EXIF 2.3, tag Orientation, compared with Pillow's own turning."""
    path = tmp_path / f"turned.{suffix}"
    if suffix == "tif":
        tifffile.imwrite(path, RGB, photometric="rgb", extratags=[(274, "H", 1, orientation, True)])
    else:
        exif = Image.Exif()
        exif[0x0112] = orientation
        Image.fromarray(RGB).save(path, exif=exif)
    with Image.open(path) as image:
        wanted = np.asarray(ImageOps.exif_transpose(image))
    np.testing.assert_array_equal(read_image(path), bands_first(wanted))


@pytest.mark.parametrize("suffix", ["jpg", "tif"])
def test_the_header_of_a_sideways_picture_gives_its_upright_size(tmp_path, suffix):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(RGB).save(tmp_path / "a.jpg", exif=exif)
    tifffile.imwrite(tmp_path / "a.tif", RGB, photometric="rgb", extratags=[(274, "H", 1, 6, True)])
    info = inspect(tmp_path / f"a.{suffix}")
    assert (info.height, info.width) == read_image(tmp_path / f"a.{suffix}").shape[1:] == (17, 13)


@pytest.mark.parametrize("suffix", ["gif", "png", "webp"])
def test_of_an_animation_the_first_picture_is_read_and_a_warning_names_the_file(tmp_path, suffix):
    frames = [Image.fromarray(np.full((8, 9), level, np.uint8)) for level in (0, 120, 255)]
    path = tmp_path / f"moving.{suffix}"
    frames[0].save(path, save_all=True, append_images=frames[1:], lossless=True)
    with pytest.warns(UserWarning, match=rf"moving\.{suffix}: holds an animation; only its first"):
        image = read_image(path)
    assert image.max() == 0
    assert inspect(path).pages == 3


# ---- damaged and hostile files


@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.tif", "a_lzw.tif", "a_zlib.tif", "a.gif", "a.bmp", "a.webp", "rgb16.png"])
def test_a_file_cut_off_anywhere_is_refused_by_name_or_still_whole(tmp_path, name):
    """Never half a picture: the only harmless cuts are in trailing bytes that hold no pixels."""
    whole = tmp_path / name
    if name == "rgb16.png":
        whole.write_bytes(png(13, 17, 16, 2, [RNG.bytes(6 * 17) for _ in range(13)]))
    elif "_" in name:
        Image.fromarray(RGB).save(whole, compression={"a_lzw.tif": "tiff_lzw", "a_zlib.tif": "tiff_adobe_deflate"}[name])
    else:
        Image.fromarray(RGB).save(whole)
    wanted, data = read_image(whole), whole.read_bytes()
    cut = tmp_path / f"cut_{name}"
    messages = []
    for length in [*range(0, len(data), max(1, len(data) // 40)), len(data) - 1]:
        cut.write_bytes(data[:length])
        try:
            image = read_image(cut)
        except ValueError as error:
            messages.append(str(error))
        else:
            np.testing.assert_array_equal(image, wanted, err_msg=f"cut at {length} of {len(data)}")
    assert len(messages) >= 38
    assert all(message.startswith(str(cut)) for message in messages)


def test_a_truncated_picture_says_that_it_is_damaged_and_what_to_do(tmp_path):
    Image.fromarray(RGB).save(tmp_path / "a.jpg")
    data = (tmp_path / "a.jpg").read_bytes()
    (tmp_path / "a.jpg").write_bytes(data[: len(data) * 2 // 3])
    with pytest.raises(ValueError, match=r"a\.jpg: is damaged or cut off .*[Tt]runcated.* Copy or export it again"):
        read_image(tmp_path / "a.jpg")


def test_a_flipped_bit_in_a_png_is_noticed(tmp_path):
    path = tmp_path / "a.png"
    Image.fromarray(RGB).save(path)
    data = bytearray(path.read_bytes())
    data[data.index(b"IDAT") + 40] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"a\.png: is damaged"):
        read_image(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"odd\.png: is empty \(0 bytes\)"),
        (b"hello, this is text\n" * 9, r"odd\.png: is not a picture perpixel can read \(it begins with b'hello"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n", r"odd\.png: is not a picture"),
    ],
)
def test_a_file_that_is_no_picture_is_refused_by_name(tmp_path, content, message):
    (tmp_path / "odd.png").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_image(tmp_path / "odd.png")
    with pytest.raises(ValueError, match=message):
        inspect(Picture(tmp_path / "odd.png"))


def test_a_missing_file_a_folder_and_a_pipe_are_refused_by_name(tmp_path):
    with pytest.raises(ValueError, match=r"gone\.png: there is no such file"):
        read_image(tmp_path / "gone.png")
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(ValueError, match=r"folder\.png: is a folder"):
        read_image(tmp_path / "folder.png")
    os.mkfifo(tmp_path / "pipe.png")  # opening it would wait for ever
    with pytest.raises(ValueError, match=r"pipe\.png: is not a regular file"):
        read_image(tmp_path / "pipe.png")


def test_a_forbidden_file_is_refused_by_name(tmp_path, monkeypatch):
    """Simulated, since the superuser may read everything."""
    Image.fromarray(GREY).save(tmp_path / "secret.png")

    def forbidden(self, *_args, **_kwargs):
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "open", forbidden)
    with pytest.raises(ValueError, match=r"secret\.png: no permission to read it; change its mode"):
        read_image(tmp_path / "secret.png")


@pytest.mark.parametrize(("bad", "count"), [(np.nan, 1), (np.inf, 2)])
def test_nan_and_infinity_are_counted_and_refused(tmp_path, bad, count):
    values = np.ones((6, 7), np.float32)
    values.flat[:count] = bad
    tifffile.imwrite(tmp_path / "holes.tif", values)
    with pytest.raises(ValueError, match=rf"holes\.tif: {count} of 42 values are NaN or infinite"):
        read_image(tmp_path / "holes.tif")


def bombs(folder: Path) -> list[Path]:
    """Small files that announce 40000 x 50000 pixels."""
    (folder / "bomb.png").write_bytes(png(40000, 50000, 8, 0, [b""]))
    (folder / "bomb.gif").write_bytes(b"GIF89a" + struct.pack("<HHBBB", 50000, 40000, 0, 0, 0) + b",\0\0\0\0\x50\xc3\x40\x9c\0\x02\0;")
    tifffile.imwrite(folder / "bomb.tif", GREY)
    data = (folder / "bomb.tif").read_bytes()
    for tag, side in ((256, 50000), (257, 40000)):  # ImageWidth, ImageLength
        at = data.index(struct.pack("<HHI", tag, 4, 1)) if struct.pack("<HHI", tag, 4, 1) in data else None
        at = data.index(struct.pack("<HHI", tag, 3, 1)) if at is None else at
        data = data[: at + 2] + struct.pack("<HII", 4, 1, side) + data[at + 12 :]
    (folder / "bomb.tif").write_bytes(data)
    return [folder / "bomb.png", folder / "bomb.gif", folder / "bomb.tif"]


def test_a_decompression_bomb_is_refused_before_it_is_decoded(tmp_path):
    for path in bombs(tmp_path):
        with pytest.raises(ValueError, match=rf"{path.name}: .*limit of 268,435,456.*PERPIXEL_MAX_PIXELS"):
            read_image(path)


def test_the_limit_of_pixels_can_be_moved_and_names_the_number_to_set(tmp_path, monkeypatch):
    Image.fromarray(GREY).save(tmp_path / "a.png")
    tifffile.imwrite(tmp_path / "a.tif", GREY)
    for name in ("a.png", "a.tif"):
        monkeypatch.setenv("PERPIXEL_MAX_PIXELS", "220")
        with pytest.raises(ValueError, match=r"13x17 pixels \(height x width\) are 221; the limit of 220 .*PERPIXEL_MAX_PIXELS=221"):
            read_image(tmp_path / name)
        monkeypatch.setenv("PERPIXEL_MAX_PIXELS", "221")
        assert read_image(tmp_path / name).shape == (1, 13, 17)
        assert read_image(tmp_path / name, max_pixels=221).shape == (1, 13, 17)
    monkeypatch.setenv("PERPIXEL_MAX_PIXELS", "many")
    with pytest.raises(ValueError, match="PERPIXEL_MAX_PIXELS is 'many'; legal is a whole number"):
        read_image(tmp_path / "a.png")


# ---- stacks


def write_stack(path: Path, pages: int = 4, **options) -> np.ndarray:
    stack = RNG.integers(0, 256, (pages, 32, 30), dtype=np.uint8)
    tifffile.imwrite(path, stack, photometric="minisblack", **options)
    return stack


def test_a_stack_is_expanded_to_its_pages_in_order(tmp_path):
    stack = write_stack(tmp_path / "cells.tif")
    pictures = expand(tmp_path / "cells.tif")
    assert [p.name for p in pictures] == ["cells_0000", "cells_0001", "cells_0002", "cells_0003"]
    assert str(pictures[3]) == f"{tmp_path}/cells.tif[3]"
    for page, picture in zip(stack, pictures, strict=True):
        np.testing.assert_array_equal(read_image(picture)[0], page)
    assert inspect(pictures[2]).pages == 4


def test_a_stack_read_without_a_page_gives_the_first_and_warns(tmp_path):
    stack = write_stack(tmp_path / "cells.tif")
    with pytest.warns(UserWarning, match=r"cells\.tif: holds 4 pages; only the first"):
        np.testing.assert_array_equal(read_image(tmp_path / "cells.tif")[0], stack[0])


@pytest.mark.parametrize("compression", [None, "zlib"])
def test_a_stack_cut_off_loses_no_page_silently(tmp_path, compression):
    stack = write_stack(tmp_path / "cells.tif", 6, compression=compression)
    data = (tmp_path / "cells.tif").read_bytes()
    for share in (0.3, 0.6, 0.9):
        (tmp_path / "cut.tif").write_bytes(data[: int(len(data) * share)])
        read, messages = [], []
        for picture in expand(tmp_path / "cut.tif"):
            try:
                read.append(read_image(picture)[0])
            except ValueError as error:
                messages.append(str(error))
        assert messages, share
        assert all("cut.tif" in message for message in messages)
        for page, wanted in zip(read, stack, strict=False):
            np.testing.assert_array_equal(page, wanted)


def test_a_pyramid_is_one_picture_without_a_warning(tmp_path):
    """Aperio's SVS marks no level, and no thumbnail, as reduced (NewSubfileType 0)."""
    with tifffile.TiffWriter(tmp_path / "pyramid.tif") as tiff:
        tiff.write(RGB, photometric="rgb")
        tiff.write(RGB[::2, ::2], photometric="rgb", subfiletype=1)
    with tifffile.TiffWriter(tmp_path / "slide.svs") as tiff:
        for side, tile in ((256, (64, 64)), (50, None), (64, (64, 64))):
            tiff.write(np.zeros((side, side, 3), np.uint8), tile=tile, description="Aperio Image Library v1", metadata=None)
    with warnings.catch_warnings(action="error"):
        for name, size in (("pyramid.tif", (13, 17)), ("slide.svs", (256, 256))):
            assert expand(tmp_path / name) == [Picture(tmp_path / name)]
            assert read_image(tmp_path / name).shape[1:] == size


def test_pages_of_other_sizes_are_not_dropped_silently(tmp_path):
    with tifffile.TiffWriter(tmp_path / "mixed.tif") as tiff:
        for side in (32, 32, 24):
            tiff.write(np.zeros((side, 30), np.uint8))
    message = r"mixed\.tif: its 3 pages differ in shape \(32x30, 24x30\); only the first is used"
    with pytest.warns(UserWarning, match=message):
        assert find_pictures([tmp_path]) == [Picture(tmp_path / "mixed.tif")]
    with pytest.warns(UserWarning, match=message):
        read_image(tmp_path / "mixed.tif")


def test_reduced_copies_between_the_pages_of_a_stack_are_left_out(tmp_path):
    with tifffile.TiffWriter(tmp_path / "scan.tif") as tiff:
        for page in (GREY, GREY[::-1]):
            tiff.write(page)
            tiff.write(page[::2, ::2], subfiletype=1)
    assert [picture.page for picture in expand(tmp_path / "scan.tif")] == [0, 2]
    np.testing.assert_array_equal(read_image(expand(tmp_path / "scan.tif")[1])[0], GREY[::-1])


def test_a_page_that_is_not_there_is_refused(tmp_path):
    write_stack(tmp_path / "cells.tif")
    with pytest.raises(ValueError, match=r"cells\.tif\[9\]: there is no such page, only 0 to 3"):
        read_image(Picture(tmp_path / "cells.tif", 9))
    Image.fromarray(GREY).save(tmp_path / "a.png")
    with pytest.raises(ValueError, match=r"a\.png\[1\]: only TIFF files have pages"):
        read_image(Picture(tmp_path / "a.png", 1))


def test_compressed_tiff_without_imagecodecs_is_read_or_names_the_extra(tmp_path):
    """LZW falls back to Pillow; what Pillow cannot read either names `perpixel[tiff]`."""
    Image.fromarray(RGB).save(tmp_path / "lzw.tif", compression="tiff_lzw")
    script = f"""
import sys
sys.modules["imagecodecs"] = None
import numpy as np, tifffile
from pathlib import Path
from perpixel.data.images import read_image
print(read_image(Path({str(tmp_path / "lzw.tif")!r})).astype(int).sum())
data = bytearray(Path({str(tmp_path / "lzw.tif")!r}).read_bytes())
with tifffile.TiffFile({str(tmp_path / "lzw.tif")!r}) as tiff:
    at = tiff.pages[0].tags[259].valueoffset
data[at:at + 2] = (50000).to_bytes(2, "little")  # ZSTD, in a build of libtiff or not
Path({str(tmp_path / "zstd.tif")!r}).write_bytes(data)
try:
    read_image(Path({str(tmp_path / "zstd.tif")!r}))
except ValueError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    total, message = done.stdout.splitlines()
    assert int(total) == RGB.astype(int).sum()
    assert "zstd.tif: its compression (ZSTD) needs imagecodecs; pip install 'perpixel[tiff]'" in message


# ---- finding


def test_folders_files_globs_and_stacks_give_sorted_pictures_each_once(tmp_path):
    for name in ("b.png", "a.PNG", ".hidden.png"):
        Image.fromarray(GREY).save(tmp_path / name, format="PNG")
    (tmp_path / "notes.txt").write_text("no picture")
    (tmp_path / "below").mkdir()
    Image.fromarray(GREY).save(tmp_path / "below" / "c.png")
    write_stack(tmp_path / "s.tif", 2)
    names = [picture.name for picture in find_pictures([tmp_path])]
    assert names == ["a", "b", "s_0000", "s_0001"]
    again = find_pictures([tmp_path / "b.png", tmp_path, str(tmp_path / "*.png")])
    assert [p.name for p in again] == ["b", "a", "s_0000", "s_0001"]
    assert [p.name for p in find_pictures([str(tmp_path / "**" / "c.*")])] == ["c"]


def test_a_damaged_tiff_does_not_stop_the_search(tmp_path):
    Image.fromarray(GREY).save(tmp_path / "a.png")
    (tmp_path / "b.tif").write_bytes(b"II*\0\xff\xff\xff\xff")
    assert [p.name for p in find_pictures([tmp_path])] == ["a", "b"]
    with pytest.raises(ValueError, match=r"b\.tif"):
        read_image(tmp_path / "b.tif")


def test_a_folder_without_pictures_and_a_missing_path_are_refused_by_name(tmp_path):
    (tmp_path / "notes.txt").write_text("no picture")
    with pytest.raises(
        ValueError, match=rf"{tmp_path}: no pictures here. Looked for files ending in \.bmp.*; folders below are not searched"
    ):
        find_pictures([tmp_path])
    with pytest.raises(ValueError, match=r"nothing\*\.png: no pictures here"):
        find_pictures([str(tmp_path / "nothing*.png")])
    with pytest.raises(ValueError, match="gone: there is no such file or folder"):
        find_pictures([tmp_path / "gone"])
    with pytest.raises(ValueError, match="no input given"):
        find_pictures([])


def test_an_unreadable_folder_is_refused_by_name(tmp_path, monkeypatch):
    def forbidden(self):
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "iterdir", forbidden)
    with pytest.raises(ValueError, match=rf"{tmp_path}: cannot be read \(Permission denied\); change its mode"):
        find_pictures([tmp_path])


@pytest.mark.shared_data
def test_real_pictures_read_as_pillow_and_tifffile_read_them(shared):
    for path in find_pictures([shared / "data" / "camvid" / "train", shared / "data" / "crf_examples"])[::40]:
        with Image.open(path.path) as image:
            np.testing.assert_array_equal(read_image(path), bands_first(np.asarray(image.convert("RGB"))))
    pages = find_pictures([shared / "data" / "isbi2012" / "train-volume.tif"])
    assert len(pages) == 30
    np.testing.assert_array_equal(read_image(pages[17])[0], tifffile.imread(shared / "data" / "isbi2012" / "train-volume.tif", key=17))
