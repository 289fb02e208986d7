"""Rows of results as the tables and cards of the report: pure data to text."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from shivelight.evaluation.pareto import Point, quality_at
from shivelight.report.style import DENSE, FEWER_STEPS, budget_label, is_ours, row_label


@dataclass(frozen=True)
class Metric:
    """A quality figure: its name in results.json, title, unit, digits and direction; shown times `scale`."""

    key: str
    title: str
    unit: str
    digits: int
    higher_is_better: bool
    scale: float = 1.0

    def format(self, value: float, unit: bool = True) -> str:
        """The value as shown, and its unit where asked for."""
        return f"{value * self.scale:.{self.digits}f}" + (f" {self.unit}" if unit and self.unit else "")


def quality_metrics(results: Mapping[str, Any]) -> list[Metric]:
    """The quality figures that some row of the results has; distances are named after their feature network."""
    network = results.get("feature_network", "EffLite0")
    known = [
        Metric("psnr_to_dense", "PSNR to dense", "dB", 1, True),
        Metric("ssim_to_dense", "SSIM to dense", "", 3, True),
        Metric("kid", f"KID-{network} x1000", "", 1, False, scale=1000.0),
        Metric("kid_to_finetuned", f"KID-{network} less dense-finetuned's x1000", "", 1, False, scale=1000.0),
        Metric("fd", f"FD-{network}", "", 1, False),
        Metric("caption_agreement", "Caption agreement", "", 1, True),
        Metric("agreement_to_dense", "Caption agreement less dense's", "", 1, True),
        Metric("named", "Concept named", "%", 1, True, scale=100.0),
    ]
    return [metric for metric in known if any(metric.key in row for row in results["rows"])]


@dataclass(frozen=True)
class Cell:
    """One figure of the table and, in small print, its spread."""

    text: str = ""
    spread: str = ""


@dataclass(frozen=True)
class Table:
    """Column heads (title, small print) and rows (the row of results, its cells)."""

    heads: list[tuple[str, str]]
    rows: list[tuple[Mapping[str, Any], list[Cell]]]


def _figure(key: str, digits: int, suffix: str = "", scale: float = 1.0) -> Callable[[Mapping[str, Any]], Cell]:
    def cell(row: Mapping[str, Any]) -> Cell:
        if key not in row:
            return Cell()
        interval = row.get("ci95", {}).get(key)
        spread = f"[{interval[0] * scale:.{digits}f}, {interval[1] * scale:.{digits}f}]" if interval else ""
        return Cell(f"{row[key] * scale:.{digits}f}{suffix}", spread)

    return cell


def _flops(row: Mapping[str, Any]) -> Cell:
    planned = f"{row['planned_ratio']:.3f}" if "planned_ratio" in row else ""
    return Cell(planned, f"{row['flops_ratio']:.3f}") if "flops_ratio" in row else Cell(planned)


def _latency(row: Mapping[str, Any]) -> Cell:
    latency = row.get("latency_ms")
    if not latency:
        return Cell()
    digits = 0 if latency["median"] >= 100 else 2
    return Cell(f"{latency['median']:.{digits}f}", f"{latency['p10']:.{digits}f} to {latency['p90']:.{digits}f}")


def ordered_rows(results: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Dense models first, then fewer steps, then our methods, then the rest; each group in its own order."""

    def group(row: Mapping[str, Any]) -> int:
        method = row["method"]
        if method.startswith(DENSE):
            return 0
        return 1 if method == FEWER_STEPS else 2 if is_ours(method) else 3

    return sorted(results["rows"], key=group)


def results_table(results: Mapping[str, Any]) -> Table:
    """Every row with every figure that some row has."""
    metrics = quality_metrics(results)
    columns: list[tuple[str, str, Callable[[Mapping[str, Any]], Cell]]] = [
        ("Steps", "", lambda row: Cell(f"{row['steps']:g}") if "steps" in row else Cell()),
        ("FLOPs of dense", "planned, counted", _flops),
        ("Latency, ms", "median, p10 to p90", _latency),
        ("Speed-up", "backbone", _figure("speedup", 2, "x")),
        ("Speed-up", "end to end", _figure("speedup_end_to_end", 2, "x")),
        ("Efficiency", "speed-up x planned", _figure("efficiency", 2)),
        ("Peak memory", "MB", _figure("peak_memory_mb", 0)),
        *(
            (
                m.title,
                f"{m.unit + ', ' if m.unit else ''}{'more' if m.higher_is_better else 'less'} is better",
                _figure(m.key, m.digits, scale=m.scale),
            )
            for m in metrics
        ),
    ]
    rows = ordered_rows(results)
    table = [(head, small, [cell(row) for row in rows]) for head, small, cell in columns]
    measured = [column for column in table if any(cell.text or cell.spread for cell in column[2])]
    return Table(
        [(head, small) for head, small, _ in measured],
        [(row, [cells[index] for _, _, cells in measured]) for index, row in enumerate(rows)],
    )


