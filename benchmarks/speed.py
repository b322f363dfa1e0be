"""Our nets against the same nets of torchvision and segmentation_models.pytorch; writes benchmarks/results/speed-forward.json.

python benchmarks/speed.py [--threads 2] [--repeats 30] [--size 256 256] [--format channels_last contiguous] [--precision 32 bf16]

Both sides have the same weights and see the same image, in turns, so that whatever else the machine does falls on both. The figure is
the median, over the pairs of calls, of our time divided by theirs; a forward pass must not exceed 1.02. With one thread the time is that
of the processor, which other work hardly touches; with several, or on a GPU, it is that on the wall.
"""

import argparse
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from record import write
from torch import Tensor, nn
from torchvision.models import segmentation

from perpixel import build
from perpixel.bundle import import_weights
from perpixel.models.unpooling import max_unpool

LIMIT = 1.02
Call = Callable[[], object]


@dataclass(frozen=True)
class Setting:
    """Where and how a comparison runs."""

    device: str
    threads: int
    layout: str
    precision: str
    batch: int
    size: tuple[int, int]

    def put(self, x: Any) -> Any:
        """A module or tensor, on the device and in the layout."""
        layout = torch.channels_last if self.layout == "channels_last" else torch.contiguous_format
        return x.to(self.device, memory_format=layout)

    def autocast(self) -> Any:
        """bf16, where it is asked for."""
        return torch.autocast(self.device, torch.bfloat16) if self.precision == "bf16" else nullcontext()

    @property
    def processor_time(self) -> bool:
        """Whether to count the processor's time instead of the wall's."""
        return self.device == "cpu" and self.threads == 1


def torchvision_net(name: str) -> nn.Module:
    """torchvision's net without weights of its own, its auxiliary head included."""
    net: nn.Module = getattr(segmentation, name)(weights=None, weights_backbone=None, num_classes=21, aux_loss=True)
    return net


def smp_net(name: str) -> nn.Module:
    """segmentation_models.pytorch's net of this name on ResNet-34."""
    import segmentation_models_pytorch as smp

    net: nn.Module = getattr(smp, name)("resnet34", encoder_weights=None, classes=21)
    return net


# Name -> (theirs, our model and its options, source of the weights).
NETS: dict[str, tuple[Callable[[], nn.Module], dict[str, Any], Any]] = {
    "fcn_resnet50, torchvision": (lambda: torchvision_net("fcn_resnet50"), {"name": "fcn_resnet", "depth": 50}, "torchvision"),
    "deeplabv3_resnet50, torchvision": (
        lambda: torchvision_net("deeplabv3_resnet50"),
        {"name": "deeplab_v3_torchvision", "depth": 50},
        "torchvision",
    ),
    "Unet resnet34, smp": (lambda: smp_net("Unet"), {"name": "unet", "encoder": "resnet34", "variant": "smp"}, "smp"),
    "DeepLabV3Plus resnet34, smp": (
        lambda: smp_net("DeepLabV3Plus"),
        {"name": "deeplab_v3plus", "encoder": "resnet34", "variant": "smp"},
        "smp",
    ),
}


def forward(name: str, setting: Setting) -> tuple[Call, Call]:
    """Forward passes of ours and theirs; ValueError where their logits differ."""
    torch.manual_seed(0)
    make, options, source = NETS[name]
    theirs = make().eval()
    ours = build(classes=21, **options).eval()
    import_weights(ours, theirs.state_dict(), source)
    if hasattr(theirs, "aux_classifier"):
        theirs.aux_classifier = None  # torchvision would compute it for prediction too
    ours, theirs = setting.put(ours), setting.put(theirs)
    image = setting.put(torch.randn(setting.batch, 3, *setting.size))

    def run(net: nn.Module) -> Tensor:
        with torch.inference_mode(), setting.autocast():
            logits = net(image)
        found: Tensor = logits["out"] if isinstance(logits, dict) else logits
        return found

    a, b = run(ours).float(), run(theirs).float()
    if (a - b).norm() > (0.05 if setting.precision == "bf16" else 1e-4) * b.norm():
        raise ValueError(f"{name}: the logits differ by {(a - b).norm() / b.norm():.1e} of their size; the times would say nothing")
    return lambda: run(ours), lambda: run(theirs)


def unpooling(setting: Setting, channels: int = 64) -> tuple[Call, Call]:
    """Max unpooling forward and backward, ours and `nn.MaxUnpool2d`."""
    torch.manual_seed(0)
    pooled, indices = nn.functional.max_pool2d(
        setting.put(torch.randn(setting.batch, channels, *setting.size)), 2, ceil_mode=True, return_indices=True
    )
    pooled = pooled.requires_grad_()
    other = nn.MaxUnpool2d(2)
    weight = setting.put(torch.randn(setting.batch, channels, *setting.size))

    def run(unpool: Callable[[], Tensor]) -> None:
        pooled.grad = None
        unpool().backward(weight)

    return (
        lambda: run(lambda: max_unpool(pooled, indices, setting.size)),
        lambda: run(lambda: other(pooled, indices, output_size=setting.size)),
    )


