"""Tiny models of the families beside `FAMILIES`, each built when it is asked for, by the host's own class."""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from family import POOLED, WIDTH, Family, build, draw

SIZES = {"width": 512, "height": 384}
UNET = {
    "image_size": 16, "in_channels": 4, "out_channels": 4, "model_channels": 32, "num_res_blocks": [1, 1],
    "channel_mult": [1, 2], "num_heads": -1, "num_head_channels": 16, "use_spatial_transformer": True,
    "context_dim": WIDTH, "use_linear_in_transformer": True, "adm_in_channels": None, "use_temporal_attention": False,
}
XL = {
    **UNET, "transformer_depth": [0, 2], "transformer_depth_output": [0, 0, 2, 2], "transformer_depth_middle": 2,
    "num_classes": "sequential", "adm_in_channels": POOLED + 6 * 256,
}
FLUX = {
    "image_model": "flux", "in_channels": 16, "out_channels": 16, "vec_in_dim": POOLED, "context_in_dim": WIDTH,
    "hidden_size": 32, "mlp_ratio": 2.0, "num_heads": 2, "depth": 2, "depth_single_blocks": 2, "axes_dim": [4, 6, 6],
    "theta": 10000, "patch_size": 2, "qkv_bias": True, "guidance_embed": True, "txt_ids_dims": [],
}
FLUX2 = {
    "image_model": "flux2", "in_channels": 128, "out_channels": 128, "vec_in_dim": None, "context_in_dim": WIDTH,
    "hidden_size": 32, "mlp_ratio": 3.0, "num_heads": 2, "depth": 2, "depth_single_blocks": 2,
    "axes_dim": [4, 4, 4, 4], "theta": 2000, "patch_size": 1, "qkv_bias": False, "guidance_embed": True,
    "global_modulation": True, "mlp_silu_act": True, "ops_bias": False, "default_ref_method": "index",
    "ref_index_scale": 10.0, "txt_ids_dims": [3],
}
CHROMA = {
    "image_model": "chroma", "in_channels": 64, "out_channels": 64, "context_in_dim": WIDTH, "hidden_size": 32,
    "mlp_ratio": 2.0, "num_heads": 2, "depth": 2, "depth_single_blocks": 2, "axes_dim": [4, 6, 6], "theta": 10000,
    "patch_size": 2, "qkv_bias": True, "in_dim": 64, "out_dim": 32, "hidden_dim": 16, "n_layers": 2,
    "txt_ids_dims": [], "vec_in_dim": None,
}
RADIANCE = {
    **CHROMA, "image_model": "chroma_radiance", "in_channels": 3, "out_channels": 3, "patch_size": 8,
    "nerf_hidden_size": 16, "nerf_mlp_ratio": 2, "nerf_depth": 1, "nerf_max_freqs": 4, "nerf_tile_size": 512,
    "nerf_final_head_type": "conv", "nerf_embedder_dtype": torch.float32, "use_x0": False,
}
LUMINA = {
    "image_model": "lumina2", "patch_size": 2, "in_channels": 16, "dim": 48, "cap_feat_dim": WIDTH, "n_layers": 3,
    "n_refiner_layers": 2, "qk_norm": True, "n_heads": 2, "n_kv_heads": 1, "axes_dims": [8, 8, 8],
    "axes_lens": [300, 512, 512], "rope_theta": 10000.0, "ffn_dim_multiplier": 1.0, "multiple_of": 16,
}
Z_IMAGE = {
    **LUMINA, "dim": 256, "n_heads": 8, "n_kv_heads": 8, "axes_dims": [8, 12, 12], "z_image_modulation": True,
    "time_scale": 1000.0, "pad_tokens_multiple": 32, "rope_theta": 256.0,
}
Z_PIXEL = {
    **Z_IMAGE, "image_model": "zimage_pixel", "patch_size": 8, "in_channels": 3, "decoder_in_channels": 192,
    "decoder_hidden_size": 32, "decoder_num_res_blocks": 1, "decoder_max_freqs": 4,
}
HIDREAM = {
    "image_model": "hidream", "attention_head_dim": 16, "axes_dims_rope": [8, 4, 4], "caption_channels": [WIDTH, WIDTH],
    "max_resolution": [128, 128], "in_channels": 16, "llama_layers": [0, 1, 2, 3], "num_attention_heads": 2,
    "num_routed_experts": 2, "num_activated_experts": 1, "num_layers": 2, "num_single_layers": 2, "out_channels": 16,
    "patch_size": 2, "text_emb_dim": POOLED,
}
COSMOS = {
    "max_img_h": 240, "max_img_w": 240, "max_frames": 128, "in_channels": 16, "out_channels": 16, "patch_spatial": 2,
    "patch_temporal": 1, "model_channels": 96, "concat_padding_mask": True, "crossattn_emb_channels": WIDTH,
    "pos_emb_cls": "rope3d", "pos_emb_learnable": True, "pos_emb_interpolation": "crop", "min_fps": 1, "max_fps": 30,
    "use_adaln_lora": True, "adaln_lora_dim": 16, "num_blocks": 2, "num_heads": 4,
    "extra_per_block_abs_pos_emb": False, "rope_h_extrapolation_ratio": 4.0, "rope_w_extrapolation_ratio": 4.0,
    "rope_t_extrapolation_ratio": 1.0, "extra_h_extrapolation_ratio": 1.0, "extra_w_extrapolation_ratio": 1.0,
    "extra_t_extrapolation_ratio": 1.0, "rope_enable_fps_modulation": False,
}
OMNIGEN = {
    "image_model": "omnigen2", "axes_dim_rope": [8, 8, 8], "axes_lens": [1024, 1664, 1664],
    "ffn_dim_multiplier": None, "hidden_size": 48, "in_channels": 16, "multiple_of": 16, "norm_eps": 1e-5,
    "num_attention_heads": 2, "num_kv_heads": 1, "num_layers": 2, "num_refiner_layers": 2, "out_channels": None,
    "patch_size": 2, "text_feat_dim": WIDTH, "timestep_scale": 1000.0,
}
KREA = {
    "image_model": "krea2", "features": 64, "tdim": 32, "txtdim": 12, "heads": 2, "kvheads": 1, "multiplier": 1,
    "layers": 3, "patch": 2, "channels": 16, "txtlayers": 2, "txtheads": 2, "txtkvheads": 2,
}
QWEN = {
    "image_model": "qwen_image", "patch_size": 2, "in_channels": 64, "out_channels": 16, "num_layers": 3,
    "attention_head_dim": 16, "num_attention_heads": 2, "joint_attention_dim": WIDTH, "axes_dims_rope": (4, 6, 6),
}
HUNYUAN = {
    "image_model": "hunyuan_video", "in_channels": 16, "out_channels": 16, "vec_in_dim": POOLED,
    "context_in_dim": WIDTH, "hidden_size": 32, "mlp_ratio": 2.0, "num_heads": 2, "depth": 2, "depth_single_blocks": 2,
    "axes_dim": [4, 6, 6], "theta": 256, "patch_size": [1, 2, 2], "qkv_bias": True, "guidance_embed": True,
    "byt5": False, "meanflow": False, "use_cond_type_embedding": False, "vision_in_dim": None, "meanflow_sum": False,
}
HUNYUAN_IMAGE = {
    **HUNYUAN, "in_channels": 64, "out_channels": 64, "vec_in_dim": None, "patch_size": [1, 1], "axes_dim": [8, 8],
}
AURA = {
    "max_seq": 64, "cond_seq_dim": WIDTH, "n_double_layers": 2, "n_layers": 4, "dim": 32, "n_heads": 2,
    "global_conddim": 32,
}
KANDINSKY = {
    "image_model": "kandinsky5", "in_visual_dim": 16, "out_visual_dim": 16, "in_text_dim": WIDTH,
    "in_text_dim2": POOLED, "time_dim": 16, "model_dim": 128, "ff_dim": 64, "visual_embed_dim": 64,
    "num_text_blocks": 1, "num_visual_blocks": 2, "axes_dims": (32, 48, 48), "rope_scale_factor": (1.0, 1.0, 1.0),
}
ERNIE = {
    "image_model": "ernie", "hidden_size": 32, "num_attention_heads": 2, "num_layers": 2, "ffn_hidden_size": 32,
    "text_in_dim": WIDTH, "rope_axes_dim": (4, 6, 6),
}
IDEOGRAM = {
    "image_model": "ideogram4", "in_channels": 128, "num_layers": 2, "num_attention_heads": 2,
    "attention_head_dim": 16, "intermediate_size": 32, "adaln_dim": 16, "llm_features_dim": WIDTH,
    "mrope_section": (4, 2, 2),
}
LENS = {
    "image_model": "lens", "in_channels": 128, "out_channels": 32, "num_layers": 2, "num_attention_heads": 2,
    "attention_head_dim": 16, "axes_dims_rope": (4, 6, 6), "enc_hidden_dim": 20, "multi_layer_encoder_feature": True,
    "selected_layer_index": (0, 1),
}
MAGE = {
    "image_model": "mage_flow", "in_channels": 128, "num_layers": 2, "attention_head_dim": 16,
    "num_attention_heads": 2, "joint_attention_dim": WIDTH, "axes_dims_rope": (4, 6, 6),
}
JOY = {
    "image_model": "joyimage", "in_channels": 16, "hidden_size": 32, "patch_size": [1, 2, 2], "num_layers": 2,
    "num_attention_heads": 2, "text_dim": WIDTH, "rope_dim_list": [4, 6, 6],
}
BOOGU = {
    "image_model": "boogu", "hidden_size": 48, "num_layers": 2, "num_double_stream_layers": 1,
    "num_refiner_layers": 1, "num_attention_heads": 2, "num_kv_heads": 1, "multiple_of": 16,
    "axes_dim_rope": (8, 8, 8), "instruction_feat_dim": WIDTH,
}
WAN = {
    "image_model": "wan2.1", "model_type": "t2v", "dim": 48, "ffn_dim": 64, "num_heads": 2, "num_layers": 2,
    "text_dim": WIDTH, "text_len": 8, "in_dim": 16, "out_dim": 16, "freq_dim": 32, "patch_size": (1, 2, 2),
}
LTX = {
    "image_model": "ltxv", "num_layers": 2, "attention_head_dim": 16, "num_attention_heads": 2,
    "cross_attention_dim": 32, "caption_channels": WIDTH,
}
PIXART = {
    "image_model": "pixart_sigma", "num_heads": 2, "patch_size": 2, "hidden_size": 32, "in_channels": 4, "depth": 2,
    "caption_channels": WIDTH, "model_max_length": 11, "input_size": 64, "pe_interpolation": 1,
    "micro_condition": False,
}
HUNYUAN_DIT = {
    "image_model": "hydit1", "depth": 4, "hidden_size": 32, "num_heads": 2, "mlp_ratio": 1.0,
    "text_states_dim": WIDTH, "text_states_dim_t5": 24, "size_cond": True, "use_style_cond": True,
}
MOCHI = {
    "image_model": "mochi_preview", "depth": 2, "patch_size": 2, "num_heads": 2, "hidden_size_x": 48,
    "hidden_size_y": 32, "mlp_ratio_x": 256.0, "mlp_ratio_y": 1.0, "learn_sigma": False, "in_channels": 12,
    "qk_norm": True, "qkv_bias": False, "out_bias": True, "attn_drop": 0.0, "patch_embed_bias": True,
    "posenc_preserve_area": True, "timestep_mlp_bias": True, "attend_to_padding": False, "timestep_scale": 1000.0,
    "use_t5": True, "t5_feat_dim": 16, "t5_token_length": 256, "rope_theta": 10000.0,
}
COGVIDEO = {
    "image_model": "cogvideox", "num_attention_heads": 1, "attention_head_dim": 64, "time_embed_dim": 32,
    "num_layers": 2, "in_channels": 16, "patch_size": 2, "text_embed_dim": WIDTH,
    "use_rotary_positional_embeddings": True, "use_learned_positional_embeddings": False, "sample_height": 10,
    "sample_width": 6, "sample_frames": 5,
}


