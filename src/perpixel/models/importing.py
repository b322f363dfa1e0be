"""Other people's weights in our models: `import_weights`."""

import re
from collections.abc import Callable, Mapping
from typing import Any, Literal, get_args

import torch
from timm.models import split_model_name_tag
from torch import Tensor, nn

from perpixel.models.deeplab_v1 import AtrousClassifier, load_classifier
from perpixel.models.deeplab_v3_smp import RESNETS, SmpDecoder
from perpixel.models.encoders import TimmEncoder, batch_norm_is_folded, fit_bands, load_timm
from perpixel.models.key_maps import SMP, TORCHVISION, KeyMap
from perpixel.models.model import SegmentationModel
from perpixel.models.vgg import VGGPath

Source = Literal["torchvision", "timm", "caffe_npz", "smp"]


def import_weights(model: SegmentationModel, state_dict: Mapping[str, Any], source: Source) -> None:
    """Gives `model` weights that were trained elsewhere, in place.

    | source | `state_dict` holds | goes into |
    |---|---|---|
    | "torchvision" | `vgg16` | the trunk of FCN, fc6 and fc7 included; of DeepLab v1 and v2, with these two decimated |
    | "torchvision" | `vgg11` .. `vgg19_bn` | the encoder of SegNet; its norms stay where the file has none |
    | "torchvision" | `googlenet`, `squeezenet1_0` | the encoder of that name |
    | "torchvision" | `fcn_resnet50`, `fcn_resnet101`, with or without auxiliary head | the whole `fcn_resnet` |
    | "torchvision" | `deeplabv3_resnet50`, `deeplabv3_resnet101`, likewise | the whole `deeplab_v3_torchvision` |
    | "timm" | a network of timm, whole or without its head | the encoder |
    | "caffe_npz" | blobs by name of layer, e.g. of the FCN release | every layer of that name |
    | "smp" | `Unet` of segmentation_models.pytorch on a ResNet or on "tu-NAME" | `unet(encoder=NAME, variant="smp")` |
    | "smp" | `DeepLabV3Plus` of it on the same | `deeplab_v3plus(encoder=NAME, variant="smp")` |

    Caffe's blobs are named "conv1_1/0" (or "conv1_1.weight") for weights and "conv1_1/1" (or "conv1_1.bias") for biases, as arrays or
    tensors; fully connected fc6 and fc7 are reshaped to convolutions. Layers of the model that the file lacks stay as they are (so a
    classifier fills the trunk); layers of the file that the model lacks are ignored, as Caffe does by name, but none may fit at all.
    The bands of the first convolution are turned from BGR to RGB. Its mean cannot be folded in, because zeros of the padding are
    Caffe's mean colour: give the model images normalised to 255 x - mean, that is mean (0.4811, 0.4575, 0.4079) and deviation 1/255
    for the RGB mean (122.68, 116.67, 104.01).

    Where the image has other than 3 bands, first filters are averaged over theirs and rescaled (`encoders.fit_bands`).

    Args:
        model: with random weights or others; on any device.
        state_dict: names to tensors, and for "caffe_npz" also numpy arrays.
        source: one of the table.

    Raises:
        ValueError: if the source is unknown, or the weights are not those of this model; the message names the first that differ.
    """
    readers: dict[str, Callable[[SegmentationModel, Mapping[str, Any]], None]] = {
        "torchvision": _from_torchvision,
        "timm": _from_timm,
        "caffe_npz": _from_caffe,
        "smp": _from_smp,
    }
    if source not in readers:
        raise ValueError(f"unknown source {source!r}. Known: {', '.join(get_args(Source))}")
    with torch.no_grad():
        readers[source](model, state_dict)


def _from_torchvision(model: SegmentationModel, state: Mapping[str, Tensor]) -> None:
    source = "torchvision's classifier"
    if any(key.startswith("backbone.") for key in state):
        _whole(model, state, TORCHVISION, "torchvision")
    elif isinstance(model.encoder, VGGPath) and any(isinstance(part, AtrousClassifier) for part in model.decoder.modules()):
        load_classifier(model.encoder, model.decoder, state, source)
    elif isinstance(model.encoder, VGGPath):
        model.encoder.load_classifier(state, source, without_norms=True)
    elif (load := getattr(model.encoder, "load_classifier", None)) is not None:
        load(state, source)
    else:
        raise ValueError(
            f"{type(model.encoder).__name__} takes no classifier of torchvision; models on VGG, GoogLeNet and SqueezeNet do, such as "
            "fcn8s_paper. An encoder of timm takes timm's weights: source='timm'"
        )


def _from_timm(model: SegmentationModel, state: Mapping[str, Tensor]) -> None:
    if not isinstance(model.encoder, TimmEncoder):
        raise ValueError(f"the encoder is {type(model.encoder).__name__}, none of timm's; build the model with encoder=NAME")
    load_timm(model.encoder.network, state, "timm's weights", model.encoder.name)
    model.encoder.batch_norm_folded = batch_norm_is_folded(state)


