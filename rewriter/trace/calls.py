"""Facts about ATen calls that several stages ask."""

from __future__ import annotations

from torch import fx

FILLS = {
    "zeros_like": "0",
    "ones_like": "1",
    "new_zeros": "0",
    "new_ones": "1",
    "full_like": "",
    "new_full": "",
}


def call_name(node: fx.Node) -> str:
    """The name of the ATen op without its overload, or of the Python function."""
    schema = getattr(node.target, "_schema", None)
    return schema.name.split("::")[1] if schema is not None else getattr(node.target, "__name__", "")


VIEWS = {
    "view",
    "reshape",
    "transpose",
    "permute",
    "unsqueeze",
    "squeeze",
    "expand",
    "t",
    "mT",
    "slice",
    "contiguous",
}
VIEWS |= {
    "clone",
    "detach",
    "alias",
    "unflatten",
    "flatten",
    "to",
    "_to_copy",
    "getitem",
    "movedim",
    "swapaxes",
    "select",
}
AS_OTHER = {"type_as", "expand_as", "view_as", "reshape_as"}


def value_inputs(node: fx.Node) -> list[fx.Node]:
    """The inputs whose values a call reads; of the others it takes the shape or type alone."""
    if reads_shape_only(node):
        return []
    return [node.args[0]] if call_name(node) in AS_OTHER else node.all_input_nodes


def reads_shape_only(node: fx.Node) -> bool:
    """A call that makes a tensor of constants like another tensor."""
    return node.op == "call_function" and call_name(node) in FILLS
