"""Config files: what is written is what a setting gets, and ambiguous YAML is refused with its line."""

from pathlib import Path
from typing import Any

import pytest

from carclass.config import cli, yaml_file
from carclass.config.schema import Config
from carclass.errors import UserError
from cluster import prepare_aws


def read(folder: Path, text: str) -> dict[str, Any]:
    return yaml_file.read(write(folder, text))


def write(folder: Path, text: str) -> Path:
    path = folder / "my.yml"
    path.write_bytes(text.encode())
    return path


def refuse(folder: Path, text: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        read(folder, text)
    assert "my.yml" in str(caught.value)
    assert "\n" not in str(caught.value)


# Keys


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("root: a\ntrain: {}\nroot: b", "`root` is given twice, in lines 1 and 3"),
        ("train:\n  unfrozen: {lr: 1}\n  seed: 1\n  unfrozen: {epochs: 2}", "`train.unfrozen` .* lines 2 and 4"),
        ("masks:\n- {source: a}\n- source: b\n  source: c", "`masks.1.source` is given twice, in lines 3 and 4"),
        ("fixed:\n  train.seed: 1\n  'train.seed': 2", "`fixed.train.seed` is given twice"),
        ("classes: {2: car, '2': bus}", "`classes.2` is given twice"),
    ],
)
def test_a_key_given_twice_is_refused_with_both_lines(tmp_path: Path, text: str, message: str):
    refuse(tmp_path, text, message)


def test_a_merged_key_may_be_given_again(tmp_path: Path):
    text = "base: &base {epochs: 3, seed: 1}\none: {<<: *base, epochs: 5}\ntwo: {<<: [*base, {seed: 2, lr: 3}]}"
    values = read(tmp_path, text)
    assert values["one"] == {"epochs": "5", "seed": "1"}
    assert values["two"] == {"epochs": "3", "seed": "1", "lr": "3"}


@pytest.mark.parametrize("key", ["no", "2024-01-01", "007", "true", "1e3"])
def test_a_key_is_the_text_that_is_written(tmp_path: Path, key: str):
    assert read(tmp_path, f"{key}: a") == {key: "a"}


def test_a_section_without_values_is_refused(tmp_path: Path):
    refuse(tmp_path, "train:\n  frozen:\n  #  epochs: 3\n", "line 2: `train.frozen` has no value")
    refuse(tmp_path, "root:\n", "line 1: `root` has no value. Write the folder or s3:// prefix for all results")


def test_a_key_given_twice_in_the_file_of_the_cluster_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "aws.yaml").write_text("cluster_name: a\nmax_workers: ${N}\nmax_workers: 2\n")
    monkeypatch.setattr(prepare_aws, "FOLDER", tmp_path)
    with pytest.raises(UserError, match=r"aws.yaml: `max_workers` is given twice, in lines 2 and 3"):
        prepare_aws.read_template()


# Values


@pytest.mark.parametrize("name", ["no", "on", "012", "1e3", "1.10", "1_000", "2024-01-01", "7", "true", "0x1F"])
def test_a_name_that_looks_like_a_number_a_date_or_a_truth_value_is_a_name(tmp_path: Path, name: str):
    path = write(tmp_path, f"root: r\ntrain: {{name: {name}, dataset: {name}}}\n")
    train: Any = cli.load_config(path, {}, Config).train
    assert (train.name, train.dataset) == (name, name)


@pytest.mark.parametrize(("text", "value"), [("1e-3", 1e-3), ("2E-4", 2e-4), (".5", 0.5), ("1", 1.0)])
def test_every_spelling_of_a_number_is_a_number(tmp_path: Path, text: str, value: float):
    config: Any = cli.load_config(write(tmp_path, f"root: r\ntrain: {{name: x, frozen: {{lr: {text}}}}}"), {}, Config)
    assert config.train.frozen.lr == value


@pytest.mark.parametrize("text", ["12:30", "2024-01-01", "0x1F", "yes"])
def test_text_that_yaml_may_read_as_a_number_is_no_number(tmp_path: Path, text: str):
    path = write(tmp_path, f"root: r\ntrain: {{name: x, frozen: {{epochs: {text}}}}}")
    with pytest.raises(UserError, match=rf"`train.frozen.epochs`: must be an integer \(got '{text}'\)"):
        cli.load_config(path, {}, Config)


@pytest.mark.parametrize(("text", "value"), [("true", True), ("no", False), ("on", True), ("null", None)])
def test_truth_values_and_null_are_read_where_they_are_expected(tmp_path: Path, text: str, value: bool | None):
    config: Any = cli.load_config(write(tmp_path, f"root: r\ntrain: {{name: x, use_gpu: {text}}}"), {}, Config)
    assert config.train.use_gpu is value


@pytest.mark.parametrize("start", ["", "\ufeff"])
def test_windows_files_are_read(tmp_path: Path, start: str):
    assert read(tmp_path, f"{start}root: a\r\nname: b\r\n") == {"root": "a", "name": "b"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train:\n\tname: x", "line 2: .*Indent with spaces, not with tabs"),
        ("root: a\n---\nroot: b", "line 2: .*another document"),
        ("root: !!int x", "line 1: `root` has the tag `.*int`, which is not supported"),
        ("root: !!python/object/apply:os.getcwd []", "has the tag"),
        ("? [a, b]\n: c", "line 1: the file has a key that is not text"),
        ("root: *other", "line 1: found undefined alias"),
        ("root: &a [*a]", "an alias contains itself"),
        ("root: " + "[" * 5000, "nested too deeply"),
        ("root: \x00", "#x0000"),
        ("root: {<<: 3}", "`root.<<` merges a value that is not a mapping"),
    ],
)
def test_text_that_is_no_plain_yaml_is_refused_in_one_paragraph(tmp_path: Path, text: str, message: str):
    refuse(tmp_path, text, message)


