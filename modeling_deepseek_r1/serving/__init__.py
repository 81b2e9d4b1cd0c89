"""A checkpoint behind OpenAI's HTTP API, with requests that join and leave a running batch."""

try:
    import prometheus_client  # noqa: F401
    import pydantic  # noqa: F401
    import starlette  # noqa: F401
    import uvicorn  # noqa: F401
except ImportError as error:
    raise ImportError(f"serving needs {error.name}: pip install 'modeling-deepseek-r1[serve]'") from error

from .app import Settings, create_app
from .engine import Engine
from .media import MediaLimits
from .server import serve
from .versions import Canary, Version

__all__ = ["Canary", "Engine", "MediaLimits", "Settings", "Version", "create_app", "serve"]
