"""GoogLeNet as an encoder, on torchvision's layers. Source: Szegedy et al. 2014, arXiv:1409.4842, table 1."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torchvision.models.googlenet import GoogLeNet

from perpixel.models.encoders import fit_bands
from perpixel.models.model import Features


class GoogLeNetPath(nn.Module):
    """Image -> five maps at strides 2 to 32: the last before each pooling, and inception 5b.

    It is torchvision's variant, so that its weights fit: with batch norm, and 3x3 where the paper has 5x5. The average pooling, the
    classifier and the two auxiliary classifiers are left out, as in FCN (arXiv:1411.4038, sec. 4.1).

    Args:
        in_channels: bands of the image.
    """

    def __init__(self, in_channels: int = 3) -> None:
        super().__init__()
        if in_channels < 1:
            raise ValueError(f"in_channels is {in_channels}; an image has at least 1 band")
        whole = GoogLeNet(aux_logits=False, transform_input=False, init_weights=True)
        self.channels, self.strides = [64, 192, 480, 832, 1024], [2, 4, 8, 16, 32]
        self.layers = nn.ModuleDict({name: part for name, part in whole.named_children() if name not in ("avgpool", "dropout", "fc")})
        if in_channels != 3:
            first = nn.Conv2d(in_channels, 64, 7, stride=2, padding=3, bias=False)
            nn.init.trunc_normal_(first.weight, std=0.01, a=-2, b=2)  # as torchvision does
            self.layers["conv1"].conv = first

    def forward(self, image: Tensor) -> Features:
        x, maps = self._as_trained(image), []
        for name, layer in self.layers.items():
            if name.startswith("maxpool"):
                maps.append(x)
            x = layer(x)
        return Features([*maps, x])

    @torch.no_grad()
    def load_classifier(self, state: Mapping[str, Tensor], source: str = "the state dict") -> None:
        """Takes the trunk of torchvision's `googlenet`; other than 3 bands as in `encoders.fit_bands`.

        Raises:
            ValueError: if it is another network's.
        """
        own = self.layers.state_dict()
        lacking = [name for name in own if name not in state]
        if lacking:
            raise ValueError(
                f"{source}: not the weights of torchvision's googlenet: it lacks {lacking[0]}; give the file made for googlenet"
            )
        self.layers.load_state_dict({name: fit_bands(state[name], value, f"{source}: {name}") for name, value in own.items()})

    def _as_trained(self, image: Tensor) -> Tensor:
        """Its weights come from a training on values -1..1; ours are normalised by ImageNet's mean and deviation, as torchvision's are."""
        if image.shape[1] != 3:
            return image
        mean, std = image.new_tensor([0.485, 0.456, 0.406]), image.new_tensor([0.229, 0.224, 0.225])
        return image * (std / 0.5)[:, None, None] + ((mean - 0.5) / 0.5)[:, None, None]
