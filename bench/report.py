"""What the reports share: the machine, and Markdown tables."""

from __future__ import annotations

import platform
from pathlib import Path

import numpy as np
import torch


def machine() -> dict:
    """What the figures were measured on and with."""
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = cpuinfo.read_text().splitlines()
        name = next((x.split(":")[1].strip() for x in lines if x.startswith("model name")), name)
    return {
        "processor": name,
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "threads": torch.get_num_threads(),
    }


def table(rows: list[dict], columns: dict[str, str]) -> str:
    """Markdown: ``columns`` maps a row's field to its heading."""

    def cell(value: object) -> str:
        if isinstance(value, list):
            return " – ".join(cell(item) for item in value)
        if not isinstance(value, float):
            return str(value)
        return f"{value:.4g}" if 0.9 < value < 2 else f"{value:.3g}"  # ratios near 1

    lines = ["| " + " | ".join(columns.values()) + " |", "|" + " --- |" * len(columns)]
    lines += ["| " + " | ".join(cell(row.get(name, "")) for name in columns) + " |" for row in rows]
    return "\n".join(lines)
