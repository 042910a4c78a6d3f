// SPDX-License-Identifier: Apache-2.0
// What the oracle tests ask of llama.cpp's library; tests/oracle/llamacpp.py builds and calls it. Numbers are native binary.
//   tokenize MODEL TEXTS OUT [special]      TEXTS: for each a u32 length and the bytes; OUT: for each a u32 count and the i32 ids
//   logits MODEL IDS OUT GREEDY [LORA]      IDS: i32; OUT: f32 logits of all positions, then GREEDY i32 ids that follow the last
//   speed MODEL PROMPT NEW                  prints tokens/s of reading PROMPT tokens and of making NEW ones, as llama.cpp runs by default
//   quantize MODEL OUT FTYPE [IMPORTANCE]   IMPORTANCE: for each a u32 length, the name, a u32 count and f32 values
#include <llama.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iostream>
#include <iterator>
#include <string>
#include <thread>
#include <vector>

namespace {

[[noreturn]] void end(const std::string& why) {
  std::cerr << why << "\n";
  std::exit(1);
}

std::string read(const char* path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) end(std::string("cannot read ") + path);
  return {std::istreambuf_iterator<char>(file), {}};
}

std::uint32_t take(const std::string& bytes, std::size_t& at) {
  std::uint32_t value = 0;
  std::memcpy(&value, bytes.data() + at, 4);
  at += 4;
  return value;
}

template <class T>
void put(std::ofstream& out, const T* values, std::size_t count) {
  out.write(reinterpret_cast<const char*>(values), static_cast<std::streamsize>(count * sizeof(T)));
}

llama_model* load(const char* path, bool vocabulary_only, bool repack = false) {
  llama_model_params params = llama_model_default_params();
  params.vocab_only = vocabulary_only;
  params.n_gpu_layers = 0;
  params.use_extra_bufts = repack;  // repacked weights are faster, and multiplied in another order
  llama_model* model = llama_model_load_from_file(path, params);
  if (model == nullptr) end(std::string("llama.cpp does not load ") + path);
  return model;
}

void tokenize(char** arguments, bool special) {
  const llama_vocab* vocabulary = llama_model_get_vocab(load(arguments[0], true));
  const std::string texts = read(arguments[1]);
  std::ofstream out(arguments[2], std::ios::binary);
  for (std::size_t at = 0; at < texts.size();) {
    const std::uint32_t length = take(texts, at);
    std::vector<llama_token> ids(length + 16);
    const std::int32_t count = llama_tokenize(vocabulary, texts.data() + at, static_cast<std::int32_t>(length), ids.data(), static_cast<std::int32_t>(ids.size()), special, true);
    if (count < 0) end("tokenize failed");
    at += length;
    put(out, &count, 1);
    put(out, ids.data(), static_cast<std::size_t>(count));
  }
}

void logits(char** arguments, int greedy, const char* lora) {
  llama_model* model = load(arguments[0], false);
  const std::string bytes = read(arguments[1]);
  std::vector<llama_token> ids(bytes.size() / 4);
  std::memcpy(ids.data(), bytes.data(), bytes.size());
  llama_context_params params = llama_context_default_params();
  params.n_ctx = static_cast<std::uint32_t>(ids.size()) + static_cast<std::uint32_t>(greedy) + 8;
  params.n_batch = params.n_ubatch = params.n_ctx;
  params.n_threads = params.n_threads_batch = 2;
  params.type_k = params.type_v = GGML_TYPE_F32;
  params.flash_attn_type = LLAMA_FLASH_ATTN_TYPE_DISABLED;
  llama_context* context = llama_init_from_model(model, params);
  if (context == nullptr) end("no context");
  if (lora != nullptr) {
    llama_adapter_lora* adapter = llama_adapter_lora_init(model, lora);
    float scale = 1;
    if (adapter == nullptr || llama_set_adapters_lora(context, &adapter, 1, &scale) != 0) end("llama.cpp does not load the adapter");
  }
  const std::int32_t vocabulary = llama_vocab_n_tokens(llama_model_get_vocab(model));
  const auto decode = [&](const std::vector<llama_token>& tokens, std::int32_t first) {
    llama_batch batch = llama_batch_init(static_cast<std::int32_t>(tokens.size()), 0, 1);
    for (std::size_t i = 0; i < tokens.size(); ++i) {
      batch.token[i] = tokens[i], batch.pos[i] = first + static_cast<std::int32_t>(i);
      batch.n_seq_id[i] = 1, batch.seq_id[i][0] = 0, batch.logits[i] = 1;
    }
    batch.n_tokens = static_cast<std::int32_t>(tokens.size());
    if (llama_decode(context, batch) != 0) end("decode failed");
    llama_batch_free(batch);
  };
  const auto best = [&](std::int32_t row) {
    const float* values = llama_get_logits_ith(context, row);
    std::int32_t winner = 0;
    for (std::int32_t i = 1; i < vocabulary; ++i)
      if (values[i] > values[winner]) winner = i;
    return winner;
  };
  decode(ids, 0);
  std::ofstream out(arguments[2], std::ios::binary);
  for (std::size_t i = 0; i < ids.size(); ++i) put(out, llama_get_logits_ith(context, static_cast<std::int32_t>(i)), static_cast<std::size_t>(vocabulary));
  llama_token next = best(static_cast<std::int32_t>(ids.size()) - 1);
  for (int i = 0; i < greedy; ++i) {
    put(out, &next, 1);
    decode({next}, static_cast<std::int32_t>(ids.size()) + i);
    next = best(0);
  }
}

