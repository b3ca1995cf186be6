"""Damaged tables: each is an error that names the file, the row where it is known, and the remedy."""

import gzip
import io
import json
import shutil
from csv import DictWriter

import pyarrow as pa
import pytest
from datasets import Dataset, DatasetDict

from mm_hf.data.folders import load_image_folders
from mm_hf.data.options import DataOptions
from mm_hf.data.splits import load_splits
from tests.helpers.data_files import csv, image, lines

ROWS = [{"text": f"tëxt {i}", "label": ("bad", "good")[i % 2]} for i in range(8)]
TEXT = {
    ".csv": csv(ROWS),
    ".tsv": csv(ROWS, "\t"),
    ".jsonl": "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS),
    ".json": json.dumps(ROWS, ensure_ascii=False),
}


@pytest.fixture(scope="module")
def binary(tmp_path_factory):
    """Return the content of tables in binary formats."""
    directory, rows = tmp_path_factory.mktemp("binary"), Dataset.from_list(ROWS)
    rows.to_parquet(directory / "rows.parquet")
    rows.save_to_disk(directory / "saved")
    (arrow,) = (directory / "saved").glob("*.arrow")
    return {".parquet": (directory / "rows.parquet").read_bytes(), ".arrow": arrow.read_bytes()}


def load(directory, suffix, good, bad, split="train"):
    """Load a dataset of which one split is damaged."""
    for name in ("train", "test"):
        (directory / f"{name}{suffix}").write_bytes(bad if name == split else good)
    return load_splits(DataOptions(str(directory), train_val_split=0.25), cache_dir=str(directory / ".cache"))


def texts(splits):
    return sorted(splits.train["text"][:] + splits.validation["text"][:])


def raises(directory, suffix, good, bad, message, split="train"):
    with pytest.raises(ValueError, match=message) as caught:
        load(directory, suffix, good, bad, split)
    found = str(caught.value)
    assert str(directory / f"{split}{suffix}") in found and "\n" not in found and len(found) < 500, found


# ---- encodings ----

ENCODINGS = {
    "utf-16": "is UTF-16 text: save it as UTF-8",
    "utf-32": "is UTF-16 text: save it as UTF-8",
    "utf-16-le": "has a NUL byte in line 1, .*: save it as UTF-8 text",
    "latin-1": r"is not UTF-8 text \(byte 0xeb in line [12]\): save it as UTF-8",
    "cp1252": r"is not UTF-8 text \(byte 0xeb in line [12]\): save it as UTF-8",
}


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("suffix", TEXT)
def test_other_encodings_are_errors(suffix, encoding, tmp_path):
    split = ("train", "test")[len(encoding) % 2]
    good = TEXT[suffix]
    raises(tmp_path, suffix, good.encode(), good.encode(encoding), ENCODINGS[encoding], split)


@pytest.mark.parametrize("ending", ["\n", "\r\n"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
@pytest.mark.parametrize("suffix", TEXT)
def test_utf_8_is_read_with_and_without_byte_order_mark(suffix, encoding, ending, tmp_path):
    content = TEXT[suffix].replace("\n", ending).encode(encoding)
    splits = load(tmp_path, suffix, content, content)
    assert texts(splits) == [row["text"] for row in ROWS] and splits.class_names == ["bad", "good"]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda text: text.replace("xt 3", "x\0t 3"), r"has a NUL byte in line \d"),
        (lambda text: "", "is empty: add rows or remove it"),
        (lambda text: " \n\n", "is empty: add rows or remove it"),
    ],
    ids=["NUL", "empty", "blank"],
)
@pytest.mark.parametrize("suffix", TEXT)
def test_damaged_text_is_an_error(suffix, damage, message, tmp_path):
    raises(tmp_path, suffix, TEXT[suffix].encode(), damage(TEXT[suffix]).encode(), message)


