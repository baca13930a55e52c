"""Resources of a cluster, as training sees them."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from carclass.cluster import resources

REPO = Path(__file__).parents[2]
ONE_GPU = """
import ray
from carclass.cluster import resources
ray.init(address="local", num_cpus=1, num_gpus=1, include_dashboard=False)
print(resources.decide_gpus(None, 2, "train.use_gpu", resources.TRAIN))
"""
THREE_NODES = """
from ray.cluster_utils import Cluster
import ray
from carclass.cluster import resources
nodes = Cluster()
for cpus in (5, 4, 2):
    nodes.add_node(num_cpus=cpus, include_dashboard=False)
ray.init(address=nodes.address)
print(*(resources.cpus_per_worker(count) for count in (1, 2, 3, 5, 6, 100)))
"""


NO_DRIVER = """
import ray
from carclass.cluster import resources
ray.init(address="local", num_cpus=1, num_gpus=1, include_dashboard=False)
resources.decide_gpus(None, 1, "mask.use_gpu", resources.MASK)
"""


def test_the_object_store_is_that_of_the_largest_node(ray_cluster: str):
    assert resources.object_store_bytes() == 500_000_000  # set by the fixture


def test_the_memory_of_the_hosts_is_the_sum_that_ray_reports(ray_cluster: str):
    assert 10**9 < (resources.memory_bytes(use_gpu=False) or 0) < 10**13


@pytest.mark.slow  # 15 s
def test_workers_share_the_cpus_of_nodes_and_none_spans_two():
    done = subprocess.run([sys.executable, "-c", THREE_NODES], capture_output=True, text=True, cwd=REPO, timeout=120)
    assert done.stdout.split()[-6:] == ["5", "4", "2", "2", "1", "1"]


@pytest.mark.slow  # 8 s
def test_fewer_gpus_than_workers_are_not_used_and_a_warning_is_logged():
    done = subprocess.run([sys.executable, "-c", ONE_GPU], capture_output=True, text=True, cwd=REPO, timeout=120)
    assert done.stdout.split()[-1] == "False"
    assert "`train.use_gpu`: 1 GPU(s) for 2 processes, so CPUs are used; start 1 processes to use" in done.stderr


@pytest.mark.slow  # 10 s
@pytest.mark.skipif(torch.cuda.is_available(), reason="the GPU can be used")
def test_a_gpu_that_pytorch_cannot_use_is_an_error_before_work_begins():
    done = subprocess.run([sys.executable, "-c", NO_DRIVER], capture_output=True, text=True, cwd=REPO, timeout=120)
    assert "its GPU cannot be used (Found no NVIDIA driver on your system). This PyTorch needs CUDA" in done.stderr
