"""Markov random field on the pixel grid: neighbours of different labels pay, the more the less the image changes between them.

Source: the energies compared by Szeliski et al. 2008, "A comparative study of energy minimization methods for Markov random fields
with smoothness-based priors"; contrast-sensitive weights in grid_edges.py, each method's source in its own file.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from perpixel.refinement.belief_propagation import min_sum, sum_product, sweeps, synchronous
from perpixel.refinement.compatibility import shortest_paths
from perpixel.refinement.expansion import graph_cut, posed
from perpixel.refinement.grid_edges import STEPS, edge_weights, ends
from perpixel.refinement.icm import icm, neighbour_costs
from perpixel.refinement.lower_bound import lower_bound
from perpixel.refinement.scores import checked

Found = TypeVar("Found")
LABELLING = ("icm", "expansion", "swap")  # methods that end in a labelling, without a gradient
BELIEFS = ("min_sum", "sum_product")
METHODS = (*LABELLING, *BELIEFS)
BELIEF_ITERATIONS = 10
# A labelling method stops by itself; ICM, which compares rounded sums, might in theory go round in a circle.
MOST_ITERATIONS = 1000
# Probabilities below e^-10000 count as that: sums of costs stay far inside float32's range, for scores of any size.
UNARY_LIMIT = 1e4


class GridMRF(nn.Module):
    """Refiner (logits, image) -> logits that finds a labelling x of low energy on the grid of 4 or 8 neighbours.

    E(x) = sum over pixels of -log softmax(logits)[x_p] + sum over neighbours, each pair once, of strength g_pq mu[x_p, x_q],
    g_pq = (floor + exp(-beta |I_p - I_q|^2)) / dist(p, q), where dist is 1, or sqrt(2) on the diagonal.

    What comes back, (N, K, H, W) like the logits, has the labelling as its argmax:
    * "icm", "expansion", "swap": minus what each label would cost the pixel while its neighbours keep the labels found,
      -(U_p(l) + sum over q of V_pq(l, x_q)), with the found label first among equals. Its softmax is no marginal. They have no gradient.
      "icm" runs where the tensors are; "expansion" and "swap" run on the CPU, an image per thread.
    * "min_sum": minus the min-marginals that loopy belief propagation came to; "sum_product": the logarithms of the marginals.
      Both run where the tensors are, in about ten times the memory of the logits, and have gradients with respect to logits, image,
      `strength` and `compatibility`.
    With zero iterations or strength 0 the scores come back as log_softmax(logits).

    Which to take: "expansion" has a guarantee (for Potts costs at most twice the lowest energy, in practice about one hundredth above)
    and is exact for two labels; "swap" takes any label costs; "icm" is quick and poor; "sum_product" where probabilities are wanted;
    the last two where the rest is to be trained through it. `energy` and `lower_bound` say how good a labelling is. Lower energy is not
    always a better labelling: tune `strength` on images set aside (0.1 to 30). Short-range fields shrink thin structures.

    Args:
        strength: of all pairwise costs, at least 0, in nats per edge.
        beta: of the contrast, on the scale of the image's squared differences summed over bands; None takes 1 / (2 mean) of each image;
            0 is plain Potts (every edge weighs floor + 1).
        floor: what an edge weighs across the sharpest border, at least 0.
        neighbours: 4 or 8.
        compatibility: mu, (K, K) label costs, at least 0, symmetric with zero diagonal; None is Potts, 1 between any two labels.
        method: one of `METHODS`.
        iterations: of belief propagation (None: 10), sweeps of ICM, or cycles through all labels or pairs (None: until nothing falls).
        damping: of belief propagation: share of its old value that a message keeps, 0 <= damping < 1; None is 0.5 where all are renewed
            at once, which swings without, and 0 in sweeps.
        schedule: of belief propagation: "sweeps" passes messages along all columns and rows in turn (4 neighbours only, goes further per
            iteration); "synchronous" renews all at once; None takes sweeps where it can.
        repair_metric: lets "expansion" put the metric closure (shortest paths) in place of label costs that break the triangle
            inequality, which it refuses otherwise. `energy` and `lower_bound` then use the closure too.
        trainable: whether `strength` and `compatibility` want gradients; needs belief propagation. Entries that training takes below zero
            count as zero, costs as the mean of both orders, the diagonal as zero.

    Raises:
        ValueError: if an option is not as said.
    """

    def __init__(
        self,
        strength: float = 1.0,
        beta: float | None = None,
        floor: float = 0.0,
        neighbours: int = 4,
        compatibility: Tensor | Sequence[Sequence[float]] | None = None,
        method: str = "expansion",
        iterations: int | None = None,
        damping: float | None = None,
        schedule: str | None = None,
        repair_metric: bool = False,
        trainable: bool = False,
    ) -> None:
        super().__init__()
        if method not in METHODS:
            raise ValueError(f"method is {method!r}; known: {', '.join(METHODS)}")
        if neighbours not in STEPS:
            raise ValueError(f"neighbours is {neighbours!r}; a pixel has 4 or 8")
        for name, value in (
            ("strength", strength),
            ("floor", floor),
            ("beta", 0 if beta is None else beta),
            ("iterations", iterations or 0),
        ):
            if not 0 <= value < float("inf"):
                raise ValueError(f"{name} is {value}; it must be finite and at least 0")
        if iterations is not None and not isinstance(iterations, int):
            raise ValueError(f"iterations is {iterations!r}; it is a whole number, 0 or more, or None")
        if damping is not None and not 0 <= damping < 1:
            raise ValueError(f"damping is {damping}; messages change only if it is at least 0 and below 1")
        if schedule not in (None, "sweeps", "synchronous") or (schedule == "sweeps" and neighbours == 8):
            raise ValueError(
                f"schedule is {schedule!r} with {neighbours} neighbours; take 'synchronous', or with 4 neighbours 'sweeps', or None"
            )
        if trainable and method in LABELLING:
            raise ValueError(f"method {method!r} has no gradient to train by; take one of {', '.join(BELIEFS)}, or trainable=False")
        self.beta, self.floor, self.neighbours, self.method, self.iterations = beta, floor, neighbours, method, iterations
        self.damping, self.schedule, self.repair_metric, self.trainable = damping, schedule, repair_metric, trainable
        self.strength = nn.Parameter(torch.tensor(float(strength)), requires_grad=trainable)
        self.compatibility: nn.Parameter | None = None
        if compatibility is not None:
            costs = _checked_costs(compatibility)
            self._as_needed(costs)
            self.compatibility = nn.Parameter(costs, requires_grad=trainable)

    def options(self) -> dict[str, float | int | str | bool | list[list[float]] | None]:
        """The arguments that build this module again, in plain types; what is trained keeps its present values, as they count."""
        names = ("beta", "floor", "neighbours", "method", "iterations", "damping", "schedule", "repair_metric", "trainable")
        costs = None if self.compatibility is None else _legal(self.compatibility.detach()).tolist()
        learned = {"strength": max(self.strength.item(), 0.0), "compatibility": costs}
        return {**learned, **{name: getattr(self, name) for name in names}}

    def forward(self, logits: Tensor, image: Tensor) -> Tensor:
        """Refined scores.

        Args:
            logits: (N, K, H, W) float scores before softmax.
            image: (N, C, H, W), any real type, on the scale of its file, not normalised.

        Returns:
            (N, K, H, W), in the logits' type (float32 or float64) and on their device; see the class for what they mean.

        Raises:
            ValueError: if `checked` refuses the input, label costs are for another number of labels, or gradients are asked of a method
                that has none.
        """
        unary, weights, costs = self._energy_of(logits, image)
        if self.method in BELIEFS:
            return self._beliefs(unary, weights, costs)
        table = _potts(unary) if costs is None else costs
        if any(x.requires_grad for x in (unary, table, *weights)):
            raise ValueError(
                f"method {self.method!r} has no gradient and its input asks for one; use torch.no_grad(), or one of {', '.join(BELIEFS)}"
            )
        if self.iterations == 0:
            return -unary
        if self.method == "icm":
            labels = icm(unary, weights, table, self._most())
        else:
            swaps, most = self.method == "swap", self._most()
            found = _each_image(lambda u, edges, table: graph_cut(u, edges, table, most, swaps), unary, weights, table)
            labels = torch.from_numpy(np.stack(found)).to(unary.device)
        scores = -(unary + neighbour_costs(labels, weights, table))
        # The label found may tie with others, or be no longer the best where iterations ran out: it must be the argmax all the same.
        others = scores.scatter(1, labels[:, None], -torch.inf).amax(1, keepdim=True)
        own = scores.gather(1, labels[:, None])
        just_above = torch.nextafter(others, torch.full_like(others, torch.inf))
        return scores.scatter(1, labels[:, None], torch.where(own > others, own, just_above))

    def energy(self, logits: Tensor, image: Tensor, labels: Tensor) -> Tensor:
        """(N,) float64: E of each image's labelling.

        Args:
            logits, image: as for `forward`.
            labels: (N, H, W) integers 0..K-1.

        Raises:
            ValueError: as `forward`, or if labels have another shape or a value that is no class.
        """
        with torch.no_grad():
            unary, weights, costs = self._energy_of(logits, image)
            batch, classes, height, width = unary.shape
            if labels.shape != (batch, height, width):
                raise ValueError(f"labels are {tuple(labels.shape)} for scores {tuple(unary.shape)}; give {(batch, height, width)}")
            labels = labels.to(unary.device).long()
            if labels.min() < 0 or labels.max() >= classes:
                raise ValueError(
                    f"labels run from {int(labels.min())} to {int(labels.max())}; with {classes} classes 0..{classes - 1} are legal"
                )
            table = _potts(unary) if costs is None else costs
            total = unary.gather(1, labels[:, None]).double().sum((1, 2, 3))
            for step, weight in zip(STEPS[self.neighbours], weights, strict=True):
                first, second = ends(labels, step)
                total += (weight[:, 0] * table[first, second]).double().sum((1, 2))
            return total

    def lower_bound(self, logits: Tensor, image: Tensor, iterations: int = 30) -> Tensor:
        """(N,) float64: what no labelling of each image costs less than, on the CPU; `energy` minus it bounds what is left to gain.

        Args:
            logits, image: as for `forward`.
            iterations: at least 1; the bound rises with them.
        """
        if iterations < 1:
            raise ValueError(f"iterations is {iterations}; a bound takes at least 1")
        with torch.no_grad():
            unary, weights, costs = self._energy_of(logits, image)
            table = _potts(unary) if costs is None else costs
            found = _each_image(
                lambda u, edges, table: lower_bound(posed(u, edges, table), costs is None, iterations), unary, weights, table
            )
            return torch.tensor(found, dtype=torch.float64, device=unary.device)

    def _energy_of(self, logits: Tensor, image: Tensor) -> tuple[Tensor, list[Tensor], Tensor | None]:
        """Costs of labels (N, K, H, W), weights of edges with the strength in them, and label costs (K, K), or None for Potts."""
        logits, image = checked(logits, image)
        unary = -torch.log_softmax(logits, 1).clamp(min=-UNARY_LIMIT)
        strength = self.strength.to(logits).clamp(min=0)
        weights = [strength * weight for weight in edge_weights(image, self.neighbours, self.beta, self.floor)]
        if self.compatibility is None:
            return unary, weights, None
        classes = len(self.compatibility)
        if classes != logits.shape[1]:
            raise ValueError(f"label costs are {classes}x{classes} and the scores have {logits.shape[1]} classes; they must be as many")
        return unary, weights, self._as_needed(_legal(self.compatibility.to(logits)))

    def _as_needed(self, costs: Tensor) -> Tensor:
        """Label costs that the method can work with: for expansion a metric, or ValueError."""
        if self.method != "expansion":
            return costs
        exact = costs.detach().cpu().double()
        closed = shortest_paths(exact)
        excess = exact - closed
        if excess.max() <= 1e-6 * closed.max():
            return costs
        if self.repair_metric:
            return closed.to(costs)
        a, b = divmod(int(excess.argmax()), len(excess))
        raise ValueError(
            f"label costs are no metric: {costs[a, b]:.4g} between labels {a} and {b}, but {closed[a, b]:.4g} by way of others, and "
            "expansion needs the triangle inequality; take method='swap', or repair_metric=True for the largest metric below these costs"
        )

    def _beliefs(self, unary: Tensor, weights: list[Tensor], costs: Tensor | None) -> Tensor:
        send = (min_sum if self.method == "min_sum" else sum_product)(costs)
        swept = self.neighbours == 4 and self.schedule != "synchronous"
        damping = (0.0 if swept else 0.5) if self.damping is None else self.damping
        count = BELIEF_ITERATIONS if self.iterations is None else self.iterations
        scores = -(sweeps if swept else synchronous)(unary, weights, send, count, damping)
        return scores if self.method == "min_sum" else torch.log_softmax(scores, 1)

    def _most(self) -> int:
        return MOST_ITERATIONS if self.iterations is None else self.iterations


def _potts(unary: Tensor) -> Tensor:
    classes = unary.shape[1]
    return 1 - torch.eye(classes, dtype=unary.dtype, device=unary.device)


def _legal(costs: Tensor) -> Tensor:
    """(K, K) trained label costs as they count: not negative, symmetric, 0 on the diagonal."""
    costs = costs.clamp(min=0)
    costs = (costs + costs.T) / 2
    return costs - costs.diag().diag()


def _checked_costs(compatibility: Tensor | Sequence[Sequence[float]]) -> Tensor:
    """(K, K) float32 label costs."""
    costs = torch.as_tensor(compatibility).detach().float()
    if costs.ndim != 2 or costs.shape[0] != costs.shape[1] or not len(costs):
        raise ValueError(f"compatibility has shape {tuple(costs.shape)}; label costs are K rows of K")
    if not torch.isfinite(costs).all() or (costs < 0).any() or costs.diag().any():
        raise ValueError(
            "compatibility has entries that are negative, not finite, or not 0 on the diagonal; a label costs nothing beside itself"
        )
    if not torch.allclose(costs, costs.T):
        raise ValueError("compatibility is not symmetric, and neighbours on a grid have no order; give (costs + costs.T) / 2")
    return costs.clone()


def _each_image(
    solve: Callable[[np.ndarray, list[np.ndarray], np.ndarray], Found], unary: Tensor, weights: list[Tensor], costs: Tensor
) -> list[Found]:
    """What `solve` makes of the costs of labels, weights and label costs of each image by itself, an image per thread."""
    labels, edges, table = unary.cpu().numpy(), [weight[:, 0].cpu().numpy() for weight in weights], costs.cpu().numpy()
    with ThreadPoolExecutor(min(len(labels), torch.get_num_threads())) as pool:
        return list(pool.map(lambda n: solve(labels[n], [edge[n] for edge in edges], table), range(len(labels))))
