"""Small jobs for pydensecrf, written once and run by both: by it when recording, by perpixel.refinement.pydensecrf in the tests.

    git clone https://github.com/lucasb-eyer/pydensecrf && pip install ./pydensecrf      (commit 2723c7f, Python 3.11)
    python tests/refinement/pydensecrf_cases.py                                          (writes data/pydensecrf.npz)

Each job takes the two modules of the package and gives an array: marginals (labels, points), or KL divergences.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType

import numpy as np

RECORDED = Path(__file__).parent / "data" / "pydensecrf.npz"
HEIGHT, WIDTH, LABELS = 14, 18, 4


def scene(height: int, width: int, labels: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Energies (labels, points) that favour four quarters, with much noise, and an image that shows the quarters clearly."""
    draw = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    quarter = (2 * (2 * y >= height) + (2 * x >= width)) % labels
    image = 50 * quarter[..., None] * np.array([1.0, 0.6, 0.2]) + 30 + draw.normal(0, 6, (height, width, 3))
    scores = draw.normal(0, 1.2, (labels, height, width)) + 1.5 * (np.arange(labels)[:, None, None] == quarter)
    energies = np.log(np.exp(scores).sum(0)) - scores
    return energies.reshape(labels, -1).astype(np.float32), image.clip(0, 255).astype(np.uint8)


def image_2d(
    dcrf: ModuleType, utils: ModuleType, normalization: str, kernel: str, compat: str = "number", height: int = HEIGHT
) -> np.ndarray:
    energies, image = scene(height, WIDTH, LABELS)
    rewards = {
        "number": (3, 5),
        "vector": (np.array([-3, -2, -4, -1], np.float32), np.array([-5, -5, -3, -6], np.float32)),
        "matrix": (-3 * np.eye(4, dtype=np.float32), np.array([[0, 1, 2, 3], [2, 0, 1, 4], [5, 3, 0, 1], [0, 2, 3, 0]], np.float32)),
    }[compat]
    options = {"kernel": getattr(dcrf.KernelType, kernel), "normalization": getattr(dcrf.NormalizationType, normalization)}
    d = dcrf.DenseCRF2D(WIDTH, height, LABELS)
    d.setUnaryEnergy(energies)
    d.addPairwiseGaussian(sxy=(3, 2), compat=rewards[0], **options)
    d.addPairwiseBilateral(sxy=(8, 6), srgb=(13, 20, 9), rgbim=image, compat=rewards[1], **options)
    return np.array(d.inference(5))


def volume(dcrf: ModuleType, utils: ModuleType) -> np.ndarray:
    """Three dimensions and one band."""
    draw = np.random.default_rng(1)
    shape = (4, 6, 7)
    density = (np.indices(shape).sum(0) > 7) * 80 + draw.normal(0, 5, shape)
    probabilities = draw.dirichlet(np.ones(3), shape).transpose(3, 0, 1, 2)
    d = dcrf.DenseCRF(4 * 6 * 7, 3)
    d.setUnaryEnergy(utils.unary_from_softmax(probabilities, scale=0.9))
    d.addPairwiseEnergy(utils.create_pairwise_gaussian(sdims=(1.0, 2.0, 2.0), shape=shape), compat=2)
    d.addPairwiseEnergy(utils.create_pairwise_bilateral(sdims=(2, 3, 3), schan=(20,), img=density), compat=4)
    return np.array(d.inference(4))


