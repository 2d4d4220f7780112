// SPDX-License-Identifier: Apache-2.0
// A device that behaves like an accelerator and computes on the host: PyTorch's PrivateUse1 backend. Every operator
// runs the CPU's kernel on the same memory, after it has refused what CUDA refuses; copies between host and device and
// everything for which the host would wait are told to a listener.

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/EmptyTensor.h>
#include <ATen/core/GeneratorForPrivateuseone.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <torch/extension.h>
#include <torch/library.h>

#include <mutex>
#include <unordered_set>

namespace {

using at::Tensor;
using c10::IValue;
using OptionalType = std::optional<at::ScalarType>;

constexpr auto kStrict = c10::DeviceType::PrivateUse1;
const c10::DispatchKeySet kKeys(c10::DispatchKey::PrivateUse1);
const at::Device kDevice(kStrict, 0);

// ---- memory -------------------------------------------------------------------------------------------------------

std::mutex mutex;
int64_t in_use = 0, peak = 0;

void account(int64_t bytes) {
  std::lock_guard<std::mutex> lock(mutex);
  in_use += bytes;
  peak = std::max(peak, in_use);
}

// Host memory that counts as the device's: its own, or of a tensor that the CPU's kernel made.
struct Block {
  void* own = nullptr;
  c10::Storage borrowed;
  int64_t bytes;
};

void release(void* context) {
  auto* block = static_cast<Block*>(context);
  account(-block->bytes);
  std::free(block->own);
  delete block;
}

struct Allocator final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    void* data = nullptr;
    if (bytes) {
      TORCH_CHECK(!posix_memalign(&data, 64, bytes), "out of memory: ", bytes, " bytes");
    }
    account(static_cast<int64_t>(bytes));
    auto* block = new Block{data, c10::Storage(), static_cast<int64_t>(bytes)};
    return {data, block, &release, kDevice};
  }
  void copy_data(void* to, const void* from, size_t bytes) const override { default_copy_data(to, from, bytes); }
} allocator;
C10_UNUSED const bool allocator_is_set = (c10::SetAllocator(kStrict, &allocator), true);

// ---- one device, one stream -----------------------------------------------------------------------------------------

struct Guard final : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override { return kStrict; }
  at::Device exchangeDevice(at::Device) const override { return kDevice; }
  at::Device getDevice() const override { return kDevice; }
  void setDevice(at::Device) const override {}
  void uncheckedSetDevice(at::Device) const noexcept override {}
  c10::Stream getStream(at::Device) const noexcept override { return c10::Stream(c10::Stream::DEFAULT, kDevice); }
  c10::Stream exchangeStream(c10::Stream) const noexcept override { return getStream(kDevice); }
  c10::DeviceIndex deviceCount() const noexcept override { return 1; }
  void record(void**, const c10::Stream&, const c10::DeviceIndex, const c10::EventFlag) const override {}
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void destroyEvent(void*, const c10::DeviceIndex) const noexcept override {}
  bool queryStream(const c10::Stream&) const override { return true; }
  void synchronizeStream(const c10::Stream&) const override {}
};
C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard);

struct Hooks final : at::PrivateUse1HooksInterface {
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  at::Device getDeviceFromPtr(void*) const override { return kDevice; }
} hooks;

// A generator of the device; the CPU's kernels draw from the one within.
struct Generator final : c10::GeneratorImpl {
  explicit Generator(at::Generator inside)
      : c10::GeneratorImpl(kDevice, kKeys), cpu(std::move(inside)) {}
  void set_current_seed(uint64_t seed) override { cpu.set_current_seed(seed); }
  void set_offset(uint64_t) override {}
  uint64_t get_offset() const override { return 0; }
  uint64_t current_seed() const override { return cpu.current_seed(); }
  uint64_t seed() override { return cpu.seed(); }
  void set_state(const c10::TensorImpl& state) override { cpu.unsafeGetGeneratorImpl()->set_state(state); }
  c10::intrusive_ptr<c10::TensorImpl> get_state() const override { return cpu.unsafeGetGeneratorImpl()->get_state(); }
  Generator* clone_impl() const override { return new Generator(cpu.clone()); }
  at::Generator cpu;
};
at::Generator make_generator(c10::DeviceIndex) { return at::make_generator<Generator>(at::detail::createCPUGenerator()); }
REGISTER_GENERATOR_PRIVATEUSE1(make_generator)

