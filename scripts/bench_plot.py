"""Measured rows as bars, in an SVG of our own: the machines that measure have no plotting library."""

from __future__ import annotations

from html import escape

COLOURS = {
    "flashlight": "#d1495b",
    "flex": "#00798c",
    "flex-with-build": "#66b2bf",
    "compile": "#edae49",
    "eager": "#b0b0b0",
    "sdpa-cudnn": "#30638e",
    "sdpa-flash": "#8d6a9f",
}
BAR, GAP, WIDTH, LABELS = 12, 14, 640, 250


def svg(rows: list[dict], title: str) -> str:
    """A group of bars for each program and size, each as long as its rate: of rows as `bench.py --suite` saves them."""
    groups: dict[str, list[dict]] = {}
    for row in rows:
        if row["ms"] and row["peer"] in COLOURS:
            sizes = f"{row['B']} x {row['S']}, {row['H']}/{row['Hkv']} heads of {row['D']}"
            groups.setdefault(f"{row['variant']}, {sizes}", []).append(row)
    most = max((_rate(row) for row in rows), default=0.0) or 1.0
    parts, y = [], 34
    for name, bars in groups.items():
        middle = y + len(bars) * BAR / 2 + 4
        parts.append(f'<text x="{LABELS - 8}" y="{middle:.0f}" text-anchor="end">{escape(name)}</text>')
        for row in bars:
            length = WIDTH * _rate(row) / most
            rect = f'x="{LABELS}" y="{y}" width="{length:.1f}" height="{BAR - 2}" fill="{COLOURS[row["peer"]]}"'
            said = escape(f"{row['tflops']}  {row['peer']} ({row['ms']} ms)")
            parts.append(f'<rect {rect}/><text x="{LABELS + length + 5:.0f}" y="{y + BAR - 3}">{said}</text>')
            y += BAR
        y += GAP
    head = f'<svg xmlns="http://www.w3.org/2000/svg" width="{LABELS + WIDTH + 190}" height="{y}" '
    style = 'font-family="sans-serif" font-size="10"><rect width="100%" height="100%" fill="white"/>'
    return "\n".join([head + style, f'<text x="8" y="18" font-size="13">{escape(title)}</text>', *parts, "</svg>\n"])


def _rate(row: dict) -> float:
    return float(str(row["tflops"]).removesuffix("GB/s") or 0)
