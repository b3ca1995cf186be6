"""Plots show the values they are given, label their axes, and have no overlapping texts."""

import itertools

import numpy as np
import pytest
import torch
from demo_plots import plot_attention, plot_training
from matplotlib import pyplot as plt
from matplotlib.backends.backend_agg import FigureCanvasAgg
from PIL import Image
from scipy import stats
from sklearn.datasets import load_digits
from sklearn.decomposition import PCA
from sklearn.metrics import roc_auc_score

from mm_hf.evaluation.metrics import CORRUPTIONS, calibration_error, max_softmax_score, reliability
from mm_hf.evaluation.plots import (
    plot_alignment_uniformity,
    plot_corruptions,
    plot_cost,
    plot_differences,
    plot_embeddings,
    plot_history,
    plot_ood,
    plot_reliability,
    plot_validation,
)
from mm_hf.evaluation.plots.attention import patch_grid
from mm_hf.evaluation.plots.style import CLASS_COLORS, COLORS, method_styles
from mm_hf.evaluation.statistics import Interval

METHODS = ("plain training", "Dense MultiMix", "Mixup", "MultiMix")


def classifier(seed, n=400, classes=5):
    generator = np.random.default_rng(seed)
    labels = generator.integers(0, classes, n)
    return generator.normal(size=(n, classes)) * 1.5 + 2 * np.eye(classes)[labels], labels


def check_layout(figure, path, panels):
    """Check the size of the written file, the number of axes, and that no texts overlap or leave the figure."""
    with Image.open(path) as image:
        assert image.size[0] >= 1000 and image.size[1] >= 450
        assert len(np.unique(np.asarray(image.convert("L")))) > 10
    assert len(figure.axes) == panels
    assert not plt.get_fignums()
    figure.set_dpi(300)  # as in the file
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    renderer = canvas.get_renderer()
    texts = [t for a in figure.axes for t in (a.title, a.xaxis.label, a.yaxis.label) if t.get_text()]
    texts += [t for legend in figure.legends for t in legend.get_texts()]
    texts += [figure._suptitle] if figure._suptitle is not None else []
    boxes = [text.get_window_extent(renderer) for text in texts]
    for (one, a), (other, b) in itertools.combinations(zip(texts, boxes), 2):
        assert not a.overlaps(b), (one.get_text(), other.get_text())
    for text, box in zip(texts, boxes):
        inside = box.x0 >= 0 and box.y0 >= 0 and box.x1 <= figure.bbox.x1 and box.y1 <= figure.bbox.y1
        assert inside, text.get_text()
        assert text.get_fontsize() >= 7


@pytest.mark.parametrize("methods", [1, 2, 4])
def test_reliability(tmp_path, methods):
    runs = {name: classifier(seed) for seed, name in enumerate(METHODS[:methods])}
    figure = plot_reliability(runs, tmp_path / "x.png", num_bins=10)
    check_layout(figure, tmp_path / "x.png", 2 * methods)
    for i, (name, (logits, labels)) in enumerate(runs.items()):
        top, bottom = figure.axes[2 * i : 2 * i + 2]
        bins = reliability(logits, labels, 10)
        filled = np.flatnonzero(bins.share)
        bars, gaps = top.containers
        np.testing.assert_allclose([b.get_height() for b in bars], np.nan_to_num(bins.accuracy))
        np.testing.assert_allclose([b.get_x() for b in bars], np.arange(10) / 10, atol=1e-12)
        np.testing.assert_allclose([b.get_y() for b in gaps], bins.accuracy[filled])
        np.testing.assert_allclose([b.get_y() + b.get_height() for b in gaps], bins.confidence[filled])
        np.testing.assert_allclose([b.get_height() for b in bottom.containers[0]], 100 * bins.share)
        error = calibration_error(logits, labels, 10)
        assert top.get_title() == f"{name}\ncalibration error {100 * error:.2f} %"
        assert bottom.get_xlabel() == "confidence"
    assert figure.axes[0].get_ylabel() == "accuracy" and "(%)" in figure.axes[1].get_ylabel()


def corruption_runs(seeds, names=tuple(CORRUPTIONS)):
    generator = np.random.default_rng(0)
    return {m: [{n: generator.random(5).tolist() for n in names} for _ in range(seeds)] for m in METHODS[:3]}


