"""For `bench.py --suite`: what a worker does with one row. It rewrites, then compiles, then measures; `bench.py` sees to it
that nothing else runs while something is measured.
"""

from __future__ import annotations

import copy
import hashlib
import importlib
import itertools
import json
import os
import random
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
from bench_rows import SUITES, VARIANTS, Row, slopes
from bench_zoo import reason
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from rewriter.api import import_package, rewrite
from rewriter.check.numerics import relative_error

ROOT = Path(__file__).resolve().parents[1]
OURS = "flashlight"
LONGEST_EAGER = 8192  # longer rows have no room for scores beside those of other workers
ROUNDS = 3
WRONG = 0.02  # further from float64 is no rounding of bf16, but where eager is, too
CALLS = 500  # of which the host's time is taken
SDPA = {"sdpa-cudnn": SDPBackend.CUDNN_ATTENTION, "sdpa-flash": SDPBackend.FLASH_ATTENTION}
torch._dynamo.config.recompile_limit = 4096


class Task(NamedTuple):
    """`step`: what is done with the row of that name. `cache`: the folder of what has been rewritten."""

    step: str
    suite: str
    row: str
    cache: str
    dry: bool = False

    @property
    def dtype(self) -> torch.dtype:
        """Triton's interpreter multiplies bf16 wrongly."""
        return torch.float32 if self.dry else torch.bfloat16


@dataclass
class Ready:
    """A row's inputs and peers, compiled. `missing`: why a peer can't run. `seconds`: of steps."""

    row: Row
    inputs: list[Tensor]
    runs: dict[str, Callable] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)


ready: dict[str, Ready] = {}


def perform(task: Task) -> dict:
    """One step of one row. Never raises."""
    row = next(r for r in SUITES[task.suite](False) if r.name == task.row)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*original code.*")
        try:
            return {"rewrite": _rewrite, "prepare": _prepare, "measure": _measure}[task.step](row, task)
        except Exception as error:
            return {"failed": reason(error)}


# --- rewriting


def _folder(row: Row, task: Task) -> Path:
    """Of a program's package: another one for another rewriter."""
    texts = [p for folder in ("rewriter", "templates") for p in (ROOT / folder).rglob("*") if p.is_file()]
    texts = [p for p in texts if "__pycache__" not in p.parts] + [ROOT / "scripts" / "bench_rows.py"]
    digest = hashlib.sha256(b"".join(p.read_bytes() for p in sorted(texts))).hexdigest()[:12]
    return Path(task.cache) / digest / f"{row.program}_{str(task.dtype).rpartition('.')[2]}"


def _rewrite(row: Row, task: Task) -> dict:
    folder = _folder(row, task)
    if (folder / "bench.json").exists():
        return {}
    for _ in range(1 if row.suite != "extra" else 2):  # the first imports much
        start = time.perf_counter()
        result = rewrite(row.module, row.inputs(row.short, dtype=task.dtype), out=folder, force=True)
        seconds = time.perf_counter() - start
    told = {"seconds": seconds, "chains": result.report["chains"]}
    told["unfused"] = [u["reason"] for u in result.report["unfused"]]
    (folder / "bench.json").write_text(json.dumps(told))
    return {}


def _imported(folder: Path):
    """The package in a folder: as rewriting has imported it, if that was here. Its kernels are ops by their text, so of
    two imports the first one's kernels run.
    """
    file = str(folder.absolute() / "__init__.py")
    here = (m for m in list(sys.modules.values()) if getattr(m, "__file__", None) == file)
    return next(here, None) or import_package(folder)


class Package:
    """A rewritten program: its kernel files, and the drop-in."""

    def __init__(self, row: Row, task: Task):
        folder = _folder(row, task)
        self.told = json.loads((folder / "bench.json").read_text())
        if not self.told["chains"]:
            raise RuntimeError(f"nothing fused: {self.told['unfused']}")
        package = _imported(folder)
        self.host = importlib.import_module(f"{package.__name__}.module")
        names = dict.fromkeys(Path(k).stem for chain in self.told["chains"] for k in chain["kernels"])
        self.files = {n: importlib.import_module(f"{package.__name__}.kernels.{n}") for n in names}
        self.module = package.apply(copy.copy(row.module))

    def compile(self, inputs: list[Tensor]) -> float:
        """Runs each of the files' CONFIGS, so that choosing among them later takes no compiler. Seconds of the first."""
        held = {(f, n): v for f in self.files.values() for n, v in vars(f).items() if n.startswith("CONFIGS")}
        start, took = time.perf_counter(), 0.0
        os.environ["FLASHLIGHT_TUNE"] = "0"  # the first is taken, and nothing is timed beside other compilers
        try:
            for k in range(max(map(len, held.values()), default=1)):
                for (file, name), configs in held.items():
                    setattr(file, name, configs[k:] + configs[:k])
                    file.PREPARED.clear()
                with suppress(triton.runtime.errors.OutOfResources):
                    patiently(lambda: self.module(*inputs))
                took = took or time.perf_counter() - start
        finally:
            del os.environ["FLASHLIGHT_TUNE"]
            for (file, name), configs in held.items():
                setattr(file, name, configs)
                file.PREPARED.clear()
        return took

    def launches(self, inputs: list[Tensor]) -> Callable:
        """The wrappers of its kernels alone, with what the drop-in gives them."""
        caught = []
        for name, file in self.files.items():
            kept = getattr(self.host, name)
            setattr(self.host, name, lambda *a, file=file: caught.append((file, a)) or file.launch(*a))
            self.module(*inputs)
            setattr(self.host, name, kept)
        return lambda: [file.launch(*args) for file, args in caught]


