"""``python -m fastgpt.report RUN…``: one HTML page about a run, or comparing several, that needs nothing else.

python -m fastgpt.report runs/quickstart                  runs/quickstart/report.html
python -m fastgpt.report runs/a runs/b --out both.html

A page works offline, on a phone and in the dark. It has the losses with their errors, the speed, the findings, what ran
where, and all data as JSON. Every run writes its own at its end.
"""

from collections.abc import Sequence
from pathlib import Path

from fastgpt.cli import Parser, run
from fastgpt.errors import RequestError
from fastgpt.train import report, run_folder


def main(argv: Sequence[str] | None = None) -> None:
    """Write the page."""
    parser = Parser(prog="python -m fastgpt.report", description=__doc__)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folders of runs")
    parser.add_argument("--out", metavar="FILE", help="where to write (RUN/report.html; report.html for several)")
    options = parser.parse_args(argv)
    runs = [Path(name) for name in options.runs]
    default = runs[0] / run_folder.REPORT if len(runs) == 1 else run_folder.REPORT
    out = Path(options.out or default)
    try:
        report.write(runs, out)
    except OSError as error:
        raise RequestError(f"cannot write {out}: {error.strerror}") from error
    print(out)


if __name__ == "__main__":
    run(main)
