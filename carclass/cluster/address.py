"""Address of the Ray cluster that a job joins, probed before Ray connects: Ray itself waits for minutes."""

import os
import re

import grpc
import ray
from ray._private import services
from ray._private.authentication.authentication_token_setup import maybe_enable_token_auth_if_token_available
from ray._private.grpc_utils import init_grpc_channel
from ray.core.generated.gcs_service_pb2 import CheckAliveRequest  # type: ignore[attr-defined]  # protobuf adds it
from ray.core.generated.gcs_service_pb2_grpc import NodeInfoGcsServiceStub
from ray.exceptions import AuthenticationError

from carclass.errors import UserError

LOCAL, AUTO = "local", "auto"
PROBE_S = 5.0
"""Seconds in which a cluster has to answer."""
HOST_AND_PORT = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[^\s:/@\[\]]+):([1-9]\d{0,4})")
SUBMIT = "From another machine, submit the job: python jobs/submit.py --address http://HOST:8265 -- COMMAND"
UNSET = "or unset RAY_ADDRESS to start Ray on this machine"


def cluster_address() -> str:
    """Return RAY_ADDRESS: `local`, `auto` or host:port. Raise UserError if no cluster answers there in PROBE_S."""
    given = os.environ.get("RAY_ADDRESS", "").strip() or LOCAL
    if given == LOCAL:
        return LOCAL
    _check_spelling(given)
    try:
        address = services.canonicalize_bootstrap_address_or_die(given)
    except ConnectionError as error:
        cause = "several run" if "multiple" in str(error) else "none runs"
        raise UserError(
            f"RAY_ADDRESS is {given}, the cluster on this machine, but {cause}. Set it to host:port, {UNSET}."
        ) from error
    if given == AUTO:  # for which Ray finds the token by itself
        maybe_enable_token_auth_if_token_available(warn_if_disabled=False)
    _check_answer(given, address)
    return given


def _check_answer(given: str, address: str) -> None:
    """Raise UserError unless a cluster of this version of Ray answers at an address. given: RAY_ADDRESS."""
    try:
        version = _request_version(address)
    except AuthenticationError as error:  # there is no token
        raise refused_token(address) from error
    except grpc.RpcError as error:
        if error.code() == grpc.StatusCode.UNAUTHENTICATED:
            raise refused_token(address) from error
        raise UserError(
            f"RAY_ADDRESS is {given}, but no Ray cluster answers at {address} ({error.details()}). It may have ended: "
            f"set RAY_ADDRESS to host:port of a running one (its port is 6379 by default), {UNSET}."
        ) from error
    if version != ray.__version__:
        raise UserError(
            f"RAY_ADDRESS is {given}, a cluster of Ray {version}, and this environment has Ray {ray.__version__}. Use "
            f"the same version on both, {UNSET}."
        )


def refused_token(address: str) -> UserError:
    """Return the error of a cluster that does not accept this environment's token."""
    file = os.environ.get("RAY_AUTH_TOKEN_PATH", "")
    if file and "RAY_AUTH_TOKEN" not in os.environ and not os.path.isfile(file):
        return UserError(
            f"{address} asks for a token, and RAY_AUTH_TOKEN_PATH is {file}, which is no file. Correct it."
        )
    return UserError(
        f"{address} refuses the token. Set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN_PATH to the file of the cluster's "
        "token, or RAY_AUTH_TOKEN to the token."
    )


def _check_spelling(given: str) -> None:
    """Raise UserError unless an address is `auto` or host:port."""
    match = HOST_AND_PORT.fullmatch(given)
    if given == AUTO or (match and int(match[2]) < 2**16):
        return
    cause = "which is neither host:port, `auto` nor `local`"
    if given.startswith("ray://"):
        cause = "and Ray Client (ray://) is not supported: a job runs on a machine of the cluster"
    elif "://" in given:
        cause = "a URL: a job joins the cluster by host:port"
    raise UserError(f"RAY_ADDRESS is {given}, {cause}. Correct it, {UNSET}. {SUBMIT}.")


def _request_version(address: str) -> str:
    """Return the version of Ray at an address. Raise grpc.RpcError if no cluster answers, or refuses the token."""
    with init_grpc_channel(address, [("grpc.enable_http_proxy", 0)]) as channel:  # as Ray connects
        reply = NodeInfoGcsServiceStub(channel).CheckAlive(CheckAliveRequest(), timeout=PROBE_S)
    return str(reply.ray_version)
