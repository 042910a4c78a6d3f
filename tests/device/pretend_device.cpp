// SPDX-License-Identifier: Apache-2.0
#include "tests/device/pretend_device.h"

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/EmptyTensor.h>
#include <ATen/core/Tensor.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/native/CPUFallback.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/view_native.h>
#include <c10/core/DeviceType.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <sys/mman.h>
#include <torch/library.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <mutex>
#include <string>
#include <utility>

namespace alambic::testing {
namespace {

std::atomic<std::int64_t> count_of_operators = 0, count_of_waits = 0;
thread_local bool in_operator = false;  // whose copies to and fro are part of pretending

/// One allocation: closed, unless somebody holds it open.
struct Piece {
  void* memory;
  std::size_t size;
  std::mutex mutex;
  int open = 0;

  explicit Piece(std::size_t wanted) : size(std::max<std::size_t>(wanted, 1)) {
    memory = ::mmap(nullptr, size, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    TORCH_CHECK(memory != MAP_FAILED, "no memory for the pretended device");
  }
  ~Piece() { ::munmap(memory, size); }
};

class Opened {
 public:
  explicit Opened(const at::Tensor& tensor) : piece_(tensor.is_cpu() ? nullptr : static_cast<Piece*>(tensor.storage().data_ptr().get_context())) { change(+1); }
  ~Opened() { change(-1); }
  Opened(const Opened&) = delete;
  Opened& operator=(const Opened&) = delete;

