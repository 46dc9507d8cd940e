"""The shared harness: one fine-tuning loop for every framework, and what it leaves behind.

`finetune` runs a `RunConfig` and writes a directory; `load_run` reads it; `compare_runs` says whether
two of them walked the same path; `write_report` shows any number of them on one page.
"""

from .compare import Comparison, compare_runs
from .config import RunConfig
from .directory import Run, load_run
from .run import finetune
from .tasks import TASKS, get_task

__all__ = ["TASKS", "Comparison", "Run", "RunConfig", "compare_runs", "finetune", "get_task", "load_run"]
