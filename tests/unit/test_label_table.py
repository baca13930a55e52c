"""Tables of labels as people have them: separators, endings, names of columns, JSON lines."""

import io
import json
from pathlib import Path
from typing import Any

import pytest

from carclass.config.ingest_settings import ColumnRole, IngestSettings
from carclass.data.inventory import Inventory
from carclass.errors import UserError
from carclass.ingestion import labelling
from carclass.ingestion.label_table import guess_columns, parse_table
from carclass.ingestion.labels import Label, LabelsError

ROWS = [Label("a,1.jpg", "Citroën; C3", "train"), Label("2.jpg", "BMW", "test")]
OTHER = {"name": "file", "class": "model", "subset": "split"}


def parsed(text: str, name: str = "labels.csv", **options: Any) -> list[Label]:
    return [label for _, label in parse_table(io.BytesIO(text.encode()), source=name, **options)]


def delimited(separator: str, columns: tuple[str, ...] = ("img_name", "class", "subset")) -> str:
    rows = [columns, *((f'"{row.key}"', f'"{row.label}"', row.subset) for row in ROWS)]
    return "".join(separator.join(row) + "\n" for row in rows)


@pytest.mark.parametrize("name", ["labels.csv", "labels.CSV", "labels.tsv", "labels.TSV"])
@pytest.mark.parametrize("separator", [",", ";", "\t"])
def test_commas_semicolons_and_tabs_separate_fields(separator: str, name: str):
    assert parsed(delimited(separator), name) == ROWS


def test_the_separator_is_the_one_that_finds_the_columns():
    text = 'img_name;class;subset;"a,b,c,d,e"\n1.jpg;Audi;train;x\n'
    assert parsed(text) == [Label("1.jpg", "Audi", "train")]


def test_fields_of_semicolons_may_have_commas_without_quotes():
    assert parsed("img_name;class;subset\n1.jpg;Audi, A3;train\n") == [Label("1.jpg", "Audi, A3", "train")]


@pytest.mark.parametrize("separator", [",", ";", "\t"])
def test_columns_may_have_other_names(separator: str):
    assert parsed(delimited(separator, ("file", "model", "split")), columns=OTHER) == ROWS


def test_some_columns_may_have_other_names():
    text = "img_name,model,subset\n1.jpg,Audi,train\n"
    assert parsed(text, columns={"class": "model"}) == [Label("1.jpg", "Audi", "train")]


def test_names_of_columns_are_found_in_any_case():
    assert parsed("IMG_NAME;Class;Subset\n1.jpg;Audi;TRAIN\n") == [Label("1.jpg", "Audi", "train")]


def test_a_name_in_the_same_case_is_preferred():
    assert parsed("Class,class,img_name\nno,Audi,1.jpg\n") == [Label("1.jpg", "Audi", "train")]


@pytest.mark.parametrize(
    ("text", "name"), [("img_name,class\n1.jpg,Audi\n", "l.csv"), ('{"img_name": "1.jpg", "class": "Audi"}', "l.jsonl")]
)
def test_without_a_column_of_subsets_all_photos_are_train(text: str, name: str):
    assert parsed(text, name) == [Label("1.jpg", "Audi", "train")]


@pytest.mark.parametrize("column", ["split", "Split", "SET", "partition"])
def test_subsets_under_another_name_are_not_passed_over(column: str):
    with pytest.raises(LabelsError, match=rf"no column subset, but one named {column}\. .*{{subset: {column}}}"):
        parsed(f"img_name,class,{column}\n1.jpg,Audi,test\n")


def test_a_chosen_column_that_is_missing_is_named_with_those_that_exist():
    with pytest.raises(LabelsError, match=r"no column split; the first line has \['img_name', 'class'\]"):
        parsed("img_name,class\n1.jpg,Audi\n", columns={"subset": "split"})


@pytest.mark.parametrize("name", ["labels.jsonl", "labels.JSONL", "labels.ndjson"])
def test_json_lines_are_labels(name: str):
    rows = [{"img_name": row.key, "class": row.label, "subset": row.subset, "box": [1, 2]} for row in ROWS]
    text = "\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    assert parsed(f"\ufeff{text}\r\n", name) == ROWS


def test_keys_of_json_lines_may_have_other_names_and_another_order():
    text = '{"file": "1.jpg", "model": "A", "split": "val"}\n{"split": "dev", "model": 3, "file": 17}\n'
    assert parsed(text, "l.jsonl", columns=OTHER) == [Label("1.jpg", "A", "val"), Label("17", "3", "val")]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('["1.jpg", "Audi"]', "line 2: not an object of JSON"),
        ('{"img_name": "1.jpg", "class": "Au', "line 2: not an object of JSON"),
        ("img_name,class", "line 2: not an object of JSON"),
        ('{"img_name": "1.jpg"}', "line 2: the class of 1.jpg is empty"),
        ('{"img_name": "1.jpg", "class": null}', "line 2: the class of 1.jpg is empty"),
        ('{"img_name": "1.jpg", "class": ["Audi"]}', "line 2: the class of 1.jpg is empty"),
        ('{"img_name": "1.jpg", "class": true}', "line 2: the class of 1.jpg is empty"),
        ('{"img_name": "1.jpg", "class": "A\\u0000"}', "line 2: .*NUL"),
        ('{"img_name": "1.jpg", "class": "A", "subset": "test"}', "line 2: key subset, which the first line lacks"),
        ('{"img_name": "1.jpg", "class": "A", "class": "B"}', "line 2: not an object of JSON.*a key is given twice"),
    ],
)
def test_a_bad_line_of_json_is_reported_with_its_number(line: str, message: str):
    with pytest.raises(LabelsError, match=message):
        parsed(f'{{"img_name": "0.jpg", "class": "Audi"}}\n{line}\n', "l.jsonl")


