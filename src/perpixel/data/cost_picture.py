"""Label costs as a picture: one square a pair of classes, dark where a border is cheap."""

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont


def compatibility_picture(costs: np.ndarray, names: Sequence[str], cell: int = 24) -> Image.Image:
    """The matrix with the classes' names on its left and above it, and what the colours mean below.

    Grey is a class that touched no other, of which nothing is known: all its costs are 1.

    Args:
        costs: (K, K), not negative; row l is what a pixel labelled l pays. The least is shown dark blue, the dearest pale yellow.
        names: of the K classes.
        cell: side of a square, in pixels, at least 8.

    Raises:
        ValueError: if `costs` is not square, not finite or negative, names do not fit, or `cell` is too small to hold a letter.
    """
    costs = np.asarray(costs, np.float64)
    if costs.ndim != 2 or costs.shape[0] != costs.shape[1] or len(names) != len(costs) or not len(costs) or cell < 8:
        raise ValueError(
            f"costs of shape {costs.shape}, {len(names)} names, cell {cell}; costs are (K, K), names K, a cell 8 pixels or more"
        )
    if not np.isfinite(costs).all() or costs.min() < 0:
        raise ValueError("costs must be finite and not negative")
    share = costs / max(costs.max(), np.finfo(np.float64).tiny)
    # Two colours whose lightness differs most and whose order the colour-blind see too.
    dark, pale = np.array([28, 38, 110]), np.array([255, 244, 190])
    squares = (dark + share[..., None] * (pale - dark)).round().astype(np.uint8)
    unknown = ((costs == 1) | np.eye(len(costs), dtype=bool)).all(1) & (len(costs) > 2)
    squares[(unknown[:, None] | unknown) & ~np.eye(len(costs), dtype=bool)] = 200
    matrix = Image.fromarray(squares.repeat(cell, 0).repeat(cell, 1))

    font = ImageFont.load_default(size=cell * 0.6)
    room = max(int(font.getlength(name)) for name in names) + cell // 2
    labels = Image.new("RGB", (room, matrix.height), "white")
    draw = ImageDraw.Draw(labels)
    for row, name in enumerate(names):
        draw.text((room - cell // 4, (row + 0.5) * cell), name, fill="black", font=font, anchor="rm")
    scale = (dark + np.linspace(0, 1, matrix.width)[:, None] * (pale - dark)).round().astype(np.uint8)[None].repeat(cell // 2, 0)
    below = room + matrix.height + cell // 2
    picture = Image.new("RGB", (room + matrix.width, below + cell // 2 + cell), "white")
    picture.paste(Image.fromarray(scale), (room, below))
    ends = ImageDraw.Draw(picture)
    ends.text((room, below + cell // 2), "0", fill="black", font=font, anchor="la")
    ends.text((picture.width - 2, below + cell // 2), f"{costs.max():.2g}", fill="black", font=font, anchor="ra")
    ends.text((room - cell // 4, below + cell // 4), "cost", fill="black", font=font, anchor="rm")
    picture.paste(matrix, (room, room))
    picture.paste(labels, (0, room))
    # Turned so that the names above read upwards and end at their columns.
    picture.paste(labels.transpose(Image.Transpose.ROTATE_90), (room, 0))
    return picture
