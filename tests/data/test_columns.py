"""Columns of tables: separators, double names, types of all rows, and those that are texts."""

import json

import pytest

from mm_hf.data.options import DataOptions
from mm_hf.data.splits import load_splits
from tests.helpers.data_files import csv, lines, tables, write_csv


def write(root, text, suffix):
    for split in ("train", "test"):
        (root / f"{split}{suffix}").write_text(text)
    return DataOptions(str(root), train_val_split=0.25)


@pytest.mark.parametrize("words", ["text", "one, two; three"])
@pytest.mark.parametrize(
    ("suffix", "separator"), [(".csv", ";"), (".csv", "\t"), (".csv", "|"), (".tsv", ","), (".tsv", ";")]
)
def test_other_separators_are_named(suffix, separator, words, tmp_path):
    text = csv([{"text": words.replace(separator, ""), "label": "ab"[i % 2]} for i in range(8)], separator)
    with pytest.raises(
        ValueError, match=r"test\.[ct]sv has one column, 'text.*label': separate the fields with"
    ) as caught:
        load_splits(write(tmp_path, text, suffix))
    assert f"in place of {separator!r}" in str(caught.value)


@pytest.mark.parametrize("header", ["text,text,label", "text,label,label", ",id,text,label,id"])
def test_columns_with_one_name_are_errors(header, tmp_path):
    rows = "".join(",".join("abuvw"[: header.count(",") + 1]) + "\n" for _ in range(8))
    with pytest.raises(ValueError, match=r"test\.csv has several columns with the name '(text|label|id)': rename or"):
        load_splits(write(tmp_path, f"{header}\n{rows}", ".csv"))


def test_columns_without_names_are_read(tmp_path):
    """The index of a table that pandas wrote is such a column."""
    splits = load_splits(
        write(tmp_path, ",,text,label\n" + "".join(f"{i},{i},x,{'ab'[i % 2]}\n" for i in range(8)), ".csv")
    )
    assert (splits.inputs, splits.class_names) == (["text"], ["a", "b"])


@pytest.mark.parametrize(
    "values", [("True", "false"), ("00123", "04567"), ("2020-01-01", "2020-01-02"), ("+1", "1e5"), ("01-23", "04 56")]
)
def test_numbers_booleans_and_dates_beside_a_text_are_no_second_text(values, tmp_path):
    rows = [{"extra": values[i % 2], "review": f"fine {i}", "label": "ab"[i // 2 % 2]} for i in range(8)]
    assert load_splits(tables(tmp_path, write_csv, rows)).inputs == ["review"]


def test_two_columns_of_words_are_a_pair_of_texts(tmp_path):
    rows = [{"question": f"is it {i}", "answer": ["2020", "no"][i % 2], "label": "ab"[i // 2 % 2]} for i in range(8)]
    assert load_splits(tables(tmp_path, write_csv, rows)).inputs == ["question", "answer"]


LATE = {
    "null, then a number": [{"k": None}, {"k": 3}],
    "null, then a text": [{"k": None}, {"k": "x"}],
    "no date, then a date": [{"day": None}, {"day": "2021-01-01"}],
    "an integer, then a fraction": [{"k": 1}, {"k": 3.5}],
    "a new column": [{}, {"k": 3}],
    "a new field": [{"k": {"a": 1}}, {"k": {"a": 1, "b": "x"}}],
    "an empty list, then numbers": [{"k": []}, {"k": [1, 2]}],
}


@pytest.mark.parametrize("day", ["2020-01-01", "no date"])
@pytest.mark.parametrize("case", LATE)
def test_types_of_json_columns_follow_from_all_rows(case, day, tmp_path):
    """`datasets` writes 1,000 rows at a time, with the types of the first ones."""
    early, late = LATE[case]
    common = {"text": "fine", "label": "a", "day": day}
    rows = [{**common, **early}] * 1200 + [{**common, "label": "b", "text": "last", **late}] * 2
    splits = load_splits(write(tmp_path, lines(rows), ".jsonl"))
    last = splits.test[-1]
    assert last["text"] == "last" and last | late == last and splits.test.num_rows == len(rows)


@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
@pytest.mark.parametrize("value", [2**63, -(2**63) - 1, 10**30])
def test_integers_of_more_than_64_bits_in_json_are_errors(value, suffix, tmp_path):
    rows = [{"text": "fine", "label": [1, value][i % 2]} for i in range(8)]
    text = lines(rows) if suffix == ".jsonl" else json.dumps(rows)
    with pytest.raises(
        ValueError, match=r"has an integer of more than 64 bits in (line 2|row 1) as 'label': write it as"
    ):
        load_splits(write(tmp_path, text, suffix))
