"""From a checked data set and this machine to a full recipe, with one reason per choice."""

import json
import math
import os
import re
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from inspect import signature
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import timm
import torch
from safetensors import SafetensorError, safe_open

from perpixel.check import Check
from perpixel.losses import PIXEL_LOSSES
from perpixel.models import MODELS, InputGeometry, build
from perpixel.models.encoders import read_weights
from perpixel.models.torchvision_trunks import IMAGENET_MEAN, IMAGENET_STD, TRUNKS, any_encoder
from perpixel.models.unet import decoder_stages
from perpixel.optimisation import PAUSE, validation_seconds
from perpixel.recipe import Recipe, TrainSection, check_parts, merge, value_at
from perpixel.weight_files import no_weights

CROP_AREA = {"cpu": 256 * 320, "cuda": 512 * 512}  # pixels; a step of 4 such crops takes about half a second on two cores
DEPTH = {"uint8": 1, "uint16": 2, "float32": 4}  # bytes a value
QUICK_PASS = 100  # images
PHOTO_ENCODER = {"cpu": "mobilenetv2_100", "cuda": "resnet34"}


@dataclass(frozen=True)
class Machine:
    """What the run may use. Memory in bytes."""

    cores: int
    memory: int
    gpu: str | None
    gpu_memory: int
    bf16: bool  # matrix units for bfloat16: AMX or AVX512-BF16 on a CPU, compute capability 8.0 on a GPU

    @property
    def words(self) -> str:
        on = f"{self.gpu} with {self.gpu_memory / 2**30:.0f} GiB" if self.gpu else f"{self.cores} CPU cores, {self.memory / 2**30:.0f} GiB"
        return f"{on}, {'bf16' if self.bf16 else 'no bf16'}"