// ---- what the host waits for ------------------------------------------------------------------------------------------

py::object listener = py::none();

void tell(const char* event, const std::string& op) {
  py::gil_scoped_acquire gil;
  if (!listener.is_none()) {
    listener(event, op);
  }
}

// Operators of which CUDA has to know a size, or a value, on the host.
const std::unordered_set<std::string> kWaits = {
    "aten::nonzero", "aten::masked_select", "aten::_unique2", "aten::unique_dim", "aten::unique_consecutive",
    "aten::bincount", "aten::equal", "aten::repeat_interleave", "aten::multinomial", "aten::linalg_eigh",
    "aten::_linalg_eigh", "aten::histc"};
// Operators that take indices of the host, at the price of a copy.
const std::unordered_set<std::string> kIndexed = {"aten::index", "aten::index_put", "aten::index_put_",
                                                  "aten::_index_put_impl_"};

// ---- the same memory as a tensor of the CPU, and back -------------------------------------------------------------------

Tensor on_host(const Tensor& t) {
  auto* owner = new c10::Storage(t.storage());
  c10::DataPtr data(t.storage().mutable_data(), owner, [](void* o) { delete static_cast<c10::Storage*>(o); }, at::kCPU);
  c10::Storage storage(c10::Storage::use_byte_size_t(), t.storage().nbytes(), std::move(data), nullptr, false);
  auto host = at::detail::make_tensor<c10::TensorImpl>(
      std::move(storage), c10::DispatchKeySet(c10::DispatchKey::CPU), t.dtype());
  host.unsafeGetTensorImpl()->set_sizes_and_strides(t.sizes(), t.strides(), t.storage_offset());
  host._set_conj(t.is_conj());
  host._set_neg(t.is_neg());
  return host;
}

c10::Storage device_storage(const Tensor& host) {
  const auto bytes = static_cast<int64_t>(host.storage().nbytes());
  account(bytes);
  c10::DataPtr data(host.storage().mutable_data(), new Block{nullptr, host.storage(), bytes}, &release, kDevice);
  return c10::Storage(c10::Storage::use_byte_size_t(), bytes, std::move(data), &allocator, true);
}

Tensor with_storage(c10::Storage storage, const Tensor& like) {
  auto made = at::detail::make_tensor<c10::TensorImpl>(std::move(storage), kKeys, like.dtype());
  made.unsafeGetTensorImpl()->set_sizes_and_strides(like.sizes(), like.strides(), like.storage_offset());
  return made;
}

// The arguments of one call: tensors of the device, and their memory as tensors of the CPU.
struct Call {
  struct Pair {
    Tensor device, host;
  };
  std::string op;
  std::vector<Pair> pairs;

  Tensor in(const Tensor& t, bool written) {
    if (!t.defined()) {
      return t;
    }
    if (t.device().type() != kStrict) {
      TORCH_CHECK(t.dim() == 0 || kIndexed.count(op), op, ": expected all tensors to be on the same device, but found ",
                  t.device(), " with ", t.sizes(), " beside ", kDevice);
      if (t.dim()) {
        tell("to device", op);
      }
      return t;
    }
    for (const auto& pair : pairs) {
      if (pair.device.is_same(t)) {
        return pair.host;
      }
    }
    const bool to_fill = written && t.sizes() == at::IntArrayRef({0});  // the kernel gives it a size
    pairs.push_back({t, to_fill ? at::empty({0}, t.options().device(at::kCPU)) : on_host(t)});
    return pairs.back().host;
  }

  Tensor out(const Tensor& t) const {
    if (!t.defined()) {
      return t;
    }
    for (const auto& pair : pairs) {
      if (pair.host.is_same(t)) {
        return pair.device;
      }
    }
    for (const auto& pair : pairs) {
      if (pair.host.storage().is_alias_of(t.storage())) {
        return with_storage(pair.device.storage(), t);
      }
    }
    return with_storage(device_storage(t), t);
  }

