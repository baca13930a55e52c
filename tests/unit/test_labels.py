"""Parsers of labels and their errors: CSV and Stanford's devkit."""

import io

import numpy as np
import pytest
from scipy.io import savemat

from carclass.errors import UserError
from carclass.ingestion.devkit import parse_devkit
from carclass.ingestion.label_table import parse_table
from carclass.ingestion.labels import Label, LabelsError, raise_contradictions

HEADER = b"img_name,class,subset\n"
SEDAN = Label("1.jpg", "Audi Sedan", "train")


def csv_labels(rows: bytes) -> list[Label]:
    return parsed(HEADER + rows)


def parsed(data: bytes) -> list[Label]:
    return [label for _, label in parse_table(io.BytesIO(data), source="labels.csv")]


# CSV


def test_csv_rows_become_labels_in_order():
    assert csv_labels(b"2.jpg,BMW,test\n1.jpg,Audi Sedan,train\n") == [Label("2.jpg", "BMW", "test"), SEDAN]


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(b"\xef\xbb\xbf" + HEADER + b"1.jpg,Audi Sedan,train\n", id="byte order mark"),
        pytest.param(b"img_name,class,subset\r\n1.jpg,Audi Sedan,train\r\n", id="CRLF"),
        pytest.param(HEADER + b"1.jpg,Audi Sedan,train", id="no last line end"),
        pytest.param(HEADER + b"\n1.jpg,Audi Sedan,train\n\n", id="empty lines"),
        pytest.param(HEADER + b"1.jpg, Audi Sedan ,train \n", id="spaces"),
        pytest.param(b"year,subset,class,img_name\n2012,train,Audi Sedan,1.jpg\n", id="other order, more columns"),
        pytest.param(b"img_name, class , subset\n1.jpg,Audi Sedan,train\n", id="spaces around columns"),
        pytest.param(b"img_name,class,subset\r1.jpg,Audi Sedan,train\r", id="CR"),
    ],
)
def test_csv_dialects_are_supported(data):
    assert parsed(data) == [SEDAN]


@pytest.mark.parametrize(
    ("spelling", "subset"),
    [("Train", "train"), ("TRAIN", "train"), ("Training", "train"), ("test", "test"), ("TESTING", "test"),
     ("val", "val"), ("Valid", "val"), ("VALIDATION", "val"), ("dev", "val")],
)  # fmt: skip
def test_subsets_have_several_spellings(spelling: str, subset: str):
    assert [label.subset for label in csv_labels(f"1.jpg,Audi Sedan,{spelling}\n".encode())] == [subset]


def test_classes_are_in_unicode_normal_form():
    rows = "1.jpg,Citro\u00ebn,train\n2.jpg,Citroe\u0308n,train\n".encode()
    assert {label.label for label in csv_labels(rows)} == {"Citro\u00ebn"}


def test_csv_names_may_contain_commas_slashes_and_accents():
    assert csv_labels('"a,b/c.jpg","Citroën C/V, Van",test\n'.encode()) == [
        Label("a,b/c.jpg", "Citroën C/V, Van", "test")
    ]


def test_a_csv_without_a_column_is_refused_with_the_existing_columns():
    with pytest.raises(LabelsError, match=r"labels\.csv: no column class;.*'img_name', 'label'"):
        parsed(b"img_name,label\n1.jpg,Audi\n")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (b",Audi,train\n", "line 3: the photo's name is empty"),
        (b"2.jpg, ,train\n", "line 3: the class of 2.jpg is empty"),
        (b"2.jpg,Audi,learn\n", "line 3: the subset is 'learn'; expected train, val or test"),
        (b"2.jpg,Audi,\n", "line 3: the subset is ''; expected train, val or test"),
        (b"2.jpg,Audi, Coupe,train\n", "line 3: 4 fields, but the first line has 3.*quotes"),
        (b"2.jpg,Audi\n", "line 3: 2 fields"),
        (b'2.jpg,"Audi,train\n', "line 3: not valid CSV"),
        (b"2.jpg,Citro\xebn,train\n", "line 3: not UTF-8"),
        (b"2.jpg,Au\0di,train\n", "line 3: not valid CSV .a NUL"),
        (b'2.jpg,"two\nlines",train\n', r"line 4: the class 'two\\nlines' has a line break"),
    ],
)
def test_a_bad_csv_row_is_reported_with_its_line(row, message):
    with pytest.raises(LabelsError, match=message):
        csv_labels(b"1.jpg,Audi Sedan,train\n" + row)


def test_bad_csv_rows_are_listed_together():
    rows = b"".join(b"%d.jpg,%s,train\n" % (i, b"Audi" if i % 2 else b"") for i in range(14))
    with pytest.raises(LabelsError, match=r"line 2: .*line 4: .*line 10: the class of 8.jpg .* 2 more lines are wrong"):
        csv_labels(rows)


@pytest.mark.parametrize("invisible", ["\u200b", "\u200c", "\u200d", "\u2060", "\ufeff"])
def test_characters_of_no_width_are_not_part_of_a_class(invisible: str):
    assert csv_labels(f"1.jpg,{invisible}Audi{invisible} Sedan,train{invisible}\n".encode()) == [SEDAN]


