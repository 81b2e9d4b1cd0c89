"""A process that serves until it is told to stop."""

import signal
import sys
from typing import Any

import uvicorn
from starlette.applications import Starlette


def serve(app: Starlette, *, host: str = "127.0.0.1", port: int = 8000, grace: float = 30.0, **options: Any) -> None:
    """Runs the application until SIGTERM or SIGINT; requests in progress then have `grace` seconds to end.

    Args:
        app: of `create_app`.
        host, port: where to listen.
        grace: seconds.
        options: further ones of `uvicorn.Config`.

    Raises:
        SystemExit: with code 0 after SIGTERM; 1 where it cannot listen.
        KeyboardInterrupt: after SIGINT.
    """
    # uvicorn raises the signal again once it has stopped.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    config = uvicorn.Config(
        app,
        host=host,
        port=port,
        lifespan="on",
        server_header=False,
        timeout_graceful_shutdown=max(1, round(grace)),
        **options,
    )
    server = uvicorn.Server(config)
    server.run()
    if not server.started:
        sys.exit(1)
