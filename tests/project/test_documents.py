"""What README and docs say is what their sources say: a table that is copied is the table, row for row."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path

import pytest

pytest.importorskip("mpmath")

from recadam_core import get_backend
from recadam_core.conformance.run import plan

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
BACKENDS = ("jax", "numpy", "torch")

pytestmark = [pytest.mark.tree, pytest.mark.needs("torch", "jax")]


def read(name):
    return (ROOT / name).read_text(encoding="utf-8").replace("&nbsp;", " ")


def table(name, head, last=False):
    """Rows of the table whose first line starts so, without that line, as lists of cells."""
    text = read(name)
    lines = text[(text.rindex if last else text.index)(f"\n{head}") + 1 :].splitlines()
    rows = []
    for line in lines[2:]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in line.strip("|").split(" | ")])
    assert rows
    return rows


def numbers(text):
    return [float(x) for x in re.findall(r"[+-]?\d+(?:\.\d+)?(?:e-?\d+)?", text.replace("−", "-"))]


def test_readme_has_the_conformance_table_of_its_page():
    head = "| claim | cases | bound"
    assert table("README.md", head) == table("docs/conformance.md", head)


def test_the_conformance_table_has_every_claim_of_the_kit_with_its_number_of_cases():
    expected = {}
    for job in plan([get_backend(name) for name in BACKENDS], golden=ROOT / "tests" / "golden"):
        for _, claim in job.claims:
            _, backends = expected.get(claim.name, (0, set()))
            expected[claim.name] = len(claim.cases), backends | {job.backend}
    written = {
        row[0]: (int(row[1]), {name for name, cell in zip(BACKENDS, row[3:], strict=True) if cell})
        for row in table("docs/conformance.md", "| claim | cases | bound")
    }
    assert written == expected


def test_readme_counts_the_ways_to_take_a_step():
    ways = sum(len(get_backend(name).capabilities.variants) for name in BACKENDS)
    words = {12: "twelve", 13: "thirteen", 14: "fourteen", 15: "fifteen", 16: "sixteen"}
    assert f"every way to take a step, {words[ways - 1]} beside\nthe specification" in read("README.md")


def test_readme_has_rows_of_the_benchmarks_table():
    page = read("docs/benchmarks.md")
    section = read("README.md").split("## How fast")[1].split("\n## ")[0]
    rows = [line for line in section.splitlines() if line.startswith("|")]
    assert len(rows) > 20
    assert [row for row in rows if row not in page] == []
    assert (
        re.search(r"^.*; torch .*\.\n.* parameters in the shapes of BERT-base\.$", section, re.M)[0] in page
    )


def test_benchmark_targets_hold_or_are_missed_as_their_figures_say():
    rows = table("docs/benchmarks.md", "| target | measured | at most")
    assert [row[3].strip(" |") for row in rows] == [
        "holds" if float(row[1]) <= float(row[2]) else "missed" for row in rows
    ]
    steps = {row[0]: row[3].split()[0] for row in table("docs/benchmarks.md", "| step | | ms | over torch")}
    named = {row[0].removesuffix(" over torch AdamW fused").strip(","): row[1] for row in rows}
    for name in ("", ", bfloat16 anchors", ", anchors freed", ", importance"):
        assert named[f"RecAdam{name}"] == steps[f"RecAdam{name}"]
    assert named["NumPy in place"] == steps["NumPy in place"]


def summary(folder):
    """Accuracy, over AdamW, and what is kept, of each method in an experiment's table."""
    rows = table(f"docs/experiments/{folder}/summary.md", "|  | settings | target accuracy")
    return {row[0]: (row[2], row[3], row[5], row[7]) for row in rows}


def test_readme_has_the_figures_of_the_comparisons():
    both = summary("comparison"), summary("comparison-l6")
    rows = table("README.md", "| | `minilm-l3`: accuracy")
    for name, *cells in rows:
        expected = []
        for found in both:
            accuracy, over, kept, by_titles = found[name]
            peer = name == "AdamW"
            expected += [
                accuracy if peer else accuracy.split()[0],
                "" if peer else over,
                f"{kept} ({by_titles})",
            ]
        assert cells == expected, name


CHOICES = {
    "first": [
        "feature-weighted pull from a probed head, most accurate",
        "feature-weighted pull from a probed head",
        "EWC from a probed head, most accurate",
        "AdamW from a probed head",
    ],
    "otherwise": [
        "EWC",
        "feature-weighted pull",
        "constant pull (L2-SP)",
        "LoRA",
        "multi-task, with source data",
    ],
}


