// SPDX-License-Identifier: Apache-2.0
#include "models/families/families.h"

namespace alambic::models {

constinit const Family kSmolLm3{
    .model_type = "smollm3",
    .architecture = "SmolLM3ForCausalLM",
    .source = "SmolLM3 model card; layers without positions: arXiv:2501.18795",
    .defaults = R"({"vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 11008, "num_hidden_layers": 36,
        "num_attention_heads": 16, "num_key_value_heads": 4, "hidden_act": "silu", "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6, "tie_word_embeddings": true, "attention_bias": false, "mlp_bias": false,
        "use_sliding_window": false, "sliding_window": null, "no_rope_layers": null, "no_rope_layer_interval": 4,
        "layer_types": null, "attention_dropout": 0.0,
        "pad_token_id": 128004, "bos_token_id": 128000, "eos_token_id": 128001})",
    .rope_theta = 2000000,
    .sliding_layers = SlidingLayers::kWithoutRope,
    .names = kCommonNames,
};

}  // namespace alambic::models
