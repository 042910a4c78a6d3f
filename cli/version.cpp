// SPDX-License-Identifier: Apache-2.0
#include "cli/version.h"

#include <ATen/Version.h>
#include <hdf5.h>
#include <openssl/crypto.h>
#include <torch/headeronly/version.h>
#include <zlib.h>
#include <zstd.h>

#include <cstdint>
#include <sstream>

#include "checkpoints/manifest.h"
#include "core/json.h"
#include "parallel/nccl.h"

extern "C" std::uint64_t aoti_torch_abi_version();  // libtorch's only run-time statement of its version

namespace alambic::cli {
namespace {

std::string dotted(std::uint64_t major, std::uint64_t minor, std::uint64_t patch) {
  std::ostringstream text;
  text << major << '.' << minor << '.' << patch;
  return text.str();
}

std::string hdf5_running() {
  unsigned major = 0, minor = 0, patch = 0;
  H5get_libversion(&major, &minor, &patch);
  return dotted(major, minor, patch);
}

// "Intel(R) oneAPI Math Kernel Library Version 2024.2-Product Build ... for Intel(R) 64 ..." says the version in its middle.
std::string after(const std::string& text, const std::string& mark) {
  const std::size_t begin = text.find(mark);
  if (begin == text.npos) return "";
  const std::size_t end = text.find_first_of(" \n-(", begin + mark.size());
  return text.substr(begin + mark.size(), end == text.npos ? end : end - begin - mark.size());
}

}  // namespace

std::vector<Version> versions() {
  const std::uint64_t torch = aoti_torch_abi_version();  // a byte each: major, minor, patch
  std::vector<Version> all = {
      {"alambic", checkpoints::alambic_version(), ""},
      {"libtorch", dotted(torch >> 56, (torch >> 48) & 255, (torch >> 40) & 255), TORCH_VERSION},
      {"MKL", after(at::get_mkl_version(), "Version "), ""},
      {"oneDNN", after(at::get_mkldnn_version(), "v"), ""},
      {"HDF5", hdf5_running(), dotted(H5_VERS_MAJOR, H5_VERS_MINOR, H5_VERS_RELEASE)},
      {"OpenSSL", OpenSSL_version(OPENSSL_VERSION_STRING), OPENSSL_VERSION_STR},
      {"zlib", zlibVersion(), ZLIB_VERSION},
      {"zstd", ZSTD_versionString(), ZSTD_VERSION_STRING},
      {"nlohmann-json", "", dotted(NLOHMANN_JSON_VERSION_MAJOR, NLOHMANN_JSON_VERSION_MINOR, NLOHMANN_JSON_VERSION_PATCH)},
      {"compiler", "", __VERSION__},
  };
  if (const parallel::NcclVersion nccl = parallel::nccl_version(); !nccl.built.empty()) all.push_back({"NCCL", nccl.running, nccl.built});
  return all;
}

std::string version_text() {
  std::string text;
  for (const Version& version : versions()) {
    text.append(version.name).append(" ").append(version.running.empty() ? version.built : version.running);
    if (!version.running.empty() && !version.built.empty() && version.running != version.built) text.append(" (built with ").append(version.built).append(")");
    text += "\n";
  }
  return text;
}

}  // namespace alambic::cli
