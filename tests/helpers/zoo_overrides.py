"""Configuration entries per model type, for which the rules by name in `zoo` are wrong or insufficient."""

# Vision models with stages: one block per stage. Their stride is 32, so 64 x 64 images have 2 x 2 locations.
STAGES = {"depths": [1, 1, 1, 1], "hidden_sizes": [8, 16, 16, 32], "image_size": 64}
PYRAMID = {**STAGES, "num_attention_heads": [1, 2, 2, 4], "mlp_ratios": [2, 2, 2, 2]}
SWIN = {"embed_dim": 16, "depths": [1, 1], "num_heads": [2, 4], "window_size": 4, "patch_size": 4}

# Multi-head latent attention: the rotated and the other part of a head have separate sizes; no grouped queries.
LATENT = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
LATENT |= {"num_key_value_heads": 4}
# Routed experts after one dense block.
ROUTED = {"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 2}
MLP_TYPES = {"mlp_layer_types": ["dense", "sparse"]}
# Gated delta nets.
DELTA = {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8}
ROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}

OVERRIDES = {
    # text
    "axk1": LATENT | ROUTED | MLP_TYPES,
    "axk2": LATENT | ROUTED | MLP_TYPES | {"index_topk": 4, "index_head_dim": 16, "index_n_heads": 2},
    "canine": {"num_hash_buckets": 64},
    "cohere_compass_text": {"rope_parameters": {"full_attention": ROPE, "sliding_attention": ROPE}},
    "deepseek_v2": LATENT | ROUTED | {"first_k_dense_replace": 1},
    "deepseek_v3": LATENT | ROUTED | {"first_k_dense_replace": 1},
    "esmc": {"num_key_value_heads": 4},  # does not support grouped queries
    "funnel": {"block_sizes": [1, 2], "block_repeats": [1, 1]},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "gptj": {"rotary_dim": 4},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "layoutlmv3": {"coordinate_size": 6, "shape_size": 4},  # 4 coordinates and 2 lengths make up a hidden state
    "lilt": {"hidden_size": 48},  # divisible by 6 (layout entries) and by heads and shrink ratio
    "longformer": {"attention_window": 8},
    "luke": {"entity_vocab_size": 10, "entity_emb_size": 16},
    "markuplm": {"max_depth": 4, "max_xpath_tag_unit_embeddings": 20, "max_xpath_subs_unit_embeddings": 20},
    "minicpm3": LATENT,
    "mistral4": LATENT | ROUTED | {"first_k_dense_replace": 1, "head_dim": 16},
    "mobilebert": {"embedding_size": 16, "intra_bottleneck_size": 16, "num_feedforward_networks": 2},
    "perceiver": {
        "num_latents": 8,
        "d_latents": 32,
        "num_self_attends_per_block": 2,
        "num_self_attention_heads": 4,
        "num_cross_attention_heads": 1,  # a divisor of the 261 channels of the Fourier features
        "image_size": 16,
    },
    "qwen3_5": {"text_config": DELTA},
    "qwen3_5_text": DELTA,
    "qwen3_next": DELTA,
    "reformer": {"attn_layers": ["local", "lsh"], "axial_pos_shape": [8, 8], "axial_pos_embds_dim": [16, 16]},
    "roc_bert": {
        "pronunciation_vocab_size": 99,
        "pronunciation_embed_dim": 8,
        "shape_vocab_size": 99,
        "shape_embed_dim": 8,
    },
    # mm_tokens_per_image: 4 x 4 patches pooled to 2 x 2 tokens
    "shieldgemma2": {"mm_tokens_per_image": 4, "yes_token_index": 10, "no_token_index": 11},
    "t5": {"decoder_start_token_id": 0},  # missing in the class, set in all checkpoints
    "xmod": {"default_language": "en_XX"},
    # the block of the first hybrid layer is shared with at least one more
    "zamba": {"layers_block_type": ["linear_attention", "hybrid", "hybrid"], "num_hidden_layers": 3},
    "zamba2": {"num_key_value_heads": 4, "n_mamba_heads": 4, "mamba_d_state": 8, "chunk_size": 8},
    # image
    "bit": STAGES | {"num_groups": 4},
    "convnext": STAGES | {"patch_size": 4},
    "convnextv2": STAGES | {"patch_size": 4},
    "cvt": {"embed_dim": [16, 32, 32], "depth": [1, 2, 3], "num_heads": [1, 2, 2]},  # stage i needs more than i blocks
    "dinat": SWIN | {"kernel_size": 3, "dilations": [[1], [1]]},
    "donut-swin": SWIN,
    "efficientnet": {"width_coefficient": 0.1, "depth_coefficient": 0.1, "hidden_dim": 128, "image_size": 64},
    "focalnet": STAGES | {"patch_size": 4, "embed_dim": 8},
    "hgnet_v2": STAGES
    | {
        "embedding_size": 16,
        "stem_channels": [3, 8, 8],
        "stage_in_channels": [8, 8, 16, 16],
        "stage_mid_channels": [8, 8, 8, 8],
        "stage_out_channels": [8, 16, 16, 32],
        "stage_num_blocks": [1, 1, 1, 1],
        "stage_numb_of_layers": [1, 1, 1, 1],
    },
    "hiera": STAGES
    | {"embed_dim": 8, "num_heads": [1, 2, 2, 4], "image_size": [64, 64], "patch_size": [7, 7], "depths": [1, 1, 1, 2]},
    # its patches are 16 x 16 regardless of the configuration, and two more stages halve the sides
    "levit": {"image_size": 128, "patch_size": 16, "hidden_sizes": [16, 32, 32], "key_dim": [8, 8, 8]}
    | {"depths": [1, 1, 1], "num_attention_heads": [2, 2, 2]},
    "mobilenet_v1": {"depth_multiplier": 0.1, "image_size": 64},
    "mobilenet_v2": {"depth_multiplier": 0.1, "image_size": 64},
    "mobilevit": {"hidden_sizes": [16, 16, 16], "neck_hidden_sizes": [8, 8, 8, 16, 16, 16, 32]}
    | {"image_size": 64, "patch_size": 2},
    "mobilevitv2": {"width_multiplier": 0.1, "n_attn_blocks": [1, 1, 1], "image_size": 64, "patch_size": 2},
    "poolformer": STAGES,
    "pp_lcnet": {"scale": 0.1, "class_expand": 32},
    "pvt": PYRAMID,
    "pvt_v2": PYRAMID | {"image_size": [64, 64]},
    "regnet": STAGES | {"groups_width": 4, "embedding_size": 8},
    "resnet": STAGES | {"embedding_size": 8},
    "segformer": PYRAMID,
    "siglip2": {"vision_config": {"num_patches": 16}},
    "swiftformer": {"depths": [1, 1, 1, 1], "embed_dims": [8, 16, 16, 32], "image_size": 64},
    "swin": SWIN,
    "swinv2": SWIN,
    "textnet": {
        "stem_out_channels": 8,
        "hidden_sizes": [8, 8, 16, 16, 32],
        "conv_layer_kernel_sizes": [[[3, 3]], [[1, 3]], [[3, 1]], [[3, 3]]],
        "conv_layer_strides": [[2], [2], [2], [2]],
        "image_size": [64, 64],
    },
    "timm_wrapper": {"architecture": "test_vit", "model_args": {"img_size": 64}},
    # audio
    "audio-spectrogram-transformer": {"max_length": 32, "num_mel_bins": 16, "frequency_stride": 8, "time_stride": 8},
    "wav2vec2-bert": {"feature_projection_input_dim": 16},
    "whisper": {"max_source_positions": 20, "num_mel_bins": 16},
    # video
    "videoprism_vision_model": {"num_spatial_layers": 2, "num_temporal_layers": 2, "tubelet_size": [1, 8, 8]},
    "vivit": {"tubelet_size": [2, 8, 8]},
    "vjepa2": {
        "crop_size": 32,
        "frames_per_clip": 4,
        "num_pooler_layers": 1,
        "pred_hidden_size": 32,
        "pred_num_attention_heads": 4,
        "pred_num_hidden_layers": 1,
    },
}
