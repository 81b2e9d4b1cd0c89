"""Experts spread over two processes by transformers' plan (gloo): outputs and gradients are those of one process."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from .models import tiny_model

ROOT = Path(__file__).parents[1]
COMMON = {"router_aux_loss_coef": 0.0}
MODELS = {
    "experts": {"num_experts": 4, **COMMON},
    "expert_domains": {
        "routing": {
            "expert_topology": [{"text": 2, "code": 2}, {"fusion": 6}],
            "min_experts_per_tok": 1,
            "expert_activation_threshold": 0.2,
        },
        **COMMON,
    },
    "shared_expert": COMMON,
}


@pytest.mark.slow
@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="needs gloo")
@pytest.mark.parametrize("kind", ["tp", "fsdp"])
def test_two_processes_equal_one(kind, tmp_path):
    for name, fields in MODELS.items():
        tiny_model(name, **fields).save_pretrained(tmp_path / name)
    # A free port, because several test runs may share a machine.
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    command += [str(ROOT / "tests" / "parallel_worker.py"), kind, *(str(tmp_path / name) for name in MODELS)]
    paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert done.stdout.count("equal") == 2
