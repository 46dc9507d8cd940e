"""Pages and pictures on disk, whole or absent: one template and one table for all of them."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from recadam_core.figures import COLOURS

from .folders import Folder

__all__ = ["Table", "markdown_table", "picture_of", "write_page", "write_picture"]

Table = tuple[Sequence[str], list[list[str]]]
"""A head, and rows of as many cells."""


def write_page(folder: Folder, name: str, template: str, **values: Any) -> Path:
    """Fill in a template of this package."""
    from jinja2 import Environment, PackageLoader

    environment = Environment(loader=PackageLoader("recadam_harness"), autoescape=True)
    page = environment.get_template(template).render(colours=COLOURS, **values)
    folder.write(name, page.encode(errors="backslashreplace"))
    return folder.path / name


def write_picture(folder: Folder, name: str, figure: Any, dpi: int = 150) -> bytes:
    """Write a figure as PNG; what is in the file."""
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=dpi)
    folder.write(name, picture.getvalue())
    return picture.getvalue()


def picture_of(folder: Folder, name: str, figure: Any) -> tuple[str, str]:
    """Write a figure; its name, and what a page has of it."""
    return name, base64.b64encode(write_picture(folder, name, figure, dpi=130)).decode()


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """The lines of a table in Markdown."""
    lines = ["| " + " | ".join(row) + " |" for row in (head, *rows)]
    return [lines[0], "|---" * len(head) + "|", *lines[1:]]
