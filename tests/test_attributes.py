"""What a module holds besides its tensors: read when traced, it is checked at each call; assigned in forward, it is assigned again."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from library_programs import Emitted, close, said, tensors
from torch import nn

from rewriter import rewrite
from rewriter.errors import RewriteError


@dataclass
class Config:
    """As models keep their numbers."""

    window: int = 3


class Layer(nn.Module):
    """Attributes of every kind that forward may read."""

    power = 1.0

    def __init__(self):
        super().__init__()
        self.config, self.act, self.scale, self.bias = Config(), F.relu, 0.25, None
        self.slopes = torch.tensor([0.5, 0.25]).view(2, 1, 1)
        self.temperature = torch.tensor(2.0)
        self.before = nn.ModuleList([nn.Identity()])
        self.drop = nn.Dropout(0.5)

    def forward(self, q, k, v):
        for layer in self.before:
            q = layer(q)
        i, j = torch.arange(q.shape[2])[:, None], torch.arange(k.shape[2])
        s = q @ k.mT * self.scale * self.power / self.temperature - self.slopes * (i - j).abs()
        if self.bias is not None:
            s = s + self.bias
        s = s.masked_fill(i - j > self.config.window, float("-inf"))
        if hasattr(self, "cap"):
            s = self.cap * torch.tanh(s / self.cap)
        return self.act(self.drop(s.softmax(-1)) @ v)


@pytest.fixture(scope="module")
def layer(tmp_path_factory) -> Emitted:
    return Emitted(Layer().eval(), tmp_path_factory.mktemp("layer"), tensors(2, 2, 9, 16))


def changed(**attributes) -> Layer:
    module = Layer().eval()
    for name, value in attributes.items():
        setattr(module, name, value)
    return module


OTHER = {
    "a number": (changed(scale=0.5), "self.scale is not 0.25"),
    "one of the class": (changed(power=2.0), "self.power is not 1.0"),
    "one in an object": (changed(config=Config(5)), "self.config.window is not 3"),
    "a function": (changed(act=F.gelu), "self.act.__name__ is not relu"),
    "a tensor for none": (changed(bias=torch.ones(9, 9)), "self.bias is not None"),
    "a tensor of another shape": (changed(slopes=torch.ones(1)), "self.slopes is no (torch.float32, (2, 1, 1))"),
    "a new one": (changed(cap=5.0), "self has 'cap'"),
    "one more submodule": (changed(before=nn.ModuleList([nn.Identity(), nn.ReLU()])), "self.before has '1'"),
    "another submodule": (changed(drop=nn.ReLU()), "self.drop.__class__.__name__ is not Dropout"),
    "a submodule in training": (changed(), "self.drop.training is not False"),
}
OTHER["a submodule in training"][0].drop.train()


@pytest.mark.parametrize("module, cause", OTHER.values(), ids=OTHER)
def test_an_instance_unlike_the_traced_one_runs_its_own_code(layer, module, cause):
    rewritten, args = layer.apply(copy.deepcopy(module)), tensors(2, 2, 9, 16)
    with torch.no_grad(), said(cause):
        for _ in range(2):
            out = run(rewritten, args)
    close(out, run(module, args))


def run(module: nn.Module, args: tuple) -> torch.Tensor:
    torch.manual_seed(0)
    with torch.no_grad():
        return module(*args)


def test_other_values_of_tensors_are_read(layer):
    module, args = changed(slopes=torch.ones(2, 1, 1), temperature=torch.tensor(3.0)), tensors(2, 2, 9, 16)
    with said(kernels=1):
        close(run(layer.apply(copy.deepcopy(module)), args), run(module, args))


def test_an_attribute_changed_later(layer):
    module, args = layer.apply(Layer().eval()), tensors(2, 2, 9, 16)
    with said(kernels=1):
        run(module, args)
    module.scale = 2.0
    with said("self.scale is not 0.25"):
        close(run(module, args), run(changed(scale=2.0), args))


class Hooked(nn.Module):
    """A submodule whose forward is written out."""

    def __init__(self):
        super().__init__()
        self.inner = Layer()

    def forward(self, q, k, v):
        return self.inner(q, k, v)


def test_a_hook_on_a_submodule_runs():
    module, args, seen = rewrite(Hooked().eval(), tensors(2, 2, 9, 16)).module, tensors(2, 2, 9, 16), []
    module.inner.register_forward_hook(lambda *_: seen.append(1))
    with said("a submodule has hooks"):
        run(module, args)
    assert seen == [1]


class Leaving(nn.Module):
    """Forward leaves its weights, a size and its input behind."""

    def __init__(self):
        super().__init__()
        self.weights = None

    def forward(self, q, k, v):
        self.weights = (q @ k.mT).softmax(-1)
        self.seen = {"length": q.shape[2], "last": q, "mode": "causal"}
        return self.weights @ v


def test_what_forward_assigns_is_assigned():
    original = Leaving().eval()
    module = rewrite(original, tensors(2, 2, 9, 16)).module
    assert original.weights is None and not hasattr(original, "seen")
    for length in (9, 20):
        args = tensors(2, 2, length, 16)
        with said(kernels=1):
            close(run(module, args), run(original, args))
        close(module.weights, original.weights)
        assert module.seen["last"] is args[0] and module.seen["length"] == length and module.seen["mode"] == "causal"


class Counting(Leaving):
    def __init__(self):
        super().__init__()
        self.calls, self.log, self.config = 0, [], Config()


class Reading(Counting):
    def forward(self, q, k, v):
        self.calls += 1
        return super().forward(q, k, v)


class Appending(Counting):
    def forward(self, q, k, v):
        self.log.append(q)
        return super().forward(q, k, v)


class Configuring(Counting):
    def forward(self, q, k, v):
        self.config.window = 7
        return super().forward(q, k, v)


class Keeping(Counting):
    def forward(self, q, k, v):
        self.kept = object()
        return super().forward(q, k, v)


REFUSED = {
    Reading: "reads self.calls and changes it",
    Appending: "changes self.log in place",
    Configuring: "changes self.config in place",
    Keeping: "assigns self.kept, which no graph holds",
}


@pytest.mark.parametrize("kind, reason", REFUSED.items(), ids=lambda x: getattr(x, "__name__", ""))
def test_what_cannot_be_assigned_again_is_refused(kind, reason):
    module = kind().eval()
    with pytest.raises(RewriteError, match=reason) as caught:
        rewrite(module, tensors(2, 2, 9, 16))
    assert caught.value.reason.site.file == __file__
    assert (module.calls, module.log, module.config, module.weights) == (0, [], Config(), None)
