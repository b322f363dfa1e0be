"""A recipe: the typed description of one run, as one YAML file.

A file, and each `--set key=value`, may name any part of a recipe; what it leaves out is planned from the data and the machine.
A key that does not exist is an error that names the file and the nearest key that does.
"""

import difflib
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Self, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator, model_validator
from pydantic_core import PydanticKnownError


def _kinds(annotation: Any) -> set[Any]:
    """The types that a field may have."""
    if get_origin(annotation) is Annotated:
        return _kinds(get_args(annotation)[0])
    if get_origin(annotation) in (Union, UnionType):
        return {kind for one in get_args(annotation) for kind in _kinds(one)}
    return {annotation}


class Section(BaseModel):
    """One part of a recipe. Unknown keys are errors, values are checked."""

    model_config = ConfigDict(extra="forbid", validate_assignment=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _no_truth_for_a_number(cls, value: Any, info: ValidationInfo) -> Any:
        """Python, and so pydantic, takes true for 1."""
        kinds = _kinds(cls.model_fields[info.field_name or ""].annotation)
        if isinstance(value, bool) and kinds & {int, float} and bool not in kinds:
            raise PydanticKnownError("float_type" if float in kinds else "int_type")
        return value


class DataSection(Section):
    """What the model is trained on, as `perpixel check` found it."""

    images: str = ""
    masks: str | None = None
    val_fraction: float = Field(0.2, gt=0, lt=1)
    split_seed: int = Field(0, ge=0)
    classes: list[str] = []
    colors: list[tuple[int, int, int]] = []
    label_map: dict[str, Any] = {}
    bands: int = Field(3, ge=1)
    dtype: Literal["uint8", "uint16", "float32"] = "uint8"
    mean: list[float] = []  # of values as shares of the type's largest, band by band; one number counts for every band
    std: list[float] = []


class OptionsSection(Section):
    """Options of a model; each has those of its function, see `perpixel.build`. None: the model's default."""

    width: int | None = Field(None, ge=1)
    dropout: float | None = Field(None, ge=0, lt=1)
    decoder_channels: list[int] | None = None
    head_stride: int | None = None
    upsampling: str | None = None
    image_pooling: bool | None = None
    stage_scores: bool | None = None
    output_stride: int | None = None
    variant: str | None = None
    multi_scale: bool | None = None
    depth: int | None = None
    modules: str | None = None
    blocks: int | None = None
    multi_grid: list[int] | None = None
    rates: list[int] | None = None
    learn_upsampling: bool | None = None


class ModelSection(Section):
    """Arguments of `perpixel.build`, and where all weights start."""

    name: str = "unet"
    encoder: str | None = None
    encoder_weights: bool | str | None = None
    start_from: str | None = None  # a bundle: its model, normalisation and weights, the classifier where classes are as many
    options: OptionsSection = OptionsSection()


class AugmentSection(Section):
    """Arguments of `perpixel.data.transforms.Augmentation`."""

    scale: tuple[float, float] = (1.0, 1.0)
    flip_horizontal: bool = True
    flip_vertical: bool = False
    rotate90: bool = False
    rotation: float = Field(0.0, ge=0, le=180)
    brightness: float = Field(0.0, ge=0)
    contrast: float = Field(0.0, ge=0)
    saturation: float = Field(0.0, ge=0)
    hue: float = Field(0.0, ge=0, le=0.5)
    elastic_sigma: float = Field(0.0, ge=0)
    rare_class_probability: float = Field(0.0, ge=0, le=1)


class LossTerm(Section):
    """One summand of the loss of a sample."""

    name: Literal["cross_entropy", "dice", "focal", "lovasz_softmax"]
    weight: float = Field(1.0, gt=0)


ClassWeight = Annotated[float, Field(ge=0)]


class TrainSection(Section):
    """How the weights are found. Either `steps` or `minutes` ends the run."""

    steps: int | None = Field(None, ge=1)
    minutes: float | None = Field(None, gt=0)
    batch: int = Field(8, ge=1)
    crop: tuple[int, int] = (256, 256)
    optimizer: Literal["adamw", "sgd"] = "adamw"
    lr: float = Field(1e-3, gt=0)
    encoder_lr_scale: float = Field(1.0, ge=0)
    momentum: float = Field(0.9, ge=0, lt=1)
    weight_decay: float = Field(1e-2, ge=0)
    schedule: Literal["poly", "one_cycle", "step", "constant"] = "one_cycle"
    warmup: float = Field(0.1, ge=0, lt=1)
    poly_power: float = Field(0.9, gt=0)
    clip: float | None = Field(1.0, gt=0)
    ema: float | None = Field(None, gt=0, lt=1)
    precision: Literal["32-true", "bf16-mixed"] = "32-true"
    frozen: list[str] = []  # parts of the model that stay as they are: "encoder", "decoder.head"
    freeze_batch_norm: bool | Literal["all"] = False  # its statistics: true: those of the encoder
    batch_norm_pass: bool = False  # before each validation, statistics of batch norm from one pass over the training images
    loss: list[LossTerm] = [LossTerm(name="cross_entropy", weight=1.0)]
    loss_reduction: Literal["mean", "sum"] = "mean"  # of cross_entropy over a sample's pixels; "sum" as in FCN
    loss_stride: int = Field(1, ge=1)  # 2: the loss is taken on every second pixel in both directions, in turn
    label_smoothing: float = Field(0.0, ge=0, lt=1)
    class_weights: Literal["none", "median_frequency", "inverse_log"] | list[ClassWeight] = "none"  # a list is taken as it is
    border_weights: bool = False
    augment: AugmentSection = AugmentSection()
    augment_on_device: bool = False  # resample and recolour where the network is; the processor reads, cuts and labels
    validations: int = Field(10, ge=1)
    workers: int = Field(0, ge=0)
    cache: bool = True
    seed: int = Field(0, ge=0, lt=2**32)
    report: bool = True  # report.html at the end

    @model_validator(mode="after")
    def _one_end(self) -> Self:
        if self.steps is not None and self.minutes is not None:
            raise ValueError("both steps and minutes are given; a run ends at one of them")
        return self

    @model_validator(mode="after")
    def _one_statistic(self) -> Self:
        if self.freeze_batch_norm == "all" and self.batch_norm_pass:
            raise ValueError("freeze_batch_norm 'all' keeps the statistics that batch_norm_pass measures anew; choose one of them")
        return self


class PredictSection(Section):
    """How large an image the model sees at once, in pixels of the labelled window; overlap "exact": as one pass over the whole image."""

    tile: int = Field(1024, ge=1)
    overlap: Annotated[int, Field(ge=0)] | Literal["exact"] = 64


class Recipe(Section):
    """One run. Written to RUN/recipe.yaml; `perpixel train --recipe` takes it back."""

    data: DataSection = DataSection()
    model: ModelSection = ModelSection()
    train: TrainSection = TrainSection()
    predict: PredictSection = PredictSection()


def shipped() -> list[str]:
    """Names of the recipes that come with perpixel."""
    return sorted(entry.name.removesuffix(".yaml") for entry in (files("perpixel") / "recipes").iterdir() if entry.name.endswith(".yaml"))


def read_recipe(source: str | Path) -> dict[str, Any]:
    """The parts of a recipe that a shipped name or a YAML file states, checked.

    Raises:
        ValueError: unknown name, unreadable file, unknown key or illegal value; the message names the file and the key.
    """
    path = Path(source)
    if not path.suffix and not path.is_file():
        if str(source) not in shipped():
            raise ValueError(
                f"unknown recipe {str(source)!r}.{_nearest(str(source), shipped())} Known: {', '.join(shipped())}; or give a YAML file."
            )
        text = (files("perpixel") / "recipes" / f"{source}.yaml").read_text("utf-8")
    else:
        try:
            text = path.read_text("utf-8")
        except FileNotFoundError:
            raise ValueError(f"{path}: no such file. Give a YAML file or one of: {', '.join(shipped())}.") from None
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"{path}: this recipe can't be read ({error}). Give a YAML file or one of: {', '.join(shipped())}.") from error
    try:
        parts = yaml.safe_load(text) or {}
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: not valid YAML: {error}") from error
    if not isinstance(parts, dict):
        raise ValueError(f"{path}: a recipe is a mapping of sections (data, model, train, predict), got {type(parts).__name__}.")
    check_parts(parts, str(source))
    return parts


