// Registers the kernels with torch through the LibTorch stable ABI, so that one build serves every torch >= 2.10.
// Compiled twice: plain for the CPU (together with the pybind11 module `_C` and its build report), and with
// PETUNE_CUDA for the CUDA library, a shared object of its own. Arguments are checked in petune_kernels/ops, once for
// every backend; here only what would read out of bounds is checked again.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <optional>
#include <tuple>
#include <utility>
#include <vector>

#include "common/ops.h"

#ifdef PETUNE_CUDA
#define PETUNE_KEY CUDA
namespace kernels = petune::cuda;
#else
#define PETUNE_KEY CPU
#include "cpu/isa.h"
namespace kernels = petune::cpu;
#endif

namespace petune {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using MaybeTensor = std::optional<Tensor>;
using Shape = std::vector<int64_t>;

DType dtype_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return DType::f32;
    case ScalarType::BFloat16:
      return DType::bf16;
#ifdef PETUNE_CUDA
    case ScalarType::Half:
      return DType::f16;
#endif
    default:
      STD_TORCH_CHECK(false, "petune: this dtype has no compiled kernel; petune_kernels.ops picks one that fits");
  }
  return DType::f32;
}

const void* read(const Tensor& t) {
  STD_TORCH_CHECK(t.is_contiguous(), "petune: a compiled op takes contiguous tensors");
  return t.data_ptr();
}
const void* read(const MaybeTensor& t) { return t ? read(*t) : nullptr; }

// Rows that are read beside `like`, element by element.
const void* read_beside(const Tensor& like, const MaybeTensor& t) {
  STD_TORCH_CHECK(!t || (t->numel() == like.numel() && t->scalar_type() == like.scalar_type()),
                  "petune: rows that are read together have one size and one dtype");
  return read(t);
}

void* write(Tensor& t) { return t.data_ptr(); }

// A tensor beside `like`, of its dtype unless another is named. Not torch::stable::new_empty, which finds its op by
// name at each call: that costs three times as much, and a call makes up to six.
Tensor strided(const Tensor& like, const Shape& shape, const Shape& strides, std::optional<int32_t> dtype = {}) {
  int32_t own = 0, device_type = 0, device_index = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(like.get(), &own));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(like.get(), &device_index));
  AtenTensorHandle made = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(shape.size()), shape.data(), strides.data(),
                                                  dtype.value_or(own), device_type, device_index, &made));
  return Tensor(made);
}

Tensor dense(const Tensor& like, const Shape& shape, std::optional<int32_t> dtype = {}) {
  Shape strides(shape.size(), 1);
  for (size_t i = shape.size(); i-- > 1;) strides[i - 1] = strides[i] * std::max<int64_t>(shape[i], 1);
  return strided(like, shape, strides, dtype);
}

// An output of a fixed-arity op: the real thing, or [0] where nobody asked for it.
struct Output {
  Tensor tensor;
  bool wanted;

  Output(bool wanted, const Tensor& like, const Shape& shape)
      : tensor(dense(like, wanted ? shape : Shape{0})), wanted(wanted) {}
  void* data() { return wanted ? tensor.data_ptr() : nullptr; }
};

Shape shape_of(const Tensor& t) { return Shape(t.sizes().begin(), t.sizes().end()); }

// T and H of rows [..., H].
std::pair<int64_t, int64_t> rows_of(const Tensor& t) {
  const int64_t H = t.dim() ? t.size(t.dim() - 1) : 0;
  STD_TORCH_CHECK(H > 0, "petune: rows have a width");
  return {t.numel() / H, H};
}

// An output shaped like a small parameter; `want` implies that the parameter is there.
Output small(bool want, const MaybeTensor& like, const Tensor& otherwise) {
  STD_TORCH_CHECK(!want || like.has_value(), "petune: a gradient was asked for a parameter that is not there");
  return like ? Output(want, *like, shape_of(*like)) : Output(false, otherwise, {});
}

