"""Weights are data: checked by hash, and never allowed to run code."""

import http.server
import io
import pickle
import subprocess
import sys
import threading
from collections.abc import Iterator
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
    return weights.load(str(uri), sha256, sample="backbone.safetensors", key="train.parent")


def localise(uri: str | Path, sha256: str | None = None, cache: str | Path = "/nowhere") -> weights.WeightsFile:
    return weights.fetch(str(uri), sha256, sample="backbone.safetensors", cache=str(cache), key="train.parent")


def pth(value: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def pkl(protocol: int | None = None) -> bytes:
    arrays = {name: tensor.numpy() for name, tensor in STATE.items()}
    return pickle.dumps({"model": arrays, "__author__": "zoo"}, protocol)


@pytest.fixture
def file(tmp_path: Path) -> Any:
    def file(name: str, data: bytes) -> Path:
        (tmp_path / name).write_bytes(data)
        return tmp_path / name

    return file


class Trap:
    """Makes a folder when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.mkdir, (self.path,))


# What is read


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("w.safetensors", save(STATE)),
        ("w.pth", pth(STATE)),
        ("w.pt", pth(STATE)),
        ("checkpoint.pth", pth({"model": STATE, "iteration": 7})),
        *(("w.pkl", pkl(protocol)) for protocol in range(2, 6)),
        ("w.pkl", pkl(3).replace(b"numpy._core", b"numpy.core")),  # numpy 1's, as in the zoo
    ],
)
def test_tensors_come_back_by_name_in_the_files_own_dtype(file: Any, name: str, data: bytes):
    found, digest = load(file(name, data), storage.sha256(data))
    assert digest == storage.sha256(data)
    assert {name: tensor.dtype for name, tensor in found.items()} == {name: t.dtype for name, t in STATE.items()}
    assert all(torch.equal(found[name], tensor) for name, tensor in STATE.items())


@pytest.mark.parametrize(("name", "data"), [("w.safetensors", save(STATE)), ("w.pth", pth(STATE))])
def test_formats_that_run_no_code_need_no_hash(file: Any, name: str, data: bytes):
    assert load(file(name, data))[1] == storage.sha256(data)


def test_the_packages_own_weights_match_the_hash_beside_them():
    names = [path.name for path in resources.files("carclass.sample").iterdir() if path.name.endswith(".safetensors")]
    assert sorted(names) == ["backbone.safetensors", "detector.safetensors"]
    for name in names:
        weights.load("sample", None, sample=name, key="train.parent")


# What is refused


def test_a_file_with_another_hash_is_refused_before_it_is_opened(file: Any, tmp_path: Path):
    path = file("w.pkl", pickle.dumps(Trap(tmp_path / "ran")))
    with pytest.raises(UserError, match=r"`train.parent`: .*w.pkl has sha256 [0-9a-f]{64}, expected 0{64}"):
        load(path, "0" * 64)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("uri", ["/data/w.pkl", "s3://bucket/w.pkl", "https://example.org/w.pth"])
@pytest.mark.parametrize("job", [load, localise])
def test_what_has_to_be_trusted_needs_a_hash(uri: str, job: Any):
    with pytest.raises(UserError, match=r"opened only with a known sha256.* set `train.parent_sha256`"):
        job(uri)


@pytest.mark.parametrize("trap_in", ["whole file", "weights", "beside the weights"])
@pytest.mark.parametrize("job", [load, localise])
def test_a_pickle_that_would_run_code_does_not_run_it_though_its_hash_is_pinned(
    file: Any, tmp_path: Path, job: Any, trap_in: str
):
    trap = Trap(tmp_path / "ran")
    values = {"whole file": trap, "weights": {"model": {"a": trap}}, "beside the weights": {"model": {}, "a": trap}}
    data = pickle.dumps(values[trap_in])
    with pytest.raises(UserError, match=r"`train.parent`: .*w.pkl is damaged, or .* asks for pathlib.Path.mkdir"):
        job(file("w.pkl", data), storage.sha256(data))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("use", ["open('/dev/null')", "__import__('socket').socket()"])
def test_the_process_that_reads_pickles_can_open_nothing(use: str):
    code = f"import socket; from carclass.models import unpickle; unpickle.drop_privileges(); {use}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "Too many open files" in done.stderr


def test_a_pickle_that_takes_too_long_is_given_up(file: Any, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(weights, "UNPICKLE_SECONDS", 0.01)
    with pytest.raises(UserError, match=r"`train.parent`: .*w.pkl took more than 0.01 s"):
        load(file("w.pkl", pkl()), storage.sha256(pkl()))


@pytest.mark.parametrize("name", ["w.pth", "w.pt"])
@pytest.mark.parametrize("whole_file", [True, False])
def test_a_checkpoint_that_would_run_code_is_refused_and_does_not_run_it(
    file: Any, tmp_path: Path, name: str, whole_file: bool
):
    trap = Trap(tmp_path / "ran")
    path = file(name, pickle.dumps(trap, protocol=2) if whole_file else pth({"conv.weight": torch.ones(1), "x": trap}))
    with pytest.raises(UserError, match="damaged, or holds more than tensors"):
        load(path)
    assert not (tmp_path / "ran").exists()


def test_the_refusal_does_not_advise_to_trust_the_file(file: Any, tmp_path: Path):
    with pytest.raises(UserError) as caught:
        load(file("w.pth", pth({"x": Trap(tmp_path / "ran")})))
    assert "weights_only" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("w.safetensors", b""),
        ("w.safetensors", save(STATE)[:-3]),
        ("w.pth", b""),
        ("w.pth", b"hello"),
        ("w.pth", pth(STATE)[:200]),
        ("w.pth", pth([STATE])),
        ("w.pth", pth({"conv": STATE})),
        ("w.pkl", b""),
        ("w.pkl", pkl()[:-3]),
        ("w.pkl", pickle.dumps({"weights": {}})),
        ("w.pkl", pickle.dumps({"model": {"conv.weight": "a string"}})),
    ],
)
def test_a_damaged_file_is_named(file: Any, name: str, data: bytes):
    with pytest.raises(UserError, match=f"`train.parent`: .*{name} is damaged"):
        load(file(name, data), storage.sha256(data))


def test_a_missing_file_is_named(tmp_path: Path):
    with pytest.raises(UserError, match=r"`train.parent`: .*nothing.pth cannot be read"):
        load(tmp_path / "nothing.pth")


def test_another_format_is_refused_with_those_that_are_read(file: Any):
    with pytest.raises(UserError, match=r"w.h5 is none of .safetensors, .pth, .pt or .pkl"):
        load(file("w.h5", b"hdf"))


# What every process opens


def test_a_pickle_becomes_data_once(file: Any, tmp_path: Path):
    digest = storage.sha256(pkl())
    path = file("w.pkl", pkl())
    local = localise(path, digest, tmp_path / "cache")
    before = Path(local.uri).stat()
    path.unlink()  # what is kept stands for it
    assert localise(path, digest, tmp_path / "cache") == local
    after = Path(local.uri).stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


def test_the_data_of_a_pickle_holds_its_tensors_and_is_pinned(file: Any, tmp_path: Path):
    digest = storage.sha256(pkl())
    local = localise(file("w.pkl", pkl()), digest, tmp_path / "cache")
    assert local.uri == str(tmp_path / "cache" / f"{digest}.safetensors")
    found, sha256 = load(local.uri, local.sha256)
    assert sha256 == local.sha256
    assert {name: tensor.dtype for name, tensor in found.items()} == {name: t.dtype for name, t in STATE.items()}
    assert all(torch.equal(found[name], tensor) for name, tensor in STATE.items())


@pytest.mark.parametrize("damage", [b"", save({"conv.weight": torch.zeros(2, 3)})])
def test_data_that_is_not_what_was_written_is_made_again(file: Any, tmp_path: Path, damage: bytes):
    path, digest = file("w.pkl", pkl()), storage.sha256(pkl())
    local = localise(path, digest, tmp_path / "cache")
    Path(local.uri).write_bytes(damage)
    assert localise(path, digest, tmp_path / "cache") == local
    assert storage.sha256(Path(local.uri).read_bytes()) == local.sha256


@pytest.mark.parametrize(("name", "data"), [("w.safetensors", save(STATE)), ("w.pth", pth(STATE))])
def test_data_on_storage_stays_where_it_is_and_is_pinned(file: Any, tmp_path: Path, name: str, data: bytes):
    path = file(name, data)
    assert localise(path, None, tmp_path / "cache") == (str(path), storage.sha256(data))
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("name", ["w.safetensors", "w.pkl"])
def test_nothing_is_made_of_a_file_with_another_hash(file: Any, tmp_path: Path, name: str):
    with pytest.raises(UserError, match=r"sha256 [0-9a-f]{64}, expected 0{64}"):
        localise(file(name, pickle.dumps(Trap(tmp_path / "ran"))), "0" * 64, tmp_path / "cache")
    assert not (tmp_path / "ran").exists()
    assert not (tmp_path / "cache").exists()


def test_the_sample_stays_in_the_package_and_is_pinned(tmp_path: Path):
    local = localise("sample", None, tmp_path / "cache")
    assert (local.uri, local.sha256) == ("sample", load("sample")[1])


# What comes from the web


@pytest.fixture
def web(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, list[str]]]:
    """A web server with /w.safetensors, its address and the requests it got; the user's cache is empty."""
    requests: list[str] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            requests.append(self.path)
            self.send_response(200 if self.path == "/w.safetensors" else 404)
            self.end_headers()
            self.wfile.write(save(STATE))

        def log_message(self, *_: Any) -> None:
            pass

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", requests
        server.shutdown()


def test_a_download_is_kept_and_fetched_once(web: tuple[str, list[str]]):
    address, requests = web
    for _ in range(2):
        found, _ = load(f"{address}/w.safetensors", storage.sha256(save(STATE)))
    assert torch.equal(found["conv.weight"], STATE["conv.weight"])
    assert requests == ["/w.safetensors"]


def test_a_download_is_kept_as_data_on_storage(web: tuple[str, list[str]], tmp_path: Path):
    address, requests = web
    digest = storage.sha256(save(STATE))
    local = localise(f"{address}/w.safetensors", digest, tmp_path / "root")
    assert local.uri == str(tmp_path / "root" / f"{digest}.safetensors")
    assert torch.equal(load(local.uri, local.sha256)[0]["conv.weight"], STATE["conv.weight"])
    assert requests == ["/w.safetensors"]


def test_a_download_with_another_hash_is_refused_and_not_kept(web: tuple[str, list[str]], tmp_path: Path):
    address, _ = web
    with pytest.raises(UserError, match=r"expected 0{64}"):
        load(f"{address}/w.safetensors", "0" * 64)
    assert storage.list_files(str(tmp_path / "cache")) == []


def test_a_download_that_is_not_there_is_named(web: tuple[str, list[str]]):
    address, _ = web
    with pytest.raises(UserError, match=r"nothing.pth cannot be read \(HTTP Error 404"):
        load(f"{address}/nothing.pth", "0" * 64)


def test_named_weights_have_the_hash_that_their_file_name_promises():
    for name in ("imagenet", "imagenet-v2"):
        source = weights.NAMED_WEIGHTS[name]
        assert source.sha256 is not None
        assert source.sha256.startswith(source.uri.rsplit("-", 1)[1].removesuffix(".pth"))