def read_settings(settings: Sequence[str]) -> dict[str, Any]:
    """`["train.lr=0.01", ...]` as nested parts of a recipe, checked. Values are YAML: 3, 0.1, true, null, [256, 256], text."""
    parts = parse_settings(settings)
    check_parts(parts, "--set")
    return parts


def parse_settings(settings: Sequence[str]) -> dict[str, Any]:
    """`["key=value", ...]`, or one such text, as mappings, nested where a key has dots; values as in `read_settings`."""
    parts: dict[str, Any] = {}
    for setting in [settings] if isinstance(settings, str) else settings:
        if isinstance(settings, Mapping) or not isinstance(setting, str):
            raise TypeError(f"settings are {settings!r}; give key=value texts, for example ['train.lr=0.01']")
        key, equals, value = setting.partition("=")
        if not equals or not key:
            raise ValueError(f"--set {setting}: give key=value, for example --set train.lr=0.01")
        node = parts
        *sections, last = key.strip().split(".")
        for section in sections:
            node = node.setdefault(section, {})
            if not isinstance(node, dict):
                raise ValueError(f"--set {setting}: {section} already has the value {node!r}, so it can't have the key {last!r}.")
        node[last] = _number_or_yaml(value)
    return parts


def stated_and_asked(
    recipe: str | Path | None, fast: bool, settings: Sequence[str], steps: int | None, minutes: float | None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Parts that a recipe states, without its training where that is to be `fast`, and parts that are asked for beside it; both checked."""
    if fast and not recipe:
        raise ValueError("fast says how to train the network of a recipe, and none is given; without a recipe training is fast as it is.")
    stated = read_recipe(recipe) if recipe else {}
    stated = {section: parts for section, parts in stated.items() if not (fast and section == "train")}
    asked = read_settings(settings)
    return stated, merge(asked, _length(steps, minutes, asked.get("train", {})))


def _length(steps: int | None, minutes: float | None, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a recipe that says where the run ends; one given end replaces the other kind, but not one among the settings."""
    ends = {"steps": steps, "minutes": minutes, "train.steps": settings.get("steps"), "train.minutes": settings.get("minutes")}
    if len(given := [name for name, value in ends.items() if value is not None]) > 1:
        raise ValueError(f"both {' and '.join(given)} are given; give one of them.")
    return {"train": {"steps": steps, "minutes": minutes}} if steps is not None or minutes is not None else {}


def merge(*parts: Mapping[str, Any]) -> dict[str, Any]:
    """Nested mappings laid over one another; the later wins. Lists are replaced whole."""
    merged: dict[str, Any] = {}
    for part in parts:
        for key, value in part.items():
            both = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
            merged[key] = merge(merged[key], value) if both else value
    return merged


def value_at(parts: Mapping[str, Any], key: str) -> Any:
    """The value that nested mappings have at a dotted key; None where they have none."""
    node: Any = parts
    for part in key.split("."):
        node = node.get(part) if isinstance(node, Mapping) else None
    return node


def differing_keys(first: Mapping[str, Any], second: Mapping[str, Any], at: str = "") -> list[str]:
    """Dotted keys at which two nested mappings differ."""
    found: list[str] = []
    for key in dict.fromkeys([*first, *second]):
        one, two = first.get(key), second.get(key)
        if isinstance(one, Mapping) and two is None:
            two = {}
        if isinstance(one, Mapping) and isinstance(two, Mapping):
            found += differing_keys(one, two, f"{at}{key}.")
        elif one != two:
            found.append(f"{at}{key}")
    return found


def check_parts(parts: Mapping[str, Any], source: str) -> None:
    """Raises ValueError that names `source` and the key, where a part of a recipe has an unknown key or an illegal value."""
    try:
        Recipe.model_validate(parts)
    except ValidationError as error:
        raise ValueError("\n".join(f"{source}: {told}" for told in _explain(error))) from None


def to_yaml(recipe: Recipe, reasons: Mapping[str, str] | None = None) -> str:
    """The recipe as YAML, the reason for each choice as a comment above it all."""
    head = [f"# {key}: {reason}" for key, reason in (reasons or {}).items()]
    body = yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=140)
    return "\n".join([*head, body])


