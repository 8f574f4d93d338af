"""The pairs of a third set, made after the engine had been tuned on the first two; see `build.py`."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

from fresh_networks import (
    ct_bigcode,
    ct_roberta,
    deformable,
    flux,
    focalnet,
    gguf_bloom,
    gguf_cohere,
    gguf_modernbert,
    gguf_olmoe,
    hiera,
    jina,
    keras_dino,
    ldm_unet,
    maskformer,
    monai_decoder,
    monai_unet,
    nemotron_h,
    timesfm,
    wan,
    xcit,
)
from pairing import Network, Pair, deeper, negative, partial, plain


def pairs() -> Iterator[Pair]:
    """Every pair of the set."""
    for make in _listed():
        yield make()


def _listed() -> Iterator[Callable[[], Pair]]:
    plain_ones: tuple[tuple[str, Callable[[], Network]], ...] = (
        ("hub_deformable_detr__hf5", deformable),
        ("hub_maskformer__hf5", maskformer),
        ("hub_nemotron_h__hf5", nemotron_h),
        ("hub_jina_v3__hf5", jina),
        ("hub_timesfm__hf5", timesfm),
        ("hf_bloom__gguf", gguf_bloom),
        ("hf_modernbert__gguf", gguf_modernbert),
        ("hf_olmoe__gguf", gguf_olmoe),
        ("hf_cohere__gguf", gguf_cohere),
        ("hf_bigcode__ct2", ct_bigcode),
        ("hf_roberta__ct2", ct_roberta),
        ("hf_dinov2__keras", keras_dino),
        ("wan__diffusers", wan),
        ("flux__diffusers", flux),
        ("ldm_unet__diffusers", ldm_unet),
        ("monai_unet_old__new", monai_unet),
        ("monai_decoder_old__new", monai_decoder),
        ("focalnet__timm", focalnet),
        ("xcit__timm", xcit),
        ("hiera__timm", hiera),
    )
    for name, make in plain_ones:
        yield lambda name=name, make=make: plain(name, name.split("_")[1], make())  # type: ignore[misc]
    yield lambda: deeper("hf_bloom_6__gguf_12", "bloom", gguf_bloom(6), gguf_bloom(12))
    yield lambda: deeper("hf_dinov2_12__keras_24", "dinov2", keras_dino(12), keras_dino(24))
    yield lambda: deeper("hf_olmoe_5__gguf_8", "olmoe", gguf_olmoe(5), gguf_olmoe(8))
    yield lambda: deeper("hf_roberta_8__ct2_5", "roberta", ct_roberta(8), ct_roberta(5))
    yield lambda: deeper("wan_3__diffusers_5", "wan", wan(3), wan(5))
    yield lambda: deeper("flux_2_5__diffusers_4_3", "flux", flux(2, 5), flux(4, 3))
    yield lambda: partial("flux_double__diffusers", "flux", flux(), lambda k: "single_blocks" not in k)
    yield lambda: partial("hub_deformable_no_encoder__hf5", "deformable", deformable(), lambda k: ".encoder." not in k)
    yield lambda: _averaged("xcit_with_ema__timm", xcit())
    yield lambda: negative("hf_bloom__keras_dinov2", "bloom", gguf_bloom(), keras_dino())
    yield lambda: negative("hf_roberta__wan_diffusers", "roberta", ct_roberta(), wan())
    yield lambda: negative("hf_cohere__hiera_timm", "cohere", gguf_cohere(), hiera())
    yield lambda: negative("ldm_unet__gguf_modernbert", "ldm", ldm_unet(), gguf_modernbert())


def _averaged(name: str, network: Network) -> Pair:
    """A network whose file also holds the averages of its weights."""
    averages = {re.sub("^", "ema_model.", k): s for k, s in network.source.items()}
    return partial(name, name.split("_")[0], network, lambda key: True, averages)
