"""From image files to label files: sizes, palette, places, and what happens to a picture that cannot be read."""

import shutil
import warnings

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image

import perpixel
from perpixel.bundle import load_bundle
from perpixel.data.sources import open_source
from perpixel.predict import Task, load, predict_files

SIDES = (1, 2, 7, 33, 130)


def noise(*shape, seed=0, dtype=np.uint8):
    high = {np.uint8: 256, np.uint16: 65536}[dtype]
    return np.random.default_rng(seed).integers(0, high, shape, dtype=dtype)


def save(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)
    return path


@pytest.fixture
def segmenter(make_bundle):
    return load(make_bundle(), device="cpu")


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out"


# ---- arrays and files


@pytest.mark.parametrize("model", ["unet", "unet_paper"])
@pytest.mark.parametrize("height", SIDES)
@pytest.mark.parametrize("width", SIDES)
def test_labels_have_exactly_the_image_s_size(make_bundle, model, height, width):
    segmenter = load(make_bundle(model=model, width=1), device="cpu")
    labels = segmenter.predict(noise(height, width, 3))
    assert (labels.shape, labels.dtype) == ((height, width), np.uint8)
    assert labels.max() < 3


def test_a_path_an_array_and_a_tensor_of_the_same_pixels_give_the_same(make_bundle, tmp_path):
    segmenter = perpixel.load(make_bundle(), device="cpu")
    pixels = noise(40, 50, 3)
    path = save(tmp_path / "a.png", pixels)
    expected = segmenter.predict(path)
    assert len(np.unique(expected)) > 1
    for same in (str(path), pixels, torch.from_numpy(pixels.transpose(2, 0, 1).copy())):
        assert np.array_equal(segmenter.predict(same), expected)
    np.testing.assert_array_equal(segmenter.probabilities(path).argmax(0), expected)


def test_grey_is_the_same_as_array_file_and_three_equal_bands(segmenter, tmp_path):
    grey = noise(30, 20)
    expected = segmenter.logits(np.stack([grey] * 3, axis=-1))
    for same in (grey, grey[..., None], save(tmp_path / "grey.png", grey)):
        torch.testing.assert_close(segmenter.logits(same), expected)


def test_sixteen_bits_and_floats_are_the_same_light_as_eight(segmenter, tmp_path):
    """255, 65535 and 1.0 all stand for white."""
    eight = noise(30, 20)
    sixteen = eight.astype(np.uint16) * 257
    expected = segmenter.logits(eight)
    Image.fromarray(sixteen).save(tmp_path / "sixteen.png")
    tifffile.imwrite(tmp_path / "sixteen.tif", sixteen, photometric="minisblack")
    tifffile.imwrite(tmp_path / "float.tif", (eight / 255).astype(np.float32), photometric="minisblack")
    for same in (sixteen, eight / 255, tmp_path / "sixteen.png", tmp_path / "sixteen.tif", tmp_path / "float.tif"):
        torch.testing.assert_close(segmenter.logits(same), expected)


def test_a_model_of_sixteen_bits_sees_more_than_the_upper_eight(make_bundle):
    segmenter = load(make_bundle(bands=1, dtype="uint16"), device="cpu")
    pixels = noise(40, 40, dtype=np.uint16)
    assert not torch.equal(segmenter.logits(pixels), segmenter.logits(pixels // 256 * 256))


def test_masks_of_zero_and_one_as_booleans_are_black_and_white(segmenter):
    pixels = noise(20, 20) > 127
    torch.testing.assert_close(segmenter.logits(pixels), segmenter.logits(pixels.astype(np.uint8) * 255))


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (np.zeros((4, 4, 5), np.uint8), "5 bands; the model was trained on 3"),
        (np.zeros((2, 4, 4, 3), np.uint8), r"must be \(H, W\) or \(H, W, C\), got \(2, 4, 4, 3\)"),
        (np.zeros((0, 4, 3), np.uint8), "no pixels"),
        (np.full((4, 4, 3), np.nan), "48 values that are NaN or infinite"),
        (np.full((4, 4, 3), 200.0), "values of neither uint8 nor uint16, from 200 to 200; this model was trained on uint8"),
        (torch.zeros(4, 4), r"must be \(C, H, W\)"),
    ],
)
def test_arrays_that_are_no_image_are_refused_with_what_is_legal(segmenter, image, message):
    with pytest.raises(ValueError, match=message):
        segmenter.predict(image)


