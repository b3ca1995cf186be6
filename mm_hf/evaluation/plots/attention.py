"""Plots of attention over locations: a map over each image, or a background color for each token."""

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

from .style import WIDTH, check_not_empty, panel_layout, plain_text, saved_figure

POINTS = 72  # per inch
FONT, LINE, GAP = 8.0, 14.0, 5.0  # points: font size, line height, space between tokens
TEXT = 0.85  # share of the width that the text takes; the color bar takes the rest
SHARE = "attention weight"
MAP = colormaps["inferno"]
PAGE = ListedColormap(colormaps["YlOrBr"](np.linspace(0, 0.8, 256)))  # light enough for black text


def plot_image_attention(
    images: Any, attention: Any, path: str | Path | None = None, *, titles: Sequence[str] | None = None
) -> Figure:
    """Plot each image next to a copy that is overlaid with its attention map.

    Args:
        images: Images (b, h, w) or (b, h, w, 3) with values in [0, 1].
        attention: Attention (b, r) as returned by [`~mm_hf.extract`]. The r locations form a grid with about the aspect
            ratio of the images.
        path: Image file to write. Default: no file.
        titles: Title of each image.

    Returns:
        The figure, closed.

    Raises:
        ValueError: There are no images, or the locations do not form a grid.

    Example:
        >>> import numpy as np
        >>> figure = plot_image_attention(np.zeros((2, 8, 8)), np.full((2, 16), 1 / 16), titles=["a", "b"])
        >>> [axes.get_title(loc="left") for axes in figure.axes[:4]]
        ['a', '', 'b', '']
    """
    images, attention = np.asarray(images), np.asarray(attention)
    check_not_empty(images, "images")
    grid = patch_grid(attention.shape[1], *images.shape[1:3])
    with saved_figure(path) as figures:
        rows, columns = panel_layout(len(images))
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
                cell.set_title(plain_text(titles[i // 2]), loc="left")
        figure.colorbar(ScalarMappable(scale, MAP), ax=figure.axes, label=SHARE, shrink=0.9, aspect=30)
    return figure


def patch_grid(locations: int, height: int, width: int) -> tuple[int, int]:
    """Return the rows and columns of the grid of `locations` patches that is closest to the image's aspect ratio.

    Raises:
        ValueError: No such grid has about the aspect ratio of the image.

    Example:
        >>> patch_grid(196, 224, 224), patch_grid(8, 32, 64)
        ((14, 14), (2, 4))
    """
    found = [(n, locations // n) for n in range(1, locations + 1) if locations % n == 0]
    rows, columns = min(found, key=lambda shape: abs(np.log(shape[0] * width / (shape[1] * height))))
    if abs(np.log(rows * width / (columns * height))) > np.log(1.5):
        raise ValueError(f"The {locations} locations do not form a grid over images of {height} x {width} pixels.")
    return rows, columns


def plot_token_attention(
    tokens: Sequence[Sequence[str]],
    attention: Sequence[Any],
    path: str | Path | None = None,
    *,
    titles: Sequence[str] | None = None,
    max_tokens: int = 64,
) -> Figure:
    """Plot texts with the attention of each token as its background color.

    Args:
        tokens: Tokens of each text.
        attention: Attention of each text, one weight per token.
        path: Image file to write. Default: no file.
        titles: Title of each text.
        max_tokens: Maximum number of tokens shown per text.

    Returns:
        The figure, closed.

    Raises:
        ValueError: There are no texts, or a text does not have one weight per token.

    Example:
        >>> figure = plot_token_attention([["not", "bad"]], [[0.75, 0.25]], titles=["up"])
        >>> [text.get_text() for text in figure.axes[0].texts]
        ['up', 'not', 'bad']
    """
    check_not_empty(tokens, "tokens")
    for i, (words, weights) in enumerate(zip(tokens, attention, strict=True)):
        if len(words) != len(weights):
            raise ValueError(
                f"attention must have one weight for each of the {len(words)} tokens of text {i}, "
                f"but has {len(weights)}."
            )
    scale = Normalize(0, max(float(np.max(weights, initial=0.0)) for weights in attention) or 1.0)
    with saved_figure(path) as figures:
        placed, lines = _place(tokens, titles, max_tokens)
        figure = plt.figure(figsize=(WIDTH, max(lines * LINE / POINTS, 1.2)))
        figures.append(figure)
        page = figure.add_axes((0.01, 0, TEXT, 1))  # horizontal unit: a point, as measured by _place
        page.set_xlim(0, TEXT * WIDTH * POINTS)
        page.set_ylim(lines, 0)
        page.axis("off")
        for x, y, width, word, (text, position) in placed:
            if position is not None:
                color = PAGE(scale(float(attention[text][position])))
                page.add_patch(Rectangle((x - 1, y + 0.08), width + 2, 0.84, color=color, linewidth=0))
            style: Any = {"color": "#6b7280", "fontweight": "bold"} if position is None else {"color": "black"}
            page.text(x, y + 0.5, word, fontsize=FONT, va="center", parse_math=False, **style)
        bar = figure.add_axes((TEXT + 0.03, 0.05, 0.015, 0.9))
        figure.colorbar(ScalarMappable(scale, PAGE), cax=bar, label=SHARE)
    return figure


def _place(
    tokens: Sequence[Sequence[str]], titles: Sequence[str] | None, most: int
) -> tuple[list[tuple[float, float, float, str, tuple[int, int | None]]], int]:
    """Return x (points), y (lines), width, word and (text, token) of each word, and the number of lines."""
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
    """Render a figure to an array (height, width, 3) of bytes, as experiment trackers accept it.

    Example:
        >>> pixels_of(Figure(figsize=(2, 1)), dpi=50).shape
        (50, 100, 3)
    """
    figure.set_dpi(dpi)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()
