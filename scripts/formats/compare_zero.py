"""Compare what is read of DeepSpeed's folders with what DeepSpeed's own `zero_to_fp32.py` makes of them.

Run: pip install --no-deps --target DIR deepspeed; python scripts/formats/compare_zero.py DIR
"""

from __future__ import annotations

import importlib.util
import logging
import sys
import tempfile
import types
from pathlib import Path
from typing import Any

import torch

import ckptsurgery as cs

ROOT = Path(__file__).parents[2]


def loaded(name: str, path: Path) -> Any:
    """A module from a file, without its package."""
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise SystemExit(f"no module at {path}")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def oracle(site: Path) -> Any:
    """DeepSpeed's script, without the rest of DeepSpeed, whose import builds extensions."""
    sys.modules["deepspeed"] = types.ModuleType("deepspeed")
    utils = types.ModuleType("deepspeed.utils")
    utils.logger = logging.getLogger("deepspeed")  # type: ignore[attr-defined]
    sys.modules["deepspeed.utils"] = utils
    sys.modules["deepspeed.checkpoint"] = types.ModuleType("deepspeed.checkpoint")
    loaded("deepspeed.checkpoint.constants", site / "deepspeed" / "checkpoint" / "constants.py")
    return loaded("zero_to_fp32", site / "deepspeed" / "utils" / "zero_to_fp32.py")


def main() -> None:
    theirs = oracle(Path(sys.argv[1]))
    makers = loaded("test_files_by_rank", ROOT / "tests" / "storage" / "test_files_by_rank.py")
    compared = 0
    with tempfile.TemporaryDirectory() as scratch:
        for stage, padded, count, seed in (
            (s, p, n, k) for s, p in ((2, False), (2, True), (3, False)) for n in (1, 2, 3, 4) for k in range(5)
        ):
            folder = Path(scratch, f"{stage}-{padded}-{count}-{seed}")
            makers.saved(folder, stage, count, padded, seed)
            expected = theirs._get_fp32_state_dict_from_zero_checkpoint(str(folder), False)
            with cs.open(folder) as ckpt:
                if {*ckpt} != {*expected}:
                    raise SystemExit(f"{folder.name}: {sorted({*ckpt} ^ {*expected})}")
                for key, tensor in expected.items():
                    found = ckpt[key].load()
                    if not torch.equal(found.to(tensor.dtype), tensor.contiguous()):
                        raise SystemExit(f"{folder.name}: {key} differs")
                    compared += 1
    print(f"{compared} tensors are equal")


if __name__ == "__main__":
    main()
