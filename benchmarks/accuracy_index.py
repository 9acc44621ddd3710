"""Write the page above the accuracy reports of several models from their results.

    python benchmarks/accuracy_index.py [--reports reports/accuracy] [--again]

With ``--again`` the command of every report is run first; what is measured already, under runs/accuracy, is not
measured again.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
from pathlib import Path

from termwise.algorithms.files import write_text
from termwise.flow.accuracy import index_text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reports", type=Path, default=Path("reports/accuracy"))
    parser.add_argument("--again", action="store_true")
    arguments = parser.parse_args()
    files = sorted(arguments.reports.glob("*/results.json"), key=lambda path: path.parent.name)
    if arguments.again:
        for file in files:
            command = shlex.split(json.loads(file.read_text())["command"])
            subprocess.run([sys.executable, "-m", "termwise.flow.cli", *command[1:]], check=True)
    documents = [json.loads(file.read_text()) for file in files]
    write_text(arguments.reports / "report.md", index_text(documents, "python benchmarks/accuracy_index.py"))


if __name__ == "__main__":
    main()
