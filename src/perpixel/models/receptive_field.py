"""How far a network sees, by one walk through it: nothing is computed, so the largest takes a moment."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from perpixel.models.model import SegmentationModel

_POOLINGS = ("max_pool2d", "max_pool2d_with_indices", "avg_pool2d")
_OVER_ALL = ("mean", "adaptive_avg_pool2d", "adaptive_max_pool2d")
_RESIZINGS = ("interpolate", "conv_transpose2d", "max_unpool2d")


@dataclass(frozen=True)
class View:
    """What one pixel of a map sees.

    Attributes:
        field: side of the square of image pixels that it depends on; infinite where it depends on the whole image.
        stride: image pixels between two pixels of the map.
    """

    field: float
    stride: int

    def through(self, kernel: int, stride: int, dilation: int) -> "View":
        """Behind a convolution or pooling: field + (kernel - 1) * dilation * stride so far."""
        return View(self.field + (kernel - 1) * dilation * self.stride, self.stride * stride)


def coarsest_view(model: SegmentationModel, in_channels: int = 3) -> View:
    """The widest view, and the largest stride, that a net of convolutions and poolings has before it first resizes a map.

    That is the view of its coarsest map and of the scores on it: pool5 of SegNet, fc7 of FCN, the pyramid of DeepLab, the lowest level
    of U-Net. Copies of the image at other scales do not count. Attention is not understood: such nets get a view that is too narrow.

    Args:
        model: on the meta device.
        in_channels: bands of its image.
    """
    side = model.geometry.fit(64)
    model.eval()
    with torch.no_grad(), torch.device("meta"):
        image = torch.zeros(1, in_channels, side, side)
        with _Walk(image) as walk:
            model(image)
    views = [view for _, view in walk.views.values() if view is not None]
    return View(max(view.field for view in views), max(view.stride for view in views))


class _Walk(TorchFunctionMode):
    """Notes for every tensor that comes of the image what it sees; None: it comes of a resized map."""

    def __init__(self, image: Tensor) -> None:
        super().__init__()
        # Tensors are kept, so that no two have the same id.
        self.views: dict[int, tuple[Tensor, View | None]] = {id(image): (image, View(1, 1))}

    def __torch_function__(
        self, func: Callable[..., Any], types: Iterable[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        options = dict(kwargs or {})
        result = func(*args, **options)
        seen = [self.views[id(x)][1] for x in _tensors((*args, *options.values())) if id(x) in self.views]
        if seen:
            view = self._behind(getattr(func, "__name__", ""), seen, args, options)
            for x in _tensors([result]):
                self.views[id(x)] = (x, view)
        return result

    def _behind(self, name: str, seen: list[View | None], args: tuple[Any, ...], options: dict[str, Any]) -> View | None:
        if name in _RESIZINGS or None in seen:
            return None
        known = [view for view in seen if view is not None]
        view = View(max(view.field for view in known), max(view.stride for view in known))
        if name in _OVER_ALL:
            return View(float("inf"), view.stride)
        given = dict(enumerate(args))
        if name == "conv2d":
            kernel = max(given[1].shape[-2:])
            return view.through(
                kernel, _largest(given.get(3, options.get("stride", 1))), _largest(given.get(5, options.get("dilation", 1)))
            )
        if name in _POOLINGS:
            kernel = _largest(given.get(1, options.get("kernel_size")))
            dilation = 1 if name == "avg_pool2d" else given.get(4, options.get("dilation", 1))
            return view.through(kernel, _largest(given.get(2, options.get("stride")) or kernel), _largest(dilation))
        return view


def _largest(sides: Any) -> int:
    """Of the two sides, which are a number or a pair."""
    return int(sides if isinstance(sides, int) else max(sides))


def _tensors(values: Iterable[Any]) -> Iterable[Tensor]:
    """Those among arguments or results, and in lists of them."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors(value)
