"""Weights from the web: fetched once, resumed, verified, and recorded at first use."""

import hashlib
import logging
import pickle
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save

from carclass import storage
from carclass.config.schema import DetectorSettings, TrainSettings
from carclass.errors import UserError
from carclass.masking import networks
from carclass.models import architectures, weights
from carclass.training import pretrained
from tests.helpers.weights_server import CUT, WeightsServer, serve_weights

STATE = {"conv.weight": torch.arange(100_000.0)}
DATA = save(STATE)
DIGEST = storage.sha256(DATA)


@pytest.fixture
def web(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[WeightsServer]:
    """Start a server of w.safetensors; the user's cache is empty."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with serve_weights() as server:
        server.files["w.safetensors"] = DATA
        yield server


def load(uri: str, sha256: str | None = DIGEST, cache: str | None = None) -> torch.Tensor:
    tensors, _ = weights.load_weights(uri, sha256, sample="", key="train.parent", cache=cache)
    return tensors["conv.weight"]


def zoo_pickle() -> tuple[str, bytes]:
    """Return the name and content of a pickle of the sample detector's weights, as the zoo has them."""
    state, _ = weights.load_weights("sample", None, sample=networks.SAMPLE, key="")
    data = pickle.dumps({"model": {name: tensor.numpy() for name, tensor in state.items()}, "__author__": "zoo"})
    return f"model_final_{hashlib.md5(data).hexdigest()[:6]}.pkl", data


# With a hash


def test_a_download_is_cached_and_fetched_once(web: WeightsServer):
    for _ in range(2):
        assert torch.equal(load(f"{web.address}/w.safetensors"), STATE["conv.weight"])
    assert web.requests == [("/w.safetensors", None)]


@pytest.mark.parametrize("damage", [b"", DATA[:-1]])
def test_a_damaged_download_in_the_cache_is_fetched_again(web: WeightsServer, tmp_path: Path, damage: bytes):
    cached = tmp_path / "cache" / "carclass" / DIGEST
    cached.parent.mkdir(parents=True)
    cached.write_bytes(damage)
    for _ in range(2):
        assert torch.equal(load(f"{web.address}/w.safetensors"), STATE["conv.weight"])
    assert web.requests == [("/w.safetensors", None)]
    assert cached.read_bytes() == DATA


def test_a_download_with_another_hash_is_rejected_and_not_cached(web: WeightsServer, tmp_path: Path):
    with pytest.raises(UserError, match=r"expected 0{64}"):
        load(f"{web.address}/w.safetensors", "0" * 64)
    assert storage.list_files(str(tmp_path / "cache")) == []


def test_a_missing_download_is_named_in_the_error(web: WeightsServer):
    with pytest.raises(UserError, match=r"nothing.pth cannot be read \(HTTP Error 404.*\)\. Correct the address"):
        load(f"{web.address}/nothing.pth")


@pytest.mark.parametrize(
    ("address", "cause"),
    [("http://127.0.0.1:9", "Connection refused"), ("http://models.invalid", "Name|Temporary failure in name")],
)
def test_a_download_without_a_network_names_cause_and_remedy(web: WeightsServer, address: str, cause: str):
    with pytest.raises(UserError, match=rf"net\.pth cannot be read \(\[Errno.*({cause}).*\)\. Check the") as caught:
        load(f"{address}/net.pth")
    assert "on another machine and set `train.parent` to its path" in str(caught.value)


# Interruptions, redirects, proxies


def test_an_interrupted_download_is_resumed_where_it_ended(web: WeightsServer, caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.INFO):
        assert torch.equal(load(f"{web.address}/cut/w.safetensors"), STATE["conv.weight"])
    assert caplog.text.count("weights: interrupted after ") == len(DATA) // CUT
    assert web.requests == [("/cut/w.safetensors", f"bytes={at}-" if at else None) for at in range(0, len(DATA), CUT)]


def test_a_file_that_changes_meanwhile_is_read_again_from_its_start(web: WeightsServer):
    class Changing(dict[str, bytes]):
        def get(self, name: str, default: bytes | None = None) -> bytes | None:  # type: ignore[override]
            if len(web.requests) == 2:
                web.etag = '"2"'
            return save({"conv.weight": torch.ones(100_000)}) if len(web.requests) == 1 else DATA

    web.files = Changing()
    assert torch.equal(load(f"{web.address}/cut/w.safetensors"), STATE["conv.weight"])


def test_a_download_that_always_ends_at_the_same_byte_is_an_error(web: WeightsServer, tmp_path: Path):
    with pytest.raises(UserError, match=r"w.safetensors cannot be read \(IncompleteRead"):
        load(f"{web.address}/cut/whole/w.safetensors", None, str(tmp_path / "weights"))
    assert len(web.requests) == 2
    assert not (tmp_path / "weights").exists()


def test_redirects_are_followed(web: WeightsServer):
    assert torch.equal(load(f"{web.address}/moved/w.safetensors"), STATE["conv.weight"])


def test_downloads_go_through_the_proxy_of_the_environment(web: WeightsServer, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("http_proxy", web.address)
    load("http://models.invalid/zoo/w.safetensors")
    assert web.requests == [("http://models.invalid/zoo/w.safetensors", None)]


def test_the_progress_of_a_download_is_logged(web: WeightsServer, caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.INFO):
        load(f"{web.address}/w.safetensors")
    assert f"weights: downloading {web.address}/w.safetensors" in caplog.text


# Without a hash


def test_the_zoo_needs_no_hash(web: WeightsServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    name, data = zoo_pickle()
    web.files[name] = data
    monkeypatch.setitem(networks.ZOO, "sample", f"{web.address}/zoo/{name}")
    settings = DetectorSettings(model="sample")
    pinned = networks.pin_weights(settings, str(tmp_path))
    assert networks.pin_weights(settings, str(tmp_path)) == pinned
    assert pinned.weights == f"{tmp_path}/weights/{storage.sha256(data)}.safetensors"
    networks.build_network(pinned)
    assert len(web.requests) == 1


def test_a_changed_zoo_is_refused(web: WeightsServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    name, data = zoo_pickle()
    web.files[name] = data + b"\0"
    monkeypatch.setitem(networks.ZOO, "sample", f"{web.address}/zoo/{name}")
    with pytest.raises(UserError, match=r"`mask.detector.weights`: .* by its name begins with"):
        networks.pin_weights(DetectorSettings(model="sample"), str(tmp_path / "root"))
    assert not (tmp_path / "root").exists()


@pytest.mark.parametrize(("name", "is_accepted"), [("net-20240131.pth", True), ("net-0123abcd.pth", False)])
def test_a_date_in_a_name_is_no_hash(web: WeightsServer, tmp_path: Path, name: str, is_accepted: bool):
    torch.save(STATE, tmp_path / "net.pth")
    web.files[name] = (tmp_path / "net.pth").read_bytes()
    if is_accepted:
        assert torch.equal(load(f"{web.address}/{name}", None), STATE["conv.weight"])
    else:
        with pytest.raises(UserError, match=r"the sha256 [0-9a-f]{64}, which by its name begins with 0123abcd"):
            load(f"{web.address}/{name}", None)


def test_a_download_is_cached_on_storage_as_safetensors(web: WeightsServer, tmp_path: Path):
    for _ in range(2):
        cached = weights.cache_weights(
            f"{web.address}/w.safetensors", None, sample="", cache=str(tmp_path / "root"), key="mask.detector.weights"
        )
    assert cached.uri == str(tmp_path / "root" / f"{DIGEST}.safetensors")
    assert torch.equal(load(cached.uri, cached.sha256), STATE["conv.weight"])
    assert len(web.requests) == 1


@pytest.mark.slow
def test_the_weights_that_a_run_starts_from_are_recorded(web: WeightsServer, tmp_path: Path):
    net = architectures.build(TrainSettings(name="first").model, 2)
    state = {name: tensor.contiguous() for name, tensor in net.state_dict().items()}
    web.files["net.safetensors"] = save(state)
    settings = TrainSettings(name="first", parent=f"{web.address}/net.safetensors")
    pretrained.check_parent(str(tmp_path), settings)
    web.files["net.safetensors"] = save({name: tensor + 1 for name, tensor in state.items()})
    pretrained.check_parent(str(tmp_path), settings)  # from the user's cache
    (tmp_path / "cache" / "carclass" / storage.sha256(save(state))).unlink()
    with pytest.raises(UserError, match=r"`train.parent`: .*net.safetensors has sha256 .* at its first use, recorded"):
        pretrained.check_parent(str(tmp_path), settings)
