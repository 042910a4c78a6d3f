// SPDX-License-Identifier: Apache-2.0
#include "models/families/families.h"

namespace alambic::models {

constexpr auto kNames = join(kEnds, kFourNorms, kProjections, kHeadNorms);
constinit const Family kGemma3Text{
    .model_type = "gemma3_text",
    .architecture = "Gemma3ForCausalLM",
    .source = "Gemma 3 Technical Report, arXiv:2503.19786, section 2; (1 + w) norms as in Gemma 1 and 2",
    .defaults = R"({"vocab_size": 262208, "hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26,
        "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256, "hidden_activation": "gelu_pytorch_tanh",
        "max_position_embeddings": 131072, "rms_norm_eps": 1e-6, "tie_word_embeddings": true, "attention_bias": false,
        "attention_dropout": 0.0, "query_pre_attn_scalar": 256, "sliding_window": 4096, "layer_types": null,
        "final_logit_softcapping": null, "attn_logit_softcapping": null, "use_bidirectional_attention": false,
        "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 1})",
    .rope_theta = 1000000,
    .local_rope_theta = 10000,
    .sliding_layers = SlidingLayers::kPattern,
    .norm_weight_offset = 1,
    .scale_embedding = true,
    .names = kNames,
};

}  // namespace alambic::models
