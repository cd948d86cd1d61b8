"""What every benchmark leaves: Markdown tables on the terminal, and JSON with the machine, the versions and the commit."""

import json
import os
import platform
import resource
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import tyro
from pydantic import TypeAdapter

from sfv_world.checkpoint import replacing

Rows = list[dict[str, Any]]
"""A table: its rows, by column."""


class Report:
    """Tables of one run, printed as they come and kept in a JSON file that is complete after each of them."""

    def __init__(self, path: Path, config: Any, device: str):
        self.path = path
        options = TypeAdapter(type(config)).dump_python(config, mode="json")
        self.found: dict[str, Any] = {**about(device), "options": options, "tables": {}}
        versions = ", ".join(f"{name} {number}" for name, number in self.found["versions"].items())
        print(f"{self.found['device']}, {self.found['threads']} of {self.found['cores']} cores; {versions}")
        print(f"commit {self.found['commit']}, {self.found['date']}", flush=True)

    def table(self, name: str, title: str, rows: Rows, **facts: Any) -> None:
        """Prints a table under its title and writes it, with other facts that belong to it."""
        print(f"\n**{title}**\n\n{markdown(rows)}", flush=True)
        self.found["tables"][name] = {"title": title, **facts, "rows": rows}
        with replacing(self.path) as beside:
            beside.write_text(json.dumps(self.found, indent=2) + "\n")


def about(device: str) -> dict[str, Any]:
    """The machine, the versions and the commit."""
    processor = _processor()
    return {
        "command": shlex.join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]]),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": f"{processor}, {platform.system()} {platform.machine()}",
        "device": torch.cuda.get_device_name(device) if device.startswith("cuda") else processor,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in ("sfv-world", "torch", "numpy", "gymnasium")},
        },
        "commit": _commit(),
    }


def markdown(rows: Rows) -> str:
    """Rows as Markdown; the first one names the columns."""
    lines = ["| " + " | ".join(name.replace("_", " ") for name in rows[0]) + " |", "| --- " * len(rows[0]) + "|"]
    lines += ["| " + " | ".join(_cell(row[name]) for name in rows[0]) + " |" for row in rows]
    return "\n".join(lines)


def resident_bytes() -> int:
    """Memory of this process that is resident now; where the system does not say, the most it ever was."""
    statm = Path("/proc/self/statm")
    if statm.exists():
        return int(statm.read_text().split()[1]) * resource.getpagesize()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def synchronise(device: torch.device) -> None:
    """Waits until a device has done what it was asked to, so that a clock that is read next is right."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def command(main: Callable[[Any], Any], config: type, description: str | None) -> None:
    """Runs a benchmark as a command; a user's mistake is one line on standard error and exit status 2."""
    options: Any = tyro.cli(config, description=description)
    try:
        main(options)
    except (ValueError, FloatingPointError, OSError) as error:
        print(f"{Path(sys.argv[0]).name}: {error}", file=sys.stderr)
        sys.exit(2)


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _commit() -> str:
    """The commit this file is of, with -dirty if tracked files were changed since."""
    if shutil.which("git") is None:
        return "unknown"
    describe = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    done = subprocess.run(describe, cwd=Path(__file__).parent, capture_output=True, text=True)
    return done.stdout.strip() or "unknown"


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    if not isinstance(value, float):
        return str(value)
    if value != 0 and abs(value) < 0.01:
        return f"{value:.1e}"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
