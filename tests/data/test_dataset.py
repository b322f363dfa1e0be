"""Pairs as tensors, and the stream of samples as a pure function of (seed, number)."""

import itertools
import pickle
import threading

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image

from perpixel.data.dataset import DevicePrefetcher, LabelledImages, SampleStream, collate, conform, sample_numbers
from perpixel.data.images import Picture
from perpixel.data.layouts import Pair
from perpixel.data.masks import LabelMap
from perpixel.data.transforms import Augmentation

MAP = LabelMap({0: 0, 1: 1, 2: 2, 9: 255})
FULL = {"uint8": 255.0, "uint16": 65535.0, "float32": 1.0}


@pytest.fixture
def pairs(tmp_path) -> list[Pair]:
    """Five RGB images of 12x10 pixels with masks."""
    rng = np.random.default_rng(0)
    made = []
    for number in range(5):
        image, mask = tmp_path / f"{number}.png", tmp_path / f"{number}_mask.png"
        Image.fromarray(rng.integers(0, 256, (12, 10, 3), dtype=np.uint8)).save(image)
        Image.fromarray(rng.choice(np.array([0, 1, 2, 9], np.uint8), (12, 10))).save(mask)
        made.append(Pair(Picture(image), Picture(mask)))
    return made


def images_of(pairs, **options) -> LabelledImages:
    return LabelledImages(pairs, MAP, 3, "uint8", **options)


# ---- conform


@pytest.mark.parametrize("stored", ["uint8", "uint16", "float32"])
@pytest.mark.parametrize("wanted", ["uint8", "uint16", "float32"])
def test_depth_is_converted_by_full_range(stored, wanted):
    """Against rounding in float64, value by value."""
    values = np.linspace(0, FULL[stored], 1001)
    image = (values if stored == "float32" else np.rint(values)).astype(stored).reshape(1, 7, 143)
    expected = image.astype(np.float64) / FULL[stored] * FULL[wanted]
    got = conform(image, 1, wanted, "a.png")
    assert got.dtype == wanted
    slack = 1e-6 if wanted == "float32" else 0.5 + 0.01  # half a step of rounding
    np.testing.assert_allclose(got.astype(np.float64), expected, atol=slack, rtol=0)


def test_eight_bits_survive_the_way_to_sixteen_and_back():
    image = np.arange(256, dtype=np.uint8).reshape(1, 16, 16)
    there = conform(image, 1, "uint16", "a.png")
    assert there.max() == 65535
    assert np.array_equal(conform(there, 1, "uint8", "a.png"), image)


def test_grey_becomes_three_equal_bands_and_three_equal_bands_become_grey():
    grey = np.arange(12, dtype=np.uint8).reshape(1, 3, 4)
    assert np.array_equal(conform(grey, 3, "uint8", "a.png"), np.stack([grey[0]] * 3))
    assert np.array_equal(conform(np.stack([grey[0]] * 3), 1, "uint8", "a.png"), grey)


@pytest.mark.parametrize(("found", "wanted"), [(3, 1), (2, 3), (4, 3), (1, 4), (3, 4)])
def test_other_bands_are_refused_by_name(found, wanted):
    image = np.arange(found * 12, dtype=np.uint8).reshape(found, 3, 4)
    with pytest.raises(ValueError, match=rf"a\.png: {found} bands; the model was trained on {wanted}"):
        conform(image, wanted, "uint8", "a.png")


def test_floats_beyond_0_to_1_do_not_pass_for_a_photograph():
    with pytest.raises(
        ValueError, match=r"a\.tif: values of neither uint8 nor uint16, from 0 to 255; this model was trained on uint8\. Give uint8 values"
    ):
        conform(np.array([[[0, 255]]], np.float32), 1, "uint8", "a.tif")
    own = np.array([[[-40, 255]]], np.float32)
    assert conform(own, 1, "float32", "a.tif") is own


# ---- LabelledImages


def test_images_and_labels_are_those_of_the_files(pairs):
    images = images_of(pairs, cache=False)
    assert len(images) == 5
    for number, example in enumerate(images[i] for i in range(5)):
        stored = np.asarray(Image.open(pairs[number].image.path))
        mask = np.asarray(Image.open(pairs[number].mask.path))
        assert np.array_equal(example.image.numpy(), stored.transpose(2, 0, 1))
        assert np.array_equal(example.labels.numpy(), np.where(mask == 9, 255, mask))
        assert (example.name, example.weights) == (str(number), None)


