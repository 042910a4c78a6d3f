// SPDX-License-Identifier: Apache-2.0
// Every parser that reads bytes of other people, fed with damaged samples.
#include <gtest/gtest.h>
#include <zlib.h>
#include <zstd.h>

#include <cstring>
#include <fstream>
#include <stdexcept>

#include "checkpoints/bitsandbytes.h"
#include "checkpoints/gguf_header.h"
#include "checkpoints/gguf_tokenizer.h"
#include "checkpoints/peft_folder.h"
#include "checkpoints/safetensors.h"
#include "checkpoints/safetensors_header.h"
#include "core/config.h"
#include "core/files.h"
#include "data/chat_template.h"
#include "data/parquet_rows.h"
#include "data/text_reader.h"
#include "data/token_store.h"
#include "data/tokenizer.h"
#include "models/config.h"
#include "tests/checkpoints/gguf_maker.h"
#include "tests/fuzz/fuzz.h"
#include "tests/golden.h"
#include "tests/support.h"
#include "train/train_config.h"

namespace alambic {
namespace {

using namespace checkpoints;
using testing::fuzz;
using testing::golden_path;
using testing::GgufMaker;
using testing::ScratchFolder;

const std::vector<std::string> kJsonWords = {"{", "}", "[", "]", ":", ",", "\"", "\\", "\\u0000", "\\ud800", "\\udc00", "null", "true", "false", "[]", "{}", "\"\"", "[[", "{\"a\":",
                                             "1e", "-", ".5", " ", "\n", "\xef\xbb\xbf", "\xff", "\xc0\x80", "\xed\xa0\x80", "\xf4\x90\x80\x80", std::string(1, '\0')};

std::vector<std::string> with(std::vector<std::string> words, const std::vector<std::string>& more) {
  words.insert(words.end(), more.begin(), more.end());
  return words;
}

// Without the fsyncs of write_file, which take most of the time.
void put(const fs::path& path, const std::string& bytes) {
  std::ofstream file(path, std::ios::binary);
  file << bytes;
  if (!file.flush()) throw std::runtime_error(path.string() + ": cannot be written");
}

// The JSON text inside a folder that bitsandbytes quantised; whatever it says, a weight that is taken is finite.
TEST(Fuzz, QuantState) {
  const ScratchFolder folder;
  const std::string weight = "model.layers.1.self_attn.q_proj.weight", state = weight + ".quant_state.bitsandbytes__nf4";
  std::vector<std::string> samples;
  std::vector<std::pair<std::string, HeaderEntry>> entries;
  std::string data;
  const SafetensorsFile golden(golden_path("bitsandbytes/nf4/model.safetensors"));
  for (const auto& [name, entry] : golden.entries()) {
    if (!name.starts_with(weight)) continue;
    const at::Tensor tensor = golden.tensor(name);
    const std::string bytes(static_cast<const char*>(tensor.const_data_ptr()), tensor.nbytes());
    if (name == state) {
      samples.push_back(bytes);
      continue;
    }
    entries.push_back({name, {tensor.scalar_type() == at::kByte ? "U8" : "F32", entry.shape, data.size(), data.size() + bytes.size()}});
    data += bytes;
  }
  ASSERT_EQ(entries.size(), 5u);
  fuzz({.samples = samples,
        .words = with(kJsonWords, {"\"nested_offset\": 1e39", "\"nested_offset\": -3e38", "\"blocksize\": 0", "\"shape\": [64, 64]", "4096", "-1", "\"nf4\"", "\"fp4\"", "\"nested_blocksize\""}),
        .parse = [&](const std::string& input) {
          auto all = entries;
          all.push_back({state, {"U8", {static_cast<std::int64_t>(input.size())}, data.size(), data.size() + input.size()}});
          put(folder / "model.safetensors", make_safetensors_header(all, {}) + data + input);
          const FolderTensors tensors(folder.path());
          const auto taken = load_quantized(tensors, weight, {64, 64}, "nf4", "fuzz");
          const at::Tensor dense_OI = models::Linear{.weight_OI = {}, .bias_O = {}, .adapter = {}, .quantized = taken}.dense_OI(at::kFloat);
          if (first_non_finite(dense_OI) >= 0) throw std::logic_error("a weight that is not finite was taken");
        }});
}

TEST(Fuzz, Json) {
  fuzz({.samples = {R"({"i": -7, "a": [1, 2.5, -3e7, null, true, false], "b": {"c": "text \u00e9 \ud83d\ude00 \n", "d": {}}, "e": [[[]]]})", "[0, 18446744073709551615, -9223372036854775808]", "\"\""},
        .words = kJsonWords,
        .parse = [](const std::string& input) {
          const Json value = parse_json(input, "fuzz");
          if (parse_json(to_line(value), "written") != value) throw std::logic_error("what was written reads back as something else");
          if (value.is_object()) value_or<std::int64_t>(value, "i", 0, "fuzz");
        }});
}

TEST(Fuzz, SafetensorsHeader) {
  const auto file = [](const std::vector<std::pair<std::string, HeaderEntry>>& tensors, const std::map<std::string, std::string>& metadata, std::size_t num_bytes) {
    return make_safetensors_header(tensors, metadata) + std::string(num_bytes, '\x7f');
  };
  fuzz({.samples = {file({{"a", {"F32", {2, 3}, 0, 24}}, {"b", {"BF16", {}, 24, 26}}, {"c", {"U8", {0, 7}, 26, 26}}}, {{"format", "pt"}}, 26),
                    file({{"model.embed_tokens.weight", {"I64", {1, 1, 2}, 0, 16}}}, {}, 16), file({}, {}, 0)},
        .words = with(kJsonWords, {"__metadata__", "\"dtype\"", "\"shape\"", "\"data_offsets\"", "\"F64\"", "\"BOOL\"", "[0,0]", "[4294967296,4294967296]"}),
        .parse = [](const std::string& input) {
          const SafetensorsHeader header = parse_safetensors_header(input, "fuzz");
          for (const auto& [name, entry] : header.entries)
            if (entry.begin > entry.end || header.data_begin + entry.end > input.size()) throw std::logic_error("a tensor outside of the file: " + name);
        },
        .repair = [](std::string input) {  // the announced length fits the JSON
          const std::size_t brace = input.rfind('}');
          if (input.size() < 9 || brace == input.npos || brace < 8) return input;
          const std::uint64_t length = brace + 1 - 8;
          std::memcpy(input.data(), &length, sizeof length);
          return input;
        }});
}

std::string small_gguf() {
  GgufMaker maker;
  maker.head(3, 5).key("general.architecture", testing::kString).text("llama").key("general.alignment", testing::kU32).add<std::uint32_t>(32);
  maker.key("a.list", testing::kArray).add<std::uint32_t>(testing::kString).add<std::uint64_t>(3).text("one").text("").text("\xff\xfe");
  maker.key("a.number", testing::kF32).add<float>(1e-5f).key("a.flag", testing::kBool).add<std::uint8_t>(1);
  maker.tensor("token_embd.weight", {32, 2}, 2, 0).tensor("norm", {4}, 0, 64).tensor("k", {256, 1}, 14, 96);
  return maker.pad().zeros(36).pad().zeros(16).pad().zeros(210).bytes();
}

// Blocks of every type, so that the arithmetic meets every scale and every stored integer.
std::string gguf_of_all_types() {
  GgufMaker maker;
  maker.head(gguf_types().size(), 0);
  std::uint64_t offset = 0;
  for (const GgufType& type : gguf_types()) {
    maker.tensor(std::string(type.name), {static_cast<std::uint64_t>(type.block_size), 2}, type.id, offset);
    offset = (offset + 2 * static_cast<std::uint64_t>(type.block_bytes) + 31) / 32 * 32;
  }
  return maker.pad().zeros(offset).bytes();
}

TEST(Fuzz, Gguf) {
  fuzz({.samples = {small_gguf(), gguf_of_all_types()},
        .words = {"GGUF", "general.alignment", std::string("\x09\0\0\0", 4), std::string("\x08\0\0\0", 4), std::string("\x0e\0\0\0", 4), std::string(8, '\0')},
        .parse = [](const std::string& input) {
          const GgufHeader header = parse_gguf_header(input, "fuzz");
          for (const GgufEntry& entry : header.entries) {
            if (entry.begin > entry.end || entry.end > input.size()) throw std::logic_error("a tensor outside of the file: " + entry.name);
            if (!entry.type->dequantise) continue;
            const std::vector<char> bytes(input.begin() + static_cast<std::ptrdiff_t>(entry.begin), input.begin() + static_cast<std::ptrdiff_t>(entry.end));
            const std::int64_t num_blocks = static_cast<std::int64_t>(bytes.size()) / entry.type->block_bytes;
            std::vector<float> values(static_cast<std::size_t>(num_blocks * entry.type->block_size));
            entry.type->dequantise(reinterpret_cast<const std::byte*>(bytes.data()), num_blocks, values.data());
          }
          to_line(header.metadata);
        }});
}

// Metadata as a GGUF file would give it: strings may be no UTF-8, numbers may be infinite. Written as JSON to be damaged.
TEST(Fuzz, GgufTokenizer) {
  const auto sample = [](const std::string& model, const std::string& architecture) {
    Json metadata = {{"general.architecture", architecture}, {"tokenizer.ggml.model", model}, {"tokenizer.ggml.pre", "llama-bpe"},
                     {"tokenizer.ggml.tokens", {"<unk>", "<s>", "</s>", "a", "b", "ab", "aba", "\u2581", "\u2581a", "<0x0A>", "  "}},
                     {"tokenizer.ggml.token_type", {2, 3, 3, 1, 1, 1, 1, 1, 1, 6, 4}},
                     {"tokenizer.ggml.scores", {0, 0, 0, -1.5, -2, -3, -4, -5, -6, 0, -7}},
                     {"tokenizer.ggml.bos_token_id", 1}, {"tokenizer.ggml.eos_token_id", 2}, {"tokenizer.ggml.unknown_token_id", 0},
                     {"tokenizer.ggml.add_bos_token", true}, {"tokenizer.chat_template", "{{ messages }}"}};
    if (model == "gpt2") metadata["tokenizer.ggml.merges"] = {"a b", "ab a"};
    return to_line(metadata);
  };
  fuzz({.samples = {sample("gpt2", "qwen2"), sample("llama", "llama"), sample("llama", "gemma3"), sample("llama", "phi3"), sample("t5", "t5")},
        .words = with(kJsonWords, {"\"a a\"", "\"tokenizer.ggml.merges\":[\"a b\"],", "\"tokenizer.ggml.precompiled_charsmap\":[1,2,255],", "\"tokenizer.ggml.add_space_prefix\":false,",
                                   "\"gpt2\"", "\"llama\"", "\"t5\"", "\"\",", "1e39", "18446744073709551615"}),
        .parse = [](const std::string& input) {
          const Json metadata = parse_json(input, "fuzz");
          const std::string tokenizer = to_line(tokenizer_json_from_gguf(metadata, "fuzz"));
          to_line(tokenizer_config_from_gguf(metadata, "fuzz"));
          data::Tokenizer::from_json(tokenizer, "fuzz").encode("ab aba\n\xc3\xa9", true);
        }});
}

TEST(Fuzz, Config) {
  const ScratchFolder folder;
  const std::string sample = R"(model: runs/base
output: runs/out
method: lora
lora:
  rank: 16
  targets: [q_proj, "v_proj"]
  rank_pattern: {down_proj: 4, 'x.y': 8}
data:
  mixture:
    - store: a
      weight: 2.5
    - {store: b, weight: 1e-3}
  pack: true
samples:
  prompts:
  - "Once"
  - 'upon'
  - >-
    a
    time
seed: 18446744073709551615
)";
  const std::string other = "model: m\noutput: o  # why\ndata: {mixture: [{store: s}]}\nlimits: {max_steps: 20, max_epochs: 0.5}\nevaluation:\n  stores:\n  - name: |\n      held\n    store: h\n";
  fuzz({.samples = {sample, other},
        .words = {":", ": ", "- ", "\n", "\n  ", "\t", "{", "}", "[", "]", "? ", "& ", "&a ", "*a", "!!str ", "!", "<<: ", "|", ">", "|+2\n", "'", "\"", "\\x", "\\U0010ffff", "#", "---\n", "...\n", "%YAML 1.2\n",
                  "%TAG ! tag:x,2000:\n", "@", "`", "\xef\xbb\xbf", "\xff\xfe", "\xc2\x85", "\xe2\x80\xa8", "~", "null", "010", "yes", "data:", "mixture:"},
        .parse = [&](const std::string& input) {
          put(folder / "run.yaml", input);
          to_line(resolved_config(read_config<train::TrainConfig>(folder / "run.yaml")));
        }});
}

TEST(Fuzz, ConfigOverrides) {
  fuzz({.samples = {"model=m\noutput=o\ndata.mixture.0.store=s\nlora.targets=[q_proj, v_proj]", "model=m\noutput=o\ndata.mixture=[{store: s, weight: 2}]\nseed=7\nlora.rank_pattern={a: 4}"},
        .words = {".", "=", "\n", "0", "1", "999999999", "{", "}", "[", "]", ": ", "data", "mixture", "lora", "''", "\"", "&a", "*a", "|", "# "},
        .parse = [&](const std::string& input) {
          std::vector<std::string> overrides;
          for (std::size_t begin = 0; begin <= input.size();) {
            const std::size_t end = std::min(input.find('\n', begin), input.size());
            overrides.push_back(input.substr(begin, end - begin));
            begin = end + 1;
          }
          to_line(resolved_config(read_config<train::TrainConfig>({}, overrides)));
        }});
}

TEST(Fuzz, TokenStoreIndex) {
  const ScratchFolder folder;
  const fs::path store = folder / "store";
  {
    data::TokenStoreWriter writer(store, {.tokenizer_hash = std::string(64, 'a'), .vocabulary_size = 100, .sources = {{.name = "book", .origin = "", .licence = "MIT", .language = "id"}}}, 8);
    for (std::uint32_t i = 0; i < 5; ++i) writer.append({.ids = {i, 7, 99}, .mask = {0, 1, 1}, .source = 0, .num_bytes = 9, .num_words = 1});
    writer.finish();
  }
  const std::string sample = read_file(store / "index.json");
  fuzz({.samples = {sample},
        .words = with(kJsonWords, {"tokens-00000-000000.h5", "tokens-00000-000001.h5", "../../x", "\"recipe\": null,"}),
        .parse = [&](const std::string& input) {
          put(store / "index.json", input);
          const data::TokenStore opened(store);
          for (std::uint64_t i = 0; i < opened.num_documents(); ++i) opened.read(i);
        },
        .repair = [](std::string input) {  // the index carries its own SHA-256, taken with zeros in its place
          const std::string key = "\"index_sha256\": \"";
          const std::size_t at = input.find(key);
          if (at == input.npos || at + key.size() + 64 > input.size()) return input;
          input.replace(at + key.size(), 64, std::string(64, '0'));
          return input.replace(at + key.size(), 64, sha256_of(input));
        }});
}

TEST(Fuzz, AdapterConfig) {
  const ScratchFolder folder;
  std::vector<std::string> samples;
  for (const char* name : {"llama_tied.lora", "llama_tied.patterns", "llama_tied.save_both", "qwen2.dora_rslora"})
    samples.push_back(read_file(golden_path("peft") / name / "adapter_config.json"));
  fuzz({.samples = samples,
        .words = with(kJsonWords, {"\"r\"", "\"target_modules\"", "\"all-linear\"", "\"regex:\"", "\"rank_pattern\"", "\"LORA\"", "\"gaussian\""}),
        .parse = [&](const std::string& input) {
          put(folder / "adapter_config.json", input);
          read_adapter_config(folder.path());
        }});
}

TEST(Fuzz, ModelConfig) {
  std::vector<std::string> samples;
  for (const char* family : {"llama", "gemma2", "gemma3_text", "mistral", "phi3", "qwen2", "qwen3", "smollm3"})
    samples.push_back(testing::Golden(std::string("families/") + family + ".safetensors").metadata().at("config"));
  fuzz({.samples = samples,
        .words = with(kJsonWords, {"\"yarn\"", "\"llama3\"", "\"longrope\"", "\"linear\"", "\"dynamic\"", "\"rope_scaling\":", "\"rope_parameters\":", "\"factor\":", "\"layer_types\":", "\"sliding_attention\"",
                                   "\"num_hidden_layers\":", "\"sliding_window\":", "\"head_dim\":", "\"original_max_position_embeddings\":", "\"rope_theta\":"}),
        .parse = [](const std::string& input) { models::read_model_config(parse_json(input, "fuzz"), "fuzz").num_parameters(); }});
}

TEST(Fuzz, ChatTemplate) {
  const Json golden = read_json_file(golden_path("chat_templates.json"));
  const Json messages = parse_json(R"([{"role": "user", "content": "Hi <b> \u00e9"}, {"role": "assistant", "content": "yes"}])", "messages");
  std::vector<std::string> samples;
  const auto render = [&](const std::string& input) {
    const data::ChatTemplate chat{.source = input, .name = "fuzz", .special_tokens = golden["special_tokens"]};
    const data::RenderedChat rendered = chat.render(messages, nullptr, true, golden["extra"]);
    for (const auto& [begin, end] : rendered.generation_bytes)
      if (begin > end || end > rendered.text.size()) throw std::logic_error("a generation block outside of the text");
  };
  for (const auto& [name, source] : golden["templates"].items()) {
    try {
      render(source.get<std::string>());
    } catch (const Error&) {
      continue;  // it needs other messages
    }
    samples.push_back(source.get<std::string>());
  }
  ASSERT_GT(samples.size(), 5u);
  fuzz({.samples = samples,
        .words = {"{{", "}}", "{%", "%}", "{%-", "-%}", "{#", "#}", "{% for x in range(1000000000) %}", "{% endfor %}", "{% if ", "{% endif %}", "{% set x = ", "{% macro f() %}{{ f() }}{% endmacro %}", "{{ f() }}",
                  "{% generation %}", "{% endgeneration %}", "|tojson", "|length", "|join", "* 1000000000", "'a' * 10000000", "**9999999", "[::-1]", "[9223372036854775807]", "messages", "loop.index0", "~", "|indent(1000000)",
                  "strftime_now('%Y%')", "raise_exception('no')", "namespace()", "{% break %}", "{% continue %}", "(", ")", "\\", "'", "// 0", "% 0", "-9223372036854775808", "range(0, 10, 0)"},
        .parse = render,
        .most_seconds = 3});  // the fuel of a template lasts about a second
}

TEST(Fuzz, Tokenizer) {
  const Json golden = read_json_file(golden_path("tokenizers.json"));
  std::vector<std::string> samples;
  for (const auto& [name, entry] : golden["cases"].items()) samples.push_back(to_line(entry["tokenizer"]));
  fuzz({.samples = samples,
        .words = with(kJsonWords, {"\"type\"", "\"ByteLevel\"", "\"Metaspace\"", "\"Split\"", "\"Regex\"", "(a+)+$", "(?=.)*", "\"Sequence\"", "\"Replace\"", "\"Precompiled\"", "\"Strip\"", "\"WordPiece\"", "\"unk_id\"",
                                   "\"merges\"", "\"vocab\"", "\"id\":4294967295", "\"content\":\"\"", "\"max_input_chars_per_word\":0", "\"Digits\"", "\"Template\""}),
        .parse = [](const std::string& input) {
          const data::Tokenizer tokenizer = data::Tokenizer::from_json(input, "fuzz");
          const data::Encoding encoding = tokenizer.encode_with_offsets("Hello aaaaaaaaaaaa \xc3\xa9\xe2\x96\x81<s> 123\n", true);
          if (encoding.begin_byte.size() != encoding.ids.size()) throw std::logic_error("offsets are missing");
          tokenizer.decode(encoding.ids, false);
          tokenizer.encode("", true);
        }});
}

TEST(Fuzz, Parquet) {
  const ScratchFolder folder;
  std::vector<std::string> samples;
  for (const char* name : {"types", "none", "snappy", "gzip", "zstd", "lz4", "brotli"}) samples.push_back(read_file(golden_path("parquet") / (std::string(name) + ".parquet")));
  fuzz({.samples = samples,
        .words = {"PAR1", "PARE", std::string(4, '\0'), std::string(8, '\xff')},
        .parse = [&](const std::string& input) {
          put(folder / "rows.parquet", input);
          data::ParquetRows rows(folder / "rows.parquet");
          while (rows.next_line()) {}
        }});
}

TEST(Fuzz, CompressedLines) {
  const ScratchFolder folder;
  std::string text = "\xef\xbb\xbf";
  for (int i = 0; i < 300; ++i) text += "{\"text\": \"line " + std::to_string(i) + "\"}\r\n";
  const fs::path file = folder / "lines.jsonl.gz";
  const gzFile gz = gzopen(file.c_str(), "wb6");
  ASSERT_GT(gzwrite(gz, text.data(), static_cast<unsigned>(text.size())), 0);
  ASSERT_EQ(gzclose(gz), Z_OK);
  std::string zst(ZSTD_compressBound(text.size()), '\0');
  zst.resize(ZSTD_compress(zst.data(), zst.size(), text.data(), text.size(), 3));
  const std::string gzipped = read_file(file);
  fuzz({.samples = {gzipped, zst, gzipped + gzipped, zst + zst, text},
        .words = {"\x1f\x8b\x08", "\x28\xb5\x2f\xfd", "\x50\x2a\x4d\x18", "\n", std::string(4, '\0')},
        .parse = [&](const std::string& input) {
          put(file, input);
          data::LineReader reader(file);
          for (std::string line; reader.next(line);) {}
        }});
}

}  // namespace
}  // namespace alambic
