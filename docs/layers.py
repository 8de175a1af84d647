"""Draws docs/layers.svg: the rooms of tests/test_layers.py, each above those that it imports (`make docs`).

An arrow is left out where longer ways say the same. Rooms stand in rows, and an arrow that passes a row has a place
there. The order within the rows has the fewest crossings, and a place moves towards those that it is joined with.
"""

from __future__ import annotations

from itertools import combinations, pairwise
from statistics import mean

import networkx as nx  # torch needs it, too
from test_layers import FOLDERS, MODULES, ROOMS, imports, room

BOX, LANE, HIGH, PITCH, SPACE = 132, 10, 30, 56, 20
HEAD = """<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height}" role="img">
<style>
text{{font:600 13px system-ui,-apple-system,"Segoe UI",Helvetica,Arial,sans-serif;fill:#1f2430;text-anchor:middle}}
text.legend{{font-size:12px;font-weight:400;text-anchor:start;fill:#4a5263}}rect{{stroke:#c3c9d6}}
path{{fill:none;stroke:#6a7283;stroke-width:1.3;marker-end:url(#tip)}}polygon{{fill:#6a7283}}
.folder{{fill:#e8eefc}}.module{{fill:#fdf3e1}}.outside{{fill:#e6f4f1}}
</style><marker id="tip" viewBox="0 0 8 8" refX="8" refY="4" markerWidth="8" markerHeight="8" orient="auto">
<polygon points="0,1 8,4 0,7"/></marker><rect width="100%" height="100%" style="fill:#fff;stroke:none"/>"""
LEGEND = {"folder": "folder of rlhf_engine/", "module": "module of its own there", "outside": "folder beside it"}

Place = str | tuple[str, str, int]  # a room, or where an arrow from one room to another passes a row


def rooms() -> nx.DiGraph:
    """An edge leads from a room to one that it imports, unless a longer way does."""
    graph = nx.DiGraph()
    graph.add_nodes_from(ROOMS)
    for module in MODULES:
        others = {room(other) for other, _ in imports(module) if other in MODULES} - {room(module), "rlhf_engine"}
        graph.add_edges_from((room(module), other) for other in others)
    return nx.transitive_reduction(graph)


def levels(graph: nx.DiGraph) -> dict[str, int]:
    """The row of each room from the foundation up: as low as can be, or as high where that shortens its arrows."""
    level: dict[str, int] = {}
    for row, names in enumerate(nx.topological_generations(graph.reverse())):
        level |= dict.fromkeys(names, row)
    for name in sorted(ROOMS, key=lambda name: (-level[name], name)):
        if graph.in_degree(name) > graph.out_degree(name):
            level[name] = min(level[user] for user in graph.predecessors(name)) - 1
    return level


def ways(graph: nx.DiGraph, level: dict[str, int]) -> list[list[Place]]:
    """The places that each arrow joins: its room, one in each row between, the room that it points at."""
    ends = sorted(graph.edges, key=lambda edge: [ROOMS.index(name) for name in edge])
    return [[a, *((a, b, row) for row in range(level[a] - 1, level[b], -1)), b] for a, b in ends]


def arrange(rows: list[list[Place]], joined: nx.DiGraph) -> list[list[Place]]:
    """The rows sorted by what stands below and what stands above in turn; of all turns the fewest crossings."""

    def crossings(rows: list[list[Place]]) -> int:
        at = {place: (r, i) for r, row in enumerate(rows) for i, place in enumerate(row)}
        pairs = combinations([(*at[a], at[b][1]) for a, b in joined.edges], 2)
        return sum(r == s and (i - k) * (j - m) < 0 for (r, i, j), (s, k, m) in pairs)

    tried = [rows]
    for near in [joined.successors, joined.predecessors] * 8:
        rows = [list(row) for row in rows]
        at = {place: i for row in rows for i, place in enumerate(row)}
        for row in rows if near == joined.successors else reversed(rows):
            row.sort(key=lambda place: mean([at[other] for other in near(place)] or [at[place]]))
            at |= {place: i for i, place in enumerate(row)}
        tried.append(rows)
    return min(tried, key=crossings)


