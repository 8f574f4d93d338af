"""Open folders as diffusers, PEFT and sentence-transformers write them, and compare with their own models.

Run it where the packages are installed; they are too heavy for the tests:

    pip install diffusers peft sentence-transformers && python scripts/formats/try_folders.py
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

import ckptsurgery as cs


def same(name: str, checkpoint: cs.Checkpoint, wanted: Mapping[str, torch.Tensor]) -> None:
    """Compare every tensor."""
    assert set(checkpoint) == set(wanted), (name, set(checkpoint) ^ set(wanted))
    assert all(torch.equal(checkpoint[key].load(), tensor) for key, tensor in wanted.items()), name
    print(f"{name}: {len(checkpoint)} tensors equal; config {list(checkpoint.config or ())[:4]}")


def try_diffusers(folder: Path) -> None:
    """Save a pipeline of a noise model and a scheduler; open its root and its component."""
    from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

    model: Any = UNet2DModel(sample_size=8, block_out_channels=(8, 8), norm_num_groups=4, layers_per_block=1,
                             down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2)  # fmt: skip
    DDPMPipeline(model, DDPMScheduler()).save_pretrained(folder)
    same("pipeline", cs.open(folder), {f"unet.{key}": tensor for key, tensor in model.state_dict().items()})
    same("component", cs.open(folder, component="unet"), model.state_dict())


def try_peft(folder: Path) -> None:
    """Save an adapter, and open its folder."""
    from peft import LoraConfig, get_peft_model, get_peft_model_state_dict

    plain = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 4))
    model: Any = get_peft_model(plain, LoraConfig(r=2, target_modules=["0", "1"]))
    model.save_pretrained(folder)
    checkpoint = cs.open(folder)
    same("adapter", checkpoint, get_peft_model_state_dict(model))
    assert checkpoint.config is not None and checkpoint.config["r"] == 2


def try_sentences(folder: Path) -> None:
    """Save a model with a dense module behind its encoder, and open its folder."""
    from sentence_transformers import SentenceTransformer, models
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    vocabulary = Tokenizer(WordLevel({"[PAD]": 0, "[UNK]": 1}, unk_token="[UNK]"))
    PreTrainedTokenizerFast(tokenizer_object=vocabulary, pad_token="[PAD]", unk_token="[UNK]").save_pretrained(
        folder / "m"
    )
    BertModel(
        BertConfig(vocab_size=16, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
    ).save_pretrained(folder / "m")
    encoder = models.Transformer(str(folder / "m"))
    model: Any = SentenceTransformer(modules=[encoder, models.Pooling(8), models.Dense(8, 4)], device="cpu")
    model.save(str(folder / "s"))
    wanted = {key.split(".", 2)[2]: tensor for key, tensor in model.state_dict().items() if key.startswith("0.")}
    dense = {f"2_Dense.{key[2:]}": tensor for key, tensor in model.state_dict().items() if key.startswith("2.")}
    same("sentences", cs.open(folder / "s"), wanted | dense)


def main() -> None:
    """Run all."""
    for attempt in (try_diffusers, try_peft, try_sentences):
        with tempfile.TemporaryDirectory() as folder:
            attempt(Path(folder))


if __name__ == "__main__":
    main()
