"""The process behind `run.py`: runs the original, its float64 form and the rewritten module, and compares.

A process of its own, because whether Triton interprets is settled when Triton is imported, and so that a kernel that
crashes takes only this process with it. `python -m rewriter.check.worker FOLDER` reads FOLDER/request.pickle and the
package in FOLDER/package, and writes FOLDER/result.json.
"""

from __future__ import annotations

import copy
import json
import math
import pickle
import signal
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import keystr, tree_flatten_with_path, tree_leaves, tree_map_only

from rewriter.api import import_package
from rewriter.check.launches import Launch, Recorder, idle_among, record
from rewriter.check.messages import Request, Result
from rewriter.check.numerics import compare, run_float64
from rewriter.check.smaller import SHORT_LENGTH, SHORTER_LENGTHS, Call, other_sizes, short_sizes, shown_sizes
from rewriter.load import load
from rewriter.load.running import said
from rewriter.load.weight import Weight, too_large, weighed

FALLBACK = "runs its original code"  # what the patched module warns of
MOST_INTERPRETED = 64  # programs of all kernels; Triton's interpreter takes about 50 ms for one
PATIENCE = 240  # seconds of the interpreter: for widths of thousands, which no inputs can cut
MOST_AFTER_CUTTING = 512  # where sizes have been cut, and could be cut further


class _Failure(Exception):
    """The rewritten module did not run as it should; the text says how."""


class _TooSlow(BaseException):
    """Nothing that a program raises, and nothing to be taken for that."""


@contextmanager
def _at_most(seconds: int) -> Iterator[None]:
    """Raises _TooSlow after that time, if it is not 0."""

    def stop(*_: Any) -> None:
        raise _TooSlow

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@dataclass(frozen=True)
class _Programs:
    """Original and rewritten, side by side, on one device."""

    original: Callable[..., Any]
    rewritten: Callable[..., Any]
    kernels: tuple[tuple[str, str], ...]
    instead: Mapping[str, tuple[str, ...]]
    recorder: Recorder
    zero_rows: bool  # `--masked-rows zero`: numbers where the original has NaN

    def eager(self, call: Call) -> Any:
        return _run(self.original, call)

    def eager_error(self, call: Call) -> str:
        """Why the original does not run at all; too little memory is another matter."""
        try:
            self.eager(call)
        except torch.OutOfMemoryError:
            return ""
        except Exception as error:
            return said(error)
        return ""

    def shortened(self, call: Call) -> Call | None:
        """Smaller inputs that the original takes, and that are not too large for this machine or its interpreter."""
        for length in (SHORT_LENGTH, *SHORTER_LENGTHS):
            shorter = short_sizes(call, self.fits, length)
            if shorter and not too_large(self.original, shorter):
                self.launches(shorter)
                if self.recorder.programs <= MOST_AFTER_CUTTING:
                    return shorter
        return None

    def has_memory(self, call: Call) -> bool:
        """Whether the float64 run, the largest of all, fits the device."""
        try:
            run_float64(self.original, *call)
        except torch.OutOfMemoryError:
            return False
        return True

    def kernelised(self, call: Call) -> Any:
        """The rewritten module's result. Raises _Failure unless every kernel ran."""
        self.recorder.clear()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                out = _run(self.rewritten, call)
            except Exception as error:
                raise _Failure(f"the rewritten program raised {said(error)}") from error
        fallbacks = [str(w.message) for w in caught if FALLBACK in str(w.message)]
        if fallbacks:
            raise _Failure(fallbacks[0])
        idle = idle_among([name for _, name in self.kernels], self.instead, self.recorder.launches)
        if idle:
            raise _Failure(f"kernels that never ran: {', '.join(idle)}")
        return out

    def launches(self, call: Call) -> dict[str, Launch]:
        """What each kernel would be launched with. Raises _Failure."""
        with self.recorder.dry_run():
            self.kernelised(call)
        return dict(self.recorder.launches)

    def fits(self, call: Call) -> bool:
        """Whether these inputs suit the original, and reach the kernels; of what is too large, whether it is called."""
        try:
            if _is_on_cpu(call) and too_large(self.original, call):
                return weighed(self.original, call) != Weight()
            self.eager(call)
            self.launches(call)
        except Exception:
            return False
        return True


def _run(program: Callable[..., Any], call: Call) -> Any:
    """On copies, with the same random numbers each time."""
    args, kwargs = tree_map_only(Tensor, lambda t: t.detach().clone(), call)
    torch.manual_seed(0)
    with torch.no_grad():
        return program(*args, **kwargs)


