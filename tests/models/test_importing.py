"""Other people's weights: the same state dict in their network and in ours gives the same numbers."""

import numpy as np
import pytest
import segmentation_models_pytorch as smp
import timm
import torch
from torch import nn
from torchvision import models as torchvision_models
from torchvision.models.vgg import cfgs, make_layers

from perpixel.bundle import import_weights
from perpixel.models import build, fcn, fcn8s_paper, fcn16s_paper, fcn32s_alexnet_paper, fcn32s_paper, fcn_resnet, unet
from perpixel.models.deeplab_v1 import AtrousClassifier
from perpixel.models.vgg import VGGPath


def randomise(network):
    """Weights and statistics of batch norm at random, so that nothing is equal by being 0 or 1."""
    torch.manual_seed(1)
    for name, tensor in network.state_dict().items():
        if name.endswith("running_var"):
            tensor.uniform_(0.5, 2)
        elif tensor.is_floating_point():
            tensor.normal_(std=0.05)
    return network.eval()


def random_norms(network):
    """Batch norm whose statistics are not those of a new layer."""
    torch.manual_seed(0)
    for norm in network.modules():
        if isinstance(norm, nn.BatchNorm2d):
            nn.init.uniform_(norm.running_var, 0.5, 2)
            nn.init.normal_(norm.running_mean, std=0.1)
    return network.eval()


def narrow_vgg(depth, batch_norm=False, in_channels=3):
    """torchvision's VGG with an eighth of the maps, whose state dict has the published names."""
    layers = make_layers([size if size == "M" else size // 8 for size in cfgs[depth]], batch_norm)
    with torch.device("meta"):
        classifier = torchvision_models.VGG(layers, init_weights=False)
        for index, (before, after) in {0: (64 * 49, 512), 3: (512, 512), 6: (512, 10)}.items():
            classifier.classifier[index] = nn.Linear(before, after)
    return randomise(classifier.to_empty(device="cpu"))


@pytest.mark.parametrize("batch_norm", [False, True])
@pytest.mark.parametrize(("depth", "layers"), [("A", 11), ("B", 13), ("D", 16), ("E", 19)])
def test_torchvision_s_vgg_gives_the_same_map_in_our_path(depth, layers, batch_norm):
    theirs = narrow_vgg(depth, batch_norm)
    ours = VGGPath(layers, width=8, batch_norm=batch_norm).eval()
    ours.load_classifier(theirs.state_dict())
    image = torch.randn(1, 3, 64, 96)
    with torch.inference_mode():
        torch.testing.assert_close(ours(image).maps[-1], theirs.features(image))


@pytest.mark.parametrize("make", [fcn32s_paper, fcn8s_paper])
def test_a_vgg16_classifier_is_the_trunk_of_fcn_with_fc6_and_fc7(make):
    """With the usual padding of 1 instead of 100, one 224x224 image has the classifier's own 4096 (here 512) values."""
    theirs, ours = narrow_vgg("D"), make(2, width=8).eval()
    import_weights(ours, theirs.state_dict(), "torchvision")
    ours.encoder.path.stages[0][0].padding = (1, 1)
    image = torch.randn(1, 3, 224, 224)
    with torch.inference_mode():
        penultimate = theirs.classifier[:5](theirs.features(image).flatten(1))
        fc7 = ours.encoder(image).maps[-1]
    assert fc7.shape == (1, 512, 1, 1)
    torch.testing.assert_close(fc7.flatten(1), penultimate)


def test_the_published_vgg16_and_its_names_fit_the_full_width():
    with torch.device("meta"):
        state, model = torchvision_models.vgg16().state_dict(), fcn32s_paper(21)
    import_weights(model, state, "torchvision")


def test_an_encoder_weights_file_is_the_same_as_importing_it(tmp_path):
    theirs = narrow_vgg("D")
    torch.save(theirs.state_dict(), tmp_path / "vgg16.pth")
    one, other = fcn32s_paper(2, width=8, encoder_weights=tmp_path / "vgg16.pth"), fcn32s_paper(2, width=8)
    import_weights(other, theirs.state_dict(), "torchvision")
    assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True))


