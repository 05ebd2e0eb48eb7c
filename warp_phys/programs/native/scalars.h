// What rows.h needs of vectors, for one number: a thread of a block works on numbers.

#if defined(__CUDA_ARCH__)  // what clang has and NVRTC has not
#pragma nv_diag_suppress 161
#define __builtin_inf() __builtin_bit_cast(double, 0x7ff0000000000000ULL)
#define __builtin_inff() __builtin_bit_cast(float, 0x7f800000U)
#define __builtin_nan(text) __builtin_bit_cast(double, 0x7ff8000000000000ULL)
#define __builtin_sqrt ::sqrt
#define __builtin_sqrtf ::sqrtf
#define __builtin_elementwise_sqrt ::sqrt
#define __builtin_elementwise_abs ::fabs
#define __builtin_elementwise_floor ::floor
#define __builtin_elementwise_ceil ::ceil
#define __builtin_elementwise_trunc ::trunc
#define __builtin_elementwise_rint ::rint
#endif

namespace warp_phys {

template <typename T> using vector = T;
template <typename T> struct Vector {
    static constexpr int lanes = 1;
};
constexpr int padded(int n) { return n; }

template <typename F> static inline float each(float x, F function) { return function(x); }
template <typename F> static inline double each(double x, F function) { return function(x); }
template <typename F> static inline float each(float x, float y, F function) { return function(x, y); }
template <typename F> static inline double each(double x, double y, F function) { return function(x, y); }

static inline void exponential(float z, float& value, float&) { value = ::expf(z); }

static inline float logistic(float z) { return 1.0f / (1.0f + ::expf(-z)); }
static inline double logistic(double z) { return 1.0 / (1.0 + ::exp(-z)); }

struct hyperbolic_tangent {
    static inline float value(float z, float&) { return ::tanhf(z); }
    static inline double value(double z, double&) { return ::tanh(z); }
};

static inline void sine_cosine(float x, float& sine, float& cosine) {
    sine = ::sinf(x);
    cosine = ::cosf(x);
}
static inline void sine_cosine(double x, double& sine, double& cosine) {
    sine = ::sin(x);
    cosine = ::cos(x);
}

}  // namespace warp_phys
