// The device "cuda:0" in host memory: plain tensors whose device is CUDA, every op run by its CPU kernel on the same
// memory. It has what host code can get wrong: tensors of two devices in one op raise, is_cuda is true, backward runs
// in the device's own autograd thread. It has nothing of a GPU's arithmetic, speed or streams.
#include <ATen/ATen.h>
#include <ATen/EmptyTensor.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <ATen/native/Resize.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/library.h>

#include <cstdlib>
#include <cstring>

namespace {

using at::Tensor;
using c10::Device;
using c10::DeviceType;
using c10::Stream;

const Device GPU{DeviceType::CUDA, 0};

struct Guard final : c10::impl::DeviceGuardImplInterface {
  DeviceType type() const override { return DeviceType::CUDA; }
  Device exchangeDevice(Device) const override { return GPU; }
  Device getDevice() const override { return GPU; }
  void setDevice(Device) const override {}
  void uncheckedSetDevice(Device) const noexcept override {}
  Stream getStream(Device) const override { return Stream(Stream::DEFAULT, GPU); }
  Stream getNewStream(Device, int) const override { return Stream(Stream::DEFAULT, GPU); }
  Stream exchangeStream(Stream s) const override { return s; }
  c10::DeviceIndex deviceCount() const noexcept override { return 1; }
  void record(void**, const Stream&, c10::DeviceIndex, c10::EventFlag) const override {}
  void block(void*, const Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void destroyEvent(void*, c10::DeviceIndex) const noexcept override {}
  bool queryStream(const Stream&) const override { return true; }
  void synchronizeStream(const Stream&) const override {}
};
C10_REGISTER_GUARD_IMPL(CUDA, Guard);

}  // namespace

namespace at {
struct HostGpuHooks final : CUDAHooksInterface {
  explicit HostGpuHooks(CUDAHooksArgs) {}
  void init() const override {}
  bool hasCUDA() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  DeviceIndex deviceCount() const override { return 1; }
  DeviceIndex getCurrentDevice() const override { return 0; }
  void setCurrentDevice(DeviceIndex) const override {}
  DeviceIndex exchangeDevice(DeviceIndex) const override { return 0; }
  DeviceIndex maybeExchangeDevice(DeviceIndex) const override { return 0; }
  void deviceSynchronize(DeviceIndex) const override {}
};
C10_REGISTER_TYPED_CLASS(CUDAHooksRegistry, "CUDAHooks", HostGpuHooks);
}  // namespace at

namespace {

struct Memory final : c10::Allocator {
  c10::DataPtr allocate(size_t n) override {
    void* p = std::aligned_alloc(64, (n + 64) / 64 * 64);
    std::memset(p, 0xff, (n + 64) / 64 * 64);  // NaN, so that what nobody wrote shows
    return {p, p, &std::free, GPU};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &std::free; }
  void copy_data(void* to, const void* from, size_t n) const override { std::memcpy(to, from, n); }
} memory;
REGISTER_ALLOCATOR(DeviceType::CUDA, &memory);

constexpr c10::DispatchKeySet KEYS(c10::DispatchKey::CUDA);

Tensor on_host(const Tensor& t) {
  if (!t.defined() || !t.is_cuda()) return t;
  auto options = at::TensorOptions().dtype(t.dtype()).device(at::kCPU);
  if (t.numel() == 0) return at::empty_strided(t.sizes(), t.strides(), options);
  return at::from_blob(t.data_ptr(), t.sizes(), t.strides(), options);
}

Tensor empty_strided(c10::IntArrayRef sizes, c10::IntArrayRef strides, std::optional<at::ScalarType> dtype,
                     std::optional<at::Layout>, std::optional<Device>, std::optional<bool>) {
  return at::detail::empty_strided_generic(sizes, strides, &memory, KEYS, c10::dtype_or_default(dtype));
}

Tensor empty(c10::IntArrayRef sizes, std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
             std::optional<Device>, std::optional<bool>, std::optional<at::MemoryFormat> format) {
  return at::detail::empty_generic(sizes, &memory, KEYS, c10::dtype_or_default(dtype), format);
}

// The result of a CPU op as a tensor of the device: over the memory of the argument it is a view of, or a copy.
Tensor on_device(const Tensor& t, const std::vector<std::pair<Tensor, Tensor>>& given) {
  if (!t.defined() || !t.is_cpu()) return t;
  for (const auto& [theirs, ours] : given) {
    if (t.unsafeGetTensorImpl() == ours.unsafeGetTensorImpl()) {  // written in place, or resized
      if (t.sizes() != theirs.sizes()) theirs.resize_(t.sizes()).copy_(t);
      return theirs;
    }
    if (ours.defined() && t.has_storage() && t.numel() && t.storage().is_alias_of(ours.storage())) {
      auto offset = theirs.storage_offset() + t.storage_offset() - ours.storage_offset();
      return at::as_strided(theirs, t.sizes(), t.strides(), offset);
    }
  }
  auto out = at::empty_strided(t.sizes(), t.strides(), t.options().device(GPU));
  if (t.numel()) on_host(out).copy_(t);
  return out;
}

void run(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const auto& schema = op.schema();
  const auto n = schema.arguments().size();
  const auto begin = stack->size() - n;
  std::vector<std::pair<Tensor, Tensor>> given;
  auto host = [&](const Tensor& t) {
    if (!t.defined() || !t.is_cuda()) {
      TORCH_CHECK(!t.defined() || t.dim() == 0,
                  "Expected all tensors to be on the same device, but found at least two, "
                  "cuda:0 and ",
                  t.device(), "! (", schema.operator_name(), ")");
      return t;
    }
    given.emplace_back(t, on_host(t));
    return given.back().second;
  };
  for (size_t i = begin; i < stack->size(); ++i) {
    auto& value = (*stack)[i];
    if (value.isTensor()) {
      value = host(value.toTensor());
    } else if (value.isTensorList()) {
      std::vector<Tensor> list;
      for (const Tensor& t : value.toTensorVector()) list.push_back(host(t));
      value = c10::List<Tensor>(list);
    } else if (value.isOptionalTensorList()) {
      c10::List<std::optional<Tensor>> list;
      for (const auto& t : value.toOptionalTensorVector()) list.push_back(t ? std::optional(host(*t)) : std::nullopt);
      value = list;
    } else if (value.isDevice() && value.toDevice().is_cuda()) {
      value = Device(at::kCPU);
    }
  }
  op.callBoxed(stack);
  const auto outs = schema.returns().size();
  for (size_t i = stack->size() - outs; i < stack->size(); ++i) {
    auto& value = (*stack)[i];
    if (value.isTensor()) {
      value = on_device(value.toTensor(), given);
    } else if (value.isTensorList()) {
      std::vector<Tensor> list;
      for (const Tensor& t : value.toTensorVector()) list.push_back(on_device(t, given));
      value = c10::List<Tensor>(list);
    }
  }
}

Tensor& copy_(Tensor& self, const Tensor& src, bool) {
  if (self.numel()) on_host(self).copy_(on_host(src));
  return self;
}

at::Scalar item(const Tensor& t) { return at::_local_scalar_dense(on_host(t)); }

const Tensor& resize_(const Tensor& self, c10::IntArrayRef sizes, std::optional<at::MemoryFormat>) {
  auto made = at::empty(sizes, self.options());
  self.unsafeGetTensorImpl()->set_storage_keep_dtype(made.storage());
  self.unsafeGetTensorImpl()->set_sizes_and_strides(made.sizes(), made.strides(), 0);
  return self;
}

Tensor& set_(Tensor& self, c10::Storage storage) {
  const int64_t n = storage.nbytes() / self.itemsize();
  self.unsafeGetTensorImpl()->set_storage_keep_dtype(std::move(storage));
  self.unsafeGetTensorImpl()->set_sizes_contiguous({n});
  return self;
}

Tensor& set_part(Tensor& self, c10::Storage storage, int64_t offset, c10::IntArrayRef sizes, c10::IntArrayRef strides) {
  self.unsafeGetTensorImpl()->set_storage_keep_dtype(std::move(storage));
  self.unsafeGetTensorImpl()->set_sizes_and_strides(sizes, strides, offset);
  return self;
}

Tensor as_strided(const Tensor& t, c10::IntArrayRef sizes, c10::IntArrayRef strides, std::optional<int64_t> offset) {
  return at::native::as_strided_tensorimpl(t, sizes, strides, offset);
}

TORCH_LIBRARY_IMPL(_, CUDA, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&run>()); }

TORCH_LIBRARY_IMPL(aten, CUDA, m) {
  m.impl("empty.memory_format", &empty);
  m.impl("empty_strided", &empty_strided);
  m.impl("as_strided", &as_strided);
  m.impl("view", [](const Tensor& t, c10::IntArrayRef sizes) { return at::native::view(t, sizes); });
  m.impl("_reshape_alias", [](const Tensor& t, c10::IntArrayRef sizes, c10::IntArrayRef strides) {
    return at::native::_reshape_alias(t, sizes, strides);
  });
  m.impl("copy_", &copy_);
  m.impl("set_.source_Storage", &set_);
  m.impl("set_.source_Storage_storage_offset", &set_part);
  m.impl("resize_", &resize_);
  m.impl("_local_scalar_dense", &item);
}

}  // namespace

// Ops of petune that get a kernel on the device, as if the compiled library were loaded.
extern "C" void host_gpu_kernels(const char** ops, int n) {
  static std::vector<torch::Library> held;
  held.emplace_back(torch::Library::IMPL, "petune", c10::DispatchKey::CUDA, __FILE__, __LINE__);
  for (int i = 0; i < n; ++i) held.back().impl(ops[i], torch::CppFunction::makeFromBoxedFunction<&run>());
}
