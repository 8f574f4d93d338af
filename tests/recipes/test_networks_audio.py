"""Speech models built here, converted by the recipes and run: both codebases' networks agree."""

from __future__ import annotations

import copy

import torch
from parity import assert_parity, convert, noisy
from reference_audio import OldWeightNorm, Whisper
from transformers import Wav2Vec2Config, Wav2Vec2ForCTC, WhisperConfig, WhisperForConditionalGeneration

import ckptsurgery as cs


@torch.no_grad()
def test_whisper_with_its_tied_head() -> None:
    config = WhisperConfig(
        vocab_size=51, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=128, decoder_ffn_dim=128, num_mel_bins=8, max_source_positions=10,
        max_target_positions=12, pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
        suppress_tokens=None, begin_suppress_tokens=None,
    )  # fmt: skip
    ours = noisy(Whisper(mels=8, words=51, width=32, count=4, layers=2, audio=10, text=12))
    hf = convert(ours, cs.load_recipe("whisper/openai_to_hf"), WhisperForConditionalGeneration(config))
    draw = torch.Generator().manual_seed(1)
    mel, tokens = torch.randn(2, 8, 20, generator=draw), torch.randint(0, 51, (2, 6), generator=draw)
    assert_parity(hf(input_features=mel, decoder_input_ids=tokens).logits, ours(mel, tokens))
    assert hf.proj_out.weight is hf.model.decoder.embed_tokens.weight


@torch.no_grad()
def test_wav2vec2_with_weight_norm_under_its_old_names() -> None:
    config = Wav2Vec2Config(
        vocab_size=12, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48,
        conv_dim=(16, 16), conv_kernel=(5, 3), conv_stride=(2, 2), num_feat_extract_layers=2, num_conv_pos_embeddings=8,
        num_conv_pos_embedding_groups=4,
    )  # fmt: skip
    new = Wav2Vec2ForCTC(config).eval()
    old = copy.deepcopy(new)
    old.wav2vec2.encoder.pos_conv_embed.conv = OldWeightNorm(32, 8, 4)
    noisy(old)
    convert(old, cs.load_recipe("wav2vec2/hf_to_hf5"), new)
    sound = torch.randn(2, 80, generator=torch.Generator().manual_seed(1))
    assert_parity(new(sound).logits, old(sound).logits)
