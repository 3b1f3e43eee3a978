#!/usr/bin/env python
"""What rewritten programs are worth on this GPU, beside eager, `torch.compile`, FlexAttention and SDPA, in one run.

scripts/bench.py --suite fwd|custom|decode|extra [--quick] [--only NAME] [--csv FILE] [--plot FILE]
                                        every peer of a row in turns, TFLOP/s (decode: GB/s), each checked first
scripts/bench.py                        every program of tests/zoo at bf16 and fp16: error, memory, times
scripts/bench.py --only causal --dtype bf16 --no-compile
scripts/bench.py --part 2               programs of several passes, axes and outputs
scripts/bench.py --models               language models of transformers, rewritten whole, milliseconds and MiB

Compare within one run only. Exit codes: 0 done, 1 a program failed its check or raised, 2 no GPU or bad usage.
"""

from __future__ import annotations

import argparse
import csv
import functools
import json
import math
import os
import sys
import tempfile
import threading
import time
from collections import deque
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "scripts")]
from bench_drive import TASK_SECONDS, Suite, Worker, in_threads, summary  # noqa: E402

# Workers compile side by side: a pool of compilers in each would be too many.
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")

FIELDS = {
    "zoo": "dtype program batch q kv chains ok error eager_error mib eager_mib ms eager_ms" " compile_ms flex_ms note",
    "models": "model dtype hosts kernels seconds ok rewritten_ms eager_ms sdpa_ms flex_ms rewritten_mib eager_mib sdpa_mib"
    " flex_mib rewritten_error eager_error sdpa_error flex_error note",
}


def options() -> argparse.Namespace:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    add = parser.add_argument
    add("--suite", choices=("fwd", "custom", "decode", "extra"), help="attention, at published sizes")
    add("--quick", action="store_true", help="with --suite: fewer rows")
    add("--csv", type=Path, metavar="FILE", help="with --suite: the rows")
    add("--plot", type=Path, metavar="FILE", help="with --suite: the rows as bars, an SVG")
    add("--cache", type=Path, default=ROOT / ".bench", metavar="DIR", help="with --suite: keeps what is rewritten")
    add("--models", action="store_true", help="language models of transformers, four layers, 4096 tokens")
    add("--seconds", type=float, default=540, help="what is not begun by then is left out")
    add("--only", default="", metavar="TEXT", help="names (or zoo families) that contain it")
    add("--part", type=int, choices=(1, 2), default=1, help="of the zoo")
    add("--dtype", choices=("bf16", "fp16", "fp32"), help="default: bf16 and fp16")
    add("--no-compile", action="store_true", help="no torch.compile or FlexAttention (zoo)")
    add("--out", type=Path, metavar="DIR", help="gets a .csv, a .json and what workers say")
    add("--dim", type=int, default=2048, help="features of all heads (zoo)")
    add("--heads", type=int, default=16, help="of 2048 features: 16 is D = 128, 32 is D = 64 (zoo)")
    add("--batch", type=int, default=4)
    add("--seq", type=int, default=2048, help="halved where eager has no room for it (part 2)")
    add("--jobs", type=int, help="workers that compile side by side (zoo, --suite)")
    add("--dry", action="store_true", help=argparse.SUPPRESS)  # tiny and on the CPU: a rehearsal
    args = parser.parse_args()
    most, spare = (14, 2) if args.suite else (10, 4)
    args.jobs = args.jobs or max(1, min(most, (os.cpu_count() or 1) - spare))
    return args


def number(value, form: str) -> str:
    return "-" if value is None else format(value, form)


class Zoo:
    """The zoo's tasks, given to workers, and the rows that come back."""

    def __init__(self, args, folder: str):
        from bench_zoo import Setup, Task, measured
        from zoo import programs

        self.args, self.end = args, time.time() + args.seconds
        dim, heads = (64, 4) if args.dry else (args.dim, args.heads)
        setup = Setup(dim, heads, args.batch, args.seq, f"{folder}/lock", args.part, args.dry)
        self.work = functools.partial(measured, setup)
        dtypes = [args.dtype] if args.dtype else ["bf16", "fp16"]
        chosen = [p for p in programs(args.part) if args.only in p.name or args.only in p.family]
        self.tasks = deque(
            Task(program.name, dtype, part)
            # Peers last: they compile for long, and the rewriter's own results matter more.
            for part in (("rewritten",) if args.no_compile else ("rewritten", "peers"))
            for dtype in dtypes
            for program in chosen
            if dtype in program.dtypes
        )
        self.rows, self.lock = {}, threading.Lock()

    def run(self) -> list[dict]:
        in_threads(self._drive, self.args.jobs)
        if self.tasks:
            print(f"time is up: {len(self.tasks)} tasks left out, from {self.tasks[0]}", flush=True)
        return list(self.rows.values())

    def _drive(self, place: int):
        worker = None
        while time.time() < self.end:
            try:
                task = self.tasks.popleft()
            except IndexError:
                break
            worker = worker or Worker(self.work, self.args)
            row = worker.ask(task, min(TASK_SECONDS, self.end + 20 - time.time()))
            if row is None:
                row, worker = {"note": f"{task.part}: crashed, or took too long"}, None
                if task.part == "rewritten":
                    row["ok"] = False
            self._add(task, row)
        if worker:
            worker.process.kill()

    def _add(self, task, new: dict):
        key = (task.program, task.dtype)
        with self.lock:
            row = self.rows.setdefault(key, {"dtype": task.dtype, "program": task.program})
            notes = "; ".join(filter(None, (row.get("note"), new.get("note"))))
            row |= new | {"note": notes}
            show_zoo(row)
            save(self.args, list(self.rows.values()))


