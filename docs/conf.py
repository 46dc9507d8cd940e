"""Sphinx configuration."""

from __future__ import annotations

import re

import latex2mathml.converter
from docutils import nodes

import recadam_core

project = "recadam-core"
author = "The recadam-core authors"
copyright = "2026, the recadam-core authors"
version = release = recadam_core.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
]
exclude_patterns = ["_build", "experiments/*/*"]
html_theme = "furo"
html_title = f"recadam-core {version}"
html_math_renderer = "mathml"
html_static_path = ["_static"]
html_css_files = ["pages.css"]

myst_enable_extensions = ["dollarmath", "colon_fence", "deflist"]
myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_typehints = "none"
autodoc_default_options = {"members": True, "show-inheritance": False}
napoleon_google_docstring = True
napoleon_custom_sections = ["Math", "Source", ("Warns", "params_style")]

CODE = re.compile(r"(?<![`:])`([^`]+)`(?!`)")
MATH = re.compile(r"\$([^$]+)\$")


def docstring_to_rst(app, what, name, obj, options, lines):
    """Docstrings are written for a reader of the source: Markdown's code, $math$ and tables."""
    out: list[str] = []
    for line in lines:
        if not line.lstrip().startswith(">>>"):
            line = MATH.sub(r":math:`\1`", CODE.sub(r"``\1``", line))
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        indent = line[: len(line) - len(line.lstrip())]
        if not line.strip().startswith("|"):
            out.append(line)
        elif set("".join(cells)) <= set("-: "):
            continue
        else:
            if not out or not out[-1].lstrip().startswith(("* -", "-")):
                out += [f"{indent}.. list-table::", f"{indent}   :header-rows: 1", ""]
            out.append(f"{indent}   * - {cells[0]}")
            out += [f"{indent}     - {cell}" for cell in cells[1:]]
    lines[:] = out


def visit_inline_math(translator, node):
    """Math as MathML, which browsers draw themselves: no script, no network."""
    translator.body.append(latex2mathml.converter.convert(node.astext()))
    raise nodes.SkipNode


def visit_math_block(translator, node):
    translator.body.append(latex2mathml.converter.convert(node.astext(), display="block"))
    raise nodes.SkipNode


def setup(app):
    app.add_html_math_renderer("mathml", (visit_inline_math, None), (visit_math_block, None))
    app.connect("autodoc-process-docstring", docstring_to_rst, priority=400)