@pytest.mark.parametrize("suffix", TEXT)
def test_compressed_and_cut_files_are_errors(suffix, tmp_path):
    good = TEXT[suffix].encode()
    raises(tmp_path, suffix, good, gzip.compress(good), "is not UTF-8 text|has a NUL byte")
    cut = good[: good.index("ë".encode(), len(good) // 2) + 1]
    raises(tmp_path, suffix, good, cut, "ends in an incomplete character in line .: copy the complete file")


def test_line_of_a_large_file_is_named(tmp_path):
    """The file is read in parts of 2^20 bytes."""
    good = "text,label\n" + "".join(f"text {i},{('bad', 'good')[i % 2]}\n" for i in range(100_000))
    bad = good.encode().replace(b"text 98765,", b"t\xe9xt 98765,")
    raises(tmp_path, ".csv", TEXT[".csv"].encode(), bad, r"byte 0xe9 in line 98767\)", "test")


# ---- rows ----


@pytest.mark.parametrize("suffix", [".csv", ".tsv"])
def test_rows_with_too_many_fields_are_errors(suffix, tmp_path):
    separator = {".csv": ",", ".tsv": "\t"}[suffix]
    good = TEXT[suffix]
    message = "has a damaged row in line {}: it has 3 fields, but the table has 2 columns; quote fields that contain"
    in_row_5 = good.replace("xt 5", f"x{separator}t 5")
    raises(tmp_path, suffix, good.encode(), in_row_5.encode(), message.format(7))
    for shifted in (good.replace(" ", separator), good.replace("bad\n", f"bad{separator}\n")):
        raises(tmp_path, suffix, good.encode(), shifted.encode(), message.format(2))
    single = good.replace("tëxt 3", f"'tëxt{separator} 3'")  # quotes of another kind
    raises(tmp_path, suffix, good.encode(), single.encode(), message.format(5))


QUOTES = {
    "unclosed": ('"tëxt 3', "line 5: a quote is never closed; double the quotes inside"),
    "text behind": ('"tëxt" 3', "line 5: text follows a closing quote; enclose the complete field in quotes"),
    "space behind": ('"tëxt 3" ', "line 5: text follows a closing quote"),
    "backslashes": (r'"t\"ëx\"t 3"', "line 5: text follows a closing quote"),
    "closed in a later row": ('"tëxt 3,good\ntëxt 4" again', "line 5: text follows a closing quote"),
    "alone": (
        '",good\ntëxt,bad\n"',
        'line 5: a quoted field contains other rows; write a field that is one quote as """"',
    ),
}


@pytest.mark.parametrize("suffix", [".csv", ".tsv"])
@pytest.mark.parametrize("name", QUOTES)
def test_quotes_that_a_reader_would_misread_are_errors(name, suffix, tmp_path):
    """Pandas reads all but the first without an error: it drops quotes, or makes one field of several rows."""
    good = TEXT[suffix]
    field, message = QUOTES[name]
    bad = good.replace("tëxt 3", field.replace(",", {".csv": ",", ".tsv": "\t"}[suffix]))
    raises(tmp_path, suffix, good.encode(), bad.encode(), message)


def test_lone_quotes_in_the_last_column_are_errors(tmp_path):
    bad = 'label,text\nbad,"\ngood,x\nbad,"\ngood,y\n'
    raises(tmp_path, ".csv", TEXT[".csv"].encode(), bad.encode(), "line 2: a quoted field contains other rows")


@pytest.mark.parametrize("ending", ["\n", "\r\n"])
@pytest.mark.parametrize("suffix", [".csv", ".tsv"])
@pytest.mark.parametrize(
    "text",
    [
        'say "yes"',
        'a "b" c, d',
        '"',
        '""',
        "a\nb",
        "\na, b\n",
        "it's",
        "'a'",
        "«a» “b”",
        "a\tb",
        "a\\",
        " a ",
        "x" * 200_000,
    ],
)
def test_fields_are_read_as_they_were_written(text, suffix, ending, tmp_path):
    """Fields written with quotes where the format requires them."""
    rows = [{**row, "text": f"{i}{text}" if i % 2 else text} for i, row in enumerate(ROWS)]
    file = io.StringIO(newline="")
    writer = DictWriter(file, ["text", "label"], delimiter={".csv": ",", ".tsv": "\t"}[suffix], lineterminator=ending)
    writer.writeheader()
    writer.writerows(rows)
    content = file.getvalue().encode()
    assert texts(load(tmp_path, suffix, content, content)) == sorted(row["text"] for row in rows)


def test_quotes_inside_an_unquoted_field_are_text(tmp_path):
    content = b'text,label\na "b" c,bad\n5" disk,good\nit\'s,bad\nx""y,good\n'
    splits = load(tmp_path, ".csv", content, content)
    assert texts(splits) == sorted(['a "b" c', '5" disk', "it's", 'x""y'])


@pytest.mark.parametrize("suffix", [".csv", ".tsv"])
@pytest.mark.parametrize("word", ["NA", "null", "None", "nan", "n/a"])
def test_words_for_missing_values_are_texts_and_classes(suffix, word, tmp_path):
    content = TEXT[suffix].replace("tëxt 3", word).replace("bad", word).encode()
    splits = load(tmp_path, suffix, content, content)
    assert word in texts(splits) and sorted(splits.class_names) == sorted([word, "good"])


@pytest.mark.parametrize("suffix", [".csv", ".tsv"])
def test_numbers_that_begin_with_0_are_names(suffix, tmp_path):
    """The classes 1 and 01 differ, also if only one split has such a number."""
    separator = {".csv": ",", ".tsv": "\t"}[suffix]
    train = csv([{"text": f"x {i}", "label": ["1", "01", "2"][i % 3]} for i in range(9)], separator).encode()
    test = csv([{"text": f"00{i}", "label": ["1", "2"][i % 2]} for i in range(4)], separator).encode()
    splits = load(tmp_path, suffix, test, train)
    assert sorted(splits.class_names) == ["01", "1", "2"]
    assert list(splits.test["text"]) == ["000", "001", "002", "003"]
    assert [splits.class_names[y] for y in splits.test["label"]] == ["1", "2", "1", "2"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "x", "label": }', r"is not JSON \(line 4: Expecting value"),
        ('{"text": "x", "label": "bad"', r"is not JSON \(line 4: "),
        ('{"text": ' + "[" * 5000, r"is not JSON \(line 4: "),
        ('["x", "bad"]', "has no JSON object in line 4: write each row as an object"),
        ("3", "has no JSON object in line 4"),
        ("null", "has no JSON object in line 4"),
        ('{"text": 3, "label": "bad"}', "has a string in line 1 and a number in line 4 as 'text': use one type"),
        ('{"text": NaN, "label": "bad"}', "has a string in line 1 and a number in line 4 as 'text'"),
        ('{"text": "x", "label": true}', "has a string in line 1 and a boolean in line 4 as 'label'"),
        ('{"text": "x", "label": ["bad"]}', "has a string in line 1 and a list in line 4 as 'label'"),
    ],
)
def test_line_that_is_no_json_object_is_named(line, message, tmp_path):
    rows = lines(ROWS).splitlines()
    bad = "\n".join([*rows[:3], line, *rows[3:]])
    raises(tmp_path, ".jsonl", lines(ROWS).encode(), bad.encode(), message)


