"""The plan: rules that tie a recipe to the data and the machine. Numbers may change with experience; these rules may not."""

import dataclasses
import json
import math

import pytest
import torch
from safetensors.torch import save_file
from torchvision.models import squeezenet1_0

from perpixel import plan as plan_module
from perpixel.check import Check
from perpixel.data.images import Picture
from perpixel.data.layouts import Pair
from perpixel.data.masks import LabelMap
from perpixel.models import build
from perpixel.plan import Machine, encoder_of, input_statistics, plan, this_machine
from perpixel.recipe import Recipe, merge, read_recipe, to_yaml

GIB = 2**30
LAPTOP = Machine(cores=4, memory=16 * GIB, gpu=None, gpu_memory=0, bf16=False)
SERVER = Machine(cores=16, memory=128 * GIB, gpu="Some GPU", gpu_memory=80 * GIB, bf16=True)


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    """Most tests are about a machine without a hub; those that want one say so."""
    monkeypatch.setattr(plan_module, "_hub_is_reachable", lambda: False)


def a_check(*, bands=3, dtype="uint8", size=(240, 320), images=40, classes=3, layout="two folders") -> Check:
    """A set that is ready, as small a description of it as the plan may need."""
    pairs = [
        Pair(Picture(f"images/{n}.png"), Picture(f"masks/{n}.png"), "val" if n >= images * 0.8 and images > 1 else "train")
        for n in range(images)
    ]
    return Check(
        layout=layout,
        pairs=pairs,
        classes=[f"class {k}" for k in range(classes)],
        colors=[(k, 2 * k, 3 * k) for k in range(classes)],
        label_map=LabelMap({10 * k: k for k in range(classes)}),
        encoding="made up",
        bands=bands,
        dtype=dtype,
        mean=[0.3 + 0.01 * b for b in range(bands)],
        std=[0.2 + 0.01 * b for b in range(bands)],
        sizes={size: images},
        pixels={"train": [1000] * classes, "val": [250] * classes},
        pixels_where_present={"train": [1000 * classes] * classes, "val": [250 * classes] * classes},
        images_with={"train": [10] * classes, "val": [5] * classes},
    )


def flat(node, prefix=""):
    """Dotted keys of nested mappings; what the plan takes as one value (label map, a list) stays one."""
    found = {}
    for key, value in node.items():
        nested = isinstance(value, dict) and key != "label_map"
        found |= flat(value, f"{prefix}{key}.") if nested else {f"{prefix}{key}": value}
    return found


@pytest.mark.parametrize("machine", [LAPTOP, SERVER])
@pytest.mark.parametrize("bands", [1, 3, 5])
def test_whatever_the_plan_changes_from_the_defaults_has_a_reason(machine, bands):
    recipe, reasons = plan(a_check(bands=bands), machine, {})
    planned, default = flat(recipe.model_dump()), flat(Recipe().model_dump())
    changed = {key for key, value in planned.items() if value != default[key]}
    assert changed <= set(reasons)
    assert set(reasons) <= set(planned)
    assert all(len(reason.partition(" - ")[2]) > 5 for reason in reasons.values())


def test_a_reason_states_the_value_in_force():
    recipe, reasons = plan(a_check(), LAPTOP, {"train": {"batch": 3}})
    planned = flat(recipe.model_dump())
    for key in ("train.batch", "train.precision", "train.cache", "model.name", "data.bands"):
        assert reasons[key].startswith(f"{planned[key]} - ")


def test_the_data_section_is_what_check_found():
    report = a_check(bands=4, dtype="uint16", classes=5)
    data = plan(report, LAPTOP, {})[0].data
    assert (data.classes, data.colors, data.bands, data.dtype) == (report.classes, report.colors, 4, "uint16")
    assert LabelMap.from_dict(data.label_map) == report.label_map
    assert (data.mean, data.std) == (report.mean, report.std)


