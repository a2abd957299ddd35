"""JSON files: damage shows, and every wrong entry is named."""

import json
from dataclasses import dataclass, field
from typing import Any, Literal

import pytest

from fastgpt import json_files
from fastgpt.errors import RequestError


@dataclass(frozen=True)
class Inner:
    width: int = 3
    depth: int = field(default=2, metadata={"later": True})


@dataclass(frozen=True)
class Outer:
    count: int
    name: str
    rate: float = 0.5
    bits: Literal[8, 32] = 32
    on: bool = True
    inner: Inner | None = None
    items: list[Inner] = field(default_factory=list)
    table: dict[str, int] = field(default_factory=dict)
    rest: Any = None

    def __post_init__(self) -> None:
        if self.count < 0:
            raise ValueError("count must not be negative")


GOOD = {"count": 1, "name": "é"}


def test_what_was_written_comes_back(tmp_path):
    content = {"a": [1, 2.5, None, "é\n\ud800"], "b": {"c": 1e-320}}
    json_files.write(tmp_path / "f.json", content)
    assert json_files.read(tmp_path / "f.json") == content
    assert [path.name for path in tmp_path.iterdir()] == ["f.json"]


def test_an_editor_may_have_added_a_byte_order_mark(tmp_path):
    (tmp_path / "f.json").write_text('{"a": 1}', encoding="utf-8-sig")
    assert json_files.read(tmp_path / "f.json") == {"a": 1}


def test_every_flipped_bit_is_refused_or_changes_nothing(tmp_path):
    path, content = tmp_path / "f.json", {"a": [1, True, None], "b": {"c": "text"}}
    json_files.write(path, content)
    whole, harmless = path.read_bytes(), 0
    for i in range(8 * len(whole)):
        damaged = bytearray(whole)
        damaged[i // 8] ^= 1 << i % 8
        path.write_bytes(damaged)
        try:
            found = json_files.read(path)
        except RequestError:
            continue
        found = {name: value for name, value in found.items() if name in content}
        assert found == content  # white space, or the name of the checksum, which is then an unknown entry
        harmless += 1
    assert harmless < len(whole) * 2


def test_a_file_may_be_edited_without_its_checksum(tmp_path):
    path = tmp_path / "f.json"
    json_files.write(path, {"a": 1})
    edited = json.loads(path.read_text()) | {"a": 2}
    path.write_text(json.dumps(edited))
    with pytest.raises(RequestError, match=f"if you have edited it, remove {json_files.CHECKSUM}"):
        json_files.read(path)
    del edited[json_files.CHECKSUM]
    path.write_text(json.dumps(edited))
    assert json_files.read(path) == {"a": 2}


@pytest.mark.parametrize("text", ["", "{", "[]", "3", "[" * 100_000, b"\xff\xfe", '{"a": 1} x'])
def test_what_is_no_table_is_refused(tmp_path, text):
    path = tmp_path / "f.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(RequestError, match="is damaged"):
        json_files.read(path)


def test_a_file_that_is_not_there_is_a_wrong_request(tmp_path):
    with pytest.raises(RequestError, match=r"f\.json cannot be read: No such file"):
        json_files.read(tmp_path / "f.json")


def test_a_dataclass_is_built_with_all_that_it_holds():
    content = GOOD | {"rate": 2, "bits": 8, "on": False, "inner": {"width": 4}, "items": [{"width": 5}], "rest": [1]}
    assert json_files.build(Outer, content, "f") == Outer(
        1, "é", 2.0, 8, False, Inner(4), [Inner(5)], {}, [1]
    )  # fmt: skip
    assert isinstance(json_files.build(Outer, content, "f").rate, float)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"count": 1.0}, "count: expected an integer of 64 bits, got 1.0"),
        ({"count": True}, "count: expected an integer of 64 bits, got True"),
        ({"count": 2**63}, "count: expected an integer of 64 bits"),
        ({"count": None}, "count: expected an integer of 64 bits, got None"),
        ({"count": -1}, "count must not be negative"),
        ({"name": 3}, "name: expected text, got 3"),
        ({"rate": "fast"}, "rate: expected a finite number, got 'fast'"),
        ({"rate": float("nan")}, "rate: expected a finite number, got nan"),
        ({"rate": 10**400}, "rate: expected a finite number, got 1000"),
        ({"rate": False}, "rate: expected a finite number, got False"),
        ({"bits": 16}, "bits: expected 8 or 32, got 16"),
        ({"bits": 8.0}, "bits: expected 8 or 32, got 8.0"),
        ({"on": 1}, "on: expected true or false, got 1"),
        ({"inner": {}}, "inner: 'width' is missing"),
        ({"inner": {"width": "w"}}, "inner: width: expected an integer of 64 bits, got 'w'"),
        ({"inner": 3}, "inner: expected a table or null, got 3"),
        ({"items": {}}, r"items: expected a list, got \{\}"),
        ({"items": [{"width": 1}, {"width": None}]}, r"items\[1\]: width: expected an integer"),
        ({"table": {"a": "b"}}, "table: a: expected an integer of 64 bits, got 'b'"),
        ({"table": []}, r"table: expected a table, got \[\]"),
        ({"cuont": 1}, r"unknown entry 'cuont'; did you mean count\?"),
        ({"a\nb": 1}, r"unknown entry 'a\\nb'"),
    ],
)
def test_a_wrong_entry_is_named(change, message):
    with pytest.raises(RequestError, match="^f: " + message):
        json_files.build(Outer, GOOD | change, "f")


@pytest.mark.parametrize("content", [None, [], 3, "text"])
def test_what_is_no_table_cannot_be_built(content):
    with pytest.raises(RequestError, match=r"^f: expected a table, got "):
        json_files.build(Outer, content, "f")


def test_an_entry_that_came_later_may_be_missing_in_a_table_inside():
    assert json_files.build(Outer, {**GOOD, "inner": {"width": 4}}, "f").inner == Inner(4, 2)
    assert json_files.build(Outer, {**GOOD, "inner": {"width": 4, "depth": 5}}, "f").inner == Inner(4, 5)
    with pytest.raises(RequestError, match="'width' is missing"):
        json_files.build(Outer, {**GOOD, "inner": {"depth": 5}}, "f")


def test_an_entry_that_is_missing_is_named():
    with pytest.raises(RequestError, match=r"^f: 'name' is missing"):
        json_files.build(Outer, {"count": 1}, "f")
    with pytest.raises(RequestError, match=r"^f: 'rate' is missing"):
        json_files.build(Outer, GOOD, "f", complete=True)
