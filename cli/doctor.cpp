// SPDX-License-Identifier: Apache-2.0
#include <ATen/Parallel.h>
#include <ATen/Version.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/randn.h>
#include <hdf5.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <chrono>
#include <cmath>
#include <fstream>
#include <ostream>
#include <sstream>
#include <thread>

#include "cli/verbs.h"
#include "cli/version.h"
#include "core/error.h"
#include "core/files.h"
#include "data/hdf5.h"
#include "data/tokenizer.h"
#include "models/decoder.h"
#include "parallel/nccl.h"

namespace alambic::cli {
namespace {

constexpr std::uint64_t kLeastMemory = 2ull << 30, kLeastDisk = 2ull << 30;  // the quick start needs about as much

// The first number behind `key` in /proc/meminfo, in bytes; 0 where the file does not say it.
std::uint64_t memory_of(const std::string& key) {
  std::ifstream lines("/proc/meminfo");
  std::string line;
  while (std::getline(lines, line))
    if (line.starts_with(key + ":")) return std::strtoull(line.c_str() + key.size() + 1, nullptr, 10) * 1024;
  return 0;
}

// What a container may use; 0 = no limit.
std::uint64_t container_limit() {
  std::ifstream file("/sys/fs/cgroup/memory.max");
  std::uint64_t bytes = 0;
  return file >> bytes ? bytes : 0;
}

std::string processor_line(const std::string& key) {
  std::ifstream lines("/proc/cpuinfo");
  std::string line;
  while (std::getline(lines, line))
    if (line.starts_with(key))
      if (const std::size_t colon = line.find(": "); colon != line.npos) return line.substr(colon + 2);
  return "";
}

std::vector<std::string> processor_features() {
  std::istringstream flags(processor_line("flags"));
  std::vector<std::string> found;
  const std::array<std::string, 9> wanted = {"avx2", "fma", "f16c", "avx512f", "avx512_vnni", "avx512_bf16", "amx_tile", "amx_bf16", "sha_ni"};
  std::string flag;
  while (flags >> flag)
    if (std::find(wanted.begin(), wanted.end(), flag) != wanted.end()) found.push_back(flag);
  std::sort(found.begin(), found.end());
  return found;
}

struct Product {
  double gflops = 0;      // 10^9 operations a second, the best of several products
  double worst_error = 0; // of one row against f64, relative to the row's largest value
};

// 1024^3 products for about a third of a second, and one row of the result checked.
Product measure_product(at::ScalarType type) {
  constexpr std::int64_t kSize = 1024;
  const at::Tensor a = at::randn({kSize, kSize}).to(type), b = at::randn({kSize, kSize}).to(type);
  at::Tensor c = at::mm(a, b);  // the first one also sets things up
  Product product;
  const auto begin = std::chrono::steady_clock::now();
  for (double elapsed = 0; elapsed < 0.35;) {
    const auto before = std::chrono::steady_clock::now();
    c = at::mm(a, b);
    const auto now = std::chrono::steady_clock::now();
    const double seconds = std::chrono::duration<double>(now - before).count();
    product.gflops = std::max(product.gflops, 2e-9 * kSize * kSize * kSize / seconds);
    elapsed = std::chrono::duration<double>(now - begin).count();
  }
  const at::Tensor exact = at::mm(a.slice(0, 0, 1).to(at::kDouble), b.to(at::kDouble));
  product.worst_error = ((c.slice(0, 0, 1).to(at::kDouble) - exact).abs().max() / exact.abs().max()).item<double>();
  return product;
}

bool tokenizes() {
  const auto tokenizer = data::Tokenizer::from_json(
      R"({"version":"1.0","truncation":null,"padding":null,"added_tokens":[],"normalizer":null,"pre_tokenizer":null,"post_processor":null,)"
      R"("decoder":null,"model":{"type":"WordLevel","vocab":{"[UNK]":0,"alambic":1},"unk_token":"[UNK]"}})",
      "a tokenizer for the self-test");
  return tokenizer.encode("alambic", false) == std::vector<std::uint32_t>{1};
}

std::string gigabytes(std::uint64_t bytes) {
  std::ostringstream text;
  text.precision(1);
  text << std::fixed << static_cast<double>(bytes) / 1e9 << " GB";
  return text.str();
}

int run_doctor(const Arguments& arguments, const Terminal& terminal) {
  apply_threads(arguments);
  Json report = Json::object();
  std::vector<std::string> missing, notes;

  for (const Version& version : versions()) {
    report["versions"][version.name] = version.running.empty() ? version.built : version.running;
    if (version.name == "libtorch" && version.running != version.built)
      missing.push_back("libtorch " + version.built + ": this program was built for it, but " + version.running + " was loaded; build again, or correct LD_LIBRARY_PATH");
    if (version.name == "HDF5" && version.running.substr(0, version.running.rfind('.')) != version.built.substr(0, version.built.rfind('.')))
      missing.push_back("HDF5 " + version.built + ": this program was built for it, but " + version.running + " was loaded");
  }

  const std::vector<std::string> features = processor_features();
  const at::ScalarType chosen = models::fastest_compute_type();
  report["processor"] = {{"name", processor_line("model name")},
                         {"features", features},
                         {"libtorch_uses", at::get_cpu_capability()},
                         {"cores", std::thread::hardware_concurrency()},
                         {"threads", at::get_num_threads()}};
  report["compute_type"] = chosen == at::kBFloat16 ? "bf16" : "f32";
  if (std::find(features.begin(), features.end(), "avx2") == features.end()) notes.push_back("the processor has no AVX2: everything works, slowly");

  const std::uint64_t limit = container_limit(), total = memory_of("MemTotal"), available = memory_of("MemAvailable");
  const std::uint64_t usable = limit ? std::min(limit, available) : available;
  report["memory"] = {{"total", total}, {"available", available}, {"container_limit", limit ? Json(limit) : Json(nullptr)}};
  if (usable && usable < kLeastMemory) missing.push_back("memory: " + gigabytes(usable) + " can be used, the smallest run needs " + gigabytes(kLeastMemory));

  const std::filesystem::path here = std::filesystem::current_path();
  const std::uint64_t disk = free_bytes(here);
  report["disk"] = {{"folder", printable(here.string())}, {"free", disk}, {"writable", ::access(here.c_str(), W_OK) == 0}};
  if (::access(here.c_str(), W_OK) != 0) missing.push_back("the current folder cannot be written: " + printable(here.string()));
  if (disk < kLeastDisk) missing.push_back("disk: " + gigabytes(disk) + " are free here, a small run needs " + gigabytes(kLeastDisk));

  for (const auto& [name, type, tolerance] : {std::tuple{"f32", at::kFloat, 1e-5}, std::tuple{"bf16", at::kBFloat16, 2e-2}}) {
    const Product product = measure_product(type);
    report["matrix_product_gflops"][name] = std::round(product.gflops * 10) / 10;
    if (!(product.worst_error < tolerance)) missing.push_back(std::string("a correct matrix product in ") + name + ": this libtorch or processor computes wrongly");
  }
  const double f32 = report["matrix_product_gflops"]["f32"].get<double>(), bf16 = report["matrix_product_gflops"]["bf16"].get<double>();
  if ((chosen == at::kBFloat16) != (bf16 > f32))
    notes.push_back(std::string("compute type ") + (chosen == at::kBFloat16 ? "bf16" : "f32") + " was chosen by the processor's features, but the other was faster just now");

  {
    const std::scoped_lock lock(data::hdf5_mutex());
    for (const auto& [name, filter] : {std::pair{"deflate", H5Z_FILTER_DEFLATE}, std::pair{"shuffle", H5Z_FILTER_SHUFFLE}, std::pair{"fletcher32", H5Z_FILTER_FLETCHER32}})
      if (H5Zfilter_avail(filter) <= 0) missing.push_back(std::string("HDF5's filter ") + name + ", which token stores use");
  }
  if (!tokenizes()) missing.push_back("a working tokenizer: the self-test gave other ids");
  const parallel::Gpus gpus = parallel::gpus();
  report["gpus"] = gpus.seen;
  if (gpus.seen.empty()) report["gpus_why_none"] = gpus.why_none;
  report["missing"] = missing;
  report["notes"] = notes;

  if (arguments.has("json")) {
    print_json(terminal, report);
  } else {
    std::ostream& out = terminal.out;
    out << version_text();
    out << "processor: " << report["processor"]["name"].get<std::string>() << ", " << std::thread::hardware_concurrency() << " cores, " << at::get_num_threads() << " threads\n";
    out << "  features:";
    for (const std::string& feature : features) out << " " << feature;
    out << "; libtorch uses " << at::get_cpu_capability() << "\n";
    out << "compute type: " << report["compute_type"].get<std::string>() << " (1024^3 product: f32 " << to_line(report["matrix_product_gflops"]["f32"]) << ", bf16 "
        << to_line(report["matrix_product_gflops"]["bf16"]) << " GFLOP/s)\n";
    out << "memory: " << gigabytes(available) << " of " << gigabytes(total) << " available" << (limit ? ", container limit " + gigabytes(limit) : "") << "\n";
    out << "disk: " << gigabytes(disk) << " free here\n";
    out << "GPUs: " << (gpus.seen.empty() ? "none, " + gpus.why_none : std::to_string(gpus.seen.size())) << "\n";
    for (const std::string& gpu : gpus.seen) out << "  " << gpu << "\n";
    for (const std::string& note : notes) out << "note: " << note << "\n";
    for (const std::string& each : missing) out << "missing: " << each << "\n";
    if (missing.empty()) out << "nothing is missing\n";
  }
  return missing.empty() ? 0 : exit_code(ErrorKind::kResource);
}

}  // namespace

Verb doctor_verb() {
  return {.name = "doctor",
          .summary = "versions, processor, memory and disk; what is missing",
          .description = "Shows what alambic runs on, measures matrix products for a second, tests its own parts, and says what is missing. "
                         "Exit code 0 when nothing is, 5 otherwise.",
          .positionals = {},
          .options = {json_option(), threads_option()},
          .examples = {{"alambic doctor", "before the first run, and in a bug report"}},
          .run = run_doctor};
}

}  // namespace alambic::cli
