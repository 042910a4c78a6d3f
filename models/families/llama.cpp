// SPDX-License-Identifier: Apache-2.0
#include "models/families/families.h"

namespace alambic::models {

constinit const Family kLlama{
    .model_type = "llama",
    .architecture = "LlamaForCausalLM",
    .source = "arXiv:2302.13971 section 2.2; RoPE scaling: Llama 3.1 model card. Also SmolLM2, Yi, R1-Distill-Llama",
    .defaults = R"({"vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": null, "head_dim": null, "hidden_act": "silu",
        "max_position_embeddings": 2048, "rms_norm_eps": 1e-6, "tie_word_embeddings": false, "attention_bias": false,
        "mlp_bias": false, "attention_dropout": 0.0, "pretraining_tp": 1,
        "pad_token_id": null, "bos_token_id": 1, "eos_token_id": 2})",
    .names = kCommonNames,
};

}  // namespace alambic::models
