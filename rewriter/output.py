"""Writing the package: all of it or nothing, nowhere but in OUT, and never over the user's edits.

OUT's `report.json` remembers the sha256 of every file as we wrote it: a kernel file that no longer
has it was edited. The same key marks the folder as ours.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from rewriter.errors import ExitCode, RewriteError, Site

REPORT = "report.json"
GENERATOR = "flashlight-rewrite"
_KERNELS = "kernels"
_STAGING = ".flashlight-"


@dataclass(frozen=True)
class WriteResult:
    """Paths below OUT: written, kept because they were edited, removed because no longer made."""

    written: tuple[Path, ...]
    kept: tuple[Path, ...]
    removed: tuple[Path, ...] = ()


def check_destination(out: Path, *, source: Path | None = None, force: bool = False) -> None:
    """See before the work starts that OUT can be written, and is ours or empty.

    Raises:
        RewriteError: with code BAD_INPUT, where it can't be, or is not (and `force` is not given),
            or where `source`, the user's file, lies in it.
    """
    if os.path.lexists(out) and not out.is_dir():
        raise _refusal(out, "exists, and is not a folder")
    if source and out.resolve() in source.resolve().parents:
        raise _refusal(out, f"can't be written to: {source} lies in it")
    _probe(out)
    if out.is_dir() and any(out.iterdir()) and _recorded(out) is None and not force:
        raise _refusal(out, f"is not empty, and was not written by {GENERATOR} (--force writes there)")


def write_package(out: Path, files: Mapping[str, str], *, force: bool = False) -> WriteResult:
    """Write `files` (name below OUT → text) and `report.json` with their hashes under `files`.

    Kernel files the user has edited are kept, unless `force`; unedited ones that are no longer made
    are removed. If anything fails, OUT is as it was.

    Raises:
        RewriteError: with code BAD_INPUT, where OUT can't be written or is not ours.
        ValueError: where a name leads out of OUT.
    """
    for name in files:
        _verify_name(name)
    check_destination(out, force=force)
    texts = dict(files)
    texts[REPORT] = _with_hashes(texts)
    try:
        if out.is_dir():
            return _update(out, texts, force=force)
        return _create(out, texts)
    except OSError as error:
        raise _refusal(out, f"can't be written: {error.strerror or error}") from error


def _refusal(path: Path, text: str) -> RewriteError:
    return RewriteError(text, site=Site(str(path)), code=ExitCode.BAD_INPUT)


def _verify_name(name: str) -> None:
    path = PurePosixPath(name)
    if not path.parts or path.is_absolute() or ".." in path.parts or "\\" in name:
        raise ValueError(f"{name!r} does not name a file below the package's folder")


def _probe(out: Path) -> None:
    """Make and remove a folder where the first new one would be: permission bits don't tell all."""
    there = next(path for path in (out, *out.absolute().parents) if os.path.lexists(path))
    if not there.is_dir():
        raise _refusal(out, f"can't be made: {there} is not a folder")
    try:
        os.rmdir(tempfile.mkdtemp(prefix=_STAGING, dir=there))
    except OSError as error:
        raise _refusal(out, f"can't be written: {error.strerror}") from error


# --- what was written when


def sha256(data: bytes) -> str:
    """The hash under which a file is remembered."""
    return hashlib.sha256(data).hexdigest()


def _with_hashes(texts: Mapping[str, str]) -> str:
    """`report.json` as it was made, in its own order, with the hashes of the other files."""
    report = json.loads(texts.get(REPORT, "{}"))
    report.setdefault("generator", GENERATOR)
    others = sorted(name for name in texts if name != REPORT)
    report["files"] = {name: sha256(texts[name].encode()) for name in others}
    return json.dumps(report, indent=2, ensure_ascii=False) + "\n"


