"""Makes the name KVFerryConnector known to vLLM, which calls `register` in each of its processes as it starts."""

from __future__ import annotations

NAME = "KVFerryConnector"


def register() -> None:
    """Named by the entry point group `vllm.general_plugins`. Does nothing the second time."""
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory

    try:
        KVConnectorFactory.register_connector(NAME, "kvferry.integrations.vllm", NAME)
    except ValueError as error:
        if "already registered" not in str(error):
            raise
