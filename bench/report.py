"""The rows of a measurement as a summary, a table for the terminal and a page of Markdown."""

from collections.abc import Sequence
from typing import Any

from bench.timing import commit

Row = dict[str, Any]

TITLES = (
    "op",
    "pass",
    "contender",
    "ms",
    "quartiles",
    "rate",
    "of ceiling",
    "launch ms",
    "peak MiB",
    "error",
    "/ ours",
)


def summarise(rows: Sequence[Row]) -> list[Row]:
    """One entry an op and pass: its kernel, the fastest peer that does all of its work, and peer over kernel."""
    entries = []
    for op, name in dict.fromkeys((row["op"], row["pass"]) for row in rows):
        group = [row for row in rows if (row["op"], row["pass"]) == (op, name)]
        kernel = group[0]
        peers = [row for row in group if row["status"] == "timed" and row["whole"] and not row["ours"]]
        peer = min(peers, key=lambda row: row["median_ms"], default={})
        ours_ms, peer_ms = kernel.get("median_ms"), peer.get("median_ms")
        entries.append(
            {
                "op": op,
                "pass": name,
                "status": kernel["status"],
                "ours_ms": ours_ms,
                "best_peer": peer.get("contender"),
                "best_peer_ms": peer_ms,
                "ratio": peer_ms / ours_ms if ours_ms and peer_ms else None,
                "share_of_ceiling": kernel.get("share_of_ceiling"),
            }
        )
    return entries


def number(value: float | None, form: str = ".3f") -> str:
    return "-" if value is None else format(value, form)


def table(summary: Sequence[Row]) -> str:
    """At most 100 columns, a line an op and pass."""
    lines = [f"{'op':<22}{'pass':<8}{'ours ms':>9}  {'best peer':<30}{'ms':>9}{'peer/ours':>10}{'ceiling':>9}"]
    for e in summary:
        line = f"{e['op'][:21]:<22}{e['pass'][:7]:<8}"
        if e["ours_ms"] is None:
            line += e["status"]
        else:
            line += f"{number(e['ours_ms']):>9}  {(e['best_peer'] or '-')[:29]:<30}{number(e['best_peer_ms']):>9}"
            line += f"{number(e['ratio'], '.2f'):>10}{number(e['share_of_ceiling'], '.0%'):>9}"
        lines.append(line[:100])
    return "\n".join(lines)


def markdown(record: Row) -> str:
    """Every contender in one table, under what was measured and on what."""
    e, ceilings = record["environment"], record["ceilings"]
    lines = [
        f"# Kernels on {e['device']}",
        "",
        f"`{record['command']}`, {record['date']}, {commit(e)};",
        f"torch {e['torch']}, Triton {e['triton']}, Python {e['python']}, driver {e['driver']};",
        f"backend {e['backend']}; shapes {record['shapes']}, {record['dtype']}. Ceilings measured in the same run:",
        f"{ceilings['TFLOP/s']:.4g} TFLOP/s (GEMM), {ceilings['GB/s']:.0f} GB/s (copy).",
        "An error is a part of the largest true value; peak memory is what a call takes beyond its inputs;",
        "the last column divides by the time of the kernel, the first row of its op and pass.",
        "",
        "| " + " | ".join(TITLES) + " |",
        "|---|---|---|" + "--:|" * (len(TITLES) - 3),
    ]
    kernels = {(s["op"], s["pass"]): s["ours_ms"] for s in record["summary"]}
    for row in record["rows"]:
        cells = [row["op"], row["pass"], row["contender"] + ("" if row["whole"] else " (part of the work)")]
        if row["status"] == "timed":
            ours_ms = kernels[row["op"], row["pass"]]
            cells += [
                number(row["median_ms"], ".4f"),
                " to ".join(number(q, ".4f") for q in row["quartiles_ms"]),
                f"{row['rate']:.4g} {row['unit']}",
                number(row["share_of_ceiling"], ".0%"),
                number(row["host_ms"]),
                number(row["peak_mib"], ".0f"),
                number(max(row["errors"]) if row["errors"] else None, ".1e"),
                number(row["median_ms"] / ours_ms if ours_ms else None, ".2f"),
            ]
        else:
            cells += [row["status"].replace("|", "/")] + [""] * (len(TITLES) - 4)
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"
