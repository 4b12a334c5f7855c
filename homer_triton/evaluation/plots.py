"""A run's figures as PNG files, by matplotlib (the `plots` extra)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..storage.files import write_atomically
from .runs import Record

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from ..context import EncodedContext

_DPI = 150


def require_matplotlib() -> None:
    """Raise `ValueError` where matplotlib is missing: to be asked before hours of work."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError:
        raise ValueError(
            "Plots need matplotlib: pip install 'homer_triton[plots]', or ask for no plots."
        ) from None


def new_figure(width: float, height: float) -> Figure:
    """An empty figure, in inches, that needs no display."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained", dpi=_DPI)


def save_figure(figure: Figure, path: Path) -> None:
    """Write a PNG; raises `ValueError` where that is not possible."""
    write_atomically(path, lambda file: figure.savefig(file, format="png", dpi=_DPI))


def plot_accuracy_by_length(metrics: Record, limit: int, path: Path) -> None:
    """A line for each method with its 95 % interval, over lengths in context limits."""
    figure = new_figure(7, 4)
    axes = figure.subplots()
    methods = _by_method(metrics["by_length"])
    for index, (name, rows) in enumerate(methods.items()):
        # A little to the side, so that equal shares and their intervals stay apart.
        aside = 2 ** (0.05 * (index - (len(methods) - 1) / 2))
        shares = [row["accuracy"] for row in rows]
        axes.errorbar(
            [aside * row["length"] / limit for row in rows],
            shares,
            yerr=_reach(rows),
            marker="o",
            markersize=4,
            capsize=2,
            linewidth=1.4,
            label=name,
        )
    _length_axis(axes, "text length / context limit")
    axes.set_ylabel("right answers")
    axes.set_ylim(-0.03, 1.03)
    figure.legend(loc="outside right upper", frameon=False, fontsize=8)
    save_figure(figure, path)


def plot_variants(metrics: Record, limit: int, path: Path) -> None:
    """A line of dots for each variant of an ablation, one for each length, with 95 % intervals."""
    variants = _by_method(metrics["by_length"])
    lengths = sorted({row["length"] for row in metrics["by_length"]})
    figure = new_figure(7, 1 + 0.32 * len(variants))
    axes = figure.subplots()
    for index, length in enumerate(lengths):
        rows = [row for row in metrics["by_length"] if row["length"] == length]
        shift = 0.5 * ((index + 0.5) / len(lengths) - 0.5)
        axes.errorbar(
            [row["accuracy"] for row in rows],
            [line + shift for line in range(len(rows))],
            xerr=_reach(rows),
            fmt="o",
            markersize=4,
            capsize=2,
            label=f"{length / limit:g}× the limit",
        )
    axes.set_yticks(range(len(variants)), list(variants))
    axes.invert_yaxis()
    axes.set_xlim(-0.03, 1.03)
    axes.set_xlabel("right answers")
    axes.grid(axis="x", alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside right upper", frameon=False, fontsize=8)
    save_figure(figure, path)


def plot_depth_by_length(metrics: Record, limit: int, path: Path) -> None:
    """A heat map for each method: accuracy at every depth and length."""
    methods = _by_method(metrics["by_depth"])
    columns = min(len(methods), 4)
    lines = -(-len(methods) // columns)
    figure = new_figure(1.2 + 2.4 * columns, 0.8 + 2.2 * lines)
    panels = figure.subplots(lines, columns, squeeze=False, sharex=True, sharey=True).flatten()
    image = None
    for axes, (name, rows) in zip(panels, methods.items(), strict=False):
        lengths = sorted({row["length"] for row in rows})
        depths = sorted({row["depth"] for row in rows})
        shares = {(row["depth"], row["length"]): row["accuracy"] for row in rows}
        grid = [[shares[depth, length] for length in lengths] for depth in depths]
        image = axes.imshow(grid, vmin=0, vmax=1, cmap="RdYlGn", aspect="auto")
        axes.set_xticks(range(len(lengths)), [f"{length / limit:g}×" for length in lengths])
        axes.set_yticks(range(len(depths)), [f"{depth:.0%}" for depth in depths])
        axes.set_title(name, fontsize=9)
        axes.tick_params(labelsize=7)
    for axes in panels[len(methods) :]:
        axes.set_axis_off()
    figure.supxlabel("text length / context limit", fontsize=9)
    figure.supylabel("depth of the key", fontsize=9)
    if image is not None:
        figure.colorbar(image, ax=list(panels), label="right answers", shrink=0.8)
    save_figure(figure, path)


def plot_perplexity_by_position(metrics: Record, limit: int, path: Path) -> None:
    """Two panels over the position in context limits: each segment's perplexity with its 95 %
    interval, and that of everything so far.
    """
    figure = new_figure(10, 4)
    here, running = figure.subplots(1, 2, sharey=True)
    for name, rows in _by_method(metrics["by_position"]).items():
        where = [row["position"] / limit for row in rows]
        low, middle, high = (
            [_or_gap(row[k]) for row in rows] for k in ("low", "perplexity", "high")
        )
        (line,) = here.plot(where, middle, marker="o", markersize=3, linewidth=1.2, label=name)
        here.fill_between(where, low, high, color=line.get_color(), alpha=0.15, linewidth=0)
        running.plot(where, [_or_gap(row["running"]) for row in rows], linewidth=1.4)
    for axes, title in ((here, "of each segment"), (running, "of everything so far")):
        _length_axis(axes, "position / context limit")
        axes.set_yscale("log")
        axes.set_title(f"perplexity {title}", fontsize=10)
    figure.legend(loc="outside right upper", frameon=False, fontsize=8)
    save_figure(figure, path)


def plot_kept(encoded: EncodedContext, path: Path, stretches: int = 200) -> None:
    """The share of each stretch of a text that was kept, and pruned at each height."""
    import numpy as np
    from matplotlib import colormaps

    pruned_at = encoded.pruned_at.cpu().numpy()
    edges = np.unique(np.linspace(0, len(pruned_at), stretches + 1).astype(int))
    sizes, height = np.diff(edges), encoded.plan.height
    figure = new_figure(8, 2.4)
    axes = figure.subplots()
    base = np.zeros(len(sizes))
    for level in range(-1, height + 1):
        share = np.add.reduceat((pruned_at == level).astype(float), edges[:-1]) / sizes
        colour = "#e6a817" if level < 0 else colormaps["Blues"](0.15 + 0.6 * level / max(height, 1))
        label = "kept" if level < 0 else f"pruned at height {level}"
        axes.bar(edges[:-1], share, sizes, bottom=base, align="edge", color=colour, label=label)
        base += share
    axes.set_xlim(0, len(pruned_at))
    axes.set_ylim(0, 1)
    axes.set_xlabel("source index (token of the input)")
    axes.set_ylabel("share")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside right upper", frameon=False, fontsize=8)
    save_figure(figure, path)


def _length_axis(axes: Axes, label: str) -> None:
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda times, _: f"{times:g}×")
    axes.set_xlabel(label)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def _by_method(rows: Sequence[Record]) -> dict[str, list[Record]]:
    """The rows of each method, in order."""
    grouped: dict[str, list[Record]] = {}
    for row in rows:
        grouped.setdefault(row["method"], []).append(row)
    return grouped


def _reach(rows: Sequence[Record]) -> list[list[float]]:
    """How far intervals reach below and above their shares, as matplotlib wants it."""
    below = [max(row["accuracy"] - row["low"], 0.0) for row in rows]
    above = [max(row["high"] - row["accuracy"], 0.0) for row in rows]
    return [below, above]


def _or_gap(value: Any) -> float:
    """A figure, or what matplotlib leaves out."""
    return float("nan") if value is None else float(value)
