"""The plots of a sweep's page, as SVG that takes the page's font and its colours, light or dark."""

from __future__ import annotations

import io
import math
import statistics
import warnings
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING
from xml.etree import ElementTree

from markupsafe import Markup

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.transforms import Transform

# Drawn with the light colour; in the page each is a variable that follows the reader's scheme.
INKS = {
    "ink": ("#22262b", "#dfe3e8"),
    "grid": ("#e3e6ea", "#353b43"),
    "faint": ("#b9bfc7", "#59616b"),
    "s0": ("#0067a5", "#5cb8f2"),
    "s1": ("#c9510c", "#ff9455"),
    "s2": ("#00805d", "#35d0a3"),
    "s3": ("#8e3b8a", "#df8fdb"),
    "s4": ("#9a7500", "#edc54a"),
    "s5": ("#4f6673", "#a9c0cd"),
    "s6": ("#a3214f", "#ff8fb3"),
    "s7": ("#3d4db7", "#9aa8ff"),
}
COLOURED = 8  # curves, before all but the best are grey
_INK, _GRID, _FAINT, *_SERIES = (light for light, _ in INKS.values())
_MARKERS = "osD^vPXp"
_STYLE = {
    "svg.fonttype": "none",  # the reader's own font, and text that can be searched
    "svg.hashsalt": "kdcache",  # else ids differ from page to page
    "text.parse_math": False,
    "font.size": 10,
    "font.sans-serif": ["DejaVu Sans"],
    "text.color": _INK,
    "axes.labelcolor": _INK,
    "axes.edgecolor": _FAINT,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.formatter.useoffset": False,
    "grid.color": _GRID,
    "xtick.color": _FAINT,
    "ytick.color": _FAINT,
    "xtick.labelcolor": _INK,
    "ytick.labelcolor": _INK,
    "legend.frameon": False,
}
_SIZE_INCHES = (5.3, 3.1)
_LEGEND_INCHES = 0.2  # a line of it
_WIDE = 30  # largest over smallest: where equal steps would hide the small ones
_APART = 0.075  # of the axis, which two tick labels need
_TICK_LETTERS, _NAME_LETTERS = 20, 74
_DODGE_POINTS = 6  # between lines at the same value
_SVG, _XLINK = "{http://www.w3.org/2000/svg}", "{http://www.w3.org/1999/xlink}"


def effect(
    axis: str,
    levels: Mapping[str, float | None],
    lines: Mapping[str, Sequence[tuple[str, float]]],
    label: str,
) -> Markup:
    """Scores against a setting: several at a value are faint points, their mean a marker, lowest to
    highest a bar.

    `levels` are the setting's values in order, by their text; None is no number. `lines` hold
    (text of the value, score) pairs.
    """
    places, scale = _places(levels)
    with _drawing():
        figure, axes = _figure(axis, label, len(lines) if len(lines) > 1 else 0)
        if scale == "log":
            axes.set_xscale("log")
        for n, (name, points) in enumerate(lines.items()):
            colour, shift = _SERIES[n % len(_SERIES)], n - (len(lines) - 1) / 2
            _line(figure, places, points, (name, colour, _MARKERS[n]), shift * _DODGE_POINTS)
        axes.margins(x=0.08)
        axes.autoscale_view()
        _label(axes, places, scale)
        if len(lines) > 1:
            _legend(figure)
        names = f"{label} against {axis}"
        return _svg(figure, f"{names}: {_means(lines)}", f"effect-{axis}")


def curves(lines: Sequence[tuple[str, Sequence[tuple[int, float]]]], label: str) -> Markup:
    """Values by epoch: `lines` hold (name, (epoch, value) pairs). The first one stands out; the
    others have colours and names while they are few.
    """
    from matplotlib.ticker import MaxNLocator

    few = len(lines) <= COLOURED
    with _drawing():
        figure, axes = _figure("epoch", label, len(lines) if few else 2)
        names = [name for name, _ in lines]
        if not few:  # a name that begins with _ is not in the legend
            names = [f"highest ranked: {names[0]}", "the others", *("_" for _ in names[2:])]
        for n, (_, points) in reversed(list(enumerate(lines))):
            axes.plot(
                *zip(*points, strict=True),
                color=_SERIES[n] if few or n == 0 else _FAINT,
                linewidth=1.1 if n else 2.4,
                marker="o" if len(points) == 1 else "",
                label=names[n],
            )
        values = [value for _, points in lines for _, value in points]
        if min(values) > 0 and max(values) / min(values) >= _WIDE:
            axes.set_yscale("log")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        _legend(figure, backwards=True)
        return _svg(figure, f"{label} by epoch of {len(lines)} runs", f"curves-{label}")


@contextmanager
def _drawing() -> Iterator[None]:
    """Matplotlib's own defaults and ours, whatever the user's are."""
    import matplotlib.style

    with matplotlib.style.context(["default", _STYLE]), warnings.catch_warnings():
        # the text is set by the browser, which has the letters that the font here lacks
        warnings.filterwarnings("ignore", "Glyph .* missing from")
        yield


def _figure(x: str, y: str, legend_lines: int) -> tuple[Figure, Axes]:
    from matplotlib.figure import Figure

    width, height = _SIZE_INCHES
    size = (width, height + legend_lines * _LEGEND_INCHES)
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots()
    axes.set(xlabel=x, ylabel=y)
    axes.tick_params(which="both", length=0)
    return figure, axes


