"""Texts: clauses come and go with the columns, and prompts are read as they stand in a file."""

from __future__ import annotations

import csv
import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from medgen.conditions.text import fill_template, read_prompts
from medgen.types import BadInputError

TEMPLATE = "Chest X-ray[, {view} view].[ {age}-year-old {sex}.][ Finding: {finding}.]"
ROW = {"view": "AP", "age": "54", "sex": "male", "finding": "COVID-19"}


@pytest.mark.parametrize(
    ("empty", "expected"),
    [
        ([], "Chest X-ray, AP view. 54-year-old male. Finding: COVID-19."),
        (["view"], "Chest X-ray. 54-year-old male. Finding: COVID-19."),
        (["sex"], "Chest X-ray, AP view. Finding: COVID-19."),
        (["view", "age", "sex", "finding"], "Chest X-ray."),
    ],
)
def test_a_clause_is_left_out_with_any_of_its_columns(empty: list[str], expected: str) -> None:
    assert fill_template(TEMPLATE, ROW | dict.fromkeys(empty, " ")) == expected
    lacking = {name: value for name, value in ROW.items() if name not in empty}
    assert fill_template(TEMPLATE, lacking, columns=ROW) == expected


@given(st.dictionaries(st.sampled_from(["a", "b c"]), st.text("[]{}x", min_size=1), min_size=2))
def test_without_clauses_it_is_the_format_of_the_standard_library(row: dict[str, str]) -> None:
    template = "one {a} two {b c}{a} three"
    assert fill_template(template, row) == string.Formatter().vformat(template, (), row)


def test_white_space_is_one_space_and_all_clauses_out_is_no_text() -> None:
    assert fill_template("[{a}]  [{b}]\n", {"a": "x \n y", "b": "z"}) == "x y z"
    assert fill_template("[{a}]  [{b}]\n", {"a": "", "b": ""}) == ""


@pytest.mark.parametrize(
    ("template", "row", "message"),
    [
        ("{veiw} view", {"view": "AP", "age": "3"}, r"expected columns among age, view, got veiw\. Correct"),
        ("[{veiw} view]", {}, r"expected columns among none, got veiw"),
        ("{view} view", {"view": ""}, r"expected a value in column view, got none\. Put .* square brackets"),
        ("x [a [{view}]]", {"view": "AP"}, r"got a lone '\['\. Close every bracket"),
        ("x {view", {"view": "AP"}, r"got a lone '\{'"),
        ("x {}", {"view": "AP"}, r"got a lone '\{'"),
        ("[x}]", {"view": "AP"}, r"got a lone '\}'"),
    ],
)
def test_templates_that_cannot_be_filled_are_refused(template: str, row: dict[str, str], message: str) -> None:
    with pytest.raises(BadInputError, match=message):
        fill_template(template, row)


def test_a_text_is_one_prompt(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert read_prompts(" Chest X-ray, PA view.\n") == ["Chest X-ray, PA view."]
    assert read_prompts("a/b: " + 5000 * "long ") == [("a/b: " + 5000 * "long ").strip()]


def test_files_of_prompts_are_read_line_by_line_and_row_by_row(tmp_path) -> None:
    prompts = ["Chest X-ray, PA view.", 'He said "normal"', "überall"]
    (tmp_path / "p.txt").write_text("\n".join(prompts) + "\r\n\n", encoding="utf-8-sig")
    assert read_prompts(str(tmp_path / "p.txt")) == prompts
    for column in ("text", "prompt"):
        with (tmp_path / "p.CSV").open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, ["id", column])
            writer.writeheader()
            writer.writerows({"id": index, column: prompt} for index, prompt in enumerate(prompts))
        assert read_prompts(str(tmp_path / "p.CSV")) == prompts


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.txt", b"", r"p\.txt: expected at least one prompt, got none"),
        ("p.txt", b" \n\n", r"expected at least one prompt, got none"),
        ("p.txt", b"a\n\nb\n", r"p\.txt, line 2: expected a prompt, got an empty one\. Leave prompts out"),
        ("p.txt", b"\xff\xfe\xff", r"expected text in UTF-8, got an error"),
        ("p.csv", b"", r"expected one column named text or prompt, got an empty file"),
        ("p.csv", b"id,caption\n1,a\n", r"expected one column named text or prompt, got id, caption\. Name"),
        ("p.csv", b"text,prompt\na,b\n", r"expected one column named text or prompt, got text, prompt"),
        ("p.csv", b"id,text\n", r"expected at least one prompt, got none"),
        ("p.csv", b"id,text\n1,a\n2,\n", r"p\.csv, line 3: expected a prompt, got an empty one"),
        ("p.csv", b"id,text\n1,a\n2\n", r"p\.csv, line 3: expected a prompt, got an empty one"),
        ("p.csv", b"text\nPA view, normal\n", r"line 2: expected 1 columns as in the header, got more\. Quote"),
        ("p.csv", b'text\n"a\n', r"expected text in UTF-8, got an error"),
        ("p.json", b"{}", r"p\.json: expected a \.txt or \.csv file, .* got the name of another file"),
    ],
)
def test_files_that_hold_no_prompts_are_refused(tmp_path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(BadInputError, match=message):
        read_prompts(str(tmp_path / name))


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("", r"prompts: expected a prompt, got an empty one\. Leave prompts out"),
        ("  \n", r"prompts: expected a prompt, got an empty one"),
        ("nowhere/p.txt", r"nowhere/p\.txt: expected a file of prompts, got none there"),
        (".", r"\.: expected .* got the name of another folder"),
    ],
)
def test_values_that_are_no_prompts_are_refused(value: str, message: str) -> None:
    with pytest.raises(BadInputError, match=message):
        read_prompts(value)
