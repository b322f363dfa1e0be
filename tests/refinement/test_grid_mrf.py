"""GridMRF against every labelling of tiny images, and against its formulas written out pixel by pixel."""

import itertools
import json
import math

import numpy as np
import pytest
import torch

from perpixel.refinement.grid_mrf import BELIEFS, LABELLING, METHODS, GridMRF

STEPS = {4: [(0, 1), (1, 0)], 8: [(0, 1), (1, 0), (1, 1), (1, -1)]}
METRIC = [[0, 0.5, 1.0], [0.5, 0, 0.75], [1.0, 0.75, 0]]
SEMI_METRIC = [[0, 1, 5], [1, 0, 1], [5, 1, 0]]


def scene(seed=0, height=3, width=3, classes=3, batch=1, bands=3, spread=1.0):
    """Random scores (float64) and an image of 8 bits."""
    generator = torch.Generator().manual_seed(seed)
    logits = spread * torch.randn(batch, classes, height, width, generator=generator, dtype=torch.float64)
    return logits, torch.randint(0, 256, (batch, bands, height, width), generator=generator, dtype=torch.uint8)


def edges_of(image, neighbours, beta=None, floor=0.0):
    """((y, x), (y', x'), weight) of every edge of one (C, H, W) image, by the formula in GridMRF's docstring."""
    image = image.double().numpy()
    _, height, width = image.shape
    pairs = [
        ((y, x), (y + dy, x + dx))
        for y, x in itertools.product(range(height), range(width))
        for dy, dx in STEPS[neighbours]
        if y + dy < height and 0 <= x + dx < width
    ]
    squares = [((image[:, *p] - image[:, *q]) ** 2).sum() for p, q in pairs]
    if beta is None:
        beta = 1 / (2 * np.mean(squares)) if np.any(squares) else 0
    return [(p, q, (floor + math.exp(-beta * s)) / math.dist(p, q)) for (p, q), s in zip(pairs, squares, strict=True)]


def all_energies(logits, image, strength, neighbours, costs=None, beta=None, floor=0.0):
    """Every labelling (L, H, W) of one image, and its energy (L,)."""
    unary = -torch.log_softmax(logits, 0).numpy()
    classes, height, width = unary.shape
    costs = 1 - np.eye(classes) if costs is None else np.asarray(costs, dtype=float)
    labellings = np.array(list(itertools.product(range(classes), repeat=height * width))).reshape(-1, height, width)
    energy = np.zeros(len(labellings))
    for y, x in itertools.product(range(height), range(width)):
        energy += unary[:, y, x][labellings[:, y, x]]
    for p, q, weight in edges_of(image, neighbours, beta, floor):
        energy += strength * weight * costs[labellings[:, *p], labellings[:, *q]]
    return labellings, energy


def found(mrf, logits, image):
    """The labelling and its energy."""
    labels = mrf(logits, image).argmax(1)
    return labels, mrf.energy(logits, image, labels)


@pytest.mark.parametrize("neighbours", [4, 8])
@pytest.mark.parametrize(("beta", "floor"), [(None, 0.0), (None, 0.25), (0, 0.0), (1e-5, 0.5)])
@pytest.mark.parametrize("costs", [None, METRIC])
def test_energy_is_the_formula_for_every_labelling(neighbours, beta, floor, costs):
    logits, image = scene(height=2, width=3)
    labellings, energy = all_energies(logits[0], image[0], 0.75, neighbours, costs, beta, floor)
    mrf = GridMRF(0.75, beta, floor, neighbours, costs)
    for number in range(0, len(labellings), 37):
        assert mrf.energy(logits, image, torch.from_numpy(labellings[number])[None]).item() == pytest.approx(energy[number], rel=1e-6)


@pytest.mark.parametrize("costs", [None, METRIC], ids=["potts", "metric"])
@pytest.mark.parametrize("neighbours", [4, 8])
def test_icm_costs_no_less_than_expansion_and_expansion_than_the_best_of_all_labellings(neighbours, costs):
    """Expansion is within twice the best times the largest cost over the smallest (Boykov, Veksler & Zabih 2001, theorem 6.1)."""
    bound_factor = 2 if costs is None else 4
    optimal, energies = 0, dict.fromkeys((*METHODS, "best"), 0.0)
    for seed in range(12):
        logits, image = scene(seed)
        _, every = all_energies(logits[0], image[0], 1.0, neighbours, costs)
        best = every.min()
        for name in METHODS:
            _, energy = found(GridMRF(1.0, neighbours=neighbours, compatibility=costs, method=name), logits, image)
            assert energy >= best - 1e-6
            energies[name] += energy.item()
            if name == "expansion":
                optimal += energy.item() < best + 1e-6
                assert energy <= bound_factor * best + 1e-6
        energies["best"] += best
        bound = GridMRF(1.0, neighbours=neighbours, compatibility=costs).lower_bound(logits, image, 100)
        assert 0.5 * best < bound <= best + 1e-9
    assert energies["icm"] > energies["expansion"] >= energies["best"] - 1e-6
    assert optimal >= 10


