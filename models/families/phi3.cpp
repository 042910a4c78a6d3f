// SPDX-License-Identifier: Apache-2.0
#include "models/families/families.h"

namespace alambic::models {

// Query, key and value lie one behind the other in one matrix, gate and up in another. Adapters belong to the whole
// matrix (one A for all parts), so each stays one Linear.
constexpr WeightName kFusedProjections[] = {
    {Slot::kQueryKeyValue, "model.layers.{L}.self_attn.qkv_proj"},
    {Slot::kOutput, "model.layers.{L}.self_attn.o_proj"},
    {Slot::kGateUp, "model.layers.{L}.mlp.gate_up_proj"},
    {Slot::kDown, "model.layers.{L}.mlp.down_proj"},
};
constexpr auto kNames = join(kEnds, kTwoNorms, kFusedProjections);
constinit const Family kPhi3{
    .model_type = "phi3",
    .architecture = "Phi3ForCausalLM",
    .source = "Phi-3 Technical Report, arXiv:2404.14219, section 2; LongRoPE: arXiv:2402.13753. Also Phi-4 (mini)",
    .defaults = R"({"vocab_size": 32064, "hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": null, "hidden_act": "silu", "max_position_embeddings": 4096,
        "original_max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "tie_word_embeddings": false,
        "sliding_window": null, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attention_dropout": 0.0,
        "pad_token_id": 32000, "bos_token_id": 1, "eos_token_id": 32000})",
    .partial_longrope = true,
    .names = kNames,
};

}  // namespace alambic::models