def test_bands_other_than_three_get_the_mean_filter_rescaled():
    theirs = narrow_vgg("D")
    ours = fcn32s_paper(2, in_channels=5, width=8)
    import_weights(ours, theirs.state_dict(), "torchvision")
    mean = theirs.features[0].weight.mean(1, keepdim=True) * 3 / 5
    torch.testing.assert_close(ours.encoder.path.stages[0][0].weight, mean.expand(-1, 5, -1, -1))


def test_without_a_network_true_says_what_to_fetch_and_where_to_name_it(monkeypatch):
    def no_network(*arguments, **options):
        raise OSError("no route to host")

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", no_network)
    expected = r"'vgg16' could not be downloaded .*no route.* Fetch https://download.pytorch.org/models/vgg16.*as encoder_weights"
    with pytest.raises(ValueError, match=expected):
        fcn32s_paper(2, width=1, encoder_weights=True)


def test_weights_of_another_vgg_are_refused():
    for state in (narrow_vgg("A").state_dict(), narrow_vgg("D", batch_norm=True).state_dict(), {}):
        with pytest.raises(ValueError, match=r"not the weights of 'vgg16'|holds no fully connected layers"):
            import_weights(fcn32s_paper(2, width=8), state, "torchvision")
    with pytest.raises(ValueError, match="needs width=64"):
        import_weights(fcn32s_paper(2, width=4), narrow_vgg("D").state_dict(), "torchvision")
    with pytest.raises(ValueError, match="TimmEncoder takes no classifier of torchvision"):
        import_weights(fcn(2, "mobilenetv3_small_050"), narrow_vgg("D").state_dict(), "torchvision")


@pytest.mark.parametrize("auxiliary", [True, False])
def test_torchvision_s_fcn_resnet50_gives_the_same_logits(auxiliary):
    """On an odd and an even size, to 1e-5 of the largest; the auxiliary head too."""
    theirs = torchvision_models.segmentation.fcn_resnet50(weights=None, weights_backbone=None, aux_loss=auxiliary, num_classes=4)
    random_norms(theirs)
    ours = fcn_resnet(4, 50).eval()
    import_weights(ours, theirs.state_dict(), "torchvision")
    with torch.inference_mode():
        for size in ((65, 47), (48, 64)):
            image = torch.randn(1, 3, *size)
            expected, (logits, aux) = theirs(image), ours.supervised(image)
            assert (logits - expected["out"]).abs().max() <= 1e-5 * expected["out"].abs().max()
            torch.testing.assert_close(ours(image), logits)
            if auxiliary:
                assert (aux - expected["aux"]).abs().max() <= 1e-5 * expected["aux"].abs().max()


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [("fcn_resnet101", "fcn_resnet"), ("deeplabv3_resnet101", "deeplab_v3_torchvision")],
)
def test_torchvision_s_nets_on_resnet101_give_the_same_logits(theirs, ours):
    network = random_norms(
        getattr(torchvision_models.segmentation, theirs)(weights=None, weights_backbone=None, aux_loss=True, num_classes=3)
    )
    with torch.device("meta"):
        model = build(ours, 3, depth=101)
    model = model.to_empty(device="cpu").eval()
    import_weights(model, network.state_dict(), "torchvision")
    image = torch.randn(1, 3, 65, 97)
    with torch.inference_mode():
        expected = network(image)
        for logits, name in zip(model.supervised(image), ("out", "aux"), strict=True):
            assert (logits - expected[name]).abs().max() <= 1e-5 * expected[name].abs().max()


def test_every_key_of_torchvision_s_fcn_resnet101_has_its_place():
    with torch.device("meta"):
        theirs = torchvision_models.segmentation.fcn_resnet101(weights=None, weights_backbone=None, aux_loss=True, num_classes=21)
        ours = fcn_resnet(21, 101)
    import_weights(ours, theirs.state_dict(), "torchvision")
    with pytest.raises(ValueError, match=r"has the foreign backbone\.layer3\.6"):
        import_weights(build("fcn_resnet", 21, depth=50), theirs.state_dict(), "torchvision")