def full_mask(seed: int, tokens: int) -> dict[str, Any]:
    """As the encoders of these families give it: nothing is masked."""
    return {"attention_mask": torch.ones(1, tokens, dtype=torch.long)}


def llama(seed: int, tokens: int) -> dict[str, Any]:
    """HiDream's second text, of each layer that its blocks read."""
    return {"conditioning_llama3": draw(1, 4, 9, WIDTH, seed=seed + 1)}


def t5_ids(seed: int, tokens: int) -> dict[str, Any]:
    """Anima reads the words by these, and its text beside them."""
    ids = torch.arange(1, tokens - 3, dtype=torch.int) + 10 * seed
    return {"t5xxl_ids": ids, "t5xxl_weights": torch.ones(len(ids))}


def two_masked_texts(seed: int, tokens: int) -> dict[str, Any]:
    """HunyuanDiT reads T5's 256 tokens behind CLIP's 77."""
    return {"attention_mask": torch.ones(1, tokens), "conditioning_mt5xl": draw(1, 256, 24, seed=seed + 1),
            "attention_mask_mt5xl": torch.ones(1, 256)}


def seen_picture(seed: int, tokens: int) -> dict[str, Any]:
    """What CLIP sees in the first frame; without it Wan's network would take words for it."""
    return {"clip_vision_output": SimpleNamespace(penultimate_hidden_states=draw(1, 257, 1280, seed=40))}


