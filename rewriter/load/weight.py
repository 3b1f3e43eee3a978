"""What one run would take: memory and work, counted on tensors without storage."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter, tree_map_only
from torch.utils.flop_counter import flop_registry, sdpa_flop_count

from rewriter.state import nothing_remembered, unchanged

MOST_WORK = 2e12  # operations: a minute of a small CPU
SMALL = 20_000  # elements of all inputs: their square is no trouble
SHARE = 0.5  # of the memory that is free: inputs are copied, and compared with a run in float64


@dataclass(frozen=True)
class Weight:
    """Bytes that are held at once, and operations of matrix products."""

    bytes: float = 0.0
    work: float = 0.0


def too_large(model: Callable[..., Any], call: tuple[tuple, dict], free: float | None = None) -> str:
    """Why a run on this machine's CPU is not worth trying; "" where it is, or where nothing is known.

    free: bytes of memory, if not what the machine says.
    """
    if sum(t.numel() for t in tree_iter(call) if torch.is_tensor(t)) < SMALL:
        return ""
    weight, free = weighed(model, call), _free() if free is None else free
    if weight.bytes > SHARE * free:
        return f"a run takes {weight.bytes / 2**30:.3g} GiB, of {free / 2**30:.3g} that are free"
    return f"a run takes {weight.work:.2g} operations" if weight.work > MOST_WORK else ""


def weighed(model: Callable[..., Any], call: tuple[tuple, dict]) -> Weight:
    """Nothing where the program needs values, or does what can't be done without storage."""
    counter = _Counter()
    try:
        with FakeTensorMode(allow_non_fake_inputs=True) as fake:
            args, kwargs = tree_map_only(torch.Tensor, lambda t: fake.from_tensor(t.detach()), call)
            with counter, torch.no_grad(), torch.random.fork_rng(devices=[]), _as_it_was(model):
                _as_given(model, fake)(*args, **kwargs)
    except Exception:
        return Weight()
    copies = sum(t.nbytes for t in tree_iter(call) if torch.is_tensor(t))
    return Weight(counter.most + copies, counter.work)


@contextmanager
def _as_it_was(model: Callable[..., Any]) -> Iterator[None]:
    with nothing_remembered(model), unchanged(model) if isinstance(model, nn.Module) else nullcontext():
        yield


def _as_given(model: Callable[..., Any], fake: FakeTensorMode) -> Callable[..., Any]:
    """The model with tensors of its own that have no storage either."""
    if not isinstance(model, nn.Module):
        return model
    own = {name: fake.from_tensor(t.detach()) for name, t in (*model.named_parameters(), *model.named_buffers())}
    return lambda *args, **kwargs: torch.func.functional_call(model, own, args, kwargs)


class _Counter(TorchDispatchMode):
    """Adds up what is made, and forgets what nothing holds any more."""

    def __init__(self) -> None:
        super().__init__()
        self.held: dict[StorageWeakRef, int] = {}
        self.most = self.work = 0.0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        counts = flop_registry.get(func._overloadpacket)
        if counts:
            self.work += counts(*args, **(kwargs or {}), out_val=out)
        elif "scaled_dot_product" in func.name():
            self.work += sdpa_flop_count(*(t.shape for t in args[:3]))
        given = {t.untyped_storage()._cdata for t in tree_iter((args, kwargs)) if torch.is_tensor(t)}
        for t in tree_iter(out):
            if torch.is_tensor(t) and t.untyped_storage()._cdata not in given:
                self.held[StorageWeakRef(t.untyped_storage())] = t.untyped_storage().nbytes()
        self.held = {ref: size for ref, size in self.held.items() if not ref.expired()}
        self.most = max(self.most, float(sum(self.held.values())))
        return out


def _free() -> float:
    """Bytes of memory that a program can still have; infinite where the system does not say."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return float("inf")
    sizes = [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
    return min(sizes, default=float("inf"))
