import numpy as np
import pytest
from PIL import Image

from shivelight.report import plots
from shivelight.report.tables import quality_metrics


def drawn(figure) -> dict[str, tuple[list[float], list[float]]]:
    lines = figure.axes[0].get_lines()
    return {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in lines}


def test_the_fewer_steps_curve_is_in_every_quality_plot(results):
    for metric in quality_metrics(results):
        curves = drawn(plots.quality_latency(results, metric))
        assert curves["fewer-steps"][0] == [480.0, 640.0]
        assert curves["tokens"][0] == [560.0, 700.0]
        assert {"random"} <= curves.keys()
    assert curves["tokens"][1] == [20.0, 20.0]


def test_axes_name_unit_and_direction(results):
    psnr, kid = (plots.quality_latency(results, metric).axes[0] for metric in quality_metrics(results))
    assert "dB" in psnr.get_ylabel() and "up is better" in psnr.get_ylabel()
    assert "down is better" in kid.get_ylabel() and "KID-EffLite0 x1000" in kid.get_ylabel()
    assert "ms" in psnr.get_xlabel()


def test_bars_are_the_intervals(results):
    axes = plots.quality_latency(results, quality_metrics(results)[0]).axes[0]
    segments = [segment.tolist() for collection in axes.collections for segment in collection.get_segments()]
    assert [[560.0, 21.5], [560.0, 22.5]] in segments
    assert [[532.0, 22.0], [pytest.approx(616.0), 22.0]] in segments


def test_rows_of_other_step_counts_are_other_lines(results):
    row = dict(results["rows"][2], steps=8, latency_ms={"median": 200.0, "p10": 190.0, "p90": 220.0, "runs": 5})
    results["rows"].append(row)
    assert {"tokens, 25 steps", "tokens, 8 steps", "fewer-steps"} <= drawn(
        plots.quality_latency(results, quality_metrics(results)[0])
    ).keys()


def test_no_points_no_plot(results):
    metric = quality_metrics(results)[0]
    for row in results["rows"]:
        row.pop("latency_ms")
        row.pop("planned_ratio", None)
    assert plots.quality_latency(results, metric) is None
    assert plots.speedup_against_plan(results) is None
    assert plots.training_curve([{"step": 1, "rate": 0.1}]) is None


def test_speedup_is_drawn_against_what_the_plan_promises(results):
    curves = drawn(plots.speedup_against_plan(results))
    promised = np.array(curves["promised: 1 / planned"])
    assert np.allclose(promised[0] * promised[1], 1)
    assert curves["tokens"] == ([0.6, 0.8], [pytest.approx(800 / 560), pytest.approx(800 / 700)])


def test_the_heat_map_is_block_by_step_on_the_whole_scale():
    schedule = np.linspace(0.3, 0.9, 25 * 7).reshape(25, 7)
    figure = plots.schedule_heat_map(schedule, blocks=list(range(1, 8)))
    top, axes = figure.axes[:2]
    image = axes.get_images()[0]
    assert np.array_equal(image.get_array(), schedule.T)
    assert image.get_clim() == (0, 1)
    assert [label.get_text() for label in axes.get_yticklabels()] == list("1234567")
    assert np.allclose(top.get_lines()[0].get_ydata(), schedule.mean(axis=1))


def test_rejected_tokens_are_dark_and_kept_ones_untouched():
    white = Image.new("RGB", (32, 32), "white")
    kept = np.array([[1.0, 0.0], [0.5, 1.0]])
    pixels = np.asarray(plots.shade_rejected(white, kept, size=64)).astype(int)
    assert (pixels[:32, :32] == 255).all() and (pixels[32:, 32:] == 255).all()
    rejected, half = pixels[5, 50], pixels[50, 5]
    assert (rejected < 90).all() and (rejected < half).all() and (half < 230).all()


def test_token_maps_show_all_blocks_then_single_ones_over_the_steps():
    image = Image.new("RGB", (32, 32), "white")
    kept = np.ones((25, 7, 4, 4), dtype=bool)
    kept[24, 0] = False
    figure = plots.token_maps(image, kept, blocks=list(range(1, 8)))
    assert len(figure.axes) == 4 * 7
    assert [figure.axes[column].get_title() for column in (0, 6)] == ["step 0", "step 24"]
    assert [figure.axes[7 * line].get_ylabel() for line in range(4)] == ["all blocks", "block 1", "block 4", "block 7"]
    last = [np.asarray(figure.axes[7 * line + 6].get_images()[0].get_array()).mean() for line in range(4)]
    assert last[1] < last[0] < last[2] == last[3] == 255


@pytest.mark.parametrize(
    ("count", "most", "expected"), [(25, 7, [0, 4, 8, 12, 16, 20, 24]), (2, 7, [0, 1]), (1, 3, [0])]
)
def test_evenly_spaced_keeps_both_ends(count, most, expected):
    assert plots.evenly_spaced(count, most) == expected


def test_the_training_curve_shows_losses_on_a_log_axis_and_the_keep_ratio():
    losses = [{"step": step, "loss": 1.0 / step, "mean_keep": 0.6} for step in range(1, 30)]
    figure = plots.training_curve(losses)
    assert drawn(figure)["loss"][1] == [1.0 / step for step in range(1, 30)]
    assert figure.axes[0].get_yscale() == "log"
    assert figure.axes[1].get_ylabel() == "mean keep"
    losses[3]["loss"] = -1.0
    assert plots.training_curve(losses).axes[0].get_yscale() == "linear"


def test_smoothing_keeps_a_constant_and_its_length():
    assert np.allclose(plots._smooth(np.full(200, 3.0)), 3.0)
    ramp = plots._smooth(np.arange(200.0))
    assert len(ramp) == 200 and np.allclose(ramp[10:-10], np.arange(200.0)[10:-10])