// Replicas and dtype of the small parameters that are there; each is [G, H], or [H] and so one for all replicas.
struct Small {
  int64_t G = 1;
  DType dtype = DType::f32;
  int shared = 0;  // bit i: the i-th parameter is [H] though G > 1

  Small(std::initializer_list<const MaybeTensor*> params, int64_t T, int64_t H, DType rows) {
    const Tensor* first = nullptr;
    for (const MaybeTensor* param : params) {
      if (!*param) continue;
      const Tensor& t = **param;
      STD_TORCH_CHECK(t.size(t.dim() - 1) == H, "petune: a parameter's last dimension is not the rows' width");
      if (!first) first = &t, dtype = dtype_of(t);
      if (t.dim() == 2) {
        STD_TORCH_CHECK(G == 1 || t.size(0) == G, "petune: the parameters differ in their replicas");
        G = t.size(0);
      }
      STD_TORCH_CHECK(dtype_of(t) == dtype, "petune: the parameters differ in dtype");
    }
    STD_TORCH_CHECK(!first || dtype == rows || dtype == DType::f32,
                    "petune: parameters are in the rows' dtype or float32");
    int bit = 1;
    for (const MaybeTensor* param : params) {
      if (*param && G > 1 && (*param)->numel() != G * H) shared |= bit;
      bit *= 2;
    }
    STD_TORCH_CHECK(G > 0 && T % G == 0, "petune: the replicas do not divide the rows");
  }
};

struct Seed {
  const int64_t* data = nullptr;
  int64_t count = 1;

  explicit Seed(const MaybeTensor& seed, int64_t units) {
    if (!seed) return;
    data = static_cast<const int64_t*>(read(*seed));
    count = seed->numel();
    STD_TORCH_CHECK(count > 0 && units % count == 0, "petune: the seeds do not divide the rows");
  }
};

// The stream of the tensor's device.
struct Launch {
#ifdef PETUNE_CUDA
  torch::stable::accelerator::DeviceGuard guard;
  explicit Launch(const Tensor& t) : guard(t.get_device_index()), index(t.get_device_index()) {}
  int32_t index;
  Stream stream() const {
    void* out = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(index, &out));
    return out;
  }
#else
  explicit Launch(const Tensor&) {}
  Stream stream() const { return nullptr; }
#endif
};

Tensor scratch(const Tensor& like, size_t bytes) {
  return dense(like, {static_cast<int64_t>(bytes)}, aoti_torch_dtype_uint8());
}