@pytest.mark.parametrize("image", [[[[1, 2, 3]]], Image.new("RGB", (4, 4)), None, np.zeros((4, 4, 3), complex), np.full((4, 4, 3), "a")])
def test_what_is_no_array_of_real_numbers_is_refused_with_what_is_legal(segmenter, image):
    with pytest.raises(TypeError, match=r"the image (is a|holds values of type) .*; legal is "):
        segmenter.predict(image)


def test_a_tensor_may_be_half_as_exact_or_part_of_a_computation(segmenter):
    pixels = torch.from_numpy(noise(3, 9, 9)) / 255
    expected = segmenter.logits(pixels.bfloat16().float())
    torch.testing.assert_close(segmenter.logits(pixels.bfloat16().requires_grad_()), expected)


def test_the_array_that_was_given_is_left_as_it_was(segmenter):
    pixels = noise(9, 9, 3)
    pixels.flags.writeable = False
    before = pixels.copy()
    segmenter.predict(pixels)
    assert np.array_equal(pixels, before)


@pytest.mark.parametrize("size", [(130, 33), (200, 301), (64, 400)])
def test_tiles_of_the_unpadded_network_equal_the_whole(make_bundle, size):
    """Overlap-tile strategy, arXiv:1505.04597, Fig. 2."""
    tiled = load(make_bundle("tiled.safetensors", model="unet_paper", tile=68, overlap=4), device="cpu")
    whole = load(make_bundle("whole.safetensors", model="unet_paper", tile=1024), device="cpu")
    image = noise(*size, 3)
    torch.testing.assert_close(tiled.logits(image), whole.logits(image), rtol=1e-4, atol=1e-4)


def test_tiles_of_a_padded_network_nearly_agree_with_the_whole(make_bundle):
    tiled = load(make_bundle("tiled.safetensors", tile=128, overlap=64), device="cpu")
    whole = load(make_bundle("whole.safetensors", tile=1024), device="cpu")
    image = noise(150, 260, 3)
    assert (tiled.predict(image) == whole.predict(image)).mean() > 0.9


def test_classes_and_colours_are_the_bundle_s(run):
    segmenter = perpixel.load(run / "best.safetensors", device="cpu")
    assert segmenter.classes == ["sky", "water", "reeds", "bird", "fish"]
    assert len(segmenter.colors) == 5
    assert segmenter.colors[0] == (135, 190, 235)


# ---- files


@pytest.mark.parametrize(("height", "width"), [(1, 1), (2, 130), (33, 7)])
def test_label_files_hold_the_predicted_indices_with_the_classes_palette(segmenter, tmp_path, out, height, width):
    path = save(tmp_path / "a.png", noise(height, width, 3))
    result = predict_files(segmenter, [path], out, Task(overlay=True, probabilities=True))
    assert result.written == [out / "a.png"]
    with Image.open(out / "a.png") as written:
        assert (written.mode, written.size) == ("P", (width, height))
        assert np.array_equal(np.asarray(written), segmenter.predict(path))
        palette = np.asarray(written.getpalette()).reshape(-1, 3)
    assert palette[:3].tolist() == [list(color) for color in segmenter.colors]
    with Image.open(out / "overlays" / "a.jpg") as shown:
        assert (shown.mode, shown.size) == ("RGB", (width, height))
    assert np.load(out / "probabilities" / "a.npy").shape == (3, height, width)


