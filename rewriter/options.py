"""The command line, and what the user asked for as one value. Nothing here imports torch."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from rewriter import __version__
from rewriter.errors import ExitCode, RewriteError

PROG = "flashlight-rewrite"
STAGES = ("load", "trace", "lift", "derive", "plan", "emit", "patch", "check", "report")
ALL_STAGES = "all"  # `--print-ir` without a stage
DTYPES = ("fp32", "fp16", "bf16")  # what `--dtype` takes
TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")
MASKED_ROWS = ("match", "zero")

USAGE = """\
%(prog)s FILE[:CLASS] [-o OUT] [--input NAME=DTYPE[SHAPE] ...] [--check]
       [--dtype fp32|fp16|bf16] [--target sm_90,...] [--rows] [--masked-rows match|zero]
       [--force] [--print-ir[=STAGE]] [--stop-after STAGE] [--explain] [-q|-v] [--version]
"""

DESCRIPTION = """\
Rewrites the attention of a PyTorch module into readable Triton kernels and a drop-in module.

FILE holds `class Model`, `get_init_inputs()` and `get_inputs()`, as KernelBench lays files out,
or one nn.Module, or FILE:CLASS says which class or function, with --input for its arguments.
"""

EPILOG = """\
exit codes: 0 done, 1 check failed, 2 usage or bad input, 3 trace or emit failure,
4 nothing to fuse, 130 interrupted.

  flashlight-rewrite my_model.py --check
  flashlight-rewrite my_model.py:Attention --input 'x=fp32[2,37,64]' --input 'mask=bool[37,37]'
  flashlight-rewrite my_ops.py:attend --input 'q=fp16[1,4,50,24]' --input 'ids=int64[2,50]<100'
"""

FLOAT_INPUTS = (*DTYPES, "fp64")
INT_INPUTS = ("int64", "int32", "int16", "int8", "uint8")
INPUT_DTYPES = (*FLOAT_INPUTS, *INT_INPUTS, "bool")
_TORCH_NAMES = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16", "float64": "fp64"}

_INPUT = re.compile(
    r"(?P<name>[^\W\d]\w*)=(?P<dtype>\w+)" r"\[\s*(?P<shape>(?:\d+(?:\s*,\s*\d+)*)?)\s*\]" r"(?:<(?P<bound>\d+))?"
)
_TARGET = re.compile(r"sm_\d{2,3}a?|gfx[0-9a-f]{3,4}")


def bad_usage(text: str) -> RewriteError:
    """The error for a command line that can't be understood."""
    return RewriteError(text, code=ExitCode.BAD_INPUT)


@dataclass(frozen=True)
class InputSpec:
    """One `--input NAME=DTYPE[SHAPE]`; `bound`, for integers, is what every value is less than."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    bound: int | None = None

    @classmethod
    def parse(cls, text: str) -> InputSpec:
        """Read `q=fp32[1,4,37,16]`, `mask=bool[37,37]`, `ids=int64[2,37]<100`.

        Raises:
            RewriteError: with code BAD_INPUT, where the text is none of these.
        """
        match = _INPUT.fullmatch(text.strip())
        if match is None:
            raise bad_usage(f"--input {text}: expected NAME=DTYPE[SHAPE], as in q=fp32[1,4,37,16]")
        shape = tuple(int(size) for size in re.findall(r"\d+", match["shape"]))
        bound = int(match["bound"]) if match["bound"] else None
        dtype = _TORCH_NAMES.get(match["dtype"], match["dtype"])
        spec = cls(match["name"], dtype, shape, bound)
        spec._verify(text)
        return spec

    def _verify(self, text: str) -> None:
        if self.dtype not in INPUT_DTYPES:
            raise bad_usage(f"--input {text}: no dtype {self.dtype!r}; there are {', '.join(INPUT_DTYPES)}")
        if 0 in self.shape:
            raise bad_usage(f"--input {text}: sizes start at 1")
        if self.bound is not None and self.dtype not in INT_INPUTS:
            raise bad_usage(f"--input {text}: a bound is for integers, and {self.dtype} is not one")
        if self.bound == 0:
            raise bad_usage(f"--input {text}: no integer lies in [0, 0)")


@dataclass(frozen=True)
class Options:
    """Everything the command line says. `out_dir` is where the package goes."""

    file: Path
    class_name: str | None = None
    out: Path | None = None
    inputs: tuple[InputSpec, ...] = ()
    check: bool = False
    dtype: str | None = None
    targets: tuple[str, ...] = TARGETS
    rows: bool = False
    masked_rows: str = "match"
    force: bool = False
    print_ir: str | None = None
    stop_after: str | None = None
    explain: bool = False
    quiet: bool = False
    verbose: bool = False

    @property
    def writes(self) -> bool:
        """Whether the run gets as far as making files."""
        return self.stop_after is None or STAGES.index(self.stop_after) >= STAGES.index("patch")

    @property
    def out_dir(self) -> Path:
        """`-o`, or `<stem>_flashlight` beside the file, spelt so that Python can import it."""
        return self.out or self.file.parent / f"{identifier(self.file.stem)}_flashlight"


def identifier(stem: str) -> str:
    """`my-model` → `my_model`, `97_Loss` → `_97_Loss`: a stem as a name Python can import."""
    name = re.sub(r"\W", "_", stem)
    return f"_{name}" if name[:1].isdigit() else name


def parse_options(argv: Sequence[str]) -> Options:
    """Read the command line.

    Raises:
        RewriteError: with code BAD_INPUT, where it can't be understood.
        SystemExit: after `--help` and `--version`, which print to stdout.
    """
    found = _parser().parse_args(_complete(argv))
    file, class_name = parse_file(found.file)
    return Options(
        file=file,
        class_name=class_name,
        out=found.out,
        inputs=tuple(InputSpec.parse(text) for text in found.input),
        check=found.check,
        dtype=found.dtype,
        targets=parse_targets(found.target) if found.target is not None else TARGETS,
        rows=found.rows,
        masked_rows=found.masked_rows,
        force=found.force,
        print_ir=found.print_ir,
        stop_after=found.stop_after,
        explain=found.explain,
        quiet=found.quiet,
        verbose=found.verbose,
    )


class _Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line, raised rather than printed below the usage."""

    def error(self, message: str) -> NoReturn:
        """Raise what argparse would print."""
        raise bad_usage(f"{message} (see --help)")


