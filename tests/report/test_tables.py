import pytest

from shivelight.report.tables import cards, equal_latency, equal_latency_table, quality_metrics, results_table


def column(table, title):
    index = [head for head, _ in table.heads].index(title)
    return {row["method"] + str(row["budget"].get("keep", "")): cells[index] for row, cells in table.rows}


def test_every_row_is_there_dense_first_then_fewer_steps_then_ours(results):
    methods = [row["method"] for row, _ in results_table(results).rows]
    assert methods == ["dense", "fewer-steps", "fewer-steps", "tokens", "tokens", "random", "cache-dit"]


def test_what_was_not_measured_is_empty_and_unmeasured_columns_are_left_out(results):
    table = results_table(results)
    heads = [head for head, _ in table.heads]
    assert "FD-EffLite0" not in heads and "SSIM to dense" not in heads and "Peak memory" not in heads
    assert column(table, "KID-EffLite0 x1000")["cache-dit"].text == ""
    assert column(table, "PSNR to dense")["dense"].text == ""


def test_cells_carry_their_spread(results):
    table = results_table(results)
    cell = column(table, "PSNR to dense")["tokens0.6"]
    assert (cell.text, cell.spread) == ("22.0", "[21.5, 22.5]")
    results["rows"][2]["ci95"]["kid"] = [0.0184, 0.0216]
    cell = column(results_table(results), "KID-EffLite0 x1000")["tokens0.8"]
    assert (cell.text, cell.spread) == ("20.0", "[18.4, 21.6]")
    cell = column(table, "FLOPs of dense")["tokens0.6"]
    assert (cell.text, cell.spread) == ("0.600", "0.610")
    cell = column(table, "Latency, ms")["tokens0.6"]
    assert (cell.text, cell.spread) == ("560", "532 to 616")
    assert column(table, "Speed-up")["tokens0.6"].text == "1.43x"  # the first of the two: the backbone


def test_distances_are_named_after_their_network(results):
    assert [metric.title for metric in quality_metrics(results)] == ["PSNR to dense", "KID-EffLite0 x1000"]
    assert quality_metrics(results | {"feature_network": "Inception"})[1].title == "KID-Inception x1000"


def test_agreement_has_its_columns_where_it_was_measured(results):
    results["rows"][1] |= {"caption_agreement": 71.26, "named": 0.96875}
    results["rows"][3] |= {
        "caption_agreement": 60.0,
        "agreement_to_dense": -11.26,
        "ci95": {"agreement_to_dense": [-14.0, -9.0]},
    }
    method = results["rows"][3]["method"] + str(results["rows"][3]["budget"].get("keep", ""))
    table = results_table(results)
    assert column(table, "Caption agreement")["dense"].text == "71.3"
    assert column(table, "Concept named")["dense"].text == "96.9"
    cell = column(table, "Caption agreement less dense's")[method]
    assert (cell.text, cell.spread) == ("-11.3", "[-14.0, -9.0]")


def test_equal_latency_interpolates_fewer_steps_and_says_who_is_ahead(results):
    found = {(item.row["budget"]["keep"], item.metric.key): item for item in equal_latency(results)}
    at_06 = found[0.6, "psnr_to_dense"]
    assert at_06.fewer_steps == pytest.approx(26.0)
    assert at_06.verdict == "fewer steps by 4.0 dB"
    # PSNR of fewer steps ends at 640 ms; the dense model closes the curve of KID but has no PSNR to itself.
    assert found[0.8, "psnr_to_dense"].fewer_steps is None
    assert found[0.8, "kid"].fewer_steps == pytest.approx(0.012 - 0.002 * 60 / 160)
    assert found[0.8, "kid"].verdict.startswith("fewer steps by")

    results["rows"][2]["kid"] = 0.00105
    better = next(item for item in equal_latency(results) if item.metric.key == "kid")
    assert better.verdict == "routing by 10.2"


def test_equal_latency_table_has_a_row_for_each_of_ours(results):
    table = equal_latency_table(results)
    assert [row["budget"]["keep"] for row, _ in table.rows] == [0.8, 0.6]
    assert table.rows[1][1][0].text == "22.0 against 26.0 dB"
    assert table.rows[0][1][0].spread == "no step count near this latency"
    results["rows"] = [row for row in results["rows"] if row["method"] != "fewer-steps"]
    assert equal_latency(results) == [] and equal_latency_table(results) is None


def test_cards_put_fewer_steps_beside_our_figure(results):
    made = cards(results)
    assert [card.title for card in made] == ["tokens keep 0.8", "tokens keep 0.6"]
    assert made[1].speedup == "1.43x"
    assert "PSNR to dense 22.0 dB (fewer steps in the same time: 26.0 dB)" in made[1].lines


def test_too_many_cards_leave_the_best(results):
    ours = [dict(row) for row in results["rows"] if row["method"] == "tokens"]
    best = ours[0] | {"method": "training-free-blocks", "psnr_to_dense": 50.0, "speedup": 1.5}
    slow = ours[0] | {"method": "tokens+reuse", "psnr_to_dense": 60.0, "speedup": 0.9}
    results["rows"] += [slow, best]
    assert [card.title.split()[0] for card in cards(results, most=3)] == ["training-free-blocks", "tokens", "tokens"]
    assert len(cards(results, most=4)) == 4
