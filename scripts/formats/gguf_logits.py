"""Write GGUF files of a tiny model, open them with the gguf package and with transformers, and compare the logits.

Run it where the packages are installed:

    pip install gguf==0.19.0 transformers && python scripts/formats/gguf_logits.py
    python scripts/formats/gguf_logits.py --write       # the template that the tests read

llama-cpp-python has no wheel on PyPI; transformers' own loader (`from_pretrained(gguf_file=…)`) takes its place here.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import gguf
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import ckptsurgery as cs

TEMPLATE = Path(__file__).parents[2] / "tests" / "data" / "formats" / "llama.gguf"
CONFIG = LlamaConfig(
    vocab_size=96,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=128,
    tie_word_embeddings=False,
)


def write_template(path: Path) -> None:
    """Write a GGUF file of such a model with the gguf package: key-value pairs, and one tensor of zeros."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    writer.add_block_count(CONFIG.num_hidden_layers)
    writer.add_context_length(CONFIG.max_position_embeddings)
    writer.add_embedding_length(CONFIG.hidden_size)
    writer.add_feed_forward_length(CONFIG.intermediate_size)
    writer.add_head_count(CONFIG.num_attention_heads)
    writer.add_head_count_kv(CONFIG.num_key_value_heads)
    writer.add_layer_norm_rms_eps(CONFIG.rms_norm_eps)
    writer.add_rope_dimension_count(CONFIG.hidden_size // CONFIG.num_attention_heads)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(CONFIG.vocab_size)
    writer.add_tokenizer_model("llama")
    writer.add_token_list([f"<{n}>" for n in range(CONFIG.vocab_size)])
    writer.add_token_scores([0.0] * CONFIG.vocab_size)
    writer.add_token_types([gguf.TokenType.NORMAL] * CONFIG.vocab_size)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_tensor("output_norm.weight", torch.zeros(CONFIG.hidden_size).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def main() -> None:
    """Convert, open and compare."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(CONFIG).eval()
    tokens = torch.arange(24).reshape(2, 12)
    with tempfile.TemporaryDirectory() as name, torch.no_grad():
        folder, wanted = Path(name), model(tokens).logits
        model.save_pretrained(folder / "hf")
        recipe = cs.load_recipe("llama/hf_to_gguf")
        for kind, more in (
            ("F32", None),
            ("F16", "f16"),
            ("BF16", "bf16"),
            ("Q8_0", cs.load_recipe("quantised/float_to_q80")),
        ):
            made = folder / kind / "model.gguf"
            made.parent.mkdir()
            said = recipe.then(more) if isinstance(more, cs.Recipe) else recipe
            plan = cs.plan(folder / "hf", said, dtype=more if isinstance(more, str) else "lossless")
            plan.save(made, template=TEMPLATE, check=True)
            reader = gguf.GGUFReader(made)
            types = sorted({tensor.tensor_type.name for tensor in reader.tensors})
            number = gguf.LlamaFileType(int(reader.get_field("general.file_type").contents())).name
            theirs = AutoModelForCausalLM.from_pretrained(made.parent, gguf_file="model.gguf", dtype=torch.float32)
            found = theirs.eval()(tokens).logits
            apart = ((found - wanted).abs().max() / wanted.abs().max()).item()
            print(f"{kind}: {types}, {number}; logits at most {apart:.2e} of the largest apart")
            if kind == "F32":
                assert torch.equal(found, wanted)
            if kind == "Q8_0":
                back = cs.plan(made, cs.load_recipe("quantised/gguf_to_float")).state_dict()
                state = theirs.state_dict()
                assert torch.equal(back["token_embd.weight"], state["model.embed_tokens.weight"])


if __name__ == "__main__":
    if "--write" in sys.argv:
        write_template(TEMPLATE)
    else:
        main()
