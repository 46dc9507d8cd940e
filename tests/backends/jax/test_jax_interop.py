"""`recadam_jax` where JAX people put an optimizer: the table of docs/jax.md, and what optax asks."""

from __future__ import annotations

import ast
import importlib.util
import inspect
import re
from pathlib import Path
from types import ModuleType

import pytest

pytest.importorskip("jax")
pytest.importorskip("equinox")
pytest.importorskip("flax")
pytest.importorskip("orbax.checkpoint")
pytest.importorskip("safetensors")

import jax
import jax.numpy as jnp
import numpy as np
import optax
from safetensors.numpy import save_file

from recadam_core import Linear
from recadam_jax import recadam

HERE = Path(__file__).parent
spec = importlib.util.spec_from_file_location("jax_interop", HERE / "jax_interop.py")
jax_interop = importlib.util.module_from_spec(spec)
spec.loader.exec_module(jax_interop)

DOCS = HERE.parents[2] / "docs" / "jax.md"
DOCUMENTED = dict(re.findall(r"^\| (.+?) \| (.*) \|$", DOCS.read_text(encoding="utf-8"), re.M))


LIGHT = ("alone", "`inject_hyperparams`", "`flax.nnx.Optimizer`")
CASES = [
    pytest.param(case, id=case.name, marks=[] if case.name in LIGHT else pytest.mark.heavy)
    for case in jax_interop.CASES
]


@pytest.mark.parametrize("case", CASES)
def test_the_table_of_uses_is_what_holds(case):
    cells = [jax_interop.cell(case, check) for check in jax_interop.COLUMNS.values()]
    assert "no" not in cells
    assert " | ".join(cells) == DOCUMENTED[case.name]


BLOCKS = re.findall(r"^```python\n(.*?)^```$", DOCS.read_text(encoding="utf-8"), re.M | re.S)


@pytest.mark.filterwarnings("ignore")
def test_the_page_shows_each_use_in_ten_lines_that_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    weight, bias = np.ones((2, 4), np.float32), np.zeros(2, np.float32)
    save_file({"encoder.weight": weight, "encoder.bias": bias}, "pretrained.safetensors")
    encoder = {"kernel": jnp.asarray(weight.T), "bias": jnp.asarray(bias)}
    names = {
        "jax": jax,
        "jnp": jnp,
        "params": {"encoder": encoder, "head": {"kernel": jnp.ones((2, 3))}},
        "pretrained": {"encoder": encoder},
        "batch": jnp.ones((5, 4)),
        "loss": lambda p, x: jnp.sum(
            (x @ p["encoder"]["kernel"] + p["encoder"]["bias"]) @ p["head"]["kernel"]
        ),
        "folder": tmp_path,
    }
    names["encode"] = lambda p, x: x @ p["kernel"] + p["bias"]
    names["old_loss"] = lambda p, x: jnp.sum(names["encode"](p, x) ** 2)
    names["old_batches"] = names["new_batches"] = [jnp.ones((5, 4))]
    assert len(BLOCKS) == 14
    for block in BLOCKS:
        assert len([line for line in block.splitlines() if line.strip()]) <= 10
        exec(block, names)
    np.testing.assert_array_equal(names["saved"]["state"].mu.weight, names["state"].mu.weight)


def optax_expectations():
    """optax's tests of its contributed optimizers, of the installed version, with ours in their lists."""
    path = Path(importlib.util.find_spec("optax").origin).parent / "contrib" / "_common_test.py"
    tree = ast.parse(path.read_text(encoding="utf-8"))
    lists = {"_MAIN_OPTIMIZERS_UNDER_TEST", "_OTHER_OPTIMIZERS_UNDER_TEST", "_ALL_OPTIMIZERS_UNDER_TEST"}
    first = next(i for i, node in enumerate(tree.body) if _assigned(node) & lists)
    kept = [
        x for x in tree.body if not isinstance(x, ast.For) and not _assigned(x) & {*lists, "_BASE_OPTIMIZERS"}
    ]
    module = ModuleType("optax_expectations")
    module.OURS = tuple(_ours())
    tree.body = [
        *kept[:first],
        *ast.parse("; ".join(f"{name} = OURS" for name in sorted(lists))).body,
        *kept[first:],
    ]
    exec(compile(tree, path, "exec"), module.__dict__)
    module.contrib = Contrib(module.contrib)
    return module.ContribTest


def _assigned(node):
    targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
    return {x.id for x in targets if isinstance(x, ast.Name)}


def _ours():
    settings = {"gamma": 10.0, "annealing": Linear(t0=100)}
    for form in ("decoupled", "released", "proximal"):
        kwargs = {"learning_rate": 1e-2, "form": form, **settings}
        yield {"opt_name": "recadam", "opt_kwargs": kwargs, "wrapper_name": None, "wrapper_kwargs": None}
    for wrapper, rate, more in (
        ("mechanize", 1.0, {"weight_decay": 0.0}),
        ("schedule_free", 1e-2, {"learning_rate": 1e-2}),
    ):
        kwargs = {"learning_rate": rate, **settings, "gamma": 1.0}
        yield {"opt_name": "recadam", "opt_kwargs": kwargs, "wrapper_name": wrapper, "wrapper_kwargs": more}


class Contrib:
    """optax.contrib with recadam in it, whose learning rate is annotated as optax's are, not as text."""

    def __init__(self, module):
        self._module = module

    def __getattr__(self, name):
        return getattr(self._module, name)

    @staticmethod
    def recadam(*args, **kwargs):
        return recadam(*args, **kwargs)


_signature = inspect.signature(recadam)
Contrib.recadam.__signature__ = _signature.replace(
    parameters=[
        x.replace(annotation=optax.ScalarOrSchedule) if x.name == "learning_rate" else x
        for x in _signature.parameters.values()
    ]
)

TestWhatOptaxAsksOfItsOwn = pytest.mark.heavy(optax_expectations())


def test_optax_asks_that_much():
    asked = [x for x in dir(TestWhatOptaxAsksOfItsOwn) if x.startswith("test")]
    assert len(asked) > 70
