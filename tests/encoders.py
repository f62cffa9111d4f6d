"""Tiny text encoders of the host's real classes, in which every token changes its own position most."""
from __future__ import annotations

import functools
import io
from pathlib import Path
from typing import Any

import comfy.sd
import pytest
import sentencepiece
import torch
from comfy import sd1_clip, sdxl_clip
from comfy.supported_models_base import ClipTarget
from comfy.text_encoders import (
    anima,
    aura_t5,
    cosmos,
    hidream,
    hunyuan_image,
    hunyuan_video,
    kandinsky5,
    longcat_image,
    lt,
    lumina2,
    omnigen2,
    ovis,
    pixart_t5,
    qwen_image,
    sd2_clip,
    sd3_clip,
    wan,
    z_image,
)
from comfy.text_encoders import flux as flux_text
from safetensors.torch import save_file
from transformers import Qwen2Tokenizer

try:
    from comfy.text_encoders import krea2
except ImportError:  # a host before Krea 2
    krea2 = None

ENCODERS: dict[str, tuple[Any, Any]] = {
    "sd1": (sd1_clip.SD1Tokenizer, sd1_clip.SD1ClipModel),
    "sd2": (sd2_clip.SD2Tokenizer, sd2_clip.SD2ClipModel),
    "sdxl": (sdxl_clip.SDXLTokenizer, sdxl_clip.SDXLClipModel),
    "sd3": (sd3_clip.SD3Tokenizer, sd3_clip.sd3_clip()),
    "sd3_clip": (sd3_clip.SD3Tokenizer, sd3_clip.sd3_clip(t5=False)),
    "sd3_g": (sd3_clip.SD3Tokenizer, sd3_clip.sd3_clip(clip_l=False, t5=False)),
    "sd3_l_t5": (sd3_clip.SD3Tokenizer, sd3_clip.sd3_clip(clip_g=False)),
    "sd3_t5": (sd3_clip.SD3Tokenizer, sd3_clip.sd3_clip(clip_l=False, clip_g=False)),
    "flux": (flux_text.FluxTokenizer, flux_text.FluxClipModel),
    "qwen": (qwen_image.QwenImageTokenizer, qwen_image.QwenImageTEModel),
}
# Encoders of one text whose every row is a token's, by the files that the host has of them; newer hosts have more.
MODERN: dict[str, tuple[Any, Any]] = {
    "chroma": (pixart_t5.PixArtTokenizer, pixart_t5.pixart_te()),
    "cosmos": (cosmos.CosmosT5Tokenizer, cosmos.te()),
    "ltxv": (lt.LTXVT5Tokenizer, lt.ltxv_te()),
    "wan": (wan.WanT5Tokenizer, wan.te()),
    "aura": (aura_t5.AuraT5Tokenizer, aura_t5.AuraT5Model),
    "lumina": (lumina2.LuminaTokenizer, lumina2.te()),
    "flux2": (flux_text.Flux2Tokenizer, flux_text.flux2_te()),
    "klein": (flux_text.KleinTokenizer, flux_text.klein_te()),
    "klein_8b": (flux_text.KleinTokenizer8B, flux_text.klein_te(model_type="qwen3_8b")),
    "z_image": (z_image.ZImageTokenizer, z_image.te()),
    "omnigen2": (omnigen2.Omnigen2Tokenizer, omnigen2.te()),
    "longcat": (longcat_image.LongCatImageTokenizer, longcat_image.te()),
    "ovis": (ovis.OvisTokenizer, ovis.te()),
    "kandinsky": (kandinsky5.Kandinsky5Tokenizer, kandinsky5.te()),
    "hunyuan_image": (hunyuan_image.HunyuanImageTokenizer, hunyuan_image.te()),
    "hunyuan_video": (hunyuan_video.HunyuanVideoTokenizer, hunyuan_video.hunyuan_video_clip()),
    "hunyuan_video_15": (hunyuan_video.HunyuanVideo15Tokenizer, hunyuan_image.te()),
}
if krea2 is not None:
    MODERN["krea2"] = krea2.Krea2Tokenizer, krea2.te()
PECULIAR_ENCODERS: dict[str, tuple[Any, Any]] = {  # texts that lie in options, or in two places
    "hidream": (hidream.HiDreamTokenizer, hidream.hidream_clip()),
    "anima": (anima.AnimaTokenizer, anima.te()),
}
READ_TOKENIZER = Qwen2Tokenizer.from_pretrained
REAL_WIDTHS = {"l": 768, "g": 1280, "h": 1024, "t5": 4096}
SPREAD = 32  # columns of a token's embedding that are not 0
T5 = {"d_ff": 32, "d_kv": 8, "num_heads": 2, "num_layers": 1}
LLM = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1}
LAYERS = {  # of language models: the host's encoders read the outputs of deep ones
    "qwen25_7b": 4, "qwen25_3b": 1, "qwen3_06b": 1, "qwen3_2b": 1, "qwen3_4b": 28, "qwen3_8b": 28, "qwen3vl_4b": 36,
    "mistral3_24b": 31, "gemma2_2b": 3, "llama": 4,
}


class ByteMistral(sd1_clip.SDTokenizer):
    """Mistral's arguments with a vocabulary that ships with the host: Mistral's own lies in its checkpoint."""

    def __init__(self, embedding_directory: str | None = None, tokenizer_data: Any = None):
        super().__init__(
            str(Path(qwen_image.__file__).parent / "qwen25_tokenizer"), pad_with_end=False, has_start_token=False,
            has_end_token=False, pad_to_max_length=False, max_length=99999999, min_length=1, pad_token=11,
            start_token=1, pad_left=True, disable_weights=True, embedding_directory=embedding_directory,
            embedding_size=5120, embedding_key="mistral3_24b", tokenizer_class=Qwen2Tokenizer)