def test_probabilities_are_float16_and_add_up_to_one(segmenter, tmp_path, out):
    path = save(tmp_path / "a.png", noise(40, 30, 3))
    predict_files(segmenter, [path], out, Task(probabilities=True))
    written = np.load(out / "probabilities" / "a.npy", allow_pickle=False)
    assert written.dtype == np.float16
    np.testing.assert_allclose(written.astype(np.float64).sum(axis=0), 1, atol=2e-3)
    np.testing.assert_allclose(written, segmenter.probabilities(path), atol=1e-3)


def test_an_overlay_is_the_colour_of_each_class_over_the_image(segmenter, tmp_path, out):
    """Half image and half colour; JPEG blurs single pixels, so means are compared."""
    path = save(tmp_path / "a.png", np.full((64, 64, 3), 200, np.uint8))
    predict_files(segmenter, [path], out, Task(overlay=True))
    labels, shown = np.asarray(Image.open(out / "a.png")), np.asarray(Image.open(out / "overlays" / "a.jpg")).astype(float)
    expected = 0.5 * 200 + 0.5 * np.asarray(segmenter.colors, float)[labels]
    np.testing.assert_allclose(shown.mean(axis=(0, 1)), expected.mean(axis=(0, 1)), atol=4)


def test_only_what_is_asked_for_is_written(segmenter, tmp_path, out):
    predict_files(segmenter, [save(tmp_path / "a.png", noise(8, 8, 3))], out)
    assert sorted(path.name for path in out.iterdir()) == ["a.png"]


def test_files_folders_globs_and_stacks_are_found(segmenter, tmp_path, out):
    save(tmp_path / "folder" / "a.png", noise(8, 8, 3))
    save(tmp_path / "folder" / "b.jpg", noise(9, 9, 3))
    save(tmp_path / "more" / "x1.png", noise(10, 10, 3))
    save(tmp_path / "more" / "x2.png", noise(10, 10, 3))
    save(tmp_path / "more" / "y.png", noise(10, 10, 3))
    save(tmp_path / "single.bmp", noise(11, 11, 3))
    volume = noise(3, 12, 13)
    tifffile.imwrite(tmp_path / "stack.tif", volume, photometric="minisblack")
    inputs = [tmp_path / "folder", str(tmp_path / "more" / "x*.png"), tmp_path / "single.bmp", tmp_path / "stack.tif"]
    result = predict_files(segmenter, inputs, out)
    names = ["a", "b", "x1", "x2", "single", "stack_0000", "stack_0001", "stack_0002"]
    assert result.written == [out / f"{name}.png" for name in names]
    assert np.array_equal(np.asarray(Image.open(out / "stack_0001.png")), segmenter.predict(volume[1]))


def test_progress_counts_every_picture(segmenter, tmp_path, out):
    save(tmp_path / "in" / "a.png", noise(8, 8, 3))
    save(tmp_path / "in" / "b.png", noise(8, 8, 3)).write_bytes(b"")
    seen = []
    predict_files(segmenter, [tmp_path / "in"], out, progress=lambda *told: seen.append(told))
    assert seen == [(1, 2, "a"), (2, 2, "b")]


def test_a_damaged_picture_is_named_and_the_others_are_written(segmenter, tmp_path, out):
    for name in ("a", "b", "c", "d"):
        save(tmp_path / "in" / f"{name}.png", noise(8, 8, 3))
    (tmp_path / "in" / "b.png").write_bytes((tmp_path / "in" / "b.png").read_bytes()[:60])
    tifffile.imwrite(tmp_path / "in" / "d.tif", noise(8, 8, 5), photometric="minisblack", planarconfig="contig")
    (tmp_path / "in" / "d.png").unlink()
    result = predict_files(segmenter, [tmp_path / "in"], out)
    assert [path.name for path in result.written] == ["a.png", "c.png"]
    assert list(result.damaged) == [str(tmp_path / "in" / "b.png"), str(tmp_path / "in" / "d.tif")]
    assert all(why.startswith(f"{file}: ") for file, why in result.damaged.items())
    assert "5 bands; the model was trained on 3" in result.damaged[str(tmp_path / "in" / "d.tif")]
    assert not (out / "b.png").exists()