  // What the kernel resized.
  void finish() const {
    for (const auto& [device, host] : pairs) {
      auto* impl = device.unsafeGetTensorImpl();
      if (host.storage().data() != device.storage().data() && host.numel()) {
        impl->set_storage_keep_dtype(device_storage(host));
      } else if (host.sizes() == device.sizes() && host.strides() == device.strides()) {
        continue;
      }
      impl->set_sizes_and_strides(host.sizes(), host.strides(), host.storage_offset());
    }
  }
};

void on_the_cpu(const c10::OperatorHandle& handle, c10::Stack* stack) {
  const auto& arguments = handle.schema().arguments();
  Call call{handle.schema().name(), {}};
  const auto first = stack->size() - arguments.size();
  for (size_t i = 0; i < arguments.size(); ++i) {
    IValue& value = (*stack)[first + i];
    const bool written = arguments[i].alias_info() && arguments[i].alias_info()->isWrite();
    if (value.isTensor()) {
      value = call.in(value.toTensor(), written);
    } else if (value.isTensorList()) {
      std::vector<Tensor> taken;
      for (const Tensor& t : value.toTensorVector()) {
        taken.push_back(call.in(t, written));
      }
      value = taken;
    } else if (value.isOptionalTensorList()) {
      c10::List<std::optional<Tensor>> taken;
      for (const auto& t : value.toOptionalTensorVector()) {
        taken.push_back(t ? std::make_optional(call.in(*t, written)) : std::nullopt);
      }
      value = taken;
    } else if (value.isDevice() && value.toDevice().type() == kStrict) {
      value = at::Device(at::kCPU);
    } else if (value.isGenerator()) {
      auto* own = dynamic_cast<Generator*>(value.toGenerator().unsafeGetGeneratorImpl());
      TORCH_CHECK(own, call.op, ": expected a generator of ", kDevice, " but found one of ", value.toGenerator().device());
      value = own->cpu;
    }
  }
  if (kWaits.count(call.op)) {
    tell("wait", call.op);
  }
  {
    at::AutoDispatchBelowADInplaceOrView below;
    handle.callBoxedForDispatchKey(c10::DispatchKey::CPU, *stack);
  }
  call.finish();
  const auto returned = stack->size() - handle.schema().returns().size();
  for (size_t i = returned; i < stack->size(); ++i) {
    IValue& value = (*stack)[i];
    if (value.isTensor()) {
      value = call.out(value.toTensor());
    } else if (value.isTensorList()) {
      std::vector<Tensor> made;
      for (const Tensor& t : value.toTensorVector()) {
        made.push_back(call.out(t));
      }
      value = made;
    }
  }
}

// ---- operators with kernels of their own ----------------------------------------------------------------------------------

Tensor empty(at::IntArrayRef size, OptionalType dtype, std::optional<at::Layout>, std::optional<at::Device>,
             std::optional<bool>, std::optional<at::MemoryFormat> format) {
  return at::detail::empty_generic(size, &allocator, kKeys, c10::dtype_or_default(dtype), format);
}

Tensor empty_strided(at::IntArrayRef size, at::IntArrayRef stride, OptionalType dtype, std::optional<at::Layout>,
                     std::optional<at::Device>, std::optional<bool>) {
  return at::detail::empty_strided_generic(size, stride, &allocator, kKeys, c10::dtype_or_default(dtype));
}

const Tensor& resize_(const Tensor& self, at::IntArrayRef size, std::optional<at::MemoryFormat> format) {
  auto host = on_host(self).clone();
  host.resize_(size, format);
  auto* impl = self.unsafeGetTensorImpl();
  impl->set_storage_keep_dtype(device_storage(host));
  impl->set_sizes_and_strides(host.sizes(), host.strides(), host.storage_offset());
  return self;
}

Tensor& set_(Tensor& self, c10::Storage storage, int64_t offset, at::IntArrayRef size, at::IntArrayRef stride) {
  TORCH_CHECK(storage.device().type() == kStrict, "set_: expected a storage of ", kDevice, ", found ", storage.device());
  auto* impl = self.unsafeGetTensorImpl();
  impl->set_storage_keep_dtype(std::move(storage));
  impl->set_sizes_contiguous(size);
  if (stride.data()) {
    impl->set_sizes_and_strides(size, stride);
  }
  impl->set_storage_offset(offset);
  return self;
}

