"""The port that Ray Serve opens in every replica beside that of HTTP."""

from __future__ import annotations

from typing import Any

_EVERY_INTERFACE = "[::]"


def close_to_others() -> None:
    """Have the replica that this process becomes offer its gRPC server to this machine alone.

    Ray Serve starts one in each replica, for calls between deployments, on every interface. It asks
    nobody who calls, and unpickles what it is sent. Deployments here call each other through Ray
    itself; where RAY_SERVE_USE_GRPC_BY_DEFAULT has them use these servers, Ray's choice stays.

    Raises:
        AttributeError: this Ray starts that server in another way, and it is better not to serve.
    """
    from ray.serve._private import constants, replica

    if constants.RAY_SERVE_USE_GRPC_BY_DEFAULT:
        return
    add_port = replica.add_port_to_grpc_server

    def add_port_here(server: Any, address: str) -> int:
        port: int = add_port(server, address.replace(_EVERY_INTERFACE, "127.0.0.1"))
        return port

    replica.add_port_to_grpc_server = add_port_here