def test_a_picture_too_large_for_the_memory_is_named_and_the_others_are_written(segmenter, tmp_path, out, monkeypatch):
    paths = [save(tmp_path / "in" / f"{name}.png", noise(8, 8, 3)) for name in "abc"]

    def open_all_but_b(picture, bands):
        if picture.name == "b":
            raise MemoryError
        return open_source(picture, bands)

    monkeypatch.setattr("perpixel.predict.open_source", open_all_but_b)
    result = predict_files(segmenter, paths, out)
    assert [path.name for path in result.written] == ["a.png", "c.png"]
    assert list(result.damaged) == [str(paths[1])]
    assert result.damaged[str(paths[1])].startswith(f"{paths[1]}: does not fit into memory")


def test_two_pictures_that_would_be_written_to_one_file_are_refused_before_anything_is(segmenter, tmp_path, out):
    first, second = save(tmp_path / "x" / "a.png", noise(8, 8, 3)), save(tmp_path / "y" / "a.jpg", noise(8, 8, 3))
    with pytest.raises(ValueError, match=r"x/a\.png and .*y/a\.jpg would both be written to .*out/a\.png; predict them into two folders"):
        predict_files(segmenter, [first, second], out)
    assert not out.exists()


@pytest.mark.parametrize("linked", [False, True])
def test_an_input_is_never_overwritten(segmenter, tmp_path, linked):
    """`predict model.safetensors photos -o photos` would replace every photograph by its labels."""
    path = save(tmp_path / "photos" / "a.png", noise(8, 8, 3))
    before, out = path.read_bytes(), tmp_path / "photos"
    if linked:
        out = tmp_path / "link"
        out.symlink_to(tmp_path / "photos")
    with pytest.raises(ValueError, match=r"a\.png is an input, and what is written for .* would overwrite it; choose another folder"):
        predict_files(segmenter, [tmp_path / "photos"], out)
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("name", "task"),
    [("overlays/a.jpg", Task(overlay=True)), ("probabilities/a.tif", Task(probabilities=True, format="tif"))],
)
def test_what_is_written_beside_the_labels_never_overwrites_an_input_either(segmenter, tmp_path, out, name, task):
    path, first = save(out / name, noise(8, 8, 3)), save(tmp_path / "first.png", noise(8, 8, 3))
    before = path.read_bytes()
    with pytest.raises(ValueError, match=rf"{name} is an input, and what is written for .* would overwrite it; choose another folder"):
        predict_files(segmenter, [first, path], out, task)
    assert path.read_bytes() == before
    assert [inside for inside in out.rglob("*") if inside.is_file()] == [path]


def draw(path):
    """A mask by another program, as a file or a zarr array with attributes of its own."""
    if path.suffix == ".zarr":
        zarr = pytest.importorskip("zarr")
        zarr.create_array(path, shape=(8, 8), dtype="uint8", attributes={"layer": "roads drawn by hand"})[:] = 3
        return path / "zarr.json"
    path.parent.mkdir(exist_ok=True)
    Image.fromarray(noise(8, 8)).save(path)
    return path