@pytest.mark.parametrize("method", ["expansion", "swap"])
@pytest.mark.parametrize("neighbours", [4, 8])
def test_one_cut_gives_the_best_of_all_labellings_of_two_labels_and_the_bound_reaches_it(neighbours, method):
    """For two labels the relaxation behind the bound is tight where costs are submodular (Kolmogorov & Wainwright 2005)."""
    for seed in range(6):
        logits, image = scene(seed, height=3, width=4, classes=2)
        mrf = GridMRF(1.5, floor=0.125, neighbours=neighbours, method=method)
        labellings, every = all_energies(logits[0], image[0], 1.5, neighbours, floor=0.125)
        labels, energy = found(mrf, logits, image)
        np.testing.assert_array_equal(labels[0], labellings[every.argmin()])
        assert energy.item() == pytest.approx(every.min())
        bound = mrf.lower_bound(logits, image, 400).item()
        assert every.min() * (1 - 0.01) <= bound <= every.min() + 1e-9


def test_swap_takes_costs_that_are_no_metric_and_expansion_names_swap_or_repairs_them_when_told():
    logits, image = scene(3, spread=2.0)
    _, every = all_energies(logits[0], image[0], 1.0, 4, SEMI_METRIC)
    _, energy = found(GridMRF(compatibility=SEMI_METRIC, method="swap"), logits, image)
    assert every.min() - 1e-6 <= energy <= every.min() * 1.1
    with pytest.raises(ValueError, match=r"5 between labels 0 and 2, but 2 by way of others.*swap.*repair_metric"):
        GridMRF(compatibility=SEMI_METRIC)
    repaired = GridMRF(compatibility=SEMI_METRIC, repair_metric=True)
    closed = GridMRF(compatibility=[[0, 1, 2], [1, 0, 1], [2, 1, 0]])
    torch.testing.assert_close(repaired(logits, image), closed(logits, image))


def test_the_metric_closure_is_scipys_shortest_paths():
    from scipy.sparse.csgraph import floyd_warshall

    from perpixel.refinement.compatibility import shortest_paths

    costs = np.random.default_rng(0).random((9, 9)) ** 3
    costs = costs + costs.T
    np.fill_diagonal(costs, 0)
    np.testing.assert_allclose(shortest_paths(torch.from_numpy(costs)).numpy(), floyd_warshall(costs))


@pytest.mark.parametrize("costs", [None, METRIC], ids=["potts", "metric"])
@pytest.mark.parametrize("upright", [False, True])
@pytest.mark.parametrize("schedule", ["sweeps", "synchronous"])
def test_propagation_on_a_chain_equals_viterbi_and_forward_backward(schedule, upright, costs):
    logits, image = scene(5, height=1, width=8)
    labellings, every = all_energies(logits[0], image[0], 1.25, 4, costs)
    probability = np.exp(-every) / np.exp(-every).sum()
    lowest = np.array([[every[labellings[:, 0, x] == label].min() for x in range(8)] for label in range(3)])
    marginal = np.array([[probability[labellings[:, 0, x] == label].sum() for x in range(8)] for label in range(3)])
    if upright:
        logits, image = logits.mT, image.mT
    options = {"strength": 1.25, "compatibility": costs, "schedule": schedule, "damping": 0.0}
    options["iterations"] = 1 if schedule == "sweeps" else 7
    min_marginal = -GridMRF(method="min_sum", **options)(logits, image)[0].flatten(1).numpy()
    np.testing.assert_allclose(min_marginal - min_marginal.min(0), lowest - every.min(), atol=1e-6)
    log_marginal = GridMRF(method="sum_product", **options)(logits, image)[0].flatten(1).numpy()
    np.testing.assert_allclose(np.exp(log_marginal), marginal, atol=1e-7)
    bound = GridMRF(strength=1.25, compatibility=costs).lower_bound(logits, image, 1)
    assert bound.item() == pytest.approx(every.min(), rel=1e-7)


