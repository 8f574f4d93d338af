"""The first call on a rank imports little: modules are counted, since seconds depend on the machine."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

CODE = """
import sys
import torch
import torch.distributed as dist
import torch.distributed.tensor
from safetensors.torch import save_file
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

dist.init_process_group("gloo", store=dist.FileStore(sys.argv[1] + "/store", 1), rank=0, world_size=1)
mesh = init_device_mesh("cpu", (1,))
model, other = (fully_shard(nn.Linear(4, 4), mesh=mesh) for _ in range(2))
save_file({"weight": torch.ones(4, 4), "bias": torch.ones(4)}, sys.argv[1] + "/source.safetensors")
before = set(sys.modules)

import ckptsurgery as cs

cs.load_into(model, sys.argv[1] + "/source.safetensors")
cs.save(model, sys.argv[1] + "/out.safetensors")
cs.reshard(model, other)()
print(*(name for name in set(sys.modules) - before if not name.startswith("ckptsurgery")))
"""


def test_what_torch_has_not_loaded_is_not_imported(tmp_path: Path) -> None:
    """Torch's checkpoint library alone would be 70 modules; DCP output needs it."""
    done = subprocess.run([sys.executable, "-c", CODE, str(tmp_path)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    found = done.stdout.split()
    assert [name for name in found if name.startswith(("torch", "numpy"))] == []
    assert len(found) < 12, found