def bands(dcrf: ModuleType, utils: ModuleType, count: int) -> np.ndarray:
    """An image of one band without a channel axis, or of several on the first axis."""
    energies, image = scene(HEIGHT, WIDTH, LABELS, seed=2)
    planes = np.stack([image[..., i % 3] // (1 + i // 3) for i in range(count)])
    picture, axis = (planes[0], -1) if count == 1 else (planes, 0)
    d = dcrf.DenseCRF2D(WIDTH, HEIGHT, LABELS)
    d.setUnaryEnergy(energies)
    d.addPairwiseEnergy(utils.create_pairwise_bilateral(sdims=(7, 7), schan=15, img=picture, chdim=axis), compat=4)
    return np.array(d.inference(5))


def points(dcrf: ModuleType, utils: ModuleType) -> np.ndarray:
    """Seven features of 100 points."""
    draw = np.random.default_rng(3)
    d = dcrf.DenseCRF(100, 5)
    d.setUnaryEnergy(draw.normal(0, 1, (5, 100)).astype(np.float32))
    d.addPairwiseEnergy(draw.normal(0, 1, (7, 100)).astype(np.float32), compat=4)
    return np.array(d.inference(5))


def scribbles(dcrf: ModuleType, utils: ModuleType) -> np.ndarray:
    """Most pixels unknown; two labels."""
    _, image = scene(HEIGHT, WIDTH, 2)
    labels = np.zeros((HEIGHT, WIDTH), np.int32)
    labels[2:5, 2:5], labels[2:5, 12:15] = 1, 2
    d = dcrf.DenseCRF2D(WIDTH, HEIGHT, 2)
    d.setUnaryEnergy(utils.unary_from_labels(labels, 2, gt_prob=0.7, zero_unsure=True))
    d.addPairwiseGaussian(sxy=3, compat=3)
    d.addPairwiseBilateral(sxy=80, srgb=13, rgbim=image, compat=10)
    return np.array(d.inference(10))


def kl_of_steps(dcrf: ModuleType, utils: ModuleType) -> np.ndarray:
    energies, image = scene(HEIGHT, WIDTH, LABELS)
    d = dcrf.DenseCRF2D(WIDTH, HEIGHT, LABELS)
    d.setUnary(dcrf.ConstUnary(energies))
    d.addPairwiseGaussian(sxy=3, compat=3)
    d.addPairwiseBilateral(sxy=8, srgb=13, rgbim=image, compat=np.diag([-5, -4, -3, -2]).astype(np.float32))
    q, tmp1, tmp2 = d.startInference()
    found = [d.klDivergence(q)]
    for _ in range(5):
        d.stepInference(q, tmp1, tmp2)
        found.append(d.klDivergence(q))
    return np.array(found)


def without_unary(dcrf: ModuleType, utils: ModuleType) -> np.ndarray:
    """Two steps by hand: the marginals begin as zeros, and a vector breaks the tie."""
    _, image = scene(HEIGHT, WIDTH, LABELS)
    d = dcrf.DenseCRF2D(WIDTH, HEIGHT, LABELS)
    d.addPairwiseBilateral(sxy=8, srgb=13, rgbim=image, compat=np.array([-1, -1.1, -1, -0.9], np.float32))
    q, tmp1, tmp2 = d.startInference()
    for _ in range(2):
        d.stepInference(q, tmp1, tmp2)
    return np.array(q)


def logistic(dcrf: ModuleType, utils: ModuleType) -> np.ndarray:
    draw = np.random.default_rng(4)
    d = dcrf.DenseCRF(60, 3)
    d.setUnary(dcrf.LogisticUnary(draw.normal(0, 1, (3, 2)).astype(np.float32), draw.normal(0, 1, (2, 60)).astype(np.float32)))
    d.addPairwiseEnergy(utils.create_pairwise_gaussian((2, 2), (6, 10)), compat=1)
    return np.array(d.inference(3))


def labels_of_a_picture(dcrf: ModuleType, utils: ModuleType) -> np.ndarray:
    """The settings of pydensecrf's examples on 120 x 160 pixels and 8 classes; labels only."""
    energies, image = scene(120, 160, 8, seed=5)
    d = dcrf.DenseCRF2D(160, 120, 8)
    d.setUnaryEnergy(energies)
    d.addPairwiseGaussian(sxy=3, compat=3)
    d.addPairwiseBilateral(sxy=80, srgb=13, rgbim=image, compat=10)
    return np.argmax(d.inference(10), axis=0).astype(np.uint8)


Job = Callable[[ModuleType, ModuleType], np.ndarray]
CASES: dict[str, Job] = {
    "none, const": partial(image_2d, normalization="NO_NORMALIZATION", kernel="CONST_KERNEL"),
    "before, diag": partial(image_2d, normalization="NORMALIZE_BEFORE", kernel="DIAG_KERNEL"),
    "after, full": partial(image_2d, normalization="NORMALIZE_AFTER", kernel="FULL_KERNEL"),
    "symmetric, const": partial(image_2d, normalization="NORMALIZE_SYMMETRIC", kernel="CONST_KERNEL"),
    "symmetric, diag, 13 rows": partial(image_2d, normalization="NORMALIZE_SYMMETRIC", kernel="DIAG_KERNEL", height=13),
    "vector": partial(image_2d, normalization="NORMALIZE_SYMMETRIC", kernel="FULL_KERNEL", compat="vector"),
    "matrix": partial(image_2d, normalization="NORMALIZE_SYMMETRIC", kernel="DIAG_KERNEL", compat="matrix"),
    "matrix, after": partial(image_2d, normalization="NORMALIZE_AFTER", kernel="DIAG_KERNEL", compat="matrix"),
    "volume": volume,
    "one band": partial(bands, count=1),
    "four bands": partial(bands, count=4),
    "points": points,
    "scribbles": scribbles,
    "without unary": without_unary,
    "logistic": logistic,
    "KL of steps": kl_of_steps,
    "labels of a picture": labels_of_a_picture,
}

if __name__ == "__main__":
    import pydensecrf.densecrf
    import pydensecrf.utils

    RECORDED.parent.mkdir(exist_ok=True)
    np.savez_compressed(RECORDED, **{name: job(pydensecrf.densecrf, pydensecrf.utils) for name, job in CASES.items()})
