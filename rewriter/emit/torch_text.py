"""Prints graph nodes as the PyTorch a person would write: `x.transpose(1, 2)`, `a @ b`, `torch.softmax(s, dim=-1)`."""

from __future__ import annotations

import inspect
import keyword
import math
import re
from collections.abc import Callable
from typing import Any

import torch
from torch import fx
from torch._ops import HigherOrderOperator
from torch.export.graph_signature import CustomObjArgument
from torch.utils import _pytree as pytree

from rewriter.emit.spelling import does_the_same
from rewriter.errors import RewriteError
from rewriter.ir import Node, Param, walk
from rewriter.ir.printer import show
from rewriter.trace.calls import FILLS, call_name, reads_shape_only
from rewriter.trace.sizes import UnknownSize, number_text, size_node, sizes_in

_INFIX = {
    "add": "+",
    "sub": "-",
    "mul": "*",
    "div": "/",
    "matmul": "@",
    "eq": "==",
    "ne": "!=",
    "lt": "<",
    "le": "<=",
}
_INFIX |= {"gt": ">", "ge": ">=", "__and__": "&", "__or__": "|", "bitwise_and": "&", "bitwise_or": "|"}
_FUNCTIONAL = {
    "scaled_dot_product_attention",
    "linear",
    "silu",
    "gelu",
    "softplus",
    "elu",
    "leaky_relu",
    "pad",
}
_FUNCTIONAL |= {"layer_norm", "rms_norm", "group_norm", "relu6", "hardtanh", "mish"}
_UNSAID = {"layout", "pin_memory", "memory_format"}


_UNPACKED = {"view", "reshape", "permute", "expand", "repeat"}  # view(a, b) as people write it, not view([a, b])
INLINE = 64  # elements of a constant that is written into the source