def inpaint(seed: int = 0) -> Any:
    """SD1's inpainting checkpoint: a mask and a masked picture beside the latent."""
    patcher = build("SD15", {
        **UNET, "in_channels": 9, "num_heads": 2, "num_head_channels": -1, "transformer_depth": [1, 1],
        "transformer_depth_output": [1, 1, 1, 1], "transformer_depth_middle": 1}, seed, extra={})
    patcher.model.set_inpaint()
    return patcher


def anima(seed: int = 0) -> Any:
    """The adapter between its two texts has no width in the configuration."""
    from comfy.ldm.anima import model as host

    whole = host.LLMAdapter

    class Small(whole):
        def __init__(self, device: Any = None, dtype: Any = None, operations: Any = None, **_: Any):
            super().__init__(source_dim=WIDTH, target_dim=WIDTH, model_dim=WIDTH, num_layers=2, num_heads=2,
                             device=device, dtype=dtype, operations=operations)

    host.LLMAdapter = Small
    try:
        return build("Anima", {**COSMOS, "image_model": "anima"}, seed)
    finally:
        host.LLMAdapter = whole


def radiance(seed: int = 0) -> Any:
    """One of its options is newer than the oldest host, which refuses what it does not know."""
    from comfy.ldm.chroma_radiance.model import ChromaRadianceParams

    newer = "use_sequential_txt_ids"
    known = newer in (one.name for one in fields(ChromaRadianceParams))
    return build("ChromaRadiance", {**RADIANCE, **({newer: False} if known else {})}, seed)


