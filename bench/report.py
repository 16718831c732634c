"""What every result carries: the machine, the versions and the commit."""

import json
import os
import platform
import subprocess
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "bench" / "results"


def circumstances() -> dict[str, Any]:
    """Where and with what a measurement was made."""
    return {
        "date": time.strftime("%Y-%m-%d"),
        "commit": os.environ.get("TROCR_FAST_COMMIT") or _git("rev-parse", "--short", "HEAD"),
        # but for results, of which a run writes several
        "uncommitted_changes": bool(_git("status", "--porcelain", "-uno", "--", ".", ":!bench/results")),
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "versions": {name: version(name) for name in ("torch", "transformers", "pillow", "numpy", "tokenizers")},
    }


def write(name: str, measurements: Any) -> Path:
    """Write bench/results/NAME.json."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps({**circumstances(), "measurements": measurements}, indent=2) + "\n")
    return path


def _git(*arguments: str) -> str:
    """What git says; nothing where there is no git or no repository (TROCR_FAST_COMMIT tells the commit there)."""
    try:
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    except FileNotFoundError:
        return ""


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor()
