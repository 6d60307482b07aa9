"""The picture of a run, and the history it is drawn from."""

import math
import struct
import sys
from pathlib import Path

import matplotlib
import pytest
from matplotlib import pyplot

from lightning_compress.errors import MissingExtraError
from lightning_compress.report.plot import History, plot_run
from lightning_compress.report.statistics import LayerStatistics


def _layers(n_layers: int) -> list[LayerStatistics]:
    return [LayerStatistics(f"features.{i}.conv", "Conv2d", (4, 4, 3, 3), 144, 29, bits=8) for i in range(n_layers)]


def _history(n_steps: int) -> History:
    history = History()
    for step in range(n_steps):
        phase = min(3, 4 * step // n_steps)
        history.append(step, train_loss=1 / (step + 1), distillation_loss=2.0, sparsity=step / n_steps, phase=phase)
    history.append(n_steps, **{"val/accuracy": 0.9})
    return history


def _png_size(path: Path) -> tuple[int, int]:
    header = path.read_bytes()[:24]
    assert header[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", header[16:24])
    return width, height


def test_a_short_history_keeps_every_point() -> None:
    history = History(max_points=4)
    for step in (0, 10, 20):
        history.append(step, sparsity=step / 20)
    assert history.series("sparsity") == [(0, 0.0), (10, 0.5), (20, 1.0)]


@pytest.mark.parametrize("n_steps", [1, 2, 1999, 2000, 2001, 3999, 4000, 12_345])
def test_thinning_keeps_the_first_and_the_last_point_and_few_between(n_steps: int) -> None:
    history = History()
    for step in range(n_steps):
        history.append(step, train_loss=float(step))
    steps = [step for step, _ in history.series("train_loss")]
    assert (steps[0], steps[-1]) == (0, n_steps - 1)
    assert min(n_steps, 1000) <= len(steps) <= 2000
    assert len(set(steps)) == len(steps)


def test_thinning_is_even() -> None:
    history = History(max_points=8)
    for step in range(33):
        history.append(step, train_loss=0.0)
    assert [step for step, _ in history.series("train_loss")] == [0, 8, 16, 24, 32]


def test_a_rare_series_loses_nothing_to_a_frequent_one() -> None:
    history = History(max_points=8)
    for step in range(1000):
        history.append(step, train_loss=0.0, accuracy=None if step % 250 else float(step))
    assert [step for step, _ in history.series("accuracy")] == [0, 250, 500, 750]
    assert history.names() == ["train_loss", "accuracy"]


@pytest.mark.parametrize("cut", [0, 1, 13, 16, 50])
def test_a_resumed_history_equals_the_uninterrupted_one(cut: int) -> None:
    whole, before, after = (History(max_points=8) for _ in range(3))
    for step in range(cut):
        before.append(step, train_loss=float(step))
    after.load_state_dict(before.state_dict())
    for step in range(cut, 60):
        after.append(step, train_loss=float(step))
    for step in range(60):
        whole.append(step, train_loss=float(step))
    assert after == whole


def test_a_loaded_history_shares_nothing_with_its_source() -> None:
    source, copy = History(), History()
    source.append(0, sparsity=0.1)
    copy.load_state_dict(source.state_dict())
    copy.append(1, sparsity=0.2)
    assert source.series("sparsity") == [(0, 0.1)]


def test_too_few_points_are_refused() -> None:
    with pytest.raises(ValueError, match=r"^`max_points` must be at least 2, got 1\.$"):
        History(max_points=1)


@pytest.mark.parametrize(("n_steps", "n_layers"), [(1, 1), (200, 5), (10, 60), (10, 200)])
def test_the_picture_is_a_png_of_1200_by_900_pixels(tmp_path: Path, n_steps: int, n_layers: int) -> None:
    plot_run(_history(n_steps), _layers(n_layers), tmp_path / "new" / "run.png", "A run with $ and _ in its title")
    assert _png_size(tmp_path / "new" / "run.png") == (1200, 900)
    assert [file.name for file in (tmp_path / "new").iterdir()] == ["run.png"]


def test_a_run_without_anything_still_gives_a_picture(tmp_path: Path) -> None:
    plot_run(History(), [], tmp_path / "run.png", "")
    assert _png_size(tmp_path / "run.png") == (1200, 900)


def test_gaps_are_drawn_as_gaps(tmp_path: Path) -> None:
    history = History()
    for step in range(100):
        history.append(step, train_loss=math.nan if 40 < step < 60 else 1.0, phase=math.nan, accuracy=math.inf)
    plot_run(history, _layers(2), tmp_path / "run.png", "gaps")
    assert _png_size(tmp_path / "run.png") == (1200, 900)


def test_sparsity_and_phases_change_the_picture(tmp_path: Path) -> None:
    pictures = []
    for phase, sparsity in ((0, 0.0), (2, 0.0), (0, 0.5)):
        history = History()
        for step in range(10):
            history.append(step, sparsity=sparsity, phase=phase)
        plot_run(history, _layers(2), tmp_path / "run.png", "same title")
        pictures.append((tmp_path / "run.png").read_bytes())
    assert len(set(pictures)) == 3


def test_drawing_touches_neither_pyplot_nor_the_settings_of_the_user(tmp_path: Path) -> None:
    figure_of_the_user = pyplot.figure()
    with matplotlib.rc_context({"lines.linewidth": 7.5}):
        before = dict(dict.items(matplotlib.rcParams))  # as stored: reading the backend by name would choose one
        plot_run(_history(10), _layers(2), tmp_path / "run.png", "title")
        assert dict(dict.items(matplotlib.rcParams)) == before
    assert pyplot.get_fignums() == [figure_of_the_user.number]
    assert pyplot.gcf() is figure_of_the_user
    assert figure_of_the_user.axes == []
    pyplot.close(figure_of_the_user)


def test_the_settings_of_the_user_do_not_change_the_picture(tmp_path: Path) -> None:
    plot_run(_history(10), _layers(2), tmp_path / "plain.png", "title")
    with matplotlib.rc_context({"lines.linewidth": 7.5, "font.size": 30, "savefig.dpi": 10}):
        plot_run(_history(10), _layers(2), tmp_path / "styled.png", "title")
    assert (tmp_path / "plain.png").read_bytes() == (tmp_path / "styled.png").read_bytes()


def test_a_missing_matplotlib_is_one_sentence_with_the_install_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MissingExtraError, match=r"not installed") as caught:
        plot_run(History(), [], tmp_path / "run.png", "title")
    assert str(caught.value) == (
        "Drawing a run needs matplotlib, which is not installed. "
        'Install it with `pip install "lightning_compress[plots]"`.'
    )
    assert list(tmp_path.iterdir()) == []
