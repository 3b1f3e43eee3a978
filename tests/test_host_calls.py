"""Hosts and what they share with the rest of a model: sizes, masks, arguments, hooks, names, state."""

from __future__ import annotations

import copy

import pytest
import torch
from host_models import SIZES, Attn, Block, fused, hosts, r, right
from library_programs import close, said
from torch import nn

from rewriter import rewrite
from rewriter.errors import RewriteError


class Sized(nn.Module):
    """Tells its layer how long the input is, in a number."""

    def __init__(self):
        super().__init__()
        self.inner = Windows()

    def forward(self, x):
        return x + self.inner(x, x.shape[1])


class Windows(nn.Module):
    def forward(self, x, length):
        scores = x @ x.mT - torch.arange(length, device=x.device) * 0.1
        return scores.softmax(-1) @ x


def test_numbers_that_a_caller_computes_from_sizes_are_its_own():
    program = Sized().eval()
    result = fused(program, (r(2, 9, 8),))
    assert hosts(result) == {"Sized": []}
    for shape in SIZES:
        right(result, program, *shape, calls=1)


class Padded(nn.Module):
    """As transformers does: a mask of ones is none."""

    def __init__(self):
        super().__init__()
        self.attn = Attn(weights=False)

    def forward(self, x, keep):
        if bool(keep.all()):
            return self.attn(x)
        return self.attn(x, mask=torch.zeros(keep.shape).masked_fill(keep == 0, -1e9)[:, None])


@pytest.mark.parametrize("given", (0, 1))
def test_a_mask_that_is_dropped_where_it_says_nothing(given):
    torch.manual_seed(0)
    program = Padded().eval()
    masks = torch.ones(2, 9, dtype=torch.long), torch.ones(2, 9, dtype=torch.long)
    masks[1][0, 5:] = 0
    result = fused(program, (r(2, 9, 8), masks[given]))
    for mask in masks:
        with torch.no_grad(), said(kernels=1):
            close(result.module(r(2, 9, 8), mask), program(r(2, 9, 8), mask))


class Rms(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(8))

    def forward(self, hidden):
        wide = hidden.to(torch.float32)
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
        return self.weight * wide.to(hidden.dtype)


class Mlp(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, hidden):
        out = self.down(self.up(hidden).relu())
        return out


class Published(nn.Module):
    """As decoder layers are: the residual is what the norm has cast to the type that it is of."""

    def __init__(self):
        super().__init__()
        self.norm, self.attn, self.mlp = Rms(), Attn(), Mlp()

    def forward(self, x):
        residual = x
        h = self.norm(x)
        h, _ = self.attn(h)
        h = residual + h
        fed = self.mlp(h)
        return h + fed


def test_a_host_calls_its_submodules_by_the_users_names():
    program = nn.Sequential(Published()).eval()
    result = fused(program, (r(2, 9, 8),))
    text = result.sources["module.py"]
    for line in ("h = self.norm(x)", "= attn(", "fed = self.mlp(h_"):
        assert line in text, text
    assert "rsqrt" not in text and "relu" not in text
    right(result, program, 2, 7, 8, calls=1)


class Windowed(nn.Module):
    """Rows cut into three windows, each with a mask of its own: of a batch of one, the inner module is given as many
    windows as masks.
    """

    def __init__(self):
        super().__init__()
        self.inner = InWindows()

    def forward(self, x):
        windows = x.unflatten(1, (3, -1))
        length = windows.shape[2]
        mask = torch.zeros(3, length, length).masked_fill(torch.ones(3, length, length).triu(1) > 0, -100.0)
        return x + self.inner(windows.flatten(0, 1), mask).view(x.shape)


class InWindows(nn.Module):
    def forward(self, x, mask):
        scores = (x @ x.mT).unflatten(0, (-1, mask.shape[0])) + mask
        return scores.flatten(0, 1).softmax(-1) @ x


def test_sizes_that_are_equal_by_chance_are_told_apart():
    program = Windowed().eval()
    result = fused(program, (r(1, 12, 8),))
    assert hosts(result) == {"InWindows": ["inner"]}
    for shape in ((1, 12, 8), (2, 15, 8)):
        right(result, program, *shape, calls=1)


