# Sourced by scripts/demo and scripts/test, from the repository's root.
#
# Makes .venv with the package in it, and makes it anew only when what it is made from has changed.
# Leaves its programs first in PATH. FLASHLIGHT_PYTHON names the Python to use, of version 3.11 or
# later; without it, the first of the usual names that is one.

pick_python() {
    local name
    for name in ${FLASHLIGHT_PYTHON:-python3.11 python3.12 python3.13 python3 python3.14}; do
        if "$name" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null
        then
            echo "$name"
            return
        fi
    done
    echo "No Python 3.11 or later with venv and pip: install python3 and python3-venv," >&2
    echo "or name one in FLASHLIGHT_PYTHON." >&2
    return 2
}

# The folder is part of it: the programs of a venv and an editable install hold its path.
venv_stamp() {
    { pwd; echo "${FLASHLIGHT_PYTHON:-}"; cat setup.cfg pyproject.toml constraints.txt; } | cksum
}

install_venv() {
    .venv/bin/python -m pip install --disable-pip-version-check --progress-bar off \
        --constraint constraints.txt --editable '.[test]'
}

ensure_venv() {
    local stamp=.venv/flashlight.stamp log=.venv/install.log python
    if ! [[ -x .venv/bin/python && -f $stamp && $(<"$stamp") == "$(venv_stamp)" ]]; then
        python=$(pick_python) || return
        echo "Setting up .venv with $python, a minute or more (log: $log)" >&2
        "$python" -m venv --clear .venv || return
        if ! install_venv >"$log" 2>&1; then
            tail -n 30 "$log" >&2
            echo "The installation failed; all of it is in $log" >&2
            return 1
        fi
        venv_stamp >"$stamp"
    fi
    PATH=$PWD/.venv/bin:$PATH
}

ensure_venv
