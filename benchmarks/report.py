"""Results on disk and on the terminal: one CSV schema for all ops, a table, a plot made from the CSV."""

import csv
import importlib.metadata
import importlib.util
import platform
import subprocess
import textwrap
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path

import torch

from .timing import CaseResult, fastest_peers, ratio

COLUMNS = (
    "op", "case", "dtype", "provider", "mode",
    "median_us", "q20_us", "q80_us", "host_us",
    "gb_per_s", "copy_share", "peak_bytes", "speedup", "fastest_peer",
    "device", "threads", "timer", "versions", "commit", "contended", "other_cpu", "timestamp", "note",
)  # fmt: skip
"""`speedup`: over the fastest peer of that case and mode, below 1 where that peer is faster. `copy_share`: of the copy
bandwidth measured beside it. `other_cpu`: processors kept busy by other processes meanwhile; `contended`: whether
those and our threads are more than there are. `note`: why a provider was left out; such a row has no numbers."""


def device_name(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        model = platform.processor() or platform.machine()
    return f"{model} ({torch.backends.cpu.get_cpu_capability()})"


def versions() -> str:
    found = {"python": platform.python_version(), "torch": torch.__version__}
    for package in ("fastreg", "triton", "liger-kernel", "timm", "ema-pytorch", "kornia", "torchvision"):
        if importlib.util.find_spec(package.replace("-", "_")) is None:
            continue
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:  # imported from a checkout
            found[package] = getattr(__import__(package), "__version__", "checkout")
    return " ".join(f"{name}={version}" for name, version in found.items())


def commit() -> str:
    try:
        command = ["git", "describe", "--always", "--dirty", "--abbrev=10", "--exclude=*"]
        return subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True).stdout.strip()
    except OSError:
        return ""


