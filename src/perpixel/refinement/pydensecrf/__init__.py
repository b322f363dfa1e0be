"""Drop-in for the package pydensecrf: scripts written for it run with only the import changed.

    import pydensecrf.densecrf as dcrf            ->  import perpixel.refinement.pydensecrf.densecrf as dcrf
    from pydensecrf.utils import ...              ->  from perpixel.refinement.pydensecrf.utils import ...

Names, arguments, memory layouts and constants are those of https://github.com/lucasb-eyer/pydensecrf; results agree with it to 1e-4 in
the marginals. What it accepts is accepted, and more: arrays of any real type and layout are converted, where pydensecrf wants contiguous
float32. What differs: matrices come back as numpy arrays; energies may be +inf (a label that cannot be) but not NaN; wrong shapes and
values raise ValueError before anything is computed.
"""

from perpixel.refinement.pydensecrf import densecrf, utils
from perpixel.refinement.pydensecrf.densecrf import (
    CONST_KERNEL,
    DIAG_KERNEL,
    FULL_KERNEL,
    NO_NORMALIZATION,
    NORMALIZE_AFTER,
    NORMALIZE_BEFORE,
    NORMALIZE_SYMMETRIC,
    ConstUnary,
    DenseCRF,
    DenseCRF2D,
    KernelType,
    LogisticUnary,
    NormalizationType,
    Unary,
)

__all__ = [
    "CONST_KERNEL",
    "DIAG_KERNEL",
    "FULL_KERNEL",
    "NORMALIZE_AFTER",
    "NORMALIZE_BEFORE",
    "NORMALIZE_SYMMETRIC",
    "NO_NORMALIZATION",
    "ConstUnary",
    "DenseCRF",
    "DenseCRF2D",
    "KernelType",
    "LogisticUnary",
    "NormalizationType",
    "Unary",
    "densecrf",
    "utils",
]