def check(request: Request, package_folder: Path) -> Result:
    """Load, run and compare."""
    loaded = load(request.options)
    original, call = _moved(loaded.module, (loaded.args, loaded.kwargs), request.device)
    device = _device_name(request.device)
    package = import_package(package_folder)
    rewritten = package.apply(copy.deepcopy(original))
    programs = _Programs(
        original,
        rewritten,
        request.kernels,
        request.instead,
        record(package, request.kernels),
        request.options.masked_rows == "zero",
    )
    given, why = call, too_large(original, call) if request.device == "cpu" else ""
    if why and (call := programs.shortened(given)) is None:
        return Result(device, notes=(f"compiled only: {why}, and smaller sizes do not fit",))
    eager_error = programs.eager_error(call) if request.numerics else ""
    try:
        launches = programs.launches(call)
    except _Failure as failure:
        return Result(device, failures=() if eager_error else (str(failure),), eager_error=eager_error)
    if eager_error or not request.numerics:
        return Result(device, launches=launches, eager_error=eager_error)
    try:
        with _at_most(PATIENCE if request.device == "cpu" else 0):
            outputs, failures, notes = _compared_at_sizes(programs, call, request.device, may_cut=not why)
    except _TooSlow:
        slow = f"compiled only: Triton's interpreter is not done after {PATIENCE} seconds, and no sizes can be smaller"
        return Result(device, launches=launches, notes=(slow,))
    if not why:
        return Result(device, outputs, launches, failures, notes)
    notes = (f"run at {shown_sizes(call)}, not {shown_sizes(given)}: {why}", *notes)
    return Result(device, outputs, launches, failures, notes)


def _moved(program: Any, call: Call, device: str) -> tuple[Any, Call]:
    moved = program.to(device) if isinstance(program, nn.Module) else program
    return moved, tree_map_only(Tensor, lambda t: t.to(device), call)


def _device_name(device: str) -> str:
    return torch.cuda.get_device_name() if device == "cuda" else "CPU, through Triton's interpreter"


def _compared_at_sizes(programs: _Programs, call: Call, device: str, may_cut: bool) -> tuple[dict, tuple, tuple]:
    """At the sizes given, or shorter ones where that would take too long or too much; and at others."""
    notes, reason = (), ""
    if device == "cpu" and programs.recorder.programs > MOST_INTERPRETED:
        reason = "Triton's interpreter is slow"
    elif device == "cuda" and not programs.has_memory(call):
        reason = "the original in float64 runs out of memory"
    if may_cut and reason and (shorter := _shorter(programs, call, device)):
        notes = (f"run at {shown_sizes(shorter)}, not {shown_sizes(call)}: {reason}",)
        call = shorter
    outputs, failures = _compared(programs, call, "")
    smaller = other_sizes(call, programs.fits)
    if smaller and not failures:
        more, failures = _compared(programs, smaller, f" at {shown_sizes(smaller)}")
        outputs |= more
    return outputs, tuple(failures), notes


def _shorter(programs: _Programs, call: Call, device: str) -> Call | None:
    return short_sizes(call, programs.fits) if device == "cuda" else programs.shortened(call)


def _is_on_cpu(call: Call) -> bool:
    return all(t.device.type == "cpu" for t in tree_leaves(call) if isinstance(t, Tensor))


def _compared(programs: _Programs, call: Call, suffix: str) -> tuple[dict[str, dict], list[str]]:
    """(verdict by output, what is wrong)"""
    eager = programs.eager(call)
    truth = run_float64(programs.original, *call)
    try:
        out = programs.kernelised(call)
    except _Failure as failure:
        return {}, [f"{failure}{suffix}"]
    found, wanted, exact = (_leaves(value) for value in (out, eager, truth))
    if found.keys() != wanted.keys():
        return {}, [f"returns {_listed(found)}, the original {_listed(wanted)}{suffix}"]
    rows, failures = {}, []
    for name, leaf in wanted.items():
        dtype = leaf.dtype if isinstance(leaf, Tensor) else torch.float32
        out = found[name]
        if programs.zero_rows and isinstance(leaf, Tensor) and leaf.is_floating_point():
            out = _with_nan_of(leaf, out)
        verdict = compare(out, leaf, exact.get(name), dtype)
        rows[name + suffix] = {k: _finite(v) for k, v in asdict(verdict).items()}
        if not verdict.ok:
            failures.append(f"{name}{suffix}: {verdict.reason}")
    return rows, failures


def _with_nan_of(eager: Tensor, out: Any) -> Any:
    """`out` with NaN where the original has it: rows masked throughout were asked to be other than there."""
    if not isinstance(out, Tensor) or out.shape != eager.shape:
        return out
    return torch.where(eager.isnan() & out.isfinite(), eager.to(out.dtype), out)


def _leaves(value: Any) -> dict[str, Any]:
    return {f"output{keystr(path)}": leaf for path, leaf in tree_flatten_with_path(value)[0]}


def _listed(leaves: dict[str, Any]) -> str:
    return ", ".join(leaves) or "nothing"


def _finite(value: Any) -> Any:
    """JSON has no NaN."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def main() -> None:
    """Answer the request in the folder that argv names."""
    folder = Path(sys.argv[1])
    request = pickle.loads((folder / "request.pickle").read_bytes())
    torch.set_num_threads(1 if request.device == "cpu" else torch.get_num_threads())
    result = check(request, folder / "package")
    (folder / "result.json").write_text(json.dumps(asdict(result)))


if __name__ == "__main__":
    main()
