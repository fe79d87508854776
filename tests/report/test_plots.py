"""The pictures of a run: real PNG files, every series shown as logged, nothing drawn over anything else."""

import math
import subprocess
import sys

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.image import imread

from gkd.evaluation.measures import Estimate, Measures, difference_estimate, mean_estimate
from gkd.report.comparison import as_dict
from gkd.report.plots import (
    COLOURS,
    plot_entropy,
    plot_evaluation,
    plot_lengths,
    plot_loss,
    plot_positions,
    plot_schedules,
    running_mean,
    series,
    write_plots,
)


def history(steps: int) -> list[dict]:
    """What a trainer logs: training lines, an evaluation at the half, the closing summary."""
    lines = [
        {
            "step": step,
            "loss": 1.0 / step,
            "loss/student": 1.2 / step,
            "loss/data": 0.8 / step,
            "rollout/length_mean": 20.0 + step,
            "rollout/length_mean/student": 20.0 + step,
            "rollout/length_mean/teacher": 25.0,
            "rollout/length_max": 64.0,
            "rollout/truncated": 0.5 / step,
            "rollout/ended": 1 - 0.5 / step,
            "student/entropy": 2.0,
            "teacher/entropy": 1.5,
            "student/agreement": 0.5,
        }
        for step in range(1, steps + 1)
    ]
    lines.insert(steps // 2, {"step": steps // 2, "eval_loss": 0.4, "epoch": 0.5})
    return [*lines, {"step": steps, "train_loss": 0.3, "train_runtime": 12.0, "divergence_by_position": profile()}]


def profile() -> dict:
    """As `gkd.training.position_profile.PositionProfile.as_dict`: the student wrote up to 5 tokens, the data set's
    rows are longer."""
    starts = [1, 2, 3, 4, 6, 8]
    student, data = [40, 30, 20, 10, 3, 0], [40, 40, 40, 80, 60, 500]
    none = [[0] * len(starts)] * 3
    counts = {"data": [data, data, data], "student": [student, student, [0, *student[1:]]], "teacher": none}
    means = {"data": (0.2, 0.1, 0.1), "student": (0.4, 0.3, 0.2), "teacher": (0.0, 0.0, 0.0)}
    sums = {s: [[m * n for n in row] for m, row in zip(means[s], counts[s], strict=True)] for s in counts}
    return {"starts": starts, "sums": sums, "counts": counts}


def comparison(scale: float = 1.0) -> dict:
    def measures(name: str, factor: float) -> Measures:
        own, text = mean_estimate([0.9 * factor, 1.1 * factor]), mean_estimate([0.5 * factor, 0.7 * factor])
        values = {
            "divergence_own": own,
            "divergence_teacher_text": text,
            "exposure_gap": difference_estimate(text, own),  # negative bars
            "perplexity": mean_estimate([20 + 300 * factor, 30 + 200 * factor]),
            "ended": mean_estimate([1.0, 1.0 - 0.4 * factor]),
            "length": Estimate(math.nan, None, 2),
        }
        return Measures(name, values)

    return as_dict(measures("before", scale), measures("after", 0.4 * scale), measures("teacher", 0.0))


def lines_by_label(axes) -> dict:
    return {line.get_label(): list(line.get_xydata().tolist()) for line in axes.lines}


def test_series_takes_finite_numbers_in_the_order_of_steps():
    entries = [
        {"step": 3, "loss": 0.3},
        {"step": 1, "loss": 0.1},
        {"step": 2, "loss": math.nan},
        {"step": 4, "loss": "0.4"},
        {"step": 5},
        {"loss": 0.6},
        {"step": 1, "loss": 0.15},
    ]
    assert series(entries, "loss") == ([1, 3], [0.15, 0.3])
    assert series([], "loss") == ([], [])


def test_running_mean_keeps_length_and_a_constant():
    assert running_mean([1.0, 2.0, 3.0, 4.0], 3) == [1.5, 2.0, 3.0, 3.5]
    assert running_mean([7.0] * 9, 4) == [7.0] * 9


def test_loss_picture_shows_the_logged_points_and_leaves_out_what_was_not_logged():
    figure = plot_loss(history(5))
    (axes,) = figure.axes
    lines = lines_by_label(axes)
    assert set(lines) == {"all sources", "student-written", "data set", "evaluation, data set"}
    assert lines["student-written"] == [[step, 1.2 / step] for step in range(1, 6)]
    assert lines["evaluation, data set"] == [[2, 0.4]]
    assert axes.get_xlabel() == "optimizer step"
    assert "nats" in axes.get_ylabel()


@pytest.mark.parametrize("values", [[0.0, 0.0], [3.7, 3.7], [0.1, -0.02], [1e-6, 2e-6]])
def test_every_point_is_inside_the_axes(values):
    (axes,) = plot_loss([{"step": step, "loss": value} for step, value in enumerate(values, start=1)]).axes
    low, high = axes.get_ylim()
    assert low <= min(values)
    assert high > max(values)
    assert low <= 0  # a loss is judged by its distance from zero


def test_a_long_series_gets_a_running_mean_over_the_raw_line():
    (axes,) = plot_loss(history(200)).axes
    raw = [line for line in axes.lines if line.get_alpha() is not None]
    assert len(raw) == 3
    assert all(len(line.get_xdata()) == 200 for line in raw)


@pytest.mark.parametrize("plot", [plot_loss, plot_positions, plot_lengths, plot_entropy])
def test_nothing_logged_is_no_picture(plot):
    assert plot([]) is None
    assert plot([{"step": 1, "grad_norm": 1.0}, {"train_runtime": 3.0}]) is None


def test_a_panel_without_data_is_left_out():
    assert len(plot_lengths(history(4)).axes) == 2
    only = [{"step": 1, "rollout/ended": 0.5}]
    (axes,) = plot_lengths(only).axes
    assert "ended with a stop token" in lines_by_label(axes)


def test_fields_that_follow_a_schedule_are_drawn_and_no_others():
    lines = [{"step": n, "lmbda": n / 4, "lmbda_realised": n / 4, "max_new_tokens": 8.0 * n} for n in range(1, 5)]
    figure = plot_schedules(lines)
    assert [axes.get_title(loc="left") for axes in figure.axes] == [
        "Share of the student's sequences",
        "Most tokens of a rollout",
    ]
    assert [list(line.get_ydata()) for line in figure.axes[0].lines] == [[0.25, 0.5, 0.75, 1.0]] * 2
    assert plot_schedules([{"step": 1, "lmbda_realised": 0.5}]) is None


def test_a_writers_colour_means_that_writer_in_every_picture():
    for plot, panel in ((plot_loss, 0), (plot_lengths, 0), (plot_lengths, 1), (plot_entropy, 0)):
        for line in plot(history(4)).axes[panel].lines:
            for who in ("student", "teacher"):
                assert (line.get_color() == COLOURS[who]) == (who in line.get_label()), line.get_label()


def test_the_gap_of_two_entropies_fills_the_axis():
    logs = [{"step": step, "student/entropy": 4.9, "teacher/entropy": 5.0} for step in (1, 2)]
    low, high = plot_entropy(logs).axes[0].get_ylim()
    assert 4.8 < low < 4.9
    assert 5.0 < high < 5.1


def test_bars_are_the_measured_values_with_their_errors():
    table = comparison()
    figure = plot_evaluation(table)
    # length is NaN in all three and has no panel
    assert [axes.get_title().replace("\n", " ") for axes in figure.axes] == [
        "Divergence, own completions",
        "Divergence, teacher's completions",
        "Exposure gap (own − teacher's)",
        "Perplexity, held-out text",
        "Completions that end by themselves",
    ]
    perplexity, ended = figure.axes[3], figure.axes[4]
    assert [bar.get_height() for bar in perplexity.patches] == pytest.approx([275.0, 125.0, 25.0])
    assert [bar.get_height() for bar in ended.patches] == pytest.approx([80.0, 92.0, 100.0])
    assert ended.get_ylabel() == "%"
    row = next(row for row in table["rows"] if row["key"] == "perplexity")
    whiskers = perplexity.collections[0].get_segments()
    assert whiskers[0][1][1] - whiskers[0][0][1] == pytest.approx(2 * row["before"]["error"])


def test_positions_are_means_of_buckets_with_enough_targets_pale_for_the_first_third():
    (axes,) = plot_positions(history(3)).axes
    ends = [(1, 1), (2, 2), (3, 3), (4, 5), (6, 7), (8, 8)]
    centres = [math.sqrt(low * high) for low, high in ends]
    drawn = {(line.get_color(), line.get_alpha()): line.get_xydata().tolist() for line in axes.lines}
    flat = {key: [x for point in points for x in point] for key, points in drawn.items()}
    blue, orange = "#0072B2", "#D55E00"
    assert set(drawn) == {(blue, None), (blue, 0.35), (orange, None), (orange, 0.35)}  # the teacher wrote nothing
    assert flat[orange, 0.35] == pytest.approx([x for c in centres[:4] for x in (c, 0.4)])  # 3 targets are too few
    assert flat[orange, None] == pytest.approx([x for c in centres[1:4] for x in (c, 0.2)])
    assert flat[blue, None] == pytest.approx([x for c in centres for x in (c, 0.1)])
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["student-written", "data set"]
    assert "position" in axes.get_xlabel()


def overlaps(figure) -> list[tuple[str, str]]:
    """Pairs of texts (titles, tick labels, axis labels, legends, values on bars) whose boxes meet in the drawing."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    renderer = canvas.get_renderer()
    boxes = []
    for axes in figure.axes:
        texts = [axes.title, axes._left_title, axes._right_title, axes.xaxis.label, axes.yaxis.label, *axes.texts]
        texts.append(axes.yaxis.get_offset_text())
        low, high = sorted(axes.get_xlim())
        texts += [t for p, t in zip(axes.get_xticks(), axes.get_xticklabels(), strict=True) if low <= p <= high]
        if axes.get_legend() is not None:
            texts += axes.get_legend().get_texts()
        boxes += [(text.get_text(), text.get_window_extent(renderer)) for text in texts if text.get_text()]
    width, height = canvas.get_width_height()
    outside = [(name, "edge") for name, b in boxes if b.x0 < 0 or b.y0 < 0 or b.x1 > width or b.y1 > height]
    pairs = [(a, b) for i, (a, box) in enumerate(boxes) for b, other in boxes[i + 1 :] if box.overlaps(other)]
    return outside + pairs


@pytest.mark.parametrize("steps", [1, 12, 3000])
def test_no_text_covers_another_or_leaves_the_picture(steps):
    for plot in (plot_loss, plot_positions, plot_lengths, plot_entropy):
        assert overlaps(plot(history(steps))) == []


@pytest.mark.parametrize("scale", [1.0, 1e-4, 900.0])
def test_no_text_covers_another_in_the_bars(scale):
    assert overlaps(plot_evaluation(comparison(scale))) == []


def test_files_are_pictures_and_captioned(tmp_path):
    written = write_plots(history(5), tmp_path / "plots", comparison())
    names = ["loss.png", "positions.png", "lengths.png", "entropy.png", "evaluation.png"]
    assert [path.name for path, _ in written] == names
    for path, caption in written:
        picture = imread(path)
        assert picture.shape[0] > 300
        assert picture.std() > 0.02  # not an empty sheet
        assert caption
    assert write_plots([], tmp_path / "none") == []
    assert not (tmp_path / "none").exists()


def test_pyplot_is_never_loaded():
    code = (
        "import sys; from gkd.report.plots import write_plots; import tempfile;"
        "write_plots([{'step': 1, 'loss': 1.0}], tempfile.mkdtemp()); assert 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
