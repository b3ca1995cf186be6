"""Plots of confusion matrices, mistakes and lengths of training, compared with what they are drawn from."""

import numpy as np
import pytest
from PIL import Image

from mm_hf.evaluation.metrics import get_metric
from mm_hf.evaluation.plots import Mistake, plot_confusion, plot_lengths, plot_mistakes
from mm_hf.evaluation.statistics import Interval

UNUSUAL = "a $x_ b^ \\frac & <b> %"


@pytest.mark.parametrize("classes", [2, 12, 13, 31, 200])
@pytest.mark.parametrize("methods", [1, 4])
def test_confusion_matrix_shows_shares_of_each_class(tmp_path, classes, methods):
    generator = np.random.default_rng(0)
    matrices = {f"{UNUSUAL} {k}": generator.integers(0, 20, (classes, classes)) for k in range(methods)}
    first = next(iter(matrices.values()))
    first[1] = 0  # a class without examples
    figure = plot_confusion(matrices, tmp_path / "x.png", class_names=[f"{UNUSUAL}{i}" for i in range(classes)])
    assert len(figure.axes) == methods and Image.open(tmp_path / "x.png").width > 500
    drawn = np.asarray(figure.axes[0].images[0].get_array())
    expected = 100 * first / first.sum(axis=1, keepdims=True).clip(1)
    np.testing.assert_allclose(np.delete(drawn, 1, axis=0), np.delete(expected, 1, axis=0))
    texts = {(round(t.get_position()[1]), round(t.get_position()[0])): t.get_text() for t in figure.axes[0].texts}
    assert bool(texts) == (classes <= 12)
    assert all(text == f"{expected[position]:.0f}" for position, text in texts.items())
    assert not any(y == 1 for y, _ in texts)


def test_mistakes_show_class_prediction_and_probability(tmp_path):
    images = [np.random.default_rng(0).random((6, 8, 3)), np.zeros((4, 4))]
    mistakes = {"erm": [Mistake(UNUSUAL, "b" * 40, 0.876, image) for image in images], "none": []}
    figure = plot_mistakes(mistakes, tmp_path / "x.png")
    titles = [axis.get_title() for axis in figure.axes if axis.get_title()]
    assert len(titles) == 2 and titles[0].endswith(f"→ {'b' * 17}…, 88 %") and r"\$x_" in titles[0]
    np.testing.assert_array_equal(np.asarray(figure.axes[0].images[0].get_array()), images[0])
    assert "no mistakes" in [text.get_text() for axis in figure.axes for text in axis.texts]
    with pytest.raises(ValueError, match="mistakes is empty"):
        plot_mistakes({"erm": []}, tmp_path / "x.png")


@pytest.mark.parametrize("metric", ["accuracy", "nll"])
def test_map_of_lengths_shows_means_differences_and_the_best_method(tmp_path, metric):
    info = get_metric(metric)
    means = {"1x": {"erm": 0.5, "mixup": 0.6, "cutmix": 0.4}, "4x": {"erm": 0.7, "mixup": 0.5}, "16x": {"erm": np.nan}}
    differences = {
        "1x": {"mixup": Interval(0.1, 0.05, 0.2), "cutmix": Interval(-0.1, -0.3, 0.1)},
        "4x": {"mixup": Interval(-0.2, -0.3, -0.1)},
        "16x": {},
    }
    figure = plot_lengths(means, differences, tmp_path / "x.png", baseline="erm", info=info)
    (axis,) = figure.axes
    gains = np.asarray(axis.images[0].get_array().filled(np.nan))
    sign = 1 if metric == "accuracy" else -1  # a lower NLL is a gain
    np.testing.assert_allclose(gains, [[0, 0, 0], [0.1 * sign, -0.2 * sign, np.nan], [-0.1 * sign, np.nan, np.nan]])
    texts = {tuple(map(round, text.get_position())): text for text in axis.texts}
    assert texts[0, 1].get_text() == f"{info.format(0.6)}\n{info.format(0.1, sign=True)}"
    assert [texts[p].get_fontweight() for p in ((0, 1), (0, 2), (1, 1), (0, 0))] == ["bold", "normal", "bold", "normal"]
    frames = {(round(p.get_x() + 0.48), round(p.get_y() + 0.47)) for p in axis.patches}
    assert frames == ({(0, 1), (1, 0)} if metric == "accuracy" else {(0, 2), (1, 1)})
    assert [label.get_text() for label in axis.get_yticklabels()] == ["erm", "mixup", "cutmix"]
