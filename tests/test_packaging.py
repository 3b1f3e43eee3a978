"""What is installed is what is here: every package, and the templates."""

from __future__ import annotations

import configparser
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def packages_here() -> set[str]:
    """Every folder below rewriter/ that holds Python files, by its dotted name."""
    folders = {path.parent.relative_to(ROOT) for path in (ROOT / "rewriter").rglob("*.py")}
    return {".".join(folder.parts) for folder in folders}


def test_every_package_is_listed_in_setup_cfg():
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    listed = set(config["options"]["packages"].split())
    assert listed == packages_here() | {"rewriter.templates"}


@pytest.fixture(scope="module")
def wheel_names(tmp_path_factory) -> set[str]:
    """Names of the files in a wheel, built from a copy: a build leaves its own folders behind."""
    copy = tmp_path_factory.mktemp("copy")
    for name in ("setup.cfg", "pyproject.toml", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    for name in ("rewriter", "templates"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation"]
    subprocess.run([*command, "--quiet", "--wheel-dir", "dist", "."], cwd=copy, check=True)
    (wheel,) = (copy / "dist").glob("*.whl")
    return set(zipfile.ZipFile(wheel).namelist())


def test_the_wheel_holds_every_module_and_template(wheel_names):
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "rewriter").rglob("*.py")}
    found = (path.relative_to(ROOT) for path in (ROOT / "templates").rglob("*.jinja"))
    templates = {f"rewriter/{path}" for path in found}
    assert modules | templates | {"rewriter/templates/__init__.py"} <= wheel_names


def test_an_install_finds_the_templates():
    """From another folder, so that the checkout is not simply the current one."""
    code = "import importlib.resources as r; print(r.files('rewriter.templates'))"
    command = [sys.executable, "-c", code]
    run = subprocess.run(command, cwd=ROOT.parent, capture_output=True, text=True, check=False)
    if "No module named 'rewriter'" in run.stderr:
        pytest.skip("the package is not installed")
    assert run.returncode == 0, run.stderr
    assert "templates" in run.stdout
