"""Which modules of a model are rewritten: the smallest that hold a chain, alike ones once, and what stays as it was."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from host_models import SIZES, Attn, Block, Model, fused, hosts, kernels, model, r, right
from library_programs import Kernels, close, said
from torch import nn
from whole_path import assert_right

from rewriter import rewrite
from rewriter.errors import RewriteError
from rewriter.hosts import RECORDED_LENGTH
from rewriter.trace.record import record


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
    assert said_of["where"].startswith("host_models.py:") and "x.sum() > 1e6" in said_of["reason"]


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
    assert hosts(result) == {"Attn": ["blocks.0.attn", "blocks.2.attn"], "Block": ["blocks.1"]}
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


def test_what_would_take_seconds_is_recorded_at_shorter_lengths(monkeypatch):
    """A model is run to see how it calls its layers, and not to get its results."""
    seen: list[int] = []
    forward = Attn.forward

    def noting(self, x, *args, **kwargs):
        if type(x) is torch.Tensor:  # one with data
            seen.append(x.shape[1])
        return forward(self, x, *args, **kwargs)

    monkeypatch.setattr(Attn, "forward", noting)
    result = fused(model(weights=False), (r(2, 12_000, 8),))
    assert set(hosts(result)) == {"Attn"}
    assert seen and max(seen) <= RECORDED_LENGTH


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
