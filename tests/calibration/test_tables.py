"""Tables on disk: read back, foreign and corrupt files, two writers, and folders that cannot be written."""

from __future__ import annotations

import json
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import shivelight as sl
from shivelight.adapter import routed_of
from shivelight.calibration import TableFile, Tables, cache_folder, setting_of, tables, usual_load
from shivelight.execution.latency_table import LatencyTable, TimeCurve
from shivelight.execution.pricing import Load

TABLE = LatencyTable(
    64,
    50.0,
    10.0,
    0.5,
    1.0,
    {"all": TimeCurve((16, 48), (8.0, 16.0), 24.0, {0.5: (0.7, 0.6)}, 32)},
    (("all", 1.0),),
    0.0,
)
SETTING = {"device": "a machine", "tokens": 64}
LOAD = Load(64, 7, 1, "single")


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SHIVELIGHT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_the_folder_is_where_caches_go(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert cache_folder() == tmp_path / "cache"
    monkeypatch.delenv("SHIVELIGHT_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "xdg/shivelight"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == Path.home() / ".cache/shivelight"


def test_what_was_written_is_read_and_nothing_else_is_left(folder: Path) -> None:
    file = TableFile(SETTING)
    assert file.read() == {}
    file.write({7: TABLE})
    assert TableFile(SETTING).read() == {7: TABLE}
    assert [path.name for path in (folder / "latency").iterdir()] == [file.path.name]
    assert TableFile(SETTING | {"device": "another"}).path != file.path


@pytest.mark.parametrize("broken", ["", "{", "[]", "null", '{"setting": 1}', '{"tables": {}}', "binary"])
def test_a_corrupt_file_counts_as_none_with_a_line(broken: str) -> None:
    file = TableFile(SETTING)
    file.write({7: TABLE})
    file.path.write_bytes(b"\xff\xfe\x00" if broken == "binary" else broken.encode())
    with pytest.warns(UserWarning, match="cannot be used .* measured anew"):
        assert file.read() == {}
    file.write({7: TABLE})
    assert file.read() == {7: TABLE}


def test_a_table_with_impossible_times_is_measured_anew() -> None:
    file = TableFile(SETTING)
    file.write({7: TABLE})
    data = json.loads(file.path.read_text())
    data["tables"]["7"]["dense_ms"] = -3.0
    file.path.write_text(json.dumps(data))
    with pytest.warns(UserWarning, match="not a latency table"):
        assert file.read() == {}


def test_a_file_of_another_machine_is_not_believed() -> None:
    theirs, ours = TableFile(SETTING | {"device": "theirs"}), TableFile(SETTING)
    theirs.write({7: TABLE})
    theirs.path.rename(ours.path)
    with pytest.warns(UserWarning, match="another machine"):
        assert ours.read() == {}


def test_writers_at_once_leave_one_whole_file(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Threads in the place of processes: each has an id of its own.
    monkeypatch.setattr("shivelight.files.os.getpid", threading.get_ident)
    whole = [{count: TABLE for count in range(start, start + 40)} for start in (0, 1000)]
    TableFile(SETTING).write(whole[0])
    failures: list[object] = []

    def write(mine: dict[int, LatencyTable]) -> None:
        for _ in range(10):
            try:
                TableFile(SETTING).write(mine)
                if TableFile(SETTING).read() not in whole:
                    failures.append("half a file")
            except BaseException as error:
                failures.append(error)

    writers = [threading.Thread(target=write, args=(mine,)) for mine in whole]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert not failures
    assert not [path for path in folder.rglob("*.part*")]


def test_an_interrupted_write_leaves_the_earlier_file(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = TableFile(SETTING)
    file.write({7: TABLE})

    def interrupted(path: Path, text: str, **options: object) -> None:
        path.write_bytes(text[:100].encode())
        raise KeyboardInterrupt

    with monkeypatch.context() as broken:
        broken.setattr(Path, "write_text", interrupted)
        with pytest.raises(KeyboardInterrupt):
            file.write({8: TABLE})
    assert file.read() == {7: TABLE}
    assert len(list((folder / "latency").iterdir())) == 1


def test_a_folder_that_cannot_be_written_is_said(folder: Path) -> None:
    folder.write_text("a file where the folder should be")
    file = TableFile(SETTING)
    with pytest.warns(UserWarning, match="SHIVELIGHT_CACHE"):
        file.write({7: TABLE})


def test_a_table_is_measured_once_and_again_for_other_work(pipe, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: ANN001
    sl.attach(pipe)
    routed, measured = routed_of(pipe), []

    def measure(backbone, routed, load, seconds, progress) -> LatencyTable:  # noqa: ANN001
        measured.append(load)
        return TABLE

    monkeypatch.setattr(tables, "measure_table", measure)
    source = Tables(lambda: pipe.transformer, routed)
    assert source(LOAD, False) is None and not measured
    assert source(LOAD, True) == TABLE and source(LOAD, True) == TABLE and len(measured) == 1
    again = Tables(lambda: pipe.transformer, routed)
    assert again(LOAD, False) == TABLE, "another process finds it on disk"
    assert again(replace(LOAD, text_tokens=8), False) == TABLE, "a prompt of one token more"
    for other in (replace(LOAD, text_tokens=16), replace(LOAD, tokens=128), replace(LOAD, samples=2)):
        assert again(other, False) is None
    pipe.transformer.to(torch.bfloat16)
    assert again(LOAD, False) is None
    pipe.transformer.to(torch.float32)
    assert again(LOAD, True, anew=True) == TABLE and len(measured) == 2


def test_a_setting_says_what_times_depend_on(pipe) -> None:  # noqa: ANN001
    sl.attach(pipe)
    routed = routed_of(pipe)
    setting = setting_of(pipe.transformer, routed, LOAD)
    assert setting["backbone"] == "SD3Transformer2DModel" and setting["dtype"] == "float32"
    assert setting["compiled"] == "eager" and setting["device"]
    sl.set_budget(pipe, keep=0.5)
    assert setting_of(pipe.transformer, routed, LOAD) == setting, "a budget is no part of it"
    sl.attach(pipe, sl.RoutingConfig.training_free())
    assert setting_of(pipe.transformer, routed_of(pipe), LOAD) != setting
    sl.attach(pipe)
    pipe.transformer.transformer_blocks[1].ff.net[2] = torch.nn.Linear(128, 32, bias=False)
    assert setting_of(pipe.transformer, routed_of(pipe), LOAD) != setting


def test_the_usual_load_is_the_last_one_or_a_guided_picture(pipe, sample) -> None:  # noqa: ANN001
    sl.attach(pipe)
    routed = routed_of(pipe)
    assert usual_load(routed) == Load(64, routed.shape[1], 2, "both")
    assert usual_load(routed, guided=False).samples == 1
    sample(pipe, ["a", "b"], guidance_scale=0.0)
    assert usual_load(routed) == Load(64, 32, 2, "single")
    assert usual_load(routed, samples=3, guided=True) == Load(64, 32, 6, "both")
    assert usual_load(routed_of(sl.attach(pipe.transformer))).branch == "single"