class TorchPrinter:
    """Prints calls; `name_of` gives the variable of a tensor node, sizes print through `size_name`."""

    def __init__(self, name_of: Callable[[fx.Node], str], size_name: Callable[[Param], str], device: str):
        self.name_of, self.size_name, self.device = name_of, size_name, device

    def call(self, node: fx.Node) -> str:
        """The right-hand side of an assignment for one call."""
        if node.target.__name__ == "getitem":
            return f"{self.value(node.args[0])}[{node.args[1]}]"
        if isinstance(node.target, HigherOrderOperator):
            raise RewriteError(f"{node.target} takes parts of the program, which cannot be written down")
        if not isinstance(node.target, torch._ops.OpOverload):
            return f"{node.target.__module__}.{node.target.__name__}({self.arguments(node.args, node.kwargs)})"
        if reads_shape_only(node):
            return self._filled(node)
        name = node.target._schema.name.split("::")[1]
        special = self._to_copy if name == "_to_copy" else getattr(self, f"_{name}", None)
        return special(node) if special else self._generic(node, name)

    def is_infix(self, node: fx.Node) -> bool:
        """Whether the text of a call needs parentheses as an operand."""
        if not isinstance(node.target, torch._ops.OpOverload):
            return False
        return node.target._schema.name.split("::")[1] in _INFIX and len(node.args) == 2 and not self.said(node)

    def _generic(self, node: fx.Node, name: str) -> str:
        if self.is_infix(node):
            left, right = map(self._operand, node.args)
            return f"{left} {_INFIX[name]} {right}"
        plain = _Plain(node)
        for spelled in (_functional, _property, _method, _function):
            if (text := spelled(plain, node, name)) and does_the_same(node, text):
                return spelled(self, node, name)
        return f"torch.ops.{node.target.namespace}.{name}.{node.target._overloadname}({self.arguments(node.args, node.kwargs)})"

    def _operand(self, value: Any) -> str:
        """x - (length - 1)"""
        held = value.meta.get("val") if isinstance(value, fx.Node) else value
        text = self.value(value)
        return f"({text})" if isinstance(held, torch.SymInt) and not re.fullmatch(r"\w+", text) else text

    def said(self, node: fx.Node) -> dict[str, Any]:
        """The keyword arguments that matter."""
        return {k: v for k, v in node.kwargs.items() if k not in _UNSAID and v is not None}

    def _filled(self, node: fx.Node) -> str:
        value = FILLS[call_name(node)] or self.value(node.args[-1] if len(node.args) > 1 else node.kwargs["fill_value"])
        held = node.meta["val"]
        shape = f"({', '.join(map(self.size, held.shape))}{',' * (held.dim() == 1)})"
        return f"torch.full({shape}, {value}, dtype={held.dtype}, device={self.device})"

    def _type_as(self, node: fx.Node) -> str:
        return f"{self.value(node.args[0])}.to({node.meta['val'].dtype})"

    def _expand_as(self, node: fx.Node) -> str:
        return f"{self.value(node.args[0])}.expand({self._shape(node)})"

    def _view_as(self, node: fx.Node) -> str:
        return f"{self.value(node.args[0])}.reshape({self._shape(node)})"

    _reshape_as = _view_as

    def _clone(self, node: fx.Node) -> str:
        """A copy that is asked to be contiguous says so: a view may follow."""
        asked = node.kwargs.get("memory_format") is torch.contiguous_format
        return f"{self.value(node.args[0])}.{'contiguous' if asked else 'clone'}()"

    def _to_copy(self, node: fx.Node) -> str:
        return self._type_as(node)

    def _contiguous(self, node: fx.Node) -> str:
        """Of a value without data it can't be told from none."""
        return f"{self._operand(node.args[0])}.contiguous({self.arguments((), node.kwargs)})"

    def _rsub(self, node: fx.Node) -> str:
        return f"({self.value(node.args[1])} - {self.value(node.args[0])})"

    def _shape(self, node: fx.Node) -> str:
        return ", ".join(map(self.size, node.meta["val"].shape))

    def _mT(self, node: fx.Node) -> str:
        return f"{self.value(node.args[0])}.mT"

    def _numpy_T(self, node: fx.Node) -> str:
        return f"{self.value(node.args[0])}.T"

    def _slice(self, node: fx.Node) -> str:
        tensor, dim, start, end, step = (*node.args, *(None, None, None, None))[:5]
        rank = node.meta["val"].dim()
        dim = (dim or 0) % rank
        last = None if isinstance(end, int) and end >= 2**62 else end
        first = None if isinstance(start, int) and start == 0 else start
        text = f"{'' if first is None else self.value(first)}:{'' if last is None else self.value(last)}"
        if text == ":" and step in (None, 1):
            return self.value(tensor)
        text += "" if step in (None, 1) else f":{self.value(step)}"
        return f"{self.value(tensor)}[{', '.join([':'] * dim + [text])}]"

    def _select(self, node: fx.Node) -> str:
        tensor, dim, at = node.args
        dim = dim % node.args[0].meta["val"].dim()
        return f"{self.value(tensor)}[{', '.join([':'] * dim + [self.value(at)])}]"

    def _index(self, node: fx.Node) -> str:
        entries = [":" if i is None else self.value(i) for i in node.args[1]]
        return f"{self.value(node.args[0])}[{', '.join(entries)}]"

    def _index_put(self, node: fx.Node) -> str:
        """torch.index_put takes no None among the indices, the op itself does."""
        return f"torch.ops.aten.index_put.default({self.arguments(node.args, node.kwargs)})"

    def arguments(self, args: tuple, kwargs: dict[str, Any]) -> str:
        return ", ".join([*map(self.value, args), *(f"{k}={self.value(v)}" for k, v in kwargs.items())])

    def value(self, value: Any) -> str:
        """Any argument of a call as source text."""
        if isinstance(value, fx.Node):
            held = value.meta.get("val")
            if "constant" in value.meta:
                return self.constant(value.meta["constant"])
            return self.name_of(value) if torch.is_tensor(held) or isinstance(held, (tuple, list)) else self.value(held)
        if isinstance(value, torch.SymInt):
            return self.size(value)
        if isinstance(value, torch.SymFloat):
            return self.number(value)
        if isinstance(value, (tuple, list)):
            inner = ", ".join(map(self.value, value))
            return f"[{inner}]" if isinstance(value, list) else f"({inner}{',' * (len(value) == 1)})"
        if isinstance(value, torch.device):
            return self.device
        if isinstance(value, CustomObjArgument):
            raise RewriteError(f"forward makes a {value.class_fqn.split('.')[-1]}, which cannot be written down")
        if isinstance(value, float) and not math.isfinite(value):
            return f'float("{value}")'
        return str(value) if isinstance(value, (torch.dtype, torch.memory_format, torch.layout)) else repr(value)

    def constant(self, value: torch.Tensor) -> str:
        """A tensor the program makes from numbers, or finds around it. Raises RewriteError where it is too long to write
        down.
        """
        if value.numel() > INLINE:
            what = f"a tensor of {value.numel()} elements that is neither an argument nor a parameter or buffer"
            raise RewriteError(f"{what}: pass it to forward, or register it as a buffer")
        text = re.sub(r"(-?)\b(inf|nan)\b", r'float("\1\2")', str(value.tolist()))
        return f"torch.tensor({text}, dtype={value.dtype}, device={self.device})"

    def size(self, value: torch.SymInt | int) -> str:
        if isinstance(value, int):
            return str(value)
        try:
            return self.size_node(size_node(value))
        except UnknownSize:  # of no form that an index has
            return self.number(value)

    def number(self, value: torch.SymInt | torch.SymFloat) -> str:
        """A number made from sizes: `length**0.5`"""
        return f"({number_text(value, {p.name: self.size_name(p) for p in sizes_in(value)})})"

    def size_node(self, node: Node) -> str:
        """An integer node as Python, sizes by their variables."""
        text = show(node)
        for param in (n for n in walk(node) if isinstance(n, Param)):
            text = _replace_word(text, param.name, self.size_name(param))
        return text