@pytest.mark.parametrize("header", ["img_name,class,subset,class", "img_name,class,Subset,SUBSET"])
def test_a_column_that_is_given_twice_is_refused(header: str):
    with pytest.raises(LabelsError, match=r"l\.csv: the first line has the column (class|subset) twice"):
        parsed(f"{header}\n1.jpg,A,train,test\n", "l.csv")


@pytest.mark.parametrize("text", ["", "[]", "img_name,class\n"])
def test_a_file_without_json_lines_is_refused(text: str):
    with pytest.raises(LabelsError, match=r"l\.jsonl(, line 1: not an object|: no column img_name)"):
        parsed(text, "l.jsonl")


def test_the_settings_of_a_job_name_the_columns(tmp_path: Path):
    path = tmp_path / "labels.TSV"
    path.write_text("file\tmodel\tsplit\n1.jpg\tA\tvalid\n2.jpg\tB\tTrain\n")
    settings = IngestSettings(photos="/photos", labels=str(path), columns=OTHER)
    with Inventory() as inventory:
        labelling.read_labels(settings, inventory)
        rows = list(inventory.query("SELECT name, label, subset FROM labels ORDER BY id"))
    assert rows == [("1.jpg", "A", "val"), ("2.jpg", "B", "train")]


@pytest.mark.parametrize("labels", [None, "/devkit"])
def test_columns_without_a_table_are_refused(labels: str | None):
    with pytest.raises(ValueError, match="`columns` has no effect: `labels` is not a table"):
        IngestSettings(photos="/photos", labels=labels, columns={"name": "file"})


@pytest.mark.parametrize("columns", [{"label": "model"}, {"class": " "}, "model"])
def test_columns_are_those_of_a_label(columns: Any):
    with pytest.raises(ValueError, match="columns"):
        IngestSettings(photos="/photos", labels="/labels.csv", columns=columns)


@pytest.mark.parametrize("name", ["make", "Make", "model", "label", "category", "brand", "target", "body_type"])
def test_the_only_column_that_may_have_the_class_is_recognised(name: str):
    assert guess_columns(["img_name", name, "seller"], {}, source="l.csv") == {"class": name}


def test_several_columns_that_may_have_the_class_are_an_error_that_names_them_and_the_setting():
    with pytest.raises(LabelsError) as error:
        guess_columns(["file", "Model", "make"], {}, source="l.csv")
    assert str(error.value) == (
        "l.csv: several columns may have the class: make, Model. Name one by `ingest.columns`, as in "
        "--columns '{class: make}'."
    )


@pytest.mark.parametrize(
    ("found", "given", "columns"),
    [
        (["img_name", "class", "make", "model"], {}, {}),
        (["img_name", "make", "model"], {"class": "model"}, {"class": "model"}),
        (["make", "model"], {"name": "make"}, {"name": "make", "class": "model"}),
        (["img_name", "make", "seller"], {"class": "seller"}, {"class": "seller"}),
    ],
)
def test_a_column_that_is_given_or_has_the_usual_name_leaves_no_choice(
    found: list[str], given: dict[ColumnRole, str], columns: dict[ColumnRole, str]
):
    assert guess_columns(found, given, source="l.csv") == columns


def test_missing_labels_are_a_user_error(tmp_path: Path):
    settings = IngestSettings(photos="/photos", labels=str(tmp_path / "labels.jsonl"))
    with Inventory() as inventory, pytest.raises(UserError, match=r"`ingest.labels`: .*labels.jsonl cannot be read"):
        labelling.read_labels(settings, inventory)


@pytest.mark.parametrize(
    ("found", "columns"),
    [
        (["Image Path", "Class Name"], {"name": "Image Path", "class": "Class Name"}),
        (["img name", "class-label", "class id"], {"name": "img name", "class": "class-label"}),
        (["img_name", "Class"], {}),
    ],
)
def test_columns_are_recognised_with_blanks_and_hyphens_in_their_names(found: list[str], columns: dict[str, str]):
    assert guess_columns(found, {}, source="l.csv") == columns


def test_a_table_without_names_of_columns_is_told_so():
    with pytest.raises(
        LabelsError, match=r"no names of columns, but \['a/1.jpg', 'Audi'\]\. .* such as img_name,class\."
    ):
        parsed("a/1.jpg,Audi\na/2.jpg,BMW\n")


@pytest.mark.parametrize(("first", "separator"), [("sep=;", ";"), ('"sep=|"', "|"), ("sep=\t", "\t")])
def test_a_line_that_names_the_separator_for_excel_is_read(first: str, separator: str):
    assert parsed(f"\ufeff{first}\r\n{delimited(separator)}") == ROWS
    with pytest.raises(LabelsError, match=r"line 3: the class of x.jpg is empty"):
        parsed(f"{first}\nimg_name{separator}class\nx.jpg{separator}\n")
