"""What the field calls things: words to concepts, with no word that belongs to one model family or one corpus.

A word may mean several things. Phrases are looked up before single words, so that `layer_norm` is no layer.
"""

from __future__ import annotations

import re
from functools import lru_cache

__all__ = ["EXCLUSIVE", "STRUCTURAL", "concepts", "words"]

Bag = dict[str, float]

_SINGLE = {
    "norm": "norm ln lnorm layernorm rmsnorm batchnorm bn gn groupnorm instancenorm normalization normalisation",
    "attention": "attention attn attentions mha msa multihead selfattention selfattn sa att",
    "cross": "cross xattn crossattention crossattn ca encdec encdecattention inter",
    "self": "self selfattention selfattn sa",
    "query": "q query queries wq qproj",
    "key": "k key keys wk kproj",
    "value": "v value values wv vproj",
    "qkv": "qkv wqkv",
    "kv": "kv wkv keyvalue",
    "out": "o out output wo outproj proj projection oproj",
    "linear": "linear dense lin proj projection fc",
    "mlp": "mlp ffn ff ffw feedforward fc intermediate mlps",
    "up": "up fc1 intermediate wi lin1 linear1 expand expansion w3",
    "down": "down fc2 wo lin2 linear2 output proj w2 squeeze",
    "gate": "gate w1 gating",
    "router": "router gate",
    "expert": "expert experts",
    "shared": "shared",
    "embedding": "embedding embeddings embed emb embd embeds embedder",
    "token": "token tokens tok word words wte piece vocab tokens shared",
    "position": "position positional positions pos wpe",
    "segment": "segment type types",
    "classtoken": "class cls",
    "head": "head heads classifier logits score fc cls classification predictor unembed output",
    "output": "output out",
    "conv": "conv convolution cnn convs",
    "depthwise": "depthwise dw dwconv",
    "pointwise": "pointwise pw pwconv pwl",
    "stem": "stem embedder patch conv1",
    "patch": "patch patches patchify",
    "downsample": "downsample downsampling downsampler downsamplers merging",
    "shortcut": "shortcut downsample skip residual identity",
    "upsample": "upsample upsampling upsampler upsamplers",
    "encoder": "encoder enc",
    "decoder": "decoder dec",
    "final": "final last post f top",
    "first": "before pre first input",
    "last": "after second post",
    "layerscale": "gamma layerscale ls ls1 ls2 scale lambda",
    "mask": "mask masked",
    "relative": "relative rel rpb rpe",
    "table": "table",
    "bias": "bias",
    "index": "index indices idx",
    "pool": "pool pooler pooling",
    "time": "time timestep temb temporal t",
    "text": "text txt language textual context caption prompt",
    "vision": "vision visual image img",
    "audio": "audio speech acoustic",
    "mid": "mid middle bottleneck neck",
    "input": "input in conv_in",
    "reduce": "reduce reduction squeeze",
    "excite": "se squeezeexcitation squeeze excite excitation",
    "quant": "quant quantizer quantize codebook",
    "lora": "lora adapter",
    "rope": "rope rotary inv freqs freq",
    "state": "ssm state recurrent rnn lstm gru",
    "box": "bbox box boxes",
    "level": "level levels scale",
    "transform": "transform",
    "content": "content",
    "average": "ema averaged average swa shadow teacher adam original",
    "modulation": "modulation modulate modulator mod adaln ada adanorm",
}
_SEVERAL = {
    "layer norm": "norm",
    "batch norm": "norm",
    "group norm": "norm",
    "rms norm": "norm",
    "instance norm": "norm",
    "layer scale": "layerscale",
    "layer scale parameter": "layerscale",
    "feed forward": "mlp",
    "self attention": "self attention",
    "self attn": "self attention",
    "encoder attn": "cross attention",
    "encoder attention": "cross attention",
    "enc dec attention": "cross attention",
    "multihead attn": "cross attention",
    "c attn": "qkv",
    "in proj": "qkv input",
    "query key value": "qkv",
    "q k v": "qkv",
    "key value": "kv",
    "c fc": "up mlp",
    "fc in": "up mlp",
    "fc out": "down mlp",
    "c proj": "out down",
    "h to 4": "up mlp",
    "4 h to": "down mlp",
    "lm head": "head",
    "embed out": "head output",
    "output embeddings": "head output",
    "output projection": "out head",
    "token embd": "token embedding",
    "embed in": "token embedding",
    "cls token": "classtoken",
    "class token": "classtoken",
    "cls embedding": "classtoken",
    "class embedding": "classtoken",
    "token type": "segment",
    "mask token": "mask token",
    "patch embed": "patch stem embedding",
    "patch embedding": "patch stem embedding",
    "patch embeddings": "patch stem embedding",
    "pos embed": "position embedding",
    "attn norm": "norm attention first",
    "attention norm": "norm attention first",
    "ffn norm": "norm mlp last",
    "mlp norm": "norm mlp last",
    "input layernorm": "norm first",
    "post attention layernorm": "norm last",
    "post attention norm": "norm last",
    "layernorm before": "norm first",
    "layernorm after": "norm last",
    "norm before": "norm first",
    "norm after": "norm last",
    "final layer norm": "norm final last",
    "norm cross": "norm cross attention",
    "cross norm": "norm cross attention",
    "attn cross": "cross attention",
    "encoder attn layer norm": "norm cross attention",
    "encoder attention layer norm": "norm cross attention",
    "gate up": "gate up mlp",
    "up gate": "gate up mlp",
    "modules to save": "block",
    "lora a": "lora narrow",
    "lora b": "lora widen",
    "lora down": "lora narrow",
    "lora up": "lora widen",
    "inv freq": "rope",
    "rotary emb": "rope",
}