@dataclass(frozen=True)
class EqualLatency:
    """One figure of one of our rows, and what fewer steps reach in its time; None where none was measured near it."""

    row: Mapping[str, Any]
    metric: Metric
    ours: float
    fewer_steps: float | None

    @property
    def verdict(self) -> str:
        """Who is ahead, in words. Intervals are in the table: this compares the two figures alone."""
        if self.fewer_steps is None:
            return ""
        gain = (self.ours - self.fewer_steps) * (1 if self.metric.higher_is_better else -1)
        if abs(gain) * self.metric.scale < 0.5 * 10**-self.metric.digits:
            return "level"
        return f"{'routing' if gain > 0 else 'fewer steps'} by {self.metric.format(abs(gain))}"


def fewer_steps_curve(rows: Sequence[Mapping[str, Any]], metric: str) -> list[Point]:
    """The curve of the same model with fewer steps; the dense model is its slow end where it has the figure."""
    return [
        Point(row["method"], row["latency_ms"]["median"], row[metric])
        for row in rows
        if row["method"] in (FEWER_STEPS, DENSE) and metric in row and "latency_ms" in row
    ]


def equal_latency(results: Mapping[str, Any]) -> list[EqualLatency]:
    """Each of our rows against fewer steps at its own latency, for every quality figure."""
    rows = results["rows"]
    if not any(row["method"] == FEWER_STEPS for row in rows):
        return []
    comparisons = []
    for row in rows:
        for metric in quality_metrics(results):
            if is_ours(row["method"]) and metric.key in row and "latency_ms" in row:
                peer = quality_at(fewer_steps_curve(rows, metric.key), row["latency_ms"]["median"])
                comparisons.append(EqualLatency(row, metric, row[metric.key], peer))
    return comparisons


def equal_latency_table(results: Mapping[str, Any]) -> Table | None:
    """The same comparisons, one row for each of ours and one column for each figure: who is ahead, and both figures."""
    comparisons = equal_latency(results)
    if not any(item.fewer_steps is not None for item in comparisons):
        return None
    metrics = [metric for metric in quality_metrics(results) if any(item.metric == metric for item in comparisons)]
    rows: dict[int, tuple[Mapping[str, Any], list[Cell]]] = {}
    for item in comparisons:
        cells = rows.setdefault(id(item.row), (item.row, [Cell() for _ in metrics]))[1]
        if item.fewer_steps is None:
            cell = Cell(item.metric.format(item.ours), "no step count near this latency")
        else:
            ours = item.metric.format(item.ours, unit=False)
            cell = Cell(f"{ours} against {item.metric.format(item.fewer_steps)}", item.verdict)
        cells[metrics.index(item.metric)] = cell
    return Table([(metric.title, "") for metric in metrics], list(rows.values()))


@dataclass(frozen=True)
class Card:
    """The figures of one of our budgets, large."""

    title: str
    speedup: str
    lines: list[str]


def cards(results: Mapping[str, Any], most: int = 6) -> list[Card]:
    """A card for each of our rows that has a speed-up, with what fewer steps reach in the same time; where there are more than
    `most`, for those nearest to the dense picture, what is not faster last."""
    peers = {(id(c.row), c.metric.key): c for c in equal_latency(results)}
    made = []
    shown = [row for row in results["rows"] if is_ours(row["method"]) and "speedup" in row]
    if len(shown) > most:
        shown.sort(key=lambda row: (row["speedup"] <= 1, -row.get("psnr_to_dense", 0.0)))
    for row in shown[:most]:
        lines = []
        if "speedup_end_to_end" in row:
            lines.append(f"{row['speedup_end_to_end']:.2f}x end to end")
        for metric in quality_metrics(results):
            if metric.key in ("psnr_to_dense", "kid") and metric.key in row:
                line = f"{metric.title} {metric.format(row[metric.key])}"
                peer = peers.get((id(row), metric.key))
                if peer and peer.fewer_steps is not None:
                    line += f" (fewer steps in the same time: {metric.format(peer.fewer_steps)})"
                lines.append(line)
        made.append(Card(row_label(row), f"{row['speedup']:.2f}x", lines))
    return made


def budgets_of(results: Mapping[str, Any]) -> str:
    """The budgets of our rows in words, for the introduction."""
    labels = dict.fromkeys(budget_label(row) for row in results["rows"] if is_ours(row["method"]))
    return "; ".join(label for label in labels if label)
