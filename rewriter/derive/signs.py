"""What is known of a number's sign, NaN aside: a maximum may be scaled by what is positive."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from rewriter.derive.chain import Definition
from rewriter.derive.exponentials import is_nan_if_empty
from rewriter.ir import Apply, Const, Node, Param, Ref, Where


@dataclass(frozen=True)
class Signs:
    """`definition` gives what a ref stands for."""

    definition: Callable[[Ref], Definition]

    def is_positive(self, node: Node) -> bool:
        match node:
            case Const():
                return node.value > 0
            case Apply(op="exp" | "exp2"):
                return True
            case Apply(op="cast" | "sqrt" | "rsqrt"):  # a half, as a whole number, is none
                return node.dtype.is_floating_point and self.is_positive(node.args[0])
            case Apply(op="mul" | "div"):
                return all(map(self.is_positive, node.args))
            case Apply(op="add"):
                return all(map(self.is_nonnegative, node.args)) and any(map(self.is_positive, node.args))
            case Apply(op="maximum"):
                return any(map(self.is_positive, node.args))
        return False

    def is_nonnegative(self, node: Node) -> bool:
        match node:
            case Apply(op="abs" | "sqrt"):
                return True
            case Apply(op="mul"):
                return node.args[0] is node.args[1] or all(map(self.is_nonnegative, node.args))
            case Apply(op="cast"):
                return self.is_nonnegative(node.args[0])
            case Apply(op="add" | "div"):
                return all(map(self.is_nonnegative, node.args))
            case Apply(op="maximum"):
                return any(map(self.is_nonnegative, node.args))
            case Where():
                return self.is_nonnegative(node.other) and (is_nan_if_empty(node) or self.is_nonnegative(node.then))
            case Ref():
                return self._is_nonnegative_sum(self.definition(node))
            case Param():  # a size
                return True
            case Const():
                return node.value >= 0
        return self.is_positive(node)

    def _is_nonnegative_sum(self, definition: Definition) -> bool:
        """Squares about a mean, or factors of which none is negative; exponentials are none."""
        if definition.op != "sum":
            return False
        if definition.centre:
            return definition.centre.first is not None
        return definition.shift is None and self.is_nonnegative(definition.body)