@pytest.mark.parametrize("which", CHOICES)
def test_advice_has_the_figures_of_the_comparisons(which):
    rows = table("docs/choosing.md", "| you have | choose", last=which == "otherwise")
    both = summary("comparison"), summary("comparison-l6")
    for row, arm in zip(rows, CHOICES[which], strict=True):
        over, kept, by_titles = zip(*(found[arm][1:] for found in both), strict=True)
        assert numbers(row[2]) == pytest.approx([100 * numbers(x)[0] for x in over]), arm
        assert numbers(row[3].strip(" |")) == [numbers(x)[0] for x in (*kept, *by_titles)], arm


def test_readme_and_the_page_on_trajectories_say_the_same_of_the_demo():
    short = table("README.md", "| task | steps | against | bound | weights apart")
    names = {"PyTorch": "torch", "JAX": "jax", "NumPy": "numpy"}
    found = []
    for what, steps, against, _, apart, same in short:
        task, *dtype, backends, method = what.split(", ")
        assert dtype in (["float64"], ["float32"])
        for backend in backends.split(" and "):
            same_of, rows = map(int, same.strip(" |").split(" of "))
            who = f"{task}, {names[backend]}, {method}"
            found.append((who, names[against], steps, numbers(apart), [100 * same_of / rows, rows]))
    long = table("docs/trajectories.md", "| run | against | steps")
    assert sorted(found) == sorted(
        (who, against, steps, numbers(apart), numbers(same)) for who, against, steps, apart, same in long
    )


def mutations():
    spec = importlib.util.spec_from_file_location("mutants", ROOT / "tests" / "core" / "mutants.py")
    module = sys.modules.setdefault("mutants", importlib.util.module_from_spec(spec))
    if not hasattr(module, "MUTATIONS"):
        spec.loader.exec_module(module)
    return module.MUTATIONS


def test_the_page_on_claims_counts_the_mutations():
    assert f"Of {len(mutations())} small changes" in read("docs/conformance.md")


def test_the_formula_stands_once_and_the_page_lists_who_runs_it():
    listed = {row[0].strip("`").removesuffix(".py").replace("/", ".") for row in kernels_listed()}
    folders = ("recadam_core", "recadam_harness", "backends")
    sources = {path: path.read_text(encoding="utf-8") for f in folders for path in (ROOT / f).rglob("*.py")}
    assert [path.name for path, text in sources.items() if re.search(r"^def formula\(", text, re.M)] == [
        "update.py"
    ]
    running = {path for path, text in sources.items() if re.search(r"\bformula\(|\(formula\b", text)}
    names = {".".join(p.relative_to(ROOT).with_suffix("").parts).removeprefix("backends.") for p in running}
    assert names == listed
    assert listed <= {m.module for m in mutations()}


def kernels_listed():
    return [
        [cell.replace("recadam_core.update", "recadam_core/update.py") for cell in row]
        for row in table("docs/design.md", "| who runs it | on |")
    ]


def test_documents_name_functions_and_not_lines():
    for page in PAGES:
        assert re.findall(r"\w+\.py:\d+|\.py,? lines? \d+", page.read_text(encoding="utf-8")) == [], page.name


@pytest.mark.parametrize(
    "page", ["README.md", *(f"docs/{x}.md" for x in ("choosing", "experiments", "pytorch", "jax"))]
)
def test_where_feature_importance_is_advised_its_source_is_cited(page):
    assert "arxiv.org/abs/1711.09601" in read(page)


@pytest.mark.parametrize(("name", "able"), [("jax", True), ("numpy", False), ("torch", True)])
def test_sharding_is_declared_where_it_is_tested(name, able):
    assert get_backend(name).capabilities.sharding is able


def test_the_campaign_ran_enough_and_counted_nothing():
    text = (ROOT / "docs" / "robustness.md").read_text(encoding="utf-8")
    asked = {name: int(n) for name, n in re.findall(r"--(\w+) (\d+)", text)}
    rows = [
        [cell.strip() for cell in x.strip("|").split("|")] for x in text.splitlines() if x.startswith("| ")
    ]
    assert [int(row[1].replace(",", "")) for row in rows[2:]] == list(asked.values())
    assert min(asked["damages"], asked["lines"]) >= 1000
    assert min(asked["kills"], asked["pairs"]) >= 200
    assert [row[3:] for row in rows] == [["tracebacks", "silent passes", "lost files"], ["---"] * 3] + [
        ["0"] * 3 for _ in asked
    ]
