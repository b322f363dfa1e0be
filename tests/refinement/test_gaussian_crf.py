"""The Gaussian CRF against dense matrices written out edge by edge, finite differences, and the published formulas."""

import itertools
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck

from perpixel.refinement import gaussian_solver
from perpixel.refinement.gaussian_crf import GaussianCRF, _on_own_contrast, label_matrix
from perpixel.refinement.gaussian_solver import gaussian_solve, neighbourhood

EXACT = {"tolerance": 1e-12, "on_failure": "error"}


def random(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def semidefinite(size, seed=3):
    root = random(size, size, seed=seed)
    return root @ root.T / size


def dense(edges, offsets, lam, matrix, diagonal, labels):
    """M of one image, written out edge by edge: unknowns are ordered label, row, column."""
    height, width = edges.shape[-2:]
    count = labels * height * width
    at = torch.arange(count).view(labels, height, width)
    big = lam * torch.eye(count, dtype=edges.dtype)
    shared = torch.eye(labels, dtype=edges.dtype) if matrix is None else matrix
    for y, x, (d, (down, right)) in itertools.product(range(height), range(width), enumerate(offsets)):
        v, u = y + down, x + right
        if not (0 <= v < height and 0 <= u < width):
            continue
        block = edges[d, y, x] * shared if edges.ndim == 3 else edges[d, :, :, y, x]
        near, far = at[:, y, x], at[:, v, u]
        big[near[:, None], far] += block
        big[far[:, None], near] += block.T
        if diagonal == "dominant" and edges.ndim == 3:
            big[near[:, None], near] += edges[d, y, x].abs() * shared
            big[far[:, None], far] += edges[d, y, x].abs() * shared
        elif diagonal == "dominant":
            big[near, near] += block.abs().sum(1)
            big[far, far] += block.abs().sum(0)
    return big


def problem(kind, neighbours=4, batch=2, labels=3, height=5, width=4):
    offsets = neighbourhood(neighbours)
    scores = random(batch, labels, height, width)
    if kind == "blocks":
        return scores, random(batch, len(offsets), labels, labels, height, width, seed=1), offsets, None
    return scores, random(batch, len(offsets), height, width, seed=1), offsets, semidefinite(labels) if kind == "full" else None


@pytest.mark.parametrize("kind", ["potts", "full", "blocks"])
@pytest.mark.parametrize("diagonal", ["dominant", "constant"])
@pytest.mark.parametrize("neighbours", [4, 8, 24])
def test_conjugate_gradient_equals_the_dense_solution(kind, diagonal, neighbours):
    scores, edges, offsets, matrix = problem(kind, neighbours)
    lam = 0.7 if diagonal == "dominant" else 80.0
    x, report = gaussian_solve(scores, edges, offsets, lam, matrix, diagonal=diagonal, **EXACT)
    for n in range(len(scores)):
        big = dense(edges[n], offsets, lam, matrix, diagonal, scores.shape[1])
        torch.testing.assert_close(x[n].flatten(), torch.linalg.solve(big, scores[n].flatten()))
        assert torch.linalg.eigvalsh(big)[0] > 0
    assert report.certain.all()
    assert (report.residual <= 1e-11).all()


def test_an_indefinite_matrix_of_labels_is_solved_where_lambda_holds_it():
    """Potts' blocks 11^T - I, the general form of Chandra & Kokkinos."""
    scores, edges, offsets, _ = problem("potts")
    matrix = 1 - torch.eye(3, dtype=torch.float64)
    x, report = gaussian_solve(scores, edges, offsets, 20.0, matrix, diagonal="constant", **EXACT)
    torch.testing.assert_close(
        x[0].flatten(), torch.linalg.solve(dense(edges[0], offsets, 20.0, matrix, "constant", 3), scores[0].flatten())
    )
    assert report.certain.all()


@pytest.mark.parametrize("kind", ["potts", "full"])
@pytest.mark.parametrize("diagonal", ["dominant", "constant"])
def test_the_loops_of_the_processor_and_torchs_operations_take_the_same_steps(kind, diagonal, monkeypatch):
    """A GPU is given the latter, which therefore run here too."""
    scores, edges, offsets, matrix = problem(kind, 24)
    loops, report = gaussian_solve(scores, edges, offsets, 80.0, matrix, diagonal=diagonal, **EXACT)
    monkeypatch.setattr(gaussian_solver, "_by_label", gaussian_solver._by_tensors)
    tensors, told = gaussian_solve(scores, edges, offsets, 80.0, matrix, diagonal=diagonal, **EXACT)
    torch.testing.assert_close(loops, tensors)
    assert (report.iterations - told.iterations).abs().max() <= 1


def test_the_released_layer_is_lambda_times_the_exact_solution_up_to_a_term_common_to_the_labels():
    """gcrf's reduced_rtf_layer solves I + W / lambda by label; with Potts' blocks A = -W that is the whole system, less a common term."""
    scores, edges, offsets, _ = problem("potts", batch=1)
    lam, labels = 10.0, scores.shape[1]
    right = scores - scores.sum(1, keepdim=True) / (labels - 1)
    by_label, _ = gaussian_solve(right, edges / lam, offsets, 1.0, diagonal="constant", **EXACT)
    blocks = 1 - torch.eye(labels, dtype=torch.float64)
    exact = torch.linalg.solve(dense(-edges[0], offsets, lam, blocks, "constant", labels), scores.flatten()).view_as(scores)
    torch.testing.assert_close(by_label - by_label.mean(1, keepdim=True), lam * (exact - exact.mean(1, keepdim=True)))


@pytest.mark.parametrize("kind", ["potts", "full", "blocks"])
def test_without_edges_the_solution_is_the_scores_over_lambda(kind):
    scores, edges, offsets, matrix = problem(kind)
    x, _ = gaussian_solve(scores, 0 * edges, offsets, 4.0, matrix, **EXACT)
    torch.testing.assert_close(x, scores / 4)


@pytest.mark.parametrize("kind", ["potts", "full", "blocks"])
@pytest.mark.parametrize(("diagonal", "lam"), [("dominant", 0.05), ("dominant", 2.0), ("constant", 40.0)])
def test_derivatives_of_the_solver_equal_finite_differences(kind, diagonal, lam):
    """In scores, edges, lambda and the labels' matrix; lambda 0.05 makes a nearly singular matrix."""
    scores, edges, offsets, matrix = problem(kind, batch=2, labels=2, height=2, width=2)
    small = [scores[:1], edges[:1]] if kind == "blocks" else [scores, edges]  # blocks have many numbers
    inputs = [*small, torch.tensor(lam, dtype=torch.float64)] + ([] if matrix is None else [random(2, 2, seed=5)])

    def solve(scores, edges, lam, root=None):
        shared = None if root is None else root @ root.T
        return gaussian_solve(scores, edges, offsets, lam, shared, diagonal=diagonal, **EXACT)[0]

    assert gradcheck(solve, [v.requires_grad_() for v in inputs])


def made(**options):
    torch.manual_seed(0)
    crf = GaussianCRF(tolerance=1e-13, on_failure="error", **options).double()
    for parameter in crf.parameters():  # away from zeros and ties, where finite differences mean nothing
        parameter.data += 0.1 * torch.rand_like(parameter)
    return crf


@pytest.mark.parametrize(
    "options",
    [
        {"channels": 2, "learn_lambda": True},
        {"classes": 2, "channels": 2, "labels": "full", "neighbours": 8},
        {"classes": 2, "channels": 2, "terms": "features", "labels": "full", "width": 2, "layers": 2},
        {"classes": 2, "channels": 2, "terms": "edges", "width": 2},
        {"classes": 2, "channels": 2, "terms": "edges", "width": 2, "labels": "full", "diagonal": "constant", "lam": 60.0},
        {"classes": 2, "channels": 2, "terms": "edges", "width": 2, "labels": "blocks"},
    ],
    ids=lambda options: " ".join(f"{k}={v}" for k, v in options.items() if isinstance(v, str)) or "colours",
)
def test_derivatives_of_every_parameter_equal_finite_differences(options):
    """Weight, lambda, F, the labels' matrix, and the branch; and of the logits."""
    crf = made(**options)
    image = 100 + 50 * random(1, 2, 2, 3, seed=4)
    logits = random(1, 2, 2, 3).requires_grad_()
    names = [name for name, p in crf.named_parameters() if p.requires_grad]
    values = [crf.get_parameter(name).detach().clone().requires_grad_() for name in names]

    def refined(logits, *values):
        return torch.func.functional_call(crf, dict(zip(names, values, strict=True)), (logits, image))

    assert gradcheck(refined, [logits, *values])


@pytest.mark.parametrize("terms", ["colours", "features", "edges"])
def test_two_layers_are_one_layer_applied_twice(terms):
    options = {"channels": 3, "terms": terms}
    twice, once = made(**options, layers=2), made(**options)
    once.load_state_dict(twice.state_dict())
    logits, image = random(1, 4, 6, 5), 255 * random(1, 3, 6, 5, seed=2).abs()
    torch.testing.assert_close(twice(logits, image), once(once(logits, image), image))


def test_similarities_are_the_published_formula_on_the_images_own_contrast():
    """s = exp(-beta |I_p - I_q|^2 F) / distance with beta = 1 / (2 <|I_p - I_q|^2>), looked up pixel by pixel."""
    image = 255 * random(1, 3, 4, 5).abs()
    crf = GaussianCRF(neighbours=8, weight=2.0, sharpness=0.5).double()
    edges, pairs = crf.pairwise(image)[0], {}
    for y, x, (d, (down, right)) in itertools.product(range(4), range(5), enumerate(crf.offsets)):
        if 0 <= y + down < 4 and 0 <= x + right < 5:
            pairs[d, y, x] = (image[0, :, y, x] - image[0, :, y + down, x + right]).square().sum(), (down**2 + right**2) ** 0.5
        else:
            assert edges[d, y, x] == 0
    mean = sum(square for square, _ in pairs.values()) / len(pairs)
    for at, (square, distance) in pairs.items():
        torch.testing.assert_close(edges[at], -2 * torch.exp(-0.5 * square / (2 * mean)) / distance)


def test_8_and_16_bits_of_the_same_picture_give_the_same():
    logits, image = torch.randn(1, 3, 9, 8), torch.randint(0, 256, (1, 3, 9, 8), dtype=torch.uint8)
    crf = GaussianCRF()
    torch.testing.assert_close(crf(logits, image), crf(logits, image.int() * 257))


def test_it_smooths_inside_regions_and_keeps_their_border():
    """Two flat regions, noisy scores: the labels become the regions, which the scores alone do not show."""
    torch.manual_seed(0)
    truth = torch.zeros(1, 24, 24, dtype=torch.long)
    truth[:, :, 11:] = 1
    image = (60 + 120 * truth[:, None]).expand(-1, 3, -1, -1) + 5 * torch.randn(1, 3, 24, 24)
    logits = F.one_hot(truth, 2).permute(0, 3, 1, 2) + 1.5 * torch.randn(1, 2, 24, 24)
    right = [float((scores.argmax(1) == truth).float().mean()) for scores in (logits, GaussianCRF(weight=20.0)(logits, image))]
    assert right[0] < 0.75
    assert right[1] > 0.97


def test_weight_zero_and_an_untrained_branch_change_no_probability():
    logits, image = torch.randn(2, 5, 7, 6), torch.randint(0, 256, (2, 3, 7, 6), dtype=torch.uint8)
    for crf in (
        GaussianCRF(weight=0.0),
        GaussianCRF(5, 3, terms="edges"),
        GaussianCRF(5, 3, terms="edges", labels="blocks"),
        GaussianCRF(5, labels="full", weight=0.0, lam=3.0, diagonal="constant"),
        GaussianCRF(layers=0),
    ):
        torch.testing.assert_close(crf(logits, image).softmax(1), logits.softmax(1))


def test_label_costs_are_what_a_border_between_pure_labels_costs():
    points = random(4, 3)
    costs = (points[:, None] - points[None]).square().sum(-1)  # squared distances, for which the matrix is exact
    matrix = label_matrix(costs)
    one = torch.eye(4, dtype=torch.float64)
    for a, b in itertools.product(range(4), range(4)):
        assert float((one[a] - one[b]) @ matrix @ (one[a] - one[b])) == pytest.approx(2 * float(costs[a, b]), abs=1e-9)
    hard = torch.tensor([[0, 1, 9], [1, 0, 1], [9, 1, 0.0]])  # no squared distances: 9 > (1 + 1)^2
    assert torch.linalg.eigvalsh(label_matrix(hard))[0] > -1e-12


def test_potts_costs_give_what_potts_gives():
    logits, image = random(1, 4, 6, 6), 255 * random(1, 3, 6, 6, seed=1).abs()
    full = GaussianCRF(4, labels="full", compatibility=(1 - torch.eye(4)).tolist(), tolerance=1e-10)
    torch.testing.assert_close(full(logits, image), GaussianCRF(tolerance=1e-10)(logits, image), rtol=1e-5, atol=1e-5)


def test_cheap_borders_are_smoothed_less_than_dear_ones():
    """One step edge between labels 0 and 1, one between 0 and 2; the border that costs little keeps its contrast."""
    costs = torch.tensor([[0.0, 0.2, 1.8], [0.2, 0.0, 1.0], [1.8, 1.0, 0.0]])
    image = torch.full((1, 1, 1, 12), 7)
    crf = GaussianCRF(3, labels="full", compatibility=costs)
    left = []
    for other in (1, 2):
        labels = torch.tensor([0] * 6 + [other] * 6).view(1, 1, 12)
        scores = crf(F.one_hot(labels, 3).permute(0, 3, 1, 2).float(), image)[0, :, 0]
        left.append(float((scores[0] - scores[other])[5].detach()))
    assert left[0] > left[1]


def test_trained_end_to_end_its_branch_learns_edges_that_lower_the_loss():
    """A linear classifier of one noisy pixel and the CRF's branch, together; the same classifier alone cannot get there."""

    def scene(seed):
        generator = torch.Generator().manual_seed(seed)
        truth = (F.interpolate(torch.randn(4, 1, 4, 4, generator=generator), size=(16, 16)) > 0).long()[:, 0]
        return truth, 100 + 60 * truth[:, None].float() + 60 * torch.randn(4, 1, 16, 16, generator=generator)

    losses = {}
    for refined in (False, True):
        torch.manual_seed(0)
        unary = torch.nn.Conv2d(1, 2, 1)
        crf = GaussianCRF(2, 1, terms="edges", weight=1.0, width=8)
        optimiser = torch.optim.Adam([*unary.parameters(), *crf.parameters()], 0.02)
        course = []
        for step in range(60):
            truth, image = scene(step)
            logits = unary((image - 130) / 60)
            loss = F.cross_entropy(crf(logits, image) if refined else logits, truth)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            course.append(float(loss.detach()))
        losses[refined] = sum(course[-10:]) / 10
    assert losses[True] < 0.8 * course[0]
    assert losses[True] < 0.8 * losses[False]
    assert crf.branch.head.weight.abs().max() > 0.01


def test_what_is_not_positive_definite_comes_back_as_it_came_with_a_warning_or_is_an_error():
    """Attracting edges that add up to more than lambda; the other image of the batch is solved all the same."""
    logits = random(2, 3, 5, 5).requires_grad_()
    image = torch.zeros(2, 3, 5, 5)
    image[1] = 255 * torch.rand(3, 5, 5)
    crf = GaussianCRF(diagonal="constant", lam=3.0, weight=1.0, sharpness=50.0, tolerance=1e-10)
    with pytest.warns(RuntimeWarning, match=r"1 of 2 images did not converge .* lambda is 3 and .* sum up to 4"):
        refined, (report,) = crf.refine(logits, image)
    assert report.converged.tolist() == [False, True]
    assert report.certain.tolist()[0] is False
    torch.testing.assert_close(refined[0].softmax(0), logits[0].softmax(0))
    assert (refined[1].softmax(0) - logits[1].softmax(0)).abs().max() > 1e-3
    refined[0, 0].sum().backward()
    centred = torch.full((3,), -1 / 3, dtype=torch.float64) + torch.eye(3, dtype=torch.float64)[0]
    torch.testing.assert_close(logits.grad[0], centred.view(3, 1, 1).expand(3, 5, 5))
    with pytest.raises(RuntimeError, match='use diagonal="dominant" or a larger lambda'):
        GaussianCRF(diagonal="constant", lam=3.0, weight=1.0, on_failure="error")(logits, image)


def test_too_few_iterations_and_broken_branches_are_never_silent():
    logits, image = torch.randn(1, 3, 9, 9), torch.zeros(1, 1, 9, 9)
    with pytest.warns(RuntimeWarning, match="allow more iterations"):
        refined = GaussianCRF(iterations=1, tolerance=1e-9)(logits, torch.rand(1, 1, 9, 9))
    torch.testing.assert_close(refined.softmax(1), logits.softmax(1))
    with warnings.catch_warnings(action="error"):
        refined = GaussianCRF(iterations=0)(logits, image)  # as was asked
    torch.testing.assert_close(refined.softmax(1), logits.softmax(1))
    crf = GaussianCRF(3, 1, terms="edges")
    torch.nn.init.constant_(crf.branch.head.bias, float("nan"))
    with pytest.warns(RuntimeWarning, match="did not converge"):
        assert torch.isfinite(crf(logits, image)).all()


def test_scores_of_any_size_are_solved_alike():
    logits, image = torch.randn(2, 3, 9, 9), torch.rand(2, 3, 9, 9)
    small, large = (GaussianCRF()(scale * logits, image) / scale for scale in (1.0, 1e30))
    torch.testing.assert_close(large, small, rtol=1e-4, atol=1e-4)


def test_what_training_made_of_weight_and_lambda_is_among_its_options():
    crf = GaussianCRF(weight=2.0, learn_lambda=True)
    with torch.no_grad():
        crf.root_weight.mul_(2)
        crf.log_lambda.add_(1)
    assert crf.options()["weight"] == pytest.approx(8, rel=1e-5)
    logits, image = torch.randn(1, 3, 9, 9), torch.rand(1, 3, 9, 9)
    torch.testing.assert_close(GaussianCRF(**crf.options())(logits, image), crf(logits, image), rtol=1e-4, atol=1e-4)


def test_a_gradient_that_is_not_finite_stays_so():
    """GradScaler must see it; the other image's is untouched."""
    scores, edges, offsets, _ = problem("potts")
    solved, _ = gaussian_solve(scores.requires_grad_(), edges, offsets, 1.0, **EXACT)
    gradient = torch.ones_like(solved)
    gradient[0, 0, 0, 0] = torch.inf
    solved.backward(gradient)
    assert scores.grad[0].isnan().all()
    assert scores.grad[1].isfinite().all()


def test_offsets_may_lead_in_any_direction():
    scores, edges, _, _ = problem("potts")
    offsets = ((-1, 2), (0, -1))
    x, _ = gaussian_solve(scores, edges, offsets, 1.0, **EXACT)
    torch.testing.assert_close(x[1].flatten(), torch.linalg.solve(dense(edges[1], offsets, 1.0, None, "dominant", 3), scores[1].flatten()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
@pytest.mark.parametrize(("labels", "size"), [(1, (4, 5)), (2, (1, 1)), (3, (1, 9)), (200, (3, 4))])
def test_any_number_of_labels_any_size_constant_images_and_any_layout(dtype, labels, size):
    logits = torch.randn(2, *size, labels, generator=torch.Generator().manual_seed(0)).to(dtype).permute(0, 3, 1, 2)
    image = torch.full((2, 3, *size), 9, dtype=torch.uint8)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for crf in (GaussianCRF(neighbours=24), GaussianCRF(labels, 3, terms="features"), GaussianCRF(labels, 3, terms="edges")):
            refined = crf(logits, image)
            assert refined.shape == logits.shape
            assert refined.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
            assert torch.isfinite(refined).all()


def test_images_of_a_batch_do_not_see_each_other():
    logits, image = random(3, 4, 8, 7), 255 * random(3, 3, 8, 7, seed=1).abs()
    crf = GaussianCRF(4, 3, terms="features", labels="full").double()
    together = crf(logits, image)
    for n in range(3):
        torch.testing.assert_close(together[n : n + 1], crf(logits[n : n + 1], image[n : n + 1]))


def test_a_flat_image_has_similarity_one_everywhere():
    assert not _on_own_contrast(torch.full((1, 3, 4, 4), 255.0), neighbourhood(4)).sub(0).any()
    edges = GaussianCRF(weight=1.0).pairwise(torch.full((1, 3, 4, 4), 255.0))
    assert torch.equal(edges[0, 0, :, :3], torch.full((4, 3), -1.0))


def test_options_are_plain_and_rebuild_it():
    import json

    crf = GaussianCRF(3, 2, terms="features", labels="full", compatibility=1 - torch.eye(3), neighbours=8, lam=2.0, learn_lambda=True)
    again = GaussianCRF(**json.loads(json.dumps(crf.options())))
    again.load_state_dict(crf.state_dict())
    logits, image = torch.randn(1, 3, 5, 5), torch.rand(1, 2, 5, 5)
    assert torch.equal(crf(logits, image), again(logits, image))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"terms": "colour"}, "known: colours, features, edges"),
        ({"labels": "full"}, "needs the number of classes"),
        ({"terms": "edges"}, "needs the number of channels"),
        ({"classes": 2, "labels": "blocks"}, 'goes with terms="edges"'),
        ({"weight": -1.0}, "weight is -1.0"),
        ({"lam": 0.0}, "lam is 0.0"),
        ({"neighbours": 9}, "another odd window less one"),
        ({"neighbours": -3}, "another odd window less one"),
        ({"tolerance": 0}, "between 0 and 1"),
        ({"layers": -1}, "0 or more"),
        ({"classes": 2, "compatibility": [[0, 1], [1, 0]]}, 'goes with labels="full"'),
        ({"classes": 2, "labels": "full", "compatibility": [[0, 1], [2, 0]]}, "symmetric"),
        ({"classes": 2, "labels": "full", "compatibility": [[1, 1], [1, 1]]}, "diagonal of 0"),
    ],
)
def test_options_that_are_not_legal_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        GaussianCRF(**options)


