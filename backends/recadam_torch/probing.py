"""A new head that starts where the pretrained features put it."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn

from recadam_core import RecAdamError
from recadam_core.errors import check_number

from .memory import wide_dtype

__all__ = ["probe_head"]


@torch.no_grad()
def probe_head(head: nn.Module, features: Any, labels: Any, inverse_strength: float = 0.1) -> nn.Linear:
    r"""Fit a linear head to pretrained features, so that training does not have to begin by breaking them.

    From a random head the first gradients move the encoder towards whatever that head happens to read, and
    it forgets for nothing.

    Math:
        $\min_{W, b} C \sum_i \ell(W x_i + b, y_i) + \tfrac12 \|W\|^2$ with the cross-entropy $\ell$

    Args:
        head: the layer, of shape (classes, width), written in place. It needs a bias.
        features: what the pretrained encoder makes of the training rows, of shape (rows, width).
        labels: their class numbers, of shape (rows,).
        inverse_strength: C; less is more regular.

    Returns:
        The layer.

    Raises:
        RecAdamError: when shapes do not fit, the layer has no bias, a class has no row, a feature or the
            strength is not a finite number, or scikit-learn is not installed.

    Example:
        >>> x, y = torch.tensor([[-1.0], [1.0]]), torch.tensor([0, 1])
        >>> head = probe_head(nn.Linear(1, 2), x, y, inverse_strength=1000.0)
        >>> head(x).argmax(1)
        tensor([0, 1])

    Source: the first half of LP-FT, arXiv 2202.10054.
    """
    try:
        from sklearn.linear_model import LogisticRegression
    except ModuleNotFoundError:
        raise RecAdamError("probe_head: needs 'sklearn'; pip install scikit-learn") from None
    check_number("probe_head", "inverse_strength", inverse_strength, low=0.0, open_low=True)
    if not isinstance(head, nn.Linear):
        raise RecAdamError(f"probe_head: the head is a {type(head).__name__}; give the linear layer in it")
    if head.out_features < 2:
        raise RecAdamError("probe_head: the head has one output; give a layer with one for each class")
    try:
        rows, y = torch.as_tensor(features).detach().cpu(), torch.as_tensor(labels).cpu().numpy()
        if rows.is_complex():
            raise TypeError
    except (TypeError, ValueError, RuntimeError):
        raise RecAdamError(
            "probe_head: the features or labels are no arrays of real numbers; number the classes from 0"
        ) from None
    x = rows.to(wide_dtype(rows)).numpy()  # numpy has no bfloat16
    if x.ndim != 2 or y.shape != x.shape[:1] or x.shape[1] != head.in_features:
        raise RecAdamError(
            f"probe_head: features of shape {x.shape} and labels of shape {y.shape} for a head of "
            f"{head.in_features} inputs; give a row of features and a class number for each example"
        )
    if not np.isin(y, np.arange(len(y) + head.out_features)).all():
        raise RecAdamError("probe_head: the labels are no class numbers; number the classes from 0")
    finite = np.isfinite(x).all(axis=1)
    if not finite.all():
        raise RecAdamError(
            f"probe_head: the features of row {np.argmin(finite)} are not finite; leave it out"
        )
    if head.bias is None:
        raise RecAdamError("probe_head: the head has no bias; give one that has")
    classes, there = set(range(head.out_features)), set(y.tolist())
    if classes != there:
        other = there - classes
        which = f"class {min(other)}" if other else f"no row of class {min(classes - there)}"
        raise RecAdamError(
            f"probe_head: {which}, and the head has {len(classes)}; give rows of each, numbered from 0"
        )
    fitted = LogisticRegression(C=inverse_strength, max_iter=2000).fit(x, y)
    weight, bias = fitted.coef_, fitted.intercept_
    if len(weight) == 1:  # of two classes it has the second's score alone
        weight, bias = (np.concatenate([-part, part]) / 2 for part in (weight, bias))
    head.weight.copy_(torch.tensor(weight))
    head.bias.copy_(torch.tensor(bias))
    return head
