"""The single-file layout of latent diffusion models, VAE and UNet, at small sizes, and the converters of diffusers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

__all__ = ["unet", "vae"]

Shapes = dict[str, tuple[int, ...]]


def _affine(key: str, *shape: int) -> Shapes:
    return {f"{key}.weight": shape, f"{key}.bias": shape[:1]}


def _norm(key: str, width: int) -> Shapes:
    return _affine(key, width)


def vae(layers: int, widths: Iterable[int] = (4, 6, 8)) -> Any:
    """An autoencoder with so many residual blocks a level."""
    from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint as convert
    from pairing import Network

    widths = list(widths)
    found: Shapes = {}
    for side, extra in (("encoder", 0), ("decoder", 1)):
        last = widths[-1]
        width = widths[0] if side == "encoder" else last
        found |= _affine(f"{side}.conv_in", width, 3 if side == "encoder" else 4, 3, 3)
        levels = list(enumerate(widths)) if side == "encoder" else list(enumerate(widths))[::-1]
        name, change = ("down", "downsample") if side == "encoder" else ("up", "upsample")
        for level, out in levels:
            for block in range(layers + extra):
                found |= _block(f"{side}.{name}.{level}.block.{block}", width, out)
                width = out
            if level != (len(widths) - 1 if side == "encoder" else 0):
                found |= _affine(f"{side}.{name}.{level}.{change}.conv", width, width, 3, 3)
        for block in (1, 2):
            found |= _block(f"{side}.mid.block_{block}", last, last)
        found |= _norm(f"{side}.mid.attn_1.norm", last)
        for part in ("q", "k", "v", "proj_out"):
            found |= _affine(f"{side}.mid.attn_1.{part}", last, last, 1, 1)
        found |= _norm(f"{side}.norm_out", width) | _affine(
            f"{side}.conv_out", 8 if side == "encoder" else 3, width, 3, 3
        )
    found |= _affine("quant_conv", 8, 8, 1, 1) | _affine("post_quant_conv", 4, 4, 1, 1)
    config = {"down_block_types": [""] * len(widths), "up_block_types": [""] * len(widths)}
    return Network(_prefixed("first_stage_model.", found), lambda state: convert(dict(state), config))


def _block(key: str, before: int, after: int) -> Shapes:
    found = _norm(f"{key}.norm1", before) | _affine(f"{key}.conv1", after, before, 3, 3)
    found |= _norm(f"{key}.norm2", after) | _affine(f"{key}.conv2", after, after, 3, 3)
    return found | (_affine(f"{key}.nin_shortcut", after, before, 1, 1) if before != after else {})


def unet(layers: int, widths: Iterable[int] = (4, 6, 8)) -> Any:
    """A denoiser with so many residual blocks a level, and attention on all levels but the last."""
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint as convert
    from pairing import Network

    widths = list(widths)
    time, width = 16, widths[0]
    found = _affine("time_embed.0", time, width) | _affine("time_embed.2", time, time)
    found |= _affine("input_blocks.0.0", width, 4, 3, 3)
    at, kept = 0, [width]
    for level, out in enumerate(widths):
        for _ in range(layers):
            at += 1
            found |= _residual(f"input_blocks.{at}.0", width, out, time)
            width = out
            if level < len(widths) - 1:
                found |= _attention(f"input_blocks.{at}.1", width)
            kept.append(width)
        if level < len(widths) - 1:
            at += 1
            found |= _affine(f"input_blocks.{at}.0.op", width, width, 3, 3)
            kept.append(width)
    found |= _residual("middle_block.0", width, width, time) | _attention("middle_block.1", width)
    found |= _residual("middle_block.2", width, width, time)
    at = 0
    for level, out in reversed(list(enumerate(widths))):
        for block in range(layers + 1):
            found |= _residual(f"output_blocks.{at}.0", width + kept.pop(), out, time)
            width, place = out, 1
            if level < len(widths) - 1:
                found |= _attention(f"output_blocks.{at}.1", width)
                place = 2
            if level and block == layers:
                found |= _affine(f"output_blocks.{at}.{place}.conv", width, width, 3, 3)
            at += 1
    found |= _norm("out.0", width) | _affine("out.2", 4, width, 3, 3)
    config: Mapping[str, Any] = {"layers_per_block": layers}
    return Network(_prefixed("model.diffusion_model.", found), lambda state: convert(dict(state), config))


def _residual(key: str, before: int, after: int, time: int) -> Shapes:
    found = _norm(f"{key}.in_layers.0", before) | _affine(f"{key}.in_layers.2", after, before, 3, 3)
    found |= _affine(f"{key}.emb_layers.1", after, time)
    found |= _norm(f"{key}.out_layers.0", after) | _affine(f"{key}.out_layers.3", after, after, 3, 3)
    return found | (_affine(f"{key}.skip_connection", after, before, 1, 1) if before != after else {})


def _attention(key: str, width: int, text: int = 5) -> Shapes:
    found = _norm(f"{key}.norm", width)
    found |= _affine(f"{key}.proj_in", width, width, 1, 1) | _affine(f"{key}.proj_out", width, width, 1, 1)
    block = f"{key}.transformer_blocks.0"
    for number, source in (("1", width), ("2", text)):
        found |= {f"{block}.attn{number}.to_q.weight": (width, width)}
        found |= {f"{block}.attn{number}.to_{part}.weight": (width, source) for part in "kv"}
        found |= _affine(f"{block}.attn{number}.to_out.0", width, width)
    for number in "123":
        found |= _norm(f"{block}.norm{number}", width)
    return found | _affine(f"{block}.ff.net.0.proj", 8 * width, width) | _affine(f"{block}.ff.net.2", width, 4 * width)


def _prefixed(prefix: str, shapes: Shapes) -> Shapes:
    return {prefix + key: shape for key, shape in shapes.items()}
