"""A plot without a plotting library: horizontal bars as SVG."""

import html
from collections.abc import Sequence

_ROW, _LABEL, _WIDTH = 18, 430, 360


def svg(title: str, values: Sequence[tuple[str, float]], mark: float) -> str:
    """Bars with their numbers, and a line where `mark` is.

    Args:
        title: above.
        values: labels and numbers, from the top down.
        mark: number that a vertical line stands at.
    """
    most = max(mark, *(value for _, value in values))
    height = _ROW * (len(values) + 2)
    at = lambda value: _LABEL + _WIDTH * value / most
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_LABEL + _WIDTH + 80}" '
        f'height="{height}" font-family="sans-serif" font-size="11">',
        '<rect width="100%" height="100%" fill="white"/>',
        f'<text x="8" y="{_ROW - 4}" font-size="13">{html.escape(title)}</text>',
    ]
    for i, (label, value) in enumerate(values):
        y = _ROW * (i + 1)
        colour = "#0072B2" if value >= mark else "#D55E00"
        parts.append(f'<text x="8" y="{y + 13}">{html.escape(label)}</text>')
        parts.append(
            f'<rect x="{_LABEL}" y="{y + 3}" width="{max(at(value) - _LABEL, 1):.1f}" '
            f'height="{_ROW - 5}" fill="{colour}"/>'
        )
        parts.append(f'<text x="{at(value) + 4:.1f}" y="{y + 13}">{value:.2f}</text>')
    x = f"{at(mark):.1f}"
    parts.append(f'<line x1="{x}" x2="{x}" y1="{_ROW}" y2="{height - _ROW}" stroke="black"/>')
    return "\n".join([*parts, "</svg>", ""])
