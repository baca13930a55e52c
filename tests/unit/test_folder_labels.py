"""Labels from a tree with one folder per class."""

import pytest

from carclass.data.quarantine import Reason
from carclass.ingestion.folder_labels import find_classes
from carclass.ingestion.labels import Label, LabelsError


def folder_labels(*keys: str) -> list[Label]:
    source = "s3://cars"
    return [label for _, label in find_classes(lambda: keys, source=source).labels(keys, source)]


def test_photos_in_class_folders_are_train():
    assert folder_labels("Audi/1.jpg", "BMW/1.jpg") == [
        Label("Audi/1.jpg", "Audi", "train"),
        Label("BMW/1.jpg", "BMW", "train"),
    ]


@pytest.mark.parametrize(
    ("train", "test"), [("train", "test"), ("Train", "Test"), ("TRAIN", "TEST"), ("training", "testing")]
)
def test_subset_folders_contain_class_folders(train: str, test: str):
    keys = f"{train}/Audi/1.jpg", f"{test}/Audi/2.jpg"
    assert folder_labels(*keys) == [Label(keys[0], "Audi", "train"), Label(keys[1], "Audi", "test")]


def test_folders_in_two_unicode_forms_are_one_class():
    assert {label.label for label in folder_labels("Citro\u00ebn/1.jpg", "Citroe\u0308n/2.jpg")} == {"Citro\u00ebn"}


@pytest.mark.parametrize(
    ("shared", "subset"), [("cars/", ""), ("a/b/", ""), ("dataset/", "train/"), ("car_data/car_data/", "train/")]
)
def test_folders_that_all_photos_share_are_no_classes(shared: str, subset: str):
    labels = folder_labels(f"{shared}{subset}Audi/1.jpg", f"{shared}{subset}BMW/2.jpg", "README.md", "logo.jpg")
    assert [label.label for label in labels] == ["Audi", "BMW"]


@pytest.mark.parametrize(
    "key",
    ["README.txt", ".DS_Store", "Audi/.DS_Store", ".cache/Audi/2.jpg", "train/Thumbs.db", "train/desktop.ini",
     "metadata.csv", "docs/metadata.csv", "a/b/c/__pycache__/x.pyc", "__MACOSX/train/Audi/._1.jpg", "x.jpg",
     "train/x.jpg", "../x.jpg"],
)  # fmt: skip
def test_other_files_get_no_label(key: str):
    assert folder_labels("train/Audi/1.jpg", key) == [Label("train/Audi/1.jpg", "Audi", "train")]


SUBSETS = [f"{subset}/{name}/{i}.jpg" for subset in ("train", "test") for name in ("Audi", "BMW") for i in range(10)]


@pytest.mark.parametrize("shared", ["", "cars/"])
@pytest.mark.parametrize(
    "odd",
    ["__MACOSX/Audi/1.jpg", ".git/objects/ab", "lost+found/#1234/1.jpg", "$RECYCLE.BIN/S-1/1.jpg", "@eaDir/x/1.jpg",
     "#recycle/Audi/1.jpg", "found.000/dir0000.chk/1.jpg", ".ipynb_checkpoints/Audi/1-checkpoint.jpg",
     "devkit/matlab/readme.dat", "docs/tex/a/b/main.aux", "code/src/model.cpp"],
)  # fmt: skip
def test_a_folder_without_photos_beside_subsets_is_ignored(shared: str, odd: str):
    keys = [f"{shared}{key}" for key in (*SUBSETS, odd, odd.replace("1", "2"))]
    assert [label.key for label in folder_labels(*keys)] == keys[: len(SUBSETS)]


def test_files_in_a_folder_beside_subsets_are_named():
    keys = [*SUBSETS, "devkit/matlab/readme.dat"]
    reason, detail = find_classes(lambda: keys, source="").problem(keys[-1]) or (None, "")
    assert (reason, detail) == (
        Reason.NO_LABEL,
        "not a photo by its name, in 'devkit' beside the folders of subsets",
    )


@pytest.mark.parametrize("photo", ["1.jpg", "1.PNG", "1"])
def test_a_folder_with_photos_beside_subsets_is_refused_by_name(photo: str):
    with pytest.raises(LabelsError, match=rf"extra/Audi/{photo}: the subset is 'extra'; .*Move the folder extra out"):
        folder_labels(*SUBSETS, f"extra/Audi/{photo}")


