"""Which modules of a model are rewritten: the smallest that hold a chain, alike ones once, and what stays as it was."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from library_programs import Kernels, close, said
from torch import nn
from whole_path import assert_right

from rewriter import rewrite
from rewriter.api import Rewrite
from rewriter.errors import RewriteError
from rewriter.trace.record import record


def r(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def fused(program: nn.Module, args: tuple) -> Rewrite:
    result = rewrite(program, args)
    assert result.report["chains"], result.report["unfused"]
    return result


class Attn(nn.Module):
    """As published: an index that only a cache would need, flags, and weights next to the output."""

    def __init__(self, index: int = 0, causal: bool = False, weights: bool = True):
        super().__init__()
        self.index, self.causal, self.weights = index, causal, weights
        self.qkv, self.out = nn.Linear(8, 24), nn.Linear(8, 8)

    def forward(self, x, mask=None, cache=None, *, scale=1.0, memory=None):
        q, k, v = self.qkv(x).chunk(3, -1)
        if memory is not None:
            _, k, v = self.qkv(memory).chunk(3, -1)
        if cache is not None:
            k, v = cache.update(k, v, self.index)
        scores = q @ k.mT * scale
        if self.causal:
            scores = scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), float("-inf"))
        if mask is not None:
            scores = scores + mask
        p = scores.softmax(-1)
        return (self.out(p @ v), p) if self.weights else self.out(p @ v)


class Block(nn.Module):
    def __init__(self, index: int, **how):
        super().__init__()
        self.norm, self.attn, self.mlp = nn.LayerNorm(8), Attn(index, **how), nn.Linear(8, 8)

    def forward(self, x, mask=None, shows=False):
        y = self.attn(self.norm(x), mask=mask, scale=0.5)
        y, p = y if isinstance(y, tuple) else (y, None)
        x = x + y
        x = x + self.mlp(x)
        return (x, p) if shows else x


class Model(nn.Module):
    """A mask made once, layers that read it, and a branch on values if asked for."""

    def __init__(self, *blocks: nn.Module, branches: bool = False):
        super().__init__()
        self.blocks, self.branches = nn.ModuleList(blocks), branches

    def forward(self, x):
        mask = torch.zeros(x.shape[1], x.shape[1]).masked_fill(torch.ones(x.shape[1], x.shape[1]).triu(1) > 0, -1e9)
        if self.branches and x.sum() > 1e6:
            return x
        for block in self.blocks:
            x = block(x, mask)
        return x


def model(**how) -> Model:
    torch.manual_seed(0)
    branches = how.pop("branches", False)
    return Model(*(Block(k, **how) for k in range(3)), branches=branches).eval()


def hosts(result) -> dict[str, list[str]]:
    return {c["host"]: c["modules"] for c in result.report["chains"]}


def kernels(result) -> list[str]:
    return sorted(n for n in result.sources if n.startswith("kernels/") and "__init__" not in n)


def right(result, program: nn.Module, *shape: int, calls: int = 3) -> None:
    """Its kernels run, and as it should be."""
    with torch.no_grad(), said(kernels=calls):
        close(result.module(r(*shape)), program(r(*shape)))


SIZES = ((2, 7, 8), (1, 37, 8), (3, 1, 8))


@pytest.mark.parametrize("branches", (False, True))
def test_the_smallest_module_that_holds_the_chain_is_rewritten_once(branches):
    program = model(weights=False, branches=branches)
    result = fused(program, (r(2, 9, 8),))
    assert hosts(result) == {"Attn": [f"blocks.{k}.attn" for k in range(3)]}
    assert kernels(result) == ["kernels/attn.py"]
    for shape in SIZES:
        right(result, program, *shape)
    assert [type(b.attn).__mro__[1].__name__ for b in result.module.blocks] == ["RewrittenAttn"] * 3
    assert {type(m) for m in program.modules()} <= {Model, Block, Attn, nn.Linear, nn.LayerNorm, nn.ModuleList}


def test_a_model_that_does_not_trace_says_where():
    result = fused(model(branches=True), (r(2, 9, 8),))
    (said_of,) = (u for u in result.report["unfused"] if "only parts of it are rewritten" in u["reason"])
    assert said_of["where"].startswith("test_hosts.py:") and "x.sum() > 1e6" in said_of["reason"]


def test_weights_that_nothing_reads_are_not_computed():
    """The host is the module in which they die: to give None for them would be wrong for another caller."""
    program = model()
    result = fused(program, (r(2, 9, 8),))
    assert hosts(result) == {"Block": ["blocks.0", "blocks.1", "blocks.2"]}
    assert [c["passes"] for c in result.report["chains"]] == [1]
    right(result, program, 2, 7, 8)
    x = r(2, 7, 8)
    with torch.no_grad(), said("shows is not False"):
        for got, own in zip(result.module.blocks[0](x, shows=True), program.blocks[0](x, shows=True)):
            close(got, own)


class Shows(nn.Module):
    def __init__(self):
        super().__init__()
        self.attn = Attn()

    def forward(self, x):
        y, p = self.attn(x)
        return x + y, p


def test_weights_that_are_returned_are_computed():
    torch.manual_seed(0)
    program = Shows().eval()
    result = fused(program, (r(2, 9, 8),))
    assert hosts(result) == {"Attn": ["attn"]}
    with torch.no_grad():
        assert_right(result, program, (r(2, 7, 8),))


class Twice(nn.Module):
    """One module called in two ways."""

    def __init__(self):
        super().__init__()
        self.attn = Attn(weights=False)

    def forward(self, x, memory):
        x = x + self.attn(x, scale=2.0)
        return x + self.attn(x, memory=memory)


def test_a_module_called_in_two_ways_has_two_forwards():
    torch.manual_seed(0)
    program = Twice().eval()
    result = fused(program, (r(2, 9, 8), r(2, 5, 8)))
    assert hosts(result) == {"Attn": ["attn"]} and len(kernels(result)) == 2
    with torch.no_grad(), said(kernels=2):
        close(result.module(r(1, 11, 8), r(1, 3, 8)), program(r(1, 11, 8), r(1, 3, 8)))
    with torch.no_grad(), said("scale is not 1.0"):
        close(result.module.attn(r(1, 11, 8), scale=3.0), program.attn(r(1, 11, 8), scale=3.0))


def test_layers_in_other_states_have_forwards_of_their_own():
    torch.manual_seed(0)
    program = Model(*(Block(k, causal=k % 2 == 1, weights=False) for k in range(4))).eval()
    result = fused(program, (r(2, 9, 8),))
    assert sorted(c["modules"] for c in result.report["chains"]) == [
        ["blocks.0.attn", "blocks.2.attn"],
        ["blocks.1.attn", "blocks.3.attn"],
    ]
    for shape in SIZES:
        right(result, program, *shape, calls=4)
    for copied in (copy.deepcopy(result.module), pickle.loads(pickle.dumps(result.module))):
        with torch.no_grad(), said(kernels=4):
            close(copied(r(2, 7, 8)), program(r(2, 7, 8)))


def test_a_layer_has_the_forwards_of_its_state_alone():
    program = Model(*(Block(k, causal=k % 2 == 1, weights=False) for k in range(2))).eval()
    module = fused(program, (r(2, 9, 8),)).module
    assert [len(type(block.attn)._hosts) for block in module.blocks] == [1, 1]
    for block in module.blocks:
        block.attn.causal = not block.attn.causal
    with torch.no_grad(), said("self.causal is not False", "self.causal is not True"):
        module(r(2, 7, 8))


class Cache:
    def __init__(self):
        self.kept = []

    def update(self, k, v, index):
        self.kept.append((k, v))
        return k, v


class Cached(nn.Module):
    def __init__(self):
        super().__init__()
        self.attn, self.other = Attn(weights=False), Attn(weights=False)

    def forward(self, x):
        cache = Cache()
        return self.other(x) + self.attn(x, cache=cache), len(cache.kept)


def test_what_a_host_is_given_and_cannot_be_written_down_is_its_callers():
    """A cache that lives within one call is no obstacle for the module that makes it."""
    program = Cached().eval()
    result = rewrite(program, (r(2, 9, 8),))
    assert hosts(result) == {"Cached": []}
    with torch.no_grad(), said(kernels=2):
        got, wanted = result.module(r(1, 5, 8)), program(r(1, 5, 8))
    close(got[0], wanted[0])
    assert got[1] == wanted[1]


class Encoded(nn.Module):
    """torch's layer takes a path of its own in eval mode, on which its attention's forward is never called."""

    def __init__(self):
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)

    def forward(self, x):
        return self.layer(x)


def test_a_module_that_is_never_called_is_no_host():
    torch.manual_seed(0)
    program = Encoded().eval()
    result = fused(program, (r(2, 9, 8),))
    assert hosts(result) == {"TransformerEncoderLayer": ["layer"]}
    right(result, program, 2, 7, 8, calls=1)


def test_an_instance_with_a_forward_of_its_own_is_no_host():
    program = model(weights=False)
    attn = program.blocks[1].attn
    attn.forward = lambda *args, own=attn.forward, **kwargs: 2 * own(*args, **kwargs)
    result = fused(program, (r(2, 9, 8),))
    assert hosts(result)["Attn"] == ["blocks.0.attn", "blocks.2.attn"] or "Block" in hosts(result)
    with torch.no_grad():
        close(result.module(r(2, 7, 8)), program(r(2, 7, 8)))


def test_a_rewritten_model_is_rewritten_again_from_its_own_code():
    program = model(weights=False)
    once = fused(program, (r(2, 9, 8),))
    twice = fused(once.module, (r(2, 9, 8),))
    assert twice.sources["module.py"] == once.sources["module.py"]
    right(twice, program, 2, 7, 8)


class Noisy(nn.Module):
    """Statistics and random numbers: running it leaves traces."""

    def __init__(self):
        super().__init__()
        self.norm, self.drop = nn.BatchNorm1d(8), nn.Dropout(0.5)
        self.calls = 0

    def forward(self, x, out=None):
        self.calls += 1
        return self.drop(self.norm(x.mT).mT.add_(1))


def test_recording_leaves_the_model_and_the_random_numbers_as_they_were():
    program, x = nn.Sequential(Noisy(), Noisy()), r(2, 9, 8)
    before, given, state = copy.deepcopy(program.state_dict()), x.clone(), torch.get_rng_state()
    calls = record(program, (x,), {})
    assert list(calls) == ["0", "0.norm", "0.drop", "1", "1.norm", "1.drop"]
    assert torch.equal(torch.get_rng_state(), state) and torch.equal(x, given)
    assert all(torch.equal(before[n], t) for n, t in program.state_dict().items())
    assert [part.calls for part in program] == [0, 0] and not any("forward" in vars(m) for m in program.modules())


def test_a_model_in_which_nothing_traces_is_refused():
    class Branches(nn.Module):
        def forward(self, x):
            return x if x.sum() > 0 else -x

    with pytest.raises(RewriteError, match="depends on the values of a tensor"):
        rewrite(nn.Sequential(Branches()), (r(2, 9, 8),))


def test_no_kernel_runs_for_a_model_of_none():
    with Kernels() as seen, torch.no_grad():
        rewrite(nn.Sequential(nn.Linear(8, 8)), (r(2, 9, 8),)).module(r(2, 9, 8))
    assert seen.calls == 0


@pytest.fixture(scope="module")
def layered():
    program = model(weights=False)
    return program, fused(program, (r(2, 9, 8),)).module


def test_a_model_with_hosts_is_compiled_in_one_graph(layered):
    program, module = layered
    targets = []

    def backend(graph, _):
        targets.extend(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    compiled = torch.compile(module, backend=backend, fullgraph=True, dynamic=True)
    with torch.no_grad():
        close(compiled(r(2, 7, 8)), program(r(2, 7, 8)))
    assert sum(target.startswith("flashlight.") for target in targets) == 3


def test_a_model_with_hosts_is_saved_and_replicated(layered, tmp_path):
    program, module = layered
    torch.save(module, tmp_path / "model.pt")
    replica = copy.copy(module)
    replica._modules = {n: m._replicate_for_data_parallel() for n, m in module._modules.items()}
    for other in (torch.load(tmp_path / "model.pt", weights_only=False), replica):
        with torch.no_grad(), said(kernels=3):
            close(other(r(2, 7, 8)), program(r(2, 7, 8)))


def test_a_model_of_another_dtype_runs_its_own_code_until_it_is_back():
    program = model(weights=False)
    module = fused(program, (r(2, 9, 8),)).module.double()
    with torch.no_grad():
        with said("x is not torch.float32"):
            close(module.float().double()(r(2, 7, 8).double()).float(), program.float()(r(2, 7, 8)))
        with said(kernels=3):
            close(module.float()(r(2, 7, 8)), program.float()(r(2, 7, 8)))


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
    assert hosts(result) in ({"Casts": []}, {})


def test_layers_of_torchs_own_are_no_hosts():
    """Every norm of a model would be swapped, whatever its width."""
    program = nn.Sequential(Block(0, weights=False), nn.LayerNorm(8)).eval()
    result = rewrite(program, (r(2, 9, 8),), rows=True)
    assert set(hosts(result)) <= {"Block", "Sequential"}
    with torch.no_grad():
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