# --- peers


def patiently(run: Callable):
    """Compilers side by side may have too little memory at times."""
    for _ in range(5):
        try:
            return run()
        except RuntimeError as error:
            if not lacks_memory(error):
                raise
            torch.cuda.empty_cache()
            time.sleep(random.uniform(1, 5))
    return run()


def lacks_memory(error: Exception) -> bool:
    return "out of memory" in str(error).lower()


def _peers(row: Row, inputs: list[Tensor]) -> dict[str, Callable]:
    """Every peer by name, as what makes its call."""
    alone = row.heads == row.kv_heads or row.suite == "decode"  # grouped heads are as fast, and compile for long
    peers: dict[str, Callable] = {}
    if row.suite != "custom":
        peers |= _flex(row, inputs)
    writes_scores = row.length > LONGEST_EAGER and row.suite not in ("decode", "custom")
    if alone and not writes_scores:
        peers["compile"] = lambda: _called(torch.compile(row.module, dynamic=False), inputs)
    if alone and row.length <= LONGEST_EAGER or row.suite == "decode":
        peers["eager"] = lambda: _called(row.module, inputs)
    if row.suite != "custom" and row.variant in ("vanilla", "causal"):
        peers |= {name: lambda backend=backend: _sdpa(row, inputs, backend) for name, backend in SDPA.items()}
    return peers


def _called(function: Callable, inputs: list[Tensor]) -> Callable:
    return lambda: function(*inputs)


def _sdpa(row: Row, inputs: list[Tensor], backend: SDPBackend) -> Callable:
    def run():
        with sdpa_kernel(backend):
            q, k, v = inputs
            grouped = row.heads != row.kv_heads
            return F.scaled_dot_product_attention(q, k, v, is_causal=row.variant == "causal", enable_gqa=grouped)

    return run


def _flex(row: Row, inputs: list[Tensor]) -> dict[str, Callable]:
    """FlexAttention with its BlockMask at hand, made anew for each call, and the BlockMask alone."""
    q, k, v, *ids = inputs
    score, mask = _flex_functions(row, ids[0] if ids else None)
    flex = torch.compile(flex_attention, dynamic=False)
    blocks = torch.compile(create_block_mask)
    grouped = row.heads != row.kv_heads

    def made():
        return mask and blocks(mask, 1, 1, q.size(2), k.size(2), device=str(q.device))

    def call(block_mask):
        return flex(q, k, v, score_mod=score, block_mask=block_mask, enable_gqa=grouped)

    def held():
        block_mask = made()
        return lambda: call(block_mask)

    if mask is None:
        return {"flex": held}
    return {"flex": held, "flex-with-build": lambda: lambda: call(made()), "flex-blockmask-build": lambda: made}


def _flex_functions(row: Row, ids: Tensor | None):
    """The variant's score and mask, as FlexAttention wants them: for one position at a time."""
    module = VARIANTS[row.variant]
    of_heads = slopes(row.heads, "cuda" if torch.cuda.is_available() else "cpu")
    if row.variant == "alibi":
        return lambda s, b, h, i, j: s + of_heads[h] * (j - i), None
    if ids is not None:
        return None, lambda b, h, i, j: module.mask(i, j, ids[i], ids[j])
    score = module.score and (lambda s, b, h, i, j: module.score(s, i, j))
    return score, module.mask and (lambda b, h, i, j: module.mask(i, j, None, None))


# --- compiling and measuring


