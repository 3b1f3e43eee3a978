"""Jinja and black: text out of decisions already made."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import black
import jinja2

LINE_LENGTH = 110


@lru_cache(maxsize=1)
def _environment() -> jinja2.Environment:
    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(_templates()),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )


def _templates() -> Path:
    """The folder beside setup.cfg in a checkout, the package data of an installed wheel otherwise."""
    beside = Path(__file__).resolve().parents[2] / "templates"
    if (beside / "kernel.py.jinja").exists():
        return beside
    import importlib.resources

    return Path(str(importlib.resources.files("rewriter.templates")))


@lru_cache(maxsize=1)
def helper_names() -> frozenset[str]:
    """The functions that a kernel file may define beside its kernels: a template each."""
    return frozenset(path.name.split(".")[0] for path in (_templates() / "helpers").iterdir())


def render(template: str, **values: object) -> str:
    """A template as text; Python files are formatted by black."""
    text = _environment().get_template(template).render(**values)
    if not template.endswith(".py.jinja"):
        return text
    return black.format_str(text, mode=black.Mode(line_length=LINE_LENGTH))
