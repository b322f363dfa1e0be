"""Gaussian CRF: real scores whose neighbours pull at each other, and whose most probable values are found exactly.

Sources: Chandra & Kokkinos 2016, arXiv:1603.08358 (the system, its derivatives, a branch of the network for the edges; the released layer
is siddharthachandra/gcrf); Vemulapalli et al. 2016, CVPR, "Gaussian Conditional Random Field Network for Semantic Segmentation" (edges
from features, which keep the system positive definite).
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from perpixel.refinement.gaussian_solver import DIAGONALS, Offset, SolveReport, ends, gaussian_solve, neighbourhood
from perpixel.refinement.scores import checked

TERMS = ("colours", "features", "edges")
LABELS = ("potts", "full", "blocks")


class GaussianCRF(nn.Module):
    """Scores x that minimise 1/2 lambda |x|^2 + the edges' part - b^T x, where b are the logits less their mean over the labels.

    The logits returned are lambda x, on the scale of those that came: with weight 0, or before training a branch, they are the same
    but for a term common to all labels of a pixel. As the system is linear there is one answer, no local optimum, and nothing to anneal.

    With the defaults it smooths scores along the image's colours, untrained. With terms="edges", labels="potts", diagonal="constant",
    lam=10, layers=2 it is the released layer of Chandra & Kokkinos; with terms="features", labels="full" Vemulapalli et al.'s model,
    solved exactly instead of by five mean-field steps, on all pixels of a window instead of alternate columns, and with nearer
    neighbours weighing more (1 / distance, as in Boykov & Jolly 2001).

    Args:
        classes: K; needed where labels is not "potts". None takes any number.
        channels: C of the image; needed where terms is not "colours". None takes any number, with one bandwidth for all colours.
        terms: where the edges come from. "colours": similarity s = exp(-(z_p - z_q)^T F (z_p - z_q)) of the image itself, on the scale of
            its own mean contrast (z = I / sqrt(2 <|I_p - I_q|^2>), Boykov & Jolly 2001), so that 8 and 16 bits behave alike; F is
            learned. "features": the same of features from a branch of convolutions over the image, to be trained. "edges": the branch
            gives the weight of every edge itself, of either sign; it starts at 0 and must be trained.
        labels: what an edge does to a pair of labels. "potts": draws scores of the same label together, one system a label. "full": one
            (K, K) matrix for all edges, learned: positive semidefinite, or with a constant diagonal symmetric. "blocks": terms="edges"
            only, a (K, K) block for every edge; K^2 times the memory.
        compatibility: (K, K) label costs, symmetric, from which the matrix starts where labels="full"; None is Potts. The cost of a
            border between pure labels l and l' is then what mu[l, l'] says (as near as a semidefinite matrix can come).
        weight: of the edges, 0 or more; learned.
        sharpness: how fast similarity falls with contrast, more than 0; F starts as this times the identity.
        lam: lambda, more than 0: what holds a score at its logit. Only weight / lambda matters for a single untrained layer.
        learn_lambda: whether lambda is trained.
        diagonal: "dominant" adds to lambda the sum of a pixel's edges, so that the system is positive definite whatever is learned;
            "constant" leaves lambda alone, as released, which may fail: see `on_failure`.
        neighbours: 4, or 8, 24, 48, ...: all pixels of a 3x3, 5x5, 7x7 window.
        layers: times the system is solved, each on the scores of the one before with the same edges.
        width: channels of the branch.
        tolerance, iterations, on_failure: of conjugate gradient, see `gaussian_solve`. "unary" warns and returns the scores of an image
            that does not converge as they came, "error" raises RuntimeError.

    `refine` also says how many iterations were taken and what was left. Trained end to end, gradients come from one more solve, not from
    the iterations. The processor's solver starts a thread for each that torch may use.

    Raises:
        ValueError: if an argument is out of range or does not go with another.
    """

    def __init__(
        self,
        classes: int | None = None,
        channels: int | None = None,
        *,
        terms: str = "colours",
        labels: str = "potts",
        compatibility: Tensor | Sequence[Sequence[float]] | None = None,
        weight: float = 4.0,
        sharpness: float = 1.0,
        lam: float = 1.0,
        learn_lambda: bool = False,
        diagonal: str = "dominant",
        neighbours: int = 4,
        layers: int = 1,
        width: int = 16,
        tolerance: float = 1e-5,
        iterations: int = 1000,
        on_failure: str = "unary",
    ) -> None:
        super().__init__()
        costs = None if compatibility is None else torch.as_tensor(compatibility, dtype=torch.float64).detach().cpu()
        self._options: dict[str, Any] = {
            "classes": classes,
            "channels": channels,
            "terms": terms,
            "labels": labels,
            "compatibility": None if costs is None else costs.tolist(),
            "weight": weight,
            "sharpness": sharpness,
            "lam": lam,
            "learn_lambda": learn_lambda,
            "diagonal": diagonal,
            "neighbours": neighbours,
            "layers": layers,
            "width": width,
            "tolerance": tolerance,
            "iterations": iterations,
            "on_failure": on_failure,
        }
        _check_choices(self._options, costs)
        self.classes, self.channels, self.terms, self.labels, self.diagonal = classes, channels, terms, labels, diagonal
        self.layers, self.tolerance, self.iterations, self.on_failure = layers, tolerance, iterations, on_failure
        self.offsets = neighbourhood(neighbours)
        # As roots and logarithms, so that training keeps the weight from below 0 and lambda above it.
        self.root_weight = nn.Parameter(torch.tensor(weight**0.5))
        self.log_lambda = nn.Parameter(torch.tensor(lam).log(), requires_grad=learn_lambda)
        self.branch: nn.Module | None = None
        if terms != "colours":
            outputs = width if terms == "features" else 2 * len(self.offsets) * (classes**2 if labels == "blocks" and classes else 1)
            self.branch = Branch(channels or 0, width, outputs, zero=terms == "edges")
        if terms != "edges":
            size = width if terms == "features" else channels
            root = torch.tensor(sharpness**0.5)
            self.root_f = nn.Parameter(root if size is None else root * torch.eye(size))
        if labels == "full" and classes:
            start = torch.eye(classes) if costs is None else label_matrix(costs)
            # A dominant diagonal asks for a semidefinite matrix, root @ root.T; else any symmetric one will do.
            self.label_root = nn.Parameter(_root(start) if diagonal == "dominant" else start.float())

    def forward(self, logits: Tensor, image: Tensor) -> Tensor:
        """Refined logits; arguments as in `refine`."""
        return self.refine(logits, image)[0]

    def refine(self, logits: Tensor, image: Tensor) -> tuple[Tensor, list[SolveReport]]:
        """Refined logits, and how solving went.

        Args:
            logits: (N, K, H, W).
            image: (N, C, H, W) on the scale of its file.

        Returns:
            (N, K, H, W) float32, or float64 where the logits are; and a report for each layer.

        Raises:
            ValueError: as `checked` does, or if classes or channels are not those of the constructor.
            RuntimeError: with on_failure="error", where an image does not converge.
        """
        logits, image = checked(logits, image)
        for name, expected, found in (("classes", self.classes, logits.shape[1]), ("channels", self.channels, image.shape[1])):
            if expected is not None and expected != found:
                raise ValueError(f"this GaussianCRF was made for {expected} {name} and got {found}")
        # Half precision is too coarse for the system, also where the network runs in it.
        with torch.autocast(logits.device.type, enabled=False):
            edges = self.pairwise(image).to(logits.dtype)
            matrix = self.matrix()
            lam = self.log_lambda.exp().to(logits.dtype)
            scores, reports = logits - logits.mean(1, keepdim=True), []
            # The system is linear; squares of scores beyond 1e19 would not fit into float32.
            largest = scores.detach().abs().amax((1, 2, 3), keepdim=True)
            unit = torch.where(largest > 1e9, largest, 1.0)
            scores = scores / unit
            for _ in range(self.layers if self.iterations else 0):
                solved, report = gaussian_solve(
                    scores,
                    edges,
                    self.offsets,
                    lam,
                    None if matrix is None else matrix.to(logits.dtype),
                    diagonal=self.diagonal,
                    tolerance=self.tolerance,
                    iterations=self.iterations,
                    on_failure=self.on_failure,
                )
                scores = lam * solved
                reports.append(report)
        return scores * unit, reports

    def pairwise(self, image: Tensor) -> Tensor:
        """(N, D, H, W) weights of the edges of (N, C, H, W) images, or (N, D, K, K, H, W) blocks; negative draws scores together."""
        if self.terms == "edges" and self.branch is not None:
            maps = self.branch(image)
            if self.labels == "blocks":
                maps = maps.unflatten(1, (2 * len(self.offsets), self.classes, self.classes))
            # A convolution over the two ends of an edge, as in the released layer, is a product with each.
            near, far = maps.chunk(2, dim=1)
            return -(self.root_weight**2) * _sum_of_ends(near, far, self.offsets)
        z = self.branch(image) if self.branch is not None else _on_own_contrast(image, self.offsets)
        z = self.root_f * z if self.root_f.ndim == 0 else torch.einsum("fc,nchw->nfhw", self.root_f.to(z.dtype), z)
        return -(self.root_weight**2) * _similarity(z, self.offsets)

    def matrix(self) -> Tensor | None:
        """(K, K): what an edge does to pairs of labels; None is the identity."""
        if self.labels != "full":
            return None
        if self.diagonal == "dominant":
            return self.label_root @ self.label_root.T
        return (self.label_root + self.label_root.T) / 2

    def options(self) -> dict[str, Any]:
        """The arguments that build this module again, in plain types, with the present weight, lambda and common sharpness.

        What else was learned, matrices and the branch, is in the state dict.
        """
        present = {"weight": self.root_weight.item() ** 2, "lam": self.log_lambda.exp().item()}
        if self.terms != "edges" and self.root_f.ndim == 0:
            present["sharpness"] = self.root_f.item() ** 2
        return {**self._options, **{key: float(f"{value:.6g}") for key, value in present.items()}}


class Branch(nn.Module):
    """Four convolutions over the image that see 15x15 pixels; the image is brought to mean 0 and deviation 1 by itself, band by band.

    Chandra & Kokkinos use a second ResNet-101 here; any module from (N, C, H, W) images to as many maps may take this one's place.

    Args:
        channels: of the image.
        width: of the maps between.
        outputs: maps given.
        zero: start with maps that are 0, so that an untrained branch changes nothing.
    """

    def __init__(self, channels: int, width: int, outputs: int, *, zero: bool) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for dilation, size in ((1, channels), (2, width), (4, width)):
            layers += [nn.Conv2d(size, width, 3, padding=dilation, dilation=dilation, padding_mode="replicate"), nn.ReLU()]
        self.layers = nn.Sequential(*layers)
        self.head = nn.Conv2d(width, outputs, 1)
        if zero:
            nn.init.zeros_(self.head.weight)
            nn.init.zeros_(self.head.bias)  # type: ignore[arg-type]

    def forward(self, image: Tensor) -> Tensor:
        """(N, outputs, H, W) in the precision of the weights."""
        image = image.to(self.head.weight.dtype)
        centred = image - image.mean((2, 3), keepdim=True)
        deviation = centred.square().mean((2, 3), keepdim=True).sqrt()
        # A flat band says nothing; rounding may leave it a deviation of some 1e-7 of its values.
        flat = deviation <= 1e-6 * image.abs().amax((2, 3), keepdim=True)
        return self.head(self.layers(torch.where(flat, 0.0, centred / torch.where(flat, 1.0, deviation))))


def label_matrix(costs: Tensor) -> Tensor:
    """The positive semidefinite C nearest to label costs: where pure labels l and l' meet, (e_l - e_l')^T C (e_l - e_l') = 2 mu[l, l'].

    That holds exactly where the roots of the costs are distances in space, as Potts' are; else the negative eigenvalues are dropped.

    Args:
        costs: (K, K), symmetric, diagonal 0.

    Returns:
        (K, K) float64. Potts' costs give the identity less its mean, which does to centred scores what the identity does.

    Source: classical scaling, Torgerson 1952, Psychometrika 17(4), equation 12 onwards (costs in the place of squared distances).
    """
    size = len(costs)
    centre = torch.eye(size, dtype=torch.float64) - 1 / size
    values, vectors = torch.linalg.eigh(-centre @ costs.double() @ centre)
    return (vectors * values.clamp_min(0)) @ vectors.T


def _root(matrix: Tensor) -> Tensor:
    """The symmetric root of a semidefinite matrix, float32."""
    values, vectors = torch.linalg.eigh(matrix.double())
    return ((vectors * values.clamp_min(0).sqrt()) @ vectors.T).float()


def _differences(z: Tensor, offset: Offset) -> Tensor:
    """(N, F, h, w): z at the far end of each edge less z at the near one."""
    here, there = ends(offset, z.shape[-2:])
    return z[there] - z[here]


def _on_own_contrast(image: Tensor, offsets: tuple[Offset, ...]) -> Tensor:
    """The image divided by sqrt(2 <|I_p - I_q|^2>), the mean over its edges; a flat image becomes 0."""
    squares = [_differences(image, offset).square().sum(1).flatten(1) for offset in offsets]
    contrast = torch.cat(squares, 1)
    mean = contrast.sum(1) / max(contrast.shape[1], 1)
    scale = torch.where(mean > 0, (2 * mean).clamp_min(torch.finfo(mean.dtype).tiny).rsqrt(), 0.0)
    return image * scale.view(-1, 1, 1, 1)


def _similarity(z: Tensor, offsets: tuple[Offset, ...]) -> Tensor:
    """(N, D, H, W): exp(-|z_p - z_q|^2) / distance; 0 where an edge leads out of the image."""
    maps = []
    for offset in offsets:
        plane = torch.zeros_like(z[:, :1])
        near = torch.exp(-_differences(z, offset).square().sum(1, keepdim=True))
        plane[ends(offset, z.shape[-2:])[0]] = near / (offset[0] ** 2 + offset[1] ** 2) ** 0.5
        maps.append(plane)
    return torch.cat(maps, 1)


def _sum_of_ends(near: Tensor, far: Tensor, offsets: tuple[Offset, ...]) -> Tensor:
    """The first maps where each edge starts plus the second ones where it ends; (N, D, ..., H, W) all."""
    total = near.clone()
    for d, offset in enumerate(offsets):
        here, there = ends(offset, near.shape[-2:])
        (_, _, *start), (_, _, *end) = here, there
        total[(slice(None), d, ..., *start)] += far[(slice(None), d, ..., *end)]
    return total


def _check_choices(options: dict[str, Any], costs: Tensor | None) -> None:
    """ValueError where an option is out of range or does not go with another; the solver's own are checked by it on use."""
    for name, known in (("terms", TERMS), ("labels", LABELS), ("diagonal", DIAGONALS), ("on_failure", ("unary", "error"))):
        if options[name] not in known:
            raise ValueError(f"{name} is {options[name]!r}; known: {', '.join(known)}")
    for name, least in (("classes", 1), ("channels", 1), ("layers", 0), ("width", 1), ("iterations", 0)):
        if options[name] is not None and (not isinstance(options[name], int) or options[name] < least):
            raise ValueError(f"{name} is {options[name]!r}; it must be a whole number, {least} or more")
    for name in ("weight", "sharpness", "lam"):
        if not (0 < options[name] < float("inf") or (name == "weight" and options[name] == 0)):
            raise ValueError(f"{name} is {options[name]}; it must be finite and more than 0 (a weight of 0 changes nothing)")
    if not 0 < options["tolerance"] < 1:
        raise ValueError(f"tolerance is {options['tolerance']}; it lies between 0 and 1")
    terms, labels, classes = options["terms"], options["labels"], options["classes"]
    if labels != "potts" and classes is None:
        raise ValueError(f'labels="{labels}" needs the number of classes, for a matrix of (classes, classes)')
    if terms != "colours" and options["channels"] is None:
        raise ValueError(f'terms="{terms}" needs the number of channels of the image, for the branch over it')
    if labels == "blocks" and terms != "edges":
        raise ValueError('labels="blocks" goes with terms="edges": similarities of features are one number an edge')
    if costs is None:
        return
    if labels != "full" or costs.shape != (classes, classes):
        raise ValueError(
            f'compatibility of shape {tuple(costs.shape)}: it goes with labels="full" and is (classes, classes) = ({classes}, {classes})'
        )
    if (
        not bool(torch.isfinite(costs).all())
        or bool((costs < 0).any())
        or bool(costs.diagonal().any())
        or not torch.allclose(costs, costs.T)
    ):
        raise ValueError("compatibility must be finite, not negative and symmetric, with a diagonal of 0: a Gaussian CRF has no direction")