GIVEN = {
    "model.name": "unet_paper",
    "model.encoder": "resnet18",
    "model.options.width": 3,
    "model.options.dropout": 0.25,
    "train.crop": (64, 96),
    "train.batch": 3,
    "train.precision": "32-true",
    "train.cache": False,
    "train.workers": 1,
    "train.lr": 0.5,
    "train.encoder_lr_scale": 0.125,
    "train.ema": None,
    "train.steps": 77,
    "train.minutes": 7.5,
    "train.clip": None,
    "train.class_weights": "inverse_log",
    "train.augment.scale": (1.0, 1.25),
    "train.augment.flip_horizontal": False,
    "train.augment.brightness": 0.0,
    "data.mean": [0.1, 0.2, 0.3],
    "predict.tile": 96,
}


@pytest.mark.parametrize("machine", [LAPTOP, SERVER])
@pytest.mark.parametrize("key", GIVEN)
def test_a_part_that_is_given_wins_over_the_plan(key, machine):
    value: object = GIVEN[key]
    for part in reversed(key.split(".")):
        value = {part: value}
    recipe, reasons = plan(a_check(), machine, value)
    assert flat(recipe.model_dump())[key] == GIVEN[key]
    own = flat(plan(a_check(), machine, {})[0].model_dump())[key]
    if key in reasons and GIVEN[key] != own:
        assert reasons[key].endswith("as you asked")


def test_what_a_recipe_or_a_bundle_says_is_not_what_the_person_asked():
    asked, stated, bundle = {"train": {"batch": 3}}, {"train": {"batch": 5, "lr": 0.5}}, {"model": {"options": {"dropout": 0.9}}}
    origins = [("as you asked", asked), ("as the recipe says", stated), ("as b has it", bundle)]
    _, reasons = plan(a_check(), LAPTOP, merge(bundle, stated, asked), origins)
    assert reasons["train.batch"] == "3 - as you asked"
    assert reasons["train.lr"] == "0.5 - as the recipe says"
    _, reasons = plan(a_check(), LAPTOP, {"model": {"encoder": "resnet18", "encoder_weights": None}}, [("as the recipe says", {})])
    assert reasons["model.encoder"] == "resnet18 - as you asked"


