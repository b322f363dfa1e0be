"""What every refiner asks of its input: scores of pixels and the image they belong to."""

import torch
from torch import Tensor


def checked(logits: Tensor, image: Tensor) -> tuple[Tensor, Tensor]:
    """Scores and image that a refiner can work on.

    Args:
        logits: (N, K, H, W) real scores before softmax, or log-probabilities; float.
        image: (N, C, H, W), any real type, on the scale of its file (0..255 where it has 8 bits), not normalised.

    Returns:
        Both in float32, or float64 where the logits are, on their device: half precision is too coarse for colours and messages.

    Raises:
        ValueError: if either is not four-dimensional or empty, sizes or batches differ, or a value is not finite.
        TypeError: if the logits are not float.
    """
    for name, value in (("logits", logits), ("image", image)):
        if value.ndim != 4 or 0 in value.shape:
            raise ValueError(f"{name}: shape {tuple(value.shape)}; a refiner takes (N, channels, height, width) with at least one pixel")
    if not logits.is_floating_point():
        raise TypeError(f"logits are {logits.dtype}; a refiner takes float scores before softmax, or log-probabilities")
    if logits.shape[-2:] != image.shape[-2:]:
        raise ValueError(
            f"scores are {logits.shape[-2]}x{logits.shape[-1]} pixels (height x width) and the image "
            f"{image.shape[-2]}x{image.shape[-1]}; resize the scores to the image's size first"
        )
    if logits.shape[0] != image.shape[0]:
        raise ValueError(f"{logits.shape[0]} score maps came with {image.shape[0]} images; a batch has one of each")
    if logits.dtype not in (torch.float32, torch.float64):
        logits = logits.float()
    image = image.to(logits)
    for name, value in (("scores", logits), ("image", image)):
        if not torch.isfinite(value).all():
            raise ValueError(f"{name}: {int((~torch.isfinite(value)).sum())} values are NaN or infinite; a refiner takes finite numbers")
    return logits, image
