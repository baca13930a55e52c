"""Pickles of weights: arrays of numbers in a dict are read, and nothing else is built or called."""

import _codecs
import collections
import copyreg
import datetime
import os
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy._core import multiarray

from carclass.errors import UserError
from carclass.models import weights
from carclass.models.unpickle import read_arrays

ARRAY = np.arange(6, dtype=np.float32).reshape(2, 3)


class Call:
    """An object that calls a function when it is unpickled."""

    def __init__(self, function: Callable[..., Any] | type, *args: Any, state: Any = None) -> None:
        self.reduced = (function, args) if state is None else (function, args, state)

    def __reduce__(self) -> tuple[Any, ...]:
        return self.reduced


def model(value: Any) -> bytes:
    return pickle.dumps({"model": {"conv": value}})


# Arrays


@pytest.mark.parametrize("protocol", range(2, 6))
@pytest.mark.parametrize("dtype", ["f2", "<f4", ">f4", "f8", "i8", ">u2", "?"])
def test_arrays_of_numbers_are_read_in_every_protocol(protocol: int, dtype: str):
    array = ARRAY.astype(dtype)
    found = read_arrays(pickle.dumps({"model": {"conv": array, "bias": array[:1].T}}, protocol))
    assert found["conv"].dtype.newbyteorder("=") == np.dtype(dtype).newbyteorder("=")
    assert np.array_equal(found["conv"], array)
    assert np.array_equal(found["bias"], array[:1].T)


def test_reading_another_byte_order_changes_no_other_array():
    read_arrays(model(ARRAY.astype(">f4")))
    assert np.array_equal(read_arrays(model(ARRAY))["conv"], ARRAY)
    assert np.dtype("f4").isnative


def test_plain_values_beside_the_arrays_are_read():
    facts = {"__author__": "zoo", "iteration": 7, "scores": [1.5, (2, None)], "step": np.float64(3.5), "empty": {}}
    content = {"model": collections.OrderedDict(conv=ARRAY), **facts}
    assert np.array_equal(read_arrays(pickle.dumps(content))["conv"], ARRAY)


# Attacks

FOLDER = "made by a pickle"
ATTACKS: dict[str, bytes] = {
    "a function of os": model(Call(os.system, f"mkdir '{FOLDER}'")),
    "eval": model(Call(eval, f"__import__('os').mkdir('{FOLDER}')")),
    "a chain of getattr": model(Call(getattr, Call(__import__, "os"), "mkdir")),
    "a dotted name": b"\x80\x04\x8c\x05numpy\x8c\x0edtype.__base__\x93.",
    "an object array": model(np.array([1, "a"], dtype=object)),
    "an object array of calls": model(np.array([Call(os.mkdir, FOLDER)], dtype=object)),
    "an array of strings": model(np.array(["a"])),
    "an array of records": model(np.zeros(2, [("a", "f4"), ("b", "O")])),
    "an array of dates": model(np.array(["2024-01-01"], dtype="M8[D]")),
    "an array of complex numbers": model(ARRAY.astype(complex)),
    "a class derived from arrays": model(np.ma.masked_array(ARRAY)),
    "a file as an array": model(Call(np.fromfile, "/etc/hostname", "u1")),
    "a mapped file": model(Call(np.memmap, "/etc/hostname", "u1", "r")),
    "a text file": model(Call(np.loadtxt, "/etc/hostname")),
    "a pickle of NumPy's": model(Call(np.load, "/etc/hostname")),
    "copyreg": model(Call(copyreg._reconstructor, object, object, None)),  # type: ignore[attr-defined]
    "a tensor of torch": model(torch.ones(2)),
    "a storage of torch": model(torch.ones(2).untyped_storage()),
    "a nested pickle": model(Call(pickle.loads, pickle.dumps(Call(os.mkdir, FOLDER)))),
    "an array that is called": model(Call(np.ndarray, (2**40,))),
    "a class made without its constructor": b"\x80\x02}X\x05\0\0\0modelcnumpy\nndarray\n(K\x01t\x81s.",
    "a function with other code": model(Call(_codecs.encode, "a", state=(None, {"__code__": 1}))),
    "an extension": b"\x80\x02\x82\x01.",
    "a persistent object": b"Pmodel\n.",
    "a persistent object by value": b"\x80\x02X\x05\0\0\0modelQ.",
    "an old instance": b"(ios\nsystem\n.",
    "an instance by its class": b"(cos\nsystem\nS'true'\no.",
    "a date": model(datetime.date(2024, 1, 1)),
    "nested dicts": model({"weight": ARRAY}),
    "a list": model([1.0, 2.0]),
    "a list of itself": b"\x80\x02}X\x05\0\0\0model](h\0)\x81s.",
    "a key that is no name": pickle.dumps({"model": {1: ARRAY}}),
    "no dict": pickle.dumps([ARRAY]),
    "no model": pickle.dumps({"weights": {}}),
    "no pickle": b"hello",
    "no bytes": b"",
}


@pytest.mark.parametrize("name", ATTACKS)
def test_anything_but_arrays_is_refused_without_a_call(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises((pickle.UnpicklingError, EOFError, LookupError, TypeError, ValueError, AttributeError)):
        read_arrays(ATTACKS[name])
    assert not Path(FOLDER).exists()


BOMBS = {
    "a memo of 2**31 entries": b"\x80\x02Nr" + struct.pack("<I", 2**31 - 1) + b".",
    "nested lists": b"\x80\x02" + b"](" * 400_000 + b"N" + b"e" * 400_000 + b".",
    "an array larger than its bytes": model(Call(multiarray._reconstruct, np.ndarray, (2**45,), b"b")),
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_pickle_that_takes_all_memory_is_refused_in_its_own_process(name: str, tmp_path: Path):
    (tmp_path / "w.pkl").write_bytes(BOMBS[name])
    with pytest.raises(UserError, match=r"`mask.detector.weights`: .*w.pkl is damaged, or is not a plain dict"):
        weights.load_weights(str(tmp_path / "w.pkl"), None, sample="", key="mask.detector.weights")