Tensor copy_from(const Tensor& self, const Tensor& to, bool non_blocking) {
  const bool from_device = self.device().type() == kStrict, to_device = to.device().type() == kStrict;
  if (from_device && !to_device) {
    tell(non_blocking && to.is_pinned() ? "to host" : "wait", "copy to the host");
  } else if (to_device && !from_device && self.dim()) {
    tell("to device", "copy");
  }
  (to_device ? on_host(to) : to).copy_(from_device ? on_host(self) : self);
  return to;
}

at::Scalar item(const Tensor& self) {
  tell("wait", "item");
  return at::_local_scalar_dense(on_host(self));
}

Tensor convolve(const Tensor& x, const Tensor& w, const std::optional<Tensor>& b, at::IntArrayRef stride,
                at::IntArrayRef padding, at::IntArrayRef dilation, bool transposed, at::IntArrayRef more, int64_t groups) {
  Call call{"aten::convolution", {}};
  auto bias = b && b->defined() ? std::make_optional(call.in(*b, false)) : std::nullopt;
  return call.out(at::convolution(call.in(x, false), call.in(w, false), bias, stride, padding, dilation, transposed, more,
                                  groups));
}

std::tuple<Tensor, Tensor, Tensor> convolve_backward(
    const Tensor& grad, const Tensor& x, const Tensor& w, at::IntArrayRef stride, at::IntArrayRef padding,
    at::IntArrayRef dilation, bool transposed, at::IntArrayRef more, int64_t groups, std::array<bool, 3> wanted) {
  Call call{"aten::convolution_backward", {}};
  const int64_t width = transposed ? w.size(1) * groups : w.size(0);
  auto [dx, dw, db] = at::convolution_backward(call.in(grad, false), call.in(x, false), call.in(w, false),
                                               at::IntArrayRef(width), stride, padding, dilation, transposed, more, groups,
                                               wanted);
  return {call.out(dx), call.out(dw), call.out(db)};
}

TORCH_LIBRARY_IMPL(_, PrivateUse1, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&on_the_cpu>()); }

TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("empty.memory_format", empty);
  m.impl("empty_strided", empty_strided);
  m.impl("as_strided", [](const Tensor& self, at::IntArrayRef size, at::IntArrayRef stride, std::optional<int64_t> offset) {
    return at::native::as_strided_tensorimpl(self, size, stride, offset);
  });
  m.impl("view", [](const Tensor& self, at::IntArrayRef size) { return at::native::view(self, size); });
  m.impl("_reshape_alias", [](const Tensor& self, at::IntArrayRef size, at::IntArrayRef stride) {
    return at::native::_reshape_alias(self, size, stride);
  });
  m.impl("resize_", resize_);
  m.impl("set_.source_Storage_storage_offset", set_);
  m.impl("set_.source_Storage", [](Tensor& self, c10::Storage storage) -> Tensor& {
    const int64_t size = static_cast<int64_t>(storage.nbytes() / self.element_size());
    return set_(self, std::move(storage), 0, size, {});
  });
  m.impl("_copy_from", copy_from);
  m.impl("_local_scalar_dense", item);
  m.impl("convolution_overrideable", convolve);
  m.impl("convolution_backward_overrideable", convolve_backward);
}

// Copies resolve these bits themselves; PyTorch would do so by copies, without an end.
TORCH_LIBRARY_IMPL(aten, Conjugate, m) { m.impl("_copy_from", torch::CppFunction::makeFallthrough()); }
TORCH_LIBRARY_IMPL(aten, Negative, m) { m.impl("_copy_from", torch::CppFunction::makeFallthrough()); }

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  at::RegisterPrivateUse1HooksInterface(&hooks);
  m.def("listen", [](py::object callback) { listener = std::move(callback); }, "(event, operator) of each; None: nobody");
  m.def("memory", [] { return std::make_pair(in_use, peak); }, "bytes in use, and at most since the last reset");
  m.def("reset_peak", [] { peak = in_use; });
  m.add_object("_end", py::capsule([] { listener = py::none(); }));
}
