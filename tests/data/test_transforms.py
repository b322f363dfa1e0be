"""Normalisation and augmentation, compared with numpy, torchvision, colorsys and brute force."""

import colorsys
import math
import time

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torchvision.transforms.v2 import functional as vision

from perpixel.data.transforms import DRAWS, Augmentation, Normalize, elastic_displacement

DEFORMED = {"scale": (0.5, 2.0), "flip_horizontal": True, "flip_vertical": True, "rotate90": True, "rotation": 30.0, "elastic_sigma": 4.0}
EVERYTHING = {**DEFORMED, "brightness": 0.4, "contrast": 0.4, "saturation": 0.4, "hue": 0.1}
GEOMETRY = {
    "crop": {},
    "zoom": {"scale": (0.4, 2.5)},
    "flips": {"flip_horizontal": True, "flip_vertical": True},
    "turns": {"rotate90": True},
    "rotation": {"rotation": 180.0},
    "rotation and zoom": {"rotation": 45.0, "scale": (0.4, 2.5)},
    "elastic": {"elastic_sigma": 5.0},
    "margin": {"margin": 6, "scale": (0.5, 2.0)},
    "all": {"margin": 4, **DEFORMED},
}


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def picture(height: int, width: int, bands: int = 3, seed: int = 0) -> Tensor:
    return torch.randint(0, 256, (bands, height, width), generator=generator(seed), dtype=torch.uint8)


def positions(height: int, width: int) -> tuple[Tensor, Tensor]:
    """An image whose two bands are row and column, and labels that number the pixels: both say where they come from."""
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return torch.stack((rows, columns)).float(), rows * width + columns


# On a device


@pytest.mark.parametrize("kind", [torch.uint8, torch.uint16, torch.float32])
@pytest.mark.parametrize("steps", [{}, {"scale": (0.3, 3.0)}, DEFORMED, EVERYTHING])
def test_all_that_follows_the_cut_happens_on_the_device_and_waits_for_nothing(kind, steps):
    """A stand-in for a GPU: tensors without values, which raise where a value is asked for or two devices are mixed."""
    image, labels = picture(70, 90).to(kind), torch.zeros(70, 90, dtype=torch.int64)
    augmentation = Augmentation(crop=(40, 48), **steps)
    for seed in range(8):
        cut = augmentation.cut(image, labels, generator(seed))[0]
        with FakeTensorMode(allow_non_fake_inputs=True) as device:
            there = cut._replace(region=device.from_tensor(cut.region), grid=None if cut.grid is None else device.from_tensor(cut.grid))
            made = augmentation.render(there, "cuda")
            with pytest.raises(DataDependentOutputException):  # the stand-in does notice
                float(made.to(torch.float32).mean())
        assert (made.device.type, made.shape) == ("cuda", (3, 40, 48))
        assert made.dtype == (torch.uint8 if kind == torch.uint8 else torch.float32)


def test_a_sample_is_the_same_within_autocast():
    """As where batch norm is measured in bfloat16, whose 8 bits would change colours."""
    image, labels = picture(70, 90), torch.zeros(70, 90, dtype=torch.int64)
    augmentation = Augmentation(crop=(40, 48), **EVERYTHING)
    plain = augmentation(image, labels, generator())[0]
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(augmentation(image, labels, generator())[0], plain)


# Normalize


@pytest.mark.parametrize(("kind", "scale"), [(np.uint8, 255.0), (np.uint16, 65535.0), (np.float32, 1.0)])
def test_normalisation_is_scale_then_mean_then_deviation(kind, scale):
    stored = (np.random.default_rng(0).random((2, 3, 4, 5)) * scale).astype(kind)
    mean, std = np.array([0.2, 0.5, 0.7]), np.array([0.1, 1.0, 2.0])
    image = torch.from_numpy(stored.copy())
    result = Normalize(scale, tuple(mean), tuple(std))(image)
    expected = (stored.astype(np.float64) / scale - mean[:, None, None]) / std[:, None, None]
    assert result.dtype == torch.float32
    np.testing.assert_allclose(result.numpy(), expected, atol=2e-6)
    np.testing.assert_array_equal(image.numpy(), stored)  # the picture that came in is left alone


def test_normalisation_keeps_channels_last():
    batch = torch.rand(2, 3, 4, 5).to(memory_format=torch.channels_last)
    assert Normalize(1, (0.0,) * 3, (1.0,) * 3)(batch).is_contiguous(memory_format=torch.channels_last)