def show_zoo(row: dict):
    verdict = {True: "ok", False: "FAILED", None: "-"}[row.get("ok")]
    error = f"{number(row.get('error'), '.1e')} ({number(row.get('eager_error'), '.1e')})"
    memory = f"{number(row.get('mib'), '.0f')} ({number(row.get('eager_mib'), '.0f')})"
    size = f"{row.get('batch')}x{row.get('q')}x{row.get('kv')}"
    parts = [f"{row['dtype']} {row['program']:28} {size:12} {verdict:6}"]
    parts += [f"error {error:19} MiB {memory:13} ms {number(row.get('ms'), '.3f'):>7}"]
    parts += [f"{p} {number(row.get(f'{p}_ms'), '.3f'):>7}" for p in ("eager", "compile", "flex")]
    print(*parts, row["note"], flush=True)


def summary_of_zoo(rows: list[dict]):
    right, wrong = (sum(row.get("ok") is ok for row in rows) for ok in (True, False))
    print(f"{len(rows)} rows: {right} ok, {wrong} failed, the others have nothing fused")
    for peer in ("eager_ms", "compile_ms", "flex_ms"):
        logs = [math.log(r[peer] / r["ms"]) for r in rows if r.get("ms") and r.get(peer)]
        if logs:
            mean, least = math.exp(sum(logs) / len(logs)), math.exp(min(logs))
            print(f"{peer} / ms: geometric mean {mean:.2f}, least {least:.2f}, {len(logs)} rows")


def run_models(args) -> list[dict]:
    """A row per model, each in its share of the time that is left."""
    from bench_models import MODELS, Task, measured, shown

    end = time.time() + args.seconds
    cases = [name for name in MODELS if args.only in name]
    rows, worker = [], None
    for done, name in enumerate(cases):
        share = (end - time.time()) / (len(cases) - done)
        if share < 5:
            print(f"time is up: {len(cases) - done} rows left out, from {name}", flush=True)
            break
        dtype = args.dtype or "bf16"
        worker = worker or Worker(measured, args)
        new = worker.ask(Task(name, dtype, share - 25, args.dry), min(share + TASK_SECONDS, end + 20 - time.time()))
        if new is None:
            new, worker = {"note": "crashed, or took too long"}, None
        rows.append({"model": name, "dtype": dtype} | new)
        print(shown(rows[-1]), flush=True)
        save(args, rows)
    return rows


def save(args, rows: list[dict]):
    """After every row: whoever stops the run early keeps what there is."""
    if args.out is None:
        return
    import torch
    import triton

    name = "models" if args.models else "zoo"
    gpu = "none" if args.dry else torch.cuda.get_device_name()
    told = {"gpu": gpu, "torch": torch.__version__, "triton": triton.__version__}
    told |= {"arguments": sys.argv[1:], "rows": rows}
    (args.out / f"{name}.json").write_text(json.dumps(told, indent=1) + "\n")
    with open(args.out / f"{name}.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, FIELDS[name].split(), extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)


def main() -> int:
    args = options()
    import torch

    if not args.dry and not torch.cuda.is_available():
        print("bench.py: no NVIDIA GPU that torch can use", file=sys.stderr)
        return 2
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
    if args.suite:
        with tempfile.TemporaryDirectory() as folder:
            if args.suite == "extra":  # which tells how long compilers take
                os.environ["TRITON_CACHE_DIR"] = folder
            rows = Suite(args).run()
        summary(rows)
        return int(any(row["peer"] == "flashlight" and not row["ms"] for row in rows))
    if args.models:
        rows = run_models(args)
        return int(any(not row.get("ok") for row in rows))
    with tempfile.TemporaryDirectory() as folder:
        rows = Zoo(args, folder).run()
    summary_of_zoo(rows)
    return int(any(row.get("ok") is False for row in rows))


if __name__ == "__main__":
    sys.exit(main())