def test_with_a_cache_every_file_is_read_and_weighed_once(pairs):
    asked = []

    def weigh(labels: np.ndarray) -> np.ndarray:
        asked.append(labels.shape)
        return (labels + 1.0).astype(np.float32)

    fresh, kept = images_of(pairs, cache=False, weigh=weigh), images_of(pairs, cache=True, weigh=weigh)
    assert len(asked) == 5
    for pair in pairs:
        pair.image.path.rename(pair.image.path.with_suffix(".moved"))
    for number in (3, 0, 3):
        example = kept[number]
        assert torch.equal(example.weights, example.labels + 1.0)
    assert len(asked) == 5
    for pair in pairs:
        pair.image.path.with_suffix(".moved").rename(pair.image.path)
    for number in range(5):
        assert torch.equal(fresh[number].image, kept[number].image)
        assert torch.equal(fresh[number].weights, kept[number].weights)


def test_a_mask_of_another_size_and_a_missing_one_are_refused_by_name(pairs):
    Image.new("L", (12, 10)).save(pairs[1].mask.path)
    with pytest.raises(ValueError, match=r"1\.png is 12x10 but .*1_mask\.png is 10x12 pixels \(height x width\)"):
        images_of(pairs, cache=False)[1]
    with pytest.raises(ValueError, match=r"2\.png: has no mask"):
        images_of([Pair(pairs[2].image, None)], cache=False)[0]


