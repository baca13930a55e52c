"""Preflight check of a pipeline with a cluster: devices and memory, together with all other problems."""

from pathlib import Path

import pytest

from carclass.config.schema import Config
from carclass.data.inventory import Inventory
from carclass.errors import UserError
from carclass.experiments.pipeline_preflight import check_pipeline
from tests.helpers.chain import chain_settings

pytestmark = pytest.mark.usefixtures("ray_cluster")


def test_devices_and_memory_are_compared_before_the_first_photo(photos_folder: Path, tmp_path: Path):
    values = chain_settings(str(tmp_path), str(photos_folder))
    values["mask"]["use_gpu"] = True
    values["train"]["unfrozen"]["batch_size"] = 10_000_000
    with Inventory() as inventory, pytest.raises(UserError) as error:
        check_pipeline(Config.model_validate(values), inventory)
    assert "2 problems, all found before the first step" in str(error.value)
    assert "`mask.use_gpu` asks for 1 GPU(s)" in str(error.value)
    assert "`train.unfrozen.batch_size`: 10000000 photos" in str(error.value)
    assert not (tmp_path / "datasets").exists()