@pytest.mark.parametrize("format", ["png", "tif", "zarr"])
def test_labels_replace_predicted_ones_but_never_what_perpixel_has_not_predicted(segmenter, tmp_path, out, format):
    """`predict model.safetensors photos -o masks` would replace what a person has drawn for days."""
    image, target = save(tmp_path / "in" / "a.jpg", noise(8, 8, 3)), out / f"a.{format}"
    for _ in range(2):
        assert predict_files(segmenter, [image], out, Task(format=format)).written == [target]
    shutil.rmtree(target) if target.is_dir() else target.unlink()
    drawn = draw(target)
    before = drawn.read_bytes()
    with pytest.raises(ValueError, match=rf"a\.{format} is there, and does not say that perpixel has predicted it: choose another folder"):
        predict_files(segmenter, [save(tmp_path / "in" / "0.png", noise(8, 8, 3)), image], out, Task(format=format))
    assert drawn.read_bytes() == before
    assert [path for path in out.iterdir() if not path.name.startswith(".")] == [target]  # told before the first is predicted


def test_a_mask_under_a_name_that_the_labels_of_a_tiff_do_not_get_is_left_alone_and_one_under_theirs_refused(segmenter, tmp_path, out):
    """A TIFF's labels are .png, or .tif where it has a place; only reading it tells."""
    other = save(tmp_path / "0.png", noise(8, 8, 3))
    tifffile.imwrite(tmp_path / "a.tif", noise(8, 8, 3), photometric="rgb")
    drawn = draw(out / "a.tif")
    before = drawn.read_bytes()
    assert predict_files(segmenter, [other, tmp_path / "a.tif"], out).written == [out / "0.png", out / "a.png"]
    for path in (out / "0.png", out / "a.png"):
        path.unlink()
    draw(out / "a.png")
    with pytest.raises(ValueError, match=r"a\.png is there, and does not say"):
        predict_files(segmenter, [other, tmp_path / "a.tif"], out)
    assert drawn.read_bytes() == before
    assert not (out / "0.png").exists()


def test_an_interrupted_prediction_goes_on_where_labels_it_had_written_were_corrected_meanwhile(segmenter, tmp_path, out):
    images = [save(tmp_path / "in" / f"{number}.png", noise(8, 8, 3, seed=number)) for number in range(3)]
    (tmp_path / "in" / "1.png").write_bytes(b"")
    with pytest.raises(ValueError, match="empty"):
        predict_files(segmenter, images, out, Task(strict=True))
    corrected = draw(out / "0.png").read_bytes()
    save(tmp_path / "in" / "1.png", noise(8, 8, 3, seed=1))
    result = predict_files(segmenter, images, out, Task(strict=True))
    assert (len(result.written), result.before) == (3, 1)
    assert (out / "0.png").read_bytes() == corrected


def test_an_empty_file_in_the_place_of_labels_is_replaced(segmenter, tmp_path, out):
    image = save(tmp_path / "in" / "a.jpg", noise(8, 8, 3))
    out.mkdir()
    (out / "a.png").touch()
    predict_files(segmenter, [image], out)
    assert Image.open(out / "a.png").size == (8, 8)


def test_labels_never_overwrite_a_sheet_of_a_mosaic_that_is_read(segmenter, tmp_path):
    rasterio = pytest.importorskip("rasterio")
    tifffile.imwrite(tmp_path / "a.tif", noise(32, 32, 3), photometric="rgb")
    sheet = '<SourceFilename relativeToVRT="1">a.tif</SourceFilename>'
    bands = [
        f'<VRTRasterBand dataType="Byte" band="{band}"><SimpleSource>{sheet}<SourceBand>{band}</SourceBand></SimpleSource></VRTRasterBand>'
        for band in (1, 2, 3)
    ]
    (tmp_path / "a.vrt").write_text(f'<VRTDataset rasterXSize="32" rasterYSize="32">{"".join(bands)}</VRTDataset>')
    before = (tmp_path / "a.tif").read_bytes()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", rasterio.errors.NotGeoreferencedWarning)
        with pytest.raises(ValueError, match=r"a\.tif is an input, and what is written for .*a\.vrt would overwrite it"):
            predict_files(segmenter, [tmp_path / "a.vrt"], tmp_path, Task(format="tif"))
    assert (tmp_path / "a.tif").read_bytes() == before


