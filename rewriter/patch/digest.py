"""A hash of a program's code. An emitted `module.py` holds these functions too, and applies itself to nothing else."""

from __future__ import annotations

import hashlib
import inspect


def code_digest(program):
    """Of a function, or of what a class and its bases define; special methods and torch's own classes left out."""
    kinds = [k for k in getattr(program, "__mro__", ()) if k.__module__.split(".")[0] not in ("torch", "builtins")]
    members = [m for k in kinds for name, m in vars(k).items() if not name.startswith("__")]
    return hashlib.sha256("".join(map(_text, members or [program])).encode()).hexdigest()[:12]


def _text(member):
    function = inspect.unwrap(getattr(member, "fget", getattr(member, "__func__", member)))
    try:
        return inspect.getsource(function)
    except (OSError, TypeError):  # a plain value, or code whose text is nowhere
        code = getattr(function, "__code__", None)
        return code.co_code.hex() if code else repr(member) if isinstance(member, (int, float, str, tuple)) else ""