class Collects(nn.Module):
    """A list is handed to the layers, which put their weights in."""

    def __init__(self):
        super().__init__()
        self.layer = Puts()

    def forward(self, x):
        seen: list = []
        return self.layer(x, seen), seen


class Puts(nn.Module):
    def forward(self, x, seen):
        p = (x @ x.mT).softmax(-1)
        seen.append(p.sum(-2))
        return p @ x


def test_a_module_that_changes_its_arguments_is_its_callers():
    program = Collects().eval()
    result = fused(program, (r(2, 9, 8),))
    assert hosts(result) == {"Collects": []}
    with torch.no_grad(), said(kernels=1):
        (got, (seen,)), (wanted, (expected,)) = result.module(r(1, 5, 8)), program(r(1, 5, 8))
    close(got, wanted)
    close(seen, expected)


class Casts(nn.Module):
    def __init__(self):
        super().__init__()
        self.attn = Attn(weights=False)

    def forward(self, x):
        with torch.autocast("cpu", torch.bfloat16):
            return self.attn(x).float()


def test_a_module_that_is_called_under_autocast_is_its_callers():
    result = rewrite(Casts().eval(), (r(2, 9, 8),))
    assert hosts(result) == {"Casts": []}


def test_layers_of_torchs_own_are_no_hosts():
    """Every norm of a model would be swapped, whatever its width."""
    program = nn.Sequential(Block(0, weights=False), nn.LayerNorm(8)).eval()
    result = rewrite(program, (r(2, 9, 8),), rows=True)
    assert hosts(result) == {"Sequential": []}
    with torch.no_grad(), said(kernels=3):
        close(result.module(r(2, 7, 8)), program(r(2, 7, 8)))


class Plain(nn.Module):
    def __init__(self):
        super().__init__()
        self.q = nn.Linear(8, 8)

    def forward(self, x, again=0):
        y = (self.q(x) @ x.mT).softmax(-1) @ x
        return self(y, again - 1) if again else y


