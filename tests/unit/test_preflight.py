"""The preflight check: its messages, and estimates that agree with the memory that PyTorch uses."""

import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pytest
import torch

from carclass.config.schema import FrozenSettings, ModelSettings, TrainSettings, UnfrozenSettings
from carclass.data import dataset, publishing
from carclass.errors import UserError
from carclass.models import architectures, classifier
from carclass.training import checkpoint, preflight
from carclass.training.learner import make_learner
from tests.helpers import inventories

HOUSE = Path(__file__).parents[2]
FP32 = classifier.autocast("fp32", torch.device("cpu"))
SMALL = ModelSettings(architecture="resnet26-narrow", image_size=96)
GB = 10**9


def train_settings(**changes: object) -> TrainSettings:
    return TrainSettings(name="first", parent="sample", model=SMALL).model_copy(update=changes)


def of_size(train: int, val: int, num_classes: int = 10) -> dataset.Dataset:
    """Return a dataset with counts, but without photos."""
    classes = [f"class {i}" for i in range(num_classes)]
    return dataset.Dataset("root/datasets/v2", {"splits": {"train": train, "val": val, "test": 0}, "classes": classes})


def of_rows(root: Path, rows: list[tuple[str, str]]) -> dataset.Dataset:
    """Publish a dataset. rows: label and split."""
    uri, settings = dataset.dataset_uri(str(root), "v2"), {"dataset": "v2"}
    columns = [
        {"image_id": "00", "key": f"{i}", "label": label, "split": split, "width": 1, "height": 1, "image": b""}
        for i, (label, split) in enumerate(rows)
    ]
    publishing.write_part(uri, "parts", pa.Table.from_pylist(columns, dataset.ROW), settings)
    classes = sorted({label for label, _ in rows})
    keys = [row["key"] for row in columns]
    return publishing.publish_manifest(
        inventories.complete_dataset(uri, keys, settings=settings, classes=classes, facts={})
    )


@pytest.fixture(scope="module")
def net() -> torch.nn.Module:
    return architectures.build(SMALL, 10)


# The whole