def test_normalisation_refuses_another_number_of_bands():
    with pytest.raises(ValueError, match=r"shape \(1, 8, 8\).*3 bands"):
        Normalize(255, (0.5,) * 3, (0.2,) * 3)(torch.zeros(1, 8, 8))


@pytest.mark.parametrize("arguments", [(255, (0.5,), (0.2, 0.2)), (0, (0.5,), (0.2,)), (255, (0.5,), (0.0,)), (255, (0.5,), (math.nan,))])
def test_normalisation_that_would_divide_by_zero_is_refused(arguments):
    with pytest.raises(ValueError, match=r"per band|above 0"):
        Normalize(*arguments)


# Augmentation: what must hold for every step


def test_nothing_is_changed_when_nothing_is_asked_for():
    image, labels, weights = picture(20, 30), torch.randint(0, 5, (20, 30)), torch.rand(20, 30)
    same_image, same_labels, same_weights = Augmentation((20, 30))(image, labels, generator(), weights)
    assert torch.equal(same_image, image)
    assert torch.equal(same_labels, labels)
    assert torch.equal(same_weights, weights)


def test_a_sample_is_a_function_of_the_generator_alone():
    image, labels, weights = picture(50, 60), torch.randint(0, 5, (50, 60), dtype=torch.uint8), torch.rand(50, 60)
    kept = image.clone(), labels.clone(), weights.clone()
    augment = Augmentation((32, 40), **EVERYTHING, rare_class_probability=0.5, class_pixels=(9, 9, 9, 9, 1))
    torch.manual_seed(1)
    first = augment(image, labels, generator(7), weights)
    state = torch.get_rng_state()
    torch.manual_seed(2)
    again = augment(image, labels, generator(7), weights)
    other = augment(image, labels, generator(8), weights)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], other[0])
    torch.manual_seed(1)
    assert torch.equal(torch.get_rng_state(), state)  # the global generator is not touched
    assert all(torch.equal(a, b) for a, b in zip((image, labels, weights), kept, strict=True))


@pytest.mark.parametrize("name", GEOMETRY)
def test_image_and_labels_come_from_the_same_place(name):
    """Image and labels both carry their own position. A label is from the source pixel nearest to where the image was sampled."""
    image, labels = positions(70, 90)
    augment = Augmentation((48, 56), **GEOMETRY[name])
    for seed in range(12):
        taken, picked, _ = augment(image, labels + 256, generator(seed))
        margin = augment.margin
        inner = taken[:, margin : 48 - margin, margin : 56 - margin]
        assert inner.shape[1:] == picked.shape
        rows, columns = (picked - 256) // 90, (picked - 256) % 90
        # Near the picture's border, and the crop's, the resizer's low-pass has pixels on one side only.
        known = (picked != 255) & (rows > 4) & (rows < 65) & (columns > 4) & (columns < 85)
        known[:3] = known[-3:] = False
        known[:, :3] = known[:, -3:] = False
        assert known.any()
        # Half a pixel is the rounding of "nearest"; the resizer's low-pass, sampled at few pixels, leans a little to one side.
        assert (inner[0] - rows)[known].abs().max() < 0.6, name
        assert (inner[1] - columns)[known].abs().max() < 0.6, name


