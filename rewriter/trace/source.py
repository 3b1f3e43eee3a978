"""Where graph nodes and exceptions come from in the user's own files."""

from __future__ import annotations

import ast
import linecache
import os
import re
import traceback
from functools import lru_cache

import torch
from torch import fx

from rewriter.errors import Site
from rewriter.ir import Origin

_FRAME = re.compile(r'File "([^"]+)", line (\d+), in (\S+)')
_TORCH = os.path.dirname(torch.__file__)
_FX = os.path.join(_TORCH, "fx", "")
_OURS = os.path.dirname(os.path.dirname(__file__))


def is_user_file(file: str) -> bool:
    return not (file.startswith((_TORCH, _OURS, "<")) or file.startswith("torch/"))


def user_site(error: BaseException) -> Site | None:
    """The deepest frame of an exception that is in the user's code."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if is_user_file(f.filename)]
    frames += [
        type("Frame", (), {"filename": m[1], "lineno": int(m[2])})
        for m in _FRAME.finditer(str(error))
        if is_user_file(m[1])
    ]
    return Site(frames[-1].filename, frames[-1].lineno) if frames else None


def origin_of(node: fx.Node) -> Origin:
    """The user's line that made this node, with the variable it is assigned to."""
    frames = [m for m in _FRAME.finditer(node.meta.get("stack_trace") or "") if is_user_file(m[1])]
    if not frames:
        return Origin()
    file, line = frames[-1][1], int(frames[-1][2])
    start, end, _ = statement_at(file, line)
    return Origin(file, line, linecache.getline(file, line).strip(), "")


@lru_cache(maxsize=64)
def _statements(file: str) -> dict[int, tuple[int, int, tuple[str, ...]]]:
    """For each line of a file: (first line, last line, assigned names) of the innermost statement on it."""
    try:
        tree = ast.parse("".join(linecache.getlines(file)))
    except SyntaxError:
        return {}
    out: dict[int, tuple[int, int, tuple[str, ...]]] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.stmt) and not isinstance(node, (ast.FunctionDef, ast.ClassDef, ast.If, ast.For)):
            for line in range(node.lineno, (node.end_lineno or node.lineno) + 1):
                out[line] = (node.lineno, node.end_lineno or node.lineno, _targets(node))
    return out


def _targets(node: ast.stmt) -> tuple[str, ...]:
    targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
    names: list[str] = []
    for target in targets[-1:]:
        elements = target.elts if isinstance(target, (ast.Tuple, ast.List)) else [target]
        names += [e.id if isinstance(e, ast.Name) else "" for e in elements]
    return tuple(names) if any(names) else ()


def statement_at(file: str, line: int) -> tuple[int, int, tuple[str, ...]]:
    """(first line, last line, names assigned) of the statement at a line."""
    return _statements(file).get(line, (line, line, ()))


def user_names(graph: fx.Graph) -> dict[fx.Node, str]:
    """The user's variable for each node that leaves the statement which made it.

    `q, k, v = qkv.unbind(0)` names three nodes in order; what a statement keeps to itself has no name. A statement of a
    layer is one for each layer that has it.
    """
    where = {n: (key, _module_of(n)) if (key := statement_key(n)) else None for n in graph.nodes}
    leaving: dict[tuple, list[fx.Node]] = {}
    for node in graph.nodes:
        key = where[node]
        if key and node.op == "call_function" and any(where[u] != key for u in node.users):
            leaving.setdefault(key, []).append(node)
    names: dict[fx.Node, str] = {}
    for ((file, first, _), _), nodes in leaving.items():
        targets = statement_at(file, first)[2]
        if len(targets) == 1:
            names[nodes[-1]] = targets[0]
        elif len(targets) == len(nodes):
            names.update({n: t for n, t in zip(nodes, targets) if t})
    return names


def _module_of(node: fx.Node) -> str:
    """The path of the innermost module whose forward made a node."""
    stack = node.meta.get("nn_module_stack") or {"": ("", None)}
    return list(stack.values())[-1][0]


def statement_key(node: fx.Node, outside: str = "") -> tuple | None:
    """The statement (file, first line) and the calls above it that made a node; `outside` a submodule: its call's."""
    stack = list(_FRAME.finditer(node.meta.get("stack_trace") or ""))
    if outside:
        stack = stack[: _start_of(outside, node, stack)]
    frames = [m for m in stack if is_user_file(m[1])]
    if not frames:
        return None
    file, line = frames[-1][1], int(frames[-1][2])
    above = tuple((m[1], m[2]) for m in frames[:-1])
    return (file, statement_at(file, line)[0], above)


def modules_of(node: fx.Node) -> list[str]:
    """Paths of the modules around a node, from the outermost; export numbers the later calls of one: `attn@1`."""
    stack = node.meta.get("nn_module_stack") or {}
    return [re.sub(r"@\d+", "", path) for path, _ in stack.values()]


def _start_of(module: str, node: fx.Node, stack: list[re.Match]) -> int:
    """Which frame is the call of a module around a node: the tracer leaves one for each that is called in it, too."""
    paths = modules_of(node)
    inner = len(paths) - paths.index(module) if module in paths else 0
    calls = [k for k, frame in enumerate(stack) if frame[1].startswith(_FX)]
    return calls[-inner] if 0 < inner <= len(calls) else 0