@pytest.mark.parametrize("content", ["null", "3", '"text"', "[[1, 2]]", "[null]"])
def test_json_file_without_objects_is_an_error(content, tmp_path):
    raises(tmp_path, ".json", TEXT[".json"].encode(), content.encode(), "has no JSON object in row 0")


@pytest.mark.parametrize(
    ("suffix", "bad"),
    [
        (".csv", TEXT[".csv"].replace("tëxt 3", "")),
        (".tsv", TEXT[".tsv"].replace("tëxt 3", "")),
        (".jsonl", TEXT[".jsonl"].replace('"tëxt 3"', "null")),
        (".jsonl", TEXT[".jsonl"].replace('"text": "tëxt 3", ', "")),
    ],
)
def test_missing_text_is_an_error_that_names_the_row(suffix, bad, tmp_path):
    with pytest.raises(ValueError, match="The column 'text' of the split 'test' is empty in 1 rows, .*row 3: add the"):
        load(tmp_path, suffix, TEXT[suffix].encode(), bad.encode(), "test")


@pytest.mark.parametrize(("suffix", "bad"), [(".csv", "text,label\n"), (".json", "[]")])
def test_table_without_rows_is_an_error(suffix, bad, tmp_path):
    raises(tmp_path, suffix, TEXT[suffix].encode(), bad.encode(), "has no rows: add rows")


def test_position_in_a_json_file_is_named(tmp_path):
    good = json.dumps(ROWS, indent=1)
    raises(tmp_path, ".json", good.encode(), good.replace('"good"', "good", 1).encode(), "line 8 column 12")


