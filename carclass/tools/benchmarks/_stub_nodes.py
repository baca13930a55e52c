"""Nodes without workers: registered at a real GCS, they grant every lease and finish every task at once.

  python -m carclass.tools.benchmarks._stub_nodes ADDRESS NODES.json

Each has a port of its own, since requests do not name the node that they are for. They do not report their resources,
as Ray's streams of resources have no Python interface: the GCS and the head count what they have placed themselves.
"""

# Protobuf adds the names of messages when its modules are imported.
# mypy: disable-error-code=attr-defined

import asyncio
import contextlib
import json
import os
import secrets
import struct
import sys
import time
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any

import grpc
from google.protobuf.descriptor import ServiceDescriptor
from google.protobuf.internal.encoder import _VarintBytes
from google.protobuf.message_factory import GetMessageClass
from ray.core.generated import common_pb2, core_worker_pb2, gcs_pb2, gcs_service_pb2, gcs_service_pb2_grpc
from ray.core.generated import node_manager_pb2 as raylet_pb2

Reply = Callable[[Any, Any], Awaitable[Any]]
HOST = "127.0.0.1"
ID_BYTES = 28
"""Bytes of Ray's ids of nodes and workers."""
HEALTHY = b"\x08\x01"
"""Encoded reply SERVING of gRPC's health check."""
LONG_POLLS = ("PubsubLongPolling", "WaitForActorRefDeleted")
REGISTRATIONS = 16
"""Nodes that are registered at the same time."""


async def main(address: str, kinds: list[dict[str, Any]]) -> None:
    """Register the nodes, print a line, and answer until this process ends. kinds: count, resources, labels of each."""
    servers, nodes = zip(*[await _start(kind) for kind in kinds for _ in range(kind["count"])], strict=True)
    metadata = [("authorization", f"Bearer {os.environ['RAY_AUTH_TOKEN']}")]
    async with grpc.aio.insecure_channel(address) as channel:
        gcs: Any = gcs_service_pb2_grpc.NodeInfoGcsServiceStub(channel)
        cluster = await gcs.GetClusterId(gcs_service_pb2.GetClusterIdRequest(), metadata=metadata)
        metadata.append(("ray_cluster_id", cluster.cluster_id.hex()))
        for start in range(0, len(nodes), REGISTRATIONS):
            requests = [gcs_service_pb2.RegisterNodeRequest(node_info=node) for node in nodes[start:][:REGISTRATIONS]]
            await asyncio.gather(*(gcs.RegisterNode(request, metadata=metadata) for request in requests))
        streams = [_report(channel, node, metadata) for node in nodes]
        print(len(nodes), flush=True)
        await asyncio.gather(*streams, *(server.wait_for_termination() for server in servers))


async def _start(kind: dict[str, Any]) -> tuple[grpc.aio.Server, Any]:
    """Start the server of a node and return it with the node's GcsNodeInfo."""
    node_id = secrets.token_bytes(ID_BYTES)
    server = grpc.aio.server()
    port = server.add_insecure_port(f"{HOST}:0")

    async def lease(_: Any, __: Any) -> Any:
        worker = common_pb2.Address(
            node_id=node_id, ip_address=HOST, port=port, worker_id=secrets.token_bytes(ID_BYTES)
        )
        return raylet_pb2.RequestWorkerLeaseReply(worker_address=worker, worker_pid=1)

    async def prepare(_: Any, __: Any) -> Any:
        return raylet_pb2.PrepareBundleResourcesReply(success=True)

    replies: dict[str, Reply] = {
        "RequestWorkerLease": lease,
        "PrepareBundleResources": prepare,
        "PushTask": _finish_task,
    }
    services = (
        raylet_pb2.DESCRIPTOR.services_by_name["NodeManagerService"],
        core_worker_pb2.DESCRIPTOR.services_by_name["CoreWorkerService"],
    )
    server.add_generic_rpc_handlers((_health_handler(), *(_handler(service, replies) for service in services)))
    await server.start()
    return server, gcs_pb2.GcsNodeInfo(
        node_id=node_id, node_manager_address=HOST, node_manager_hostname=HOST, node_manager_port=port,
        object_manager_port=port, raylet_socket_name=f"stub-{port}", object_store_socket_name=f"stub-{port}",
        resources_total=kind["resources"], labels=kind["labels"],
        state=gcs_pb2.GcsNodeInfo.ALIVE, start_time_ms=int(time.time() * 1000),
    )  # fmt: skip


async def _report(channel: grpc.aio.Channel, node: Any, metadata: list[tuple[str, str]]) -> None:
    """Report a node's resources to the GCS once, which sends them to all nodes, and receive those of the others."""
    view = _encode_map(1, node.resources_total) + _encode_map(2, node.resources_total) + _encode_map(8, node.labels)
    message = b"\x08\x01" + _encode(3, view) + _encode(4, node.node_id)  # 1: the version
    stream: Any = channel.stream_stream("/ray.rpc.syncer.RaySyncer/StartSync")(
        metadata=[*metadata, ("node_id", node.node_id.hex())]
    )
    await stream.write(_encode(1, message))
    while await stream.read() is not grpc.aio.EOF:
        pass


def _encode(field: int, value: bytes) -> bytes:
    """Encode a field of Ray's ray_syncer.proto, which has no Python module: a string, bytes or a message."""
    return bytes([field << 3 | 2]) + _VarintBytes(len(value)) + value


def _encode_map(field: int, values: Mapping[str, float | str]) -> bytes:
    encoded = b""
    for key, value in values.items():
        number = _encode(2, value.encode()) if isinstance(value, str) else b"\x11" + struct.pack("<d", value)
        encoded += _encode(field, _encode(1, key.encode()) + number)
    return encoded


def _handler(service: ServiceDescriptor, replies: dict[str, Reply]) -> Any:
    """Return the handler of a service whose other methods answer with an empty reply."""
    handlers = {}
    for method in service.methods:
        request, reply = GetMessageClass(method.input_type), GetMessageClass(method.output_type)
        answer = _wait_forever if method.name in LONG_POLLS else replies.get(method.name, _answer_empty(reply))
        handlers[method.name] = grpc.unary_unary_rpc_method_handler(
            answer, request_deserializer=request.FromString, response_serializer=reply.SerializeToString
        )
    return grpc.method_handlers_generic_handler(service.full_name, handlers)


def _health_handler() -> Any:
    """Return the handler of gRPC's health check, by which the GCS finds lost nodes."""

    async def check(_: bytes, __: Any) -> bytes:
        return HEALTHY

    handlers = {"Check": grpc.unary_unary_rpc_method_handler(check)}
    return grpc.method_handlers_generic_handler("grpc.health.v1.Health", handlers)


def _answer_empty(reply: Any) -> Reply:
    async def answer(_: Any, __: Any) -> Any:
        return reply()

    return answer


async def _wait_forever(_: Any, __: Any) -> Any:
    await asyncio.Event().wait()


async def _finish_task(request: Any, _: Any) -> Any:
    """Return the reply of a finished task, with b"" as its results."""
    spec = request.task_spec
    results = [
        common_pb2.ReturnObject(object_id=spec.task_id + (i + 1).to_bytes(4, "little"), metadata=b"RAW")
        for i in range(spec.num_returns if spec.type == common_pb2.NORMAL_TASK else 0)
    ]
    return core_worker_pb2.PushTaskReply(return_objects=results)


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(main(sys.argv[1], json.loads(Path(sys.argv[2]).read_text())))
