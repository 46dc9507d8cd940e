"""Tasks: what is learned, what could be forgotten, and how both are measured."""

from recadam_core.errors import unknown

from .base import Problem, Task
from .digits import Digits
from .movie_reviews import MovieReviews
from .reviews_decoder import ReviewsDecoder

__all__ = ["TASKS", "Problem", "Task", "get_task"]

TASKS: dict[str, Task] = {task.name: task for task in (Digits(), MovieReviews(), ReviewsDecoder())}
"""The tasks by name."""


def get_task(name: str) -> Task:
    """The task of this name.

    Raises:
        RecAdamError: when there is none.

    Example:
        >>> get_task("digits").name
        'digits'
    """
    if name not in TASKS:
        raise unknown("task", name, TASKS)
    return TASKS[name]
