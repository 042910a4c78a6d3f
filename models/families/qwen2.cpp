// SPDX-License-Identifier: Apache-2.0
#include "models/families/families.h"

namespace alambic::models {

constinit const Family kQwen2{
    .model_type = "qwen2",
    .architecture = "Qwen2ForCausalLM",
    .source = "arXiv:2407.10671, section 2.2. Also Qwen2.5, R1-Distill-Qwen",
    .defaults = R"({"vocab_size": 151936, "hidden_size": 4096, "intermediate_size": 22016, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 32, "hidden_act": "silu", "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6, "tie_word_embeddings": false, "use_sliding_window": false, "sliding_window": 4096,
        "max_window_layers": 28, "layer_types": null, "attention_dropout": 0.0,
        "pad_token_id": null, "bos_token_id": null, "eos_token_id": null})",
    .sliding_layers = SlidingLayers::kFromLayer,
    .qkv_bias = true,
    .names = kCommonNames,
};

}  // namespace alambic::models