def test_classes_and_models_that_differ_are_refused_and_nothing_is_changed():
    with torch.device("meta"):
        theirs = torchvision_models.segmentation.fcn_resnet50(weights=None, weights_backbone=None, aux_loss=True, num_classes=21)
        with pytest.raises(ValueError, match=r"classifier\.4\.weight has shape \(21, 512, 1, 1\), but this model has \(3, 512, 1, 1\)"):
            import_weights(fcn_resnet(3, 50), theirs.state_dict(), "torchvision")
        with pytest.raises(ValueError, match="torchvision has no model with a UNetDecoder"):
            import_weights(unet(3, "resnet50"), theirs.state_dict(), "torchvision")


def test_a_whole_network_of_timm_fills_the_encoder():
    theirs = randomise(timm.create_model("mobilenetv3_small_050"))
    model = fcn(2, "mobilenetv3_small_050").eval()
    import_weights(model, theirs.state_dict(), "timm")
    image = torch.randn(1, 3, 64, 64)
    with torch.inference_mode():
        last = theirs.blocks(
            theirs.act1(theirs.bn1(theirs.conv_stem(image))) if hasattr(theirs, "act1") else theirs.bn1(theirs.conv_stem(image))
        )
        torch.testing.assert_close(model.encoder(image).maps[-1], last)
    assert not model.encoder.batch_norm_folded
    for norm in theirs.modules():
        if isinstance(norm, nn.BatchNorm2d):  # as in files whose norms were folded into their biases
            norm.reset_running_stats()
            nn.init.ones_(norm.weight)
    import_weights(model, theirs.state_dict(), "timm")
    assert model.encoder.batch_norm_folded
    with pytest.raises(ValueError, match="the encoder is FCNPath, none of timm's"):
        import_weights(fcn32s_paper(2, width=1), theirs.state_dict(), "timm")


def blobs(model, caffe_to_ours):
    """The model's weights as Caffe stores them: BGR, old-style biases and fully connected layers."""
    state, made = model.state_dict(), {}
    for caffe, ours in caffe_to_ours.items():
        weight = state[f"{ours}.weight"].numpy()
        if caffe in ("conv1_1", "conv1"):
            weight = weight[:, ::-1].copy()
        made[f"{caffe}/0"] = weight.reshape(len(weight), -1) if caffe in ("fc6", "fc7") else weight
        if f"{ours}.bias" in state:
            made[f"{caffe}/1"] = state[f"{ours}.bias"].numpy().reshape(1, 1, 1, -1)
    return made


# Layers of torchvision's path by the number of the stage and in it; every second one is ReLU.
VGG_PLACES = {
    f"conv{stage + 1}_{number + 1}": (stage, 2 * number) for stage, count in enumerate((2, 2, 3, 3, 3)) for number in range(count)
}


def test_blobs_of_the_fcn_release_fill_every_layer_by_its_caffe_name(tmp_path):
    """BGR filters on a BGR image are RGB filters on the RGB image."""
    places = {caffe: f"encoder.path.stages.{stage}.{index}" for caffe, (stage, index) in VGG_PLACES.items()}
    places |= {"fc6": "encoder.fc6", "fc7": "encoder.fc7"}
    heads = ("score_fr", "upscore2", "score_pool4", "upscore_pool4", "score_pool3", "upscore8")
    places |= {name: f"decoder.layers.{name}" for name in heads}
    theirs, ours = randomise(fcn8s_paper(3, width=2)), fcn8s_paper(3, width=2).eval()
    np.savez(tmp_path / "fcn8s.npz", **blobs(theirs, places))
    import_weights(ours, np.load(tmp_path / "fcn8s.npz"), "caffe_npz")
    assert all(torch.equal(a, b) for a, b in zip(ours.state_dict().values(), theirs.state_dict().values(), strict=True))
    before = fcn16s_paper(3, width=2)
    before.decoder.layers["upscore16"].weight.data.fill_(7)
    import_weights(before, np.load(tmp_path / "fcn8s.npz"), "caffe_npz")  # by name: FCN-16s has no upscore8
    assert (before.decoder.layers["upscore16"].weight == 7).all()


def test_blobs_of_caffenet_fill_the_trunk_of_fcn_alexnet():
    theirs, ours = randomise(fcn32s_alexnet_paper(3, width=6)), fcn32s_alexnet_paper(3, width=6).eval()
    names = ("conv1", "conv2", "conv3", "conv4", "conv5", "fc6", "fc7")
    given = blobs(theirs, {name: f"encoder.{name}" for name in names})
    given["fc8/0"] = np.zeros((1000, 256), np.float32)  # the classifier of 1000 classes has no place
    import_weights(ours, given, "caffe_npz")
    assert all(torch.equal(a, b) for a, b in zip(ours.encoder.state_dict().values(), theirs.encoder.state_dict().values(), strict=True))
    assert not ours.decoder.layers["score_fr"].weight.any()