def test_photos_of_unusual_endings_in_class_folders_have_labels():
    assert [label.label for label in folder_labels("a/1.cr2", "b/1.jpg", "b/2.svg")] == ["a", "b", "b"]
    assert [label.label for label in folder_labels("a/1.cr2", "b/1.nef")] == ["a", "b"]


def test_double_slashes_make_no_folders():
    assert [label.label for label in folder_labels("Audi//1.jpg", "/BMW/2.jpg")] == ["Audi", "BMW"]


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ([], "no class folders"),
        (["a/x.pdf", "b/notes.txt"], "s3://cars: no photos in it, only files of other kinds .* such as a/x.pdf"),
        (["1.jpg", "2.jpg"], "s3://cars: no class folders; .* or the name of a table"),
        (
            ["cars/Audi/1.jpg", "bikes/BMW/2.jpg"],
            "two levels of folders .*no folder of the upper level is train, val or test",
        ),
        (["train/1.jpg", "Valid/2.jpg"], "train/1.jpg is outside of a class folder; expected"),
        (
            ["Audi/1.jpg", "Ram C/V Van/2.jpg", "BMW/3.jpg"],
            r"photos, 1 are 2 folders deep .Ram C/V Van/2.jpg. and 2 are 1 folder deep\..*class name with a slash",
        ),
        (["Audi/1.jpg", "BMW/2.jpg", "validation/BMW/3.jpg"], r"deep .validation/BMW/3.jpg. .* all classes must be in"),
        (["Audi/1.jpg"] * 8 + ["a/Audi/1.jpg"], r"1 are 2 folders deep .a/Audi/1.jpg. and 8 are 1 folder deep"),
        (["train/Ram C/V Van/2.jpg"], "1 are 3 folders deep .train/Ram C/V Van/2.jpg"),
    ],
)
def test_other_trees_are_refused_with_the_location(keys: list[str], message: str):
    with pytest.raises(LabelsError, match=message):
        folder_labels(*keys)


SOUND = [f"{name}/{i}.jpg" for name in "ab" for i in range(10)]


@pytest.mark.parametrize("shared", ["", "cars/"])
@pytest.mark.parametrize(
    ("key", "detail"),
    [("a/sub/x.jpg", "deeper"), ("a/a/1.jpg", "deeper"), ("validation/a/1.jpg", "deeper"), ("train/x.jpg", "subset")],
)
def test_a_few_misplaced_photos_get_no_label(shared: str, key: str, detail: str):
    keys = [shared + name for name in (*SOUND, key)]
    folders = find_classes(lambda: keys, source="s3://cars")
    assert [label.key for _, label in folders.labels(keys, "")] == keys[:-1]
    reason, text = folders.problem(keys[-1]) or (None, "")
    assert reason == Reason.NO_LABEL
    assert detail in text


@pytest.mark.parametrize("key", ["test/x.jpg", "test/test/x.jpg", "cars/test/Valid/x.jpg"])
def test_photos_of_a_subset_without_folders_of_classes_get_no_label(key: str):
    shared = "cars/" if key.startswith("cars/") else ""
    keys = [f"{shared}train/{name}" for name in SOUND]
    folders = find_classes(lambda: [*keys, key], source="s3://cars")
    assert [label.key for _, label in folders.labels([*keys, key], "")] == keys
    assert folders.problem(key) == (Reason.NO_LABEL, "in the folder of a subset, outside of the folders of classes")


def test_a_photo_beside_the_shared_folders_gets_no_label():
    keys = [f"cars/{key}" for key in SOUND] + ["other/x.jpg"]
    assert find_classes(lambda: keys, source="").problem("other/x.jpg") == (
        Reason.NO_LABEL,
        "outside of the folders of classes",
    )


def test_a_backslash_in_a_key_makes_no_folder():
    assert [label.label for label in folder_labels("a/0.jpg", "a/x\\y.jpg", "b\\c/1.jpg")] == ["a", "a", "b\\c"]


@pytest.mark.parametrize(
    ("keys", "text"),
    [
        (["Audi/1.jpg", "BMW/2.jpg"], "one folder per class"),
        (["train/Audi/1.jpg", "test/BMW/2.jpg"], "folders of subsets, with one folder per class in each"),
        (["a/b/Audi/1.jpg", "a/b/BMW/2.jpg"], "one folder per class, below a/b"),
    ],
)
def test_the_layout_is_told_in_words(keys: list[str], text: str):
    assert find_classes(lambda: keys, source="").text == text