def make(kind: str, config: dict[str, Any], extra: dict[str, Any] | None = None) -> Callable[..., Any]:
    """How to build a model with a seed, 0 unless one is given."""
    return partial(_make, kind, config, extra)


def _make(kind: str, config: dict[str, Any], extra: dict[str, Any] | None, seed: int = 0) -> Any:
    return build(kind, config, seed, extra)


def joint(kind: str, channels: int, config: dict[str, Any], extra: dict[str, Any] | None = None, **options: Any,
          ) -> Family:
    return Family(make(kind, config, extra), True, channels, options.pop("pooled", False), kind=kind, **options)


def cross(kind: str, channels: int, config: dict[str, Any], **options: Any) -> Family:
    return Family(make(kind, config), False, channels, options.pop("pooled", False), kind=kind, **options)


GUIDANCE = {"guidance": 2.5}
WIDE = {"patch": 1, "size": (5, 4)}  # latents of 16 pixels' side
PIXELS = {"patch": 8, "size": (36, 28)}  # no autoencoder
KLEIN = {**FLUX2, "guidance_embed": False}

MODERN = {
    "sd1_inpaint": Family(inpaint, False, 4, False, kind="SD15"),
    "ssd1b": cross("SSD1B", 4, {**XL, "transformer_depth_middle": -1}, pooled=True, options=SIZES),
    "koala": cross("KOALA_700M", 4, {**XL, "transformer_depth_middle": -2}, pooled=True, options=SIZES),
    "sdxl_refiner": cross("SDXLRefiner", 4, {**XL, "adm_in_channels": POOLED + 5 * 256}, pooled=True, options=SIZES),
    "flux_schnell": joint("FluxSchnell", 16, {**FLUX, "guidance_embed": False}, pooled=True),
    "flux_fill": joint("FluxInpaint", 16, {**FLUX, "in_channels": 96}, pooled=True, options=GUIDANCE),
    "flux_kontext": joint("Flux", 16, FLUX, pooled=True, options=GUIDANCE, references=((1, 16, 8, 6),)),
    "klein_edit": joint("Flux2", 128, KLEIN, references=((1, 128, 4, 3),), least=512, **WIDE),
    "longcat": joint("LongCatImage", 16, {
        **FLUX, "vec_in_dim": None, "guidance_embed": False, "txt_ids_dims": [1, 2]}, tokens=13),
    "chroma": joint("Chroma", 16, CHROMA),
    "chroma_radiance": Family(radiance, True, 3, False, kind="ChromaRadiance", **PIXELS),
    "lumina2": joint("Lumina2", 16, LUMINA, beside=full_mask),
    "z_image": joint("ZImage", 16, Z_IMAGE, beside=full_mask, multiple=32),
    "z_image_pixel": joint("ZImagePixelSpace", 3, Z_PIXEL, beside=full_mask, multiple=32, **PIXELS),
    "hidream": joint("HiDream", 16, HIDREAM, pooled=True, beside=llama, order="picture text llama llama", llama=9),
    "anima": Family(anima, False, 16, False, video=True, kind="Anima", beside=t5_ids, words=7, least=512),
    "cosmos_predict2": cross("CosmosT2IPredict2", 16, {**COSMOS, "image_model": "cosmos_predict2"}, video=True),
    "omnigen2": joint("Omnigen2", 16, OMNIGEN, beside=full_mask, order="text references picture"),
    "krea2": joint("Krea2", 16, KREA, {}, video=True, width=24, tolerance=1e-3),
    "qwen_edit": joint("QwenImage", 16, QWEN, video=True, references=((1, 16, 1, 8, 6),)),
    "qwen_layered": joint("QwenImage", 16, QWEN, video=True, frames=3),
    "auraflow": joint("AuraFlow", 4, AURA, order="registers text picture", registers=8),
    "hunyuan_image": joint("HunyuanImage21", 64, HUNYUAN_IMAGE, patch=1, size=(5, 3)),
    "hunyuan_video": joint("HunyuanVideo", 16, HUNYUAN, video=True, frames=2, pooled=True, size=(10, 6)),
    "kandinsky5_image": cross("Kandinsky5Image", 16, KANDINSKY, video=True, pooled=True, size=(10, 6)),
    "ernie": joint("ErnieImage", 128, ERNIE, order="picture text", deaf=True, **WIDE),
    "ideogram4": joint("Ideogram4", 128, IDEOGRAM, {}, **WIDE),
    "lens": joint("Lens", 128, LENS, width=40, order="picture text", **WIDE),
    "mage_flow": joint("MageFlow", 128, MAGE, **WIDE),
    "joyimage": joint("JoyImage", 16, JOY, {"theta": 10000}, video=True, order="picture text"),
    "boogu": joint("Boogu", 16, BOOGU, beside=full_mask, order="text references picture"),
    "wan21_t2v": cross("WAN21_T2V", 16, WAN, video=True, frames=2),
    "wan21_i2v": cross("WAN21_I2V", 16, {**WAN, "model_type": "i2v", "in_dim": 36}, video=True, frames=2,
                       beside=seen_picture),
    "wan22_5b": cross("WAN22_T2V", 48, {**WAN, "in_dim": 48, "out_dim": 48}, video=True, frames=2),
    "ltxv": cross("LTXV", 128, LTX, video=True, frames=2, beside=full_mask, **WIDE),
    "pixart_sigma": cross("PixArtSigma", 4, PIXART, fixed=True, size=(48, 40), deaf=True),
    "hunyuan_dit": cross("HunyuanDiT1", 4, HUNYUAN_DIT, tokens=77, fixed=True, beside=two_masked_texts, deaf=True),
    "mochi": joint("GenmoMochi", 12, MOCHI, video=True, frames=2, tokens=256, fixed=True, width=16, size=(10, 6),
                   beside=full_mask, order="picture text"),
    "cogvideox": joint("CogVideoX_T2V", 16, COGVIDEO, video=True, frames=2, size=(10, 6)),
}


def missing() -> list[str]:
    """Families that the running host lacks."""
    return [name for name, family in MODERN.items() if family.is_missing()]
