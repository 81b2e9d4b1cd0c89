"""The pages show what the result files say, and the README's tree names folders that exist."""

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_tables_are_those_of_the_result_files():
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "scripts/render_readme.py", "--check"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_links_and_tree_lead_somewhere():
    page = (ROOT / "README.md").read_text()
    targets = re.findall(r"\]\(([^)#:]+)\)", page)
    tree = page.split("tests/                           mirrors")[0].rsplit("```", 1)[1]
    names = re.findall(r"^(\S+/)", tree, re.MULTILINE) + [
        f"modeling_deepseek_r1/{x}" for x in re.findall(r"^  ([\w./]+)", tree, re.MULTILINE)
    ]
    assert len(targets) >= 2
    assert len(names) >= 8
    for name in [*targets, *names]:
        assert (ROOT / name).exists(), name