@pytest.mark.parametrize("format", ["png", "tif", "zarr"])
def test_names_of_many_bytes_are_predicted_and_one_too_long_for_its_output_is_named(segmenter, tmp_path, out, format):
    """A file name has at most 255 bytes, of which these characters take three each; temporary names are longer than the outputs'."""
    long = save(tmp_path / "in" / ("\u6f22" * 83 + ".png"), noise(8, 8, 3))
    save(tmp_path / "in" / f"{'x' * 251}.png", noise(8, 8, 3))
    result = predict_files(segmenter, [tmp_path / "in"], out, Task(format=format))
    assert (out / f"{long.stem}.{format}").exists()
    assert len(result.written) == (1 if format == "zarr" else 2)
    assert ["more than the 255 bytes" in message for message in result.damaged.values()] == ([True] if format == "zarr" else [])


def test_labels_beside_images_of_another_suffix_are_fine(segmenter, tmp_path):
    save(tmp_path / "photos" / "a.jpg", noise(8, 8, 3))
    assert predict_files(segmenter, [tmp_path / "photos"], tmp_path / "photos").written == [tmp_path / "photos" / "a.png"]


def test_many_classes_are_written_with_sixteen_bits(make_bundle, tmp_path, out):
    segmenter = load(make_bundle(classes=300, width=1), device="cpu")
    path = save(tmp_path / "a.png", noise(32, 32, 3))
    predict_files(segmenter, [path], out, Task(overlay=True))
    labels = segmenter.predict(path)
    assert labels.dtype == np.uint16
    assert np.array_equal(np.asarray(Image.open(out / "a.png")), labels)
    assert (out / "overlays" / "a.jpg").exists()


def test_what_is_no_bundle_is_refused_when_it_is_loaded(tmp_path):
    (tmp_path / "a.safetensors").write_bytes(b"no")
    with pytest.raises(ValueError, match=r"a\.safetensors: not a bundle"):
        perpixel.load(str(tmp_path / "a.safetensors"))


# ---- Monte Carlo dropout


@pytest.fixture
def bayesian(make_bundle):
    return make_bundle(model="bayesian_segnet_basic_paper", width=4)


def test_samples_label_by_the_mean_and_write_the_uncertainty(bayesian, tmp_path, out):
    segmenter = load(bayesian, device="cpu")
    path = save(tmp_path / "a.png", noise(33, 50, 3))
    predict_files(segmenter, [path], out, Task(probabilities=True, samples=5))
    result = segmenter.monte_carlo(path, 5)
    assert np.array_equal(np.asarray(Image.open(out / "a.png")), result.mean.argmax(0).numpy())
    assert np.array_equal(segmenter.predict(path, samples=5), result.mean.argmax(0).numpy())
    np.testing.assert_allclose(np.load(out / "probabilities" / "a.npy"), result.mean, atol=1e-3)
    uncertainty = np.load(out / "uncertainty" / "a.npy", allow_pickle=False)
    assert (uncertainty.dtype, uncertainty.shape) == (np.float16, (33, 50))
    np.testing.assert_allclose(uncertainty, result.variance.mean(0), atol=1e-3)
    assert uncertainty.max() > 0


def test_samples_of_a_model_without_dropout_are_refused_before_anything_is_written(segmenter, tmp_path, out):
    path = save(tmp_path / "a.png", noise(33, 50, 3))
    with pytest.raises(ValueError, match="has no dropout"):
        predict_files(segmenter, [path], out, Task(samples=3))
    assert not out.exists()
    with pytest.raises(ValueError, match="has no dropout"):
        segmenter.predict(path, samples=3)


