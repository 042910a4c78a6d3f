// SPDX-License-Identifier: Apache-2.0
#include "models/families/families.h"

namespace alambic::models {

constexpr auto kNames = join(kEnds, kFourNorms, kProjections);
constinit const Family kGemma2{
    .model_type = "gemma2",
    .architecture = "Gemma2ForCausalLM",
    .source = "Gemma 2 Technical Report, arXiv:2408.00118, section 2",
    .defaults = R"({"vocab_size": 256000, "hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26,
        "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256, "hidden_activation": "gelu_pytorch_tanh",
        "max_position_embeddings": 8192, "rms_norm_eps": 1e-6, "tie_word_embeddings": true, "attention_bias": false,
        "attention_dropout": 0.0, "query_pre_attn_scalar": 256, "sliding_window": 4096, "layer_types": null,
        "final_logit_softcapping": 30.0, "attn_logit_softcapping": 50.0, "use_bidirectional_attention": null,
        "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 1})",
    .sliding_layers = SlidingLayers::kPattern,
    .sliding_pattern = 2,
    .norm_weight_offset = 1,
    .scale_embedding = true,
    .soft_caps = true,
    .names = kNames,
};

}  // namespace alambic::models
