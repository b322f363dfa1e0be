"""CaffeNet, the AlexNet of Caffe's model zoo, fully convolutional: trunk of FCN-AlexNet.

Source: Krizhevsky, Sutskever & Hinton 2012; layers in the order of CaffeNet (pooling before normalisation), as in the release of
Long et al. 2015, voc-fcn-alexnet/net.py.
"""

from torch import Tensor, nn

from perpixel.models.layers import initialise
from perpixel.models.model import Features

_PUBLISHED_WIDTH = 96  # maps of conv1


class CaffeNetPath(nn.Module):
    """Image -> maps at strides 8, 16 and 32: the two normalised poolings, and fc7.

    Args:
        in_channels: bands of the image.
        width: maps of conv1, a multiple of 6; 96 as published. All other layers follow in proportion.
        dropout: share of values dropped after fc6 and fc7 while training.

    Poolings round up, as in Caffe. The two halves of conv2, conv4 and conv5 do not see each other (groups of 2).
    """

    def __init__(self, in_channels: int = 3, width: int = _PUBLISHED_WIDTH, dropout: float = 0.5) -> None:
        super().__init__()
        if in_channels < 1 or width < 6 or width % 6:
            raise ValueError(f"in_channels is {in_channels} and width {width}; need at least 1 band, and a width that is a multiple of 6")
        second, third, hidden = width * 8 // 3, 4 * width, width * 128 // 3
        self.channels, self.strides = [width, second, hidden], [8, 16, 32]
        self.conv1 = nn.Conv2d(in_channels, width, 11, stride=4, padding=100)
        self.conv2 = nn.Conv2d(width, second, 5, padding=2, groups=2)
        self.conv3 = nn.Conv2d(second, third, 3, padding=1)
        self.conv4 = nn.Conv2d(third, third, 3, padding=1, groups=2)
        self.conv5 = nn.Conv2d(third, second, 3, padding=1, groups=2)
        self.fc6 = nn.Conv2d(second, hidden, 6)
        self.fc7 = nn.Conv2d(hidden, hidden, 1)
        self.pool = nn.MaxPool2d(3, 2, ceil_mode=True)
        self.normalise = nn.LocalResponseNorm(5, alpha=1e-4, beta=0.75, k=1)
        self.relu, self.drop = nn.ReLU(inplace=True), nn.Dropout(dropout)
        initialise(self)

    def forward(self, image: Tensor) -> Features:
        first = self.normalise(self.pool(self.relu(self.conv1(image))))
        second = self.normalise(self.pool(self.relu(self.conv2(first))))
        x = self.relu(self.conv4(self.relu(self.conv3(second))))
        x = self.pool(self.relu(self.conv5(x)))
        x = self.drop(self.relu(self.fc6(x)))
        return Features([first, second, self.drop(self.relu(self.fc7(x)))])

    def caffe_layers(self) -> dict[str, str]:
        """Caffe's name of each layer -> its name here, from the image on."""
        return {name: name for name, layer in self.named_children() if isinstance(layer, nn.Conv2d)}
