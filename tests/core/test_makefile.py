"""``make`` where it cannot do what it is asked for: a sentence, and nothing is built."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
MAKE = shutil.which("make")

pytestmark = pytest.mark.skipif(MAKE is None, reason="there is no make")


def refusal(venv: Path, *arguments: str, **environment: str) -> str:
    """What make says, whose environment for development is to be ``venv``."""
    # These tests may have been started by make itself, with variables of its own.
    ours = ("PYTHON", "HOST", "VENV", "MAKEFLAGS", "MFLAGS", "MAKELEVEL")
    outside = {name: value for name, value in os.environ.items() if name not in ours}
    before = sorted(venv.iterdir())
    result = subprocess.run(
        [MAKE, *arguments, f"VENV={venv}"],
        cwd=ROOT,
        env={**outside, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 2
    assert result.stdout == ""
    assert sorted(venv.iterdir()) == before
    return result.stderr


@pytest.mark.parametrize("newer", [True, False])
def test_no_python_that_will_do(tmp_path, newer):
    programs = tmp_path / "bin"
    programs.mkdir()
    if newer:  # than 3.13; the Makefile asks it
        (programs / "python3").write_text("#!/bin/sh\nexit 1\n")
        (programs / "python3").chmod(0o755)
    assert "no Python from 3.10 to 3.13" in refusal(tmp_path, "lint", PATH=str(programs))


def test_live_tests_of_an_unknown_host(tmp_path):
    (tmp_path / "ready").touch()
    said = refusal(tmp_path, "live", "HOST=comfy")
    assert "HOST=comfy" in said
    known = subprocess.run(
        [sys.executable, ROOT / "tests" / "live" / "hosts.py"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "a1111" in known.stdout.split()
    assert f"HOST= and one of {known.stdout.strip()}, or without HOST" in said