@pytest.mark.parametrize("steps", [1, 30, 200, 100_000])
@pytest.mark.parametrize("images", [20, 400])
@pytest.mark.parametrize("given", [{}, {"batch_norm_pass": True}])
def test_by_steps_validations_before_the_last_take_a_quarter_of_the_time_at_most(steps, images, given):
    """A step of forward and backward passes takes three times the forward passes of as many pixels."""
    report = a_check(images=images, size=(100, 200))
    report.pixels["val"] = [20_000 * images // 5]
    section = plan(report, LAPTOP, {"train": {"steps": steps} | given})[0].train
    pixels = section.batch * section.crop[0] * section.crop[1]
    forward = 20_000 * images // 5 / pixels + (images * 0.8 / section.batch if section.batch_norm_pass else 0)
    assert 1 <= section.validations <= 10
    assert (section.validations - 1) * forward <= (3 * steps + (section.validations - 1) * forward) / 4
    assert section.validations == 10 or section.validations * forward > (3 * steps + section.validations * forward) / 4  # nor fewer


@pytest.mark.parametrize("encoder", ["mobilenetv2_100", "resnet18"])
@pytest.mark.parametrize("head", [1, 2, 4, 8, None])
def test_a_light_decoder_has_as_many_stages_as_the_head_stride_that_is_asked_for_leaves(encoder, head):
    given = {"model": {"encoder": encoder, "encoder_weights": None, "options": {"head_stride": head}}}
    options = plan(a_check(), LAPTOP, given)[0].model.options.model_dump()
    stages = 5 - int(math.log2(head or 1))  # halvings from stride 32
    assert options["decoder_channels"] == [128, 64, 32, 32, 16][:stages]


@pytest.mark.parametrize("hub", [True, False])
def test_a_plan_that_was_written_is_planned_again_as_it_is(tmp_path, monkeypatch, hub):
    """RUN/recipe.yaml is itself a valid input, on another machine too."""
    monkeypatch.setattr(plan_module, "_hub_is_reachable", lambda: hub)
    path = tmp_path / "recipe.yaml"
    for machine, other in ((SERVER, LAPTOP), (LAPTOP, SERVER)):
        recipe, reasons = plan(a_check(), machine, {})
        path.write_text(to_yaml(recipe, reasons))
        again, _ = plan(a_check(size=(100, 100), images=3), other, read_recipe(path))
        assert again == recipe


# ---- the machine


def test_precision_follows_the_processor():
    for machine in (LAPTOP, SERVER):
        for bf16, precision in ((True, "bf16-mixed"), (False, "32-true")):
            assert plan(a_check(), dataclasses.replace(machine, bf16=bf16), {})[0].train.precision == precision


def test_decoded_images_are_kept_where_they_fit_well_and_not_where_they_do_not():
    report = a_check(size=(1000, 1000), images=1000)  # 4 GB decoded, with masks
    for gibibytes, kept in ((1, False), (4, False), (64, True)):
        assert plan(report, dataclasses.replace(LAPTOP, memory=gibibytes * GIB), {})[0].train.cache is kept
    deeper = dataclasses.replace(report, dtype="float32", bands=10, mean=[0.5] * 10, std=[0.2] * 10)  # 41 GB
    assert not plan(deeper, dataclasses.replace(LAPTOP, memory=64 * GIB), {})[0].train.cache


def test_workers_are_for_a_gpu_and_leave_a_core_for_the_loop():
    assert plan(a_check(), LAPTOP, {})[0].train.workers == 0
    for cores in (1, 2, 4, 64):
        assert 0 <= plan(a_check(), dataclasses.replace(SERVER, cores=cores), {})[0].train.workers < max(2, cores)


def test_augmentation_runs_on_the_device_where_there_is_a_gpu_unless_told_otherwise():
    assert plan(a_check(), SERVER, {})[0].train.augment_on_device
    assert not plan(a_check(), LAPTOP, {})[0].train.augment_on_device
    assert not plan(a_check(), SERVER, {"train": {"augment_on_device": False}})[0].train.augment_on_device


def test_a_gpu_gets_crops_and_batches_no_smaller_than_a_processor():
    report = a_check(size=(3000, 3000))
    large, small = plan(report, SERVER, {})[0].train, plan(report, LAPTOP, {})[0].train
    assert large.crop[0] * large.crop[1] * large.batch > small.crop[0] * small.crop[1] * small.batch


def test_this_machine_is_described():
    machine = this_machine()
    assert machine.cores >= 1
    assert machine.memory > GIB / 2
    assert (machine.gpu is not None) == torch.cuda.is_available()
    assert f"{machine.cores} CPU cores" in machine.words or machine.gpu in machine.words


# ---- the crop


@pytest.mark.parametrize("machine", [LAPTOP, SERVER])
@pytest.mark.parametrize("size", [(1, 1), (20, 2000), (64, 96), (250, 250), (512, 512), (5000, 300)])
@pytest.mark.parametrize("model", ["unet", "unet_paper"])
def test_the_crop_is_one_the_model_takes_and_no_larger_than_the_image_needs(machine, size, model):
    recipe, _ = plan(a_check(size=size), machine, {"model": {"name": model}})
    geometry = build(model, 3, encoder=recipe.model.encoder, in_channels=3, **({"width": 2} if model == "unet_paper" else {})).geometry
    for crop, side in zip(recipe.train.crop, size, strict=True):
        assert geometry.fits(crop)
        assert crop <= geometry.fit(side + 2 * geometry.margin)


def test_the_typical_size_decides_not_the_odd_one():
    report = dataclasses.replace(a_check(size=(128, 160)), sizes={(128, 160): 30, (4000, 4000): 2, (16, 16): 2})
    assert plan(report, SERVER, {})[0].train.crop == (128, 160)


def test_an_illegal_crop_is_refused_and_the_one_it_names_is_taken():
    given = {"model": {"name": "unet_paper"}, "train": {"crop": (200, 300)}}
    with pytest.raises(ValueError, match=r"train\.crop is 200x300; unet_paper needs sides of 16\*k \+ 12, .* The nearest is 204x300"):
        plan(a_check(), LAPTOP, given)
    given["train"]["crop"] = (204, 300)
    assert plan(a_check(), LAPTOP, given)[0].train.crop == (204, 300)


# ---- the encoder


@pytest.mark.parametrize(("bands", "dtype"), [(1, "uint8"), (3, "uint16"), (4, "uint8"), (3, "float32")])
@pytest.mark.parametrize("machine", [LAPTOP, SERVER])
def test_what_is_no_photograph_learns_from_scratch_and_is_normalised_by_its_own_statistics(bands, dtype, machine, monkeypatch):
    monkeypatch.setattr(plan_module, "_hub_is_reachable", lambda: True)
    report = a_check(bands=bands, dtype=dtype)
    recipe, _ = plan(report, machine, {})
    assert not recipe.model.encoder_weights
    assert (recipe.data.mean, recipe.data.std) == (report.mean, report.std)


@pytest.mark.parametrize("machine", [LAPTOP, SERVER])
def test_photographs_get_published_weights_where_they_can_be_had(machine, monkeypatch):
    monkeypatch.setattr(plan_module, "_hub_is_reachable", lambda: True)
    recipe, _ = plan(a_check(), machine, {})
    assert recipe.model.encoder_weights is True
    assert recipe.model.encoder != "plain"
    assert recipe.train.encoder_lr_scale < 1
    assert recipe.train.freeze_batch_norm == (recipe.train.batch < 16)  # few crops give worse statistics than ImageNet did
    assert (recipe.data.mean, recipe.data.std) == ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])  # ImageNet's, as published