@functools.cache
def sentence_pieces(gemma: bool) -> bytes:
    """A small vocabulary of SentencePiece as Gemma's checkpoint brings it, or UMT5's (which begins with a space)."""
    words = "a photo of red platypus quokka in the snow one two three four five six seven eight nine ten at night polar"
    written = io.BytesIO()
    options: dict[str, Any] = {"bos_id": 2, "unk_id": 3} if gemma else {"bos_id": -1, "unk_id": 2}
    letters = "abcdefghijklmnopqrstuvwxyz ABCDEFGHIJKLMNOPQRSTUVWXYZ 0123456789 ,.:;<>()!?'-"
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([words, letters]), pad_id=0, eos_id=1, minloglevel=2, num_threads=1,
        model_writer=written, vocab_size=500, model_type="bpe", byte_fallback=True, hard_vocab_limit=False,
        add_dummy_prefix=not gemma, remove_extra_whitespaces=not gemma, normalization_rule_name="identity",
        **options)
    return written.getvalue()


@functools.cache
def shared_tokenizer(path: str) -> Any:
    """Qwen's, read once: most encoders of today have it, and reading takes seconds."""
    tokenizer = READ_TOKENIZER(path)
    tokenizer.get_vocab = functools.cache(tokenizer.get_vocab)
    return tokenizer


def tokenizer_files(name: str) -> dict[str, Any]:
    """What a checkpoint brings for its tokenizer."""
    if name in ("lumina", "wan"):
        return {"spiece_model": torch.frombuffer(bytearray(sentence_pieces(name == "lumina")), dtype=torch.uint8)}
    return {"mistral3_24b_tokenizer_class": ByteMistral} if name == "flux2" else {}


def text_encoder(name: str, embeddings: str | None = None) -> Any:
    """A CLIP of the family's real classes in which every token changes its own position most.

    Args:
        embeddings: a folder of textual inversions; with one, CLIP and T5 have their real widths.
    """
    width = {key: real if embeddings else 32 for key, real in REAL_WIDTHS.items()}
    if name in ("sd3", "sd3_l_t5"):
        width["t5"] = 4096  # to which the host pads CLIP's channels
    clips: dict[str, Any] = {f"clip_{part}_model_config": {
        "hidden_size": width[part], "intermediate_size": 32, "num_attention_heads": 2, "num_hidden_layers": 3,
    } for part in "lgh"}
    llms = {f"{part}_model_config": {**LLM, "num_hidden_layers": layers} for part, layers in LAYERS.items()}
    llms["mistral3_24b_model_config"]["vocab_size"] = 152064  # of the vocabulary in Mistral's place
    t5s = {f"{part}_model_config": {**T5, "d_model": width["t5"]}
           for part in ("t5xxl", "clip_t5xxl", "clip_umt5xxl", "clip_pile_t5xl", "pile_t5xl", "umt5xxl")}
    glyphs = {"_model_config": {**T5, "d_model": 32}}  # the host gives ByT5 no name
    target = ClipTarget(*{**ENCODERS, **MODERN, **PECULIAR_ENCODERS}[name])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Qwen2Tokenizer, "from_pretrained", shared_tokenizer)
        clip = comfy.sd.CLIP(target, embedding_directory=embeddings, tokenizer_data=tokenizer_files(name),
                             model_options={"dtype": torch.float16, **clips, **llms, **t5s, **glyphs})
    fill_text(clip.cond_stage_model)
    return clip


def fill_text(encoder: torch.nn.Module) -> None:
    """Random weights, small where other positions come in; nothing touches a vision tower."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in encoder.named_parameters():
            if ".visual." in name or parameter.ndim == 0:
                continue
            part = parameter[:, :SPREAD] if len(parameter) > 10000 else parameter
            mixes = name.endswith(("out_proj.weight", "SelfAttention.o.weight", "o_proj.weight"))
            scale = 1e-3 * part[0].numel() ** -0.5 if mixes else 1.0 if part is not parameter else 0.1
            parameter.zero_()
            part.copy_(torch.randn(part.shape, generator=generator) * scale)
            if parameter.ndim == 1 and name.endswith("weight"):
                parameter += 1.0
        for block in encoder.modules():
            if hasattr(block, "post_feedforward_layernorm"):  # Gemma's norm behind attention would make it large
                block.get_parameter("post_attention_layernorm.weight").fill_(1e-3 - 1.0)


def save_embeddings(folder: Path) -> None:
    """Textual inversions: of SD1 (3 and 12 vectors), of SDXL (2 and 4 for its encoders), of SD2, and one for T5."""
    generator = torch.Generator().manual_seed(1)
    for name, parts in {"three": {"emb_params": (3, 768)}, "twelve": {"emb_params": (12, 768)},
                        "both-xl": {"clip_l": (2, 768), "clip_g": (4, 1280)}, "wide": {"emb_params": (2, 1024)},
                        "t5": {"t5xxl": (2, 4096)}}.items():
        tensors = {key: torch.zeros(shape) for key, shape in parts.items()}
        for tensor in tensors.values():
            tensor[:, :SPREAD] = torch.randn(len(tensor), SPREAD, generator=generator)
        save_file(tensors, folder / f"{name}.safetensors")