@pytest.mark.parametrize("seeds", [1, 2, 4])
def test_corruptions(tmp_path, seeds):
    runs = corruption_runs(seeds)
    figure = plot_corruptions(runs, tmp_path / "x.png")
    check_layout(figure, tmp_path / "x.png", 9)
    for panel, names in zip(figure.axes, [list(CORRUPTIONS), *[[n] for n in CORRUPTIONS]]):
        for line, (method, curves) in zip(panel.lines, runs.items()):
            accuracy = 100 * np.array([[np.mean([c[n][k] for n in names]) for k in range(5)] for c in curves])
            np.testing.assert_allclose(line.get_xdata(), [1, 2, 3, 4, 5])
            np.testing.assert_allclose(line.get_ydata(), accuracy.mean(0))
            assert line.get_label() == method and line.get_color() == method_styles(runs)[method][0]
        if seeds == 1:
            assert not panel.collections
            continue
        band = panel.collections[-1].get_paths()[0].vertices[:, 1]  # the last method's
        for k in range(5):
            interval = stats.t.interval(0.95, seeds - 1, accuracy[:, k].mean(), stats.sem(accuracy[:, k]))
            low, high = np.clip(interval if seeds > 2 else (accuracy[:, k].min(), accuracy[:, k].max()), 0, 100)
            assert np.isclose(band, low).any() and np.isclose(band, high).any()
    assert figure.axes[0].get_ylabel() == "accuracy (%)" and figure.axes[-1].get_xlabel() == "severity (1 to 5)"
    assert ("one seed" if seeds == 1 else f"mean of {seeds} seeds") in figure._suptitle.get_text()
    assert ("range of two seeds" in figure._suptitle.get_text()) == (seeds == 2)
    assert ("confidence interval" in figure._suptitle.get_text()) == (seeds > 2)


def test_corruptions_in_one_panel(tmp_path):
    figure = plot_corruptions(corruption_runs(3), tmp_path / "x.pdf", each=False)
    assert (tmp_path / "x.pdf").read_bytes()[:4] == b"%PDF"
    assert [a.get_title() for a in figure.axes] == ["mean over corruptions"]
    figure = plot_corruptions(corruption_runs(3, ("jpeg",)), tmp_path / "x.png")
    assert [a.get_title() for a in figure.axes] == ["jpeg"]
    check_layout(figure, tmp_path / "x.png", 1)
    # Seven panels in rows of three: the lowest panel of each column labels the axis.
    figure = plot_corruptions(corruption_runs(3, tuple(CORRUPTIONS)[:6]), tmp_path / "y.png")
    check_layout(figure, tmp_path / "y.png", 7)
    assert [bool(a.get_xlabel()) for a in figure.axes] == [False] * 4 + [True] * 3


@pytest.mark.parametrize("methods", [1, 3])
@pytest.mark.parametrize("score", ["max_softmax", "energy"])
def test_ood(tmp_path, score, methods):
    runs = {
        name: (classifier(seed)[0], np.random.default_rng(seed).normal(size=(150, 5)))
        for seed, name in enumerate(METHODS[:methods])
    }
    figure = plot_ood(runs, tmp_path / "x.png", score=score)
    check_layout(figure, tmp_path / "x.png", methods)
    for panel, (name, (known, others)) in zip(figure.axes, runs.items()):
        shares = []
        for patch in panel.patches:
            outline = patch.get_xy()
            # The area between the outline of the histogram and the axis is that of the bars.
            x, y = outline[:, 0], outline[:, 1]
            area = abs(np.sum(x * np.roll(y, -1) - np.roll(x, -1) * y)) / 2
            edges = np.unique(x)
            shares.append(area / (edges[1] - edges[0]))
        np.testing.assert_allclose(shares, [100, 100], rtol=1e-4)
        expected = max_softmax_score if score == "max_softmax" else lambda x: torch.tensor(x).logsumexp(-1)
        scores = [expected(x).numpy() for x in (known, others)]
        area = roc_auc_score([1] * len(known) + [0] * len(others), np.concatenate(scores))
        assert f"AUROC {100 * area:.1f} %" in panel.get_title() and name in panel.get_title()
        (line,) = panel.lines
        assert (scores[0] >= line.get_xdata()[0]).mean() == pytest.approx(0.95)
    assert figure.axes[0].get_ylabel() == "examples (% of each group)"
    assert ("probability" if score == "max_softmax" else "nats") in figure.axes[0].get_xlabel()


