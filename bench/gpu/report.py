"""Writes the report of a run on a GPU: targets, tables, files.

``data`` is the content of the JSON: options, when it started, and ``sections`` by name, each with its items' rows.
Failures and missed targets come first. At most `PRINTED` characters are printed, because some see only the end.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from . import timing
from .races import COPY
from .timing import BACKWARD, BOTH, FORWARD, OURS, THEIRS

PRINTED = 11_500  # characters
SHOWN = 14  # items that did not end well
SHARE_OF_COPY, FUSED_SHARE_OF_COPY = 0.9, 0.85
HOST_RATIO = 1.5
Data = dict[str, Any]


def results(data: Data, section: str) -> list[Any]:
    """Of the items that have one."""
    items = data["sections"].get(section, {}).get("items", {})
    return [row["result"] for row in items.values() if row["status"] == "ok" and row["result"]]


def timed(data: Data, section: str) -> list[Any]:
    return [result for result in results(data, section) if "rows" in result]


def shares(result: Any, least: float) -> list[tuple[str, str, str, str, bool]]:
    """Forward and backward beside a copy."""
    found = []
    for operation in (FORWARD, BACKWARD):
        share = result["rows"].get(f"{OURS} {operation}", {}).get("share")
        if share is not None:
            must = f"at least {least:.0%} of the copy's bandwidth"
            found.append((operation, result["case"], must, f"{share:.1%}", share >= least))
    return found


def targets(data: Data) -> list[tuple[str, str, str, str, bool]]:
    """(what, case, must be, measured, met), misses first."""
    found = []
    for result in timed(data, "fused"):
        found += shares(result, FUSED_SHARE_OF_COPY)
    for result in timed(data, "kernels"):
        rows, case = result["rows"], result["case"]
        if case.startswith("256M"):
            found += shares(result, SHARE_OF_COPY)
        for other in (timing.NATIVE, timing.COMPILED):
            ratio = rows.get(f"{other} {BOTH}", {}).get("ratios", {}).get(f"{OURS} {BOTH}")
            if ratio is not None:
                found.append((f"{BOTH} against {other}", case, "faster", f"{ratio:.2f}x", ratio > 1.0))
    host = data["sections"].get("host", {}).get("items", {})
    case = f"{timing.HOST_ELEMENTS} elements"
    for name, row in host.get("calls", {}).get("result", {}).items():
        other = f"{THEIRS}, {name.rpartition(', ')[2]}"
        if name.startswith(OURS):
            ratio = row["ratios"][other]
            must = f"at most {HOST_RATIO}x {other}"
            found.append((f"host: {name}", case, must, f"{ratio:.2f}x", ratio <= HOST_RATIO))
    kept = host.get("kept", {}).get("result")
    if kept:
        limit = kept[THEIRS] // 8 + 4  # a byte per element there; our words are whole
        found.append(("bytes kept for backward", case, f"at most {limit}", f"{kept[OURS]}", kept[OURS] <= limit))
    return sorted(found, key=lambda target: target[4])


def report(data: Data) -> str:
    """Markdown."""
    tables = kernel_table(data), fused_table(data), smaller_tables(data), shape_table(data)
    parts = heading(data), correctness(data), judged(data), *tables
    return "\n".join(line for part in parts for line in part) + "\n"


def heading(data: Data) -> list[str]:
    about = next(iter(results(data, "machine")), {})
    lines = [f"# GPU report: {about.get('device', 'no device')}", ""]
    if data["options"]["dry_run"]:
        lines += ["**A dry run on the CPU: it shows that the script runs. No number here means anything.**", ""]
    versions = ", ".join(f"{name} {number}" for name, number in about.get("versions", {}).items())
    return [
        *lines,
        f"{about.get('sms', '?')} SMs, L2 {about.get('l2_bytes', 0) / 1e6:.0f} MB, memory "
        f"{about.get('memory_bytes', 0) / 1e9:.0f} GB; driver {about.get('driver_version', '?')}, SM clock at first "
        f"{about.get('clocks.sm', '?')} of {about.get('clocks.max.sm', '?')}; {versions}; {data['started'][:16]}, "
        f"{data.get('seconds', 0):.0f} s{', quick' if data['options']['quick'] else ''}.",
    ]


def correctness(data: Data) -> list[str]:
    lines, bad = ["", "## Sections", ""], []
    for name, section in data["sections"].items():
        statuses = [row["status"] for row in section["items"].values()]
        told = ", ".join(f"{statuses.count(status)} {status}" for status in dict.fromkeys(statuses)) or "nothing ran"
        told += "".join(f"; {result['summary']}" for result in results(data, name) if "summary" in result)
        mark = {"failed": "**failed**", "cut": "**cut short**"}.get(section["status"], "ok")
        lines.append(f"* {section['title']}: {mark}; {told}; {section['seconds']} s")
        bad += [(name, item, row) for item, row in section["items"].items() if row["status"] != "ok"]
    bad.sort(key=lambda entry: ("failed", "not run", "skipped").index(entry[2]["status"]))
    if bad:
        lines += ["", "| section | item | | why |", "|---|---|---|---|"]
    for name, item, row in bad[:SHOWN]:
        mark = "**failed**" if row["status"] == "failed" else row["status"]
        lines.append(f"| {name} | {item} | {mark} | {cell(row['error'], 200)} |")
    return [*lines, f"| | and {len(bad) - SHOWN} more | | |"] if len(bad) > SHOWN else lines


def judged(data: Data) -> list[str]:
    found = targets(data)
    if not found:
        return []
    lines = ["", "## Targets", ""]
    if data["sections"].get("suite", {}).get("status") != "ok":
        lines += [
            "**The tests have not passed: what follows are times of something that isn't known to be right.**",
            "",
        ]
    lines += ["| what | case | must be | measured | |", "|---|---|---|---|---|"]
    for what, case, must, measured, met in found:
        lines.append(f"| {what} | {case} | {must} | {measured} | {'met' if met else '**missed**'} |")
    return lines


def cell(text: str, clipped: int) -> str:
    text = " ".join(text.replace("|", "/").split())
    return text if len(text) <= clipped else text[:clipped] + "..."


def microseconds(row: dict[str, Any] | None) -> str:
    if row is None:
        return "-"
    return f"{1e6 * row['seconds']:,.1f}" + (f" ({row['share']:.0%})" if "share" in row else "")


def kernel_table(data: Data) -> list[str]:
    columns = [f"{OURS} {operation}" for operation in (FORWARD, BACKWARD, timing.REGENERATE)]
    columns += [f"{timing.NATIVE} {FORWARD}", f"{timing.NATIVE} {BACKWARD}", f"{timing.TRITON} {FORWARD}"]
    columns += [f"{who} {BOTH}" for who in (OURS, timing.SEEDED, timing.NATIVE, timing.COMPILED, timing.TRITON)]
    text = 'f, b: forward, backward; regenerate: forward and backward of store="seed", which are one kernel.'
    return table(timed(data, "kernels"), "Kernels", text, columns)


def fused_table(data: Data) -> list[str]:
    columns = [f"{who} {what}" for what in (FORWARD, BACKWARD, BOTH) for who in (OURS, timing.EAGER, timing.COMPILED)]
    columns.remove(f"{timing.COMPILED} {BACKWARD}")
    text = (
        "f, b: forward, backward, draw of the mask and autograd's kernels included; torch and torch.compile: the "
        "formula. Bytes are those of the arrays that must be read and written once, and of the mask's bits."
    )
    return table(timed(data, "fused"), "Fused kernels", text, columns)


def table(found: list[Any], title: str, text: str, columns: list[str]) -> list[str]:
    if not found:
        return []
    names = [column.replace(BOTH, "f+b").replace(FORWARD, "f").replace(BACKWARD, "b") for column in columns]
    lines = [
        "", f"## {title}", "",
        "us, medians of alternating rounds; in brackets the share of the copy's bandwidth, by the bytes each moves.",
        text, "",
        "| case | copy, us | copy, GB/s | " + " | ".join(names) + " |", "|---" * (3 + len(columns)) + "|",
    ]  # fmt: skip
    for result in found:
        rows = result["rows"]
        speed = f"{rows[COPY]['bytes_per_second'] / 1e9:,.0f}" if COPY in rows else "-"
        values = [microseconds(rows.get(name)) for name in (COPY, *columns)]
        lines.append(f"| {result['case']} | {values[0]} | {speed} | " + " | ".join(values[1:]) + " |")
    notes = {f"* {name}: {cell(why, 160)}" for result in found for name, why in result["notes"].items()}
    lines += ["", *sorted(notes)]
    spread = max((row["high"] - row["low"]) / row["seconds"] for result in found for row in result["rows"].values())
    return [*lines, f"* quartiles lie at most {spread:.1%} of the median apart"]


def smaller_tables(data: Data) -> list[str]:
    lines = []
    host = data["sections"].get("host", {}).get("items", {})
    for name in ("calls", "pieces"):
        rows = host.get(name, {}).get("result", {})
        told = "; ".join(f"{what} {1e6 * row['seconds']:.2f}" for what, row in rows.items())
        if told:
            lines += ["", f"## Host, {name}: us each on {timing.HOST_ELEMENTS} elements", "", f"{told}."]
    images = results(data, "channels")
    if images:
        lines += ["", "## A decision per channel, forward, us (share of the copy's bandwidth)", ""]
    for result in images:
        told = "; ".join(f"{name} {microseconds(row)}" for name, row in result["rows"].items())
        lines.append(f"* {result['case']}: {told}")
    return lines


def shape_table(data: Data) -> list[str]:
    found = results(data, "tune")
    if not found:
        return []
    lines = [
        "", "## Launch shapes: threads per block x blocks per SM, us (share of the copy's bandwidth), best first", "",
        "| case | operation | default | others |", "|---|---|---|---|",
    ]  # fmt: skip
    for result in found:
        for operation in (FORWARD, BACKWARD):
            named = [(name.partition(" "), row) for name, row in result["rows"].items()]
            rows = {shape: row for (what, _, shape), row in named if what == operation}
            default = f"{result['default']}: {microseconds(rows[result['default']])}"
            others = [f"{shape}: {microseconds(row)}" for shape, row in rows.items()][:3]
            lines.append(f"| {result['case']} | {operation} | {default} | {'; '.join(others)} |")
    return lines


def printed(data: Data) -> str:
    """The report as it is printed: what comes last gives way."""
    text = report(data)
    if len(text) <= PRINTED:
        return text
    return text[:PRINTED].rpartition("\n")[0] + f"\n\n... and {len(text) - PRINTED:,} characters more in the .md\n"


def save(data: Data, folder: Path) -> list[Path]:
    """Writes the JSON, then the report, each whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    about = next(iter(results(data, "machine")), {})
    of = f"{about.get('device', 'unknown')} {data.get('part', '')}"
    stem = "gpu-" + re.sub(r"[^a-z0-9]+", "-", of.lower()).strip("-")
    written = []
    for suffix, made in ((".json", lambda: json.dumps(data, indent=1) + "\n"), (".md", lambda: report(data))):
        file = folder / f"{stem}{suffix}"
        part = file.with_suffix(f"{suffix}.part")
        part.write_text(made())
        part.replace(file)
        written.append(file)
    return written
