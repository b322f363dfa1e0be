"""The generated scenes: well-formed, and impossible without context."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional

from perpixel.data.samples import BIRD, CLASSES, COLORS, FISH, REEDS, SKY, WATER, generate, write_samples
from perpixel.models import build

HEIGHT, WIDTH = 96, 128
TRAIN, VAL = range(96), range(1000, 1024)


def scenes(indices: range, height: int = HEIGHT, width: int = WIDTH) -> tuple[torch.Tensor, torch.Tensor]:
    """Images (N, 3, H, W) uint8 and labels (N, H, W) int64."""
    pictures, labels = zip(*(generate(index, 0, height, width) for index in indices), strict=True)
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2), torch.from_numpy(np.stack(labels)).long()


@pytest.fixture(scope="module")
def train_scenes():
    return scenes(TRAIN)


@pytest.fixture(scope="module")
def val_scenes():
    return scenes(VAL)


def iou(labels: torch.Tensor, predicted: torch.Tensor) -> np.ndarray:
    overlap = [((labels == k) & (predicted == k)).sum() / ((labels == k) | (predicted == k)).sum() for k in range(len(CLASSES))]
    return np.array([float(x) for x in overlap])


def balance(labels: torch.Tensor) -> torch.Tensor:
    """Class weights 1 / log(1.1 + share), so that few pixels of an animal count in a short training."""
    return 1 / torch.log(1.1 + torch.bincount(labels.flatten(), minlength=len(CLASSES)) / labels.numel())


def test_a_scene_is_a_function_of_its_number_seed_and_size():
    image, labels = generate(3, seed=5, height=64, width=80)
    assert (image.shape, image.dtype) == ((64, 80, 3), np.uint8)
    assert (labels.shape, labels.dtype) == ((64, 80), np.uint8)
    again, same = generate(3, seed=5, height=64, width=80)
    np.testing.assert_array_equal(image, again)
    np.testing.assert_array_equal(labels, same)
    for other in (generate(4, 5, 64, 80), generate(3, 6, 64, 80)):
        assert (other[0] != image).mean() > 0.5


@pytest.mark.parametrize(("height", "width"), [(32, 32), (33, 200), (200, 32), (96, 128)])
def test_any_size_from_32_pixels_can_be_drawn(height, width):
    for index in range(6):
        image, labels = generate(index, 1, height, width)
        assert image.shape == (height, width, 3)
        assert set(np.unique(labels)) <= set(range(5))
        assert {SKY, WATER} <= set(np.unique(labels))


def test_every_class_is_seen_often_and_animals_equally_so(train_scenes):
    _, labels = train_scenes
    shares = torch.bincount(labels.flatten(), minlength=5) / labels.numel()
    assert shares.min() > 0.015
    assert 0.75 < shares[BIRD] / shares[FISH] < 1.35
    for kind in (REEDS, BIRD, FISH):
        assert (labels == kind).flatten(1).any(1).float().mean() > 0.9


def test_birds_are_above_the_water_line_and_fish_below_it():
    """In each column the lowest sky pixel is about as high as the highest water pixel; animals keep to their side of the line."""
    for index in range(40):
        _, labels = generate(index, 2, HEIGHT, WIDTH)
        rows = np.arange(HEIGHT)[:, None]
        highest_water = np.where(labels == WATER, rows, HEIGHT).min(0)  # (W,); HEIGHT where reeds hide the water
        lowest_sky = np.where(labels == SKY, rows, -1).max(0)
        slack = 4  # waves, and columns in which the line is hidden
        assert not ((labels == BIRD) & (rows > np.median(highest_water) + 0.12 * HEIGHT + slack)).any()
        assert not ((labels == BIRD) & (rows > highest_water + slack)).any()
        assert not ((labels == FISH) & (rows < lowest_sky - slack)).any()


def test_birds_and_fish_have_the_same_colours_and_sizes():
    """Mean and spread of their pixels differ by less than the scenes do among themselves."""
    images, labels = scenes(range(200), 48, 64)
    pixels = images.permute(0, 2, 3, 1).float()
    bird, fish = pixels[labels == BIRD], pixels[labels == FISH]
    assert (bird.mean(0) - fish.mean(0)).abs().max() < 10
    assert (bird.std(0) / fish.std(0) - 1).abs().max() < 0.1
    assert 0.85 < len(bird) / len(fish) < 1.18


def test_reeds_hide_animals_and_animals_hide_reeds():
    """Some reeds are painted before the animals and some after: both touch inside one scene, in front and behind."""
    cut, covering = 0, 0
    for index in range(30):
        _, labels = generate(index, 0, HEIGHT, WIDTH)
        animal, reed = labels >= BIRD, labels == REEDS
        cut += int((animal[:, :-4] & reed[:, 2:-2] & animal[:, 4:]).sum())  # a thin stalk between two parts of an animal
        covering += int((reed[:-6] & animal[3:-3] & reed[6:]).sum())  # an animal's fin or tail across a stalk
    assert cut > 150
    assert covering > 100


def test_colour_alone_can_not_tell_a_bird_from_a_fish(train_scenes, val_scenes):
    """Bayes' rule on the colour of single pixels, 16 bins per band, fitted on the training scenes, with and without class frequencies."""
    images, labels = train_scenes

    def bins(x: torch.Tensor) -> torch.Tensor:
        red, green, blue = (x.long() // 16).unbind(1)
        return (red * 16 + green) * 16 + blue

    counts = torch.bincount((bins(images) * 5 + labels).flatten(), minlength=16**3 * 5).view(-1, 5).double() + 1e-3
    for frequencies in (torch.ones(5), counts.sum(0)):
        likelihood = counts / counts.sum(0) * frequencies
        scores = iou(val_scenes[1], likelihood.argmax(1)[bins(val_scenes[0])])
        assert scores[BIRD] < 0.3
        assert scores[FISH] < 0.3


def test_a_small_network_over_one_pixel_can_not_tell_a_bird_from_a_fish(train_scenes, val_scenes, one_thread):
    """The same training as the U-Net's below, on colours only."""
    images, labels = train_scenes
    colours, kinds = images.permute(0, 2, 3, 1).reshape(-1, 3) / 127.5 - 1, labels.flatten()
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    network = torch.nn.Sequential(
        torch.nn.Linear(3, 32), torch.nn.ReLU(), torch.nn.Linear(32, 32), torch.nn.ReLU(), torch.nn.Linear(32, len(CLASSES))
    )
    optimiser = torch.optim.Adam(network.parameters(), lr=0.01)
    for _ in range(250):
        chosen = torch.randint(0, len(kinds), (4096,), generator=generator)
        optimiser.zero_grad()
        functional.cross_entropy(network(colours[chosen]), kinds[chosen], balance(labels)).backward()
        optimiser.step()
    with torch.inference_mode():
        predicted = network(val_scenes[0].permute(0, 2, 3, 1) / 127.5 - 1).argmax(-1)
    scores = iou(val_scenes[1], predicted)
    assert min(scores[SKY], scores[WATER]) > 0.4  # it has learned what there is to learn
    assert scores[BIRD] < 0.3
    assert scores[FISH] < 0.3


def test_a_small_unet_tells_birds_from_fish_by_what_is_around_them(train_scenes, val_scenes, one_thread):
    """Width 8, 300 steps of 4 scenes: 25 seconds of one core."""
    images, labels = train_scenes
    images, weights, generator = images / 127.5 - 1, balance(train_scenes[1]), torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    model = build("unet", len(CLASSES), encoder="plain", width=8).to(memory_format=torch.channels_last)
    optimiser = torch.optim.AdamW(model.parameters(), lr=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 0.02, total_steps=300, pct_start=0.2)
    for _ in range(300):
        chosen = torch.randperm(len(images), generator=generator)[:4]
        x, y = images[chosen].contiguous(memory_format=torch.channels_last), labels[chosen]
        if torch.rand(1, generator=generator) < 0.5:
            x, y = x.flip(-1), y.flip(-1)
        optimiser.zero_grad()
        functional.cross_entropy(model(x), y, weights).backward()
        optimiser.step()
        schedule.step()
    model.eval()
    with torch.inference_mode():
        predicted = torch.cat([model(scene[None] / 127.5 - 1).argmax(1) for scene in val_scenes[0]])
    scores = iou(val_scenes[1], predicted)
    assert scores[BIRD] > 0.6, scores
    assert scores[FISH] > 0.6, scores
    assert scores.mean() > 0.75, scores


def test_written_samples_are_ordinary_images_and_palette_masks(tmp_path):
    write_samples(tmp_path, train=2, val=1, height=40, width=50, seed=3)
    found = sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file())
    names = ["train/0000.png", "train/0001.png", "val/0000.png"]
    assert found == ["classes.txt", *(f"images/{n}" for n in names), *(f"masks/{n}" for n in names)]
    assert (tmp_path / "classes.txt").read_text().split() == list(CLASSES)
    for index, name in enumerate(names):
        image, labels = generate(index, 3, 40, 50)
        with Image.open(tmp_path / "images" / name) as file:
            np.testing.assert_array_equal(np.asarray(file), image)
        with Image.open(tmp_path / "masks" / name) as file:
            assert file.mode == "P"
            np.testing.assert_array_equal(np.asarray(file), labels)
            assert tuple(file.getpalette()[:15]) == tuple(channel for color in COLORS for channel in color)


def test_a_scene_that_can_not_be_drawn_is_refused(tmp_path):
    for arguments in ((0, 0, 31, 64), (0, 0, 64, 31), (-1, 0, 64, 64), (0, -1, 64, 64)):
        with pytest.raises(ValueError, match="cannot be drawn"):
            generate(*arguments)
    with pytest.raises(ValueError, match="0 or more"):
        write_samples(tmp_path, train=-1)
