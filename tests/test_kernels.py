"""The fused kernels give the outputs and all gradients of the plain layers."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch


@pytest.mark.skipif(not find_spec("triton"), reason="Triton is not installed")
def test_kernels_equal_the_layers():
    device = "cuda" if torch.cuda.is_available() else "cpu"
    env = os.environ | {"CUDA_VISIBLE_DEVICES": "0"}
    env |= {"TRITON_INTERPRET": "1"} if device == "cpu" else {}
    script = Path(__file__).with_name("against_layers.py")
    run = subprocess.run([sys.executable, script, device], env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    rows = [json.loads(line) for line in run.stdout.splitlines()]
    assert len(rows) >= 4
    for row in rows:
        assert row["output"] < 1e-5, row
        assert row["gradient"] < 1e-5 * (1 if device == "cpu" else 5), row
