import base64
import io
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from shivelight.errors import DataError
from shivelight.report import ReportFigures, build_report

VOID = {"meta", "img", "br", "link", "input", "hr"}


class Page(HTMLParser):
    """Collects what the page loads, and checks that its elements are nested properly."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.sources, self.links, self.open, self.tags = [], [], [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        values = dict(attributes)
        self.tags.append(tag)
        if tag == "img":
            assert values["alt"]
            self.sources.append(values["src"])
        self.links += [values[name] for name in ("href", "srcset", "data") if name in values]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def picture(seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (16, 16, 3), dtype=np.uint8))


@pytest.fixture
def figures() -> ReportFigures:
    generator = np.random.default_rng(0)
    return ReportFigures(
        grids={"dense": [picture(0), picture(1)], "tokens keep 0.6": [picture(2), picture(3)]},
        captions=["red apple on <b>blue</b> stripes", "a fish"],
        schedule=generator.uniform(0.3, 1, (6, 5)),
        schedule_blocks=[1, 2, 3, 4, 5],
        token_maps=(picture(0), generator.random((6, 5, 4, 4)) > 0.5),
        losses=[{"step": step, "loss": 1.0 / (step + 1), "mean_keep": 0.6} for step in range(5)],
    )


def test_the_page_is_one_file_with_every_part(tmp_path, results, figures):
    out = build_report([results], figures, tmp_path / "report.html")
    text = out.read_text()
    page = Page(text)
    assert out == tmp_path / "report.html" and list(tmp_path.iterdir()) == [out]
    assert page.links == [] and {"script", "link", "iframe"}.isdisjoint(page.tags)
    assert all(source.startswith("data:image/") for source in page.sources)
    assert not re.search(r"url\(|@import", text)
    for heading in (
        "Quality and speed",
        "All figures",
        "Against fewer steps",
        "Side by side",
        "Where it computed",
        "The schedule",
        "Training",
    ):
        assert heading in text
    # 4 examples, 2 quality plots and the speed-up, token maps, schedule, training
    assert len(page.sources) == 4 + 3 + 3
    assert "KID-EffLite0" in text and "FID-" not in text


def test_the_examples_are_the_images_bit_for_bit(tmp_path, results, figures):
    page = Page(build_report([results], figures, tmp_path / "r.html").read_text())
    webp = [source for source in page.sources if source.startswith("data:image/webp")]
    decoded = [Image.open(io.BytesIO(base64.b64decode(source.split(",")[1]))).convert("RGB") for source in webp]
    expected = [picture(0), picture(2), picture(1), picture(3)]  # caption by caption: dense, then routed
    assert [np.asarray(image).tolist() for image in decoded] == [np.asarray(image).tolist() for image in expected]


def test_text_from_outside_is_escaped(tmp_path, results, figures):
    text = build_report([results], figures, tmp_path / "r.html").read_text()
    assert "<b>blue</b>" not in text and "&lt;b&gt;blue&lt;/b&gt;" in text
    assert "<pipeline>" not in text and "&lt;pipeline&gt;" in text


def test_without_fewer_steps_the_page_says_so(tmp_path, results):
    notice = "Fewer sampling steps were not measured"
    assert notice not in build_report([results], ReportFigures(), tmp_path / "a.html").read_text()
    results["rows"] = [row for row in results["rows"] if row["method"] != "fewer-steps"]
    assert notice in build_report([results], ReportFigures(), tmp_path / "b.html").read_text()


def test_parts_that_are_absent_leave_no_trace(tmp_path, results):
    results["rows"] = [{"method": "dense", "budget": {}}]
    text = build_report([results], ReportFigures(), tmp_path / "r.html").read_text()
    assert Page(text).sources == []
    for heading in ("Quality and speed", "Side by side", "Where it computed", "The schedule", "Training", "KID and FD"):
        assert heading not in text


def test_several_runs_have_their_own_tables_and_no_shared_plot(tmp_path, results):
    other = results | {
        "command": "shivelight bench",
        "rows": [{"method": "dense", "budget": {}, "latency_ms": results["rows"][1]["latency_ms"]}],
    }
    text = build_report([results, other], ReportFigures(), tmp_path / "r.html").read_text()
    assert "Run 1 of 2" in text and "Run 2 of 2" in text
    assert text.count("<h2>All figures</h2>") == 2
    assert text.count("Quality and speed") == 1


def test_the_same_input_gives_the_same_bytes(tmp_path, results, figures):
    first = build_report([results], figures, tmp_path / "a.html").read_bytes()
    assert build_report([results], figures, tmp_path / "b.html").read_bytes() == first


def test_bad_input_is_named_and_nothing_written(tmp_path, results, figures):
    out = tmp_path / "report.html"
    with pytest.raises(DataError, match="one results object or more"):
        build_report([], figures, out)
    with pytest.raises(DataError, match="'tokens keep 0.6' has 1 images for 2 captions"):
        build_report(
            [results],
            ReportFigures(grids=figures.grids | {"tokens keep 0.6": [picture(2)]}, captions=figures.captions),
            out,
        )
    with pytest.raises(DataError, match=r"\[steps, blocks, H, W\], not \(5, 4, 4\)"):
        build_report([results], ReportFigures(token_maps=(picture(0), np.ones((5, 4, 4)))), out)
    with pytest.raises(DataError, match=r"\[steps, blocks\], not of shape \(5,\)"):
        build_report([results], ReportFigures(schedule=np.ones(5)), out)
    results["rows"][0]["kid"] = float("nan")
    with pytest.raises(DataError, match="nan"):
        build_report([results], figures, out)
    assert list(tmp_path.iterdir()) == []
