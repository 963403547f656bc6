// A second device for the torch of a WebUI, for machines without a GPU: see launch.py.
//
// Its memory is the computer's, and its arithmetic the CPU's: what has no kernel here is computed
// by torch's cpu_fallback on copies (sometimes in another order, as for a layer norm, so it rounds
// differently). It keeps one rule of a GPU: an operation whose tensors are on two devices fails,
// unless it is a copy, or the other is a zero-dimensional CPU tensor, or an index.

#include <ATen/EmptyTensor.h>
#include <ATen/native/CPUFallback.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <c10/core/impl/alloc_cpu.h>
#include <torch/extension.h>
#include <torch/library.h>
#include <torch/version.h>

#define BEFORE(minor) (TORCH_VERSION_MAJOR == 2 && TORCH_VERSION_MINOR < (minor))

#if BEFORE(2)  // the types in the schema of a convolution
#define CONVOLUTION at::convolution
using Sizes = at::IntArrayRef;
using Size = int64_t;
#else
#define CONVOLUTION at::convolution_symint
using Sizes = c10::SymIntArrayRef;
using Size = c10::SymInt;
#endif

namespace second_device {  // the C library has an index of its own

using at::IntArrayRef;
using at::Tensor;
using Indices = c10::List<c10::optional<Tensor>>;

const c10::Device DEVICE(c10::kPrivateUse1, 0);

// One device with one stream, on which everything is done at once.
struct Guard final : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override { return c10::kPrivateUse1; }
  c10::Device exchangeDevice(c10::Device) const override { return DEVICE; }
  c10::Device getDevice() const override { return DEVICE; }
  void setDevice(c10::Device) const override {}
  void uncheckedSetDevice(c10::Device) const noexcept override {}
  c10::Stream getStream(c10::Device) const noexcept override {
    return c10::Stream(c10::Stream::DEFAULT, DEVICE);
  }
  c10::Stream exchangeStream(c10::Stream stream) const noexcept override { return stream; }
  c10::DeviceIndex deviceCount() const noexcept override { return 1; }
};

struct Memory final : c10::Allocator {
#if BEFORE(3)
  c10::DataPtr allocate(size_t size) const override { return take(size); }
#else
  c10::DataPtr allocate(size_t size) override { return take(size); }
  void copy_data(void* to, const void* from, size_t size) const override {
    memcpy(to, from, size);
  }
#endif
  c10::DeleterFnPtr raw_deleter() const override { return &c10::free_cpu; }

 private:
  static c10::DataPtr take(size_t size) {
    void* place = c10::alloc_cpu(size);
    return {place, place, &c10::free_cpu, DEVICE};
  }
};

Memory memory;

void check(const char* operation, const Tensor& tensor) {
  TORCH_CHECK(
      !tensor.defined() || tensor.dim() == 0 || tensor.device() == DEVICE, operation,
      ": expected all tensors to be on the same device, but found at least two devices, ", DEVICE,
      " and ", tensor.device());
}

// The same memory as a tensor of the CPU.
Tensor on_cpu(const Tensor& tensor) {
  if (!tensor.defined() || tensor.device().is_cpu()) return tensor;
  auto options = at::TensorOptions().dtype(tensor.dtype()).device(c10::kCPU);
  void* place = tensor.numel() ? tensor.data_ptr() : nullptr;
  return at::from_blob(place, tensor.sizes(), tensor.strides(), options);
}

Indices on_cpu(const Indices& indices) {
  Indices result;
  for (size_t i = 0; i < indices.size(); i++) {
    c10::optional<Tensor> index = indices.get(i);
    result.push_back(index ? c10::optional<Tensor>(on_cpu(*index)) : index);
  }
  return result;
}

// Tensors: memory, shape, copies -----------------------------------------------------------------

Tensor empty(
    IntArrayRef size, c10::optional<c10::ScalarType> type, c10::optional<c10::Layout>,
    c10::optional<c10::Device>, c10::optional<bool>, c10::optional<c10::MemoryFormat> format) {
  auto keys = c10::DispatchKeySet(c10::DispatchKey::PrivateUse1);
  return at::detail::empty_generic(size, &memory, keys, c10::dtype_or_default(type), format);
}

Tensor empty_strided(
    IntArrayRef size, IntArrayRef stride, c10::optional<c10::ScalarType> type,
    c10::optional<c10::Layout>, c10::optional<c10::Device>, c10::optional<bool>) {
  auto keys = c10::DispatchKeySet(c10::DispatchKey::PrivateUse1);
  auto number = c10::dtype_or_default(type);
  return at::detail::empty_strided_generic(size, stride, &memory, keys, number);
}

Tensor as_strided(
    const Tensor& self, c10::SymIntArrayRef size, c10::SymIntArrayRef stride,
    c10::optional<c10::SymInt> offset) {
  auto start = offset ? c10::optional<int64_t>(offset->expect_int()) : c10::nullopt;
  return at::native::as_strided_tensorimpl(
      self, C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride), start);
}