def this_machine() -> Machine:
    """What the machine that this process runs on has for it: a container's limit counts, and processes of one `torchrun` share."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 8 * 2**30
    limit = Path("/sys/fs/cgroup/memory.max")
    if limit.is_file() and (text := limit.read_text().strip()).isdigit():
        memory = min(memory, int(text))
    memory //= int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        return Machine(cores, memory, properties.name, properties.total_memory, torch.cuda.get_device_capability(0) >= (8, 0))
    return Machine(cores, memory, None, 0, torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


class Choices:
    """Values by dotted key, each with its reason; what the user gave wins over what is proposed."""

    def __init__(self, given: Mapping[str, Any], origins: Sequence[tuple[str, Mapping[str, Any]]] = ()) -> None:
        self.given, self.origins, self.taken, self.reasons = given, origins, dict[str, Any](), dict[str, str]()

    def origin(self, key: str) -> str:
        """Who gave the value in force."""
        return next((words for words, parts in self.origins if _has(parts, key)), "as you asked")

    def keep(self, key: str) -> None:
        """Settles `key` as it was given."""
        self.take(key, value_at(self.given, key), self.origin(key))

    def take(self, key: str, proposal: Any, reason: str) -> Any:
        """Settles `key`; returns the value in force."""
        value = value_at(self.given, key) if _has(self.given, key) else proposal
        section: dict[str, Any] = self.taken
        *sections, last = key.split(".")
        for part in sections:
            section = section.setdefault(part, {})
        section[last] = value
        self.reasons[key] = f"{_words(value)} - {reason if value == proposal else self.origin(key)}"
        return value


def plan(
    report: Check, machine: Machine, given: Mapping[str, Any], origins: Sequence[tuple[str, Mapping[str, Any]]] = ()
) -> tuple[Recipe, dict[str, str]]:
    """A full recipe for a data set on a machine.

    Args:
        report: of a set that is ready.
        given: parts of a recipe that win over every choice made here.
        origins: of these parts, in words such as "as the recipe says", the first that holds a key; else it is "as you asked".

    Returns:
        The recipe, and for each planned key `value - reason`.

    Raises:
        ValueError: the parts given do not fit together or have illegal values.
    """
    choices = Choices(given, origins)
    _plan_data(choices, report)
    _plan_model(choices, report, machine)
    _plan_batches(choices, report, machine)
    _plan_optimisation(choices, report)
    _plan_augmentation(choices, report)
    _plan_length(choices, report)
    _plan_validations(choices, report)
    parts = merge(given, choices.taken)  # what was given and stands among the choices has won there already
    check_parts(parts, "the recipe")
    return Recipe.model_validate(parts), choices.reasons


def _plan_data(choices: Choices, report: Check) -> None:
    choices.take("data.classes", report.classes, f"from {report.classes_from}")
    choices.take("data.colors", [list(color) for color in report.colors], "from the masks' palette, or the Pascal VOC colours")
    choices.take("data.label_map", report.label_map.to_dict(), f"masks hold {report.encoding}")
    choices.take("data.bands", report.bands, "bands of the images")
    choices.take("data.dtype", report.dtype, "depth of the images")


def _plan_model(choices: Choices, report: Check, machine: Machine) -> None:
    name = choices.take("model.name", "unet", "the surest choice from few images to many")
    options = signature(MODELS[name]).parameters if name in MODELS else {}  # `build` refuses unknown names
    weights = value_at(choices.given, "model.encoder_weights")
    if "encoder" not in options:
        if weights:
            choices.keep("model.encoder_weights")
        return
    stated = value_at(choices.given, "model.encoder")  # a resumed run's recipe states it, and needs the file no longer
    encoder, reason = _propose_encoder(report, machine, weights) if stated is None else (stated, choices.origin("model.encoder"))
    default = options["encoder"].default
    if name != "unet" and (encoder == "plain" or (default.startswith("vgg") and not encoder.startswith("vgg"))):
        encoder, reason = default, f"the default of {name}"
    encoder = choices.take("model.encoder", encoder, reason)
    gpu = machine.gpu is not None
    if value_at(choices.given, "model.start_from"):
        return  # the bundle's model has its options
    if value_at(choices.given, "model.options.variant") == "smp":
        options = {}  # the layout of checkpoints: nothing of it is open
    if "stage_scores" in options:
        choices.take("model.options.stage_scores", True, "what coarse maps know reaches the logits directly: learns many times sooner")
    if encoder == "plain":
        choices.take("model.options.width", 64 if gpu else 16, "the paper's width" if gpu else "narrow: a processor's time goes further")
        return
    if not _has(choices.given, "model.encoder_weights"):
        online = _hub_is_reachable()
        why = "published weights are downloaded" if online else "no hub can be reached: from scratch"
        choices.take("model.encoder_weights", True if online else None, why)
    else:
        choices.keep("model.encoder_weights")
    strides = _strides(encoder)
    if not gpu and "decoder_channels" in options and (len(strides) == 5 or strides == [2, 4, 8, 16]):
        head = choices.take("model.options.head_stride", 2, "the last stage costs as much as all others together")
        light = [128, 64, 32, 32, 16][: len(decoder_stages(strides, head or 1))]
        choices.take("model.options.decoder_channels", light, "a light decoder: a processor's time goes further")
        choices.take("model.options.dropout", 0.1, "few images")


def _propose_encoder(report: Check, machine: Machine, weights: Any) -> tuple[str, str]:
    photo = PHOTO_ENCODER["cuda" if machine.gpu else "cpu"]
    if isinstance(weights, str):
        if not Path(weights).is_file():
            raise ValueError(f"model.encoder_weights: {weights}: no such file. Give a .safetensors or .pth file, true (download) or null.")
        if other := no_weights(Path(weights)):  # whose name says nothing then; to read it all is the model's
            raise ValueError(f"{weights}: {other}")
        name = encoder_of(Path(weights))
        if name in TRUNKS or timm.is_model(name):
            return name, f"the encoder that {Path(weights).name} was made for"
        return photo, f"the usual one: {Path(weights).name} does not say which encoder it was made for"
    if report.bands != 3 or report.dtype != "uint8":
        return "plain", f"{report.bands} band{'s' * (report.bands != 1)} of {report.dtype} are no photographs: the U-Net path, from scratch"
    if weights or (weights is None and _hub_is_reachable()):
        return photo, f"8-bit RGB: ImageNet weights help, and this one suits {machine.gpu or 'a processor'}"
    if weights is False:
        return "plain", "without published weights: the U-Net path, from scratch"
    return (
        "plain",
        "no hub can be reached for ImageNet weights (--set model.encoder_weights=FILE takes a file): the U-Net path, from scratch",
    )


def encoder_of(weights: Path) -> str:
    """The network of timm or torchvision that a file of weights is for: by its metadata `layout`, else by its name."""
    words = _metadata(weights).get("layout", "").split()
    if words[:1] in (["timm"], ["torchvision"]):
        return words[-1]
    return re.sub(r"-[0-9a-f]{8}$", "", weights.stem)  # torchvision and timm put a digest behind the name


def input_statistics(encoder: str, weights: bool | str | None, report: Check) -> tuple[list[float], list[float], str]:
    """Mean and standard deviation per band that the encoder expects of its input, 0..1, and the reason."""
    if isinstance(weights, str) and (card := _metadata(Path(weights)).get("perpixel")):
        seen = json.loads(card)
        if len(seen["mean"]) == report.bands:
            return seen["mean"], seen["std"], f"as {Path(weights).name} was trained"
    if report.bands == 3 and isinstance(weights, str):
        words = _metadata(Path(weights)).get("input", "")
        if stated := re.search(r"mean ([\d.]+), std ([\d.]+)", words):
            return [float(stated[1])] * 3, [float(stated[2])] * 3, f"stated in {Path(weights).name}"
        if "ImageNet mean" in words:
            return list(IMAGENET_MEAN), list(IMAGENET_STD), f"ImageNet's, as stated in {Path(weights).name}"
    if report.bands == 3 and weights and (encoder in TRUNKS or not encoder):  # without a choice of encoders: a published trunk
        return list(IMAGENET_MEAN), list(IMAGENET_STD), f"ImageNet's, as {encoder or 'the trunk'} was trained for torchvision"
    if report.bands == 3 and weights:
        published = timm.get_pretrained_cfg(encoder)
        if published is not None:
            return list(published.mean), list(published.std), f"as {encoder} was trained by timm"
    return report.mean, report.std, "measured on the training images"


def _metadata(weights: Path) -> dict[str, str]:
    if weights.suffix != ".safetensors" or not weights.is_file():
        return {}
    try:
        with safe_open(weights, framework="pt") as file:
            return dict(file.metadata() or {})
    except SafetensorError:
        read_weights(weights)  # says what the file is instead
        raise


@cache
def _hub_is_reachable() -> bool:
    """Whether weights can be downloaded: asked once, and given up soon."""
    if os.environ.get("HF_HUB_OFFLINE", "") not in ("", "0"):
        return False
    host = urlparse(os.environ.get("HF_ENDPOINT", "https://huggingface.co")).hostname or ""
    try:
        socket.create_connection((host, 443), timeout=2).close()
    except OSError:
        return False
    return True


def _plan_batches(choices: Choices, report: Check, machine: Machine) -> None:
    """Crop and batch from the images' size, the model's geometry and the machine."""
    name, geometry = choices.taken["model"]["name"], _geometry(choices, report)
    area = CROP_AREA["cuda" if machine.gpu else "cpu"]
    sides = _typical(report, 0), _typical(report, 1)
    share = min(1.0, math.sqrt(area / (sides[0] * sides[1])))
    crop = [_nearest_legal(share * side + 2 * geometry.margin, geometry) for side in sides]
    crop = choices.take("train.crop", crop, f"{100 * share:.0f} % of the typical side, in sizes that {name} takes")
    if not all(geometry.fits(side) for side in crop):
        legal = "x".join(str(geometry.fit(side)) for side in crop)
        raise ValueError(f"train.crop is {crop[0]}x{crop[1]}; {name} needs {geometry.describe()}. The nearest is {legal}.")
    choices.take("train.batch", *_batch(machine))
    choices.take("train.precision", "bf16-mixed" if machine.bf16 else "32-true", f"this machine: {machine.words}")
    values = sum(height * width * count for (height, width), count in report.sizes.items())
    weighed = 4 if value_at(choices.given, "train.border_weights") else 0  # a float32 for each pixel
    decoded = values * (report.bands * DEPTH[report.dtype] + (1 if len(report.classes) <= 255 else 2) + weighed)
    fits = decoded < machine.memory / 4
    choices.take("train.cache", fits, f"decoded, the set takes {decoded / 2**30:.2f} of {machine.memory / 2**30:.0f} GiB")
    workers = min(8, machine.cores - 1) if machine.gpu else 0
    choices.take("train.workers", workers, "they read and cut while the GPU works" if workers else "the cores are busy with the network")
    choices.take(
        "train.augment_on_device",
        machine.gpu is not None,
        "it resamples and recolours; the cores read, cut and label" if machine.gpu else "there is no GPU",
    )


def _batch(machine: Machine) -> tuple[int, str]:
    if machine.gpu is None:
        return 4, "many updates matter more than large ones"
    room = machine.gpu_memory // 2**30
    return (16 if room >= 15 else 8 if room >= 7 else 4), f"fits {room} GiB with room to spare"


def _typical(report: Check, axis: int) -> int:
    """The median side in pixels; axis 0: height, 1: width."""
    every = sorted(size[axis] for size, count in report.sizes.items() for _ in range(count))
    return every[len(every) // 2]


def _nearest_legal(side: float, geometry: InputGeometry) -> int:
    above = geometry.fit(math.ceil(side))
    below = above - geometry.multiple
    return below if below >= geometry.minimum and side - below < above - side else above


def _geometry(choices: Choices, report: Check) -> InputGeometry:
    model = merge(choices.taken["model"], choices.given.get("model") or {})
    options = {key: value for key, value in (model.get("options") or {}).items() if value is not None}
    with torch.device("meta"):
        return build(model["name"], len(report.classes), encoder=model.get("encoder"), in_channels=report.bands, **options).geometry


def _strides(encoder: str) -> list[int]:
    with torch.device("meta"):
        return any_encoder(encoder).strides


def _plan_optimisation(choices: Choices, report: Check) -> None:
    model = choices.taken["model"]
    pretrained = bool(model.get("encoder_weights") or value_at(choices.given, "model.start_from"))
    mean, std, reason = input_statistics(model.get("encoder", ""), model.get("encoder_weights"), report)
    for key, proposal in (("mean", mean), ("std", std)):
        value = choices.take(f"data.{key}", proposal, reason)
        if isinstance(value, list) and len(value) == 1:  # as a recipe for images of any kind states it
            choices.taken["data"][key] = value * report.bands
    sgd = value_at(choices.given, "train.optimizer") == "sgd"
    rate = 0.01 if sgd else 0.004 if pretrained else 0.02
    choices.take("train.lr", rate, "SGD with momentum" if sgd else "AdamW with a cosine to zero; short runs need a high rate")
    choices.take("train.warmup", 0.04, "settles batch norm and the new layers")
    scale = 0.02 if pretrained else 1.0
    choices.take("train.encoder_lr_scale", scale, "the encoder is trained already" if pretrained else "the encoder learns from scratch")
    few = choices.taken["train"]["batch"] < 16 and not value_at(choices.given, "train.batch_norm_pass")
    why = "the encoder's statistics are better than those of so few crops" if pretrained and few else "statistics of the batches"
    choices.take("train.freeze_batch_norm", bool(pretrained and few), why)
    if choices.taken["train"]["freeze_batch_norm"] != "all":
        _plan_batch_norm_pass(choices, model["name"], pretrained, len(report.split("train")))
    choices.take("train.ema", 0.99, "averaged weights score better than the last ones")
    shares = [count / max(1, sum(report.pixels["train"])) for count in report.pixels["train"] if count]
    uneven = min(shares) < 0.1 / len(shares)
    rare = f"the rarest class has {100 * min(shares):.2g} % of the pixels"
    terms, why = [{"name": "cross_entropy", "weight": 1.0}], "a sum over pixels is for cross-entropy alone"
    if value_at(choices.given, "train.loss_reduction") != "sum":
        terms, why = [*terms, {"name": "lovasz_softmax", "weight": 0.5}], "Lovasz-softmax raises IoU, cross-entropy keeps the scores honest"
    loss = choices.take("train.loss", terms, why)
    if any(term["name"] in PIXEL_LOSSES for term in loss):
        choices.take("train.class_weights", "inverse_log" if uneven else "none", rare)
    else:
        choices.take("train.class_weights", "none", "the loss has no use for them")
    if (model.get("options", {}).get("head_stride") or 1) > 1:
        choices.take("train.loss_stride", 2, "the logits are no finer than that")


def _plan_batch_norm_pass(choices: Choices, name: str, pretrained: bool, images: int) -> None:
    if "segnet" in name:
        choices.take("train.batch_norm_pass", True, "as published; on moving averages a SegNet has scored 0.06 in place of 0.38")
    elif not (pretrained or name.endswith("_paper") or images > QUICK_PASS):  # published ones have no batch norm, or their own rule
        why = f"moving averages lag behind a net that learns fast; {images} images are passed through quickly"
        choices.take("train.batch_norm_pass", True, why)


def _plan_augmentation(choices: Choices, report: Check) -> None:
    """Photographs have an up and a down and come in all sizes; other images have neither."""
    photo = report.bands == 3 and report.dtype == "uint8"
    crop = choices.taken["train"]["crop"]
    cover = max(crop[0] / _typical(report, 0), crop[1] / _typical(report, 1))
    least = round(min(1.0, max(0.5, 0.75 * cover)), 2)
    coloured = report.bands in (1, 3)
    light = "light differs from image to image" if coloured else f"{report.bands} bands have no common light"
    upright = "photographs have a top" if photo else "no up and down in such images"
    augment = {
        "scale": ([least, 1.6], "objects come in many sizes") if photo else ([0.8, 1.25], "magnification hardly changes"),
        "flip_horizontal": (True, "left and right are alike"),
        "flip_vertical": (not photo, upright),
        "rotate90": (not photo, upright),
        "elastic_sigma": (6.0, "tissue bends (Ronneberger et al. 2015)") if report.bands == 1 else (0.0, "nothing bends"),
        "brightness": (0.3 if coloured else 0.0, light),
        "contrast": (0.3 if coloured else 0.0, light),
        "saturation": (0.3 if photo else 0.0, "colours fade" if photo else f"{report.bands} bands of {report.dtype} are no colours"),
    }
    for key, (value, reason) in augment.items():
        choices.take(f"train.augment.{key}", value, reason)


def _plan_length(choices: Choices, report: Check) -> None:
    given = {key: value_at(choices.given, f"train.{key}") for key in ("steps", "minutes")}
    batch, images = choices.taken["train"]["batch"], len(report.split("train"))
    for key, value in given.items():
        if value is not None:
            choices.keep(f"train.{key}")
    if not any(given.values()):
        steps = math.ceil(min(20_000, max(400, 60 * images / batch)))
        choices.taken["train"]["steps"] = steps
        choices.reasons["train.steps"] = f"{steps} - {steps * batch / images:.0f} passes over {images} images"


def _plan_validations(choices: Choices, report: Check) -> None:
    """As many as take a quarter of the time at most; where the run ends by minutes, its clock sees to that."""
    taken = merge(choices.given.get("train") or {}, choices.taken["train"])
    if not (steps := taken.get("steps")):
        return
    check_parts({"train": taken}, "the recipe")
    updates = validation_seconds(1.0, TrainSection.model_validate(taken), report.validation_pixels, len(report.split("train")))
    most = TrainSection.model_fields["validations"].default
    number = min(most, 1 + int(steps / max(1e-9, PAUSE * updates)))  # the last follows the last update
    why = f"one takes as long as {max(1, round(updates))} update{'s' * (updates >= 1.5)}"
    choices.take("train.validations", number, why if number < most else "the best weights of so many are kept")


def _has(given: Mapping[str, Any], key: str) -> bool:
    *sections, last = key.split(".")
    section = value_at(given, ".".join(sections))
    return isinstance(section, Mapping) and last in section


def _words(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
