"""How much of the machine's own matrix peak our nets use; writes benchmarks/results/matrix-peak-DEVICE.json.

python benchmarks/matrix_peak.py [--device cuda] [--precision bf16] [--batch 1] [--compile] [--repeats 5] [--nets NAME ...]

The peak is not the maker's: it is what the best of some large matrix products reaches here, in the same precision, with the same threads,
measured again beside every net. A net's own figure is its multiplications and additions (2 for each multiply-add, as PyTorch's counter has
them, of convolutions and matrix products alone) by the median of the times.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from record import write
from speed import Setting
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from perpixel import build

# Name -> (model and its options, bands, height and width).
NETS: dict[str, tuple[dict[str, Any], int, tuple[int, int]]] = {
    "U-Net 2015, 572x572": ({"name": "unet_paper"}, 1, (572, 572)),
    "DeepLab v3 ResNet-101, 513x513": ({"name": "deeplab_v3_paper"}, 3, (513, 513)),
    "U-Net resnet34, 224x288": ({"name": "unet", "encoder": "resnet34", "variant": "smp"}, 3, (224, 288)),
    "DeepLab v3 ResNet-50 of torchvision, 224x288": ({"name": "deeplab_v3_torchvision", "depth": 50}, 3, (224, 288)),
}


def seconds(call: Callable[[], object], device: str, repeats: int) -> float:
    """The median time of a call on the wall, the device's work included."""
    times = []
    for repeat in range(repeats + 1):  # the first warms up
        start = time.perf_counter()
        call()
        if device == "cuda":
            torch.cuda.synchronize()
        if repeat:
            times.append(time.perf_counter() - start)
    return statistics.median(times)


def peak(device: str, dtype: torch.dtype, repeats: int) -> float:
    """Operations a second of the fastest of some square matrix products."""
    best = 0.0
    for side in (1024, 2048, 4096) if device == "cpu" else (4096, 8192, 16384):
        a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
        best = max(best, 2 * side**3 / seconds(lambda a=a, b=b: a @ b, device, repeats))  # type: ignore[misc]
    return best


def measured(name: str, given: argparse.Namespace, backward: bool) -> dict[str, Any]:
    """One net, forward alone as in prediction, or forward and backward as in training."""
    options, bands, size = NETS[name]
    torch.manual_seed(0)
    net: Any = build(classes=21, **({} if bands == 3 else {"in_channels": bands}), **options)
    setting = Setting(given.device, torch.get_num_threads(), "channels_last", given.precision, given.batch, size)
    net = setting.put(net).train(backward)
    image = setting.put(torch.randn(given.batch, bands, *size))
    run = torch.compile(net) if given.compile else net

    def step(model: Any = run) -> None:
        with torch.set_grad_enabled(backward), setting.autocast():
            logits: Tensor = model(image)
        if backward:
            logits.float().mean().backward()
            net.zero_grad(set_to_none=True)

    with FlopCounterMode(display=False) as counter:
        step(net)
    took = seconds(step, given.device, given.repeats)
    dtype = torch.bfloat16 if given.precision == "bf16" else torch.float32
    reached, most = counter.get_total_flops() / took, peak(given.device, dtype, given.repeats)
    row = {
        "net": name,
        "pass": "forward and backward" if backward else "forward",
        "ms": round(1000 * took, 2),
        "giga_operations": round(counter.get_total_flops() / 1e9, 1),
        "tera_a_second": round(reached / 1e12, 4),
        "peak_tera_a_second": round(most / 1e12, 4),
        "share": round(reached / most, 3),
    }
    sys.stdout.write(f"{row}\n")
    sys.stdout.flush()
    return row


def main() -> None:
    """Every net, forward, and forward and backward."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--precision", choices=["32", "bf16"], default="bf16")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--nets", nargs="+", choices=NETS, default=list(NETS))
    given = parser.parse_args()
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False  # both sides in the same precision
    rows = [measured(name, given, backward) for name in given.nets for backward in (False, True)]
    setting = {"precision": given.precision, "batch": given.batch, "compiled": given.compile, "repeats": given.repeats}
    name = f"matrix-peak-{given.device}{'-compiled' if given.compile else ''}"
    write(name, {**setting, "threads": torch.get_num_threads(), "rows": rows}, device=given.device)


if __name__ == "__main__":
    main()
