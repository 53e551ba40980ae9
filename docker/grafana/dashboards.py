"""Write dashboards/*.json, which Grafana reads, from boards/*.py; tests/unit/test_monitoring.py checks that they match.

python docker/grafana/dashboards.py [--output FOLDER]
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from boards.platform import platform
from boards.serving import serving
from boards.training import training


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the dashboards.")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "dashboards")
    output = parser.parse_args().output
    for made in (platform(), training(), serving()):
        name = made["uid"].removeprefix("genmodels-")
        (output / f"{name}.json").write_text(json.dumps(made, indent=1) + "\n")


if __name__ == "__main__":
    main()