def test_without_a_hub_nothing_is_downloaded_and_the_reason_says_what_to_give():
    recipe, reasons = plan(a_check(), LAPTOP, {})
    assert not recipe.model.encoder_weights
    assert "--set model.encoder_weights=FILE" in reasons["model.encoder"]
    assert recipe.train.encoder_lr_scale == 1
    assert not recipe.train.freeze_batch_norm


def test_the_hub_is_not_asked_where_it_is_switched_off(monkeypatch):
    monkeypatch.undo()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(plan_module.socket, "create_connection", lambda *_, **__: pytest.fail("asked"))
    assert not plan_module._hub_is_reachable.__wrapped__()  # behind its cache


@pytest.mark.parametrize(("answers", "reachable"), [(True, True), (False, False)])
def test_the_hub_is_reachable_where_its_host_answers(monkeypatch, answers, reachable):
    monkeypatch.undo()
    asked = []

    def connect(address, timeout):
        asked.append((address, timeout))
        if not answers:
            raise OSError("no route")
        return open("/dev/null")

    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setenv("HF_ENDPOINT", "https://mirror.example:8443/hub")
    monkeypatch.setattr(plan_module.socket, "create_connection", connect)
    assert plan_module._hub_is_reachable.__wrapped__() is reachable
    assert asked[0][0][0] == "mirror.example"
    assert asked[0][1] <= 5  # seconds


def test_a_file_of_weights_decides_the_encoder_and_its_input(tmp_path):
    named = tmp_path / "resnet18.safetensors"
    stated = tmp_path / "from_the_net.safetensors"
    save_file({"x": torch.zeros(1)}, named)
    save_file({"x": torch.zeros(1)}, stated, {"layout": "timm resnet26", "input": "RGB 0..1, mean 0.25, std 0.125"})
    assert (encoder_of(named), encoder_of(stated)) == ("resnet18", "resnet26")
    report = a_check()
    assert plan(report, LAPTOP, {"model": {"encoder_weights": str(named)}})[0].model.encoder == "resnet18"
    recipe, _ = plan(report, LAPTOP, {"model": {"encoder_weights": str(stated)}})
    assert (recipe.model.encoder, recipe.data.mean, recipe.data.std) == ("resnet26", [0.25] * 3, [0.125] * 3)
    assert input_statistics("plain", None, report)[:2] == (report.mean, report.std)


def test_a_file_that_holds_no_weights_is_blamed_itself_and_not_the_encoder_of_its_name(tmp_path):
    for name in ("photo.jpg", "resnet18.pth", "resnet18.safetensors"):
        (tmp_path / name).write_text("<html>")
        with pytest.raises(ValueError, match=rf"{name}: it holds a web page"):
            plan(a_check(), LAPTOP, {"model": {"encoder_weights": str(tmp_path / name)}})