std::tuple<Tensor, Tensor, Tensor, Tensor> residual_norm(Tensor x, MaybeTensor bias, MaybeTensor residual,
                                                         MaybeTensor gamma, MaybeTensor beta, MaybeTensor seed,
                                                         double p, double eps, bool rms, bool want_z, bool want_xhat) {
  const auto [T, H] = rows_of(x);
  const Small params({&bias, &gamma, &beta}, T, H, dtype_of(x));
  const Seed seeds(seed, T);
  const Launch launch(x);
  const Shape shape = shape_of(x);
  Output y(true, x, shape), z(want_z, x, shape), xhat(want_xhat, x, shape);
  Tensor rstd = dense(x, {T}, aoti_torch_dtype_float32());
  kernels::residual_norm({T,
                          H,
                          params.G,
                          seeds.count,
                          dtype_of(x),
                          params.dtype,
                          read(x),
                          read(bias),
                          read_beside(x, residual),
                          read(gamma),
                          read(beta),
                          seeds.data,
                          p,
                          eps,
                          rms,
                          y.data(),
                          z.data(),
                          xhat.data(),
                          static_cast<float*>(write(rstd)),
                          params.shared},
                         launch.stream());
  return {y.tensor, z.tensor, xhat.tensor, rstd};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> residual_norm_backward(
    Tensor dy, MaybeTensor dz, Tensor row, Tensor rstd, MaybeTensor bias, MaybeTensor gamma, MaybeTensor beta,
    MaybeTensor seed, double p, bool rms, bool row_is_z, bool want_dresidual, bool want_dx, bool want_dbias,
    bool want_dgamma, bool want_dbeta) {
  const auto [T, H] = rows_of(dy);
  const Small params({&bias, &gamma, &beta}, T, H, dtype_of(dy));
  const int wanted = (want_dbias ? kSharedBias : 0) | (want_dgamma ? kSharedGamma : 0) | (want_dbeta ? kSharedBeta : 0);
  STD_TORCH_CHECK((params.shared & wanted) == 0, "petune: a parameter that replicas share has no gradient here");
  STD_TORCH_CHECK(rstd.numel() == T && rstd.scalar_type() == ScalarType::Float, "petune: rstd is float32, one a row");
  const Seed seeds(seed, T);
  const Launch launch(dy);
  const Shape shape = shape_of(dy);
  Output dresidual(want_dresidual, dy, shape), dx(want_dx, dy, shape);
  Output dbias = small(want_dbias, bias, dy), dgamma = small(want_dgamma, gamma, dy),
         dbeta = small(want_dbeta, beta, dy);
  ResidualNormBackward args{T,
                            H,
                            params.G,
                            seeds.count,
                            dtype_of(dy),
                            params.dtype,
                            read(dy),
                            read_beside(dy, dz),
                            read_beside(dy, row),
                            static_cast<const float*>(read(rstd)),
                            read(gamma),
                            seeds.data,
                            p,
                            rms,
                            row_is_z,
                            dresidual.data(),
                            dx.data(),
                            dbias.data(),
                            dgamma.data(),
                            dbeta.data(),
                            nullptr,
                            params.shared};
  Tensor workspace = scratch(dy, kernels::residual_norm_backward_workspace(args));
  args.workspace = write(workspace);
  kernels::residual_norm_backward(args, launch.stream());
  return {dresidual.tensor, dx.tensor, dbias.tensor, dgamma.tensor, dbeta.tensor};
}

Tensor bias_act(Tensor u, MaybeTensor bias, MaybeTensor gate, int64_t act) {
  const auto [T, N] = rows_of(u);
  const Small params({&bias}, T, N, dtype_of(u));
  const Launch launch(u);
  const Shape shape = shape_of(u);
  Output h(true, u, shape);
  kernels::bias_act({T, N, params.G, dtype_of(u), params.dtype, read(u), read(bias), read_beside(u, gate),
                     static_cast<Act>(act), h.data(), nullptr},
                    launch.stream());
  return h.tensor;
}

std::tuple<Tensor, Tensor, Tensor> bias_act_backward(Tensor dh, Tensor u, MaybeTensor bias, MaybeTensor gate,
                                                     int64_t act, bool want_du, bool want_dbias, bool want_dgate) {
  const auto [T, N] = rows_of(u);
  const Small params({&bias}, T, N, dtype_of(u));
  const Launch launch(u);
  const Shape shape = shape_of(u);
  Output du(want_du, u, shape), dgate(want_dgate, u, shape);
  Output dbias = small(want_dbias, bias, u);
  BiasActBackward args{T,
                       N,
                       params.G,
                       dtype_of(u),
                       params.dtype,
                       read_beside(u, dh),
                       read(u),
                       read(bias),
                       read_beside(u, gate),
                       nullptr,
                       static_cast<Act>(act),
                       du.data(),
                       dbias.data(),
                       dgate.data(),
                       nullptr};
  Tensor workspace = scratch(u, kernels::bias_act_backward_workspace(args));
  args.workspace = write(workspace);
  kernels::bias_act_backward(args, launch.stream());
  return {du.tensor, dbias.tensor, dgate.tensor};
}

std::tuple<Tensor, Tensor> bias_act_coded(Tensor u, MaybeTensor bias, int64_t act) {
  const auto [T, N] = rows_of(u);
  const Small params({&bias}, T, N, dtype_of(u));
  const Launch launch(u);
  const Shape shape = shape_of(u);
  Output h(true, u, shape);
  Tensor code = dense(u, shape, aoti_torch_dtype_uint8());
  kernels::bias_act({T, N, params.G, dtype_of(u), params.dtype, read(u), read(bias), nullptr, static_cast<Act>(act),
                     h.data(), static_cast<uint8_t*>(write(code))},
                    launch.stream());
  return {h.tensor, code};
}

std::tuple<Tensor, Tensor> bias_act_coded_backward(Tensor dh, Tensor code, MaybeTensor bias, int64_t act, bool want_du,
                                                   bool want_dbias) {
  const auto [T, N] = rows_of(dh);
  STD_TORCH_CHECK(code.scalar_type() == ScalarType::Byte && shape_of(code) == shape_of(dh),
                  "petune: the code is uint8 of dh's shape");
  const Small params({&bias}, T, N, dtype_of(dh));
  const Launch launch(dh);
  Output du(want_du, dh, shape_of(dh)), dbias = small(want_dbias, bias, dh);
  BiasActBackward args{T,
                       N,
                       params.G,
                       dtype_of(dh),
                       params.dtype,
                       read(dh),
                       nullptr,
                       nullptr,
                       nullptr,
                       static_cast<const uint8_t*>(read(code)),
                       static_cast<Act>(act),
                       du.data(),
                       dbias.data(),
                       nullptr,
                       nullptr};
  Tensor workspace = scratch(dh, kernels::bias_act_backward_workspace(args));
  args.workspace = write(workspace);
  kernels::bias_act_backward(args, launch.stream());
  return {du.tensor, dbias.tensor};
}

Tensor column_sum(Tensor x, int64_t groups) {
  const int64_t T = x.size(0), N = x.size(1);
  STD_TORCH_CHECK(groups > 0 && T % groups == 0, "petune: groups do not divide the rows");
  const Launch launch(x);
  Tensor out = dense(x, {groups, N}, aoti_torch_dtype_float32());
  ColumnSum args{T, N, groups, dtype_of(x), read(x), static_cast<float*>(write(out)), nullptr};
  Tensor workspace = scratch(x, kernels::column_sum_workspace(args));
  args.workspace = write(workspace);
  kernels::column_sum(args, launch.stream());
  return out;
}

Tensor dropout(Tensor x, Tensor seed, double p) {
  const Seed seeds(seed, x.numel());
  const Launch launch(x);
  Output y(true, x, shape_of(x));
  kernels::dropout({x.numel(), seeds.count, dtype_of(x), read(x), seeds.data, p, y.data()}, launch.stream());
  return y.tensor;
}

#ifndef PETUNE_CUDA
Strides strides_of(const Tensor& t) {
  STD_TORCH_CHECK(t.dim() == 4 && (t.stride(3) == 1 || t.size(3) == 1), "petune: attention takes rows without gaps");
  return {t.stride(0), t.stride(1), t.stride(2)};
}

// [B, h, n, D], laid out [B, n, h, D] in memory as schema.py says.
Tensor new_heads(const Tensor& like) {
  const int64_t h = like.size(1), n = like.size(2), D = like.size(3);
  return strided(like, shape_of(like), {n * h * D, D, h * D, 1});
}

Attention attention_args(const Tensor& q, const Tensor& k, const Tensor& v, const MaybeTensor& mask,
                         const MaybeTensor& seed, double p, double scale, bool causal, const Tensor* o) {
  const int64_t B = q.size(0), h = q.size(1), S = q.size(2), K = k.size(2), D = q.size(3);
  STD_TORCH_CHECK(k.size(0) == B && k.size(1) == h && k.size(3) == D && shape_of(v) == shape_of(k),
                  "petune: q, k and v do not match");
  const Seed seeds(seed, B);
  Attention args{B,
                 h,
                 S,
                 K,
                 D,
                 dtype_of(q),
                 q.data_ptr(),
                 k.data_ptr(),
                 v.data_ptr(),
                 strides_of(q),
                 strides_of(k),
                 strides_of(v),
                 o ? strides_of(*o) : Strides{},
                 nullptr,
                 {},
                 seeds.data,
                 seeds.count,
                 p,
                 scale,
                 causal,
                 o ? o->data_ptr() : nullptr};
  if (!mask) return args;
  STD_TORCH_CHECK(
      shape_of(*mask) == Shape({B, h, S, K}) && dtype_of(*mask) == args.dtype && (K <= 1 || mask->stride(3) == 1),
      "petune: attention takes its mask expanded to [B, h, S, K], in the dtype of q, rows without gaps");
  args.mask = mask->data_ptr();
  for (int i = 0; i < 4; ++i) args.mask_strides[i] = mask->stride(i);
  return args;
}

Tensor attention(Tensor q, Tensor k, Tensor v, MaybeTensor mask, MaybeTensor seed, double p, double scale,
                 bool causal) {
  Tensor o = new_heads(q);
  kernels::attention(attention_args(q, k, v, mask, seed, p, scale, causal, &o));
  return o;
}

std::tuple<Tensor, Tensor, Tensor> attention_backward(Tensor d_o, Tensor q, Tensor k, Tensor v, MaybeTensor mask,
                                                      MaybeTensor seed, double p, double scale, bool causal) {
  Tensor dq = new_heads(q), dk = new_heads(k), dv = new_heads(v);
  kernels::attention_backward({attention_args(q, k, v, mask, seed, p, scale, causal, nullptr), d_o.data_ptr(),
                               strides_of(d_o), strides_of(dq), strides_of(dk), strides_of(dv), dq.data_ptr(),
                               dk.data_ptr(), dv.data_ptr()});
  return {dq, dk, dv};
}

// The factors of one replica [r, K], [N, r] or of several [G, r, K], [G, N, r].
struct Adapter {
  int64_t K, N, r, G;

  Adapter(const Tensor& a, const Tensor& b, int64_t T)
      : K(a.size(a.dim() - 1)), N(b.size(b.dim() - 2)), r(a.size(a.dim() - 2)), G(a.dim() == 3 ? a.size(0) : 1) {
    STD_TORCH_CHECK(
        b.dim() == a.dim() && b.numel() == G * N * r && a.numel() == G * r * K && dtype_of(a) == dtype_of(b),
        "petune: lora_adapter's a and b do not match");
    STD_TORCH_CHECK(G > 0 && T % G == 0, "petune: the replicas do not divide the rows");
  }
};

void is_rows(const Tensor& t, int64_t T, int64_t H, DType dtype) {
  STD_TORCH_CHECK(t.dim() == 2 && t.size(0) == T && t.size(1) == H && t.is_contiguous() && dtype_of(t) == dtype,
                  "petune: lora_adapter takes contiguous rows of one dtype");
}

void lora_adapter(Tensor y, Tensor x, Tensor a, Tensor b, MaybeTensor bias_b, MaybeTensor seed, double p,
                  double scale) {
  const int64_t T = x.size(0);
  const Adapter shape(a, b, T);
  is_rows(x, T, shape.K, dtype_of(x)), is_rows(y, T, shape.N, dtype_of(x));
  STD_TORCH_CHECK(!bias_b || (bias_b->numel() == shape.G * shape.N && dtype_of(*bias_b) == dtype_of(a)),
                  "petune: lora_adapter's bias_b does not match");
  const Seed seeds(seed, T);
  kernels::lora_adapter({T, shape.K, shape.N, shape.r, shape.G, seeds.count, dtype_of(x), dtype_of(a), read(x), read(a),
                         read(b), read(bias_b), seeds.data, p, scale, write(y)});
}

std::tuple<Tensor, Tensor> lora_adapter_backward(MaybeTensor dx, Tensor dy, MaybeTensor x, Tensor a, Tensor b,
                                                 MaybeTensor seed, double p, double scale, bool want_da, bool want_db) {
  const int64_t T = dy.size(0);
  const Adapter shape(a, b, T);
  STD_TORCH_CHECK(x || !(want_da || want_db), "petune: the gradients of a and b need x");
  is_rows(dy, T, shape.N, dtype_of(dy));
  if (x) is_rows(*x, T, shape.K, dtype_of(dy));
  if (dx) is_rows(*dx, T, shape.K, dtype_of(dy));
  const Seed seeds(seed, T);
  Output da(want_da, a, shape_of(a)), db(want_db, b, shape_of(b));
  LoraAdapterBackward args{
      T,         shape.K,   shape.N, shape.r, shape.G,    seeds.count, dtype_of(dy), dtype_of(a),
      read(dy),  read(x),   read(a), read(b), seeds.data, p,           scale,        dx ? write(*dx) : nullptr,
      da.data(), db.data(), nullptr};
  Tensor workspace = scratch(dy, kernels::lora_adapter_backward_workspace(args));
  args.workspace = write(workspace);
  kernels::lora_adapter_backward(args);
  return {da.tensor, db.tensor};
}
#endif

STABLE_TORCH_LIBRARY_IMPL(petune, PETUNE_KEY, m) {
  m.impl("residual_norm", TORCH_BOX(&residual_norm));
  m.impl("residual_norm_backward", TORCH_BOX(&residual_norm_backward));
  m.impl("bias_act", TORCH_BOX(&bias_act));
  m.impl("bias_act_backward", TORCH_BOX(&bias_act_backward));
  m.impl("bias_act_coded", TORCH_BOX(&bias_act_coded));
  m.impl("bias_act_coded_backward", TORCH_BOX(&bias_act_coded_backward));
  m.impl("column_sum", TORCH_BOX(&column_sum));
  m.impl("dropout", TORCH_BOX(&dropout));
#ifndef PETUNE_CUDA
  m.impl("attention", TORCH_BOX(&attention));
  m.impl("attention_backward", TORCH_BOX(&attention_backward));
  m.impl("lora_adapter", TORCH_BOX(&lora_adapter));
  m.impl("lora_adapter_backward", TORCH_BOX(&lora_adapter_backward));
#endif
}

}  // namespace
}  // namespace petune

