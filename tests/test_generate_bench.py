"""`mmi bench generate`: its cases, its comparison of all forms, its table, plot, JSON and exit code."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image
from tiny import tiny_model

from mmi_cli.main import main
from mmi_engine import generate_bench
from mmi_engine.generate_bench import Case, apart
from mmi_engine.pieces import Piece

SMALL = [
    Case("text", "images", "text", images=2, tokens=3),
    Case("batch", "batch", "image", steps=1, batch=2, items=2),
    Case("story", "frames", "story", steps=1, frames=2),
]


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generate_bench, "cases", lambda quick: SMALL)
    monkeypatch.setattr(generate_bench, "load", lambda name, device, threads: tiny_model(seed=4))


@pytest.mark.usefixtures("small")
def test_all_forms_of_every_case_are_measured(tmp_path, capsys) -> None:
    files = ["--out", str(tmp_path / "speed.json"), "--plot", str(tmp_path / "speed.png")]
    assert main(["bench", "generate", "--device", "cpu", "--quick", "--json", *files]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found == json.loads((tmp_path / "speed.json").read_text())
    assert (tmp_path / "speed.png").read_bytes()[:4] == b"\x89PNG"
    assert [(f["sweep"], f["value"], f["form"], f["unit"]) for f in found["figures"]] == [
        (sweep, 2, form, unit)
        for sweep, unit in (("text", "tokens"), ("token", "tokens"), ("batch", "items"), ("story", "items"))
        for form in ("kept", "again", "literal")
    ]
    for figure in found["figures"]:
        amount = {"text": 3, "token": 2, "batch": 2, "story": 1}[figure["sweep"]]
        assert figure["per_second"] * figure["seconds"] == pytest.approx(amount)
        assert sum(figure["stages"].values()) == pytest.approx(1) and min(figure["stages"].values()) >= 0
        used = {"text": {"encode", "read", "text", "rest"}, "token": {"text"}}
        assert set(figure["stages"]) == used.get(figure["sweep"], {"encode", "read", "denoise", "decode", "rest"})
    assert found["complete"] and not found["troubles"]
    assert found["machine"]["versions"]["mmi"] and found["peak_bytes"] > 2**20


@pytest.mark.usefixtures("small")
def test_different_results_are_reported_and_the_exit_code_tells(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setattr(generate_bench, "apart", lambda kept, again: "another text: 'a' and 'b'")
    assert main(["bench", "generate", "--device", "cpu", "--quick"]) == 1
    shown = capsys.readouterr()
    assert "story, 2 frames: literal: another text" in shown.err and "text" in shown.out.splitlines()[2]


@pytest.mark.usefixtures("small")
def test_what_was_measured_before_a_kill_is_in_the_file(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second case is stopped; the first is there whole, and nothing but the file."""
    once = generate_bench.once

    def stop(model, case, *rest):
        if case == SMALL[1]:
            raise KeyboardInterrupt
        return once(model, case, *rest)

    monkeypatch.setattr(generate_bench, "once", stop)
    out = tmp_path / "speed.json"
    assert main(["bench", "generate", "--device", "cpu", "--quick", "--out", str(out)]) == 130
    found = json.loads(out.read_text())
    assert found["complete"] is False and list(tmp_path.iterdir()) == [out]
    assert [(f["sweep"], f["form"]) for f in found["figures"]] == [
        (sweep, form) for sweep in ("text", "token") for form in ("kept", "again", "literal")
    ]


def test_cases_are_chosen_by_the_names_of_their_figures() -> None:
    shipped = generate_bench.cases(quick=True)
    assert generate_bench.choose(shipped, "") == shipped
    assert {case.sweep for case in generate_bench.choose(shipped, "story, token")} == {"story", "text"}
    assert {case.sweep for case in generate_bench.choose(shipped, "tokens of eight")} == {"texts"}


def test_a_case_that_does_not_exist_or_a_file_that_cannot_be_written(tmp_path, small, capsys) -> None:
    assert main(["bench", "generate", "--only", "story,stroy"]) == 2
    shown = capsys.readouterr().err
    assert "'stroy'" in shown and "text, batch, story, token" in shown
    nowhere = str(tmp_path / "none" / "speed.json")
    assert main(["bench", "generate", "--device", "cpu", "--only", "text", "--out", nowhere]) == 1
    assert "the figures cannot be written" in capsys.readouterr().err


def test_what_counts_as_the_same() -> None:
    grey, near, far = (Piece("image", Image.new("RGB", (4, 4), (level,) * 3)) for level in (100, 101, 110))
    assert not apart([Piece("text", "a"), grey], [Piece("text", "a"), near])
    assert "10 of 255" in apart([grey], [far])
    assert "'a' and 'b'" in apart([Piece("text", "a")], [Piece("text", "b")])
    speck = np.full((4, 4, 3), 100, np.uint8)
    speck[3, 3, 2] = 90
    assert apart([grey], [Piece("image", Image.fromarray(speck))])


def test_ratios_are_times_over_kept() -> None:
    where = {"sweep": "text", "x": "images", "value": 4, "unit": "tokens", "stages": {"text": 0.9, "rest": 0.1}}
    figures = [
        {**where, "form": "kept", "seconds": 2.0, "per_second": 5.0},
        {**where, "form": "again", "seconds": 6.0, "per_second": 5 / 3},
        {**where, "form": "literal", "seconds": 8.0, "per_second": 5 / 4},
    ]
    row = generate_bench.table(figures)[1]
    assert row == ("text", "images", "4", "5", "1.67 (3.00×)", "1.25 (4.00×)", "tokens", "text 90%, rest 10%")


def test_shipped_cases_are_distinct_and_of_the_promised_points() -> None:
    for quick in (True, False):
        found = generate_bench.cases(quick)
        points = {(case.sweep, case.x, getattr(case, case.x)) for case in found}
        assert len(points) == len(found)
        for sweep in ("text", "picture"):
            assert {(sweep, "images", n) for n in (1, 4, 8)} <= points
        assert {(sweep, "batch", n) for sweep in ("batch", "answers") for n in (1, 8)} <= points