Tensor view(const Tensor& self, c10::SymIntArrayRef size) {
  return at::native::view(self, C10_AS_INTARRAYREF_SLOW(size));
}

Tensor reshape_alias(const Tensor& self, c10::SymIntArrayRef size, c10::SymIntArrayRef stride) {
  return at::native::_reshape_alias(
      self, C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride));
}

Tensor unfold(const Tensor& self, int64_t dimension, int64_t size, int64_t step) {
  return at::native::unfold(self, dimension, size, step);
}

// A tensor that grows gets other memory; what was in the old one comes along.
const Tensor& resize(
    const Tensor& self, c10::SymIntArrayRef size, c10::optional<c10::MemoryFormat>) {
  auto sizes = C10_AS_INTARRAYREF_SLOW(size);
  auto* tensor = self.unsafeGetTensorImpl();
  auto* storage = tensor->unsafe_storage().unsafeGetStorageImpl();
  auto bytes = at::detail::computeStorageNbytesContiguous(
      sizes, self.dtype().itemsize(), tensor->storage_offset());
  if (storage->nbytes() < bytes) {
    auto larger = memory.allocate(bytes);
    memcpy(larger.get(), storage->data_ptr().get(), storage->nbytes());
    storage->set_data_ptr_noswap(std::move(larger));
    storage->set_nbytes(bytes);
  }
  tensor->set_sizes_contiguous(sizes);
  return self;
}

Tensor copy_from(const Tensor& self, const Tensor& target, bool) {
  on_cpu(target).copy_(on_cpu(self));
  return target;
}

Tensor copy_from_and_resize(const Tensor& self, const Tensor& target) {
  if (self.sizes() != target.sizes()) target.resize_(self.sizes());
  return copy_from(self, target, false);
}

c10::Scalar local_scalar_dense(const Tensor& self) { return on_cpu(self).item(); }

// Operations that cpu_fallback does not know in every torch --------------------------------------

Tensor convolution(
    const Tensor& input, const Tensor& weight, const c10::optional<Tensor>& bias, Sizes stride,
    Sizes padding, Sizes dilation, bool transposed, Sizes output_padding, Size groups) {
  for (const auto& tensor : {input, weight, bias.value_or(Tensor())}) check("conv", tensor);
  auto added = bias ? c10::optional<Tensor>(on_cpu(*bias)) : bias;
  return CONVOLUTION(
             on_cpu(input), on_cpu(weight), added, stride, padding, dilation, transposed,
             output_padding, groups)
      .to(DEVICE);
}

Tensor index(const Tensor& self, const Indices& indices) {
  check("index", self);
  return at::index(on_cpu(self), on_cpu(indices)).to(DEVICE);
}

Tensor& index_put(
    Tensor& self, const Indices& indices, const Tensor& values, bool accumulate, bool unsafe) {
  check("index_put_", self);
  check("index_put_", values);
  auto numbers = on_cpu(self);
  at::_index_put_impl_(numbers, on_cpu(indices), on_cpu(values), accumulate, unsafe);
  return self;
}

// All others -------------------------------------------------------------------------------------

void fallback(const c10::OperatorHandle& operation, torch::jit::Stack* stack) {
  const auto& schema = operation.schema();
  for (const auto& result : schema.returns()) {
    bool is_view = result.alias_info() && !result.alias_info()->isWrite();
    TORCH_CHECK(!is_view, schema.name(), ": what is written to a copy would be lost");
  }
  for (const auto& argument : torch::jit::last(stack, schema.arguments().size())) {
    if (argument.isTensor()) {
      check(schema.name().c_str(), argument.toTensor());
    } else if (argument.isTensorList()) {
      for (const Tensor& tensor : argument.toTensorVector()) check(schema.name().c_str(), tensor);
    }
  }
  at::native::cpu_fallback(operation, stack);
}

C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard);
REGISTER_ALLOCATOR(c10::kPrivateUse1, &memory);

}  // namespace second_device

TORCH_LIBRARY_IMPL(_, PrivateUse1, library) {
  library.fallback(torch::CppFunction::makeFromBoxedFunction<&second_device::fallback>());
}

TORCH_LIBRARY_IMPL(aten, PrivateUse1, library) {
  library.impl("empty.memory_format", &second_device::empty);
  library.impl("empty_strided", &second_device::empty_strided);
  library.impl("as_strided", &second_device::as_strided);
  library.impl("view", &second_device::view);
  library.impl("_reshape_alias", &second_device::reshape_alias);
  library.impl("unfold", &second_device::unfold);
  library.impl("resize_", &second_device::resize);
  library.impl("_copy_from", &second_device::copy_from);
  library.impl("_copy_from_and_resize", &second_device::copy_from_and_resize);
  library.impl("_local_scalar_dense", &second_device::local_scalar_dense);
  library.impl("convolution_overrideable", &second_device::convolution);
  library.impl("index.Tensor", &second_device::index);
  library.impl("_index_put_impl_", &second_device::index_put);
}

PYBIND11_MODULE(TORCH_EXTENSION_NAME, module) { module.doc() = "Registers the device."; }
