"""Dense CRF: every pixel talks to every other, the more the closer and the more alike they are.

Sources: Krähenbühl & Koltun 2011, arXiv:1210.5644 (energy and mean field); Zheng et al., "Conditional Random Fields as Recurrent Neural
Networks", ICCV 2015, arXiv:1502.03240 (`crf_as_rnn`).
"""

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from perpixel.refinement.mean_field import Pairwise, free_energy, mean_field
from perpixel.refinement.permutohedral import NORMALISATIONS, GaussianFilter
from perpixel.refinement.scores import checked

# Weights and bandwidths with which DeepLab v2 was released, searched on network scores of PASCAL VOC (run_densecrf.sh: bi_w 4, bi_xy 49,
# bi_rgb 5, pos_w 3, pos_xy 3) for a library that normalises after filtering.
NETWORK_SCORES: tuple[dict[str, float], ...] = ({"xy": 49.0, "colour": 5.0, "weight": 4.0}, {"xy": 3.0, "weight": 3.0})
BANDWIDTHS = ("xy", "colour", "features")
TRAINABLE = ("weights", "compatibility", "bandwidths")
ENGINES = ("auto", "cpu", "torch")


class DenseCRF(nn.Module):
    """Fully connected CRF with any number of Gaussian kernels, solved by mean field.

    The energy of a labelling x is sum_i U_i(x_i) + sum_{i<j} sum_m w_m mu(x_i, x_j) k_m(i, j), where U = -log softmax(logits),
    k_m(i, j) = exp(-|f_i - f_j|^2 / 2) and f holds what kernel m looks at, each divided by its bandwidth: position, colour, any other
    feature. `softmax` of the output is the marginals, `argmax` the labelling.

    The defaults are made for scores of networks: DeepLab v2's kernels, each pixel's message an average over the image
    (`normalisation="after"`). For scribbles, as in pydensecrf's examples, take
    `kernels=[{"xy": 80, "colour": 13, "weight": 10}, {"xy": 3, "weight": 3}], normalisation="symmetric"`.

    Gradients reach the logits, the extra features, and what `trainable` names. Those of bandwidths and features are of the lattice's
    weights, with the simplex of each pixel held fixed; they are exact for what is computed, and jump where a pixel changes its simplex.
    (Whole-numbered bandwidths of positions put pixels on such borders; 3.1 is better to train from than 3.)
    Training keeps two (H * W, K) arrays per kernel and iteration.

    Args:
        kernels: one mapping per kernel. `"xy"`: bandwidth in pixels, a number or [x, y]; `"colour"`: on the image's own scale (0..255 where
            it has 8 bits), a number or one per band; `"features"`: of the extra channels given to the call, a number or one per channel. At
            least one of the three; what is absent is not looked at. `"weight"`: a number or one per class; a negative one drives alike
            pixels apart.
        normalisation: "none", "before", "after" or "symmetric"; see `GaussianFilter`.
        compatibility: None for Potts (1 for every pair of different labels); (K, K) costs mu[l, l'] >= 0 of label l beside label l', with a
            zero diagonal, symmetric or not; or (K,) rewards of like labels (Potts has ones).
        iterations: of mean field.
        training_iterations: while the module is in training mode; None for the same number.
        damping: in (0, 1]; new marginals are damping * updated + (1 - damping) * old. Below 1 it calms oscillations.
        tolerance: stop when no marginal of an image moved by as much; 0 never stops early.
        engine: "cpu" is the fast one, for inference in float32 without gradients; "torch" runs on any device, with gradients, in float64
            too; "auto" takes the first where it can. Their marginals agree to 1e-4; logarithms of very small ones do not, as the first
            stops them at 1e-30.
        fast: the CPU engine works on every second pixel in early iterations, which changes 1 to 8 labels in 1,000; on two threads it takes
            from a quarter less to a third more time than the exact mode (docs/results.md). The torch engine has no such mode and gives
            the exact result. Not together with damping or tolerance.
        trainable: names from "weights", "compatibility", "bandwidths": these become parameters; the others are buffers.

    Raises:
        ValueError: if an argument is out of range, or lengths do not fit the classes, bands or features of a call.
    """

    compatibility: Tensor | None

    def __init__(
        self,
        kernels: Sequence[Mapping[str, Any]] = NETWORK_SCORES,
        normalisation: str = "after",
        compatibility: Sequence[Any] | Tensor | None = None,
        iterations: int = 10,
        training_iterations: int | None = None,
        damping: float = 1.0,
        tolerance: float = 0.0,
        engine: str = "auto",
        fast: bool = False,
        trainable: Sequence[str] = (),
    ) -> None:
        super().__init__()
        _one_of("normalisation", normalisation, NORMALISATIONS)
        _one_of("engine", engine, ENGINES)
        for name in trainable:
            _one_of("trainable", name, TRAINABLE)
        for name, count in (("iterations", iterations), ("training_iterations", training_iterations)):
            if count is not None and (not isinstance(count, int) or count < 0):
                raise ValueError(f"{name}={count!r}; a number of iterations is a whole number, 0 or more")
        if not 0 < damping <= 1:
            raise ValueError(f"damping={damping}; it lies in (0, 1], where 1 takes every update in full")
        if not tolerance >= 0:
            raise ValueError(f"tolerance={tolerance}; it is a change of probability, 0 or more")
        if fast and (damping != 1 or tolerance > 0):
            raise ValueError("fast skips pixels in early iterations, so their changes say nothing; use it without damping and tolerance")
        if compatibility is None and "compatibility" in trainable:
            raise ValueError("compatibility is to be trained and is None; give its (K, K) costs to start from, such as 1 - torch.eye(K)")
        self.normalisation, self.iterations, self.training_iterations = normalisation, int(iterations), training_iterations
        self.damping, self.tolerance, self.engine, self.fast = float(damping), float(tolerance), engine, bool(fast)
        self.trainable = tuple(trainable)
        self.kernels = nn.ModuleList(_Kernel(kernel, self.trainable) for kernel in kernels)
        costs = None if compatibility is None else _costs(compatibility, trained="compatibility" in trainable)
        _hold(self, "compatibility", costs, "compatibility" in trainable)

    def forward(self, logits: Tensor, image: Tensor, features: Tensor | None = None) -> Tensor:
        """Refine scores.

        Args:
            logits: (N, K, H, W) scores before softmax, float32 or float64 (half precision is computed in float32).
            image: (N, C, H, W), any real type, on the scale of its file.
            features: (N, F, H, W) of any meaning, where a kernel has a bandwidth for them: depth, a network's maps.

        Returns:
            (N, K, H, W) logarithms of the marginals.

        Raises:
            ValueError: if sizes do not fit, values are not finite, or the CPU engine was demanded and gradients or float64 are needed.
        """
        with torch.autocast(logits.device.type, enabled=False):
            logits, image, features = self._checked(logits, image, features)
            if self._engine(logits, image, features) == "cpu":
                return self._on_cpu(logits, image, features)
            steps = self._steps(logits, image, features)[0]
            log_q = deque(steps, maxlen=1)[0]  # none before the last is kept
            return log_q.view(logits.shape[0], -1, logits.shape[1]).transpose(1, 2).reshape(logits.shape)

    @torch.no_grad()
    def kl_divergence(self, logits: Tensor, image: Tensor, features: Tensor | None = None) -> Tensor:
        """(N, iterations + 1) KL divergences of the marginals from the model, at the start and after every iteration; fewer where
        `tolerance` stops it.

        They lack the constant log Z (which nobody can compute), so that only differences mean anything. Arguments as in a call. They
        fall as a rule; where they rise, as updating all pixels at once may make them, a `damping` below 1 helps.
        """
        with torch.autocast(logits.device.type, enabled=False):
            logits, image, features = self._checked(logits, image, features)
            steps, unary, pairwise = self._steps(logits, image, features)
            return torch.stack([free_energy(log_q, unary, pairwise, logits.shape[0]) for log_q in steps], 1)

    def options(self) -> dict[str, Any]:
        """The arguments that build this module again, in plain types; what is trained keeps its present values."""
        return {
            "kernels": [kernel.options() for kernel in self._kernels()],
            "normalisation": self.normalisation,
            "compatibility": None if self.compatibility is None else self.compatibility.tolist(),
            "iterations": self.iterations,
            "training_iterations": self.training_iterations,
            "damping": self.damping,
            "tolerance": self.tolerance,
            "engine": self.engine,
            "fast": self.fast,
            "trainable": list(self.trainable),
        }

    def _kernels(self) -> list["_Kernel"]:
        return list(self.kernels)  # type: ignore[arg-type]

    def _rounds(self) -> int:
        return self.training_iterations if self.training and self.training_iterations is not None else self.iterations

    def _checked(self, logits: Tensor, image: Tensor, features: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        logits, image = checked(logits, image)
        classes = logits.shape[1]
        if self.compatibility is not None and len(self.compatibility) != classes:
            raise ValueError(f"compatibility is of {len(self.compatibility)} classes and the scores of {classes}")
        for kernel in self._kernels():
            if kernel.weight.ndim and len(kernel.weight) != classes:
                raise ValueError(f"a kernel has {len(kernel.weight)} weights and the scores {classes} classes")
        if features is not None:
            try:
                features = checked(logits, features)[1]
            except ValueError as error:
                raise ValueError(f"features, which follow the rules for images: {error}") from None
        return logits, image, features

    def _engine(self, logits: Tensor, image: Tensor, features: Tensor | None) -> str:
        inputs = [logits, image, *([] if features is None else [features]), *self.parameters()]
        gradients = torch.is_grad_enabled() and any(x.requires_grad for x in inputs)
        if self.engine == "auto":
            return "torch" if gradients or logits.dtype != torch.float32 or logits.device.type != "cpu" else "cpu"
        if self.engine == "cpu" and (gradients or logits.dtype != torch.float32):
            raise ValueError(
                f"the CPU engine computes in float32 and without gradients; these scores are {logits.dtype}"
                f"{' and gradients are wanted' if gradients else ''}: use engine='auto', or torch.no_grad() with float32"
            )
        return self.engine

    def _steps(self, logits: Tensor, image: Tensor, features: Tensor | None) -> tuple[Iterator[Tensor], Tensor, list[Pairwise]]:
        images, classes = logits.shape[:2]
        unary = _energies(logits, 1).flatten(2).transpose(1, 2).reshape(-1, classes)
        pairwise = [
            Pairwise(GaussianFilter(kernel.features_of(image, features), self.normalisation), self._transform(kernel, logits))
            for kernel in self._kernels()
        ]
        return mean_field(unary, pairwise, self._rounds(), images, self.damping, self.tolerance), unary, pairwise

    def _transform(self, kernel: "_Kernel", like: Tensor) -> Tensor:
        """Cost of label l beside l' under one kernel. Potts' is a reward of like labels: all messages of a pixel differ by a constant."""
        weight = kernel.weight.to(like)
        if self.compatibility is None:
            return -weight
        costs = self.compatibility.to(like)
        return costs * weight if costs.ndim == 2 else -costs * weight

    def _on_cpu(self, logits: Tensor, image: Tensor, features: Tensor | None) -> Tensor:
        from perpixel.refinement import mean_field_cpu  # numba; only where it is used, so that training and CUDA start without it

        refined = []
        for n in range(logits.shape[0]):
            one = (image[n : n + 1].cpu(), None if features is None else features[n : n + 1].cpu())
            kernels = [
                mean_field_cpu.GaussianKernel(
                    kernel.features_of(*one)[0].detach().numpy(),
                    self._transform(kernel, logits).detach().cpu().numpy(),
                    self.normalisation,  # type: ignore[arg-type]
                )
                for kernel in self._kernels()
            ]
            unary = _energies(logits[n].detach(), 0).flatten(1).cpu().numpy()
            log_q = mean_field_cpu.mean_field(
                unary, kernels, self._rounds(), damping=self.damping, tolerance=self.tolerance, fast=self.fast, width=logits.shape[-1]
            )
            refined.append(torch.from_numpy(log_q).view(logits.shape[1:]))
        return torch.stack(refined).to(logits)


def crf_as_rnn(
    classes: int,
    xy: float = 160.0,
    colour: float = 3.0,
    smoothness: float = 3.0,
    appearance_weight: float = 5.0,
    smoothness_weight: float = 3.0,
    iterations: int = 10,
    training_iterations: int = 5,
) -> DenseCRF:
    """The dense CRF as layers of a network, trained with it: CRF-RNN as published.

    Its kernel weights, one per class, and its label costs, not held to be symmetric, are parameters; bandwidths are fixed. Start from a
    trained network, and give these parameters rates of their own: the authors' are 1e4 (weights) and 1e3 (costs) times the network's.

    Args:
        classes: K.
        xy, colour: bandwidths of the appearance kernel, pixels and 0..255.
        smoothness: bandwidth of the smoothness kernel, pixels.
        appearance_weight, smoothness_weight: where the weights of every class start.
        iterations, training_iterations: of mean field in use and in training; training with 10 costs 0.7 mIoU (paper, section 7).

    Source: Zheng et al. 2015, arXiv:1502.03240; initial values from the authors' release (spatial.par, bilateral.par). Deviation: the cost
    matrix begins as 1 - I, which is the same as the release's -I by a constant per pixel.
    """
    kernels = [
        {"xy": xy, "colour": colour, "weight": [appearance_weight] * classes},
        {"xy": smoothness, "weight": [smoothness_weight] * classes},
    ]
    costs = (1 - torch.eye(classes)).tolist()
    return DenseCRF(kernels, "after", costs, iterations, training_iterations, trainable=("weights", "compatibility"))


class _Kernel(nn.Module):
    """Bandwidths and weight of one Gaussian kernel."""

    weight: Tensor
    xy: Tensor | None
    colour: Tensor | None
    features: Tensor | None

    def __init__(self, options: Mapping[str, Any], trainable: Sequence[str]) -> None:
        super().__init__()
        for key in options:
            _one_of("kernel", key, (*BANDWIDTHS, "weight"))
        if not set(options) & set(BANDWIDTHS) or "weight" not in options:
            raise ValueError(f"a kernel has a weight and at least one bandwidth of {', '.join(BANDWIDTHS)}; this one is {dict(options)}")
        _hold(self, "weight", _numbers("weight", options["weight"], 1), "weights" in trainable)
        for key in BANDWIDTHS:
            bandwidth = _numbers(key, options[key], 1) if key in options else None
            if bandwidth is not None and not (bandwidth > 0).all():
                raise ValueError(f"{key}={options[key]}; a bandwidth is positive")
            _hold(self, key, bandwidth, "bandwidths" in trainable)
        if self.xy is not None and self.xy.ndim and len(self.xy) != 2:
            raise ValueError(f"xy={options['xy']}; it is one bandwidth, or two, for x and for y")

    def options(self) -> dict[str, Any]:
        values = ((key, getattr(self, key)) for key in (*BANDWIDTHS, "weight"))
        return {key: value.tolist() for key, value in values if value is not None}

    def features_of(self, image: Tensor, extra: Tensor | None) -> Tensor:
        """(N, H * W, d): x, y, colours, extra features, each divided by its bandwidth."""
        parts = []
        if self.xy is not None:
            height, width = image.shape[-2:]
            y, x = torch.meshgrid(torch.arange(height).to(image), torch.arange(width).to(image), indexing="ij")
            parts.append(_divided(torch.stack([x, y]).expand(len(image), -1, -1, -1), self.xy, "xy"))
        if self.colour is not None:
            parts.append(_divided(image, self.colour, "colour"))
        if self.features is not None:
            if extra is None:
                raise ValueError("a kernel has a bandwidth for features and none were given; call the refiner with a third tensor")
            parts.append(_divided(extra, self.features, "features"))
        return torch.cat(parts, 1).flatten(2).transpose(1, 2)


def _energies(logits: Tensor, axis: int) -> Tensor:
    """-log softmax, held below 1e30: finite scores may lie further apart than float32 reaches."""
    return logits.log_softmax(axis).neg().clamp(max=1e30)


def _divided(values: Tensor, bandwidth: Tensor, name: str) -> Tensor:
    if not (bandwidth > 0).all():
        raise ValueError(f"{name}: bandwidth {bandwidth.tolist()}; it is positive. If it was trained, lower its learning rate")
    if bandwidth.ndim and len(bandwidth) != values.shape[1]:
        raise ValueError(f"{name}: {len(bandwidth)} bandwidths for {values.shape[1]} channels; give one each, or a single number")
    return values / bandwidth.to(values).view(-1, 1, 1)


def _hold(module: nn.Module, name: str, value: Tensor | None, trained: bool) -> None:
    if value is not None and trained:
        module.register_parameter(name, nn.Parameter(value))
    else:
        module.register_buffer(name, value)


def _numbers(name: str, value: Any, dimensions: int) -> Tensor:
    """A tensor of its own, so that training does not change the caller's; at most `dimensions` axes."""
    numbers = torch.as_tensor(value, dtype=value.dtype if isinstance(value, Tensor) and value.is_floating_point() else torch.float32)
    if numbers.ndim > dimensions or not numbers.numel() or not torch.isfinite(numbers).all():
        raise ValueError(f"{name}={value}; it is finite numbers in at most {dimensions} dimension{'s' * (dimensions > 1)}")
    return numbers.detach().clone()


def _costs(value: Sequence[Any] | Tensor, trained: bool) -> Tensor:
    """Label costs; those that are `trained` are free, and may be negative or dear on the diagonal."""
    costs = _numbers("compatibility", value, 2)
    square = costs.ndim == 2 and costs.shape[0] == costs.shape[1]
    if costs.ndim != 1 and not (square and (trained or not (costs.diagonal().any() or (costs < 0).any()))):
        raise ValueError(
            f"compatibility of shape {tuple(costs.shape)}, from {costs.min():g} to {costs.max():g}; it is None, K rewards of like labels, "
            "or K x K costs, none negative, with a zero diagonal"
        )
    return costs


def _one_of(what: str, name: str, known: Sequence[str]) -> None:
    if name not in known:
        raise ValueError(f"{what}: unknown {name!r}; known: {', '.join(known)}")
