"""The pages show what the result files say, and their links and the README's tree lead somewhere."""

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
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md"), *(ROOT / "model_cards").glob("*.md")]
    targets = [page.parent / target for page in pages for target in re.findall(r"\]\(([^)#:]+)[^):]*\)", page.read_text())]
    page = pages[0].read_text()
    tree = page.split("tests/                           mirrors")[0].rsplit("```", 1)[1]
    names = re.findall(r"^(\S+/)", tree, re.MULTILINE) + [
        f"modeling_deepseek_r1/{x}" for x in re.findall(r"^  ([\w./]+)", tree, re.MULTILINE)
    ]
    assert len(targets) >= 10 and len(names) >= 8
    for path in [*targets, *(ROOT / name for name in names)]:
        assert path.exists(), path
    assert all(f"docs/{page.name}" in pages[0].read_text() for page in pages if page.parent.name == "docs")