def test_aliases_that_multiply_are_refused(tmp_path: Path):
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 9)]
    refuse(tmp_path, "\n".join(lines), "expands to more than 100000 values")


# Variables


@pytest.mark.parametrize(
    "value",
    ["/a #b", "a: b", 'say "x"', "it's", "line\nbreak", "{a: 1}", "- x", "[1", "%", "*a", "!!int 3", "#", "${HOME}"],
)
@pytest.mark.parametrize("text", ["${V}", "'${V}'", '"${V}"', "${OTHER:-}${V}"])
def test_the_value_of_a_variable_is_not_parsed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, value: str):
    monkeypatch.setenv("V", value)
    monkeypatch.delenv("OTHER", raising=False)
    assert read(tmp_path, f"root: {text}\nlist: [{text}, {{a: {text}}}]") == {
        "root": value,
        "list": [value, {"a": value}],
    }


def test_a_default_may_contain_yaml_syntax(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("V", raising=False)
    assert read(tmp_path, "root: ${V:-a: b #c}  # d") == {"root": "a: b #c"}


def test_a_variable_in_a_comment_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("V", raising=False)
    assert read(tmp_path, "# ${V}\nroot: a  # or ${V}\n") == {"root": "a"}


@pytest.mark.parametrize(("text", "value"), [("null", None), ("", None), ("~", None), ("3", "3")])
def test_a_variable_alone_may_be_null(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, value: str | None):
    monkeypatch.setenv("V", text)
    assert read(tmp_path, "patience: ${V}") == {"patience": value}


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("root: ${V}", "root"),
        ("root: '${V}'", "root"),
        ('root: " ${V}${V} "', "root"),
        ("root: r\ntrain: {name: '${V}'}", "train.name"),
        ("root: r\ntrain: {name: x, frozen: {lr: ${V}}}", "train.frozen.lr"),
        ("root: r\ntrain: {name: x, frozen: {epochs: '${V:-}'}}", "train.frozen.epochs"),
        ("root: r\nmask: {cutout: {fill: [1, '${V}', 3]}}", "mask.cutout.fill.1"),
    ],
)
def test_a_variable_that_is_empty_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, key: str):
    monkeypatch.setenv("V", "")
    with pytest.raises(UserError, match=rf"`{key}`: .*\$\{{V.*\}} is empty: set the variable") as caught:
        cli.load_config(write(tmp_path, text), {}, Config)
    assert "null" not in str(caught.value)


def test_an_empty_variable_is_not_blamed_for_a_value_of_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("V", "")
    with pytest.raises(UserError, match=r"^`--train.frozen.lr`: must be a number \(got 'x'\)$"):
        cli.load_config(
            write(tmp_path, "root: r\ntrain: {name: x, frozen: {lr: ${V}}}"), {"train.frozen.lr": "x"}, Config
        )


def test_a_quoted_variable_is_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("V", "null")
    assert read(tmp_path, "name: '${V}'") == {"name": "null"}


def test_two_dollars_stand_for_one(tmp_path: Path):
    assert read(tmp_path, "root: /a/$${V}/$b") == {"root": "/a/${V}/$b"}


@pytest.mark.parametrize("text", ["${V", "${V-x}", "${}", "${A B}"])
def test_another_syntax_of_the_shell_is_refused(tmp_path: Path, text: str):
    refuse(tmp_path, f"a: 1\nroot: {text}", "line 2: `root` has `")


def test_written_settings_are_read_again_as_they_were():
    values = {"a": "${V}", "b": "no", "c": "1e3", "d": None, "e": ["012", "2024-01-01"], "f": "x #y: z", "g": {}}
    assert yaml_file.parse(yaml_file.dump(values).decode(), "x") == values


# Command line


def test_an_option_given_twice_is_refused(tmp_path: Path):
    path = str(write(tmp_path, "root: r\ntrain: {name: x}"))
    with pytest.raises(UserError, match="`--seed` is given 2 times"):
        cli.parse_job("A job.", "train", ["--config", path, "--seed", "1", "--seed=2"])


def test_a_stage_is_skipped_on_the_command_line(tmp_path: Path):
    path = str(write(tmp_path, "root: r\ntrain: {name: x, unfrozen: {lr: 1}}"))
    config: Any = cli.parse_job("A job.", "train", ["--config", path, "--unfrozen", "null"])
    assert config.train.unfrozen is None
    config = cli.parse_job("A job.", None, ["--config", path, "--train.frozen", "null"])
    assert (config.train.frozen, config.train.unfrozen.lr) == (None, 1)


@pytest.mark.parametrize("argv", [("--unfrozen", "null", "--unfrozen.lr", "1"), ("--unfrozen", "{lr: 1}")])
def test_a_skipped_stage_has_no_settings(tmp_path: Path, argv: tuple[str, ...]):
    path = str(write(tmp_path, "root: r\ntrain: {name: x}"))
    with pytest.raises(UserError, match=r"`--unfrozen.lr` has no effect|--unfrozen: invalid choice"):
        cli.parse_job("A job.", "train", ["--config", path, *argv])


def test_a_key_given_twice_on_the_command_line_is_refused(tmp_path: Path):
    path = str(write(tmp_path, "root: r\nmask: {}"))
    with pytest.raises(UserError, match="`2` is given twice"):
        cli.parse_job("A job.", "mask", ["--config", path, "--detector.classes", "{2: car, 2: bus}"])
