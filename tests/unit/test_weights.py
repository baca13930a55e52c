"""Pretrained weights: verified by hash, and never allowed to run code."""

import hashlib
import io
import pickle
import subprocess
import sys
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save

from carclass import storage
from carclass.errors import UserError
from carclass.models import weights

STATE = {"conv.weight": torch.arange(6.0).reshape(2, 3), "bn.bias": torch.ones(2, dtype=torch.float16)}


def load(uri: str | Path, sha256: str | None = None) -> tuple[dict[str, torch.Tensor], str]:
    return weights.load_weights(str(uri), sha256, sample="backbone.safetensors", key="train.parent")


def cache_file(uri: str | Path, sha256: str | None = None, cache: str | Path = "/nowhere") -> weights.WeightsFile:
    return weights.cache_weights(str(uri), sha256, sample="backbone.safetensors", cache=str(cache), key="train.parent")


def to_pth(value: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def to_pkl(protocol: int | None = None) -> bytes:
    arrays = {name: tensor.numpy() for name, tensor in STATE.items()}
    return pickle.dumps({"model": arrays, "__author__": "zoo"}, protocol)


@pytest.fixture
def write(tmp_path: Path) -> Any:
    def write(name: str, data: bytes) -> Path:
        (tmp_path / name).write_bytes(data)
        return tmp_path / name

    return write


class Trap:
    """An object that makes a folder when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.mkdir, (self.path,))


# Formats


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("w.safetensors", save(STATE)),
        ("w.pth", to_pth(STATE)),
        ("w.pt", to_pth(STATE)),
        ("checkpoint.pth", to_pth({"model": STATE, "iteration": 7})),
        *(("w.pkl", to_pkl(protocol)) for protocol in range(2, 6)),
        ("w.pkl", to_pkl(3).replace(b"numpy._core", b"numpy.core")),  # numpy 1's, as in the zoo
    ],
)
def test_tensors_keep_names_and_dtypes_of_the_file(write: Any, name: str, data: bytes):
    tensors, digest = load(write(name, data), storage.sha256(data))
    assert digest == storage.sha256(data)
    assert {name: tensor.dtype for name, tensor in tensors.items()} == {name: t.dtype for name, t in STATE.items()}
    assert all(torch.equal(tensors[name], tensor) for name, tensor in STATE.items())


@pytest.mark.parametrize(("name", "data"), [("w.safetensors", save(STATE)), ("w.pth", to_pth(STATE))])
def test_formats_without_code_need_no_hash(write: Any, name: str, data: bytes):
    assert load(write(name, data))[1] == storage.sha256(data)


def test_weights_in_the_package_match_their_sha256_files():
    names = [path.name for path in resources.files("carclass.sample").iterdir() if path.name.endswith(".safetensors")]
    assert sorted(names) == ["backbone.safetensors", "detector.safetensors"]
    for name in names:
        weights.load_weights("sample", None, sample=name, key="train.parent")


# Rejected files


def test_a_file_with_another_hash_is_rejected_before_it_is_opened(write: Any, tmp_path: Path):
    path = write("w.pkl", pickle.dumps(Trap(tmp_path / "ran")))
    with pytest.raises(UserError, match=r"`train.parent`: .*w.pkl has sha256 [0-9a-f]{64}, expected 0{64}"):
        load(path, "0" * 64)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("trap_in", ["whole file", "weights", "beside the weights"])
@pytest.mark.parametrize("job", [load, cache_file])
def test_a_pickle_cannot_run_code_even_with_the_right_hash(write: Any, tmp_path: Path, job: Any, trap_in: str):
    trap = Trap(tmp_path / "ran")
    values = {"whole file": trap, "weights": {"model": {"a": trap}}, "beside the weights": {"model": {}, "a": trap}}
    data = pickle.dumps(values[trap_in])
    with pytest.raises(UserError, match=r"`train.parent`: .*w.pkl is damaged, or .* refers to pathlib.Path.mkdir"):
        job(write("w.pkl", data), storage.sha256(data))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("use", ["open('/dev/null')", "__import__('socket').socket()"])
def test_the_sandbox_opens_no_files_or_sockets(use: str):
    code = f"import socket; from carclass.models import unpickle; unpickle.drop_privileges(); {use}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "Too many open files" in done.stderr


def test_reading_a_pickle_has_a_time_limit(write: Any, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(weights, "UNPICKLE_SECONDS", 0.01)
    with pytest.raises(UserError, match=r"`train.parent`: .*w.pkl was not read within 0.01 s"):
        load(write("w.pkl", to_pkl()), storage.sha256(to_pkl()))


@pytest.mark.parametrize("name", ["w.pth", "w.pt"])
@pytest.mark.parametrize("whole_file", [True, False])
def test_a_torch_checkpoint_cannot_run_code(write: Any, tmp_path: Path, name: str, whole_file: bool):
    trap = Trap(tmp_path / "ran")
    path = write(
        name, pickle.dumps(trap, protocol=2) if whole_file else to_pth({"conv.weight": torch.ones(1), "x": trap})
    )
    with pytest.raises(UserError, match="damaged, or is not a plain state dict"):
        load(path)
    assert not (tmp_path / "ran").exists()


def test_the_error_does_not_advise_to_trust_the_file(write: Any, tmp_path: Path):
    with pytest.raises(UserError) as caught:
        load(write("w.pth", to_pth({"x": Trap(tmp_path / "ran")})))
    assert "weights_only" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("w.safetensors", b""),
        ("w.safetensors", save(STATE)[:-3]),
        ("w.pth", b""),
        ("w.pth", b"hello"),
        ("w.pth", to_pth(STATE)[:200]),
        ("w.pth", to_pth([STATE])),
        ("w.pth", to_pth({"conv": STATE})),
        ("w.pkl", b""),
        ("w.pkl", to_pkl()[:-3]),
        ("w.pkl", pickle.dumps({"weights": {}})),
        ("w.pkl", pickle.dumps({"model": {"conv.weight": "a string"}})),
    ],
)
def test_a_damaged_file_is_named_in_the_error(write: Any, name: str, data: bytes):
    with pytest.raises(UserError, match=f"`train.parent`: .*{name} is damaged"):
        load(write(name, data), storage.sha256(data))


def test_a_missing_file_is_named_in_the_error(tmp_path: Path):
    with pytest.raises(UserError, match=r"`train.parent`: .*nothing.pth cannot be read"):
        load(tmp_path / "nothing.pth")


def test_an_unsupported_format_is_rejected_with_the_supported_ones(write: Any):
    with pytest.raises(UserError, match=r"w.h5 must end in .safetensors, .pth, .pt or .pkl"):
        load(write("w.h5", b"hdf"))


# Cached weights


def test_a_pickle_is_converted_once(write: Any, tmp_path: Path):
    digest = storage.sha256(to_pkl())
    path = write("w.pkl", to_pkl())
    cached = cache_file(path, digest, tmp_path / "cache")
    before = Path(cached.uri).stat()
    path.unlink()  # from now on the cached file is read alone
    assert cache_file(path, digest, tmp_path / "cache") == cached
    after = Path(cached.uri).stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


def test_a_converted_pickle_holds_its_tensors_and_has_a_hash(write: Any, tmp_path: Path):
    digest = storage.sha256(to_pkl())
    cached = cache_file(write("w.pkl", to_pkl()), digest, tmp_path / "cache")
    assert cached.uri == str(tmp_path / "cache" / f"{digest}.safetensors")
    tensors, sha256 = load(cached.uri, cached.sha256)
    assert sha256 == cached.sha256
    assert {name: tensor.dtype for name, tensor in tensors.items()} == {name: t.dtype for name, t in STATE.items()}
    assert all(torch.equal(tensors[name], tensor) for name, tensor in STATE.items())


@pytest.mark.parametrize("damage", [b"", save({"conv.weight": torch.zeros(2, 3)})])
def test_a_damaged_cached_file_is_converted_again(write: Any, tmp_path: Path, damage: bytes):
    path, digest = write("w.pkl", to_pkl()), storage.sha256(to_pkl())
    cached = cache_file(path, digest, tmp_path / "cache")
    Path(cached.uri).write_bytes(damage)
    assert cache_file(path, digest, tmp_path / "cache") == cached
    assert storage.sha256(Path(cached.uri).read_bytes()) == cached.sha256


@pytest.mark.parametrize(("name", "data"), [("w.safetensors", save(STATE)), ("w.pth", to_pth(STATE))])
def test_files_on_storage_are_not_copied(write: Any, tmp_path: Path, name: str, data: bytes):
    path = write(name, data)
    assert cache_file(path, None, tmp_path / "cache") == (str(path), storage.sha256(data))
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("name", ["w.safetensors", "w.pkl"])
def test_a_file_with_another_hash_is_not_cached(write: Any, tmp_path: Path, name: str):
    with pytest.raises(UserError, match=r"sha256 [0-9a-f]{64}, expected 0{64}"):
        cache_file(write(name, pickle.dumps(Trap(tmp_path / "ran"))), "0" * 64, tmp_path / "cache")
    assert not (tmp_path / "ran").exists()
    assert not (tmp_path / "cache").exists()


def test_the_sample_weights_are_not_copied(tmp_path: Path):
    cached = cache_file("sample", None, tmp_path / "cache")
    assert (cached.uri, cached.sha256) == ("sample", load("sample")[1])


# First use


def test_a_pickle_without_a_hash_is_converted_and_its_hash_recorded(write: Any, tmp_path: Path):
    path = write("w.pkl", to_pkl())
    cached = cache_file(path, None, tmp_path / "cache")
    assert cached == cache_file(path, storage.sha256(to_pkl()), tmp_path / "cache")
    (record,) = (tmp_path / "cache" / "first_use").iterdir()
    assert record.read_text() == f"{storage.sha256(to_pkl())}  {path}\n"


def test_a_recorded_pickle_is_not_needed_again(write: Any, tmp_path: Path):
    path = write("w.pkl", to_pkl())
    cached = cache_file(path, None, tmp_path / "cache")
    path.unlink()
    assert cache_file(path, None, tmp_path / "cache") == cached


def test_another_pickle_than_the_recorded_one_is_refused(write: Any, tmp_path: Path):
    cached = cache_file(write("w.pkl", to_pkl()), None, tmp_path / "cache")
    Path(cached.uri).unlink()
    changed = pickle.dumps({"model": {"conv.weight": torch.zeros(2, 3).numpy()}})
    with pytest.raises(UserError, match=rf"w.pkl has sha256 {storage.sha256(changed)}, but had .* at its first use"):
        cache_file(write("w.pkl", changed), None, tmp_path / "cache")


def test_a_given_hash_overrules_the_recorded_one(write: Any, tmp_path: Path):
    cache_file(write("w.pkl", to_pkl()), None, tmp_path / "cache")
    changed = pickle.dumps({"model": {"conv.weight": torch.zeros(2, 3).numpy()}})
    cached = cache_file(write("w.pkl", changed), storage.sha256(changed), tmp_path / "cache")
    assert list(load(cached.uri)[0]) == ["conv.weight"]


def test_files_of_one_name_have_records_of_their_own(write: Any, tmp_path: Path):
    for folder, data in (("a", to_pkl(2)), ("b", to_pkl(3))):
        (tmp_path / folder).mkdir()
        cached = cache_file(write(f"{folder}/w.pkl", data), None, tmp_path / "cache")
        assert weights.converted_from(cached.uri) == storage.sha256(data)


def test_a_damaged_record_is_named_in_the_error(write: Any, tmp_path: Path):
    path = write("w.pkl", to_pkl())
    cache_file(path, None, tmp_path / "cache")
    (record,) = (tmp_path / "cache" / "first_use").iterdir()
    record.write_bytes(b"")
    with pytest.raises(UserError, match=rf"{record}, the record of the weights' sha256, is damaged. Delete it"):
        cache_file(path, None, tmp_path / "cache")


@pytest.mark.parametrize("data", [b"hello", pickle.dumps(Trap(Path("ran")))])
def test_a_file_that_cannot_be_read_is_not_recorded(write: Any, tmp_path: Path, data: bytes):
    with pytest.raises(UserError, match="is damaged"):
        cache_file(write("w.pkl", data), None, tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_of_two_first_uses_the_later_one_is_checked(write: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path, parse = write("w.pkl", to_pkl()), weights._parse

    def parse_slowly(*args: Any) -> Any:
        monkeypatch.setattr(weights, "_parse", parse)
        cache_file(write("w.pkl", to_pkl(2)), None, tmp_path / "cache")  # by another job meanwhile
        return parse(*args)

    monkeypatch.setattr(weights, "_parse", parse_slowly)
    with pytest.raises(UserError, match="at its first use"):
        cache_file(path, None, tmp_path / "cache")


# The publisher's prefix


def md5(data: bytes) -> str:
    return hashlib.md5(data).hexdigest()


def test_a_pickle_of_the_zoo_begins_with_the_md5_in_its_name(write: Any, tmp_path: Path):
    cached = cache_file(write(f"model_final_{md5(to_pkl())[:6]}.pkl", to_pkl()), None, tmp_path / "cache")
    assert weights.converted_from(cached.uri) == storage.sha256(to_pkl())


def test_a_pickle_of_the_zoo_with_another_md5_is_refused(write: Any, tmp_path: Path):
    path = write("model_final_f10217.pkl", to_pkl())
    with pytest.raises(UserError, match=rf"the md5 {md5(to_pkl())}, which by its name begins with f10217"):
        cache_file(path, None, tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_a_given_hash_overrules_the_published_prefix(write: Any, tmp_path: Path):
    path = write("model_final_f10217.pkl", to_pkl())
    assert cache_file(path, storage.sha256(to_pkl()), tmp_path / "cache").sha256


def test_named_weights_have_the_hash_in_their_file_name():
    for name in ("imagenet", "imagenet-v2"):
        source = weights.NAMED_WEIGHTS[name]
        assert source.sha256 is not None
        assert source.sha256.startswith(source.uri.rsplit("-", 1)[1].removesuffix(".pth"))
