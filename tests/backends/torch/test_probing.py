"""A head fitted to features: the logistic regression's own scores, and what it cannot be fitted to."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("torch")

import torch
from sklearn.linear_model import LogisticRegression
from torch import nn

from recadam_core import RecAdamError
from recadam_torch import probe_head


@pytest.mark.parametrize("classes", [2, 3])
def test_it_gives_the_regressions_probabilities(classes):
    rng = np.random.default_rng(0)
    y = rng.integers(classes, size=200)
    x = rng.standard_normal((200, 5)) + y[:, None]
    head = nn.Linear(5, classes)
    assert probe_head(head, torch.tensor(x), torch.tensor(y), inverse_strength=0.3) is head
    expected = LogisticRegression(C=0.3, max_iter=2000).fit(x, y).predict_proba(x)
    found = head(torch.tensor(x, dtype=torch.float32)).softmax(1).detach().numpy()
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert all(p.requires_grad for p in head.parameters())


@pytest.mark.parametrize(
    ("head", "labels", "message"),
    [
        (
            nn.Linear(3, 2),
            [0, 1, 1],
            "probe_head: features of shape (3, 2) and labels of shape (3,) for a head of 3",
        ),
        (
            nn.Linear(2, 2),
            [0, 1],
            "probe_head: features of shape (3, 2) and labels of shape (2,) for a head of 2",
        ),
        (nn.Linear(2, 2, bias=False), [0, 1, 1], "probe_head: the head has no bias; give one that has"),
        (
            nn.Linear(2, 3),
            [0, 1, 1],
            "probe_head: no row of class 2, and the head has 3; give rows of each, numbered from 0",
        ),
        (nn.Linear(2, 2), [0, 1, 2], "probe_head: class 2, and the head has 2; give rows of each, numb"),
        (nn.Linear(2, 2), [-1, 1, 1], "probe_head: the labels are no class numbers; number the classes from"),
        (
            nn.Linear(2, 2),
            [0, 0.5, 1],
            "probe_head: the labels are no class numbers; number the classes from",
        ),
        (nn.Linear(2, 2), [0, np.nan, 1], "probe_head: the labels are no class numbers; number the classes"),
        (nn.Linear(2, 2), ["bad", "good", "bad"], "probe_head: the features or labels are no arrays of real"),
        (nn.Linear(2, 1), [0, 1, 1], "probe_head: the head has one output; give a layer with one for each"),
        (nn.Bilinear(2, 2, 2), [0, 1, 1], "probe_head: the head is a Bilinear; give the linear layer in it"),
    ],
)
def test_bad_input_is_named_in_one_line(head, labels, message):
    before = head.weight.clone()
    with pytest.raises(RecAdamError) as caught:
        probe_head(head, torch.ones(3, 2), labels)
    assert str(caught.value).startswith(message)
    assert torch.equal(head.weight, before)


def test_features_are_finite_and_of_any_precision():
    head, x = nn.Linear(1, 2), torch.tensor([[-1.0], [1.0], [2.0]], dtype=torch.bfloat16)
    with pytest.raises(RecAdamError, match="probe_head: inverse_strength"):
        probe_head(head, x, [0, 1, 1], inverse_strength=-1.0)
    assert probe_head(head, x, [0, 1, 1], inverse_strength=100.0)(x.float()).argmax(1).tolist() == [0, 1, 1]
    x[1] = torch.nan
    with pytest.raises(RecAdamError, match="probe_head: the features of row 1 are not finite; leave it out"):
        probe_head(head, x, [0, 1, 1])
