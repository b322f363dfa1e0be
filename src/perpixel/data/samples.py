"""The built-in sample set: seeded scenes of sky, water, reeds, birds and fish, in which context decides.

A bird and a fish are drawn by the same function from the same distribution of shapes, sizes, directions, colours and light: what a pixel
looks like says nothing about which of the two it belongs to. Only where the animal is tells: birds are in the sky, fish in the water.
Sky and water share a tint, so their colours overlap from scene to scene; their textures (soft clouds, level ripples) differ.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from perpixel.data.writing import replacing, write_labels, write_rgb

CLASSES = ("sky", "water", "reeds", "bird", "fish")
COLORS = ((135, 190, 235), (30, 80, 150), (105, 140, 50), (240, 140, 40), (200, 50, 120))
SKY, WATER, REEDS, BIRD, FISH = range(5)

# (zenith, horizon) of clear, hazy, overcast, dawn and evening skies; water takes a darkened, greener or bluer share of the same light.
SKIES = np.array(
    [
        [[84, 142, 204], [186, 212, 228]],
        [[120, 166, 196], [222, 222, 206]],
        [[132, 142, 154], [186, 190, 192]],
        [[126, 138, 186], [240, 196, 160]],
        [[84, 96, 150], [232, 158, 122]],
    ],
    dtype=np.float32,
)
DEPTHS = np.array([[36, 84, 112], [34, 92, 92], [52, 76, 104], [60, 88, 84]], dtype=np.float32)
COATS = np.array([[206, 108, 52], [186, 62, 66], [222, 182, 86], [214, 208, 196], [70, 66, 78], [132, 88, 150]], dtype=np.float32)
STALKS = np.array([[104, 128, 54], [132, 138, 66], [86, 108, 48], [152, 136, 78]], dtype=np.float32)
HEAD = np.array([96, 62, 38], dtype=np.float32)  # a cattail's seed head


@dataclass
class Scene:
    """A picture in the making; the painters below draw into it, back to front."""

    image: np.ndarray  # (H, W, 3) float32, 0..255
    labels: np.ndarray  # (H, W) uint8
    waterline: np.ndarray  # (W,) float32, row at which the water begins in each column


def generate(index: int, seed: int = 0, height: int = 192, width: int = 256) -> tuple[np.ndarray, np.ndarray]:
    """One scene of the sample set.

    Args:
        index: which scene. seed: which set. The scene is a pure function of the four arguments.
        height, width: in pixels, at least 32; shapes scale with the height.

    Returns:
        (H, W, 3) uint8 image and (H, W) uint8 labels, indices into `CLASSES`.

    Raises:
        ValueError: if a side is below 32 pixels, or `index` or `seed` is negative.
    """
    if min(height, width) < 32 or min(index, seed) < 0:
        raise ValueError(
            f"scene {index} of seed {seed} at {height}x{width} (height x width) cannot be drawn: "
            f"sides of at least 32 pixels, and an index and a seed of at least 0 are needed."
        )
    rng = np.random.default_rng([seed, index])
    scene = _background(rng, height, width)
    reeds = _reeds(rng, height, width)
    behind = int(rng.integers(0, len(reeds) + 1, 2).max())  # most reeds stand behind, or they would hide more fish than birds
    for reed in reeds[:behind]:
        _paint_reed(scene, rng, reed)
    # Birds and fish take turns, so neither lies in front of the other more often.
    for kind in rng.permutation([BIRD] * int(rng.integers(2, 6)) + [FISH] * int(rng.integers(2, 6))):
        _paint_animal(scene, rng, int(kind))
    for reed in reeds[behind:]:
        _paint_reed(scene, rng, reed)
    return _photograph(scene.image, rng), scene.labels


def write_samples(folder: Path, train: int = 64, val: int = 16, height: int = 192, width: int = 256, seed: int = 0) -> None:
    """Write a sample set as ordinary files.

    Args:
        folder: made if missing; gets images/{train,val}/0000.png, masks/{train,val}/0000.png (palette PNG of class indices), classes.txt.
        train, val: number of pictures; the scenes of val follow those of train, so no picture is in both.
        height, width, seed: see `generate`.

    Raises:
        ValueError: if a number of pictures is negative, or `generate` cannot draw the size.
        OSError: if the folder cannot be written, or the disk is full.
    """
    if min(train, val) < 0:
        raise ValueError(f"{train} training and {val} validation pictures were asked for; give 0 or more of each.")
    for split, first, count in (("train", 0, train), ("val", train, val)):
        for number in range(count):
            image, labels = generate(first + number, seed, height, width)
            write_rgb(folder / "images" / split / f"{number:04d}.png", image)
            write_labels(folder / "masks" / split / f"{number:04d}.png", labels, COLORS)
    with replacing(folder / "classes.txt") as temporary:
        temporary.write_text("".join(f"{name}\n" for name in CLASSES), encoding="utf-8")


def _background(rng: np.random.Generator, height: int, width: int) -> Scene:
    """Sky with soft clouds over water with level ripples that grow towards the viewer."""
    x = np.linspace(-1, 1, width, dtype=np.float32)
    line = height * rng.uniform(0.36, 0.64) + height * rng.uniform(-0.09, 0.09) * x
    waterline = (line + 0.008 * height * np.sin(x * rng.uniform(4, 12) + rng.uniform(0, 6))).astype(np.float32)
    rows = np.arange(height, dtype=np.float32)[:, None]
    light = SKIES[rng.integers(len(SKIES))] + rng.normal(0, 8, (2, 3)).astype(np.float32)

    up = np.clip(1 - rows / waterline, 0, 1)[..., None]  # 1 at the top, 0 at the water line
    sky = light[1] + (light[0] - light[1]) * up**0.8
    clouds = _noise(rng, height, width, (2.2, 1.6), (0.6, 0.4, 0.26, 0.17, 0.1))
    cover = np.clip(clouds * rng.uniform(0.5, 1.4) + rng.uniform(-0.7, 0.3), 0, 1)[..., None]
    sky += cover * (np.float32(rng.uniform(150, 245)) - sky) * np.float32(0.8)

    deep = np.clip((rows - waterline) / height, 0, 1)  # 0 at the water line
    mirrored = light[1] * np.float32(rng.uniform(0.6, 0.95))
    below = DEPTHS[rng.integers(len(DEPTHS))] * np.float32(rng.uniform(0.8, 1.3))
    water = mirrored + (below - mirrored) * np.sqrt(np.clip(deep * rng.uniform(1.3, 2.6), 0, 1))[..., None]
    # Perspective: a row of the ripple field is met ever more slowly towards the viewer.
    field = _noise(rng, height, width, (22, 3), (0.6, 0.5, 0.35))
    met = np.clip(np.log1p(deep * 14) / np.log(15) * (height - 1), 0, height - 1).astype(np.int32)
    ripples = field[met, np.arange(width)]
    glints = np.clip(ripples - rng.uniform(0.8, 1.3), 0, 1)
    water += ripples[..., None] * np.float32(rng.uniform(9, 18)) + glints[..., None] * np.float32(rng.uniform(60, 130))

    wet = np.clip(rows - waterline + 0.5, 0, 1)[..., None]  # antialiased
    return Scene(sky + (water - sky) * wet, np.where(wet[..., 0] >= 0.5, WATER, SKY).astype(np.uint8), waterline)


def _noise(rng: np.random.Generator, height: int, width: int, cells: tuple[float, float], strengths: tuple[float, ...]) -> np.ndarray:
    """(H, W) float32 smooth noise of about unit spread: octaves of random grids, the coarsest of `cells` (rows, columns)."""
    total = np.zeros((height, width), dtype=np.float32)
    for octave, strength in enumerate(strengths):
        rows, columns = cells[0] * 2.3**octave, cells[1] * 2.3**octave
        grid = Image.fromarray(rng.standard_normal((int(rows) + 2, int(columns) + 2), dtype=np.float32))
        down, right = rng.random(2)  # a shift per octave, or the grids' corners would line up and show
        box = (right, down, right + columns, down + rows)
        total += np.asarray(grid.resize((width, height), Image.Resampling.BICUBIC, box=box)) * np.float32(strength)
    return total / np.float32(np.hypot.reduce(strengths)) * np.float32(1.4)


def _blend(scene: Scene, box: tuple[slice, slice], cover: np.ndarray, color: np.ndarray, label: int) -> None:
    """Paint `color` where `cover` (0..1, antialiased) says; the label changes where the paint is more than half."""
    image = scene.image[box]
    image += cover[..., None] * (color - image)
    scene.labels[box][cover > 0.5] = label


def _paint_animal(scene: Scene, rng: np.random.Generator, kind: int) -> None:
    """A body with tail, wing or fin, and eye. `kind` decides the place and nothing else: every other number is drawn alike."""
    height, width = scene.labels.shape
    half = height * rng.uniform(0.065, 0.13)  # half the length of the body
    stout, tail, fin, sweep = rng.uniform(0.28, 0.42), rng.uniform(0.6, 0.95), rng.uniform(0.7, 1.1), rng.uniform(0.5, 1.2)
    angle, left, over = rng.uniform(-0.4, 0.4), rng.choice([-1, 1]), rng.choice([-1, 1])
    coats = COATS[rng.choice(len(COATS), 2, replace=False)] + rng.normal(0, 10, (2, 3)).astype(np.float32)
    bands, phase = rng.uniform(4, 9), rng.uniform(0, 6)

    x = rng.uniform(0.05, 0.95) * width
    line = float(scene.waterline[max(0, int(x - 1.6 * half)) : int(x + 1.6 * half) + 1].mean())
    room = (0.6 * half, line - 1.25 * half) if kind == BIRD else (line + 1.25 * half, height - 0.6 * half)
    y = rng.uniform(*room) if room[0] < room[1] else (room[0] + room[1]) / 2

    reach = int(1.9 * half) + 2
    box = slice(max(0, int(y) - reach), int(y) + reach), slice(max(0, int(x) - reach), int(x) + reach)
    rows, columns = np.mgrid[box[0].start : min(box[0].stop, height), box[1].start : min(box[1].stop, width)].astype(np.float32)
    right, down = (columns - np.float32(x)) / half, (rows - np.float32(y)) / half
    u = left * (np.cos(angle) * right + np.sin(angle) * down)  # along the body: 1 at the beak or mouth, -1 where the tail begins
    v = np.cos(angle) * down - np.sin(angle) * right  # across it, down positive
    w = over * v
    # Each part is positive inside and falls off outside at about one per half length.
    body = np.minimum(stout * np.sqrt(np.clip(1 - u * u, 0, None)) * (1 + 0.25 * u) - np.abs(v), 0.98 - np.abs(u))
    fan = np.minimum(np.minimum(-0.7 - u, tail * (-u - 0.55) - np.abs(v)), u + 1.15 + 0.45 * np.abs(v) / tail)
    wing = np.minimum(w - 0.02, np.minimum(0.32 - u - sweep * w, u + 0.4 + (sweep - 0.72 / fin) * w) * 0.8)  # its edges meet at w = fin
    cover = np.clip(np.maximum(np.maximum(body, fan), wing) * np.float32(half) + 0.5, 0, 1)

    stripes = np.clip(2.5 * np.sin(bands * u + 1.5 * v + phase), -1, 1) * 0.5 + 0.5
    color = coats[0] + (coats[1] - coats[0]) * (stripes * (0.35 + 0.4 * (np.maximum(fan, wing) > body)))[..., None]
    color = color * (1 - 0.32 * np.clip(v / stout, -1, 1))[..., None]  # lit from above, wherever it is
    eye = np.hypot(u - 0.66, v + 0.3 * stout) < 0.1
    color = np.where(eye[..., None], np.float32(18), color) + rng.normal(0, 7, (*u.shape, 1)).astype(np.float32)
    _blend(scene, box, cover.astype(np.float32), color.astype(np.float32), kind)


@dataclass(frozen=True)
class Reed:
    """A stalk from the lower border or the water up through the water line."""

    foot: tuple[float, float]  # (row, column)
    tip: tuple[float, float]
    bend: float  # sideways bulge halfway up, in pixels
    thick: float  # half width at the foot, in pixels
    color: np.ndarray
    head: bool


def _reeds(rng: np.random.Generator, height: int, width: int) -> list[Reed]:
    reeds = []
    for _ in range(rng.integers(1, 4)):
        middle, spread = rng.uniform(0, width), rng.uniform(0.04, 0.12) * width
        for _ in range(rng.integers(4, 11)):
            column, row = rng.normal(middle, spread), rng.uniform(0.85, 1.1) * height
            tip = (row - rng.uniform(0.4, 0.85) * height, column + rng.normal(0, 0.09) * height)
            color = STALKS[rng.integers(len(STALKS))] * np.float32(rng.uniform(0.75, 1.2))
            bend, thick = rng.normal(0, 0.03) * height, height * rng.uniform(0.006, 0.013)
            reeds.append(Reed((row, column), tip, bend, thick, color, bool(rng.random() < 0.45)))
    return reeds


def _paint_reed(scene: Scene, rng: np.random.Generator, reed: Reed) -> None:
    height, width = scene.labels.shape
    top, bottom = max(0, int(reed.tip[0])), min(height, int(reed.foot[0]))
    rise = ((reed.foot[0] - np.arange(top, bottom, dtype=np.float32)) / (reed.foot[0] - reed.tip[0]))[
        :, None
    ]  # 0 at the foot, 1 at the tip
    centre = reed.foot[1] + (reed.tip[1] - reed.foot[1]) * rise**2 + reed.bend * 4 * rise * (1 - rise)
    thick = reed.thick * np.clip(1.15 - rise, 0.3, 1)
    inside_head = (np.abs(rise - 0.86) < 0.1) & reed.head
    thick = np.where(inside_head, reed.thick * 1.9 * np.sqrt(np.clip(1 - ((rise - 0.86) / 0.1) ** 2, 0, 1)), thick)
    if not rise.size:
        return
    first = max(0, int(centre.min() - 3 * reed.thick - 2))
    last = min(width, int(centre.max() + 3 * reed.thick + 2))
    if first >= last:
        return
    aside = np.arange(first, last, dtype=np.float32)[None] - centre
    cover = np.clip(thick - np.abs(aside) + 0.5, 0, 1).astype(np.float32)
    grain = rng.normal(0, 9, (*aside.shape, 1)) + 14 * rng.standard_normal((len(rise), 1, 1))
    color = np.where(inside_head[..., None], HEAD, reed.color) * (1 - 0.3 * np.clip(aside / np.maximum(thick, 1), -1, 1))[..., None] + grain
    _blend(scene, (slice(top, bottom), slice(first, last)), cover, color.astype(np.float32), REEDS)


def _photograph(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Exposure, white balance, blotchy and fine sensor noise; (H, W, 3) uint8."""
    height, width, _ = image.shape
    image = image * (rng.uniform(0.82, 1.12) * rng.uniform(0.95, 1.05, 3)).astype(np.float32)
    image += _noise(rng, height, width, (19, 26), (0.6, 0.5))[..., None] * np.float32(rng.uniform(2, 5))
    image += rng.standard_normal(image.shape, dtype=np.float32) * np.float32(rng.uniform(4, 9))
    return np.clip(np.rint(image), 0, 255).astype(np.uint8)
