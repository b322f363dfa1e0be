"""A validation image that is a training image in other clothes is found; different pictures are not."""

import io
import tracemalloc
from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

from perpixel.data import duplicates
from perpixel.data.duplicates import Fingerprint, _hamming, find_duplicates, fingerprint

Change = Callable[[Image.Image], Image.Image]


def photograph(seed: int, height: int = 120, width: int = 160) -> np.ndarray:
    """Smooth random colours with some grain, (3, H, W)."""
    rng = np.random.default_rng(seed)
    smooth = ndimage.zoom(rng.normal(size=(3, 6, 8)), (1, height / 6, width / 8), order=3)
    return (128 + 50 * smooth + rng.normal(size=smooth.shape) * 3).clip(0, 255).astype(np.uint8)


def compressed(image: Image.Image) -> Image.Image:
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=30)
    return Image.open(stream)


CHANGES: dict[str, Change] = {
    "recompressed": compressed,
    "half as large": lambda image: image.resize((image.width // 2, image.height // 2)),
    "brighter": lambda image: image.point(lambda value: min(255, int(value * 1.1) + 5)),
}


@pytest.mark.parametrize("change", list(CHANGES))
def test_a_changed_copy_is_near_and_the_other_pictures_are_not(change: str) -> None:
    train = [photograph(seed) for seed in range(12)]
    copy = np.asarray(CHANGES[change](Image.fromarray(train[7].transpose(1, 2, 0)))).transpose(2, 0, 1)
    val = [photograph(100), copy, photograph(101)]
    assert find_duplicates([fingerprint(i) for i in train], [fingerprint(i) for i in val]) == [("near", 7, 1)]


def test_equal_pixels_are_exact_and_a_single_changed_pixel_is_near() -> None:
    train, changed = [photograph(0), photograph(1)], photograph(1)
    changed[0, 5, 5] ^= 1
    found = find_duplicates([fingerprint(i) for i in train], [fingerprint(photograph(1)), fingerprint(changed)])
    assert found == [("exact", 1, 0), ("near", 1, 1)]


def test_flat_images_are_near_nothing_but_equal_ones_are_exact() -> None:
    flat = [np.full((1, 9, 9), value, dtype=np.uint16) for value in (0, 700)]
    assert find_duplicates([fingerprint(flat[0])], [fingerprint(i) for i in flat]) == [("exact", 0, 0)]


@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 1, 50), (5, 3, 2)])
def test_any_shape_has_a_fingerprint(shape: tuple[int, ...]) -> None:
    assert fingerprint(np.ones(shape, dtype=np.float32)).bits.shape == (64,)


def test_the_fast_distance_equals_counting_bits() -> None:
    rng = np.random.default_rng(0)
    one, two = rng.random((7, 64)) < 0.5, rng.random((5, 64)) < 0.5
    np.testing.assert_array_equal(_hamming(one, two), (one[:, None] != two[None]).sum(axis=-1))


def prints(count: int, seed: int, clusters: int = 5) -> list[Fingerprint]:
    """Frames of a few drives: many are near each other, so nearly every pair is a candidate."""
    rng = np.random.default_rng(seed)
    scenes = np.random.default_rng(0).normal(size=(clusters, 256))
    small = scenes[rng.integers(clusters, size=count)] + 0.1 * rng.normal(size=(count, 256))
    small = (small / np.linalg.norm(small, axis=1, keepdims=True)).astype(np.float32)
    return [Fingerprint(bytes([seed, i % 256, i // 256]), np.arange(64) < rng.integers(12), small[i]) for i in range(count)]


@pytest.mark.parametrize("cells", [1, 100, 2**22])
def test_the_closest_is_found_as_by_comparing_one_by_one_whatever_the_block(monkeypatch: pytest.MonkeyPatch, cells: int) -> None:
    monkeypatch.setattr(duplicates, "CELLS", cells)
    train, val = prints(60, 1), prints(25, 2)
    expected = []
    for j, one in enumerate(val):
        alike = [(float(o.small @ one.small), -i) for i, o in enumerate(train) if (o.bits != one.bits).sum() <= 8]
        best = max((a for a in alike if a[0] > 0.98), default=None)
        if best:
            expected.append(("near", -best[1], j))
    assert len(expected) > 5
    assert find_duplicates(train, val) == expected


def test_memory_is_that_of_the_prints_and_one_block(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(duplicates, "CELLS", 2**18)
    train, val = prints(1500, 1), prints(1500, 2)
    tracemalloc.start()
    find_duplicates(train, val)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1500 * (256 + 64 + 64) * 4 + 4 * 4 * 2**18 + 2**20  # 1500 x 1500 float32 alone are 9 MB


def test_both_signs_are_needed_for_near() -> None:
    rng = np.random.default_rng(0)
    one, two = (vector / np.linalg.norm(vector) for vector in rng.normal(size=(2, 256)).astype(np.float32))
    bits = rng.random(64) < 0.5
    train = [Fingerprint(b"a", bits, one)]
    assert find_duplicates(train, [Fingerprint(b"b", bits, two)]) == []
    assert find_duplicates(train, [Fingerprint(b"b", ~bits, one)]) == []
    assert find_duplicates(train, [Fingerprint(b"b", bits, one)]) == [("near", 0, 0)]
