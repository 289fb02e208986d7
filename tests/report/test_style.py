import pytest

from shivelight.report.style import budget_label, count, is_ours, method_styles, row_label


def test_methods_differ_in_colour_or_marker_and_keep_their_look():
    methods = ["dense", "fewer-steps", "fewer-steps-placed", "tokens", "random", "norm", "fixed", "cache-dit", "dydit"]
    styles = method_styles(methods)
    assert len({(style.colour, style.marker) for style in styles.values()}) == len(methods)
    assert method_styles(["tokens"])["tokens"] == styles["tokens"]


def test_reuse_is_the_same_method_on_a_dotted_line():
    styles = method_styles(["tokens", "tokens+reuse"])
    assert styles["tokens+reuse"].colour == styles["tokens"].colour
    assert styles["tokens+reuse"].line == ":" != styles["tokens"].line
    assert is_ours("tokens+blocks+reuse") and not is_ours("fixed") and not is_ours("dense")


@pytest.mark.parametrize(
    ("row", "label"),
    [
        ({"method": "tokens", "budget": {"keep": 0.6}}, "tokens keep 0.6"),
        ({"method": "fewer-steps", "budget": {}, "steps": 15}, "fewer-steps 15 steps"),
        ({"method": "fewer-steps-placed", "budget": {}, "steps": 2}, "fewer-steps-placed 2 steps"),
        ({"method": "dense", "budget": {}}, "dense"),
    ],
)
def test_labels(row, label):
    assert row_label(row) == label
    assert label.endswith(budget_label(row))


def test_counts_are_short():
    assert [count(number) for number in (12_345_678, 2.5e9, 1500, 12)] == ["12.3 M", "2.5 G", "1.5 k", "12"]