@pytest.mark.parametrize("model", [{"encoder": "resnet18"}, {"name": "fcn8s_paper"}], ids=str)
@pytest.mark.parametrize(("content", "told"), [("<html>", "it holds a web page"), ("", "the file is empty")])
def test_a_file_that_holds_no_weights_is_blamed_also_where_it_decides_no_encoder(tmp_path, model, content, told):
    file = tmp_path / "x.safetensors"
    file.write_text(content)
    with pytest.raises(ValueError, match=rf"x\.safetensors: {told}"):
        plan(a_check(), LAPTOP, {"model": {**model, "encoder_weights": str(file)}})


def test_a_file_whose_name_is_no_encoder_s_is_taken_for_the_usual_one(tmp_path):
    save_file({"x": torch.zeros(1)}, tmp_path / "mine.safetensors")
    recipe, reasons = plan(a_check(), LAPTOP, {"model": {"encoder_weights": str(tmp_path / "mine.safetensors")}})
    assert recipe.model.encoder == plan_module.PHOTO_ENCODER["cpu"]
    assert "mine.safetensors does not say which encoder" in reasons["model.encoder"]


def test_torchvision_s_squeezenet_is_known_by_its_file_and_wants_imagenet_s_mean(tmp_path):
    """By the file's metadata, or by the name that torchvision gives it, a digest of its content included."""
    stated, named = tmp_path / "weights.safetensors", tmp_path / "squeezenet1_0-b66bff10.safetensors"
    state = squeezenet1_0().state_dict()
    save_file(state, stated, {"layout": "torchvision squeezenet1_0", "input": "RGB, ImageNet mean/std"})
    save_file(state, named)
    for file in (stated, named):
        recipe, reasons = plan(a_check(), LAPTOP, {"model": {"encoder_weights": str(file)}})
        assert recipe.model.encoder == "squeezenet1_0"
        assert (recipe.data.mean, recipe.data.std) == ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
        assert "ImageNet" in reasons["data.mean"]
        options = {key: value for key, value in recipe.model.options.model_dump().items() if value is not None}
        build(recipe.model.name, 3, encoder=recipe.model.encoder, encoder_weights=str(file), **options)


# ---- the length


def test_a_length_that_is_given_stands_alone_and_two_are_refused():
    by_steps = plan(a_check(), LAPTOP, {"train": {"steps": 5}})[0].train
    by_minutes = plan(a_check(), LAPTOP, {"train": {"minutes": 2.5, "steps": None}})[0].train
    assert (by_steps.steps, by_steps.minutes) == (5, None)
    assert (by_minutes.steps, by_minutes.minutes) == (None, 2.5)
    with pytest.raises(ValueError, match="both steps and minutes are given"):
        plan(a_check(), LAPTOP, {"train": {"minutes": 2.5, "steps": 5}})


def test_with_neither_given_steps_are_chosen_and_more_images_get_more_of_them():
    lengths = [plan(a_check(images=images), LAPTOP, {})[0].train for images in (2, 100, 1000, 3000)]
    assert all(section.steps and section.minutes is None for section in lengths)
    assert [section.steps for section in lengths] == sorted(section.steps for section in lengths)
    assert lengths[-1].steps > lengths[0].steps


def test_pictures_without_an_up_are_turned_and_photographs_are_not():
    grey, photo = (plan(a_check(bands=bands), LAPTOP, {})[0].train.augment for bands in (1, 3))
    assert grey.flip_vertical
    assert grey.rotate90
    assert not photo.flip_vertical
    assert not photo.rotate90


def test_a_file_of_weights_that_is_not_there_is_named():
    with pytest.raises(ValueError, match=r"model\.encoder_weights: /nowhere/net\.safetensors: no such file"):
        plan(a_check(), LAPTOP, {"model": {"encoder_weights": "/nowhere/net.safetensors"}})


def test_a_published_trunk_with_weights_gets_imagenet_s_statistics_and_a_gentle_rate():
    recipe, _ = plan(a_check(), LAPTOP, {"model": {"name": "fcn8s_paper", "encoder_weights": True}})
    assert recipe.data.mean == [0.485, 0.456, 0.406]
    assert recipe.train.encoder_lr_scale < 1
    scratch, _ = plan(a_check(), LAPTOP, {"model": {"name": "fcn8s_paper"}})
    assert scratch.data.mean == a_check().mean