 private:
  Piece* piece_;
  void change(int by) {
    if (piece_ == nullptr) return;
    const std::scoped_lock lock(piece_->mutex);
    const bool was_open = piece_->open > 0;
    piece_->open += by;
    if (was_open != (piece_->open > 0)) ::mprotect(piece_->memory, piece_->size, piece_->open > 0 ? PROT_READ | PROT_WRITE : PROT_NONE);
  }
};

struct PretendAllocator : at::Allocator {
  at::DataPtr allocate(std::size_t size) override {
    auto* const piece = new Piece(size);
    return {piece->memory, piece, &release, kPretendDevice};
  }
  at::DeleterFnPtr raw_deleter() const override { return nullptr; }
  void copy_data(void*, const void*, std::size_t) const override { TORCH_CHECK(false, "raw copies on the pretended device"); }
  static void release(void* piece) { delete static_cast<Piece*>(piece); }
};
PretendAllocator allocator;

struct PretendGuard final : c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::PrivateUse1> {
  c10::Device exchangeDevice(c10::Device) const override { return kPretendDevice; }
  c10::Device getDevice() const override { return kPretendDevice; }
  c10::Stream getStream(c10::Device) const noexcept override { return c10::Stream(c10::Stream::DEFAULT, kPretendDevice); }
  c10::Stream exchangeStream(c10::Stream) const noexcept override { return c10::Stream(c10::Stream::DEFAULT, kPretendDevice); }
  void record(void**, const c10::Stream&, const c10::DeviceIndex, const c10::EventFlag) const override {}
  void block(void*, const c10::Stream&) const override {}
};

struct PretendHooks final : at::PrivateUse1HooksInterface {
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  c10::DeviceIndex deviceCount() const override { return 1; }
  c10::DeviceIndex getCurrentDevice() const override { return 0; }
  void setCurrentDevice(c10::DeviceIndex) const override {}
  c10::DeviceIndex exchangeDevice(c10::DeviceIndex) const override { return 0; }
  c10::DeviceIndex maybeExchangeDevice(c10::DeviceIndex) const override { return 0; }
  /// The operators are the processor's, and so are the numbers that they draw: but not those of its own generator.
  const at::Generator& getDefaultGenerator(c10::DeviceIndex) const override {
    static const at::Generator kGenerator = at::make_generator<at::CPUGeneratorImpl>(12345);
    return kGenerator;
  }
};

at::Tensor empty(c10::IntArrayRef size, std::optional<at::ScalarType> type, std::optional<at::Layout>, std::optional<at::Device>, std::optional<bool>, std::optional<at::MemoryFormat> format) {
  return at::detail::empty_generic(size, &allocator, c10::DispatchKeySet(c10::DispatchKey::PrivateUse1), type.value_or(at::kFloat), format);
}

at::Tensor empty_strided(c10::IntArrayRef size, c10::IntArrayRef stride, std::optional<at::ScalarType> type, std::optional<at::Layout>, std::optional<at::Device>, std::optional<bool>) {
  return at::detail::empty_strided_generic(size, stride, &allocator, c10::DispatchKeySet(c10::DispatchKey::PrivateUse1), type.value_or(at::kFloat));
}

/// The same memory as a tensor of the processor; to be used while it is open.
at::Tensor of_processor(const at::Tensor& tensor) {
  return tensor.is_cpu() ? tensor : at::from_blob(tensor.mutable_data_ptr(), tensor.sizes(), tensor.strides(), at::TensorOptions(tensor.scalar_type()));
}

at::Tensor copy_from(const at::Tensor& self, const at::Tensor& to, bool) {
  if (!in_operator && to.is_cpu()) ++count_of_waits;
  const Opened source(self), target(to);
  if (self.numel() > 0) of_processor(to).copy_(of_processor(self));
  return to;
}

at::Tensor copy_from_and_resize(const at::Tensor& self, const at::Tensor& to) {
  if (self.sizes() != to.sizes()) {  // an operator's result that was empty
    TORCH_CHECK(to.numel() == 0, "a result of ", self.sizes(), " for a tensor of ", to.sizes(), " on the pretended device");
    const at::Tensor room = empty(self.sizes(), to.scalar_type(), {}, {}, {}, {});
    to.unsafeGetTensorImpl()->set_storage_keep_dtype(room.storage());
    to.unsafeGetTensorImpl()->set_sizes_contiguous(self.sizes());
  }
  return copy_from(self, to, false);
}

/// As CUDA's operators do: a tensor of the processor may stand beside others only where it is a single number.
void refuse_mixture(const c10::OperatorHandle& op, const torch::jit::Stack& stack) {
  std::string host;
  bool device = false;
  const auto see = [&](const at::Tensor& tensor) {
    if (!tensor.defined()) return;
    if (!tensor.is_cpu()) device = true;
    else if (tensor.dim() > 0) host = c10::str(tensor.sizes());
  };
  for (const c10::IValue& value : torch::jit::last(stack, op.schema().arguments().size())) {
    if (value.isTensor()) see(value.toTensor());
    if (value.isTensorList())
      for (const at::Tensor& tensor : value.toTensorVector()) see(tensor);
    if (value.isOptionalTensorList())
      for (const std::optional<at::Tensor>& tensor : value.toOptionalTensorVector())
        if (tensor) see(*tensor);
  }
  TORCH_CHECK(!device || host.empty(), op.schema().name(), " is given tensors of both memories: ", host, " is in the processor's");
}

void by_processor(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  ++count_of_operators;
  refuse_mixture(op, *stack);
  if (op.schema().name() == "aten::_local_scalar_dense") ++count_of_waits;
  const bool before = std::exchange(in_operator, true);
  at::native::cpu_fallback(op, stack, /*error_on_views=*/true);
  in_operator = before;
}

}  // namespace

std::int64_t operators_run() { return count_of_operators; }
std::int64_t times_waited() { return count_of_waits; }

void register_pretend_device() {
  static const bool once = [] {
    static PretendGuard guard;
    c10::impl::DeviceGuardImplRegistrar{c10::DeviceType::PrivateUse1, &guard};
    at::SetAllocator(c10::DeviceType::PrivateUse1, &allocator);
    at::RegisterPrivateUse1HooksInterface(new PretendHooks);
    c10::register_privateuse1_backend("pretended");
    return true;
  }();
  static_cast<void>(once);
}

TORCH_LIBRARY_IMPL(aten, PrivateUse1, library) {
  library.impl("empty.memory_format", &empty);
  library.impl("empty_strided", &empty_strided);
  library.impl("_copy_from", &copy_from);
  library.impl("_copy_from_and_resize", &copy_from_and_resize);
  library.impl("as_strided", TORCH_FN(at::native::as_strided_tensorimpl));
  library.impl("view", TORCH_FN(at::native::view));
  library.impl("_reshape_alias", TORCH_FN(at::native::_reshape_alias));
}

TORCH_LIBRARY_IMPL(_, PrivateUse1, library) { library.fallback(torch::CppFunction::makeFromBoxedFunction<&by_processor>()); }

}  // namespace alambic::testing