def _number_or_yaml(value: str) -> Any:
    """YAML 1.1 reads 1e-3 as text; people mean the number. It reads None as text too, which is Python's word for null."""
    parsed = yaml.safe_load(value)
    if parsed == "None":
        return None
    if isinstance(parsed, str):
        try:
            return float(parsed)
        except ValueError:
            return parsed
    return parsed


# What is legal, by pydantic's name of the problem; its fields are of the problem's context.
_LEGAL = {
    "bool_parsing": "true or false",
    "bool_type": "true or false",
    "int_parsing": "a whole number",
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "int_parsing_size": "a whole number of fewer digits",
    "float_parsing": "a number",
    "float_type": "a number",
    "finite_number": "a finite number",
    "greater_than": "more than {gt}",
    "greater_than_equal": "{ge} or more",
    "less_than": "less than {lt}",
    "less_than_equal": "{le} or less",
    "string_type": "text",
    "literal_error": "{expected}",
    "list_type": "a list: [a, b]",
    "tuple_type": "a list: [a, b]",
    "too_long": "{max_length} values, not {actual_length}",
    "dict_type": "a section",
    "model_type": "a section, with keys such as '{first}'",
}
_KINDS = ("bool", "str", "constrained-int")  # pydantic's names of the kinds a value may be of, beside those with brackets


