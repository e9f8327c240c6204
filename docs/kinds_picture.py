"""Draws docs/_static/kinds.svg, the masks of eight kinds of dropout: python docs/kinds_picture.py."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

import fastdrop as fd

PICTURE = Path(__file__).parent / "_static" / "kinds.svg"
CELL, GAP, WIDTH, HEIGHT = 8, 6, 220, 182
KEPT, DROPPED = "#1f77b4", "#e8e8e8"

images = np.ones((2, 3, 6, 6), np.float32)  # samples, channels, height, width
sequences = np.ones((2, 6, 20), np.float32)  # samples, features, time
numbers = np.random.default_rng(1).random((2, 1, 20))
tokens = numbers >= np.sort(numbers)[..., 8:9]  # 12 of 20 in each sample
PANELS = [
    ("dropout", "elements", fd.dropout(images, 0.3, rng=1)[0]),
    ("spatial", "channels of a sample", fd.feature_dropout(images, 0.4, rng=6)[0]),
    ("DropBlock", "blocks of neighbours", fd.drop_block(images, 0.3, 3, rng=4)[0]),
    ("stochastic depth", "samples of a branch", fd.stochastic_depth(images, 0.5, "row", rng=1)[0]),
    ("dropout", "elements, new at each step", fd.dropout(sequences, 0.3, rng=2)[0]),
    ("variational", "features, at all steps", fd.variational_dropout(sequences, 0.4, 2, rng=3)[0]),
    ("tokens", "steps; sequences get shorter", sequences * tokens),
    ("batchwise", "features, of all samples", sequences * fd.draw_mask((1, 6, 1), 0.4, rng=4).to_bool()),
]


def cells(values: np.ndarray, left: int, top: int) -> Iterator[str]:
    """A square for each cell of a grid with two axes, in one path for those kept and one for those dropped."""
    side = CELL - 1
    for color, chosen in ((KEPT, values != 0), (DROPPED, values == 0)):
        corners = [(left + column * CELL, top + row * CELL) for row, column in np.argwhere(chosen)]
        yield f'<path fill="{color}" d="' + "".join(f"M{x} {y}h{side}v{side}h-{side}z" for x, y in corners) + '"/>'


def panel(name: str, what: str, values: np.ndarray, left: int, top: int) -> Iterator[str]:
    """A kind's name, and below it a row of grids for each of two samples."""
    yield f'<text x="{left}" y="{top + 14}" font-weight="bold">{name}</text>'
    yield f'<text x="{left}" y="{top + 30}" fill="#555">{what}</text>'
    for sample, grids in enumerate(values.reshape(2, -1, *values.shape[-2:])):
        for i, grid in enumerate(grids):
            rows, columns = grid.shape
            yield from cells(grid, left + i * (columns * CELL + GAP), top + 42 + sample * (rows * CELL + 2 * GAP))


def picture() -> str:
    parts = [part for i, kind in enumerate(PANELS) for part in panel(*kind, 12 + i % 4 * WIDTH, i // 4 * HEIGHT)]
    size = f'viewBox="0 0 {4 * WIDTH} {2 * HEIGHT}"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="sans-serif" font-size="13">'
    return "\n".join([head, '<rect width="100%" height="100%" fill="#fff"/>', *parts, "</svg>", ""])


if __name__ == "__main__":
    PICTURE.write_text(picture())
