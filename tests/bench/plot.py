"""The plot: requests per second by peer, in small panels with a scale of their own, so that lengths compare within a panel."""
from pathlib import Path
from typing import Dict, List, Sequence

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Drawing

from bench.scenarios import KIB, PEERS, SCENARIOS, SERVERS, Scenario
from bench.throughput import Figures

COLOURS = {"ours": "#1b6e3c", "ours-fastapi": "#7bc096", "fastapi": "#2f6db5", "threaded": "#d98324", "flask": "#9a9a9a"}
KINDS = {"put": "PUT with the object", "fqn": "PUT by FQN", "direct": "direct put", "stream": "streamed",
         "ws": "WebSocket with the object", "ws-fqn": "WebSocket by FQN"}
PANEL_INCHES = (5.6, 2.7)
STYLE = {"svg.hashsalt": "bench", "font.size": 9, "axes.spines.top": False, "axes.spines.right": False}  # the same file each time


def draw(figures: Figures, file: Path, caption: str) -> None:
    """Draw the load scenarios to an SVG file; without any there is no file."""
    panels = panels_of(figures)
    if not panels:
        return
    columns = min(2, len(panels))
    rows = -(-len(panels) // columns)
    with matplotlib.rc_context(STYLE):
        drawing = Drawing(figsize=(PANEL_INCHES[0] * columns, PANEL_INCHES[1] * rows + 0.8), layout="constrained")
        axes = list(drawing.subplots(rows, columns, squeeze=False).flat)
        for panel, (title, scenarios) in zip(axes, panels.items()):
            _draw_panel(panel, title, scenarios, figures)
        for panel in axes[len(panels):]:
            panel.set_axis_off()
        _finish(drawing, file, caption)


def panels_of(figures: Figures) -> Dict[str, List[Scenario]]:
    """Return the scenarios of each panel; small and large objects never share one, since their scales differ."""
    panels: Dict[str, List[Scenario]] = {}
    for scenario in SCENARIOS:
        if scenario.is_load and scenario.name in figures:
            kind = KINDS["direct"] + " or streamed" if scenario.kind in ("direct", "stream") else KINDS[scenario.kind]
            size = "1 KiB" if scenario.size == KIB else "1 MiB"
            panels.setdefault("%s, %s" % (kind, size), []).append(scenario)
    return panels


def _draw_panel(panel: Axes, title: str, scenarios: Sequence[Scenario], figures: Figures) -> None:
    peers = [peer for peer in SERVERS if any(peer in scenario.peers for scenario in scenarios)]
    width = 0.84 / len(peers)
    for place, peer in enumerate(peers):
        values = [_value(figures, scenario, peer) for scenario in scenarios]
        where = [index + (place - (len(peers) - 1) / 2) * width for index in range(len(scenarios))]
        bars = panel.bar(where, values, width * 0.92, color=COLOURS[peer], label=PEERS[peer])
        panel.bar_label(bars, [_label(value) for value in values], fontsize=6.5, padding=1)
    panel.set_xticks(range(len(scenarios)), [_tick(scenario) for scenario in scenarios])
    panel.yaxis.set_major_formatter("{x:,.0f}")
    panel.margins(y=0.1)
    panel.set_title(title, loc="left", fontsize=10, fontweight="bold")


def _value(figures: Figures, scenario: Scenario, peer: str) -> float:
    figure = figures[scenario.name].get(peer)
    return figure.value or 0.0 if figure else 0.0


def _label(value: float) -> str:
    return "%.1fk" % (value / 1000) if value >= 1000 else "%.0f" % value if value else ""


def _tick(scenario: Scenario) -> str:
    load = scenario.title.rpartition("KiB, " if scenario.size == KIB else "MiB, ")[2].replace(", ", ",\n")
    return load if scenario.kind in ("put", "fqn") else "%s, %s" % (KINDS[scenario.kind], load)


def _finish(drawing: Drawing, file: Path, caption: str) -> None:
    """Add what the panels share: one legend, the unit, and where it was measured."""
    entries = {label: handle for panel in drawing.axes for handle, label in zip(*panel.get_legend_handles_labels())}
    drawing.legend(list(entries.values()), list(entries), loc="outside upper center", ncols=len(entries), frameon=False)
    drawing.supylabel("requests per second", fontsize=9)
    drawing.supxlabel(caption, fontsize=7.5, color="#444444")
    drawing.savefig(file, metadata={"Date": None} if file.suffix == ".svg" else None, facecolor="white")
