"""Processes that measure for `bench.py`."""

from __future__ import annotations

import csv
import multiprocessing
import os
import statistics
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from pathlib import Path

TASK_SECONDS = 150  # a task that takes longer hangs
SHARES = {"rewrite": 0.4, "prepare": 0.7}  # of the time, by when the last is begun
COLUMNS = "suite variant peer B H Hkv S D ms tflops error note".split()


class Worker:
    """A process that measures tasks. One that crashes or hangs costs its task, not the run."""

    def __init__(self, work, args):
        from bench_zoo import serve

        log = str(args.out / "workers.log") if args.out else os.devnull
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=serve, args=(theirs, work, log), daemon=True)
        self.process.start()
        theirs.close()  # so that its end is seen here

    def ask(self, task, seconds: float) -> dict | None:
        """The task's row; None if the worker is lost, which ends it."""
        try:
            self.connection.send(task)
            if self.connection.poll(seconds):
                return self.connection.recv()
        except (EOFError, OSError):
            pass
        self.process.kill()
        return None


class Suite:
    """A suite's rows: rewritten and compiled side by side, then measured one at a time, as nothing else runs."""

    def __init__(self, args):
        from bench_rows import SUITES
        from bench_suites import Task, perform

        self.args, self.start, self.perform = args, time.time(), perform
        self.rows = [r for r in SUITES[args.suite](args.quick) if args.only in r.name]
        self.task = lambda step, row: Task(step, args.suite, row.name, str(args.cache), args.dry)
        self.workers: list[Worker | None] = [None] * min(args.jobs, len(self.rows))
        self.owners: dict[str, Worker] = {}
        self.lost: dict[str, str] = {}
        self.out: list[dict] = []

    def run(self) -> list[dict]:
        self._each("rewrite", {row.program: row for row in self.rows}.values())
        print(f"rewritten after {time.time() - self.start:.0f} s", flush=True)
        self._each("prepare", self.rows)
        print(f"compiled after {time.time() - self.start:.0f} s", flush=True)
        for row in self.rows:
            self._add(row, self._measured(row))
        print(f"measured after {time.time() - self.start:.0f} s", flush=True)
        for worker in filter(None, self.workers):
            worker.process.kill()
        return self.out

    def _each(self, step: str, rows: Iterable) -> None:
        """A step of all rows, side by side; those not begun in its share of the time are left out."""
        waiting, end = deque(rows), self.start + SHARES[step] * self.args.seconds

        def drive(place: int) -> None:
            while row := _popped(waiting):
                worker = self.workers[place] = self.workers[place] or Worker(self.perform, self.args)
                self.owners[row.name] = worker
                told = worker.ask(self.task(step, row), TASK_SECONDS) if time.time() < end else {"failed": "time is up"}
                if told is None:
                    self.workers[place] = None
                    told = {"failed": f"{step}: crashed, or took too long"}
                if "failed" in told:
                    self.lost[row.name] = told["failed"]

        in_threads(drive, len(self.workers))

    def _measured(self, row) -> dict:
        """Of a row whose worker has crashed at another one, anew."""
        if row.name in self.lost or time.time() > self.start + self.args.seconds:
            return {"failed": self.lost.get(row.name, "time is up")}
        owner, told = self.owners[row.name], {}
        if not owner.process.is_alive():
            owner = Worker(self.perform, self.args)
            self.workers.append(owner)
            told = owner.ask(self.task("prepare", row), TASK_SECONDS)
        if told is not None and "failed" not in told:
            told = owner.ask(self.task("measure", row), TASK_SECONDS)
        return told or {"failed": "measure: crashed, or took too long"}

    def _add(self, row, told: dict) -> None:
        sizes = [row.suite, row.variant, "flashlight", row.batch, row.heads, row.kv_heads, row.length, row.dim]
        failed = dict(zip(COLUMNS, [*sizes, "", "", "", told.get("failed", "")]))
        new = told.get("rows") or [failed]
        self.out += new
        seconds = ", ".join(f"{name} {took:.1f} s" for name, took in told.get("seconds", {}).items())
        print(f"# {row.name}: {seconds}", flush=True)
        for line in new:
            print(",".join(str(line[c]) for c in COLUMNS), flush=True)
        self._save()

    def _save(self) -> None:
        """After every row: whoever stops the run early keeps what there is."""
        from bench_plot import svg

        if self.args.csv:
            with open(self.args.csv, "w", newline="") as file:
                writer = csv.DictWriter(file, COLUMNS)
                writer.writeheader()
                writer.writerows(self.out)
        if self.args.plot:
            Path(self.args.plot).write_text(svg(self.out, f"{self.args.suite}, on {machine(self.args.dry)}"))


def _popped(waiting: deque):
    try:
        return waiting.popleft()
    except IndexError:
        return None


def in_threads(drive: Callable[[int], None], count: int) -> None:
    threads = [threading.Thread(target=drive, args=(k,), daemon=True) for k in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def machine(dry: bool) -> str:
    import torch
    import triton

    gpu = "a CPU" if dry else torch.cuda.get_device_name()
    return f"{gpu}, torch {torch.__version__}, triton {triton.__version__}"


def summary(rows: list[dict]) -> None:
    """How much quicker than each peer: the geometric mean, and the least."""
    from bench_plot import COLOURS

    ours, *peers = COLOURS
    times: dict[str, dict[tuple, float]] = {}
    for row in rows:
        if row["ms"]:
            key = tuple(row[c] for c in "suite variant B H Hkv S D".split())
            times.setdefault(row["peer"], {})[key] = float(row["ms"])
    for peer in filter(times.get, peers):
        both = times[peer].keys() & times.get(ours, {}).keys()
        ratios = [times[peer][key] / times[ours][key] for key in both]
        if ratios:
            mean = statistics.geometric_mean(ratios)
            print(f"{peer}: {mean:.2f} times its speed, least {min(ratios):.2f}, {len(ratios)} rows")
