"""How long a command takes from its start to its end, warm file cache: `python -m bench.startup`.

Whole processes, wall clock: one run to warm the cache, then nine; writes bench/results/startup.json.
"""

import statistics
import subprocess
import sys
import time
from pathlib import Path

from bench import report

SCRIPT = Path(sys.executable).parent / "trocr-fast"
LINES = report.ROOT / "examples" / "lines"
COMMANDS = {
    "python -c 'import torch'": [sys.executable, "-c", "import torch"],  # what no reader can avoid
    "trocr-fast --help": [str(SCRIPT), "--help"],
    "trocr-fast read one.png": [str(SCRIPT), "read", str(LINES / "total.png")],
    "make read": ["make", "--silent", "read"],
}
RUNS = 9


def seconds(command: list[str]) -> float:
    """Wall time of one whole run.

    Raises:
        subprocess.CalledProcessError: the command failed, so its time means nothing.
    """
    start = time.perf_counter()
    subprocess.run(command, cwd=report.ROOT, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return time.perf_counter() - start


def main() -> None:
    measurements = {}
    print(f"{'command':<28}{'median':>8}{'fastest':>9}{'slowest':>9}   (seconds)")
    for name, command in COMMANDS.items():
        seconds(command)
        times = sorted(seconds(command) for _ in range(RUNS))
        measurements[name] = {
            "median_s": round(statistics.median(times), 3),
            "fastest_s": round(times[0], 3),
            "slowest_s": round(times[-1], 3),
            "runs": RUNS,
        }
        print(f"{name:<28}{statistics.median(times):>8.2f}{times[0]:>9.2f}{times[-1]:>9.2f}")
    print(f"written to {report.write('startup', measurements).relative_to(report.ROOT)}")


if __name__ == "__main__":
    main()
