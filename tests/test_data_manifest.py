"""Manifest rows: hostile lines become coded errors and leave their neighbours alone; good ones match `jsonlines`."""

from __future__ import annotations

import io
import json

import jsonlines
import pytest

from mmi_engine.data import manifest as module
from mmi_engine.data.manifest import Manifest, item_seed, parse_row
from mmi_engine.errors import ManifestError


def rows_of(tmp_path, content: bytes):
    path = tmp_path / "m.jsonl"
    path.write_bytes(content)
    return list(Manifest(path).rows())


def test_good_lines_agree_with_the_jsonlines_package(tmp_path):
    content = '\ufeff{"id": "a", "t": "Grüße 😀"}\r\n\n   \n{"id": "b", "n": [1, null, {"x": 1e3}]}'.encode()
    rows = rows_of(tmp_path, content)
    with jsonlines.open(tmp_path / "m.jsonl") as reader:
        expected = list(reader.iter(skip_empty=True))
    assert [row.data for row in rows] == expected
    assert [row.line for row in rows] == [1, 4]


@pytest.mark.parametrize(
    ("line", "code"),
    [
        (b'{"id": "x"', "bad_json"),
        (b"nonsense", "bad_json"),
        (b'{"a": NaN}', "bad_json"),
        (b'{"a": ' + b"9" * 5000 + b"}", "bad_json"),
        (b"[" * 100_000, "bad_json"),
        (b'{"a": "\x00"}', "bad_json"),
        (b"\x00\x00\x00", "bad_json"),
        (b'{"a": "\xff\xfe"}', "bad_encoding"),
        (b'{"id": "\\ud83d"}', "bad_encoding"),
        (b"[1, 2]", "bad_row"),
        (b'"text"', "bad_row"),
        (b"null", "bad_row"),
        (b'{"id": 7}', "bad_id"),
        (b'{"id": ""}', "bad_id"),
        (b'{"custom_id": ["a"]}', "bad_id"),
        (b'{"id": "q", "seed": -1}', "bad_seed"),
        (b'{"id": "q", "seed": true}', "bad_seed"),
        (b'{"id": "q", "seed": 1.5}', "bad_seed"),
        (b'{"id": "q", "seed": 9223372036854775808}', "bad_seed"),
    ],
)
def test_a_broken_line_is_a_coded_error_and_its_neighbours_live(tmp_path, line, code):
    rows = rows_of(tmp_path, b'{"id": "before"}\n' + line + b'\n{"id": "after"}\n')
    assert [row.id for row in rows if row.error is None] == ["before", "after"]
    (broken,) = [row for row in rows if row.error is not None]
    assert (broken.line, broken.error.code) == (2, code)
    assert "\n" not in str(broken.error)


def test_an_endless_line_is_skipped_without_being_held(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "MAX_LINE_BYTES", 100)
    rows = rows_of(tmp_path, b'{"a": "' + b"x" * 1000 + b'"}\n{"id": "after"}')
    assert [row.error and row.error.code for row in rows] == ["line_too_long", None]
    assert rows[1].line == 2


def test_ids_default_to_the_line_number_and_the_first_of_equal_ids_wins(tmp_path):
    rows = rows_of(
        tmp_path,
        b'{}\n\n{"custom_id": "c"}\n{"id": "c"}\n{"id": "i", "custom_id": "j"}\n{"id": null}\n{"id": "000001"}',
    )
    assert [row.id for row in rows] == ["000001", "c", "c", "i", "000006", "000001"]
    assert [row.error.code if row.error else None for row in rows] == [
        None,
        None,
        "duplicate_id",
        None,
        None,
        "duplicate_id",
    ]


def test_stdin_can_be_read_twice_and_has_the_fingerprint_of_the_file(tmp_path):
    content = b'{"id": "a"}\n{"id": "b"}\n'
    path = tmp_path / "m.jsonl"
    path.write_bytes(content)
    piped = Manifest("-", stdin=io.BytesIO(content))
    assert [row.id for row in piped.rows()] == [row.id for row in piped.rows()] == ["a", "b"]
    assert piped.fingerprint() == Manifest(path).fingerprint()


@pytest.mark.parametrize("content", ["\ufeff{}".encode("utf-16-le"), "\ufeff{}".encode("utf-16-be")])
def test_a_utf16_manifest_is_refused_as_a_whole(tmp_path, content):
    with pytest.raises(ManifestError, match="UTF-8"):
        rows_of(tmp_path, content)


def test_unreadable_manifests_are_refused_with_exit_code_2(tmp_path):
    for path in (tmp_path / "missing.jsonl", tmp_path, tmp_path / "nul\0.jsonl"):
        with pytest.raises(ManifestError) as caught:
            Manifest(path)
        assert caught.value.exit_code == 2
    with pytest.raises(ManifestError, match="root"):
        (tmp_path / "m.jsonl").write_text("{}")
        Manifest(tmp_path / "m.jsonl", root=tmp_path / "nowhere")


def test_seeds_are_stable_distinct_and_survive_javascript():
    seeds = {item_seed(run, name) for run in range(20) for name in ("a", "b", "é", "")}
    assert len(seeds) == 80
    assert all(0 <= seed < 2**53 for seed in seeds)
    # computed by hand from the definition: first eight bytes of sha256("0:a"), shifted right by 11
    assert item_seed(0, "a") == int("".join(f"{byte:08b}" for byte in _sha256(b"0:a")[:8])[:53], 2)


def _sha256(content: bytes) -> bytes:
    import hashlib

    return hashlib.sha256(content).digest()


def test_parse_row_never_raises_on_random_bytes():
    import random

    rng = random.Random(0)
    pieces = [b'{"id":', b'"a"', b"}", b"[", b"\\u", b"\xff", b"\x00", b"1e999", b",", b'"', b"\\ud800", b" "]
    for _ in range(3000):
        raw = b"".join(rng.choices(pieces, k=rng.randrange(1, 12)))
        row = parse_row(1, raw)
        if row is not None and row.error is None:
            json.dumps(row.data, ensure_ascii=False).encode("utf-8")