#ifndef PETUNE_CUDA
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

namespace petune::cpu {

void parallel_for(int64_t n, int64_t grain, void (*body)(void*, int64_t, int64_t), void* context) {
  torch::stable::parallel_for(0, n, grain, [&](int64_t begin, int64_t end) { body(context, begin, end); });
}

int max_threads() { return static_cast<int>(torch::stable::get_num_threads()); }

}  // namespace petune::cpu

PYBIND11_MODULE(_C, m) {
  m.doc() = "The compiled CPU ops of petune_kernels (registered as torch.ops.petune.*) and the build report.";
  m.def(
      "build_info",
      [] {
        pybind11::dict info;
        info["version"] = PETUNE_VERSION;
        info["compiler"] = PETUNE_COMPILER;
        info["torch_at_build"] = PETUNE_TORCH;
        info["torch_minimum"] = "2.10";
        info["isa"] = petune::cpu::isa_name();
        info["threads"] = petune::cpu::max_threads();
        info["cuda"] = PETUNE_CUDA_VERSION;
        info["cuda_architectures"] = PETUNE_CUDA_ARCHS;
        return info;
      },
      "What was built: version, compiler, torch at build time and oldest torch served, the instruction set in use, "
      "torch's threads, and the CUDA version and architectures of the CUDA library ('' where it was not built).");
}
#endif
