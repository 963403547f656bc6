"""Makes the development environment: a virtual environment with PyTorch for the CPU and the tools.

Usage: python tools/setup_venv.py FOLDER (Python 3.10 to 3.13; ``make`` calls it).
"""

import subprocess
import sys
import venv
from pathlib import Path

TORCH = "torch==2.13.0"
CPU_INDEX = "https://download.pytorch.org/whl/cpu"  # PyPI's build for Linux is the one with CUDA


def main() -> None:
    """Creates the environment, or brings an existing one up to date."""
    if not (3, 10) <= sys.version_info[:2] <= (3, 13):
        sys.exit(
            f"This is Python {sys.version.split()[0]}; the WebUIs' Pythons are 3.10 to 3.13: "
            f"call make with PYTHON=python3.11, for example."
        )
    folder = Path(sys.argv[1])
    venv.EnvBuilder(with_pip=True).create(folder)
    python = folder / ("Scripts" if sys.platform == "win32" else "bin") / "python"
    pip = [python, "-m", "pip", "install", "--disable-pip-version-check", "--quiet"]
    has_torch = subprocess.run([python, "-c", "import torch"], capture_output=True, check=False)
    if has_torch.returncode:
        # Not reachable is no error: pip then takes the build from its ordinary index.
        subprocess.run([*pip, "--retries", "0", "--extra-index-url", CPU_INDEX, TORCH], check=True)
    requirements = Path(__file__).resolve().parent.parent / "requirements-dev.txt"
    subprocess.run([*pip, "-r", requirements], check=True)


if __name__ == "__main__":
    main()