@pytest.mark.parametrize(("data", "message"), [(b"", "no column img_name"), (HEADER, "no labels in it")])
def test_an_empty_csv_is_an_error(data, message):
    with pytest.raises(LabelsError, match=message):
        parsed(data)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (b"1.jpg,BMW,train\n", r"line 4: 1.jpg is BMW, but Audi Sedan at line 2"),
        (b"1.jpg,Audi Sedan,test\n", r"line 4: 1.jpg is Audi Sedan \(test\), but Audi Sedan \(train\)"),
    ],
)
def test_a_contradiction_is_reported_with_both_lines(row: bytes, message: str):
    data = io.BytesIO(HEADER + b"1.jpg,Audi Sedan,train\n1.jpg,Audi Sedan,train\n" + row)
    with pytest.raises(LabelsError, match=message):
        raise_contradictions(parse_table(data, source="labels.csv"), ["1.jpg"], 1)


def test_contradictions_are_reported_together():
    rows = b"".join(b"%d.jpg,%s,train\n" % (i, label) for i in range(3) for label in (b"Audi", b"BMW"))
    with pytest.raises(LabelsError, match=r"line 3: 0.jpg is BMW.*line 7: 2.jpg is BMW.*; and 4 more\. Keep") as error:
        raise_contradictions(parse_table(io.BytesIO(HEADER + rows), source="labels.csv"), ["0.jpg", "2.jpg"], 6)
    assert str(error.value).count("labels.csv") == 1


def test_bad_lines_of_one_cause_are_listed_together_and_the_table_is_named_once():
    rows = b"".join(b"%d.jpg,Audi,eval\n" % i for i in range(7)) + b"7.jpg,Audi\n"
    with pytest.raises(LabelsError) as error:
        parsed(HEADER + rows)
    assert str(error.value) == (
        "labels.csv, lines 2, 3, 4, 5, 6: the subset is 'eval'; expected train, val or test. 3 more lines are wrong."
    )


def test_bad_lines_of_several_causes_are_listed_by_cause():
    with pytest.raises(LabelsError) as error:
        parsed(HEADER + b"0.jpg,Audi,eval\n1.jpg,,train\n2.jpg,Audi,eval\n")
    assert str(error.value) == (
        "labels.csv, lines 2, 4: the subset is 'eval'; expected train, val or test; line 3: the class of 1.jpg is "
        "empty."
    )


def test_a_labels_error_is_a_user_error():
    assert issubclass(LabelsError, UserError)


# Devkit


def devkit(class_ids: list[int], fields: tuple[str, ...] = ("bbox_x1", "class", "fname")) -> bytes:
    """Return an annotations file in MATLAB's layout: a 1 x N struct array."""
    annotations = np.zeros((1, len(class_ids)), dtype=[(field, object) for field in fields])
    for number, class_id in enumerate(class_ids):
        values = {"bbox_x1": 3, "class": class_id, "fname": f"{number + 1:05d}.jpg"}
        annotations[0, number] = tuple(values[field] for field in fields)
    return mat(annotations=annotations)


def mat(**variables) -> bytes:
    buffer = io.BytesIO()
    savemat(buffer, variables)
    return buffer.getvalue()


META = mat(class_names=np.array([["Acura RL", "Ram C/V Van"]], dtype=object))


def devkit_labels(annos: bytes, meta: bytes = META) -> list[Label]:
    return [label for _, label in parse_devkit(annos, meta, subset="test", source="annos.mat")]


def test_devkit_class_ids_start_at_one():
    assert devkit_labels(devkit([2, 1])) == [
        Label("00001.jpg", "Ram C/V Van", "test"),
        Label("00002.jpg", "Acura RL", "test"),
    ]


def test_a_devkit_of_one_photo_is_read():
    assert devkit_labels(devkit([1])) == [Label("00001.jpg", "Acura RL", "test")]


@pytest.mark.parametrize("class_id", [0, 3, 1.5])
def test_a_class_id_outside_the_meta_file_is_reported_with_its_photo(class_id):
    with pytest.raises(LabelsError, match=rf"annos\.mat, annotation 2 \(00002\.jpg\): class {class_id}.*1 to 2"):
        devkit_labels(devkit([1, class_id]))


def test_the_devkit_test_file_without_classes_gets_advice():
    with pytest.raises(LabelsError, match=r"no field class .*bbox_x1, fname.*cars_test_annos_withlabels\.mat"):
        devkit_labels(devkit([1, 2], fields=("bbox_x1", "fname")))


def test_swapped_devkit_files_are_refused():
    with pytest.raises(LabelsError, match="no variable 'annotations'"):
        devkit_labels(META, devkit([1]))


def test_a_broken_meta_file_is_reported():
    with pytest.raises(LabelsError, match=r"annos\.mat \(its meta file\): no variable 'class_names'"):
        devkit_labels(devkit([1]), devkit([1]))


@pytest.mark.parametrize("data", [b"", b"not a MATLAB file" * 20, devkit([1, 2])[:-30]])
def test_a_file_that_is_not_a_mat_file_is_refused(data):
    with pytest.raises(LabelsError, match=r"annos\.mat: not a readable \.mat file"):
        devkit_labels(data)
