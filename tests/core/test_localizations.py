"""The languages that come with the extension."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_every_text_of_the_page_is_translated_and_the_files_are_up_to_date():
    command = [sys.executable, ROOT / "tools" / "make_localizations.py", "--check"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
