"""What every model is made of: an encoder, a decoder, and the rule for the sizes they take."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from torch import Tensor, nn
from torch.nn import functional


@dataclass
class Features:
    """What an encoder saw.

    Attributes:
        maps: (N, C_i, H_i, W_i) each, finest first, at the strides the encoder states.
        pool_indices: positions of the maxima of each pooling layer, finest first, from encoders that are asked for them (SegNet).
    """

    maps: list[Tensor]
    pool_indices: list[Tensor] | None = None


class Encoder(Protocol):
    """Image -> `Features`. An `nn.Module` that states the channels and strides of its maps, finest first."""

    channels: list[int]
    strides: list[int]

    def __call__(self, image: Tensor) -> Features: ...


class Decoder(Protocol):
    """`Features` and the size to label -> logits (N, K, *size). An `nn.Module`.

    A decoder whose paper trains on more than its logits is a `SupervisedDecoder`.
    """

    def __call__(self, features: Features, size: tuple[int, int]) -> Tensor: ...


@runtime_checkable
class SupervisedDecoder(Protocol):
    """A decoder that is trained on other maps of logits than the one it predicts with, or on more of them, each of a size of its own.

    Attributes:
        loss_weights: of the loss on each of them.
    """

    loss_weights: tuple[float, ...]

    def supervised(self, features: Features, size: tuple[int, int]) -> list[Tensor]:
        """Logits (N, K, h, w), as many as `loss_weights`; `size` is that of the logits it predicts with."""
        ...


@dataclass(frozen=True)
class InputGeometry:
    """The image sides a model takes: `multiple * k + remainder`, at least `minimum`; and what it labels of them.

    Attributes:
        multiple: step between legal sides, in pixels.
        remainder: a legal side modulo `multiple`.
        margin: pixels at each border that are seen but not labelled (unpadded convolutions).
        minimum: smallest legal side, in pixels.
        pads: whether the model brings other sizes to a legal one itself, by repeating the last pixels at the right and below, and cuts
            the logits. Models on any encoder do; published ones refuse what they were not made for. Prediction mirrors instead.
        cell: tiles start at multiples of this, where the model's subsampling is in phase with that of the whole image; 0: `multiple`.
    """

    multiple: int = 1
    remainder: int = 0
    margin: int = 0
    minimum: int = 1
    pads: bool = False
    cell: int = 0

    def __post_init__(self) -> None:
        if self.multiple < 1 or not 0 <= self.remainder < self.multiple:
            raise ValueError(f"multiple {self.multiple}, remainder {self.remainder}: need multiple >= 1 and 0 <= remainder < multiple")
        if self.cell < 0 or self.cell % self.multiple:
            raise ValueError(f"cell {self.cell}, multiple {self.multiple}: need a multiple of it, or 0")
        if self.margin < 0 or self.minimum <= 2 * self.margin:
            raise ValueError(f"margin {self.margin}, minimum {self.minimum}: need margin >= 0 and a minimum that leaves a pixel to label")
        if self.pads and self.margin:
            raise ValueError(
                f"margin {self.margin} with pads: need margin 0, since repeated pixels are no substitute for an image's surroundings"
            )

    def fits(self, side: int) -> bool:
        """Whether an image side of `side` pixels is legal."""
        return side >= self.minimum and side % self.multiple == self.remainder

    def fit(self, side: int) -> int:
        """The smallest legal side that is at least `side` pixels."""
        side = max(side, self.minimum)
        return side + (self.remainder - side) % self.multiple

    def describe(self) -> str:
        """The rule in words, for messages: "sides of 16*k + 12, at least 188"."""
        if self.multiple == 1:
            return f"sides of at least {self.minimum}"
        rest = f" + {self.remainder}" if self.remainder else ""
        return f"sides of {self.multiple}*k{rest}, at least {self.fit(self.minimum)}"


def whole_cells(strides: Sequence[int]) -> InputGeometry:
    """The rule of every model on any encoder: whole pixels of the coarsest map, at least 2 per side; other sizes are padded.

    So maps lie on one another pixel by pixel whatever the size of the image, and batch norm can train on a batch of one.
    """
    coarsest = max(strides)
    return InputGeometry(multiple=coarsest, minimum=2 * coarsest, pads=True)


class SegmentationModel(nn.Module):
    """Image -> logits of every pixel: `decoder(encoder(image), size)`.

    Attributes:
        bands: C, of the images that the model takes: the encoder's `in_channels`, or those of its first convolution; None where it has
            neither.
        multipliers: factors on learning rate and weight decay of single parameters, by their names here; a paper's `lr_mult` and
            `decay_mult`. Parameters it does not name have the run's own.
        loss_weights: of the losses on what `supervised` gives; (1.0,) where a model is trained on its logits alone.
    """

    def __init__(
        self,
        encoder: Encoder,
        decoder: Decoder,
        classes: int,
        geometry: InputGeometry,
        multipliers: Mapping[str, tuple[float, float]] | None = None,
    ) -> None:
        super().__init__()
        if classes < 1:
            raise ValueError(f"a model needs at least 1 class, not {classes}")
        if not (isinstance(encoder, nn.Module) and isinstance(decoder, nn.Module)):
            raise TypeError(f"encoder and decoder must be torch modules, not {type(encoder).__name__} and {type(decoder).__name__}")
        self.encoder: nn.Module = encoder
        self.decoder: nn.Module = decoder
        self.classes = classes
        first = next((layer.in_channels for layer in encoder.modules() if isinstance(layer, nn.Conv2d)), None)
        self.bands: int | None = getattr(encoder, "in_channels", first)
        self.geometry = geometry
        self.multipliers = dict(multipliers or {})
        self.loss_weights = decoder.loss_weights if isinstance(decoder, SupervisedDecoder) else (1.0,)

    def forward(self, image: Tensor) -> Tensor:
        """Logits of a batch of images.

        Args:
            image: (N, C, H, W) float, normalised as in training; H and W as `geometry` says, or any where it `pads`.

        Returns:
            (N, K, H - 2 * margin, W - 2 * margin) logits of K classes.

        Raises:
            ValueError: if `image` is not four-dimensional, or its bands or its size are not legal.
        """
        height, width = self.labelled_size(image)  # first: its message says more than an encoder's
        down, right = (self.geometry.fit(side) - side for side in (height, width)) if self.geometry.pads else (0, 0)
        if down or right:
            # Not zeros, which would count in the mean of image pooling and make an edge where there is none.
            image = functional.pad(image, (0, right, 0, down), mode="replicate")
        logits: Tensor = self.decoder(self.encoder(image), (height + down, width + right))
        return logits[..., :height, :width]

    def supervised(self, image: Tensor) -> list[Tensor]:
        """What training takes losses on: the logits as `forward` gives them, or what the decoder is trained on, as `loss_weights` says."""
        if not isinstance(self.decoder, SupervisedDecoder):
            return [self(image)]
        size = self.labelled_size(image)
        return self.decoder.supervised(self.encoder(image), size)

    def labelled_size(self, image: Tensor) -> tuple[int, int]:
        """(height, width) of the logits of `image`.

        Raises:
            ValueError: if `image` is not four-dimensional, has other bands than the model's, or its size is not legal and the model does
                not pad.
        """
        if image.ndim != 4:
            raise ValueError(f"image has shape {tuple(image.shape)}; a model takes (N, C, H, W). Add the missing axes, e.g. image[None]")
        if self.bands not in (None, image.shape[1]):
            raise ValueError(f"image has {image.shape[1]} bands; this model takes {self.bands}. Build it with in_channels={image.shape[1]}")
        height, width = image.shape[-2:]
        if not (self.geometry.pads or (self.geometry.fits(height) and self.geometry.fits(width))):
            raise ValueError(
                f"image is {height}x{width} pixels (height x width); this model needs {self.geometry.describe()}. "
                f"Pad it to {self.geometry.fit(height)}x{self.geometry.fit(width)}, or call predict_tiled, which pads for you."
            )
        border = 2 * self.geometry.margin
        return height - border, width - border
