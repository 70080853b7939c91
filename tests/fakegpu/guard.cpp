// A CUDA device guard and CUDA hooks that do nothing.
//
// A CPU-only build of PyTorch knows the device type CUDA but has no guard for it, and autograd asks the guard for
// devices and streams. With this library fake CUDA tensors run forward and backward. No kernel stands behind it.
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

static constexpr c10::DeviceIndex kDevices = 8;
static thread_local c10::DeviceIndex current = 0;

static c10::DeviceIndex exchange(c10::DeviceIndex index) {
  auto before = current;
  if (index >= 0) current = index;
  return before;
}

namespace c10::impl {
struct FakeCudaGuard final : public DeviceGuardImplInterface {
  DeviceType type() const override { return DeviceType::CUDA; }
  Device exchangeDevice(Device d) const override { return Device(DeviceType::CUDA, exchange(d.index())); }
  Device getDevice() const override { return Device(DeviceType::CUDA, current); }
  void setDevice(Device d) const override { exchange(d.index()); }
  void uncheckedSetDevice(Device d) const noexcept override { exchange(d.index()); }
  static Stream of(Device d) {
    return Stream(Stream::DEFAULT, Device(DeviceType::CUDA, d.index() < 0 ? current : d.index()));
  }
  Stream getStream(Device d) const override { return of(d); }
  Stream getDefaultStream(Device d) const override { return of(d); }
  Stream getNewStream(Device d, int) const override { return of(d); }
  Stream exchangeStream(Stream s) const override { return of(s.device()); }
  DeviceIndex deviceCount() const noexcept override { return kDevices; }
  void record(void** event, const Stream&, const DeviceIndex, const EventFlag) const override {
    if (event) *event = reinterpret_cast<void*>(1);
  }
  void block(void*, const Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void destroyEvent(void*, const DeviceIndex) const noexcept override {}
  bool queryStream(const Stream&) const override { return true; }
  void synchronizeStream(const Stream&) const override {}
  void synchronizeEvent(void*) const override {}
  void synchronizeDevice(const DeviceIndex) const override {}
  void recordDataPtrOnStream(const c10::DataPtr&, const Stream&) const override {}
};
C10_REGISTER_GUARD_IMPL(CUDA, FakeCudaGuard)
}  // namespace c10::impl

// Hooks: autograd's engine accepts CUDA as the accelerator.
struct CUDAHooks final : public at::CUDAHooksInterface {
  explicit CUDAHooks(at::CUDAHooksArgs) {}
  void init() const override {}
  bool hasCUDA() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(at::DeviceIndex) const override { return true; }
  at::DeviceIndex deviceCount() const override { return kDevices; }
  int getNumGPUs() const override { return kDevices; }
  at::DeviceIndex current_device() const override { return current; }
  at::DeviceIndex getCurrentDevice() const override { return current; }
  void setCurrentDevice(at::DeviceIndex index) const override { exchange(index); }
  at::DeviceIndex exchangeDevice(at::DeviceIndex index) const override { return exchange(index); }
  at::DeviceIndex maybeExchangeDevice(at::DeviceIndex index) const override { return exchange(index); }
  void deviceSynchronize(at::DeviceIndex) const override {}
  const at::Generator& getDefaultGenerator(at::DeviceIndex) const override {
    static at::Generator generator = at::detail::createCPUGenerator();
    return generator;
  }
};
using at::CUDAHooksRegistry;
using at::RegistererCUDAHooksRegistry;
REGISTER_CUDA_HOOKS(CUDAHooks)