def test_blobs_that_do_not_fit_are_refused_with_what_does():
    model = fcn32s_paper(3, width=2)
    with pytest.raises(ValueError, match=r"blob 'score_fr/0' has shape \(21, 4096, 1, 1\), but this model has \(3, 128, 1, 1\)"):
        import_weights(model, {"score_fr/0": np.zeros((21, 4096, 1, 1), np.float32)}, "caffe_npz")
    with pytest.raises(ValueError, match=r"blob 'fc7/0' has shape \(64, 128, 2, 1\)"):  # as many values, in another order
        import_weights(model, {"fc7/0": np.zeros((64, 128, 2, 1), np.float32)}, "caffe_npz")
    with pytest.raises(ValueError, match=r"no blob has the name of a layer of this model; it has conv1_1, .*, upscore"):
        import_weights(model, {"conv/0": np.zeros(3)}, "caffe_npz")
    with pytest.raises(ValueError, match="name it LAYER/0 for weights"):
        import_weights(model, {"conv1_1": np.zeros(3)}, "caffe_npz")
    with pytest.raises(ValueError, match="TimmEncoder has no layers by Caffe's names"):
        import_weights(fcn(2, "mobilenetv3_small_050"), {}, "caffe_npz")


def test_an_unknown_source_names_the_known_ones():
    with pytest.raises(ValueError, match=r"unknown source 'keras'\. Known: torchvision, timm, caffe_npz, smp"):
        import_weights(fcn32s_paper(2, width=1), {}, "keras")


