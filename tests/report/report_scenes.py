"""Scored images without a network: truth, and predictions that are wrong here and there."""

import math

import numpy as np
import torch

from perpixel.scores import Scored

COLORS = [(200, 0, 0), (0, 200, 0), (0, 0, 200)]


def scored(truth, guess, name="a", sureness=4.0, ignore=255):
    """An image whose prediction is `guess`, with that logit above all others, and whose loss is computed here."""
    labels = torch.as_tensor(np.asarray(truth)).long()
    logits = sureness * torch.nn.functional.one_hot(torch.as_tensor(np.asarray(guess)).long(), len(COLORS)).permute(2, 0, 1).float()
    known = labels != ignore
    chosen = np.take_along_axis(-logits.double().log_softmax(0).numpy(), (labels * known).numpy()[None], 0)[0]
    loss = float(chosen[known].mean()) if known.any() else math.nan
    image = torch.arange(labels.numel() * 3).reshape(3, *labels.shape).remainder(256).to(torch.uint8)
    return Scored(name, None, image, labels, logits, loss, ignore)


def stream(count, seed=0, size=(24, 30)):
    """Noise, with a tenth unknown, predicted more or less well and more or less surely."""
    random = np.random.default_rng(seed)
    for number in range(count):
        truth = random.integers(0, 3, size)
        truth[random.random(size) < 0.1] = 255
        guess = np.where(random.random(size) < random.random(), truth % 255 % 3, random.integers(0, 3, size))
        yield scored(truth, guess, f"im{number}", sureness=random.uniform(0.5, 6))
