"""Dense CRF: mean field against explicit matrices and against sums over all labellings; what a caller may and may not do."""

import itertools
import json

import pytest
import torch
from torch import Tensor

from perpixel.refinement.dense_crf import DenseCRF, crf_as_rnn
from perpixel.refinement.permutohedral import NORMALISATIONS, GaussianFilter

SMOOTH = {"xy": 2.0, "weight": 1.5}
LIKE = {"xy": [6.0, 5.0], "colour": 20.0, "weight": 2.0}


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def picture(*shape: int, seed: int = 1) -> Tensor:
    return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def two_halves(size: int = 24, error: float = 0.2) -> tuple[Tensor, Tensor, Tensor]:
    """Scores that are wrong at a fifth of the pixels, an image whose halves have two colours, and the truth: (1, ...) each."""
    draw = torch.Generator().manual_seed(3)
    truth = (torch.arange(size) >= size // 2).long().expand(1, size, size)
    image = (60 + 120 * truth[:, None] + 4 * torch.randn(1, 3, size, size, generator=draw)).clamp(0, 255).byte()
    seen = truth ^ (torch.rand(truth.shape, generator=draw) < error)
    return 2.0 * torch.nn.functional.one_hot(seen, 2).permute(0, 3, 1, 2).float(), image, truth


def features_of(kernel: dict, image: Tensor) -> Tensor:
    """(H * W, d) features, pixel by pixel."""
    _, _, height, width = image.shape
    bx, by = kernel["xy"] if isinstance(kernel["xy"], list) else (kernel["xy"], kernel["xy"])
    rows = []
    for y, x in itertools.product(range(height), range(width)):
        rows.append([x / bx, y / by, *(float(c) / kernel["colour"] for c in image[0, :, y, x] if "colour" in kernel)])
    return torch.tensor(rows, dtype=torch.float64)


def matrices(crf: DenseCRF, kernels: list[dict], image: Tensor, classes: int) -> list[tuple[Tensor, Tensor]]:
    """Each kernel's (P, P) matrix, normalised, and its (K, K) energies of label pairs."""
    found = []
    for kernel in kernels:
        features = features_of(kernel, image)
        dense = GaussianFilter(features[None], "none")(torch.eye(len(features), dtype=torch.float64))
        n = dense.sum(1)
        scaled = {"none": dense, "before": dense / n, "after": dense / n[:, None], "symmetric": dense / (n * n[:, None]).sqrt()}
        costs = 1 - torch.eye(classes, dtype=torch.float64) if crf.compatibility is None else crf.compatibility.double()
        found.append((scaled[crf.normalisation], costs * torch.tensor(kernel["weight"], dtype=torch.float64)))
    return found


def slow_mean_field(logits: Tensor, pairs: list[tuple[Tensor, Tensor]], iterations: int, damping: float = 1.0) -> Tensor:
    """Sheet of the paper, one pixel and label at a time: (K, P) marginals."""
    unary = -logits[0].double().log_softmax(0).flatten(1)
    q = (-unary).softmax(0)
    for _ in range(iterations):
        energy = unary.clone()
        for near, costs in pairs:
            for pixel, label in itertools.product(range(energy.shape[1]), range(energy.shape[0])):
                energy[label, pixel] += sum(costs[label, other] * (near[pixel] @ q[other]) for other in range(len(q)))
        q = damping * (-energy).softmax(0) + (1 - damping) * q
    return q


@pytest.mark.parametrize("normalisation", NORMALISATIONS)
@pytest.mark.parametrize("costs", ["Potts", "asymmetric"])
def test_marginals_equal_mean_field_with_explicit_matrices(normalisation, costs):
    kernels = [{**SMOOTH, "weight": [1.5, 0.5, 1.0]}, LIKE]
    compatibility = None if costs == "Potts" else [[0, 1, 0.3], [0.5, 0, 2], [1, 1.5, 0]]
    crf = DenseCRF(kernels, normalisation, compatibility, iterations=3, damping=0.8, engine="torch")
    logits, image = random(1, 3, 4, 5), picture(1, 3, 4, 5)
    expected = slow_mean_field(logits, matrices(crf, kernels, image, 3), 3, damping=0.8)
    torch.testing.assert_close(crf(logits, image).softmax(1)[0].flatten(1), expected, rtol=1e-6, atol=1e-8)


def test_a_vector_rewards_like_labels_and_ones_are_potts():
    logits, image = random(1, 3, 6, 5), picture(1, 3, 6, 5)
    potts = DenseCRF([SMOOTH, LIKE], engine="torch")(logits, image)
    torch.testing.assert_close(DenseCRF([SMOOTH, LIKE], compatibility=[1, 1, 1], engine="torch")(logits, image), potts)
    by_class = DenseCRF([{**SMOOTH, "weight": [3.0, 1.5, 0.0]}], engine="torch")(logits, image)
    torch.testing.assert_close(DenseCRF([SMOOTH], compatibility=[2, 1, 0], engine="torch")(logits, image), by_class)


def all_labellings(logits: Tensor, pairs: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Every labelling of a tiny image, (L, P), and its energy over unordered pairs of different pixels."""
    classes, pixels = logits.shape[1], logits[0, 0].numel()
    unary = -logits[0].double().log_softmax(0).flatten(1)
    labellings = torch.tensor(list(itertools.product(range(classes), repeat=pixels)))
    energies = []
    for x in labellings:
        pairwise = sum(near[i, j] * costs[x[i], x[j]] for near, costs in pairs for i in range(pixels) for j in range(pixels) if i != j)
        energies.append(unary[x, torch.arange(pixels)].sum() + pairwise / 2)
    return labellings, torch.stack(energies)


def test_marginals_are_close_to_the_exact_sum_where_pixels_couple_weakly():
    kernels = [{"xy": 3.0, "colour": 300.0, "weight": 0.1}]
    crf = DenseCRF(kernels, "none", engine="torch", iterations=30)
    logits, image = random(1, 2, 3, 3), picture(1, 3, 3, 3)
    labellings, energies = all_labellings(logits, matrices(crf, kernels, image, 2))
    exact = ((-energies).softmax(0)[:, None] * labellings).sum(0)
    refined = crf(logits, image).softmax(1)[0, 1].flatten()
    alone = logits.softmax(1)[0, 1].flatten()
    assert (refined - exact).abs().max() < 0.02
    assert (refined - exact).abs().mean() < 0.4 * (alone - exact).abs().mean()


def test_kl_divergence_equals_the_sum_over_all_labellings():
    """Up to log Z, and with the term of a pixel with itself that mean field has and the sum over pairs has not."""
    kernels = [{"xy": 1.5, "weight": 1.0}]
    crf = DenseCRF(kernels, "symmetric", [[0, 1, 2], [1, 0, 0.5], [2, 0.5, 0]], iterations=4, engine="torch")
    logits, image = random(1, 3, 2, 3), picture(1, 1, 2, 3)
    ((near, costs),) = matrices(crf, kernels, image, 3)
    labellings, energies = all_labellings(logits, [(near, costs)])
    for iterations, reported in enumerate(crf.kl_divergence(logits, image)[0]):
        q = slow_mean_field(logits, [(near, costs)], iterations)
        log_product = q.log()[labellings, torch.arange(6)].sum(1)
        exact = (log_product.exp() * (log_product + energies)).sum()
        itself = 0.5 * sum(near[i, i] * (q[:, i] @ costs @ q[:, i]) for i in range(6))
        torch.testing.assert_close(reported, exact + itself)
        assert exact > -torch.logsumexp(-energies, 0)


def test_kl_divergence_falls():
    logits, image, _ = two_halves()
    kl = DenseCRF(engine="torch").kl_divergence(logits, image)[0]
    assert len(kl) == 11
    assert (kl.diff() < 1e-5 * kl[0].abs()).all()  # "after" is not quite symmetric, and what is minimised not quite this
    assert kl[-1] < kl[0] - 10


def test_defaults_remove_noise_and_keep_the_edge_that_the_image_shows():
    logits, image, truth = two_halves()
    before, after = ((x.argmax(1) == truth).float().mean() for x in (logits, DenseCRF()(logits, image)))
    assert before < 0.85
    assert after > 0.995


def test_a_feature_of_another_sensor_draws_the_edge_that_colours_do_not():
    logits, image, truth = two_halves()
    depth = 10.0 * truth[:, None].float()
    crf = DenseCRF([{"xy": 10, "features": 2.0, "weight": 5}])
    assert (crf(logits, torch.zeros_like(image), depth).argmax(1) == truth).float().mean() > 0.995
    assert (crf(logits, torch.zeros_like(image), torch.zeros_like(depth)).argmax(1) == truth).float().mean() < 0.97
    with pytest.raises(ValueError, match="third tensor"):
        crf(logits, image)


@pytest.mark.parametrize("engine", ["cpu", "torch"])
@pytest.mark.parametrize(
    ("classes", "height", "width", "bands"), [(2, 1, 1, 3), (1, 4, 5, 3), (200, 6, 5, 3), (3, 1, 9, 1), (3, 7, 2, 6), (256, 3, 3, 3)]
)
def test_odd_sizes_class_counts_and_band_counts_are_refined_alike(engine, classes, height, width, bands):
    logits, image = random(2, classes, height, width).float() * 3, picture(2, bands, height, width)
    refined = DenseCRF(engine=engine)(logits, image)
    assert refined.shape == logits.shape
    assert refined.dtype == torch.float32
    expected = DenseCRF(engine="torch")(logits.double(), image).softmax(1)
    torch.testing.assert_close(refined.softmax(1).double(), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("engine", ["cpu", "torch"])
def test_constant_images_pull_all_pixels_to_one_label_and_stay_finite(engine):
    logits = torch.zeros(1, 3, 20, 20)
    logits[0, 1] = 0.1
    logits[0, 2, 5, 5] = 2.0
    refined = DenseCRF(engine=engine)(logits, torch.full((1, 3, 20, 20), 255, dtype=torch.uint8))
    assert torch.isfinite(refined).all()
    assert (refined.argmax(1) == 1).all()


@pytest.mark.parametrize("engine", ["cpu", "torch"])
def test_scores_of_any_size_give_finite_marginals(engine):
    logits, image = random(1, 4, 9, 8).float() * 1e4, picture(1, 3, 9, 8)
    for scores in (logits, 3e38 * logits.sign()):
        refined = DenseCRF(engine=engine)(scores, image)
        assert torch.isfinite(refined).all()
        torch.testing.assert_close(refined.softmax(1).sum(1), torch.ones(1, 9, 8))


@pytest.mark.parametrize("engine", ["cpu", "torch"])
def test_no_iterations_no_kernels_or_no_weight_leave_scores_as_they_are(engine):
    logits, image = random(2, 3, 5, 4).float(), picture(2, 3, 5, 4)
    weightless = [{**SMOOTH, "weight": 0}, {**LIKE, "weight": 0}]
    for crf in (DenseCRF(iterations=0, engine=engine), DenseCRF(weightless, engine=engine), DenseCRF([], engine=engine)):
        torch.testing.assert_close(crf(logits, image), logits.log_softmax(1))


@pytest.mark.parametrize("engine", ["cpu", "torch"])
def test_batches_and_views_equal_single_images(engine):
    logits, image = random(3, 6, 8, 4).float().permute(0, 3, 1, 2)[:, :, ::2], picture(3, 3, 5, 8)[..., ::2][:, :, :3]
    assert not logits.is_contiguous()
    assert not image.is_contiguous()
    logits = logits[..., :4]
    crf = DenseCRF([SMOOTH, LIKE], engine=engine)
    alone = torch.cat([crf(a[None].contiguous(), b[None].contiguous()) for a, b in zip(logits, image, strict=True)])
    torch.testing.assert_close(crf(logits, image), alone)


def test_half_precision_and_autocast_compute_in_float32():
    logits, image = random(1, 3, 6, 6).half(), picture(1, 3, 6, 6)
    crf = DenseCRF([SMOOTH], compatibility=1 - torch.eye(3), engine="torch")
    expected = crf(logits.float(), image)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(crf(logits, image), expected)


def test_an_image_that_has_converged_is_left_alone_whatever_others_in_the_batch_do():
    logits, image, _ = two_halves(12)
    logits = torch.cat([logits, 0.01 * logits])
    image = image.expand(2, -1, -1, -1)
    crf = DenseCRF(iterations=200, tolerance=1e-3, engine="torch")
    alone = torch.cat([crf(logits[i : i + 1], image[:1]) for i in range(2)])
    torch.testing.assert_close(crf(logits, image), alone)
    steps = [crf.kl_divergence(logits[i : i + 1], image[:1]).shape[1] for i in range(2)]
    assert steps[0] != steps[1]
    assert max(steps) < 150


def test_damping_ends_at_the_same_marginals():
    logits, image, _ = two_halves(12)
    results = [DenseCRF(iterations=300, damping=d, engine="torch")(logits, image).softmax(1) for d in (1.0, 0.5)]
    torch.testing.assert_close(*results, rtol=0, atol=1e-4)


def test_options_are_plain_and_build_the_same_refiner():
    crf = DenseCRF([{**SMOOTH, "weight": [1, 2, 3]}, LIKE], "symmetric", [[0, 1, 2], [1, 0, 1], [2, 1, 0]], 7, 5, 0.9, 1e-4, "torch")
    again = DenseCRF(**json.loads(json.dumps(crf.options())))
    logits, image = random(1, 3, 5, 5), picture(1, 3, 5, 5)
    assert again.options() == crf.options()
    torch.testing.assert_close(again(logits, image), crf(logits, image), rtol=0, atol=0)


def test_what_training_made_of_it_is_among_its_options():
    crf, logits, image = crf_as_rnn(3), random(1, 3, 6, 6).float(), picture(1, 3, 6, 6)
    step = torch.optim.Adam(crf.parameters(), lr=0.05)
    for _ in range(3):
        step.zero_grad()
        crf(logits, image)[:, 1].mean().neg().backward()
        step.step()
    again = DenseCRF(**json.loads(json.dumps(crf.options())))
    assert crf.compatibility.diagonal().any()
    torch.testing.assert_close(again.eval()(logits, image), crf.eval()(logits, image), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kernels": [{"weight": 1}]}, "at least one bandwidth"),
        ({"kernels": [{"xy": 3}]}, "a weight and"),
        ({"kernels": [{"xy": -3, "weight": 1}]}, "positive"),
        ({"kernels": [{"xy": [1, 2, 3], "weight": 1}]}, "x and for y"),
        ({"kernels": [{"rgb": 3, "weight": 1}]}, "known: xy, colour"),
        ({"kernels": [{"xy": 3, "weight": float("nan")}]}, "finite"),
        ({"normalisation": "never"}, "known: none"),
        ({"compatibility": [[0, 1], [1, 1]]}, "zero diagonal"),
        ({"compatibility": [[0, -1], [1, 0]]}, "none negative"),
        ({"compatibility": [[0, 1, 1], [1, 0, 1]]}, "K x K"),
        ({"iterations": -1}, "0 or more"),
        ({"iterations": 2.5}, "whole number"),
        ({"damping": 0}, r"\(0, 1\]"),
        ({"tolerance": -1}, "0 or more"),
        ({"engine": "gpu"}, "known: auto"),
        ({"fast": True, "damping": 0.5}, "without damping"),
        ({"trainable": ["compatibility"]}, "to start from"),
        ({"trainable": ["everything"]}, "known: weights"),
    ],
)
def test_arguments_out_of_range_are_refused_with_what_is_legal(options, message):
    with pytest.raises(ValueError, match=message):
        DenseCRF(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"compatibility": [[0, 1], [1, 0]]}, "of 2 classes and the scores of 3"),
        ({"kernels": [{"xy": 3, "weight": [1, 2]}]}, "2 weights and the scores 3"),
        ({"kernels": [{"colour": [3, 4], "weight": 1}]}, "2 bandwidths for 3 channels"),
    ],
)
def test_arguments_that_do_not_fit_the_call_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        DenseCRF(**options)(torch.zeros(1, 3, 4, 4), torch.zeros(1, 3, 4, 4))


def test_scores_and_images_that_do_not_fit_or_are_not_finite_are_refused():
    for bad in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="NaN or infinite"):
            DenseCRF()(torch.full((1, 2, 3, 3), bad), torch.zeros(1, 3, 3, 3))
    with pytest.raises(ValueError, match=r"4x4.*3x3"):
        DenseCRF()(torch.zeros(1, 2, 4, 4), torch.zeros(1, 3, 3, 3))
    with pytest.raises(ValueError, match=r"features, which.*2x2"):
        DenseCRF()(torch.zeros(1, 2, 3, 3), torch.zeros(1, 3, 3, 3), torch.zeros(1, 1, 2, 2))
    with pytest.raises(ValueError, match="without gradients"):
        DenseCRF(engine="cpu")(torch.zeros(1, 2, 3, 3, requires_grad=True), torch.zeros(1, 3, 3, 3))


@pytest.mark.parametrize("normalisation", ["none", "after", "symmetric"])
def test_gradients_of_everything_trainable_are_right(normalisation):
    """Finite differences in float64: logits, extra features, weights, label costs, bandwidths."""
    kernels = [{"xy": [2.0, 2.5], "weight": [0.4, 0.6]}, {"xy": 3.0, "colour": 90.0, "features": 1.3, "weight": 0.7}]
    crf = DenseCRF(kernels, normalisation, [[0, 1], [0.6, 0]], 2, trainable=("weights", "compatibility", "bandwidths")).double()
    logits, image, extra = random(2, 2, 2, 2).requires_grad_(), picture(2, 1, 2, 2), random(2, 1, 2, 2, seed=5).requires_grad_()
    names, values = zip(*crf.named_parameters(), strict=True)
    assert set(names) == {
        "compatibility",
        "kernels.0.weight",
        "kernels.0.xy",
        "kernels.1.weight",
        "kernels.1.xy",
        "kernels.1.colour",
        "kernels.1.features",
    }

    def refined(logits: Tensor, extra: Tensor, *parameters: Tensor) -> Tensor:
        return torch.func.functional_call(crf, dict(zip(names, parameters, strict=True)), (logits, image, extra))

    assert torch.autograd.gradcheck(refined, (logits, extra, *values))


def test_crf_as_rnn_starts_as_published():
    crf = crf_as_rnn(21)
    assert [kernel["weight"] for kernel in crf.options()["kernels"]] == [[5.0] * 21, [3.0] * 21]
    assert [kernel["xy"] for kernel in crf.options()["kernels"]] == [160.0, 3.0]
    assert crf.options()["kernels"][0]["colour"] == 3.0
    assert crf.normalisation == "after"
    assert sum(p.numel() for p in crf.parameters()) == 2 * 21 + 21 * 21
    logits, image, _ = two_halves(8)
    assert crf_as_rnn(2).train().kl_divergence(logits, image).shape[1] == 1 + 5
    assert crf_as_rnn(2).eval().kl_divergence(logits, image).shape[1] == 1 + 10


def test_crf_as_rnn_trains_end_to_end_with_the_network_before_it():
    """Three materials; the network sees noise, and class 2 always lies beside class 1. Label costs learn from that."""
    torch.manual_seed(0)
    truth = torch.zeros(2, 16, 16, dtype=torch.long)
    truth[:, :, 6:] = 1
    truth[:, :, 11:] = 2
    image = (80.0 * truth[:, None] + 5 * torch.randn(2, 3, 16, 16)).clamp(0, 255)
    seen = torch.nn.functional.one_hot(truth, 3).permute(0, 3, 1, 2) + 0.9 * torch.randn(2, 3, 16, 16)
    network, crf = torch.nn.Conv2d(3, 3, 1), crf_as_rnn(3, xy=10, colour=20, appearance_weight=0.5, smoothness_weight=0.5)
    start = {name: p.detach().clone() for name, p in [*network.named_parameters(), *crf.named_parameters()]}
    optimiser = torch.optim.Adam([*network.parameters(), *crf.parameters()], 0.05)
    losses = []
    for _ in range(25):
        loss = torch.nn.functional.cross_entropy(crf(network(seen), image), truth)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0]
    assert all((p - start[name]).abs().max() > 0.01 for name, p in [*network.named_parameters(), *crf.named_parameters()])
    costs = crf.compatibility.detach()
    assert (costs - costs.T).abs().max() > 0.01
    with torch.no_grad():
        assert (crf.eval()(network(seen), image).argmax(1) == truth).float().mean() > 0.97