@pytest.mark.parametrize("costs", [None, METRIC], ids=["potts", "metric"])
@pytest.mark.parametrize("neighbours", [4, 8])
@pytest.mark.parametrize("method", BELIEFS)
def test_synchronous_messages_equal_the_update_written_out_pixel_by_pixel(method, neighbours, costs):
    logits, image = scene(6, height=3, width=4)
    unary = -torch.log_softmax(logits[0], 0).numpy()
    table = 1 - np.eye(3) if costs is None else np.array(costs)
    links = [link for p, q, w in edges_of(image[0], neighbours) for link in ((p, q, w), (q, p, w))]
    message = {(p, q): np.zeros(3) for p, q, _ in links}
    for _ in range(3):
        new = {}
        for p, q, weight in links:
            held = unary[:, *p] + sum(m for (s, t), m in message.items() if t == p and s != q)
            each = held[:, None] + 0.5 * weight * table
            m = each.min(0) if method == "min_sum" else -np.log(np.exp(-each).sum(0))
            m -= m.min() if method == "min_sum" else -np.log(np.exp(-held).sum())
            new[p, q] = 0.25 * message[p, q] + 0.75 * m
        message = new
    belief = unary.copy()
    for (_, q), m in message.items():
        belief[:, *q] += m
    mrf = GridMRF(0.5, None, 0.0, neighbours, costs, method, iterations=3, damping=0.25, schedule="synchronous")
    scores = torch.log_softmax(mrf(logits, image)[0], 0)
    torch.testing.assert_close(scores, torch.log_softmax(torch.from_numpy(-belief), 0), atol=1e-6, rtol=1e-6)


def test_both_schedules_settle_on_the_same_beliefs():
    logits, image = scene(7, height=6, width=7)
    first, second = (
        GridMRF(0.25, method="sum_product", iterations=60, schedule=schedule)(logits, image) for schedule in ("sweeps", "synchronous")
    )
    torch.testing.assert_close(first, second, atol=1e-9, rtol=0)


@pytest.mark.parametrize("neighbours", [4, 8])
def test_no_sweep_of_icm_raises_the_energy_and_no_single_change_lowers_it_in_the_end(neighbours):
    logits, image = scene(8, height=7, width=9, classes=4)
    energies = [found(GridMRF(1.0, neighbours=neighbours, method="icm", iterations=n), logits, image)[1].item() for n in range(6)]
    assert energies == sorted(energies, reverse=True)
    assert energies[1] < energies[0]
    mrf = GridMRF(1.0, neighbours=neighbours, method="icm")
    labels, lowest = found(mrf, logits, image)
    for y, x, label in itertools.product(range(7), range(9), range(4)):
        other = labels.clone()
        other[0, y, x] = label
        assert mrf.energy(logits, image, other) >= lowest - 1e-9