def _recorded(out: Path) -> dict[str, str] | None:
    """Hashes by name from an earlier run, or None where OUT is not ours."""
    try:
        report = json.loads((out / REPORT).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    ours = isinstance(report, dict) and report.get("generator") == GENERATOR
    files = report.get("files") if ours else None
    return files if isinstance(files, dict) else None


def _is_kernel(name: str) -> bool:
    path = PurePosixPath(name)
    return path.parts[0] == _KERNELS and path.suffix == ".py"


def _is_edited(path: Path, recorded: str | None, made: str | None = None) -> bool:
    """Whether `path` holds other text than we wrote, or (as `made`) are about to write."""
    if not path.is_file():
        return False
    found = path.read_bytes()
    return sha256(found) != recorded and (made is None or found != made.encode())


# --- all or nothing


def _create(out: Path, texts: Mapping[str, str]) -> WriteResult:
    """A new OUT appears whole, by one rename."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with _staging(out.parent) as staging:
        # A folder inside, because the staging folder itself is readable by its owner alone.
        _fill(staging / "new", texts)
        os.rename(staging / "new", out)
    return WriteResult(_paths(out, texts), ())


@dataclass(frozen=True)
class _Change:
    """What an update does to an existing OUT, by name."""

    written: dict[str, str]
    removed: tuple[str, ...]
    kept: tuple[str, ...]


def _planned(out: Path, texts: Mapping[str, str], force: bool) -> _Change:
    recorded = _recorded(out) or {}
    kept = [name for name in texts if not force and _is_kept(out, name, recorded, texts[name])]
    stale = [name for name in recorded if name not in texts and _is_safe_kernel(name)]
    edited = [name for name in stale if _is_edited(out / name, recorded[name])]
    removed = [name for name in stale if name not in edited and (out / name).is_file()]
    written = {name: text for name, text in texts.items() if name not in kept}
    return _Change(written, tuple(removed), (*kept, *edited))


def _update(out: Path, texts: Mapping[str, str], *, force: bool) -> WriteResult:
    """Files of an existing OUT are replaced one by one; whatever fails, they are put back."""
    change = _planned(out, texts, force)
    for name in (*change.written, *change.removed):
        _verify_place(out, name)
    with _staging(out) as staging:
        _fill(staging / "new", change.written)
        with _undoing(out, staging / "old") as take_away:
            for name in change.removed:
                take_away(name)
            # The report last: until it is there, the old hashes are the ones that hold.
            for name in sorted(change.written, key=lambda name: (name == REPORT, name)):
                take_away(name)
                (out / name).parent.mkdir(parents=True, exist_ok=True)
                os.replace(staging / "new" / name, out / name)
    return WriteResult(*(_paths(out, n) for n in (change.written, change.kept, change.removed)))


@contextlib.contextmanager
def _undoing(out: Path, old: Path) -> Iterator[Callable[[str], None]]:
    """Yield what moves a file of OUT out of the way; if the block fails, all are moved back."""
    existed: dict[str, bool] = {}

    def take_away(name: str) -> None:
        existed[name] = os.path.lexists(out / name)
        if existed[name]:
            (old / name).parent.mkdir(parents=True, exist_ok=True)
            os.replace(out / name, old / name)

    try:
        yield take_away
    except BaseException:
        for name, was_there in existed.items():
            if not was_there:
                (out / name).unlink(missing_ok=True)
            elif os.path.lexists(old / name):
                os.replace(old / name, out / name)
        raise


@contextlib.contextmanager
def _staging(folder: Path) -> Iterator[Path]:
    """A folder for unfinished files, on the file system they will end on."""
    staging = Path(tempfile.mkdtemp(prefix=_STAGING, dir=folder))
    try:
        yield staging
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _fill(folder: Path, texts: Mapping[str, str]) -> None:
    folder.mkdir()
    for name, text in texts.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(text.encode())


def _verify_place(out: Path, name: str) -> None:
    """A folder where the file should be, or a link that leads out of OUT, is not ours to change."""
    path = out / name
    if path.is_dir() and not path.is_symlink():
        raise _refusal(path, "is a folder, where a file should be written")
    if not path.parent.resolve().is_relative_to(out.resolve()):
        raise _refusal(path, f"lies outside {out}, through a link")


def _paths(out: Path, names: Iterable[str]) -> tuple[Path, ...]:
    return tuple(out / name for name in sorted(names))


def _is_kept(out: Path, name: str, recorded: Mapping[str, str], made: str) -> bool:
    return _is_kernel(name) and _is_edited(out / name, recorded.get(name), made)


def _is_safe_kernel(name: str) -> bool:
    """Names read from a report.json are the user's to change: none may lead out of OUT."""
    try:
        _verify_name(name)
    except ValueError:
        return False
    return _is_kernel(name)