def _prepare(row: Row, task: Task) -> dict:
    """Compiles every peer. What fails stays away, with its reason."""
    device = "cpu" if task.dry else "cuda"
    made = Ready(row, row.inputs(row.short if task.dry else row.long, device, task.dtype))
    with_peers = {} if task.dry else _peers(row, made.inputs)
    try:
        package = Package(row, task)
        made.seconds = {"rewriting": package.told["seconds"], "compiling": package.compile(made.inputs)}
        made.runs[OURS] = _called(package.module, made.inputs)
        if row.suite == "extra" and row.length < 100:
            made.runs["launch"] = package.launches(made.inputs)
    except Exception as error:
        made.missing[OURS] = reason(error)
    for name, peer in with_peers.items():
        try:
            run = made.runs[name] = patiently(peer)
            if name != "eager":  # nothing to compile
                run()
        except Exception as error:
            if not lacks_memory(error):  # else it is compiled, and has more room when it is alone
                made.runs.pop(name, None)
                made.missing[name] = reason(error)
    if not task.dry:
        torch.cuda.empty_cache()
    ready[row.name] = made
    return {}


def _measure(row: Row, task: Task) -> dict:
    """Each peer is compared with float64, then they are timed in turns."""
    made = ready.pop(row.name)
    errors = _checked(made)
    work = row.work(made.inputs[0].device.type)
    if row.suite == "extra" and row.length < 100:
        times = {name: _host_ms(run, task.dry) for name, run in made.runs.items()}
    else:
        times = _timed(made, task.dry)
    del made.inputs, made.runs
    if not task.dry:
        torch.cuda.empty_cache()
    rows = [_shown(row, name, ms, work, errors.get(name)) for name, ms in times.items()]
    if row.suite == "extra":
        rows += [_shown(row, f"{OURS}-{step}", 1e3 * took, 0.0, None) for step, took in made.seconds.items()]
    rows += [_shown(row, name, None, work, errors.get(name)) | {"note": why} for name, why in made.missing.items()]
    return {"rows": rows, "seconds": made.seconds}


def _checked(made: Ready) -> dict[str, float]:
    """Errors of what gives results; what is wrong is not timed. What eager gives is what it means."""
    exact, errors = made.row.exact(made.inputs), {}
    for name in sorted(made.runs.keys() - {"launch", "flex-blockmask-build"}, key=lambda name: name != "eager"):
        try:
            got = made.row.part(made.runs[name]())
            errors[name] = max(relative_error(g, e) for g, e in zip(got, exact, strict=True))
            if name != "eager" and not errors[name] < max(WRONG, 2 * errors.get("eager", 0.0)):
                raise ValueError(f"wrong: {errors[name]:.2g} from float64")
        except Exception as error:
            made.missing[name] = reason(error)
            del made.runs[name]
    return errors


def _timed(made: Ready, dry: bool) -> dict[str, float]:
    """Medians of medians, the peers alternating. What runs out of memory is a reason."""
    times: dict[str, list[float]] = {}
    for _, (name, run) in itertools.product(range(1 if dry else ROUNDS), list(made.runs.items())):
        if name in made.missing:
            continue
        try:
            times.setdefault(name, []).append(_ms(run, dry))
        except Exception as error:
            made.missing[name] = reason(error)
            times.pop(name, None)
    return {name: statistics.median(found) for name, found in times.items()}


def _ms(run: Callable, dry: bool) -> float:
    if dry:
        return _host_ms(run, dry)
    return triton.testing.do_bench(run, warmup=10, rep=30, return_mode="median")


def _host_ms(run: Callable, dry: bool) -> float:
    """What a call takes of the host, which does not wait for the GPU."""
    calls = 1 if dry else CALLS
    for _ in range(0 if dry else 20):
        run()
    times = []
    for _ in range(1 if dry else ROUNDS):
        start = time.perf_counter()
        for _ in range(calls):
            run()
        times.append((time.perf_counter() - start) * 1e3 / calls)
        if not dry:
            torch.cuda.synchronize()
    return statistics.median(times)


def _shown(row: Row, peer: str, ms: float | None, work: float, error: float | None) -> dict:
    """As ../shared/bench/peers.py has it, and the error."""
    sizes = {"B": row.batch, "H": row.heads, "Hkv": row.kv_heads, "S": row.length, "D": row.dim}
    out = {"suite": row.suite, "variant": row.variant, "peer": peer, **sizes, "ms": "", "tflops": "", "error": ""}
    if ms is not None:
        rate = 0.0 if peer == "flex-blockmask-build" else work / ms
        out |= {"ms": f"{ms:.4f}", "tflops": f"{rate / 1e6:.0f}GB/s" if row.in_bytes else f"{rate / 1e9:.1f}"}
    return out | ({} if error is None else {"error": f"{error:.1e}"}) | {"note": ""}
