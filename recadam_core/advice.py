"""What a schedule will do, before it is run."""

from __future__ import annotations

import numpy as np

from .hyperparameters import Hyperparameters

__all__ = ["schedule_advice"]


def schedule_advice(hp: Hyperparameters, steps: int) -> list[str]:
    """Warnings about an annealing at a learning rate and a strength of the pull.

    Returns:
        One line for each: training frozen, training that ends before the objective has shifted, a pull
        that does nothing, a pull that overshoots or diverges.

    Example:
        >>> from recadam_core import Sigmoid
        >>> schedule_advice(Hyperparameters(lr=1e-3, gamma=5000.0, annealing=Sigmoid(k=0.1, t0=250)), 1000)
        ['lr * gamma = 5 diverges from step 1 on (pull of 2 or more); lower either, or use form=proximal']
    """
    task, recall = hp.annealing.weights(np.arange(1.0, steps + 1), np)
    pull = np.where(recall > 0, hp.lr * hp.gamma, 0.0) * recall
    warnings = []
    frozen = int(np.sum(task < 0.05))
    if frozen > 0.4 * steps:
        warnings.append(
            f"training is frozen: the task weight is below 0.05 in {frozen} of {steps} steps; lower t0 or k"
        )
    elif hp.gamma and task[-1] < 0.9 * max(task.max(), 0.9999):
        warnings.append(
            f"the task weight ends at {task[-1]:.2g}: training stops before the objective shifted; lower t0"
        )
    elif task[-1] < 0.9 and task.max() == task.min():
        warnings.append(f"the task weight stays at {task[-1]:.2g}, so the learning rate is that share of lr")
    total = float(pull.sum())
    if total < 0.05:
        warnings.append(
            f"the pull is inactive: it adds up to {total:.2g} over the training; raise gamma, lr or t0"
        )
    if hp.form != "proximal" and pull.max() > 1.0:
        worst = pull.max()
        first = int(np.argmax(pull >= 2.0 if worst >= 2.0 else pull > 1.0)) + 1
        what = "diverges" if worst >= 2.0 else "overshoots"
        limit = "2 or more" if worst >= 2.0 else "more than 1"
        warnings.append(
            f"lr * gamma = {hp.lr * hp.gamma:g} {what} from step {first} on (pull of {limit}); "
            "lower either, or use form=proximal"
        )
    return warnings
