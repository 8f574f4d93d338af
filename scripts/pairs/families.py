"""The networks and converters behind the pairs; see `build.py`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import transformers as hf
from engine_networks import (
    ct_bart,
    ct_distilbert,
    ct_mpt,
    ct_opt,
    ct_t5,
    gguf_gemma,
    gguf_mamba,
    gguf_starcoder,
    gguf_t5,
)
from hub_networks import conditional, detr, granite, gte, jamba, lfm, minimax, nomic, phimoe, videomae
from keras_networks import keras_bart, keras_distilbert, keras_esm, keras_gemma
from library_networks import (
    curated_albert,
    curated_electra,
    curated_falcon,
    curated_mpt,
    lit_olmo,
    lit_phi,
    tune_clip,
    tune_t5,
)
from networks import GROUPED, shapes
from pairing import Pair, deeper, negative, partial, plain
from vision_networks import beit, big_vision, bit, davit, mvit, openai_clip, poolformer, pvt, regnet, resmlp


def _llama_like(layers: int = 3) -> dict[str, tuple[int, ...]]:
    config = hf.StableLmConfig(**{**GROUPED, "num_hidden_layers": layers})
    return shapes(hf.StableLmForCausalLM(config).state_dict())


def pairs(packages: Path) -> Iterator[tuple[str, Pair]]:
    """Every pair with the half it belongs to."""
    for number, make in enumerate(_listed(packages)):
        try:
            pair = make()
        except Exception as error:
            raise RuntimeError(f"pair {number} does not build: {error!r}") from error
        yield ("tuning", "held")[number % 2], pair


def _listed(packages: Path) -> Iterator[Callable[[], Pair]]:
    """Neighbours go to different halves."""
    yield lambda: plain("hub_phimoe__hf5", "phimoe", phimoe())
    yield lambda: plain("hub_minimax_m2__hf5", "minimax", minimax())
    yield lambda: plain("hub_nomic_bert__hf5", "nomic", nomic())
    yield lambda: plain("hub_gte__hf5", "gte", gte())
    yield lambda: plain("hub_jamba__hf5", "jamba", jamba())
    yield lambda: plain("hub_lfm2_moe__hf5", "lfm", lfm())
    yield lambda: plain("hub_videomae__hf5", "videomae", videomae())
    yield lambda: plain("hub_granitemoe__hf5", "granite", granite())
    yield lambda: plain("hub_detr__hf5", "detr", detr())
    yield lambda: plain("hub_conditional_detr__hf5", "conditional", conditional())
    yield lambda: plain("hf_bart__ct2", "bart", ct_bart())
    yield lambda: plain("hf_mbart__ct2", "mbart", ct_bart(2, 3, True))
    yield lambda: plain("hf_t5_gated__ct2", "t5", ct_t5())
    yield lambda: plain("hf_opt__ct2", "opt", ct_opt())
    yield lambda: plain("hf_mpt__ct2", "mpt", ct_mpt())
    yield lambda: plain("hf_distilbert__ct2", "distilbert", ct_distilbert())
    yield lambda: plain("hf_gemma2__gguf", "gemma", gguf_gemma())
    yield lambda: plain("hf_starcoder2__gguf", "starcoder", gguf_starcoder())
    yield lambda: plain("hf_mamba__gguf", "mamba", gguf_mamba())
    yield lambda: plain("hf_t5__gguf", "t5", gguf_t5())
    yield lambda: plain("hf_phi__litgpt", "phi", lit_phi(packages))
    yield lambda: plain("hf_olmo2__litgpt", "olmo", lit_olmo(packages))
    yield lambda: plain("hf_t5_encoder__torchtune", "t5", tune_t5(packages))
    yield lambda: plain("hf_clip__torchtune_text", "clip", tune_clip(packages))
    yield lambda: plain("hf_albert__curated", "albert", curated_albert())
    yield lambda: plain("hf_falcon__curated", "falcon", curated_falcon())
    yield lambda: plain("hf_mpt__curated", "mpt", curated_mpt())
    yield lambda: plain("hf_electra__curated", "electra", curated_electra())
    yield lambda: plain("openai_clip__timm_visual", "clip", openai_clip())
    yield lambda: plain("big_vision_siglip__open_clip", "siglip", big_vision())
    yield lambda: plain("tv_regnet__timm", "regnet", regnet())
    yield lambda: plain("bit_npz__timm", "bit", bit())
    yield lambda: plain("davit__timm", "davit", davit())
    yield lambda: plain("mvitv2__timm", "mvit", mvit())
    yield lambda: plain("poolformer__timm", "poolformer", poolformer())
    yield lambda: plain("pvt_v2__timm", "pvt", pvt())
    yield lambda: plain("resmlp__timm", "resmlp", resmlp())
    yield lambda: plain("beit3__timm", "beit", beit())
    yield lambda: plain("hf_bart__keras", "bart", keras_bart())
    yield lambda: plain("hf_distilbert__keras", "distilbert", keras_distilbert())
    yield lambda: plain("hf_gemma__keras", "gemma", keras_gemma())
    yield lambda: plain("hf_esm__keras", "esm", keras_esm())
    # Other depths.
    yield lambda: deeper("hub_nomic_bert_4__hf5_6", "nomic", nomic(4), nomic(6))
    yield lambda: deeper("hub_gte_6__hf5_4", "gte", gte(6), gte(4))
    yield lambda: deeper("hf_opt_5__ct2_3", "opt", ct_opt(5), ct_opt(3))
    yield lambda: deeper("hf_mpt_3__ct2_5", "mpt", ct_mpt(3), ct_mpt(5))
    yield lambda: deeper("hf_bart_2_2__ct2_4_4", "bart", ct_bart(2, 2), ct_bart(4, 4))
    yield lambda: deeper("hf_mbart_4_2__ct2_2_4", "mbart", ct_bart(4, 2, True), ct_bart(2, 4, True))
    yield lambda: deeper("openai_clip_4__timm_visual_8", "clip", openai_clip(4), openai_clip(8))
    yield lambda: deeper("beit3_8__timm_5", "beit", beit(8), beit(5))
    yield lambda: deeper("hf_gemma2_3__gguf_7", "gemma", gguf_gemma(3), gguf_gemma(7))
    yield lambda: deeper("hf_distilbert_6__keras_2", "distilbert", keras_distilbert(6), keras_distilbert(2))
    # Parts, and nothing at all.
    yield lambda: partial(
        "hf_bart_encoder__ct2", "bart", ct_bart(), lambda k: ".decoder." not in k and "lm_head" not in k
    )
    yield lambda: partial("hf_mbart_no_cross__ct2", "mbart", ct_bart(2, 3, True), lambda k: "encoder_attn" not in k)
    yield lambda: partial(
        "hub_phimoe_dense__hf5",
        "phimoe",
        phimoe(),
        lambda k: "block_sparse_moe" not in k,
        {
            f"model.layers.{i}.mlp.{m}.weight": s
            for i in range(4)
            for m, s in (("gate_proj", (96, 32)), ("up_proj", (96, 32)), ("down_proj", (32, 96)))
        },
    )
    yield lambda: partial("big_vision_text__open_clip", "siglip", big_vision(), lambda k: "/img/" not in k)
    yield lambda: partial("openai_clip_text__timm_visual", "clip", openai_clip(), lambda k: not k.startswith("visual."))
    yield lambda: partial(
        "hf_clip_vision__torchtune_text", "clip", tune_clip(packages), lambda k: k.startswith("vision_model")
    )
    yield lambda: partial("hub_detr_backbone__hf5", "detr", detr(), lambda k: "conv_encoder" in k)
    yield lambda: partial("hf_t5_decoder__gguf", "t5", gguf_t5(), lambda k: "decoder" in k or k == "lm_head.weight")
    yield lambda: negative("hf_mamba__ct2_opt", "mamba", gguf_mamba(), ct_opt())
    yield lambda: negative("tv_regnet__hf5_gte", "regnet", regnet(), gte())
    yield lambda: negative("poolformer__gguf_gemma2", "poolformer", poolformer(), gguf_gemma())
    yield lambda: negative("bit__timm_beit", "bit", bit(), beit())