def test_a_page_of_a_stack_is_an_example_of_its_own(tmp_path):
    volume = np.random.default_rng(0).integers(0, 255, (3, 8, 9), dtype=np.uint8)
    tifffile.imwrite(tmp_path / "v.tif", volume, photometric="minisblack")
    tifffile.imwrite(tmp_path / "m.tif", volume // 86, photometric="minisblack")
    picture = [Pair(Picture(tmp_path / "v.tif", page), Picture(tmp_path / "m.tif", page)) for page in range(3)]
    images = LabelledImages(picture, MAP, 1, "uint8", cache=False)
    assert np.array_equal(images[2].image[0].numpy(), volume[2])
    assert np.array_equal(images[2].labels.numpy(), volume[2] // 86)
    assert images[2].name == "v_0002"


# ---- SampleStream


class Trace:
    """Stands for an augmentation: the image as it is, the labels filled with a number drawn from `rng`."""

    def __call__(self, image, labels, rng, weights):
        return image, torch.full_like(labels, int(torch.randint(0, 200, (), generator=rng))), weights


def which(stream: SampleStream, numbers) -> list[int]:
    """The index of the image that each sample shows."""
    return [next(i for i in range(5) if torch.equal(stream.images[i].image, stream[n][0])) for n in numbers]


def test_every_image_comes_once_per_epoch_in_another_order_each_time(pairs):
    stream = SampleStream(images_of(pairs), Trace(), seed=0)
    epochs = [which(stream, range(5 * epoch, 5 * epoch + 5)) for epoch in range(8)]
    assert all(sorted(epoch) == list(range(5)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 4


def test_a_sample_is_a_pure_function_of_seed_and_number(pairs):
    """Asked in any order, by a stream that has a past or none, in this process or in a copy sent to another."""
    augmentation = Augmentation(crop=(6, 6), scale=(0.5, 2), flip_horizontal=True, rotation=30, brightness=0.3, elastic_sigma=2)
    first = SampleStream(images_of(pairs), augmentation, seed=3)
    forwards = [first[number] for number in range(40)]
    copy = pickle.loads(pickle.dumps(first))
    fresh = SampleStream(images_of(pairs, cache=False), augmentation, seed=3)
    for number in (39, 0, 17, 4, 17, 25):
        for other in (first, fresh, copy):
            image, labels, _ = other[number]
            assert torch.equal(image, forwards[number][0])
            assert torch.equal(labels, forwards[number][1])


def test_samples_and_seeds_draw_different_numbers(pairs):
    images = images_of(pairs)
    draws = [tuple(SampleStream(images, Trace(), seed)[n][1][0, 0].item() for n in range(12)) for seed in (0, 1, 2)]
    assert len(set(draws)) == 3
    assert all(len(set(numbers)) > 6 for numbers in draws)


def test_worker_processes_give_the_samples_of_this_one(pairs):
    stream = SampleStream(images_of(pairs), Augmentation(crop=(8, 8), flip_horizontal=True), seed=1)
    batches = list(itertools.islice(sample_numbers(0, 4), 3))
    loader = torch.utils.data.DataLoader(stream, batch_sampler=batches, num_workers=1, collate_fn=collate)
    for numbers, (images, labels, weights) in zip(batches, loader, strict=True):
        assert torch.equal(images, torch.stack([stream[n][0] for n in numbers]))
        assert torch.equal(labels, torch.stack([stream[n][1] for n in numbers]))
        assert weights is None


# ---- DevicePrefetcher

EVERYTHING = {"scale": (0.5, 2.0), "rotation": 30.0, "flip_horizontal": True, "rotate90": True, "brightness": 0.3, "hue": 0.1}


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("weigh", [None, lambda labels: labels.astype(np.float32)])
def test_images_made_ahead_in_a_thread_are_those_of_the_stream(pairs, workers, weigh):
    images = images_of(pairs, cache=weigh is not None or workers == 0, weigh=weigh)
    augmentation = Augmentation(crop=(8, 8), **EVERYTHING)
    whole = SampleStream(images, augmentation, seed=1)
    batches = list(itertools.islice(sample_numbers(0, 4), 5))
    loader = torch.utils.data.DataLoader(whole.cuts(), batch_sampler=batches, num_workers=workers, collate_fn=collate)
    for numbers, batch in zip(batches, DevicePrefetcher(loader, augmentation, torch.device("cpu")), strict=True):
        for part, expected in zip(batch, collate([whole[number] for number in numbers]), strict=True):
            assert (part is None and expected is None) or torch.equal(part, expected)


def test_a_cut_takes_along_no_more_of_its_picture_than_it_needs(pairs):
    stream = SampleStream(images_of(pairs), Augmentation(crop=(4, 4)), seed=1).cuts()
    for number in range(5):
        region = stream[number][0].region
        assert region.untyped_storage().nbytes() == region.numel() * region.element_size()


def test_the_next_batch_is_asked_for_while_this_one_is_in_use(pairs):
    stream, asked = SampleStream(images_of(pairs), Augmentation(crop=(4, 4)), seed=1).cuts(), threading.Event()

    class Slow:
        def __iter__(self):
            yield collate([stream[number] for number in range(2)])
            asked.set()
            yield collate([stream[number] for number in range(2, 4)])

    batches = iter(DevicePrefetcher(Slow(), stream.stream.augmentation, torch.device("cpu")))
    next(batches)
    assert asked.wait(timeout=60)
    assert len(list(batches)) == 1


def test_what_goes_wrong_ahead_is_told_where_the_batch_is_asked_for(pairs):
    class Broken:
        def __iter__(self):
            yield collate([stream[number] for number in range(2)])
            raise ValueError("photo.png: truncated")

    stream = SampleStream(images_of(pairs), Augmentation(crop=(4, 4)), seed=1).cuts()
    batches = iter(DevicePrefetcher(Broken(), stream.stream.augmentation, torch.device("cpu")))
    assert next(batches)[0].shape == (2, 3, 4, 4)
    with pytest.raises(ValueError, match=r"photo\.png: truncated"):
        next(batches)


def test_a_loop_that_ends_early_leaves_no_thread(pairs):
    stream = SampleStream(images_of(pairs), Augmentation(crop=(4, 4)), seed=1).cuts()
    endless = (collate([stream[number] for number in numbers]) for numbers in sample_numbers(0, 2))
    before = threading.active_count()
    for count, _ in enumerate(batches := iter(DevicePrefetcher(endless, stream.stream.augmentation, torch.device("cpu")))):
        if count == 3:
            break
    batches.close()
    assert threading.active_count() == before


# ---- batches


@pytest.mark.parametrize("world", [1, 2, 3])
def test_the_shares_of_all_processes_make_up_the_batches_of_one(world):
    one = list(itertools.islice(sample_numbers(0, 6), 5))
    shares = [list(itertools.islice(sample_numbers(0, 6, rank, world), 5)) for rank in range(world)]
    assert [list(itertools.chain(*parts)) for parts in zip(*shares, strict=True)] == one
    assert list(itertools.chain(*one)) == list(range(30))


def test_a_resumed_run_goes_on_with_the_samples_that_come_next():
    whole = list(itertools.islice(sample_numbers(0, 4), 10))
    assert list(itertools.islice(sample_numbers(7, 4), 3)) == whole[7:]


def test_weights_are_stacked_where_there_are_any():
    sample = (torch.zeros(3, 2, 2), torch.zeros(2, 2), None)
    weighed = (*sample[:2], torch.ones(2, 2))
    assert collate([sample, sample])[2] is None
    assert [tuple(part.shape) for part in collate([weighed] * 3)] == [(3, 3, 2, 2), (3, 2, 2), (3, 2, 2)]