def test_samples_with_a_refiner_asked_for_by_name_are_refused(command, bayesian, tmp_path, out):
    path = save(tmp_path / "a.png", noise(20, 20, 3))
    said = command("predict", bayesian, path, "-o", out, "--samples", "2", "--refine", "dense_crf")
    assert said.code == 2
    assert "leave out either the samples or the refiner (dense_crf)" in said.err
    assert not out.exists()


def test_samples_on_the_command_line(command, bayesian, tmp_path, out):
    path = save(tmp_path / "a.png", noise(20, 20, 3))
    assert command("predict", bayesian, path, "-o", out, "--samples", "2").code == 0
    assert (out / "uncertainty" / "a.npy").is_file()
    assert command("predict", bayesian, path, "-o", out, "--samples", "0").code == 2


# ---- values that the model was not trained on


def faint_warnings(bundle, folder, out):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        predict_files(load(bundle, device="cpu"), [folder], out)
    return [str(warning.message) for warning in caught if "16-bit" in str(warning.message)]


@pytest.mark.parametrize("dtype", ["uint8", "uint16"])
def test_12_bit_images_in_16_bit_files_are_warned_of_once_and_not_once_they_are_rescaled(make_bundle, tmp_path, out, dtype):
    bundle, pixels = make_bundle(bands=1, dtype=dtype), noise(40, 50, dtype=np.uint16) // 16
    pixels[0, 0] = 4095
    for name in ("a", "b"):
        save(tmp_path / "cells" / f"{name}.png", pixels)
    told = faint_warnings(bundle, tmp_path / "cells", out)
    assert len(told) == 1
    assert "a.png: a 16-bit image whose largest value is about 4" in told[0]
    assert "Multiply values of 12 bits by 16, of 8 bits by 257" in told[0]
    for name in ("a", "b"):
        save(tmp_path / "cells" / f"{name}.png", pixels * 16)
    assert not faint_warnings(bundle, tmp_path / "cells", out)


def test_dark_images_are_not_warned_of_where_they_have_8_bits_or_the_model_was_trained_on_such_ones(make_bundle, tmp_path, out):
    save(tmp_path / "dark" / "a.png", noise(40, 50) // 16)
    assert not faint_warnings(make_bundle(bands=1), tmp_path / "dark", out)
    save(tmp_path / "dark" / "a.png", noise(40, 50, dtype=np.uint16) // 16)
    loaded = load(make_bundle(bands=1, dtype="uint16"), device="cpu")
    loaded.bundle.card.mean, loaded.bundle.card.std = [0.03], [0.02]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        predict_files(loaded, [tmp_path / "dark"], out)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.853553, 0.99])
def test_what_a_model_surely_saw_is_never_more_than_what_it_saw(make_bundle, share):
    """Data of 0 and m alone, the worst case: the bound is met at (2 + sqrt 2) / 4, and never passed."""
    bundle, data = load_bundle(make_bundle(bands=1)), 0.25 * (np.arange(10**6) < share * 10**6)
    bundle.card.mean, bundle.card.std = [float(data.mean())], [float(data.std())]
    assert not bundle.saw_above(0.25001)
    assert bundle.saw_above(0.2499) == (share == 0.853553)


def test_integers_of_another_type_than_the_model_s_are_named_by_it(segmenter):
    for dtype in (np.int64, np.int32, np.uint32):
        with pytest.raises(ValueError, match=rf"of type {np.dtype(dtype)}; this model was trained on uint8. Give them as uint8"):
            segmenter.predict(np.ones((8, 8, 3), dtype))
    with pytest.raises(ValueError, match=r"of type torch\.int64"):
        segmenter.predict(torch.ones((3, 8, 8), dtype=torch.int64))


def test_a_folder_and_a_device_that_is_not_there_are_named(make_bundle, segmenter, tmp_path):
    with pytest.raises(ValueError, match="is a folder; give one file at a time"):
        segmenter.predict(tmp_path)
    with pytest.raises(ValueError, match="device 'nonsense' cannot be used here"):
        load(make_bundle(), device="nonsense")
