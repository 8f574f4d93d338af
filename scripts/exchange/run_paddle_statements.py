"""Run exported AOA statements by Paddle's own engine, and compare them with the plan of the recipe.

    pip install --target paddle-only --no-deps paddlepaddle protobuf Pillow opt_einsum astor httpx httpcore
    PYTHONPATH=paddle-only python scripts/exchange/run_paddle_statements.py

The engine works on names, shapes and slices alone; this script moves the elements as its answer says.
"""

from __future__ import annotations

import ast
import warnings
from typing import Any

import torch

import ckptsurgery as cs

warnings.filterwarnings("ignore")
from paddle.distributed.flex_checkpoint.aoa.aoa_engine import AOAEngine  # noqa: E402
from paddle.distributed.flex_checkpoint.dcp.sharded_weight import ShardedWeightDesc  # noqa: E402

RECIPE = cs.Recipe(
    [
        "model.layers.{i}.attn.{p:q,k,v}.weight [d x] -> model.layers.{i}.attn.qkv.weight [(p d) x]",
        "model.layers.{i}.experts.{e}.up.weight [o x] -> layers.{i}.experts.{e}.up.weight [x o]",
        "model.layers.{i}.mlp.gate_up.weight [o (p f)] -> model.layers.{i}.mlp.{p:gate,up}.weight [o f]",
        "experts.{e}.down.weight [o f] -> down.weight [o (e f)]",
        "conv.weight [o c k] -> conv2.weight [k o c]",
        "embed.weight -> tok.weight, head.weight",
    ],
    drop=["rope.inv_freq"],
    rest="keep",
)


def state_dict() -> dict[str, torch.Tensor]:
    """A state dict of every kind of rule."""
    state = {"conv.weight": torch.randn(2, 3, 4), "norm.weight": torch.randn(3), "rope.inv_freq": torch.randn(2)}
    state |= {"embed.weight": torch.randn(5, 3)}
    state |= {f"experts.{e}.down.weight": torch.randn(4, 3) for e in range(11)}
    for i in range(2):
        at = f"model.layers.{i}."
        state |= {f"{at}attn.{p}.weight": torch.randn(2, 3) for p in "qkv"}
        state |= {f"{at}experts.{e}.up.weight": torch.randn(4, 3) for e in range(11)}
        state |= {f"{at}mlp.gate_up.weight": torch.randn(3, 8)}
    return state


def described(key: str, tensor: torch.Tensor) -> Any:
    """A whole tensor as the engine is told of it."""
    shape = tuple(tensor.shape)
    return ShardedWeightDesc(key, shape, shape, (0,) * len(shape), "float32")


def run(statements: list[str], state: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> dict[str, Any]:
    """What the engine makes: each target pieced together from the slices that it names."""
    sources, targets = ({k: [described(k, t)] for k, t in one.items()} for one in (state, wanted))
    engine = AOAEngine({"aoa_statements": statements}, sources, targets)
    made = {}
    for key, tensor in wanted.items():
        made[key] = torch.full_like(tensor, float("nan"))
        for entry in engine.find_shard_sources(described(key, tensor)):
            part = state[entry.source_slice.key][_slices(entry.source_slice)]
            for step in entry.postprocess_list or ():
                part = part.permute(*ast.literal_eval(step))
            made[key][_slices(entry.target_slice)] = part
    return made


def _slices(piece: Any) -> tuple[slice, ...]:
    return tuple(slice(start, start + size) for start, size in zip(piece.global_offset, piece.local_shape))


def main() -> None:
    """Compare, and print what was."""
    state = state_dict()
    statements = cs.recipes.to_paddle(RECIPE)["aoa_statements"]
    wanted = cs.plan(state, RECIPE).state_dict()
    made = run(statements, state, wanted)
    wrong = [key for key, tensor in wanted.items() if not torch.equal(made[key], tensor)]
    print(*statements, sep="\n")
    print(f"{len(wanted) - len(wrong)} of {len(wanted)} tensors are the plan's; wrong: {wrong}")


if __name__ == "__main__":
    main()