def test_pca_embeddings(tmp_path):
    data = load_digits()
    x, y = data.data[:300], data.target[:300]
    names = [f"digit {k}" for k in range(10)]
    figure = plot_embeddings({"a": (x, y), "b": (x / 16, y)}, tmp_path / "x.png", projection="pca", class_names=names)
    check_layout(figure, tmp_path / "x.png", 2)
    pca = PCA(2, svd_solver="full")
    points = pca.fit_transform(x)
    for k, dots in enumerate(figure.axes[0].collections):
        np.testing.assert_allclose(np.asarray(dots.get_offsets()), points[y == k], rtol=1e-6, atol=1e-8)
        assert dots.get_label() == names[k]
        np.testing.assert_allclose(dots.get_facecolor()[0], plt.matplotlib.colors.to_rgba(CLASS_COLORS[k]))
    share = 100 * pca.explained_variance_ratio_[0]
    assert figure.axes[0].get_xlabel() == f"component 1 ({share:.0f} % of variance)"
    assert [t.get_text() for t in figure.legends[0].get_texts()] == names


def test_tsne_embeddings_are_reproducible(tmp_path):
    data = load_digits()
    runs = {"a": (torch.tensor(data.data[:120]), torch.tensor(data.target[:120]))}
    first, again = (plot_embeddings(runs, tmp_path / "x.png") for _ in range(2))
    check_layout(first, tmp_path / "x.png", 1)
    assert sum(len(dots.get_offsets()) for dots in first.axes[0].collections) == 120
    for one, other in zip(first.axes[0].collections, again.axes[0].collections):
        np.testing.assert_array_equal(one.get_offsets(), other.get_offsets())
    assert first.axes[0].get_xlabel() == "t-SNE 1"


def test_many_classes_have_distinct_styles(tmp_path):
    x = np.random.default_rng(0).normal(size=(250, 4))
    figure = plot_embeddings({"a": (x, np.arange(250) % 25)}, tmp_path / "x.png", projection="pca")
    check_layout(figure, tmp_path / "x.png", 1)
    styles = {(tuple(d.get_facecolor()[0]), d.get_paths()[0].vertices.tobytes()) for d in figure.axes[0].collections}
    assert len(styles) == 25


@pytest.mark.parametrize("methods", [METHODS[:3], [*METHODS[:5], "dense_multimix_paper"]])
def test_alignment_and_uniformity(tmp_path, methods):
    generator = np.random.default_rng(0)
    runs = {m: (generator.random((4, 2)) * [1, -3]).tolist() for m in methods}
    figure = plot_alignment_uniformity(runs, tmp_path / "x.png")
    check_layout(figure, tmp_path / "x.png", 1)
    collections = figure.axes[0].collections
    for k, (method, points) in enumerate(runs.items()):
        np.testing.assert_allclose(np.asarray(collections[2 * k].get_offsets()), points)
        np.testing.assert_allclose(np.asarray(collections[2 * k + 1].get_offsets()), [np.mean(points, axis=0)])
        assert collections[2 * k + 1].get_label() == method
    assert "alignment" in figure.axes[0].get_xlabel() and "uniformity" in figure.axes[0].get_ylabel()


def test_demo_plots_the_mean_of_all_methods_in_each_regime(tmp_path, monkeypatch):
    histories = [[{"step": k, "loss": 1.0}, {"step": k, "eval_nll": 2.0}, {"step": 5, "eval_nll": k}] for k in (1, 1)]
    histories[1][2]["eval_nll"] = 4.0
    monkeypatch.setattr(plt, "close", lambda figure: None)
    plot_training({"few": {f"method {k}": histories for k in range(9)}, "all": {"a": histories}}, tmp_path / "x.png")
    few, all_images = plt.gcf().axes
    assert (few.get_title(), all_images.get_title()) == ("few", "all") and len(few.lines) == 27
    mean = few.lines[2]
    np.testing.assert_allclose(mean.get_xdata(), [1, 5])
    np.testing.assert_allclose(mean.get_ydata(), [2, 2.5])
    assert [text.get_text() for text in all_images.get_legend().get_texts()] == ["a"]
    monkeypatch.undo()
    plt.close("all")


