"""torchvision's DeepLab v3 weights under the names of `deeplab_v3_torchvision`."""

from collections.abc import Mapping

import torch
from torch import Tensor

# torchvision's prefix -> ours. Its pyramid is classifier.0: convs.0 to convs.3 are 1x1 and rates, convs.4 the image pooling.
_PREFIXES = {
    "backbone.": "encoder.network.",
    "classifier.0.convs.4.1.": "decoder.pyramid.context.0.",
    "classifier.0.convs.4.2.": "decoder.pyramid.context.1.",
    **{f"classifier.0.convs.{branch}.": f"decoder.pyramid.branches.{branch}." for branch in range(4)},
    "classifier.0.project.": "decoder.pyramid.project.",
    "classifier.1.": "decoder.convolve.0.",
    "classifier.2.": "decoder.convolve.1.",
    "classifier.4.": "decoder.classify.",
    "aux_classifier.": "decoder.auxiliary.",
}


def deeplab_v3_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dict of torchvision's `deeplabv3_resnet50` or `_resnet101` as one for `deeplab_v3_torchvision`.

    The 1x1 convolution after the pyramid takes its five parts in another order here (image pooling first): its weights are reordered.
    Without an auxiliary head in `state` there is none in what is returned.

    Raises:
        ValueError: naming a key that belongs to no part of that model.
    """
    renamed: dict[str, Tensor] = {}
    for key, value in state.items():
        prefix = next((theirs for theirs in _PREFIXES if key.startswith(theirs)), None)
        if prefix is None:
            raise ValueError(f"{key!r} is no key of torchvision's DeepLab v3; give the state dict of deeplabv3_resnet50 or _resnet101")
        renamed[_PREFIXES[prefix] + key.removeprefix(prefix)] = value
    mix = "decoder.pyramid.project.0.weight"
    if mix in renamed:
        *others, context = renamed[mix].chunk(5, dim=1)
        renamed[mix] = torch.cat([context, *others], dim=1)
    return renamed