def rows_of(op: str, case: str, dtype: torch.dtype, device: str, result: CaseResult) -> list[dict[str, str]]:
    common = {
        "op": op,
        "case": case,
        "dtype": str(dtype).removeprefix("torch."),
        "device": device_name(device),
        "threads": str(torch.get_num_threads()),
        "versions": versions(),
        "commit": commit(),
        "contended": "yes" if result.contended else "no",
        "other_cpu": f"{result.other_cpu:.2f}",
        "timestamp": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    best = fastest_peers(result)
    rows = []
    for task in result.measured:
        row = dict.fromkeys(COLUMNS, "") | common
        row |= {"provider": task.provider, "mode": task.mode, "timer": task.timer, "peak_bytes": str(task.peak_bytes)}
        row["median_us"] = f"{task.median * 1e6:.3f}"
        row["q20_us"], row["q80_us"] = (f"{task.quantile(share) * 1e6:.3f}" for share in (0.2, 0.8))
        row["host_us"] = f"{(task.host_seconds or task.median) * 1e6:.3f}"
        if task.mode in result.least_bytes:
            speed = result.least_bytes[task.mode] / task.median
            row["gb_per_s"], row["copy_share"] = f"{speed / 1e9:.3f}", f"{speed / result.copy_bandwidth:.3f}"
        if task.mode in best:
            row["speedup"] = f"{ratio(task, best[task.mode]):.3f}"
            row["fastest_peer"] = best[task.mode].provider
        rows.append(row)
    copy = dict.fromkeys(COLUMNS, "") | common
    rows.append(copy | {"provider": "copy", "mode": "copy", "gb_per_s": f"{result.copy_bandwidth / 1e9:.3f}"})
    for provider, reason in result.left_out.items():
        rows.append(dict.fromkeys(COLUMNS, "") | common | {"provider": provider, "note": reason})
    return rows


def save(path: Path, rows: list[dict[str, str]], columns: Sequence[str] = COLUMNS) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def load(path: Path) -> list[dict[str, str]]:
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def merge(path: Path, rows: list[dict[str, str]]) -> list[dict[str, str]]:
    """Writes `rows` into the file at `path`, in place of older ones of the same case, dtype, device and threads."""

    def key(row: dict[str, str]) -> tuple[str, ...]:
        return tuple(row[name] for name in ("op", "case", "dtype", "device", "threads"))

    new = {key(row) for row in rows}
    merged = [row for row in load(path) if key(row) not in new] + rows
    save(path, merged)
    return merged


def show_table(title: str, header: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Text in aligned columns; the first is flushed left, numbers right."""
    rows = [list(header), *(list(row) for row in rows)]
    widths = [max(len(row[index]) for row in rows) for index in range(len(header))]
    print(f"\n{title}")
    for number, row in enumerate(rows):
        numeric = [number == 0 or cell[:1].isdigit() or cell[:1] in "-+" for cell in row]
        cells = [
            cell.rjust(width) if index and right else cell.ljust(width)
            for index, (cell, width, right) in enumerate(zip(row, widths, numeric))
        ]
        print("  ".join(cells).rstrip())
        if number == 0:
            print("  ".join("-" * width for width in widths))


def markdown(title: str, header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] + ["--:"] * (len(header) - 1), *rows]
    return f"{title}\n\n" + "".join(f"| {' | '.join(line)} |\n" for line in lines)


def micro(text: str) -> str:
    value = float(text)
    return f"{value:.1f} µs" if value < 1e3 else f"{value / 1e3:.2f} ms"


def show_case(rows: list[dict[str, str]]) -> None:
    first = rows[0]
    copy = next(row for row in rows if row["provider"] == "copy")
    modes = [row["mode"] for row in rows]
    show_table(
        f"{first['op']}  {first['case']}  {first['dtype']}   (copy: {copy['gb_per_s']} GB/s)",
        ("mode", "provider", "median", "20 %..80 %", "host", "GB/s", "of copy", "peak MB", "× fastest peer"),
        (
            (
                row["mode"],
                row["provider"],
                micro(row["median_us"]),
                f"{micro(row['q20_us'])}..{micro(row['q80_us'])}",
                micro(row["host_us"]),
                row["gb_per_s"] and f"{float(row['gb_per_s']):.2f}",
                row["copy_share"] and f"{100 * float(row['copy_share']):.0f} %",
                f"{int(row['peak_bytes']) / 1e6:.2f}",
                row["speedup"] and f"{float(row['speedup']):.2f}",
            )
            for row in sorted((row for row in rows if row["median_us"]), key=lambda row: modes.index(row["mode"]))
        ),
    )
    if first["contended"] == "yes":
        print(f"  CONTENDED: other processes kept {first['other_cpu']} processors busy; distrust these times")


def show_left_out(rows: list[dict[str, str]]) -> None:
    reasons: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        if row["note"]:
            reasons.setdefault((row["provider"], row["note"]), []).append(f"{row['case']} {row['dtype']}")
    everywhere = len({(row["case"], row["dtype"]) for row in rows})
    for (provider, reason), where in reasons.items():
        scope = "" if len(where) == everywhere else f" in {', '.join(where)}"
        print(f"left out{scope}: {provider}: {textwrap.shorten(reason, 120)}")


def show_losses(rows: list[dict[str, str]]) -> None:
    """The cases in which even the best of our backends is behind a peer."""
    best: dict[tuple[str, ...], dict[str, str]] = {}
    for row in rows:
        if row["provider"].startswith("fastreg") and row["speedup"]:
            key = (row["op"], row["case"], row["dtype"], row["mode"])
            if key not in best or float(row["speedup"]) > float(best[key]["speedup"]):
                best[key] = row
    behind = [row for row in best.values() if float(row["speedup"]) < 1]
    print(f"\nfastreg's best backend is behind the fastest peer in {len(behind)} of {len(best)} measurements:")
    for row in behind:
        where = f"{row['op']} {row['case']} {row['dtype']} {row['mode']}"
        print(f"  {where}: {row['provider']} is {1 / float(row['speedup']):.2f} × slower than {row['fastest_peer']}")
    if any(row["contended"] == "yes" for row in rows):
        print("Some cases were measured while other processes were busy (see above, and `contended` in the CSV).")


def plot(path: Path, rows: list[dict[str, str]]) -> str:
    """Draws speed relative to the fastest peer, per dtype and mode. Returns what it did, in words."""
    rows = [row for row in rows if row["speedup"]]
    if importlib.util.find_spec("matplotlib") is None:
        return "no plot: matplotlib is not installed"
    if not rows:
        return "no plot: nothing to compare with"
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    def distinct(name: str) -> list[str]:
        return list(dict.fromkeys(row[name] for row in rows))

    cases, dtypes, modes, providers = distinct("case"), distinct("dtype"), distinct("mode"), distinct("provider")
    figure, panels = pyplot.subplots(
        len(dtypes),
        len(modes),
        figsize=(max(11, 1.5 + max(3.2, 0.25 * len(cases) * len(providers)) * len(modes)), 0.8 + 2.9 * len(dtypes)),
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    ours = [name for name in providers if name.startswith("fastreg")]
    shades = ["#08519c", "#3182bd", "#9ecae1", "#c6dbef"]
    peers = ["#e6550d", "#fd8d3c", "#74c476", "#9e9ac8", "#969696", "#e7ba52", "#ce6dbd"]
    colours = {name: shades[i % 4] for i, name in enumerate(ours)}
    colours |= {name: peers[i % 7] for i, name in enumerate(name for name in providers if name not in ours)}
    step = 0.8 / len(providers)
    for line, dtype in zip(panels, dtypes):
        for panel, mode in zip(line, modes):
            here = {(row["case"], row["provider"]): row for row in rows if (row["dtype"], row["mode"]) == (dtype, mode)}
            for index, provider in enumerate(providers):
                places = [i for i, case in enumerate(cases) if (case, provider) in here]
                heights = [float(here[cases[i], provider]["speedup"]) for i in places]
                centres = [i + (index - (len(providers) - 1) / 2) * step for i in places]
                panel.vlines(centres, 1, heights, color=colours[provider], linewidth=3)
                panel.plot(centres, heights, "o", color=colours[provider], markersize=6, label=provider)
            panel.axhline(1, color="black", linewidth=0.8)
            panel.set_yscale("log", base=2)
            panel.yaxis.set_major_formatter(lambda value, _: f"{value:g}×")
            panel.set_xticks(range(len(cases)), cases, rotation=20 if len(cases) > 2 else 0)
            panel.set_title(f"{mode}, {dtype}", fontsize=10)
            panel.grid(axis="y", alpha=0.3)
            panel.set_axisbelow(True)
            for side in ("top", "right"):
                panel.spines[side].set_visible(False)
    handles = {label: handle for panel in panels.flat for handle, label in zip(*panel.get_legend_handles_labels())}
    figure.legend(
        handles.values(), handles.keys(), loc="outside lower center", ncols=min(5, len(handles)), frameon=False
    )
    first = rows[0]
    figure.suptitle(
        f"{first['op']}: speed over the fastest peer\n{first['device']}, {first['threads']} thread(s)", fontsize=11
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    return f"plot in {path}"