def test_demo_plots_weighted_labels(tmp_path, monkeypatch):
    attention = torch.tensor([[0.1, 0.2, 0.3, 0.4], [0.4, 0.3, 0.2, 0.1]])
    factors = torch.tensor([0.25, 0.75]).expand(4, 2).unsqueeze(2)
    monkeypatch.setattr(plt, "close", lambda figure: None)
    plot_attention(
        torch.rand(2, 8, 8), torch.tensor([0, 1]), attention, factors, ["a", "b"], tmp_path / "x.png", num_mixed=1
    )
    cells = [axes for axes in plt.gcf().axes if axes.containers]
    bars = [[bar.get_height() for bar in container] for container in cells[0].containers]
    most_attended = int(attention.mean(dim=0).argmax())
    weighted = attention[:, most_attended] * torch.tensor([0.25, 0.75])
    np.testing.assert_allclose(bars, [weighted / weighted.sum(), [0.25, 0.75]], rtol=1e-6)
    with pytest.raises(ValueError, match="15 locations do not form a grid"):
        plot_attention(
            torch.rand(2, 8, 8), torch.tensor([0, 1]), torch.ones(2, 15), factors, ["a", "b"], tmp_path / "x.png"
        )
    monkeypatch.undo()
    plt.close("all")


@pytest.mark.parametrize(
    ("locations", "size", "grid"), [(49, (224, 224), (7, 7)), (8, (32, 64), (2, 4)), (12, (40, 30), (4, 3))]
)
def test_patch_grid_has_the_aspect_ratio_of_the_image(locations, size, grid):
    assert patch_grid(locations, *size) == grid


def test_methods_have_distinct_styles():
    assert len(set(method_styles(str(k) for k in range(49)).values())) == 49
    assert [color for color, _ in method_styles("abcdefg").values()] == list(COLORS)


def test_names_with_dollar_signs_and_underscores_are_plain_text(tmp_path):
    names = ["_hidden", "$a_{$", "cost in $ or $", "a\\b"]
    runs = {name: classifier(seed) for seed, name in enumerate(names)}
    figures = [
        plot_reliability(runs, tmp_path / "reliability.png", num_bins=10),
        plot_embeddings({names[1]: classifier(0, classes=4)}, tmp_path / "x.png", projection="pca", class_names=names),
        plot_alignment_uniformity({name: [[0.5, -1.0]] for name in names}, tmp_path / "y.png"),
    ]
    for figure in figures[1:]:
        shown = [text._preprocess_math(text.get_text()) for text in figure.legends[0].get_texts()]
        assert [(text.strip(), math) for text, math in shown] == [(name, False) for name in names]


def test_invalid_arguments_are_rejected(tmp_path):
    path = tmp_path / "x.png"
    for plot in (plot_reliability, plot_corruptions, plot_ood, plot_embeddings, plot_alignment_uniformity):
        with pytest.raises(ValueError, match="runs is empty"):
            plot({}, path)
    with pytest.raises(ValueError, match="score must be one of"):
        plot_ood({"a": (np.eye(2), np.eye(2))}, path, score="odin")
    with pytest.raises(ValueError, match="projection must be one of pca, tsne, got 'umap'"):
        plot_embeddings({"a": (np.eye(5), np.arange(5))}, path, projection="umap")
    with pytest.raises(ValueError, match="class_names has 2 names, but the largest label is 4"):
        plot_embeddings({"a": (np.eye(5), np.arange(5))}, path, projection="pca", class_names=["x", "y"])
    with pytest.raises(ValueError, match="at least three examples"):
        plot_embeddings({"a": (np.eye(2), np.arange(2))}, path)
    with pytest.raises(ValueError, match="one of 'b' has jpeg at 2"):
        plot_corruptions({"a": [{"jpeg": [0.5] * 5}], "b": [{"jpeg": [0.5] * 2}]}, path)
    with pytest.raises(ValueError, match=r"runs\['a'\] is empty"):
        plot_corruptions({"a": []}, path)
    with pytest.raises(ValueError, match=r"runs\['a'\] must have one pair"):
        plot_alignment_uniformity({"a": [0.5, -2.0]}, path)
    assert not path.exists() and not plt.get_fignums()


@pytest.mark.parametrize("metrics", [1, 4])
def test_differences(tmp_path, metrics):
    generator = np.random.default_rng(0)
    runs = {
        f"metric {k} (%)": {
            name: Interval(x, x - 0.5, x + 0.5) for name, x in zip(METHODS[1:], generator.normal(size=3))
        }
        for k in range(metrics)
    }
    better, scales = {"metric 0 (%)": "lower"}, {"metric 0 (%)": 100}
    figure = plot_differences(runs, tmp_path / "x.png", baseline=METHODS[0], better=better, scales=scales)
    check_layout(figure, tmp_path / "x.png", metrics)
    colors = method_styles(METHODS)
    for axes, (title, each) in zip(figure.axes, runs.items()):
        scale = scales.get(title, 1)
        assert axes.get_title() == title and axes.yaxis_inverted()
        assert axes.get_xlabel().startswith("difference from plain training")
        assert ("better" in axes.get_xlabel()) == (title in better)
        _, *lines = axes.lines  # the first marks zero
        for (name, interval), line, point in zip(each.items(), lines[::2], lines[1::2]):
            np.testing.assert_allclose(line.get_xdata(), [scale * interval.low, scale * interval.high])
            assert point.get_xdata()[0] == pytest.approx(scale * interval.value)
            assert line.get_color() == point.get_color() == colors[name][0] and point.get_marker() == colors[name][1]
            assert (point.get_markerfacecolor() == "white") == (not interval.excludes_zero)
    with pytest.raises(ValueError, match="same methods"):
        plot_differences({"a": {"x": Interval(0)}, "b": {"y": Interval(0)}}, tmp_path / "x.png", baseline="plain")