@pytest.mark.parametrize("name", ["resnet18", "tu-mobilenetv3_small_050"])
def test_a_unet_of_segmentation_models_pytorch_gives_the_same_logits(name):
    """To 1e-5 of the largest; sizes that its own five halvings take."""
    theirs = random_norms(smp.Unet(name, encoder_weights=None, classes=4))
    ours = unet(4, name.removeprefix("tu-"), variant="smp").eval()
    import_weights(ours, theirs.state_dict(), "smp")
    with torch.inference_mode():
        image = torch.randn(1, 3, 64, 96)
        expected = theirs(image)
        assert (ours(image) - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_a_tag_in_an_encoder_s_name_changes_neither_its_dilation_nor_what_is_refused():
    """segmentation_models.pytorch's own resnet18 dilates every convolution of the last stage, timm's not the first."""
    with torch.device("meta"):
        plain, tagged = (build("deeplab_v3plus", 4, encoder=name, variant="smp") for name in ("resnet18", "resnet18.tv_in1k"))
        dilations = [[m.dilation for m in net.encoder.modules() if isinstance(m, nn.Conv2d)] for net in (plain, tagged)]
        with pytest.raises(ValueError, match=r"of 'tu-resnet18\.tv_in1k', whose stages dilate otherwise"):
            import_weights(tagged, {"encoder.model.conv1.weight": torch.zeros(64, 3, 7, 7)}, "smp")
    assert dilations[0] == dilations[1]
    assert dilations[0].count((2, 2)) == 5


@pytest.mark.parametrize(("name", "output_stride"), [("resnet18", 16), ("resnet18", 8), ("tu-mobilenetv3_small_050", 16)])
def test_a_deeplab_v3plus_of_segmentation_models_pytorch_gives_the_same_logits(name, output_stride):
    """To 1e-5 of the largest. It takes multiples of its output stride; other images repeat their last pixels for it, and are cut."""
    theirs = random_norms(smp.DeepLabV3Plus(name, encoder_weights=None, classes=4, encoder_output_stride=output_stride))
    ours = build("deeplab_v3plus", 4, encoder=name.removeprefix("tu-"), variant="smp", output_stride=output_stride).eval()
    import_weights(ours, theirs.state_dict(), "smp")
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in theirs.parameters())
    with torch.inference_mode():
        for height, width in ((64, 96), (65, 47)):
            image = torch.randn(1, 3, height, width)
            padded = nn.functional.pad(image, (0, -width % output_stride, 0, -height % output_stride), mode="replicate")
            expected = theirs(padded)[..., :height, :width]
            assert (ours(image) - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_a_checkpoint_whose_stages_dilate_otherwise_is_refused():
    with torch.device("meta"):
        theirs = {"encoder.model.conv1.weight": torch.zeros(64, 3, 7, 7)}
        with pytest.raises(ValueError, match="of 'tu-resnet18', whose stages dilate otherwise"):
            import_weights(build("deeplab_v3plus", 4, encoder="resnet18", variant="smp"), theirs, "smp")
        with pytest.raises(ValueError, match="gives no feature maps at output stride 16"):
            build("deeplab_v3plus", 4, encoder="vit_tiny_patch16_224", variant="smp")
        for wrong in (32, 0):
            with pytest.raises(ValueError, match=f"output_stride is {wrong}; with variant 'smp' it must be 8 or 16"):
                build("deeplab_v3plus", 4, encoder="resnet18", variant="smp", output_stride=wrong)


@pytest.mark.parametrize(("name", "branches"), [("deeplab_v1_paper", 1), ("deeplab_v2_vgg16_paper", 4)])
def test_a_vgg16_classifier_fills_the_trunk_and_decimated_every_head_of_deeplab(name, branches):
    """fc6 keeps the outermost taps and the middle one; which filters, each head chooses for itself (arXiv:1412.7062, sec. 4.1)."""
    theirs, model = narrow_vgg("D"), build(name, 2, width=8)
    import_weights(model, theirs.state_dict(), "torchvision")
    given = [layer.weight for layer in theirs.features if isinstance(layer, nn.Conv2d)]
    own = [layer.weight for layer in model.encoder.modules() if isinstance(layer, nn.Conv2d)]
    assert all(torch.equal(a, b) for a, b in zip(own, given, strict=True))
    fc6 = theirs.classifier[0].weight.view(512, 64, 7, 7)[..., ::3, ::3]
    heads = [part for part in model.decoder.modules() if isinstance(part, AtrousClassifier)]
    assert len(heads) == branches
    chosen = []
    for head in heads:
        same = head.fc6.weight[:, None, 0, 0, 0] == fc6[:, 0, 0, 0]  # (128 of ours, 512 of theirs)
        index = same.int().argmax(1)
        assert torch.equal(head.fc6.weight, fc6[index])
        chosen.append(tuple(index.tolist()))
    assert len(set(chosen)) == branches


@pytest.mark.parametrize("batch_norm", [False, True])
def test_a_vgg16_classifier_with_norms_or_without_fills_segnet(batch_norm):
    theirs, model = narrow_vgg("D", batch_norm), build("segnet_paper", 2, width=8).eval()
    import_weights(model, theirs.state_dict(), "torchvision")
    kinds = (nn.Conv2d, nn.BatchNorm2d) if batch_norm else nn.Conv2d
    pairs = zip(*([m for m in part.modules() if isinstance(m, kinds)] for part in (model.encoder, theirs.features)), strict=True)
    assert all(torch.equal(value, b.state_dict()[key]) for a, b in pairs for key, value in a.state_dict().items())
    if not batch_norm:
        assert all((m.bias == 0.001).all() for m in model.encoder.modules() if isinstance(m, nn.BatchNorm2d))


def test_a_failed_import_leaves_a_vgg_as_it_was():
    state = narrow_vgg("D").state_dict()
    state["features.28.weight"] = torch.zeros(3, 3)
    model = build("deeplab_v1_paper", 2, width=8)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ValueError, match="published weights need width=64"):
        import_weights(model, state, "torchvision")
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_a_unet_of_smp_needs_the_variant_that_has_its_head():
    with torch.device("meta"):
        theirs = {f"segmentation_head.0.{name}": value for name, value in nn.Conv2d(16, 4, 3).state_dict().items()}
        with pytest.raises(ValueError, match=r"the state dict lacks encoder\.network\.conv1\.weight"):
            import_weights(unet(4, "resnet18", variant="smp"), theirs, "smp")
    with pytest.raises(ValueError, match="variant is 'keras'; it must be 'smp', or left out"):
        unet(2, "resnet18", variant="keras")