def segnet_share(setting: Setting) -> tuple[Call, Call]:
    """The five unpoolings of SegNet, forward and backward, and its whole step: their ratio is the share that unpooling has."""
    torch.manual_seed(0)
    net = setting.put(build("segnet_paper", 11).train())
    image = setting.put(torch.randn(setting.batch, 3, *setting.size))
    with torch.no_grad():
        features = net.encoder(image)
    sizes = [setting.size, *(tuple(m.shape[-2:]) for m in features.maps[:-1])]
    levels = [(m.detach().requires_grad_(), i, s) for m, i, s in zip(features.maps, features.pool_indices, sizes, strict=True)]
    weights = [setting.put(torch.randn(*m.shape[:2], *s)) for m, _, s in levels]

    def unpool_all() -> None:
        for (m, indices, size), weight in zip(levels, weights, strict=True):
            m.grad = None
            max_unpool(m, indices, size).backward(weight)

    def step() -> None:
        net.zero_grad()
        with setting.autocast():
            logits = net(image)
        logits.float().square().mean().backward()

    return unpool_all, step


def seconds(call: Call, setting: Setting) -> float:
    """How long one call takes, on the clock that the setting asks for."""
    clock = time.process_time if setting.processor_time else time.perf_counter
    if setting.device == "cuda":
        torch.cuda.synchronize()
    start = clock()
    call()
    if setting.device == "cuda":
        torch.cuda.synchronize()
    return clock() - start


def compare(ours: Call, theirs: Call, setting: Setting, repeats: int) -> dict[str, Any]:
    """Times in turns, the first of a pair changing from pair to pair; the median of the pairs' ratios, and their quartiles."""
    for call in (ours, theirs, ours, theirs):
        call()
    times: dict[Call, list[float]] = {ours: [], theirs: []}
    for number in range(repeats):
        for call in (ours, theirs) if number % 2 else (theirs, ours):
            times[call].append(seconds(call, setting))
    ratios = [a / b for a, b in zip(times[ours], times[theirs], strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
    return {
        "ours_ms": round(1000 * statistics.median(times[ours]), 2),
        "theirs_ms": round(1000 * statistics.median(times[theirs]), 2),
        "ratio": round(middle, 4),
        "quartiles": [round(low, 4), round(high, 4)],
        "pairs": repeats,
    }


def comparisons(setting: Setting, only: list[str]) -> Iterator[tuple[str, str, Callable[[], tuple[Call, Call]]]]:
    """Kind, name, and what makes the two calls, so that one pair of nets is in memory at a time."""
    for name in NETS:
        yield "forward", name, lambda name=name: forward(name, setting)
    yield "unpooling", "max unpooling of 64 maps, forward and backward, nn.MaxUnpool2d", lambda: unpooling(setting)
    yield "share", "SegNet's five unpoolings in its training step", lambda: segnet_share(setting)


def main() -> None:
    """Run every comparison in every setting, and write the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--size", type=int, nargs=2, default=(256, 256), metavar=("HEIGHT", "WIDTH"), help="multiples of 32")
    parser.add_argument("--format", nargs="+", choices=["channels_last", "contiguous"], default=["channels_last", "contiguous"])
    parser.add_argument("--precision", nargs="+", choices=["32", "bf16"], default=["32"])
    parser.add_argument("--only", nargs="+", default=[], metavar="WORD", help="comparisons whose name or kind has one of these")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    rows = []
    for layout, precision in itertools.product(given.format, given.precision):
        setting = Setting(given.device, given.threads, layout, precision, given.batch, (given.size[0], given.size[1]))
        for kind, name, make in comparisons(setting, given.only):
            if given.only and not any(word in f"{kind} {name}" for word in given.only):
                continue
            row = {"kind": kind, "name": name, "format": layout, "precision": precision, **compare(*make(), setting, given.repeats)}
            rows.append(row)
            sys.stdout.write(json.dumps(row) + "\n")
            sys.stdout.flush()
    result = {
        "device": given.device,
        "threads": given.threads,
        "clock": "processor" if given.device == "cpu" and given.threads == 1 else "wall",
        "batch": given.batch,
        "size": list(given.size),
        "limit": LIMIT,
        "rows": rows,
    }
    write("speed-forward", result, ("torch", "torchvision", "timm"), given.device)
    slow = [row["name"] for row in rows if row["kind"] == "forward" and row["ratio"] > LIMIT]
    if slow:
        sys.exit(f"slower than {LIMIT} times: {', '.join(slow)}")


if __name__ == "__main__":
    main()