def _complete(argv: Sequence[str]) -> list[str]:
    """Spell a bare `--print-ir` out: with `nargs="?"` it would take the FILE after it as STAGE."""
    return [f"--print-ir={ALL_STAGES}" if word == "--print-ir" else word for word in argv]


def _parser() -> _Parser:
    parser = _Parser(
        prog=PROG,
        usage=USAGE,
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("file", metavar="FILE[:CLASS]", help="the model, and which class or function of it")
    _add_input_arguments(parser)
    _add_rewrite_arguments(parser)
    _add_output_arguments(parser)
    return parser


def _add_input_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--input",
        action="append",
        default=[],
        metavar="NAME=DTYPE[SHAPE]",
        help="an argument of forward, once for each; `<N` after it bounds integers",
    )
    parser.add_argument("--dtype", choices=DTYPES, help="cast floating parameters and inputs")


def _add_rewrite_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--check", action="store_true", help="prove the result against a float64 run")
    add("--target", metavar="T,...", help=f"GPUs to compile for (default {','.join(TARGETS)})")
    add("--rows", action="store_true", help="rewrite lone rows of softmax and norms too")
    add(
        "--masked-rows",
        choices=MASKED_ROWS,
        default="match",
        help="what rows masked throughout give: what eager gives (default), or zeros",
    )


def _add_output_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("-o", "--out", type=Path, metavar="OUT", help="default <stem>_flashlight beside FILE")
    add("--force", action="store_true", help="overwrite kernel files that were edited")
    add(
        "--print-ir",
        choices=(*STAGES, ALL_STAGES),
        metavar="STAGE",
        help="print what every stage made, or with =STAGE that one",
    )
    add("--stop-after", choices=STAGES, metavar="STAGE", help=f"one of {', '.join(STAGES)}")
    add("--explain", action="store_true", help="print why each chain was fused or not")
    loudness = parser.add_mutually_exclusive_group()
    loudness.add_argument("-q", "--quiet", action="store_true", help="no progress")
    loudness.add_argument("-v", "--verbose", action="store_true", help="tracebacks and warnings")
    add("--version", action="version", version=f"{PROG} {__version__}")


def parse_file(text: str) -> tuple[Path, str | None]:
    """Split `FILE[:CLASS]`.

    Raises:
        RewriteError: with code BAD_INPUT, where what follows the colon is no name.
    """
    file, colon, name = text.rpartition(":")
    if not colon or not file or Path(text).exists():
        return Path(text), None
    if not name.isidentifier():
        raise bad_usage(f"{text}: {name!r} is not the name of a class or function")
    return Path(file), name


def parse_targets(text: str) -> tuple[str, ...]:
    """Split `sm_90,gfx942`.

    Raises:
        RewriteError: with code BAD_INPUT, where one is no GPU architecture.
    """
    targets = tuple(part.strip() for part in text.split(","))
    for target in targets:
        if not _TARGET.fullmatch(target):
            raise bad_usage(f"--target {text}: {target!r} is not a GPU target like {', '.join(TARGETS)}")
    return tuple(dict.fromkeys(targets))
