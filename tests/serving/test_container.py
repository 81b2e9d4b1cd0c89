"""The recipes for containers: what they refer to is there, and their steps work, taken one by one without docker."""

import argparse
import fnmatch
import json
import os
import re
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import yaml

from modeling_deepseek_r1.commands import serve
from tests.models import tiny_model
from tests.test_conversation import word_tokenizer

ROOT = Path(__file__).parents[2]
CONTAINER = ROOT / "scripts" / "container"
sys.path.insert(0, str(CONTAINER))
import steps  # noqa: E402


def options_of(command: list[str]) -> argparse.Namespace:
    """SystemExit where the command line is not one of `deepseek-r1 serve`."""
    parser = argparse.ArgumentParser()
    serve.add_arguments(parser)
    return parser.parse_args(["checkpoint", *command])


def test_the_dockerfile_copies_what_there_is_and_starts_what_there_is(tmp_path):
    lines = steps.instructions(CONTAINER / "Dockerfile")
    copied = [source for name, rest in lines if name == "COPY" for source in rest.split()[:-1]]
    ignore = (CONTAINER / "Dockerfile.dockerignore").read_text().splitlines()
    assert ignore[0] == "*"
    for source in copied:
        assert (ROOT / source).exists() and f"!{source}" in ignore
    assert {line[1:] for line in ignore if line.startswith("!")} == set(copied)
    values = {name: rest for name, rest in lines}
    assert values["USER"].split(":")[0].isdecimal() and int(values["USER"].split(":")[0]) > 0
    assert values["FROM"].startswith("python:3.")
    options = options_of(json.loads(values["CMD"]))
    assert (options.host, options.canary) == ("127.0.0.1", None)
    health = json.loads(values["HEALTHCHECK"].partition(" CMD ")[2])
    for command in (health, json.loads(values["ENTRYPOINT"])):
        assert (ROOT / command[1]).is_file() and any(fnmatch.fnmatch(command[1], f"{source}/*") for source in copied)


def test_compose_files_use_what_there_is():
    base, canary = (yaml.safe_load((CONTAINER / name).read_text())["services"]["serve"] for name in
                    ("compose.yaml", "compose.canary.yaml"))  # fmt: skip
    build = base["build"]
    assert (CONTAINER / build["context"]).resolve() == ROOT and (ROOT / build["dockerfile"]).is_file()
    values = dict(steps.instructions(CONTAINER / "Dockerfile"))
    assert base["healthcheck"]["test"][1:] == json.loads(values["HEALTHCHECK"].partition(" CMD ")[2])
    assert base["environment"]["DEEPSEEK_R1_API_KEY"].startswith("${DEEPSEEK_R1_API_KEY:?")
    assert all(port.startswith("127.0.0.1:") for port in base["ports"])
    plain, split = options_of(base["command"]), options_of(canary["command"])
    assert float(re.match(r"\d+", base["stop_grace_period"])[0]) > plain.grace
    mounted = {volume.split(":")[-2] for volume in canary["volumes"]}
    assert split.canary in mounted and 0 < split.canary_share < 1
    assert {**vars(split), "canary": None, "canary_share": plain.canary_share} == vars(plain)


@pytest.mark.parametrize(
    ("variables", "said"),
    [({}, "set DEEPSEEK_R1_API_KEY"), ({"DEEPSEEK_R1_API_KEY": "k", "CHECKPOINT": "nowhere"}, "no checkpoint in nowhere")],
)
def test_without_key_or_checkpoint_nothing_starts(variables, said, tmp_path):
    clean = {name: value for name, value in os.environ.items() if name not in ("DEEPSEEK_R1_API_KEY", "CHECKPOINT")}
    result = subprocess.run(
        ["sh", CONTAINER / "start.sh"], env={**clean, **variables}, capture_output=True, text=True, cwd=tmp_path
    )
    assert result.returncode == 1 and said in result.stderr


@pytest.mark.slow
def test_the_steps_of_the_image_serve_a_checkpoint(tmp_path, monkeypatch, capfd):
    """What is installed here already is not fetched again; the library itself is built and installed from what is copied."""
    checkpoint, folder = tmp_path / "checkpoint", tmp_path / "image"
    tiny_model("mixed").save_pretrained(checkpoint)
    word_tokenizer().save_pretrained(checkpoint)
    folder.mkdir()
    installed = {
        "PYTHONPATH": sysconfig.get_path("purelib"),
        "TORCH_INDEX": "",
        "PIP_NO_INDEX": "1",
        "PIP_NO_BUILD_ISOLATION": "0",
    }
    for name, value in installed.items():
        monkeypatch.setenv(name, value)
    assert steps.try_out(checkpoint, folder, "w5 w6") == 0
    printed = capfd.readouterr().out
    assert '{"status":"ok"}' in printed
    answer = json.loads(next(line for line in printed.splitlines() if line.startswith('{"id"')))
    assert answer["model"] == "checkpoint" and answer["usage"]["prompt_tokens"] == 2
    assert list(folder.glob("venv/lib/python3*/site-packages/modeling_deepseek_r1/configuration/__init__.py"))
