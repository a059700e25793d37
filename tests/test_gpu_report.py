"""`python dev.py gpu`, where there is no GPU: that it runs, and says what was not run."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.slow
def test_the_report_without_a_gpu(tmp_path: Path) -> None:
    """A row for every optimizer, each beside its baseline; and no figure is taken for a GPU's."""
    command = [sys.executable, "dev.py", "gpu", "--smoke", "--out", str(tmp_path)]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "gpu.json").read_text())
    assert report["device"].startswith("no GPU")
    rows = {section["title"]: section["data"] for section in report["sections"]}
    assert {"PyTorch, a small model", "JAX, a small model"} <= set(rows)
    assert report["sections"][0]["title"].startswith("Check")
    checked = report["sections"][0]["data"]
    assert {"torch, cpu, for-loop, float64", "torch, cpu, foreach, float32"} <= set(checked)
    assert all(row["off"] == [] for row in checked.values())
    for title, names in (
        ("PyTorch, a small model", {"AdamW fused", "Ada2MS 0.5 fused", "clip, Ada2MS 0.5 fused", "Ada2MS 0.5 default"}),
        ("JAX, a small model", {"adamw", "ada2ms 0.5", "clip, ada2ms 0.5"}),
    ):
        assert names <= set(rows[title])
        assert all(row["ms"] > 0 and row["baseline"] in rows[title] for row in rows[title].values())
    text = (tmp_path / "gpu.md").read_text()
    assert "| fused | float64 | 160 of 160 |" in text
    assert "torch sees no GPU" in text
    assert "jax sees no GPU" in text
    assert "Not run: --smoke leaves them out." in text