@pytest.mark.parametrize("name", GEOMETRY)
def test_an_image_that_equals_its_labels_equals_them_after_any_step(name):
    """Blocks of 16 x 20 pixels: inside a block bilinear and nearest agree."""
    labels = ((torch.arange(80)[:, None] // 16 + torch.arange(100)[None] // 20) % 4 * 60).to(torch.uint8)
    agreeing, total = 0, 0
    for seed in range(10):
        taken, picked, _ = Augmentation((64, 64), **GEOMETRY[name])(labels[None], labels, generator(seed))
        margin = (64 - picked.shape[0]) // 2
        known = picked != 255
        agreeing += int(((taken[0, margin : 64 - margin, margin : 64 - margin].int() - picked.int()).abs()[known] < 8).sum())
        total += int(known.sum())
    assert agreeing / total > 0.75  # the rest lies on block borders; an independent pair agrees in a quarter of the pixels


@pytest.mark.parametrize(("kind", "ignore"), [(torch.uint8, 255), (torch.uint16, 65535), (torch.int64, 255), (torch.int64, 65535)])
def test_labels_only_take_values_that_were_in_them_or_ignore(kind, ignore):
    values = torch.tensor([0, 7, 200])
    labels = values[torch.randint(0, 3, (40, 50), generator=generator())].to(kind)
    weights = torch.tensor([0.25, 8.0])[torch.randint(0, 2, (40, 50), generator=generator())]
    augment = Augmentation((64, 48), **EVERYTHING, rare_class_probability=0.5, class_pixels=(1,) * 201, ignore=ignore)
    seen = set()
    for seed in range(20):
        _, picked, heavy = augment(picture(40, 50), labels, generator(seed), weights)
        assert picked.dtype == kind
        assert picked.shape == heavy.shape == (64, 48)
        assert torch.equal(heavy == 0, picked.to(torch.int64) == ignore)  # outside the picture nothing is learned
        assert set(heavy.unique().tolist()) <= {0.0, 0.25, 8.0}
        seen |= set(picked.to(torch.int64).unique().tolist())
    assert seen == {0, 7, 200, ignore}


@pytest.mark.parametrize("kind", [torch.uint8, torch.uint16, torch.float32])
@pytest.mark.parametrize("size", [(1, 1), (1, 30), (30, 1), (3, 2), (40, 40)])
@pytest.mark.parametrize("bands", [1, 2, 3, 5])
def test_any_picture_from_one_pixel_up_gives_a_full_crop(size, bands, kind):
    image = picture(*size, bands=bands).to(torch.int32).to(kind)
    for options in ({}, EVERYTHING):
        taken, picked, _ = Augmentation((24, 16), margin=2, **options)(image, torch.zeros(size, dtype=torch.uint8), generator(3))
        assert taken.shape == (bands, 24, 16)
        assert taken.dtype == (torch.uint8 if kind == torch.uint8 else torch.float32)
        assert taken.is_contiguous()
        assert picked.shape == (20, 12)
        assert options or (picked == 0).any()  # deformation may push a speck of a picture out of sight, placing it may not


# Augmentation: each step


def test_zooming_by_two_repeats_each_label_twice():
    labels = torch.randint(0, 9, (12, 15), dtype=torch.uint8)
    taken, picked, _ = Augmentation((24, 30), scale=(2, 2))(picture(12, 15), labels, generator())
    np.testing.assert_array_equal(picked.numpy(), labels.numpy().repeat(2, 0).repeat(2, 1))
    # Bilinear with pixel centres: the second pixel down lies three quarters on the first source row, a quarter on the next.
    source = picture(12, 15).float()
    expected = (0.75 * source[:, 0] + 0.25 * source[:, 1])[:, 0] * 0.75 + (0.75 * source[:, 0] + 0.25 * source[:, 1])[:, 1] * 0.25
    torch.testing.assert_close(taken[:, 1, 1].float(), expected, atol=1, rtol=0)


def test_zooming_out_does_not_alias():
    """Fine stripes become their mean grey, not black or white; also on the way through rotation."""
    board = ((torch.arange(128)[:, None] + torch.arange(128)) % 2 * 200).to(torch.uint8)  # one pixel wide
    for options in ({}, {"rotation": 20.0}):
        taken, _, _ = Augmentation((32, 32), scale=(0.3, 0.3), **options)(board[None], board, generator())
        assert (taken.float() - 100).abs().mean() < 12


def test_a_picture_smaller_than_the_crop_goes_on_as_its_mirror_image_without_labels():
    """numpy.pad repeats a reflection as often as needed; the labels say where the picture itself was put."""
    image, labels = picture(5, 4), torch.ones(5, 4, dtype=torch.uint8)
    places = set()
    for seed in range(40):
        taken, picked, _ = Augmentation((17, 16))(image, labels, generator(seed))
        rows, columns = (picked == 1).nonzero().T
        top, left = int(rows.min()), int(columns.min())
        assert len(rows) == 20
        padded = np.pad(image.numpy(), ((0, 0), (top, 12 - top), (left, 12 - left)), mode="reflect")
        np.testing.assert_array_equal(taken.numpy(), padded)
        assert set(picked.unique().tolist()) == {1, 255}
        places.add((top, left))
    assert len(places) > 25


def test_labels_of_a_margin_model_are_the_middle_and_lie_in_the_picture():
    """The unlabelled margin may hang over the border, where it is mirrored (arXiv:1505.04597, Fig. 2); so every pixel gets its turn."""
    _, labels = positions(20, 24)
    image = labels[None].float()
    first, last = 0, 0
    for seed in range(300):
        taken, picked, _ = Augmentation((16, 16), margin=4, ignore=2**20)(image, labels, generator(seed))
        assert picked.shape == (8, 8)
        assert picked.max() < 20 * 24
        torch.testing.assert_close(taken[0, 4:-4, 4:-4], picked.float())
        top, left = divmod(int(picked[0, 0]), 24)
        padded = np.pad(image[0].numpy(), 4, mode="reflect")
        np.testing.assert_array_equal(taken[0].numpy(), padded[top : top + 16, left : left + 16])
        first += (top, left) == (0, 0)
        last += (top, left) == (12, 16)
    assert first
    assert last


def test_flips_and_quarter_turns_give_the_eight_symmetries_of_a_rectangle():
    image = picture(12, 12, bands=1)
    expected = {np.rot90(m, k).tobytes() for m in (image[0].numpy(), image[0].numpy()[:, ::-1]) for k in range(4)}
    augment = Augmentation((12, 12), flip_horizontal=True, flip_vertical=True, rotate90=True)
    found = set()
    for seed in range(120):
        taken, picked, _ = augment(image, image[0], generator(seed))
        assert torch.equal(taken[0], picked)
        found.add(taken.numpy().tobytes())
    assert found == expected
    turned = {Augmentation((12, 12), rotate90=True)(image, image[0], generator(seed))[0].numpy().tobytes() for seed in range(40)}
    assert turned == {np.rot90(image[0].numpy(), k).tobytes() for k in range(4)}
    assert Augmentation((8, 12), rotate90=True)(image, image[0], generator(1))[0].shape == (1, 8, 12)


@pytest.mark.parametrize("zoom", [1.0, 1.7])
def test_a_deformation_of_almost_nothing_is_the_plain_window(zoom):
    """Two ways to resample, one alignment: whole rows or half pixels off would show."""
    image, labels = picture(30, 40), torch.randint(0, 200, (30, 40), dtype=torch.uint8)
    for seed in range(5):
        plain = Augmentation((24, 20), scale=(zoom, zoom))(image, labels, generator(seed))
        warped = Augmentation((24, 20), scale=(zoom, zoom), elastic_sigma=1e-4)(image, labels, generator(seed))
        assert (plain[0].int() - warped[0].int()).abs()[:, 2:-2, 2:-2].max() <= 1
        assert (plain[1] == warped[1]).float().mean() > 0.97


def test_a_half_turn_of_rotation_is_two_flips():
    """The angle is drawn, so this looks for the draw nearest to a half turn; on a coarse pattern a degree more or less does not tell."""
    blocks = torch.randint(0, 256, (1, 6, 6), generator=generator(), dtype=torch.uint8)
    image = blocks.repeat_interleave(10, 1).repeat_interleave(10, 2)
    seed = max(range(300), key=lambda s: abs(float(torch.rand(DRAWS, generator=generator(s))[7]) - 0.5))
    taken, _, _ = Augmentation((60, 60), rotation=180.0)(image, image[0], generator(seed))
    turned = image.flip((1, 2))
    assert (taken[0, 5::10, 5::10].int() - turned[0, 5::10, 5::10].int()).abs().max() <= 1
    assert not torch.equal(image, turned)


@pytest.mark.parametrize("step", ["brightness", "contrast", "saturation"])
def test_colour_steps_agree_with_torchvision(step):
    image = picture(16, 20)
    judge = {"brightness": vision.adjust_brightness, "contrast": vision.adjust_contrast, "saturation": vision.adjust_saturation}[step]
    number = 10 + ["brightness", "contrast", "saturation"].index(step)
    for seed in range(8):
        factor = 1 + 0.5 * (2 * float(torch.rand(DRAWS, generator=generator(seed))[number]) - 1)
        taken, _, _ = Augmentation((16, 20), **{step: 0.5})(image, image[0], generator(seed))
        torch.testing.assert_close(taken.float(), judge(image.float() / 255, factor) * 255, atol=0.6, rtol=0)


def test_colour_steps_together_agree_with_torchvision_one_after_the_other():
    image = (90 + picture(16, 20) / 4).to(torch.uint8)  # nothing is clipped on the way
    for seed in range(8):
        factors = [1 + 0.3 * (2 * float(u) - 1) for u in torch.rand(DRAWS, generator=generator(seed))[10:13]]
        taken, _, _ = Augmentation((16, 20), brightness=0.3, contrast=0.3, saturation=0.3)(image, image[0], generator(seed))
        expected = image.float() / 255
        for judge, factor in zip((vision.adjust_brightness, vision.adjust_contrast, vision.adjust_saturation), factors, strict=True):
            expected = judge(expected, factor)
        torch.testing.assert_close(taken.float(), expected * 255, atol=0.6, rtol=0)


def test_hue_turns_chroma_in_the_yiq_plane():
    """colorsys has the same colour space with coefficients rounded to two or three digits."""
    image = 100 + picture(6, 6).float() / 5  # far from the limits of uint8, which would clip
    for seed in range(4):
        angle = 2 * math.pi * 0.2 * (2 * float(torch.rand(DRAWS, generator=generator(seed))[13]) - 1)
        taken, _, _ = Augmentation((6, 6), hue=0.2)(image, torch.zeros(6, 6, dtype=torch.uint8), generator(seed))
        for before, after in zip(image.flatten(1).T.tolist(), taken.flatten(1).T.tolist(), strict=True):
            y, i, q = colorsys.rgb_to_yiq(*before)
            turned = (y, i * math.cos(angle) - q * math.sin(angle), i * math.sin(angle) + q * math.cos(angle))
            # yiq_to_rgb clips to 0..1, so work on the scale of 1
            expected = [255 * c for c in colorsys.yiq_to_rgb(*(v / 255 for v in turned))]
            np.testing.assert_allclose(after, expected, atol=1.5)


def test_colour_steps_touch_only_images_of_one_or_three_bands():
    colours = {"brightness": 0.5, "contrast": 0.5, "saturation": 0.5, "hue": 0.1}
    for bands, touched in ((1, True), (2, False), (3, True), (4, False)):
        image = picture(8, 8, bands=bands)
        taken, _, _ = Augmentation((8, 8), **colours)(image, image[0], generator(1))
        assert torch.equal(taken, image) != touched
    grey = picture(8, 8, bands=1)
    assert torch.equal(Augmentation((8, 8), saturation=1.0, hue=0.5)(grey, grey[0], generator(1))[0], grey)


def test_sixteen_bit_images_keep_their_range():
    image = (picture(30, 30).to(torch.int32) * 257).to(torch.uint16)
    taken, _, _ = Augmentation((30, 30))(image, torch.zeros(30, 30, dtype=torch.uint8), generator())
    torch.testing.assert_close(taken, image.to(torch.float32))
    bright = [Augmentation((30, 30), **EVERYTHING)(image, torch.zeros(30, 30, dtype=torch.uint8), generator(s))[0] for s in range(10)]
    assert max(float(b.max()) for b in bright) == 65535
    assert min(float(b.min()) for b in bright) == 0


# Rare classes


def test_a_rare_class_is_in_every_window_that_was_laid_for_it():
    labels = torch.zeros(100, 120, dtype=torch.uint8)
    labels[30, 70] = 1
    image = picture(100, 120)
    counts = {}
    for probability in (0.0, 0.5, 1.0):
        augment = Augmentation((24, 32), rare_class_probability=probability, class_pixels=(10**9, 1))
        windows = [augment(image, labels, generator(seed))[1] for seed in range(200)]
        counts[probability] = sum(int((window == 1).any()) for window in windows)
        if probability == 1:
            rows, columns = torch.stack([(window == 1).nonzero()[0] for window in windows]).T
            assert (rows.min(), rows.max()) >= (6, 6)  # the middle half of 24 rows
            assert rows.max() <= 18
            assert columns.min() >= 8
            assert columns.max() <= 24
            assert rows.unique().numel() > 8
    assert counts[1.0] == 200
    assert 80 < counts[0.5] < 140
    assert counts[0.0] < 40


def test_classes_are_drawn_with_odds_of_one_over_their_pixels():
    """Classes 1 and 2 in two corners too far apart for one window; class 2 is three times as frequent in the set."""
    labels = torch.full((100, 100), 255, dtype=torch.uint8)
    labels[10, 10], labels[90, 90] = 1, 2
    augment = Augmentation((16, 16), rare_class_probability=1.0, class_pixels=(5, 100, 300))
    windows = [augment(picture(100, 100), labels, generator(seed))[1] for seed in range(400)]
    first, second = (sum(int((window == k).any()) for window in windows) for k in (1, 2))
    assert first + second == 400
    assert 2.2 < first / second < 4.1


def test_a_picture_without_labels_still_gives_a_window():
    labels = torch.full((20, 20), 255, dtype=torch.uint8)
    _, picked, _ = Augmentation((8, 8), rare_class_probability=1.0, class_pixels=(5, 5))(picture(20, 20), labels, generator())
    assert (picked == 255).all()


# Elastic deformation


def keys(t: float, a: float = -0.75) -> float:
    """Cubic convolution kernel (Keys 1981) with the usual a."""
    t = abs(t)
    if t < 1:
        return (a + 2) * t**3 - (a + 3) * t**2 + 1
    return a * t**3 - 5 * a * t**2 + 8 * a * t - 4 * a if t < 2 else 0.0


def test_elastic_displacement_is_bicubic_between_the_nodes():
    height, width, grid = 13, 9, 3
    field = elastic_displacement(height, width, generator(4), grid, sigma=10.0)
    nodes = 10.0 * torch.randn(1, 2, grid, grid, generator=generator(4))[0]
    expected = torch.zeros(2, height, width)
    for row in range(height):
        for column in range(width):
            y, x = row * (grid - 1) / (height - 1), column * (grid - 1) / (width - 1)
            for i in range(-2, grid + 2):
                for j in range(-2, grid + 2):
                    node = nodes[:, min(max(i, 0), grid - 1), min(max(j, 0), grid - 1)]
                    expected[:, row, column] += keys(y - i) * keys(x - j) * node
    torch.testing.assert_close(field, expected, atol=1e-4, rtol=1e-4)


def test_elastic_nodes_spread_by_sigma():
    """arXiv:1505.04597, section 3.1: Gaussian with 10 pixels standard deviation on a 3 x 3 grid."""
    fields = torch.stack([elastic_displacement(5, 5, generator(seed)) for seed in range(200)])
    nodes = fields[:, :, ::2, ::2]  # a 5x5 tile has the nodes on every second pixel
    assert abs(float(nodes.std()) - 10) < 0.5
    assert abs(float(nodes.mean())) < 0.5


# Errors


OUT_OF_RANGE = [{"crop": (0, 8)}] + [
    {"crop": (8, 8), name: value}
    for name, values in {
        "margin": (4, -1),
        "scale": ((0.0, 1.0), (2.0, 1.0)),
        "rotation": (200.0,),
        "brightness": (1.5,),
        "hue": (0.6,),
        "elastic_sigma": (-1.0,),
        "elastic_grid": (1,),
        "rare_class_probability": (2.0, 0.5),
    }.items()
    for value in values
]


@pytest.mark.parametrize("options", OUT_OF_RANGE, ids=str)
def test_an_augmentation_out_of_range_is_refused(options):
    with pytest.raises(ValueError, match="augmentation cannot be done"):
        Augmentation(**options)


def test_shapes_that_do_not_belong_together_are_refused():
    augment, labels = Augmentation((8, 8)), torch.zeros(10, 12, dtype=torch.uint8)
    for image, weights in ((picture(12, 10), None), (picture(10, 12)[0], None), (picture(10, 12), torch.ones(12, 10))):
        with pytest.raises(ValueError, match="do not belong together"):
            augment(image, labels, generator(), weights)
    with pytest.raises(ValueError, match="ignore 65535 does not fit"):
        Augmentation((8, 8), ignore=65535)(picture(10, 12), labels, generator())


# Speed


def test_a_camvid_sample_takes_milliseconds(one_thread):
    """360x480 RGB to 320x320 with zoom, crop, flip and colour: about 2 ms on one core; the best of 15 forgives a busy machine."""
    augment = Augmentation((320, 320), scale=(0.5, 2.0), flip_horizontal=True, brightness=0.3, contrast=0.3, saturation=0.3, hue=0.05)
    image, labels = picture(360, 480), torch.randint(0, 11, (360, 480), dtype=torch.uint8)
    taken = []
    for seed in range(15):
        start = time.process_time()
        augment(image, labels, generator(seed))
        taken.append(time.process_time() - start)
    assert min(taken) < 0.01