class Again(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = Plain()

    def forward(self, x):
        return self.inner(x, 1)


def test_a_host_that_calls_itself_returns_what_it_did():
    program = Again().eval()
    result = fused(program, (r(2, 9, 8),))
    for shape in SIZES:
        with torch.no_grad():
            close(result.module(r(*shape)), program(r(*shape)))


@pytest.mark.parametrize("is_root", (True, False))
def test_hooks_of_a_host_run_once(is_root):
    inner = Plain()
    inner.register_forward_pre_hook(lambda module, args: 2 * args[0])
    inner.register_forward_hook(lambda module, args, out: out + 1)
    program = (inner if is_root else nn.Sequential(inner)).eval()
    result = fused(program, (r(2, 9, 8),))
    for shape in SIZES:
        right(result, program, *shape, calls=1)


class Parent(nn.Module):
    """Its layer leaves something in it; or reads a number of it."""

    def __init__(self, branches: bool, writes: bool):
        super().__init__()
        self.branches, self.scale, self.last = branches, 2.0, None
        self.layer = Child(self, writes)

    def forward(self, x):
        y = self.layer(x)
        if self.branches and y.sum() > 1e9:
            return x
        return y if self.last is None else y + self.last[..., None]


class Child(nn.Module):
    def __init__(self, parent: nn.Module, writes: bool):
        super().__init__()
        self.parents, self.writes = [parent], writes

    def forward(self, x):
        p = (x @ x.mT * self.parents[0].scale).softmax(-1)
        if self.writes:
            self.parents[0].last = p.amax(-1)
        return p @ x


def test_a_module_that_reaches_its_caller_is_its_callers():
    with pytest.raises(RewriteError, match="x.sum|y.sum"):
        rewrite(program := Parent(True, True).eval(), (r(2, 9, 8),))
    assert program.last is None
    program = Parent(False, False).eval()
    result = fused(program, (r(2, 9, 8),))
    assert hosts(result) == {"Parent": []}
    right(result, program, 2, 7, 8, calls=1)
    assert result.module.layer.parents == [result.module] and program.layer.parents == [program]
    result.module.scale = 3.0
    own = Parent(False, False).eval()
    own.scale = 3.0
    with torch.no_grad(), said("self.scale is not 2.0"):
        close(result.module(r(2, 7, 8)), own(r(2, 7, 8)))


class Keeps(nn.Module):
    """A hook of its own on a layer, bound to it."""

    def __init__(self, branches: bool):
        super().__init__()
        self.layer, self.kept, self.branches = Plain(), {}, branches
        self.layer.register_forward_hook(self.keep)

    def keep(self, module, args, out):
        self.kept["sum"] = out.sum(-1)

    def forward(self, x):
        y = self.layer(x)
        return y if self.branches and y.sum() > 1e9 else y + self.kept["sum"][..., None]


def test_a_hook_that_is_bound_to_a_model_is_bound_to_its_copy():
    program = Keeps(branches=True).eval()
    result = fused(program, (r(2, 9, 8),))
    assert program.kept == {} and result.module.kept == {}
    with torch.no_grad():
        got = result.module(r(2, 7, 8))
        assert program.kept == {}
        close(got, program(r(2, 7, 8)))


class Table:
    def __init__(self, scale: float):
        self.values = scale * torch.arange(8.0)


class Hides(nn.Module):
    """Numbers in an object, and a layer in a list, which torch does not see."""

    def __init__(self, scale: float):
        super().__init__()
        self.table, self.hidden = Table(scale), [nn.Linear(8, 8)]

    def forward(self, x):
        k = self.hidden[0](x) + self.table.values
        return (x @ k.mT).softmax(-1) @ x


@pytest.mark.parametrize("second", (1.0, 2.0))
def test_what_torch_does_not_see_is_each_layers_own(second):
    program = nn.Sequential(Hides(1.0), Hides(second)).eval()
    result = fused(program, (r(2, 9, 8),))
    assert sorted(c["modules"] for c in result.report["chains"]) == ([["0", "1"]] if second == 1 else [["0"], ["1"]])
    right(result, program, 2, 7, 8, calls=2)
    for layers in (program, result.module):
        layers[1].hidden[0] = copy.deepcopy(layers[1].hidden[0]).requires_grad_(False)
        layers[1].hidden[0].weight.mul_(2)
    right(result, program, 2, 7, 8, calls=2)


class Lists(nn.ModuleList):
    def forward(self, x):
        for layer in self:
            x = (layer(x) @ x.mT).softmax(-1) @ x
        return x


def test_lists_of_other_lengths_have_forwards_of_their_own():
    program = nn.Sequential(Lists([nn.Linear(8, 8), nn.Linear(8, 8)]), Lists([nn.Linear(8, 8)])).eval()
    right(fused(program, (r(2, 9, 8),)), program, 2, 7, 8)


class OfClass:
    scale = 2.0


class Scaled(nn.Module):
    scale = 0.5

    def __init__(self):
        super().__init__()
        self.config = OfClass()

    def forward(self, x):
        return (x @ x.mT * self.scale * self.config.scale).softmax(-1) @ x


def test_numbers_of_a_class_that_an_instance_has_otherwise():
    program = nn.Sequential(Scaled()).eval()
    module = fused(program, (r(2, 9, 8),)).module
    for changed, name in ((module[0], "self.scale"), (module[0].config, "self.config.scale")):
        own, before = nn.Sequential(Scaled()).eval(), changed.scale
        changed.scale = 3.0
        (own[0] if name == "self.scale" else own[0].config).scale = 3.0
        with torch.no_grad(), said(f"{name} is not {before}"):
            close(module(r(2, 7, 8)), own(r(2, 7, 8)))
        changed.scale = before


def test_layers_with_other_hooks_inside_are_not_taken_for_each_other():
    program = nn.Sequential(Plain(), Plain(), Plain()).eval()
    for layer, factor in zip(program, (2, 3)):
        layer.q.register_forward_hook(lambda module, args, out, factor=factor: out * factor)
    result = fused(program, (r(2, 9, 8),))
    for shape in SIZES:
        with torch.no_grad():
            close(result.module(r(*shape)), program(r(*shape)))
