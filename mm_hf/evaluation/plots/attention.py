"""What weighs the labels of examples: a map over each image, or a colour behind each token."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib import pyplot as plt
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import ListedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.patches import Rectangle

from .style import WIDTH, grid_of, not_empty, saved_figure

POINTS = 72  # an inch
FONT, LINE, GAP = 8.0, 14.0, 5.0  # points: letters, a line, and the space between tokens
TEXT = 0.85  # of the width; the colour bar takes the rest
SHARE = "share of the label's weight"
MAP = colormaps["inferno"]
PAGE = ListedColormap(colormaps["YlOrBr"](np.linspace(0, 0.8, 256)))  # so light that black letters can be read on it


def plot_image_attention(
    images: Any, attention: Any, path: str | Path | None = None, *, titles: Sequence[str] | None = None
) -> Figure:
    """Images, each beside itself with what weighs its label at each location laid over it.

    Args:
        images: (b, h, w) or (b, h, w, 3), in [0, 1].
        attention: (b, r), as [`~mm_hf.extract`] gives it; the r locations make a grid of about the images' shape.
        path: Image file to write. Default: none.
        titles: What stands above each image.

    Returns:
        The figure, closed.

    Raises:
        ValueError: There are no images, or the locations make no grid.

    Example:
        >>> import numpy as np
        >>> figure = plot_image_attention(np.zeros((2, 8, 8)), np.full((2, 16), 1 / 16), titles=["a", "b"])
        >>> [axes.get_title(loc="left") for axes in figure.axes[:4]]
        ['a', '', 'b', '']
    """
    images, attention = np.asarray(images), np.asarray(attention)
    not_empty(images, "images")
    grid = map_shape(attention.shape[1], *images.shape[1:3])
    with saved_figure(path) as figures:
        rows, columns = grid_of(len(images))
        figure = plt.figure(figsize=(WIDTH, WIDTH / columns / 2 * rows + 0.25 * rows), layout="constrained")
        figures.append(figure)
        cells: Any = figure.subplots(rows, 2 * columns, squeeze=False)
        scale = Normalize(0, float(attention.max()))
        edges = (-0.5, images.shape[2] - 0.5, images.shape[1] - 0.5, -0.5)
        for i, cell in enumerate(cells.flat):
            if i >= 2 * len(images):
                cell.remove()
                continue
            cell.imshow(images[i // 2], cmap="gray", vmin=0, vmax=1, interpolation="nearest")
            cell.set_xticks([])
            cell.set_yticks([])
            if i % 2:
                shown = attention[i // 2].reshape(grid)
                cell.imshow(shown, cmap=MAP, norm=scale, alpha=0.8, extent=edges, interpolation="nearest")
            elif titles is not None:
                cell.set_title(titles[i // 2], loc="left")
        figure.colorbar(ScalarMappable(scale, MAP), ax=figure.axes, label=SHARE, shrink=0.9, aspect=30)
    return figure


def map_shape(locations: int, height: int, width: int) -> tuple[int, int]:
    """Rows and columns of the grid that so many locations of an image make.

    Raises:
        ValueError: No grid of that many cells is shaped like the image.

    Example:
        >>> map_shape(196, 224, 224), map_shape(8, 32, 64)
        ((14, 14), (2, 4))
    """
    found = [(n, locations // n) for n in range(1, locations + 1) if locations % n == 0]
    rows, columns = min(found, key=lambda shape: abs(np.log(shape[0] * width / (shape[1] * height))))
    if abs(np.log(rows * width / (columns * height))) > np.log(1.5):
        raise ValueError(f"attention over {locations} locations is no grid over images of {height} x {width} pixels.")
    return rows, columns


def plot_token_attention(
    tokens: Sequence[Sequence[str]],
    attention: Sequence[Any],
    path: str | Path | None = None,
    *,
    titles: Sequence[str] | None = None,
    max_tokens: int = 64,
) -> Figure:
    """Texts, each token on a colour that says how much it weighs the label.

    Args:
        tokens: For each text its tokens.
        attention: For each text a weight a token.
        path: Image file to write. Default: none.
        titles: What stands above each text.
        max_tokens: The first ones that are shown.

    Returns:
        The figure, closed.

    Raises:
        ValueError: There are no texts, or not one weight a token.

    Example:
        >>> figure = plot_token_attention([["not", "bad"]], [[0.75, 0.25]], titles=["up"])
        >>> [text.get_text() for text in figure.axes[0].texts]
        ['up', 'not', 'bad']
    """
    not_empty(tokens, "tokens")
    for i, (words, weights) in enumerate(zip(tokens, attention, strict=True)):
        if len(words) != len(weights):
            raise ValueError(
                f"attention must have a weight for each of the {len(words)} tokens of text {i}, got {len(weights)}."
            )
    scale = Normalize(0, max(float(np.max(weights, initial=0.0)) for weights in attention) or 1.0)
    with saved_figure(path) as figures:
        placed, lines = _place(tokens, titles, max_tokens)
        figure = plt.figure(figsize=(WIDTH, max(lines * LINE / POINTS, 1.2)))
        figures.append(figure)
        page = figure.add_axes((0.01, 0, TEXT, 1))  # one unit across is a point, as words were measured
        page.set_xlim(0, TEXT * WIDTH * POINTS)
        page.set_ylim(lines, 0)
        page.axis("off")
        for x, y, width, word, (text, position) in placed:
            if position is not None:
                colour = PAGE(scale(float(attention[text][position])))
                page.add_patch(Rectangle((x - 1, y + 0.08), width + 2, 0.84, color=colour, linewidth=0))
            style: Any = {"color": "#6b7280", "fontweight": "bold"} if position is None else {"color": "black"}
            page.text(x, y + 0.5, word, fontsize=FONT, va="center", parse_math=False, **style)
        bar = figure.add_axes((TEXT + 0.03, 0.05, 0.015, 0.9))
        figure.colorbar(ScalarMappable(scale, PAGE), cax=bar, label=SHARE)
    return figure


def _place(
    tokens: Sequence[Sequence[str]], titles: Sequence[str] | None, most: int
) -> tuple[list[tuple[float, float, float, str, tuple[int, int | None]]], int]:
    """Where each word begins (points, lines), how wide it is, which token it is; and the number of lines."""
    renderer = FigureCanvasAgg(Figure(dpi=POINTS)).get_renderer()
    font = FontProperties(size=FONT)
    end = TEXT * WIDTH * POINTS
    placed: list[tuple[float, float, float, str, tuple[int, int | None]]] = []
    y = 0.0
    for i, words in enumerate(tokens):
        if titles is not None:
            placed.append((0.0, y, 0.0, titles[i], (i, None)))
            y += 1
        x = 0.0
        shown: list[tuple[str, int | None]] = [(word, j) for j, word in enumerate(words[:most])]
        for word, j in shown + ([("…", None)] if len(words) > most else []):
            width = renderer.get_text_width_height_descent(word, font, ismath=False)[0]
            if x and x + width > end:
                x, y = 0.0, y + 1
            placed.append((x, y, width, word, (i, j)))
            x += width + GAP
        y += 1.4
    return placed, int(np.ceil(y))


def pixels_of(figure: Figure, dpi: int = 110) -> np.ndarray:
    """A figure as an image (height, width, 3) of bytes, as trackers take it.

    Example:
        >>> pixels_of(Figure(figsize=(2, 1)), dpi=50).shape
        (50, 100, 3)
    """
    figure.set_dpi(dpi)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()
