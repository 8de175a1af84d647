"""Rows of benchmarks/results/NAME.csv: what was measured, on which machine, with which versions."""

from __future__ import annotations

import csv
import datetime
import importlib.metadata
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

RESULTS = Path(__file__).resolve().parent / "results"


def machine() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "unknown CPU")
    return f"{model}, {os.cpu_count()} cores"


def version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def append(name: str, rows: Sequence[Mapping[str, object]], packages: Sequence[str] = ()) -> list[dict[str, str]]:
    """Adds rows to NAME.csv, numbers to four digits, behind each the date, the load of the last minute, the machine and
    the versions of Python, torch and `packages`. A column that is new gets its place at the end of all rows.

    Returns:
        All rows of the file.
    """
    about = {"date": datetime.date.today().isoformat(), "load": round(os.getloadavg()[0], 1), "machine": machine()}
    about |= {package: version(package) for package in ("torch", *packages)}
    new = [{key: f"{v:.4g}" if isinstance(v, float) else str(v) for key, v in (row | about).items()} for row in rows]
    path = RESULTS / f"{name}.csv"
    old: list[dict[str, str]] = []
    if path.exists():
        with path.open(newline="") as file:
            old = list(csv.DictReader(file))
    found = old + new
    temporary = path.with_suffix(".tmp")
    with temporary.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(key for row in found for key in row)), lineterminator="\n")
        writer.writeheader()
        writer.writerows(found)
    temporary.replace(path)
    return found