def test_cost(tmp_path):
    generator = np.random.default_rng(0)
    runs = {kind: {name: 1 + generator.random(3) for name in METHODS} for kind in ("training time", "peak memory")}
    units = {"training time": "s", "peak memory": "MiB"}
    figure = plot_cost(runs, tmp_path / "x.png", baseline=METHODS[0], units=units)
    check_layout(figure, tmp_path / "x.png", 2)
    for axes, (kind, each) in zip(figure.axes, runs.items()):
        relative = [each[name].mean() / each[METHODS[0]].mean() for name in METHODS]
        np.testing.assert_allclose([bar.get_width() for bar in axes.patches], relative)
        assert [text.get_text().strip() for text in axes.texts] == [f"{x:.2f} x" for x in relative]
        assert (
            axes.get_xlabel().startswith(f"{kind}, relative to plain training (") and units[kind] in axes.get_xlabel()
        )
    with pytest.raises(ValueError, match="mean memory of the baseline 'a' must be positive"):
        plot_cost({"memory": {"a": [0.0], "b": [1.0]}}, tmp_path / "x.png", baseline="a", units={"memory": "MiB"})


def test_validation_curves(tmp_path):
    runs = {
        name: [
            [{"step": 0, "loss": 1.0}]
            + [{"step": s, "eval_nll": 3 / (s + seed + k), "eval_accuracy": s / (60 + k)} for s in range(10, 60, 10)]
            for seed in range(2)
        ]
        for k, name in enumerate(METHODS)
    }
    figure = plot_validation(runs, tmp_path / "x.png")
    check_layout(figure, tmp_path / "x.png", 2)
    left, right = figure.axes
    for k, name in enumerate(METHODS):
        one, other, mean = left.lines[3 * k : 3 * k + 3]
        np.testing.assert_allclose(mean.get_ydata(), (one.get_ydata() + other.get_ydata()) / 2)
        np.testing.assert_allclose(right.lines[3 * k].get_ydata(), [100 * s / (60 + k) for s in range(10, 60, 10)])
        assert mean.get_label() == name
    with pytest.raises(ValueError, match="was not evaluated during training"):
        plot_validation({"plain": [[{"step": 1, "loss": 2.0}]]}, tmp_path / "x.png")


def test_history(tmp_path):
    history = [
        {"step": 5 * i, "loss": 8 / i, "loss_clean": 3 / i, "loss_dense": 5 / i, "loss_terms": 99} for i in (1, 2, 3)
    ]
    history += [{"step": 15, "loss_cutmix": 1.5}]
    history += [{"step": step, "eval_loss": 4 / step, "eval_accuracy": step / 20} for step in (10, 15)]
    figure = plot_history(history, tmp_path / "x.png")
    check_layout(figure, tmp_path / "x.png", 2)
    left, right = figure.axes
    plotted = {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in left.lines}
    assert plotted == {
        "training": ([5, 10, 15], [8, 4, 8 / 3]),
        "evaluation": ([10, 15], [0.4, 4 / 15]),
        "training: clean examples": ([5, 10, 15], [3, 1.5, 1]),
        "training: mixed locations": ([5, 10, 15], [5, 2.5, 5 / 3]),
        "training: cutmix": ([15], [1.5]),
    }
    assert list(right.lines[0].get_ydata()) == [50, 75] and right.get_ylabel() == "evaluation accuracy (%)"
    # Without evaluations there is one panel.
    check_layout(plot_history([{"step": s, "loss": 1.0} for s in (1, 2)], tmp_path / "y.png"), tmp_path / "y.png", 1)
    with pytest.raises(ValueError, match="at least two entries"):
        plot_history([{"step": 1, "loss": 2.0}], tmp_path / "x.png")
