"""Test how much memory a save and a resume take: the kernel counts it, in a process of their own."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from genmodels.storage import Storage
from tests.support.paths import ROOT

P = 96 * 2**20  # bytes of weights
PROGRAM = """
import json, sys
import torch
from genmodels import checkpoint
from genmodels.checkpoint import SnapshotMemory
from genmodels.storage import open_storage
from tests.support.memory import reset_peak, resident

unit, storage = int(sys.argv[2]), open_storage(sys.argv[1])
weights = {str(i): torch.ones(unit // 8 // 4) for i in range(8)}
content = {name: {f"{i}.{key}": tensor for i in range(copies) for key, tensor in weights.items()}
           for name, copies in {"model": 1, "raw": 1, "optimizer": 2}.items()}
memory = SnapshotMemory()
files = memory.fill(content)
checkpoint.upload_file(storage, "first", memoryview(b"the client of the storage is made once"))

def peak(work):
    before = resident()
    reset_peak()
    result = work()
    return result, (resident(peak=True) - before) / unit

def save():
    files = memory.fill(content)
    return {name: checkpoint.upload_file(storage, name, file.data) for name, file in files.items()}

described, saving = peak(save)
_, reading = peak(lambda: checkpoint.read_tensors(storage, "model", described["model"]))
print(json.dumps([saving, reading]))
"""


@pytest.mark.slow
def test_a_save_takes_no_copy_of_its_snapshot_and_a_read_none_of_its_file(storage: Storage) -> None:
    command = [sys.executable, "-c", PROGRAM, storage.url, str(P)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-2000:]
    saving, reading = json.loads(done.stdout)
    assert saving < 0.5, "parts of P over the snapshot"
    assert reading < 1.5, "parts of P, of which the file is one"
