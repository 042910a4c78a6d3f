// SPDX-License-Identifier: Apache-2.0
#include "models/families/families.h"

namespace alambic::models {

constinit const Family kMistral{
    .model_type = "mistral",
    .architecture = "MistralForCausalLM",
    .source = "arXiv:2310.06825, section 2 (the window); Nemo's head size differs from hidden size / heads",
    .defaults = R"({"vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": null, "hidden_act": "silu",
        "max_position_embeddings": 131072, "rms_norm_eps": 1e-6, "tie_word_embeddings": false, "sliding_window": 4096,
        "attention_dropout": 0.0, "pad_token_id": null, "bos_token_id": 1, "eos_token_id": 2})",
    .names = kCommonNames,
};

}  // namespace alambic::models