def test_a_run_that_fits_passes_without_warnings(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    source = of_rows(tmp_path, [("a", "train"), ("b", "train"), ("a", "val")])
    preflight.check_run(str(tmp_path), train_settings(), source, use_gpu=False, object_store=GB, memory=8 * GB)
    assert caplog.text == ""


def test_unknown_memory_is_not_checked(tmp_path: Path):
    source = of_rows(tmp_path, [("a", "train"), ("b", "train"), ("a", "val")])
    settings = train_settings(unfrozen=UnfrozenSettings(batch_size=10**6))
    preflight.check_run(str(tmp_path), settings, source, use_gpu=True, object_store=GB, memory=None)


# Classes


def test_classes_without_train_photos_are_listed_in_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    preflight.check_classes(of_rows(tmp_path, [("a", "train"), ("b", "train"), ("c", "test"), ("d", "val")]))
    assert "2 classes have no train photo and will never be predicted: c, d" in caplog.text


def test_fewer_than_two_classes_with_train_photos_are_an_error(tmp_path: Path):
    source = of_rows(tmp_path, [("a", "train"), ("b", "test"), ("c", "val")])
    with pytest.raises(
        UserError, match=r"`train.dataset`: `v2` has train photos of 1 of its 3 classes, .* or choose another"
    ):
        preflight.check_classes(source)


def test_balanced_sampling_of_equal_classes_is_a_warning(caplog: pytest.LogCaptureFixture):
    preflight.check_sampling(train_settings(sampling="balanced"), Counter(a=3, b=3))
    assert "all classes have 3 train photos, so `train.sampling: balanced` has no effect" in caplog.text


@pytest.mark.parametrize(("sampling", "rare"), [("uniform", 3), ("balanced", 2)])
def test_sampling_that_has_an_effect_or_is_the_default_is_no_warning(
    caplog: pytest.LogCaptureFixture, sampling: str, rare: int
):
    preflight.check_sampling(train_settings(sampling=sampling), Counter(a=3, b=rare))
    assert caplog.text == ""


# Object store


def test_photos_larger_than_the_object_store_are_a_warning_with_the_size_that_fits(caplog: pytest.LogCaptureFixture):
    settings = train_settings(model=ModelSettings(image_size=300))
    preflight.check_object_store(settings, of_size(8000, 2000), 2 * GB)
    assert "10,000 photos of `v2` take 2.7 GB when decoded to 300 pixels (`train.model.image_size`)" in caplog.text
    assert "largest object store has 2.0 GB" in caplog.text
    assert "Up to 258 pixels fit" in caplog.text


def test_photos_that_just_fit_into_the_object_store_are_no_warning(caplog: pytest.LogCaptureFixture):
    preflight.check_object_store(train_settings(model=ModelSettings(image_size=258)), of_size(8000, 2000), 2 * GB)
    assert caplog.text == ""


def test_photos_are_decoded_before_training_only_if_all_fit():
    settings = train_settings(model=ModelSettings(image_size=258))
    assert preflight.decoded_size(settings, of_size(8000, 2000), 2 * GB) == 258
    assert preflight.decoded_size(settings, of_size(8000, 2100), 2 * GB) is None


# Disk


def test_a_full_disk_is_an_error_before_anything_is_written(tmp_path: Path, net: torch.nn.Module):
    many = train_settings(keep_checkpoints=10**8)
    with pytest.raises(UserError, match=r"`root`: .* GB free, and run `first` needs up to .* `train.keep_checkpoints`"):
        preflight.check_disk(str(tmp_path / "not" / "there"), many, of_size(10, 5), net)
    assert list(tmp_path.iterdir()) == []


def test_free_space_is_not_checked_on_s3(net: torch.nn.Module):
    preflight.check_disk("s3://bucket/root", train_settings(keep_checkpoints=10**8), of_size(10, 5), net)


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_the_estimate_of_disk_space_agrees_with_checkpoints(tmp_path: Path, net: torch.nn.Module, optimizer: str):
    settings = train_settings(
        frozen=None, unfrozen=UnfrozenSettings(optimizer=optimizer, keep_epochs=(3, 7)), keep_checkpoints=3
    )
    assert settings.unfrozen is not None
    net.prepare_stage(settings.unfrozen)
    net.get_submodule("fc").eval()
    learner = make_learner(net, settings.unfrozen, FP32, seed=1)
    net(torch.rand(1, 3, 96, 96)).sum().backward()
    learner.optimizer.step()
    checkpoint.write_checkpoint(str(tmp_path), checkpoint.take_snapshot("epoch-0001-00000064", learner, {}))
    whole = sum(path.stat().st_size for path in (tmp_path / "epoch-0001-00000064").iterdir())
    weights = (tmp_path / "epoch-0001-00000064" / "weights.safetensors").stat().st_size
    assert preflight.disk_bytes(settings, of_size(10, 5), net) == pytest.approx(3 * whole + 8 * weights, rel=0.02)


def test_the_estimate_of_disk_space_includes_features(net: torch.nn.Module):
    both = [
        preflight.disk_bytes(train_settings(frozen=FrozenSettings(views=views)), of_size(1000, 100), net)
        for views in (1, 3)
    ]
    assert both[1] - both[0] == 2 * 1000 * 512 * 2


# Memory: messages


def test_a_batch_too_large_for_a_gpu_is_an_error_with_the_size_that_fits(net: torch.nn.Module):
    def check(batch_size: int) -> None:
        settings = train_settings(unfrozen=UnfrozenSettings(batch_size=batch_size), num_workers=2)
        preflight.check_memory(settings, of_size(10, 5), net, 2 * GB, use_gpu=True)

    with pytest.raises(
        UserError, match=r"`train.unfrozen.batch_size`: 5000 photos of 96 pixels over 2 worker"
    ) as caught:
        check(5000)
    assert "don't fit into 2.0 GB of a GPU" in str(caught.value)
    fitting = int(str(caught.value).split("Up to ")[1].split(" fit")[0])
    assert 850 < fitting < 1000  # 2 MB a photo, of about 1 GB on each
    check(fitting)
    with pytest.raises(UserError):
        check(fitting + 1)


@pytest.mark.slow
def test_a_batch_too_large_for_a_gpu_fits_in_micro_batches(net: torch.nn.Module):
    def check(micro_batch_size: int | None) -> None:
        unfrozen = UnfrozenSettings(batch_size=5000, micro_batch_size=micro_batch_size)
        preflight.check_memory(train_settings(unfrozen=unfrozen), of_size(10, 5), net, 2 * GB, use_gpu=True)

    with pytest.raises(UserError, match=r"or set `train.unfrozen.micro_batch_size` to \d+ or less") as caught:
        check(None)
    fitting = int(str(caught.value).split("micro_batch_size` to ")[1].split(" or less")[0])
    check(fitting)
    with pytest.raises(UserError):
        check(fitting + 1)


def test_workers_on_cpus_share_the_memory(net: torch.nn.Module):
    settings = train_settings(unfrozen=UnfrozenSettings(batch_size=256), num_workers=4)
    preflight.check_memory(settings, of_size(10, 5), net, 16 * GB, use_gpu=False)
    with pytest.raises(UserError, match=r"don't fit into 1.0 GB of memory for each worker"):
        preflight.check_memory(settings, of_size(10, 5), net, 4 * GB, use_gpu=False)


@pytest.mark.parametrize(("train_size", "key"), [(None, "train.model.image_size"), (64, "train.unfrozen.train_size")])
def test_the_error_has_a_remedy_if_not_even_one_photo_fits(net: torch.nn.Module, train_size: int | None, key: str):
    settings = train_settings(frozen=None, unfrozen=UnfrozenSettings(train_size=train_size))
    with pytest.raises(UserError, match=rf"Not even one fits, lower `{key}`, or use more or larger"):
        preflight.check_memory(settings, of_size(10, 5), net, GB // 2, use_gpu=True)


def test_too_many_views_are_an_error_with_the_number_that_fits(net: torch.nn.Module):
    settings = train_settings(frozen=FrozenSettings(views=500))
    with pytest.raises(
        UserError, match=r"`train.frozen.views`: features of 500 views of `v2`, 41 MB each, .* Up to 24 f"
    ):
        preflight.check_memory(settings, of_size(10_000, 1000), net, 2 * GB, use_gpu=True)


# Memory: estimates


def test_the_estimate_includes_weights_gradients_moments_and_average(net: torch.nn.Module):
    settings = train_settings(precision="fp32")
    assert settings.unfrozen is not None
    net.prepare_stage(settings.unfrozen)
    net.get_submodule("fc").eval()
    learner = make_learner(net, settings.unfrozen, FP32, seed=1)
    assert learner.ema is not None
    net(torch.rand(1, 3, 96, 96)).sum().backward()
    learner.optimizer.step()
    parameters = list(net.parameters())
    moments = [value for state in learner.optimizer.state.values() for value in state.values()]
    tensors = [*net.state_dict().values(), *learner.ema.state_dict().values(), *moments]
    tensors += [parameter.grad for parameter in parameters]
    estimate = preflight.step_memory(settings, settings.unfrozen, net, use_gpu=True).fixed
    assert estimate == pytest.approx(sum(tensor.nbytes for tensor in tensors), rel=0.02)


@pytest.fixture
def cpu_with_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    """Count this CPU as one that computes in bfloat16: sizes of tensors are estimated without computing."""
    monkeypatch.setattr("carclass.models.precision._has_fast_bf16", lambda _: True)


@pytest.mark.slow
@pytest.mark.usefixtures("cpu_with_bf16")
@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_the_estimate_on_a_cpu_includes_folded_weights_and_the_checkpoint_that_is_being_written(
    net: torch.nn.Module, precision: classifier.Precision
):
    settings = train_settings(precision=precision)
    assert settings.unfrozen is not None
    memory = {
        use_gpu: preflight.step_memory(settings, settings.unfrozen, net, use_gpu=use_gpu) for use_gpu in (True, False)
    }
    weights = sum(tensor.nbytes for tensor in net.state_dict().values())
    folded = sum(tensor.nbytes for tensor in net.parameters() if tensor.ndim == 4) if precision == "fp32" else 0
    assert memory[False].fixed - memory[True].fixed == pytest.approx(4 * weights + folded, rel=0.02)


def test_an_elastic_run_is_checked_with_the_fewest_workers_on_gpus_and_the_most_on_cpus(net: torch.nn.Module):
    settings = train_settings(unfrozen=UnfrozenSettings(batch_size=5000), num_workers=(2, 4))
    for use_gpu, num_workers in ((True, 2), (False, 4)):
        with pytest.raises(UserError, match=rf"over {num_workers} worker\(s\)"):
            preflight.check_memory(settings, of_size(10, 5), net, 4 * GB, use_gpu=use_gpu)


@pytest.mark.slow
@pytest.mark.usefixtures("cpu_with_bf16")
@pytest.mark.parametrize(("precision", "bytes_per_value"), [("fp32", 4), ("bf16", 2)])
def test_on_a_gpu_the_input_of_every_norm_is_counted(precision: classifier.Precision, bytes_per_value: int):
    """A GPU does not fold BatchNorm into the convolution before it."""
    settings, plain = train_settings(precision=precision), architectures.build(SMALL, 10)
    outputs: list[int] = []
    for layer in plain.modules():
        if isinstance(layer, torch.nn.Conv2d):
            layer.register_forward_hook(lambda _, __, output: outputs.append(output.numel()))
    plain.eval().to("meta")(torch.empty(1, 3, 96, 96, device="meta"))
    expected = bytes_per_value * sum(outputs)
    net = plain.to_empty(device="cpu")
    on_cpu, on_gpu = (
        preflight.saved_bytes(net, settings, 2, use_gpu=use_gpu)
        - preflight.saved_bytes(net, settings, 1, use_gpu=use_gpu)
        for use_gpu in (False, True)
    )
    assert on_gpu - on_cpu == pytest.approx(expected, rel=0.02)


def test_a_measured_step_replaces_the_estimate(net: torch.nn.Module):
    def check(step: preflight.StepMemory | None) -> None:
        settings = train_settings(frozen=None, unfrozen=UnfrozenSettings(batch_size=100))
        preflight.check_memory(settings, of_size(10, 5), net, 2 * GB, use_gpu=True, step=step)

    check(None)
    with pytest.raises(UserError, match=r"and libraries take 900 MB and each photo 25 MB. Up to 36 fit"):
        check(preflight.StepMemory(100_000_000, 25_000_000))


@pytest.mark.slow
def test_every_photo_of_a_step_takes_the_same_memory(net: torch.nn.Module):
    for use_gpu in (True, False):
        one, two, nine = (preflight.saved_bytes(net, train_settings(), count, use_gpu=use_gpu) for count in (1, 2, 9))
        assert nine - one == 8 * (two - one)


STEP = """
import sys, torch
from carclass.config.schema import ModelSettings, TrainSettings
from carclass.models import architectures, classifier
from carclass.training import learner, preflight

precision = sys.argv[1]
settings = TrainSettings(
    name="x", precision=precision, model=ModelSettings(architecture="resnet26-narrow", image_size=96)
)
net = architectures.build(settings.model, 10)
net.prepare_stage(settings.unfrozen)
autocast = classifier.autocast(precision, torch.device("cpu"))
optimizer = learner.make_learner(net, settings.unfrozen, autocast, seed=1).optimizer
net.fc.eval()

def peak(num_photos):
    photos = torch.ones(num_photos, 3, 96, 96).to(memory_format=torch.channels_last)
    with autocast:
        logits = net(photos)
    loss = torch.nn.functional.cross_entropy(logits.float(), torch.zeros(num_photos, dtype=torch.int64))
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    optimizer.step()
    return 1024 * int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0])

small, large = peak(48), peak(144)
one, two = (preflight.saved_bytes(net, settings, count, use_gpu=False) for count in (1, 2))
print((large - small) / 96, two - one)
"""


@pytest.mark.slow  # 10 s each
@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak of resident memory from /proc")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_estimate_per_photo_agrees_with_the_memory_used(precision: str):
    # malloc returns every large block at once, so that freed memory is not measured.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(1 << 18), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", STEP, precision]
    done = subprocess.run(command, capture_output=True, text=True, cwd=HOUSE, env=environment, timeout=300, check=True)
    measured, estimated = map(float, done.stdout.split())
    assert estimated == pytest.approx(measured, rel=0.15)


@pytest.mark.parametrize(("epochs", "expected"), [(1, True), (2, False)])
def test_a_stage_that_is_all_warm_up_is_warned_about(caplog: pytest.LogCaptureFixture, epochs: int, expected: bool):
    preflight.check_warmup(train_settings(unfrozen=UnfrozenSettings(epochs=epochs)))
    assert ("all 1 epoch(s) of the unfrozen stage are warm-up" in caplog.text) == expected