def _from_smp(model: SegmentationModel, state: Mapping[str, Tensor]) -> None:
    if isinstance(model.decoder, SmpDecoder) and isinstance(model.encoder, TimmEncoder):
        name, wrapped = model.encoder.name, any(key.startswith("encoder.model.") for key in state)
        if wrapped and split_model_name_tag(name)[0] in RESNETS:
            raise ValueError(f"the state dict is of 'tu-{name}', whose stages dilate otherwise than those of {name!r}, which can be read")
    _whole(model, state, SMP, "segmentation_models.pytorch")


def _whole(model: SegmentationModel, state: Mapping[str, Tensor], table: Mapping[type[nn.Module], KeyMap], origin: str) -> None:
    """Renames the keys of a whole model and copies them; every weight of ours must be there, an optional part apart."""
    keys = table.get(type(model.decoder))
    if keys is None:
        known = ", ".join(sorted(decoder.__name__ for decoder in table))
        raise ValueError(
            f"{origin} has no model with a {type(model.decoder).__name__} that can be read; decoders it can be read into: {known}"
        )
    renamed, own = keys.rename(state), model.state_dict()
    # torchvision builds its auxiliary head only on request, and publishes checkpoints with it.
    absent = keys.optional if keys.optional and not any(key.startswith(keys.optional) for key in renamed) else None
    needed = [key for key in own if not key.endswith("num_batches_tracked") and not (absent and key.startswith(absent))]
    lacking = [key for key in needed if key not in renamed]
    foreign = [key for key in state if keys.name(key) not in own]
    if lacking or foreign:
        what = f"lacks {lacking[0]}" if lacking else f"has the foreign {foreign[0]}"
        raise ValueError(f"not the weights of this model as {origin} names them: the state dict {what} (as we name it: {_examples(own)})")
    fitted = {key: _fitted(value, own[key], key, origin) for key, value in renamed.items()}
    for key, value in fitted.items():
        own[key].copy_(value)


def _fitted(value: Tensor, own: Tensor, key: str, origin: str) -> Tensor:
    if value.shape == own.shape:
        return value
    first = value.ndim == own.ndim == 4 and value.shape[1] == 3 and key.startswith("encoder.")
    if not first:
        raise ValueError(
            f"{key} has shape {tuple(value.shape)}, but this model has {tuple(own.shape)}; build it for the same classes"
            + (" and with variant='smp'" if origin.startswith("segmentation") and value.shape[2:] != own.shape[2:] else "")
        )
    return fit_bands(value, own, key)


def _from_caffe(model: SegmentationModel, state: Mapping[str, Any]) -> None:
    names = getattr(model.encoder, "caffe_layers", None)
    if names is None:
        raise ValueError(f"{type(model.encoder).__name__} has no layers by Caffe's names; FCN's published nets do, such as fcn8s_paper")
    places = {caffe: f"encoder.{ours}" for caffe, ours in names().items()}
    layers = getattr(model.decoder, "layers", nn.ModuleDict())
    places |= {caffe: f"decoder.layers.{caffe}" for caffe in layers}
    own, first = model.state_dict(), next(iter(names()))
    found: dict[str, Tensor] = {}
    for key, blob in state.items():
        match = re.fullmatch(r"(.+?)[./](0|1|weight|bias)", key)
        if match is None:
            raise ValueError(f"blob {key!r}: name it LAYER/0 for weights and LAYER/1 for biases, for example conv1_1/0")
        layer, part = match[1], "weight" if match[2] in ("0", "weight") else "bias"
        target = own.get(f"{places[layer]}.{part}") if layer in places else None
        if target is not None:
            value = torch.as_tensor(blob).to(target.dtype)
            found[f"{places[layer]}.{part}"] = _caffe_blob(value, target, key, flip=layer == first and part == "weight")
    if not found:
        raise ValueError(f"no blob has the name of a layer of this model; it has {', '.join(places)}")
    for name, value in found.items():
        own[name].copy_(value)


def _caffe_blob(value: Tensor, target: Tensor, key: str, flip: bool) -> Tensor:
    # Old files store biases and fully connected layers with axes of length 1 before them; the latter are (outputs, inputs) here.
    while value.ndim > 1 and value.ndim != target.ndim and value.shape[0] == 1:
        value = value[0]
    if value.ndim == 4 and target.ndim == 4 and value.shape[:2] == (1, 1):
        value = value[0, 0]
    if value.ndim == 2 and target.ndim == 4 and value.shape == target.flatten(1).shape:
        value = value.reshape(target.shape)
    if flip and value.ndim == 4 and value.shape[1] >= 3:  # what follows the three colours, as depth does, keeps its place
        value = torch.cat([value[:, :3].flip(1), value[:, 3:]], dim=1)
        value = fit_bands(value, target, key)
    if value.shape != target.shape:
        raise ValueError(
            f"blob {key!r} has shape {tuple(value.shape)}, but this model has {tuple(target.shape)}; build it for the same classes"
        )
    return value


def _examples(own: Mapping[str, Tensor]) -> str:
    return ", ".join([*list(own)[:1], *list(own)[-1:]])