void speed(char** arguments) {
  llama_model* model = load(arguments[0], false, true);
  const int prompt = std::atoi(arguments[1]), made = std::atoi(arguments[2]);
  llama_context_params params = llama_context_default_params();
  params.n_ctx = static_cast<std::uint32_t>(prompt + made + 8);
  params.n_threads = params.n_threads_batch = static_cast<std::int32_t>(std::thread::hardware_concurrency());
  const std::int32_t vocabulary = llama_vocab_n_tokens(llama_model_get_vocab(model));
  double best_prompt = 0, best_made = 0;
  for (int round = 0; round < 3; ++round) {  // the best of three: others use the machine too
    llama_context* context = llama_init_from_model(model, params);
    if (context == nullptr) end("no context");
    std::vector<llama_token> ids;
    for (int i = 0; i < prompt; ++i) ids.push_back(static_cast<llama_token>((i * 7919 + 17) % vocabulary));
    const auto seconds = [](auto work) {
      const auto begin = std::chrono::steady_clock::now();
      work();
      return std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
    };
    const auto decode = [&](llama_token* tokens, int count) {
      if (llama_decode(context, llama_batch_get_one(tokens, count)) != 0) end("decode failed");
      llama_synchronize(context);
    };
    best_prompt = std::max(best_prompt, prompt / seconds([&] { decode(ids.data(), prompt); }));
    best_made = std::max(best_made, made / seconds([&] { for (int i = 0; i < made; ++i) decode(&ids[static_cast<std::size_t>(i % prompt)], 1); }));
    llama_free(context);
  }
  std::printf("%.1f %.1f\n", best_prompt, best_made);
}

void quantize(char** arguments, const char* importance) {
  llama_model_quantize_params params = llama_model_quantize_default_params();
  params.ftype = static_cast<llama_ftype>(std::atoi(arguments[2]));
  params.nthread = 2;
  std::vector<std::string> names;
  std::vector<std::vector<float>> values;
  if (importance != nullptr) {
    const std::string bytes = read(importance);
    for (std::size_t at = 0; at < bytes.size();) {
      const std::uint32_t length = take(bytes, at);
      names.push_back(bytes.substr(at, length));
      at += length;
      values.emplace_back(take(bytes, at));
      std::memcpy(values.back().data(), bytes.data() + at, values.back().size() * 4);
      at += values.back().size() * 4;
    }
  }
  std::vector<llama_model_imatrix_data> data;
  for (std::size_t i = 0; i < names.size(); ++i) data.push_back({names[i].c_str(), values[i].data(), values[i].size()});
  data.push_back({nullptr, nullptr, 0});
  if (importance != nullptr) params.imatrix = data.data();
  if (llama_model_quantize(arguments[0], arguments[1], &params) != 0) end("quantize failed");
}

}  // namespace

int main(int count, char** arguments) {
  llama_log_set([](ggml_log_level level, const char* text, void*) { if (level >= GGML_LOG_LEVEL_ERROR) std::fputs(text, stderr); }, nullptr);
  ggml_backend_load_all();
  llama_backend_init();
  const std::string verb = count > 1 ? arguments[1] : "";
  if (verb == "tokenize" && count >= 5) tokenize(arguments + 2, count > 5);
  else if (verb == "logits" && count >= 6) logits(arguments + 2, std::atoi(arguments[5]), count > 6 ? arguments[6] : nullptr);
  else if (verb == "speed" && count >= 5) speed(arguments + 2);
  else if (verb == "quantize" && count >= 5) quantize(arguments + 2, count > 5 ? arguments[5] : nullptr);
  else end("usage: see the head of llamacpp_program.cpp");
  return 0;
}
