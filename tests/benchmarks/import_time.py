"""How long `import trl_rlsd` takes beyond starting Python: medians of processes that alternate.

python tests/benchmarks/import_time.py [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path


ROOT = Path(__file__).parents[2]
STATEMENTS = {
    "python": "pass",
    "trl_rlsd": "import trl_rlsd",
    "cli_help": "import trl_rlsd.cli, contextlib, io\nwith contextlib.redirect_stdout(io.StringIO()), "
    "contextlib.suppress(SystemExit):\n    trl_rlsd.cli.main(['--help'])",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--turns", type=int, default=21)
    parser.add_argument("--device", help="ignored: this is Python's import alone")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    seconds: dict[str, list[float]] = {name: [] for name in STATEMENTS}
    for _ in range(options.turns):
        for name, statement in STATEMENTS.items():
            started = time.perf_counter()
            subprocess.run([sys.executable, "-c", statement], cwd=ROOT, check=True)
            seconds[name].append(time.perf_counter() - started)
    medians = {name: statistics.median(own) for name, own in seconds.items()}
    result = {
        "turns": options.turns,
        "median_seconds": medians,
        "beyond_python": {name: own - medians["python"] for name, own in medians.items() if name != "python"},
        "times_python": {name: own / medians["python"] for name, own in medians.items() if name != "python"},
    }
    print(json.dumps(result, indent=2))
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
