"""Writes the report of a run on a GPU: targets, tables, files.

``data`` is the content of the JSON: options, when it started, and ``sections`` by name, each with its items' rows.
Failures and missed targets come first. At most `PRINTED` characters are printed, because some see only the end.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from .races import COPY
from .timing import BACKWARD, BOTH, COMPILED, EAGER, FORWARD, HOST_ELEMENTS, OURS, SEEDED, THEIRS, TRITON

PRINTED = 11_500  # characters
SHOWN = 14  # items that did not end well
LEAST_SHARES = {"kernels": 0.9, "fused": 0.85}  # of the copy's bandwidth
HOST_RATIO = 1.5
Data = dict[str, Any]
Target = tuple[str, str, str, str, bool]  # what, case, must be, measured, met


def results(data: Data, section: str) -> dict[str, Any]:
    """Of the items that have one."""
    items = data["sections"].get(section, {}).get("items", {})
    return {name: row["result"] for name, row in items.items() if row["status"] == "ok" and row["result"]}


def targets(data: Data) -> list[Target]:
    """Misses first."""
    found: list[Target] = []
    for section, least in LEAST_SHARES.items():
        for case, result in results(data, section).items():
            rows = result["rows"]
            for what in (FORWARD, BACKWARD) if section == "fused" or case.startswith("256M") else ():
                share = rows.get(f"{OURS} {what}", {}).get("share")
                if share is not None:
                    must = f"at least {least:.0%} of the copy's bandwidth"
                    found.append((what, case, must, f"{share:.1%}", share >= least))
            for other in (EAGER, COMPILED) if section == "kernels" else ():
                ratio = rows.get(f"{other} {BOTH}", {}).get("ratios", {}).get(f"{OURS} {BOTH}")
                if ratio is not None:
                    found.append((f"{BOTH} against {other}", case, "faster", f"{ratio:.2f}x", ratio > 1.0))
    host, case = results(data, "host"), f"{HOST_ELEMENTS} elements"
    for name, row in host.get("calls", {}).items():
        other = f"{THEIRS}, {name.rpartition(', ')[2]}"
        if name.startswith(OURS):
            ratio, must = row["ratios"][other], f"at most {HOST_RATIO}x {other}"
            found.append((f"host: {name}", case, must, f"{ratio:.2f}x", ratio <= HOST_RATIO))
    if kept := host.get("kept"):
        limit = kept[THEIRS] // 8 + 4  # a byte per element there; our words are whole
        found.append(("bytes kept for backward", case, f"at most {limit}", f"{kept[OURS]}", kept[OURS] <= limit))
    return sorted(found, key=lambda target: target[4])


def report(data: Data) -> str:
    """Markdown."""
    tables = [line for section in ("kernels", "fused", "channels") for line in table(data, section)]
    parts = heading(data), sections(data), judged(data), tables, host_table(data), shape_table(data)
    return "\n".join(line for part in parts for line in part) + "\n"


def heading(data: Data) -> list[str]:
    about = results(data, "machine").get("machine", {})
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


def sections(data: Data) -> list[str]:
    """How each section ended, and why items did not end well: failures first."""
    lines, bad = ["", "## Sections", ""], []
    for name, section in data["sections"].items():
        statuses = [row["status"] for row in section["items"].values()]
        told = ", ".join(f"{statuses.count(status)} {status}" for status in dict.fromkeys(statuses)) or "nothing ran"
        told += "".join(f"; {result['summary']}" for result in results(data, name).values() if "summary" in result)
        mark = {"failed": "**failed**", "cut": "**cut short**"}.get(section["status"], "ok")
        lines.append(f"* {section['title']}: {mark}; {told}; {section['seconds']} s")
        bad += [(name, item, row) for item, row in section["items"].items() if row["status"] != "ok"]
    bad.sort(key=lambda entry: entry[2]["status"] != "failed")
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
        lines += ["**The tests have not passed: the times below may be those of wrong results.**", ""]
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


def table(data: Data, section: str) -> list[str]:
    """Every case of a section that times functions, and every contender that took part in any."""
    found = results(data, section)
    if not found:
        return []
    present = {name for result in found.values() for name in result["rows"]}
    every = (f"{who} {what}" for what in (FORWARD, BACKWARD, BOTH) for who in (OURS, SEEDED, EAGER, COMPILED, TRITON))
    columns = [name for name in every if name in present]
    names = [name.replace(BOTH, "f+b").replace(FORWARD, "f").replace(BACKWARD, "b") for name in columns]
    lines = [
        "", f"## {data['sections'][section]['title'].capitalize()}", "",
        "us, medians of alternating rounds; f: forward, b: backward. In brackets: share of the copy's bandwidth, by",
        "the bytes that each must move.", "",
        "| case | copy, us | copy, GB/s | " + " | ".join(names) + " |", "|---" * (3 + len(columns)) + "|",
    ]  # fmt: skip
    for case, result in found.items():
        rows = result["rows"]
        speed = f"{rows[COPY]['bytes_per_second'] / 1e9:,.0f}" if COPY in rows else "-"
        values = [microseconds(rows.get(name)) for name in (COPY, *columns)]
        lines.append(f"| {case} | {values[0]} | {speed} | " + " | ".join(values[1:]) + " |")
    notes = {f"* {name}: {cell(why, 160)}" for result in found.values() for name, why in result["notes"].items()}
    spread = max(
        (row["high"] - row["low"]) / row["seconds"] for each in found.values() for row in each["rows"].values()
    )
    return [*lines, "", *sorted(notes), f"* quartiles lie at most {spread:.1%} of the median apart"]


def host_table(data: Data) -> list[str]:
    rows = results(data, "host").get("calls", {})
    told = "; ".join(f"{what} {1e6 * row['seconds']:.2f}" for what, row in rows.items())
    return ["", f"## Host: us for a call on {HOST_ELEMENTS} elements", "", f"{told}."] if told else []


def shape_table(data: Data) -> list[str]:
    found = results(data, "tune")
    if not found:
        return []
    lines = [
        "", "## Launch shapes: threads per block x blocks per SM, us (share of the copy's bandwidth), best first", "",
        "| case | operation | default | best |", "|---|---|---|---|",
    ]  # fmt: skip
    for case, result in found.items():
        for what in (FORWARD, BACKWARD):
            named = [(name.partition(" "), microseconds(row)) for name, row in result["rows"].items()]
            rows = {shape: told for (operation, _, shape), told in named if operation == what}
            best = "; ".join(f"{shape}: {told}" for shape, told in list(rows.items())[:3])
            lines.append(f"| {case} | {what} | {result['default']}: {rows.get(result['default'])} | {best} |")
    notes = {f"* {name}: {cell(why, 160)}" for result in found.values() for name, why in result["notes"].items()}
    return lines + sorted(notes)


def printed(data: Data) -> str:
    """The report as it is printed: what comes last gives way."""
    text = report(data)
    if len(text) <= PRINTED:
        return text
    return text[:PRINTED].rpartition("\n")[0] + f"\n\n... and {len(text) - PRINTED:,} characters more in the .md\n"


def save(data: Data, folder: Path) -> list[Path]:
    """Writes the JSON, then the report, each whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    about = results(data, "machine").get("machine", {})
    of = f"{about.get('device', 'unknown')} {data.get('part', '')}"
    stem = "gpu-" + re.sub(r"[^a-z0-9]+", "-", of.lower()).strip("-")
    written = []
    for suffix, text in ((".json", json.dumps(data, indent=1) + "\n"), (".md", report(data))):
        file = folder / f"{stem}{suffix}"
        part = file.with_suffix(f"{suffix}.part")
        part.write_text(text)
        part.replace(file)
        written.append(file)
    return written