def _legend(figure: Figure, backwards: bool = False) -> None:
    handles, labels = figure.axes[0].get_legend_handles_labels()
    if backwards:
        handles, labels = handles[::-1], labels[::-1]
    labels = [_short(text, _NAME_LETTERS) for text in labels]
    figure.legend(handles, labels, loc="outside lower left", fontsize=9, labelspacing=0.25)


def _short(text: str, letters: int) -> str:
    return text if len(text) <= letters else text[: letters - 1] + "…"


def _places(levels: Mapping[str, float | None]) -> tuple[dict[str, float], str]:
    """Where each value stands on a linear or log axis, or evenly spaced ("even") on none."""
    numbers = {text: number for text, number in levels.items() if number is not None}
    if len(numbers) < len(levels):
        return {text: float(n) for n, text in enumerate(levels)}, "even"
    numbers = dict(sorted(numbers.items(), key=lambda item: item[1]))
    others = [number for number in numbers.values() if number]
    is_wide = bool(others) and min(others) > 0 and max(others) / min(others) >= _WIDE
    if is_wide and len(others) < len(numbers):  # 0 has no logarithm
        return {text: float(n) for n, text in enumerate(numbers)}, "even"
    return numbers, "log" if is_wide else "linear"


def _label(axes: Axes, places: Mapping[str, float], scale: str) -> None:
    """Ticks at the values themselves, as many as there is room for."""
    from matplotlib.ticker import NullLocator

    at = {text: math.log(x) if scale == "log" else x for text, x in places.items()}
    room = _APART * (max(at.values()) - min(at.values()))
    kept: list[str] = []
    for text in sorted(at, key=lambda text: at[text]):
        if not kept or at[text] - at[kept[-1]] >= room:
            kept.append(text)
    shown = [_short(text, _TICK_LETTERS) for text in kept]
    is_long = sum(map(len, shown)) > 60
    axes.set_xticks([places[text] for text in kept], shown)
    axes.xaxis.set_minor_locator(NullLocator())
    if is_long:
        axes.tick_params(axis="x", labelrotation=25)
        for tick in axes.get_xticklabels():
            tick.set(horizontalalignment="right", rotation_mode="anchor")


def _line(
    figure: Figure,
    places: Mapping[str, float],
    points: Sequence[tuple[str, float]],
    look: tuple[str, str, str],
    shift_points: float,
) -> None:
    """A line's means, its bars, and to the right of them its points."""
    from matplotlib.transforms import ScaledTranslation

    name, colour, marker = look
    (axes,) = figure.axes

    def shifted(by_points: float) -> Transform:
        return axes.transData + ScaledTranslation(by_points / 72, 0, figure.dpi_scale_trans)

    found: dict[float, list[float]] = defaultdict(list)
    for text, score in points:
        found[places[text]].append(score)
    xs = sorted(found)
    pairs = [(x, score) for x in xs for score in found[x]]
    axes.update_datalim(pairs)  # which a line that is shifted does not
    several = [(x, score) for x, score in pairs if len(found[x]) > 1]
    at = shifted(shift_points + _DODGE_POINTS / 2)
    if several:
        (dots,) = axes.plot(*zip(*several, strict=True), "o", color=colour, transform=at)
        dots.set(alpha=0.4, markersize=4, markeredgewidth=0)
    at = shifted(shift_points)
    for x in xs:
        axes.plot([x, x], [min(found[x]), max(found[x])], color=colour, linewidth=1.2, transform=at)
    means = [statistics.fmean(found[x]) for x in xs]
    axes.plot(xs, means, color=colour, marker=marker, markersize=5.5, label=name, transform=at)


def _means(lines: Mapping[str, Sequence[tuple[str, float]]]) -> str:
    """The means as text, for those who cannot see the plot."""
    found: dict[str, list[float]] = defaultdict(list)
    for points in lines.values():
        for text, score in points:
            found[text].append(score)
    return ", ".join(f"{text} mean {statistics.fmean(s):.4g}" for text, s in found.items())


def _svg(figure: Figure, description: str, prefix: str) -> Markup:
    """The figure as an <svg> for a page with others: its ids begin with the prefix, its colours are
    the page's, and nothing in it names an address."""
    written = io.StringIO()
    figure.savefig(written, format="svg", transparent=True, metadata={"Date": None})
    root = ElementTree.fromstring(written.getvalue())
    root.remove(root[0])  # who drew it and when
    root.remove(root[0])  # a style of every element, of the page's too
    prefix = "".join(c if c.isalnum() else "-" for c in prefix)
    for element in root.iter():
        element.tag, element.tail = element.tag.removeprefix(_SVG), None
        if element.tag != "text":
            element.text = None
        element.attrib = _attributes(element, prefix)
    root.attrib = {
        "viewBox": root.attrib["viewBox"],
        "role": "img",
        "aria-label": description,
        "style": "stroke-linejoin: round",
    }
    return Markup(ElementTree.tostring(root, encoding="unicode"))


def _attributes(element: ElementTree.Element, prefix: str) -> dict[str, str]:
    found = {name.removeprefix(_XLINK): value for name, value in element.attrib.items()}
    if element.tag == "g":  # which nothing refers to
        found.pop("id", None)
    return {name: _attribute(name, value, prefix) for name, value in found.items()}


def _attribute(name: str, value: str, prefix: str) -> str:
    if name == "id":
        return f"{prefix}-{value}"
    if name in ("href", "clip-path"):
        return value.replace("#", f"#{prefix}-")
    if name == "style":
        for ink, (light, _) in INKS.items():
            value = value.replace(light, f"var(--{ink})")
        return value.replace("'DejaVu Sans', sans-serif", "inherit")
    return value.replace("\n", " ")