class _Plain(TorchPrinter):
    """Prints one call with operands and sizes by their names in the graph."""

    def __init__(self, node: fx.Node):
        device = next((t.device for t in pytree.tree_leaves(node.meta.get("val")) if torch.is_tensor(t)), "cpu")
        super().__init__(lambda n: n.name, lambda p: p.name, f'torch.device("{device}")')

    def value(self, value: Any) -> str:
        return value.name if isinstance(value, fx.Node) and "constant" in value.meta else super().value(value)


def _functional(printer: TorchPrinter, node: fx.Node, name: str) -> str:
    """`torch.nn.functional.gelu(x, approximate="tanh")`: what follows the tensors is named, as F's own signature does
    where the schema agrees.
    """
    if name not in _FUNCTIONAL:
        return ""
    arguments = [printer.value(a) for a in node.args]
    schema = [a.name for a in node.target._schema.arguments]
    known = list(_parameters(getattr(torch.nn.functional, name)))
    for k, parameter in enumerate(schema[: len(arguments)]):
        named = any("=" in a.split("(")[0] for a in arguments[:k])
        if k > 0 and parameter in known and (named or not isinstance(node.args[k], fx.Node)):
            arguments[k] = f"{parameter}={arguments[k]}"
    if known and len(schema) > len(known):
        arguments = arguments[: len(known)]
    keywords = (f"{k}={printer.value(v)}" for k, v in printer.said(node).items())
    return f"torch.nn.functional.{name}({', '.join([*arguments, *keywords])})"


def _property(printer: TorchPrinter, node: fx.Node, name: str) -> str:
    """`x.real`"""
    is_property = not callable(getattr(torch.Tensor, name, print))
    return f"{printer.value(node.args[0])}.{name}" if is_property and _is_of_tensor(node) else ""


def _method(printer: TorchPrinter, node: fx.Node, name: str) -> str:
    """`x.sum(-1)`"""
    if not (_is_of_tensor(node) and callable(getattr(torch.Tensor, name, None))) or name.startswith("_"):
        return ""
    rest = node.args[1:]
    if name in _UNPACKED and len(rest) == 1 and isinstance(rest[0], (list, tuple)):
        rest = tuple(rest[0])
    return f"{printer.value(node.args[0])}.{name}({printer.arguments(rest, printer.said(node))})"


def _function(printer: TorchPrinter, node: fx.Node, name: str) -> str:
    """`torch.cat([a, b])`, `torch.block_diag(a, b)`"""
    function = None if name.startswith("_") else getattr(torch, name, None)
    if not callable(function):
        return ""
    first = next(iter(_parameters(function).values()), None)
    several = first is not None and first.kind is inspect.Parameter.VAR_POSITIONAL
    args = tuple(node.args[0]) if several and isinstance(node.args[0], (list, tuple)) else node.args
    return f"torch.{name}({printer.arguments(args, printer.said(node))})"


def _is_of_tensor(node: fx.Node) -> bool:
    arguments = node.target._schema.arguments
    is_tensor = bool(node.args) and isinstance(node.args[0], fx.Node) and torch.is_tensor(node.args[0].meta.get("val"))
    return is_tensor and arguments[0].name == "self"


def _parameters(function: Callable) -> dict[str, inspect.Parameter]:
    try:
        return dict(inspect.signature(function).parameters)
    except ValueError:
        return {}


def _replace_word(text: str, old: str, new: str) -> str:
    return re.sub(rf"\b{re.escape(old)}\b", new, text)


class Variables:
    """Python variable names for graph nodes: the user's where known, never the same name for two live values."""

    def __init__(self, reserved: set[str]):
        self.taken = set(reserved)
        self.names: dict[fx.Node, str] = {}

    def of(self, node: fx.Node) -> str:
        return self.names[node]

    def assign(self, node: fx.Node, wanted: str) -> str:
        name, k = wanted, 2
        while name in self.taken or keyword.iskeyword(name) or not name.isidentifier():
            name, k = f"{wanted}_{k}" if wanted.isidentifier() else f"t_{k}", k + 1
        self.taken.add(name)
        self.names[node] = name
        return name

    def adopt(self, node: fx.Node, text: str) -> None:
        """A node that is written as `text` (an attribute, an argument) wherever it is used."""
        self.names[node] = text