def test_input_that_does_not_fit_is_refused():
    logits, image = torch.randn(1, 3, 4, 4), torch.rand(1, 3, 4, 4)
    with pytest.raises(ValueError, match="made for 4 classes and got 3"):
        GaussianCRF(4)(logits, image)
    with pytest.raises(ValueError, match="made for 1 channels and got 3"):
        GaussianCRF(channels=1)(logits, image)
    with pytest.raises(ValueError, match=r"4x4 pixels .* 5x4"):
        GaussianCRF()(logits, torch.rand(1, 3, 5, 4))
    with pytest.raises(ValueError, match="NaN or infinite"):
        GaussianCRF()(logits / 0, image)
    with pytest.raises(ValueError, match="positive semidefinite"):
        gaussian_solve(logits, torch.zeros(1, 2, 4, 4), neighbourhood(4), 1.0, 1 - torch.eye(3))
    with pytest.raises(ValueError, match=r"edges have shape \(1, 3, 4, 4\)"):
        gaussian_solve(logits, torch.zeros(1, 3, 4, 4), neighbourhood(4), 1.0)
    for edges in (torch.zeros(1, 2, 3, 3, 4, 4), torch.zeros(1, 2, 4, 4)):
        with pytest.raises(ValueError, match="blocks go without one"):
            gaussian_solve(logits, edges, neighbourhood(4), 1.0, torch.eye(3 if edges.ndim == 6 else 2))