@pytest.mark.parametrize("damage", ["cut", "half", "empty", "zeros", "text"])
@pytest.mark.parametrize("suffix", [".parquet", ".arrow"])
def test_damaged_binary_tables_are_errors(suffix, damage, binary, tmp_path):
    good = binary[suffix]
    bad = {
        "cut": good[:-20],
        "half": good[: len(good) // 2],
        "empty": b"",
        "zeros": good[:100] + bytes(len(good) - 100),
        "text": TEXT[".csv"].encode(),
    }[damage]
    message = r"cannot be read \(.*\): correct or remove it|has no rows|has the columns none, and"
    if suffix == ".arrow":
        message = "has no end, as files that were cut: copy the complete file"
    message = "is empty: add rows" if damage == "empty" else message
    for split in ("train", "test"):
        raises(tmp_path, suffix, good, bad, message, split)


@pytest.fixture(scope="module")
def batches():
    """Return a stream of Arrow of three batches, and the positions between them."""
    table, stream, ends = Dataset.from_list(ROWS).data.table, io.BytesIO(), []
    with pa.ipc.new_stream(stream, table.schema) as writer:
        for batch in table.to_batches(max_chunksize=3):
            writer.write_batch(batch)
            ends.append(stream.tell())
    return stream.getvalue(), ends


def test_streams_that_were_cut_between_two_batches_are_errors(batches, tmp_path):
    """Arrow reads them without an error as a shorter table."""
    good, ends = batches
    for end in ends:
        assert pa.ipc.open_stream(good[:end]).read_all().num_rows in (3, 6, 8)
        raises(tmp_path, ".arrow", good, good[:end], "has no end, as files that were cut: copy the complete file")
    raises(tmp_path, ".arrow", good, good + good, "contains several streams, of which only the first is read")
    assert len(load(tmp_path, ".arrow", good, good).test) == 8


@pytest.mark.parametrize("position", [8, 24, 60])
def test_streams_with_damaged_messages_are_errors(position, batches, tmp_path):
    good, _ = batches
    bad = good[:position] + b"\xff" * 16 + good[position + 16 :]
    raises(tmp_path, ".arrow", good, bad, r"cannot be read \(.*\): correct or remove it|contains several streams")


def test_saved_dataset_that_was_cut_between_two_batches_is_an_error(batches, tmp_path):
    good, ends = batches
    DatasetDict(train=Dataset.from_list(ROWS), test=Dataset.from_list(ROWS)).save_to_disk(tmp_path / "saved")
    file = tmp_path / "saved/test/data-00000-of-00001.arrow"
    file.write_bytes(good)
    assert len(load_splits(DataOptions(str(tmp_path / "saved"))).test) == 8
    file.write_bytes(good[: ends[1]])
    with pytest.raises(ValueError, match=f"{file} has no end, as files that were cut: copy the complete file"):
        load_splits(DataOptions(str(tmp_path / "saved")))


def test_arrow_file_that_was_cut_is_an_error(tmp_path):
    table, file = Dataset.from_list(ROWS).data.table, io.BytesIO()
    with pa.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table, max_chunksize=3)
    good = file.getvalue()
    raises(tmp_path, ".arrow", good, good[: len(good) // 2], r"cannot be read \(.*\): correct or remove it")
    assert len(load(tmp_path, ".arrow", good, good).test) == 8


def test_files_of_different_columns_are_an_error(tmp_path):
    for name, content in (("train-1", csv(ROWS)), ("train-2", csv([{"a": 1, "label": "x"}])), ("test", csv(ROWS))):
        (tmp_path / f"{name}.csv").write_text(content)
    with pytest.raises(
        ValueError, match=r"csv has the columns label, text, and .*train-2.csv has a, label: use the same"
    ):
        load_splits(DataOptions(str(tmp_path)), cache_dir=str(tmp_path / ".cache"))


# ---- directories ----


@pytest.mark.parametrize("damage", ["remove", "cut", "empty", "list", "null", "text"])
@pytest.mark.parametrize(
    "name", ["dataset_dict.json", "train/state.json", "train/dataset_info.json", "test/data-00000-of-00001.arrow"]
)
def test_damaged_saved_dataset_is_an_error_that_names_the_directory(name, damage, tmp_path):
    data = Dataset.from_list(ROWS)
    DatasetDict(train=data, test=data).save_to_disk(tmp_path / "saved")
    path = tmp_path / "saved" / name
    content = path.read_bytes()
    if damage == "remove":
        path.unlink()
    else:
        damaged = {"cut": content[:-30], "empty": b"", "list": b"[1]", "null": b"null", "text": b"text"}
        path.write_bytes(damaged[damage])
    if (name, damage) == ("dataset_dict.json", "remove"):  # then it is a directory of Arrow files
        assert texts(load_splits(DataOptions(str(tmp_path / "saved")), cache_dir=str(tmp_path))) == sorted(data["text"])
        return
    with pytest.raises(ValueError) as caught:
        load_splits(DataOptions(str(tmp_path / "saved")))
    assert str(tmp_path / "saved") in str(caught.value) and "\n" not in str(caught.value)


def test_directory_named_as_a_table_is_a_directory(tmp_path):
    """Spark writes a table as a directory of parts."""
    for split in ("train", "test"):
        (tmp_path / f"{split}.csv").mkdir()
        (tmp_path / f"{split}.csv" / "part-0.csv").write_text(csv(ROWS))
        (tmp_path / f"{split}.csv" / "_SUCCESS").write_text("")
    splits = load_splits(DataOptions(str(tmp_path)), cache_dir=str(tmp_path / ".cache"))
    assert len(splits.test) == 8 and texts(splits) == [row["text"] for row in ROWS]
    shutil.rmtree(tmp_path)
    (tmp_path / "train.csv").mkdir(parents=True)
    for path in (tmp_path, tmp_path / "train.csv"):
        with pytest.raises(ValueError, match=f"The directory {path} has no data: give a directory of tables"):
            load_splits(DataOptions(str(path)))


def test_damaged_metadata_of_images_is_named(tmp_path):
    image(tmp_path / "0.png")
    (tmp_path / "metadata.csv").write_bytes("file_name,label\n0.png,caf\xe9\n".encode("latin-1"))
    with pytest.raises(ValueError, match=r"metadata\.csv is not UTF-8 text \(byte 0xe9 in line 2\)"):
        load_image_folders({"train": tmp_path})
