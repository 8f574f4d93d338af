"""Trace the converters of litgpt, torchtune and diffusers, and print the recipe that each of them is.

    pip install --no-deps litgpt torchtune diffusers Pillow importlib_metadata zipp
    python scripts/exchange/trace_converters.py FOLDER

FOLDER holds the packages, each in a folder of its name, as for `scripts/pairs/build.py`: `FOLDER/litgpt/litgpt/…`. A
converter is run on numbered tensors of two sizes; the recipe is read off the first, and proved on both.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import transformers as hf

import ckptsurgery as cs

sys.path.insert(0, str(Path(__file__).parents[1] / "pairs"))
import families
import latent_diffusion

Make = Callable[[int], Any]
"""A network of so many layers: its shapes, and the converter."""


def small(layers: int) -> dict[str, Any]:
    """The fields of a small decoder with grouped queries."""
    return {**families._GROUPED, "num_hidden_layers": layers}


def converters(packages: Path) -> Iterator[tuple[str, Make]]:
    """Yield the converters by name."""
    heads = {"n_head": 4, "n_query_groups": 2, "head_size": 8, "mlp_class_name": "LLaMAMLP"}

    def lit(model: Any, function: str, name: str) -> Any:
        return families.lit(packages, model, function, name, **heads)

    def tune(file: str, function: str, model: Any, **given: Any) -> Any:
        network = families.tune(packages, file, function, model)
        library = sys.modules["torchtune_" + function]
        return network.__class__(network.source, lambda state: getattr(library, function)(state, **given))

    yield (
        "litgpt llama",
        lambda n: lit(hf.LlamaForCausalLM(hf.LlamaConfig(**small(n))), "copy_weights_hf_llama", "Llama"),
    )
    yield "litgpt phi", lambda n: families.lit_phi(packages, n)
    yield "litgpt falcon", lambda n: families.lit_falcon(packages, n)
    yield "litgpt olmo2", lambda n: families.lit_olmo(packages, n)
    sizes = {"num_heads": 4, "num_kv_heads": 2, "dim": 32}
    decoders = (
        ("llama", "convert_weights.py", "hf_to_tune", hf.LlamaForCausalLM, hf.LlamaConfig, sizes),
        ("qwen2", "qwen2/_convert_weights.py", "qwen2_hf_to_tune", hf.Qwen2ForCausalLM, hf.Qwen2Config, sizes),
        ("phi3", "phi3/_convert_weights.py", "phi3_hf_to_tune", hf.Phi3ForCausalLM, hf.Phi3Config, sizes),
    )
    for name, file, function, model, config, given in decoders:
        yield (
            f"torchtune {name}",
            lambda n, f=file, g=function, m=model, c=config, s=given: tune(f, g, m(c(**small(n))), **s),
        )
    yield "torchtune t5", lambda n: families.tune_t5(packages, n)
    yield "torchtune clip", lambda n: families.tune_clip(packages, n)
    yield "diffusers flux", flux
    yield "diffusers vae", latent_diffusion.vae
    yield "diffusers unet", lambda n: latent_diffusion.unet(2, (4, 6, 8) if n == 2 else (6, 8, 10))


def flux(layers: int, width: int = 3072, few: int = 2) -> Any:
    """The transformer of FLUX as its authors lay it out: the converter's width is fixed, the inputs' are free."""
    from diffusers.loaders.single_file_utils import convert_flux_transformer_checkpoint_to_diffusers as convert
    from pairing import Network

    matrices = {f"{k}_in": (width, few) for k in ("img", "txt")}
    matrices |= {f"{k}_in.{n}_layer": (width, few) for k in ("time", "vector") for n in ("in", "out")}
    matrices |= {"final_layer.linear": (16, few), "final_layer.adaLN_modulation.1": (2 * width, few)}
    scales: dict[str, tuple[int, ...]] = {}
    for i in range(layers):
        for side in ("img", "txt"):
            at = f"double_blocks.{i}.{side}"
            matrices |= {f"{at}_mod.lin": (6 * width, few), f"{at}_attn.qkv": (3 * width, few)}
            matrices |= {f"{at}_attn.proj": (width, few), f"{at}_mlp.0": (4 * width, few)}
            matrices |= {f"{at}_mlp.2": (width, few)}
            scales |= {f"{at}_attn.norm.{p}_norm.scale": (4,) for p in ("query", "key")}
        at = f"single_blocks.{i}"
        matrices |= {f"{at}.modulation.lin": (3 * width, few), f"{at}.linear1": (7 * width, few)}
        matrices |= {f"{at}.linear2": (width, few)}
        scales |= {f"{at}.norm.{p}_norm.scale": (4,) for p in ("query", "key")}
    found = {f"{k}.weight": s for k, s in matrices.items()} | {f"{k}.bias": s[:1] for k, s in matrices.items()} | scales
    return Network(found, lambda state: convert(dict(state)))


def main() -> None:
    """Trace each, and print how it went."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("packages", type=Path)
    parser.add_argument("--only", nargs="+", help="parts of names")
    parser.add_argument("--toml", action="store_true", help="print the recipes too")
    options = parser.parse_args()
    for name, make in converters(options.packages):
        if options.only and not any(part in name for part in options.only):
            continue
        start = time.monotonic()
        try:
            one, other = make(2), make(3)
            specs, others = ({k: cs.TensorSpec(s, "F32") for k, s in n.source.items()} for n in (one, other))
            recipe = cs.recipes.trace(one.convert, specs, others=[others])
        except Exception as error:  # a library that is missing, or a converter that no rule can say
            print(f"{name}: {type(error).__name__}: {' / '.join(str(error).splitlines())[:400]}", flush=True)
            continue
        count = len(recipe.rules) + sum(len(stage.rules) for stage in recipe.stages)
        print(
            f"{name}: {count} rules, {len(specs)} and {len(others)} tensors, {time.monotonic() - start:.1f} s",
            flush=True,
        )
        if options.toml:
            print(recipe.dumps())


if __name__ == "__main__":
    main()
