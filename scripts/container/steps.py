"""The steps of a Dockerfile without docker: a new folder gets what the image gets, commands run there as in the image, the server
starts as in a container, and is asked for its health and for one completion.

    python scripts/container/steps.py CHECKPOINT FOLDER

Where docker is not at hand, this shows that the recipe works on a plain machine with Python. `FROM`, `USER` and the file system of
an image are not imitated. Arguments of the build (`ARG`) are taken from the environment.
"""

import argparse
import contextlib
import json
import os
import re
import secrets
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

HERE = Path(__file__).resolve().parent
CONTEXT = HERE.parents[1]
START_SECONDS = 600
"""Like the start period of the health check."""
NOT_IMITATED = {"FROM", "WORKDIR", "USER", "EXPOSE", "STOPSIGNAL"}


@dataclass
class Image:
    """What a Dockerfile says of a container: variables, and three commands. The folder stands for its WORKDIR."""

    folder: Path
    environment: dict[str, str] = field(default_factory=dict)
    entrypoint: list[str] = field(default_factory=list)
    command: list[str] = field(default_factory=list)
    health: list[str] = field(default_factory=list)

    def run(self, command: list[str] | str, **variables: str) -> subprocess.CompletedProcess:
        """A command in the folder; a text goes through a shell."""
        variables = {**os.environ, **self.environment, **variables}
        return subprocess.run(command, cwd=self.folder, env=variables, shell=isinstance(command, str))


def instructions(dockerfile: Path) -> list[tuple[str, str]]:
    """Names and arguments, lines that go on joined."""
    lines = [line for line in dockerfile.read_text(encoding="utf-8").splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n", " ", "\n".join(lines))
    return [tuple(line.strip().split(None, 1)) for line in joined.splitlines() if line.strip()]


def build(dockerfile: Path, context: Path, folder: Path) -> Image:
    """Takes the steps one by one.

    Raises:
        ValueError: an instruction that is not known here.
        RuntimeError: a command has failed.
    """
    image, arguments = Image(folder), {}
    for name, rest in instructions(dockerfile):
        if name == "COPY":
            *sources, target = rest.split()
            for source in sources:
                place = folder / target / (Path(source).name if target.endswith("/") else "")
                if (context / source).is_dir():
                    shutil.copytree(context / source, place, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
                else:
                    shutil.copyfile(context / source, place)
        elif name == "ARG":
            key, _, value = rest.partition("=")
            arguments[key] = os.environ.get(key, value)
        elif name == "ENV":
            image.environment |= dict(pair.split("=", 1) for pair in rest.split())
        elif name == "RUN":
            if code := image.run(rest, **arguments).returncode:
                raise RuntimeError(f"RUN {rest}: exit code {code}")
        elif name == "HEALTHCHECK":
            image.health = json.loads(rest.partition(" CMD ")[2])
        elif name in ("ENTRYPOINT", "CMD"):
            setattr(image, "entrypoint" if name == "ENTRYPOINT" else "command", json.loads(rest))
        elif name not in NOT_IMITATED:
            raise ValueError(f"{dockerfile} has the instruction {name}, which is not known here")
    return image


@contextlib.contextmanager
def container(image: Image, **variables: str) -> Iterator[subprocess.Popen]:
    """The image's process, stopped in the end as docker stops it."""
    variables = {**os.environ, **image.environment, **variables}
    process = subprocess.Popen([*image.entrypoint, *image.command], cwd=image.folder, env=variables)
    try:
        yield process
        process.terminate()
        process.wait(60)
    finally:
        process.kill()
        process.wait()


def wait_until_healthy(image: Image, process: subprocess.Popen, seconds: float, **variables: str) -> None:
    """RuntimeError where the health check does not succeed in this time, or the process ends."""
    end = time.monotonic() + seconds
    while image.run(image.health, **variables).returncode:
        if process.poll() is not None or time.monotonic() > end:
            raise RuntimeError(f"not healthy; the server's exit code: {process.poll()}")
        time.sleep(0.5)


def complete(port: int, key: str, prompt: str) -> dict:
    """The answer to a request for four tokens."""
    body = json.dumps({"prompt": prompt, "max_tokens": 4}).encode()
    headers = {"content-type": "application/json", "authorization": f"Bearer {key}"}
    request = urllib.request.Request(f"http://127.0.0.1:{port}/v1/completions", body, headers)
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.load(answer)


def try_out(checkpoint: Path, folder: Path, prompt: str = "Hello") -> int:
    """All of it; the exit code of the stopped server. Errors as in `build` and `wait_until_healthy`."""
    image = build(HERE / "Dockerfile", CONTEXT, folder)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    variables = {"CHECKPOINT": str(checkpoint.resolve()), "PORT": str(port), "DEEPSEEK_R1_API_KEY": secrets.token_hex(16)}
    with container(image, **variables) as process:
        wait_until_healthy(image, process, START_SECONDS, **variables)
        print(json.dumps(complete(port, variables["DEEPSEEK_R1_API_KEY"], prompt), ensure_ascii=False))
    return process.returncode


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help="folder to serve")
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="new folder for what the image would hold")
    args = parser.parse_args()
    args.folder.mkdir(parents=True)
    sys.exit(try_out(args.checkpoint, args.folder))