@pytest.mark.parametrize("method", LABELLING)
def test_scores_are_minus_what_each_label_would_cost_beside_the_labels_found(method):
    logits, image = scene(9, height=4, width=5)
    mrf = GridMRF(0.5, neighbours=8, compatibility=METRIC, method=method)
    scores = mrf(logits, image)[0]
    labels = scores.argmax(0)
    expected = torch.log_softmax(logits[0], 0)
    for p, q, weight in edges_of(image[0], 8):
        for here, there in ((p, q), (q, p)):
            expected[:, *here] -= 0.5 * weight * torch.tensor(METRIC, dtype=torch.float64)[:, labels[*there]]
    torch.testing.assert_close(scores, expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("method", LABELLING)
def test_the_label_found_is_the_argmax_even_where_others_cost_as_much(method):
    scores = GridMRF(1.0, method=method)(torch.zeros(1, 5, 6, 6), torch.zeros(1, 1, 6, 6))
    assert len(scores.argmax(1).unique()) == 1
    assert ((scores == scores.amax(1, keepdim=True)).sum(1) == 1).all()


@pytest.mark.parametrize("method", METHODS)
def test_strength_zero_and_zero_iterations_give_the_scores_back(method):
    logits, image = scene(10, height=5, width=4, batch=2)
    for mrf in (GridMRF(0.0, method=method), GridMRF(3.0, method=method, iterations=0)):
        torch.testing.assert_close(mrf(logits, image), torch.log_softmax(logits, 1))


@pytest.mark.parametrize("method", ["expansion", "min_sum", "sum_product"])
def test_a_huge_strength_gives_the_constant_map_of_the_best_label(method):
    logits, image = scene(11, height=5, width=6, classes=4)
    iterations = None if method == "expansion" else 60
    labels = GridMRF(1e4, beta=0, method=method, iterations=iterations)(logits, image).argmax(1)
    if method == "expansion":
        assert (labels == torch.log_softmax(logits, 1).sum((2, 3)).argmax()).all()
    assert len(labels.unique()) == 1


@pytest.mark.parametrize("neighbours", [4, 8])
def test_beta_zero_is_potts_and_so_is_a_flat_image(neighbours):
    logits, image = scene(12, height=5, width=6)
    plain = GridMRF(1.0, beta=0, neighbours=neighbours)(logits, image)
    torch.testing.assert_close(GridMRF(1.0, neighbours=neighbours)(logits, torch.full_like(image, 77)), plain)
    assert not torch.equal(GridMRF(1.0, neighbours=neighbours)(logits, image), plain)


@pytest.mark.parametrize("scale", [1e-25, 1e-3, 257.0, 1e30])
def test_beta_of_the_image_makes_its_scale_irrelevant(scale):
    logits, image = scene(13, height=5, width=6)
    mrf = GridMRF(1.0, method="min_sum")
    logits, image = logits.float(), image.float()
    torch.testing.assert_close(mrf(logits, scale * (image - 100)), mrf(logits, image), atol=1e-4, rtol=1e-4)


def test_the_bound_rises_with_its_iterations_and_stays_below_what_expansion_finds():
    logits, image = scene(14, height=12, width=15, classes=5, batch=2)
    for costs in (None, (np.abs(np.subtract.outer(range(5), range(5))) / 2).tolist()):
        mrf = GridMRF(1.0, compatibility=costs)
        bounds = torch.stack([mrf.lower_bound(logits, image, n) for n in (1, 2, 5, 20, 80)])
        assert (bounds.diff(dim=0) >= -1e-9).all()
        energy = found(mrf, logits, image)[1]
        assert (bounds[-1] <= energy + 1e-9).all()
        assert (bounds[-1] >= 0.99 * energy).all()


@pytest.mark.parametrize("method", METHODS)
def test_a_batch_gives_what_its_images_give_one_by_one_and_memory_layout_does_not_matter(method):
    logits, image = scene(15, height=6, width=5, batch=3)
    mrf = GridMRF(1.0, neighbours=8, method=method)
    together = mrf(logits, image)
    alone = torch.cat([mrf(logits[n : n + 1], image[n : n + 1]) for n in range(3)])
    torch.testing.assert_close(together, alone)
    spaced = mrf(logits.to(memory_format=torch.channels_last), image.mT.contiguous().mT)
    torch.testing.assert_close(spaced, together)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("neighbours", [4, 8])
def test_smallest_images_one_class_and_200_classes_work(method, neighbours):
    mrf = GridMRF(1.0, neighbours=neighbours, method=method)
    for height, width, classes in ((1, 1, 3), (1, 4, 3), (4, 1, 3), (3, 3, 1), (4, 4, 200)):
        logits, image = scene(16, height, width, classes)
        scores = mrf(logits.float(), image)
        assert scores.shape == logits.shape
        assert scores.dtype == torch.float32
        assert torch.isfinite(scores).all()
        if height * width == 1:
            torch.testing.assert_close(scores, torch.log_softmax(logits.float(), 1))
        assert torch.isfinite(mrf.lower_bound(logits, image)).all()


@pytest.mark.parametrize("method", METHODS)
def test_scores_of_any_size_stay_finite(method):
    logits, image = scene(17, height=4, width=4)
    for scale in (1e4, 1e38):
        assert torch.isfinite(GridMRF(5.0, method=method)((scale * logits.clamp(-3, 3)).float(), image)).all()


@pytest.mark.parametrize("method", METHODS)
def test_bad_input_is_refused(method):
    logits, image = scene(18)
    mrf = GridMRF(1.0, method=method)
    with pytest.raises(ValueError, match="NaN or infinite"):
        mrf(logits.where(logits < 1, torch.nan), image)
    with pytest.raises(ValueError, match=r"3x3 pixels.*4x3"):
        mrf(logits, torch.zeros(1, 3, 4, 3))
    with pytest.raises(ValueError, match="label costs are 3x3 and the scores have 4 classes"):
        GridMRF(compatibility=METRIC, method=method)(torch.zeros(1, 4, 3, 3), image)


@pytest.mark.parametrize("method", LABELLING)
def test_methods_without_gradient_say_so_when_asked_for_one(method):
    logits, image = scene(19)
    with pytest.raises(ValueError, match="no gradient"):
        GridMRF(method=method)(logits.requires_grad_(), image)
    with torch.no_grad():
        GridMRF(method=method)(logits, image)
    with pytest.raises(ValueError, match="no gradient"):
        GridMRF(method=method, trainable=True)


@pytest.mark.parametrize(
    "options",
    [
        {"strength": -1.0},
        {"strength": math.nan},
        {"beta": -1.0},
        {"floor": -0.5},
        {"neighbours": 6},
        {"method": "trws"},
        {"iterations": -1},
        {"damping": 1.0},
        {"schedule": "raster"},
        {"schedule": "sweeps", "neighbours": 8},
        {"compatibility": [[0, 1], [2, 0]]},
        {"compatibility": [[0, -1], [-1, 0]]},
        {"compatibility": [[1, 1], [1, 1]]},
        {"compatibility": [[0, 1, 1], [1, 0, 1]]},
    ],
    ids=str,
)
def test_options_that_make_no_field_are_refused(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        GridMRF(**options)


def test_energy_refuses_labels_of_another_shape_or_of_no_class():
    logits, image = scene(20)
    with pytest.raises(ValueError, match=r"give \(1, 3, 3\)"):
        GridMRF().energy(logits, image, torch.zeros(3, 3))
    with pytest.raises(ValueError, match=r"0\.\.2 are legal"):
        GridMRF().energy(logits, image, torch.full((1, 3, 3), 3))


@pytest.mark.parametrize("costs", [None, METRIC], ids=["potts", "metric"])
@pytest.mark.parametrize(("schedule", "neighbours"), [("sweeps", 4), ("synchronous", 4), ("synchronous", 8)])
@pytest.mark.parametrize("method", BELIEFS)
def test_gradients_equal_finite_differences(method, schedule, neighbours, costs):
    logits, image = scene(21, height=2, width=2)
    mrf = GridMRF(0.75, None, 0.125, neighbours, costs, method, 2, 0.25, schedule, trainable=True).double()
    names = [name for name, _ in mrf.named_parameters()]
    values = [parameter.detach().clone().requires_grad_() for parameter in mrf.parameters()]

    def refined(logits, image, *values):
        return torch.func.functional_call(mrf, dict(zip(names, values, strict=True)), (logits, image))

    assert torch.autograd.gradcheck(refined, (logits.requires_grad_(), image.double().requires_grad_(), *values))


def test_training_through_messages_learns_a_strength_that_denoises():
    """Scores whose labels are right on average: smoothing lowers the loss, so the gradient must raise the strength from 0.1."""
    generator = torch.Generator().manual_seed(0)
    truth = (torch.arange(24)[:, None] + 0 * torch.arange(24) >= 12).long()[None]
    logits = 0.5 * torch.nn.functional.one_hot(truth, 2).movedim(-1, 1) + torch.randn(1, 2, 24, 24, generator=generator)
    mrf = GridMRF(0.1, beta=0, method="sum_product", iterations=3, damping=0.0, schedule="synchronous", trainable=True)
    optimiser = torch.optim.Adam(mrf.parameters(), 0.05)
    losses = []
    for _ in range(15):
        loss = torch.nn.functional.cross_entropy(mrf(logits, truth[:, None]), truth)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert mrf.strength > 0.3
    assert losses[-1] < 0.8 * losses[0]


def test_options_are_json_and_rebuild_the_field_and_learned_values_travel_in_the_state():
    mrf = GridMRF(0.5, 0.25, 0.125, 8, torch.tensor(METRIC), "min_sum", 4, 0.5, "synchronous", True, True)
    options = json.loads(json.dumps(mrf.options()))
    again = GridMRF(**options)
    assert again.options() == options == mrf.options()
    with torch.no_grad():
        mrf.strength += 1
        mrf.compatibility *= 2
    again.load_state_dict(mrf.state_dict())
    logits, image = scene(22)
    torch.testing.assert_close(again(logits, image), mrf(logits, image), atol=0, rtol=0)