def columns(rows: list[list[Place]], paths: list[list[Place]], joined: nx.DiGraph) -> dict[Place, float]:
    """Where the middle of each place is: a room near what it is joined with, an arrow straight, nothing overlapping."""
    near = {name: [*joined.predecessors(name), *joined.successors(name)] for name in ROOMS}
    near |= {place: path for path in paths for place in path[1:-1]}
    x = {place: 0.0 for row in rows for place in row}
    for _ in range(300):
        for row in rows:
            wanted = [mean(x[other] for other in near[place]) for place in row]
            gaps = [
                SPACE + sum(BOX if isinstance(place, str) else LANE for place in pair) / 2 for pair in pairwise(row)
            ]
            right, left = list(wanted), list(wanted)
            for i, gap in enumerate(gaps):
                right[i + 1] = max(right[i + 1], right[i] + gap)
            for i, gap in reversed(list(enumerate(gaps))):
                left[i] = min(left[i], left[i + 1] - gap)
            x |= {place: (a + b) / 2 for place, a, b in zip(row, right, left, strict=True)}
    start = min(x.values()) - BOX / 2 - SPACE
    return {place: value - start for place, value in x.items()}


def box(name: str, x: float, y: float) -> str:
    """A room: a folder or a module of the engine, or a folder beside it, called as on the disk."""
    folder = next((folder for folder, package in FOLDERS.items() if package == name), None)
    module = MODULES.get(f"rlhf_engine.{name}")
    kind = "outside" if folder else "module" if module and module.stem == name else "folder"
    text = module.name if module and kind == "module" else f"{folder or name}/"
    shape = f'<rect class="{kind}" x="{x - BOX / 2:.0f}" y="{y - HIGH / 2:.0f}" width="{BOX}" height="{HIGH}" rx="6"/>'
    return f'{shape}<text x="{x:.0f}" y="{y + 4.5:.1f}">{text}</text>'


def arrow(points: list[tuple[float, float]]) -> str:
    """A smooth line (Catmull-Rom) from below the first point through the others to above the last."""
    (x, y), *between, (to_x, to_y) = points
    y, to_y = y + HIGH / 2, to_y - HIGH / 2
    passed = [(at, row + side) for at, row in between for side in (-HIGH / 2, HIGH / 2)]  # straight beside boxes
    line = [(x, y - PITCH), (x, y), *passed, (to_x, to_y), (to_x, to_y + PITCH)]
    path = f"M{x:.0f},{y:.0f}"
    for (ax, ay), (bx, by), (cx, cy), (dx, dy) in zip(line, line[1:], line[2:], line[3:], strict=False):
        path += f"C{bx + (cx - ax) / 6:.0f},{by + (cy - ay) / 6:.0f} {cx - (dx - bx) / 6:.0f},{cy - (dy - by) / 6:.0f}"
        path += f" {cx:.0f},{cy:.0f}"
    return f'<path d="{path}"/>'


def draw() -> str:
    """The picture as SVG."""
    graph = rooms()
    level = levels(graph)
    paths = ways(graph, level)
    joined = nx.DiGraph()
    for path in paths:
        nx.add_path(joined, path)
    rows: list[list[Place]] = [[] for _ in range(max(level.values()) + 1)]
    for place in [*ROOMS, *(place for path in paths for place in path[1:-1])]:
        rows[level[place] if isinstance(place, str) else place[2]].append(place)
    rows = arrange(rows, joined)
    x = columns(rows, paths, joined)
    y = {place: SPACE + HIGH / 2 + PITCH * r for r, row in enumerate(reversed(rows)) for place in row}
    width, height = max(x[name] for name in ROOMS) + BOX / 2 + SPACE, PITCH * len(rows) + 2 * SPACE
    shapes = [HEAD.format(width=width, height=height)]
    shapes += [arrow([(x[place], y[place]) for place in path]) for path in paths]
    shapes += [box(name, x[name], y[name]) for name in ROOMS]
    for i, (kind, text) in enumerate(LEGEND.items()):
        left, top = SPACE + i * 190, height - SPACE - 6
        shapes.append(f'<rect class="{kind}" x="{left}" y="{top - 10}" width="16" height="12" rx="2"/>')
        shapes.append(f'<text class="legend" x="{left + 24}" y="{top}">{text}</text>')
    return "\n".join(shapes) + "\n</svg>\n"


if __name__ == "__main__":
    print(draw(), end="")