def _explain(error: ValidationError) -> list[str]:
    """Pydantic's problems in our words, one line a key: the dotted key, what came, what is legal."""
    told: dict[str, str] = {}
    legal: dict[str, list[str]] = {}  # of a value of several kinds there is a problem for each
    for problem in error.errors():
        given, kind = problem["input"], problem["type"]
        context = {name: int(x) if isinstance(x, float) and x.is_integer() else x for name, x in problem.get("ctx", {}).items()}
        unknown = kind == "extra_forbidden"
        where = [str(part) for part in problem["loc"] if unknown or not ("[" in str(part) or part in _KINDS)]
        key = ".".join(where)
        if unknown:
            known = _keys(where[:-1])
            nearest = _nearest(where[-1], known) or _elsewhere(where[-1])
            told[key] = f"{key}: unknown key;" + (nearest.replace("Did", "did") if nearest else f" known: {', '.join(known)}")
        elif kind == "missing":
            what = f"value number {int(where[-1]) + 1}" if where[-1].isdigit() else f"the key '{where[-1]}'"
            told[key] = f"{'.'.join(where[:-1])} is {given!r}; {what} is missing"
        elif kind == "value_error":
            told[key] = f"{key}: {context['error']}"
        else:
            words = _LEGAL[kind].format(**context, first=_keys(where)[0]) if kind in _LEGAL else problem["msg"].lower()
            legal.setdefault(key, []).append(words)
            shown = str(given).lower().replace("none", "null") if given is None or isinstance(given, bool) else repr(given)
            told[key] = f"{key} is {shown}; legal is {' or '.join(legal[key])}"
    return [text for key, text in told.items() if not (key in legal and any(other.startswith(f"{key}.") for other in told))]


def _keys(where: Sequence[str]) -> list[str]:
    """The legal keys of the section at a dotted place."""
    section: type[BaseModel] = Recipe
    for part in where:
        annotation = section.model_fields[part].annotation if part in section.model_fields else None
        if not (isinstance(annotation, type) and issubclass(annotation, BaseModel)):
            return list(LossTerm.model_fields)  # the only section that stands in a list
        section = annotation
    return list(section.model_fields)


def _elsewhere(key: str) -> str:
    """Where a key that was put outside its section belongs."""
    sections = {name: _keys([name]) for name in Recipe.model_fields}
    return next((f" Did you mean '{name}.{key}'?" for name, keys in sections.items() if key in keys), "")


def _nearest(word: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(word, known, n=1)
    return f" Did you mean '{close[0]}'?" if close else ""
