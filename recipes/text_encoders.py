"""Tokenizer and text encoders of the teachers: small CLIPs and T5s over one vocabulary, that of all captions."""

from pathlib import Path

import torch
from tokenizers import Tokenizer, models, trainers
from torch import Tensor, nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
)

from shivelight.demo.data import EmojiData

TEXT_WIDTH = 96
TEXT_TOKENS = 16


def build_tokenizer(folder: Path) -> CLIPTokenizer:
    """A CLIP BPE tokenizer trained on every caption of the full set; reused if it is already there."""
    if (folder / "tokenizer_config.json").exists():
        return CLIPTokenizer.from_pretrained(folder)
    start, end = "<|startoftext|>", "<|endoftext|>"
    template = CLIPTokenizer()
    tokenizer = Tokenizer(models.BPE(end_of_word_suffix="</w>", unk_token=end))
    tokenizer.normalizer = template.backend_tokenizer.normalizer
    tokenizer.pre_tokenizer = template.backend_tokenizer.pre_tokenizer
    trainer = trainers.BpeTrainer(vocab_size=3000, special_tokens=[start, end], end_of_word_suffix="</w>")
    tokenizer.train_from_iterator((str(c) for c in EmojiData("full").captions()), trainer)
    tokenizer.model.save(str(folder))
    trained = CLIPTokenizer(
        vocab=str(folder / "vocab.json"), merges=str(folder / "merges.txt"), model_max_length=TEXT_TOKENS
    )
    trained.save_pretrained(folder)
    return trained


def clip_config(tokenizer: CLIPTokenizer) -> CLIPTextConfig:
    """Three layers of width 96."""
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=TEXT_WIDTH,
        intermediate_size=4 * TEXT_WIDTH,
        projection_dim=TEXT_WIDTH,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=TEXT_TOKENS,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def build_t5(tokenizer: CLIPTokenizer) -> T5EncoderModel:
    """Two layers of width 96, over the ids of the CLIP tokenizer."""
    return T5EncoderModel(
        T5Config(
            vocab_size=len(tokenizer),
            d_model=TEXT_WIDTH,
            d_kv=24,
            d_ff=2 * TEXT_WIDTH,
            num_layers=2,
            num_heads=4,
            dropout_rate=0.0,
            feed_forward_proj="gated-gelu",
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def attention_mask(ids: Tensor, end: int) -> Tensor:
    """1 up to and with the first end-of-text token of ids [B, M], as the tokenizer gives it: its padding is that token too."""
    ended = (ids == end).long()
    return (ended.cumsum(1) - ended == 0).long()


def load_trained(module: nn.Module, folder: Path) -> None:
    """Start a text encoder from the first one of a trained SD3 pipeline: CLIP whole, T5 with its token embeddings."""
    trained = CLIPTextModelWithProjection.from_pretrained(folder / "text_encoder", dtype=torch.float32).text_model
    if isinstance(module, CLIPTextModel | CLIPTextModelWithProjection):
        getattr(module, "text_model", module).load_state_dict(trained.state_dict())
    elif isinstance(module, T5EncoderModel):
        tokens = trained.embeddings.token_embedding.weight.data
        # T5 begins with embeddings of variance 1 and normalises only what it adds to them.
        module.shared.weight.data.copy_(tokens / tokens.std())
