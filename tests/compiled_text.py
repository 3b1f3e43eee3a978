"""What a kernel has become on its way to a GPU that is not here: Triton's own text, and the assembly's.

Run as a program it is the process that compiles: one in which Triton interprets cannot.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

WORKER = Path(__file__).parents[1] / "rewriter" / "check" / "compile_worker.py"


def compiled(request, folder: Path) -> dict[str, str]:
    """Every stage of a kernel: "ttgir", "ptx" and so on."""
    asked = json.dumps(asdict(request) | {"path": str(request.path)})
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"TRITON_CACHE_DIR": str(folder)}
    done = subprocess.run([sys.executable, __file__, asked], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def first_loop(ttgir: str) -> list[str]:
    """The lines of the first loop over a stream."""
    lines = ttgir[ttgir.index("scf.for") :].splitlines()
    ends = next(k for k, line in enumerate(lines) if re.match(r" {4}}", line))  # loops of the kernel stand at its level
    return lines[:ends]


def main() -> None:
    sys.path.insert(0, str(WORKER.parent))
    import compile_worker as worker
    import triton

    request = json.loads(sys.argv[1])
    fn = worker.find_kernel(request["path"], request["kernel"], request["target"])
    parts = worker.arg_types(fn, request), worker.constants(request), worker.alignments(fn, request)
    source = triton.compiler.ASTSource(fn, *parts)
    kernel = triton.compile(source, target=worker.target(request["target"]), options=request["options"])
    print(json.dumps({name: text for name, text in kernel.asm.items() if isinstance(text, str)}))


if __name__ == "__main__":
    main()