_STRUCTURE = [
    "model",
    "module",
    "transformer",
    "net",
    "network",
    "backbone",
    "layer",
    "layers",
    "block",
    "blocks",
    "blk",
    "h",
    "stage",
    "stages",
    "features",
    "feature",
    "body",
    "trunk",
    "base",
    "main",
    "list",
    "modules",
    "sequential",
    "op",
    "ops",
    "component",
    "resblocks",
    "resnets",
    "default",
]

EXCLUSIVE: tuple[frozenset[str], ...] = (
    frozenset({"query", "key", "value", "qkv", "kv", "out"}),
    frozenset({"gate", "up", "down"}),
    frozenset({"encoder", "decoder"}),
    frozenset({"token", "position", "segment", "classtoken", "patch"}),
    frozenset({"self", "cross"}),
    frozenset({"text", "vision", "audio"}),
    frozenset({"attention", "mlp"}),
    frozenset({"downsample", "upsample"}),
    frozenset({"narrow", "widen"}),
    frozenset({"depthwise", "pointwise"}),
    frozenset({"head", "embedding"}),
)
STRUCTURAL = "block"  # the concept of words that say no more than "a part"

_WORDS: dict[tuple[str, ...], Bag] = {}
for _concept, _list in _SINGLE.items():
    for _word in _list.split():
        _WORDS.setdefault((_word,), {})[_concept] = 1.0
for _word in _STRUCTURE:
    _WORDS.setdefault((_word,), {})[STRUCTURAL] = 1.0
for _phrase, _list in _SEVERAL.items():
    _WORDS[tuple(_phrase.split())] = dict.fromkeys(_list.split(), 1.0)
_LONGEST = max(map(len, _WORDS))

# Words that a letter for query, key or value is often glued to.
_GLUED = frozenset(["norm", "ln", "layernorm", "rmsnorm", "proj", "linear", "conv", "pos", "position", "content"])
_PIECE = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|[0-9]+")


@lru_cache(maxsize=65536)
def words(segment: str) -> tuple[str, ...]:
    """The words of one segment of a key.

    >>> words("LayerNorm"), words("self_attn"), words("fc1"), words("dense_4h_to_h"), words("qnorm")
    (('layer', 'norm'), ('self', 'attn'), ('fc', '1'), ('dense', '4', 'h', 'to', 'h'), ('q', 'norm'))
    """
    found: list[str] = []
    for piece in _PIECE.findall(segment):
        word = piece.lower()
        found += (word[0], word[1:]) if word[0] in "qkv" and word[1:] in _GLUED and (word,) not in _WORDS else (word,)
    return tuple(found)


@lru_cache(maxsize=65536)
def concepts(segment: str) -> tuple[tuple[str, float], ...]:
    """What the words of a segment mean; words that nobody knows stand for themselves, behind a tilde.

    >>> concepts("q_proj"), concepts("LayerNorm"), concepts("foo2")
    ((('query', 1.0), ('out', 0.5), ('linear', 0.5), ('down', 0.5)), (('norm', 1.0),), (('~foo', 1.0),))
    """
    found: Bag = {}
    parts = words(segment)
    at = 0
    while at < len(parts):
        for length in range(min(_LONGEST, len(parts) - at), 0, -1):
            phrase = parts[at : at + length]
            bag = _WORDS.get(phrase)
            if bag is None and length == 2 and phrase[1].isdigit() and ("".join(phrase),) in _WORDS:
                bag = _WORDS[("".join(phrase),)] | _WORDS.get(phrase[:1], {})
            if bag is not None:
                break
        else:
            length = 1
            bag = {} if parts[at].isdigit() else {"~" + parts[at]: 1.0}
        for concept in bag:
            found[concept] = max(found.get(concept, 0.0), 1.0 if len(bag) == 1 else 0.5 if length == 1 else 1.0)
        at += length
    return tuple(found.items())
