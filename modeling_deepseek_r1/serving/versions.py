"""Which checkpoint answers: the one that is served, or beside it a candidate that gets a share of the requests."""

import hashlib
import random
from dataclasses import dataclass
from typing import Any

from .engine import Engine
from .media import MediaLimits
from .prompts import Prompts
from .protocol import ApiError, Sampling
from .texts import response_template


class Version:
    """A model behind the API: its engine, and what makes tokens of requests and texts of tokens.

    Args:
        name: as clients call it.
        engine: not started yet; runs as long as the application.
        tokenizer: the checkpoint's, a fast one.
        processor: of a model with other modalities.
        media: limits of images and sound.

    Attributes:
        modalities: besides text, that its requests may have.

    Raises:
        ValueError: a tokenizer without a backend, which cannot decode token by token.
    """

    def __init__(self, name: str, engine: Engine, tokenizer: Any, processor: Any = None, media: MediaLimits | None = None):
        if getattr(tokenizer, "backend_tokenizer", None) is None:
            raise ValueError(f"{type(tokenizer).__name__} is not a fast tokenizer; serving needs a tokenizer.json")
        self.name, self.engine, self.tokenizer = name, engine, tokenizer
        model = engine.model
        placeholders = getattr(model.config, "placeholders", None)
        size = model.get_input_embeddings().num_embeddings
        self.prompts = Prompts(tokenizer, size, processor, placeholders, media)
        self.modalities = self.prompts.modalities
        self.template = response_template(tokenizer)
        ends = model.generation_config.eos_token_id
        self.ends = set(ends if isinstance(ends, list) else [ends]) - {None}


@dataclass(frozen=True)
class Canary:
    """A candidate beside the served version.

    Attributes:
        version: whose name tells it from the served one.
        share: of the requests that ask for the served one, 0 ... 1.

    Raises:
        ValueError: another share.
    """

    version: Version
    share: float

    def __post_init__(self):
        if not 0 <= self.share <= 1:
            raise ValueError(f"a canary's share of {self.share:g} must lie in 0 ... 1")


class Versions:
    """The served version and its canary.

    Raises:
        ValueError: both are called the same.
    """

    def __init__(self, stable: Version, canary: Canary | None = None):
        self.stable, self.canary = stable, canary
        self.all = [stable] if canary is None else [stable, canary.version]
        self.by_name = {version.name: version for version in self.all}
        if len(self.by_name) < len(self.all):
            raise ValueError(f"the canary is called {stable.name!r} like the served version; give it another name")

    def named(self, name: str) -> Version:
        """ApiError 404 where there is none of this name."""
        if name not in self.by_name:
            raise ApiError(
                404, f"no model {name!r} here, only {', '.join(map(repr, self.by_name))}", "model_not_found", "model"
            )
        return self.by_name[name]

    def choose(self, request: Sampling) -> Version:
        """The version for a request: the one it names, and of those for the served one a share goes to the canary.

        Requests of the same `safety_identifier`, else `user`, else `prompt_cache_key`, go to the same version, and stay there when
        the share grows. Others are drawn.
        """
        asked = self.named(request.model or self.stable.name)
        if self.canary is None or asked is not self.stable:
            return asked
        identity = request.safety_identifier or request.user or request.prompt_cache_key
        digest = hashlib.sha256(identity.encode("utf-8", "surrogatepass")).digest() if identity else b""
        place = int.from_bytes(digest[:8], "big") / 2**64 if identity else random.random()
        return self.canary.version if place < self.canary.share else self.stable