def test_weights_from_a_bundle_want_its_normalisation(make_bundle):
    path = make_bundle()
    card = json.loads(plan_module._metadata(path)["perpixel"])
    recipe, _ = plan(a_check(), LAPTOP, {"model": {"name": "deeplab_v3_paper", "encoder_weights": str(path)}})
    assert (recipe.data.mean, recipe.data.std) == (card["mean"], card["std"])


def test_one_number_for_mean_or_deviation_counts_for_every_band():
    recipe, _ = plan(a_check(bands=5), LAPTOP, {"data": {"mean": [0.0], "std": [0.5]}})
    assert (recipe.data.mean, recipe.data.std) == ([0.0] * 5, [0.5] * 5)


def test_statistics_that_are_measured_at_the_end_are_not_frozen():
    given = {"model": {"name": "segnet_paper", "encoder_weights": True}, "train": {"batch_norm_pass": True}}
    recipe, _ = plan(a_check(), LAPTOP, given)
    assert not recipe.train.freeze_batch_norm


@pytest.mark.parametrize("name", ["segnet", "segnet_basic_paper", "bayesian_segnet_basic_paper"])
def test_segnet_s_batch_norm_is_measured_before_it_is_scored_unless_all_of_it_is_frozen(name):
    """SegNet-SingleChannelDecoder on camvid scored a mean IoU of 0.06 on moving averages, and 0.38 once they were measured."""
    assert plan(a_check(), LAPTOP, {"model": {"name": name}})[0].train.batch_norm_pass
    frozen = plan(a_check(), LAPTOP, {"model": {"name": name}, "train": {"freeze_batch_norm": "all"}})[0].train
    assert frozen.freeze_batch_norm == "all"
    assert not frozen.batch_norm_pass


def test_batch_norm_of_a_net_from_scratch_is_measured_where_the_images_are_few_enough_to_pass_quickly():
    """A U-Net on 24 slices had a mean IoU of 0.10 on moving averages after 10 steps, and 0.64 once they were measured."""
    scratch = {"name": "unet", "encoder": "plain"}
    assert plan(a_check(images=30), LAPTOP, {"model": scratch})[0].train.batch_norm_pass
    assert not plan(a_check(images=3000), LAPTOP, {"model": scratch})[0].train.batch_norm_pass
    assert not plan(a_check(images=30), LAPTOP, {"model": {"name": "unet_paper"}})[0].train.batch_norm_pass
    assert not plan(a_check(images=30), LAPTOP, {"model": scratch, "train": {"freeze_batch_norm": "all"}})[0].train.batch_norm_pass


def test_a_trained_segnet_keeps_its_encoder_s_statistics_and_has_the_decoder_s_measured(tmp_path):
    weights = tmp_path / "vgg.safetensors"
    given = {"model": {"name": "segnet", "encoder": "vgg16_bn", "encoder_weights": str(weights)}}
    train = plan(a_check(), LAPTOP, given)[0].train
    assert train.freeze_batch_norm is True
    assert train.batch_norm_pass


@pytest.mark.parametrize("loss", ["dice", "lovasz_softmax"])
def test_no_class_weights_are_planned_for_a_loss_that_has_no_use_for_them(loss):
    report = a_check()
    report.pixels["train"] = [1_000_000, 500_000, 100]
    uneven = plan(report, LAPTOP, {})[0].train
    assert uneven.class_weights == "inverse_log"
    given = plan(report, LAPTOP, {"train": {"loss": [{"name": loss}]}})[0].train
    assert given.class_weights == "none"


def test_a_sum_over_pixels_is_planned_with_cross_entropy_alone():
    assert [term.name for term in plan(a_check(), LAPTOP, {"train": {"loss_reduction": "sum"}})[0].train.loss] == ["cross_entropy"]


def test_border_weights_count_in_what_the_decoded_set_takes():
    report = a_check(size=(3000, 4000), images=60)
    takes = [plan(report, LAPTOP, {"train": {"border_weights": on}})[1]["train.cache"] for on in (False, True)]
    without, weighed = (float(reason.split("takes ")[1].split(" of")[0]) for reason in takes)
    assert weighed / without == pytest.approx((3 + 1 + 4) / (3 + 1), rel=0.02)
