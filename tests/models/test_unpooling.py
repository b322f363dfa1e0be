"""Max unpooling against PyTorch's own."""

import pytest
import torch
from torch import nn

from perpixel.models.unpooling import max_unpool, scattered

SIZES = [(8, 6), (7, 6), (8, 5), (7, 5), (1, 1), (2, 3), (45, 61)]
FORMATS = [torch.contiguous_format, torch.channels_last]


def pooled(size, layout, dtype=torch.float64):
    torch.manual_seed(0)
    x = torch.randn(2, 3, *size).to(dtype).contiguous(memory_format=layout)
    return nn.MaxPool2d(2, ceil_mode=True, return_indices=True)(x)


@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("size", SIZES)
def test_it_equals_pytorch_s_unpooling_forward_and_backward(size, layout):
    x, indices = pooled(size, layout)
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    one = max_unpool(ours, indices, size)
    two = nn.MaxUnpool2d(2)(theirs, indices, output_size=size)
    assert torch.equal(one, two)
    assert torch.equal(scattered(x, indices, size), two)
    gradient = torch.randn_like(two)
    one.backward(gradient)
    two.backward(gradient)
    assert torch.equal(ours.grad, theirs.grad)


def test_maps_and_gradients_stay_channels_last():
    x, indices = pooled((9, 14), torch.channels_last)
    x.requires_grad_()
    out = max_unpool(x, indices, (9, 14))
    (gradient,) = torch.autograd.grad(out, x, torch.randn_like(out))
    for tensor in (out, gradient, scattered(x.detach(), indices, (9, 14))):
        assert tensor.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_low_precision_is_kept(dtype):
    x, indices = pooled((6, 7), torch.channels_last, dtype)
    out = max_unpool(x.requires_grad_(), indices, (6, 7))
    out.sum().backward()
    assert out.dtype == x.grad.dtype == dtype
    assert torch.equal(x.grad, torch.ones_like(x))
