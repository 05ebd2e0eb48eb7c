// Elementwise functions of row programs on vectors of numbers: what programs/operations.py writes into kernels.

namespace warp_phys {

template <typename V, typename F> static inline V each(V x, F function) {
    for (int i = 0; i < int(sizeof(V) / sizeof(x[0])); ++i) x[i] = function(x[i]);
    return x;
}

static inline vector<float> exponential_of(vector<float> z) {
    vector<float> value, unused;
    exponential(z, value, unused);
    return value;
}
static inline vector<double> exponential_of(vector<double> z) {
    return each(z, [](double x) { return ::exp(x); });
}

template <typename V> static inline V tanh_of(V z) { V unused; return hyperbolic_tangent::value(z, unused); }

template <typename V> static inline V sine(V x) { V s, c; sine_cosine(x, s, c); return s; }
template <typename V> static inline V cosine(V x) { V s, c; sine_cosine(x, s, c); return c; }

static inline float logarithm_of(float x) { return ::logf(x); }
static inline double logarithm_of(double x) { return ::log(x); }
template <typename V> static inline V logarithm(V x) { return each(x, [](auto a) { return logarithm_of(a); }); }

static inline float root_of(float x) { return __builtin_sqrtf(x); }
static inline double root_of(double x) { return __builtin_sqrt(x); }
template <typename V> static inline V root(V x) { return each(x, [](auto a) { return root_of(a); }); }

static inline float erf_of(float x) { return ::erff(x); }
static inline double erf_of(double x) { return ::erf(x); }
template <typename V> static inline V error_function(V x) { return each(x, [](auto a) { return erf_of(a); }); }

static inline float power_of(float x, float n) { return ::powf(x, n); }
static inline double power_of(double x, double n) { return ::pow(x, n); }
template <typename V, typename T> static inline V power(V x, T n) { return each(x, [n](auto a) { return power_of(a, n); }); }

static inline float tangent_of(float x) { return ::tanf(x); }
static inline double tangent_of(double x) { return ::tan(x); }
template <typename V> static inline V tangent(V x) { return each(x, [](auto a) { return tangent_of(a); }); }

static inline float arctangent_of(float x) { return ::atanf(x); }
static inline double arctangent_of(double x) { return ::atan(x); }
template <typename V> static inline V arctangent(V x) { return each(x, [](auto a) { return arctangent_of(a); }); }

// log(1 + e^z) without overflow
template <typename V> static inline V softplus_of(V z) {
    const V size = z < V{} ? z : -z;
    return (z > V{} ? z : V{}) + logarithm(1 + exponential_of(size));
}

template <typename V> static inline V one_where(decltype(V{} < V{}) which) { return which ? V{} + 1 : V{}; }

// A part of a row of N numbers, vector by vector; what lies behind them in the last vectors becomes zero.
template <typename T, int N> static inline void clear_tail(T* y) {
    for (int k = N; k < padded(N); ++k) y[k] = 0;
}

// y[g] = sum of x[g, 0 … LENGTH - 1]
template <typename T, int GROUPS, int LENGTH> static inline void sum_groups(const T* x, T* y) {
    for (int g = 0; g < GROUPS; ++g) {
        T sum = 0;
        for (int k = 0; k < LENGTH; ++k) sum += x[g * LENGTH + k];
        y[g] = sum;
    }
}

template <typename T, int GROUPS, int LENGTH> static inline void largest_of_groups(const T* x, T* y) {
    for (int g = 0; g < GROUPS; ++g) {
        T best = x[g * LENGTH];
        for (int k = 1; k < LENGTH; ++k) best = x[g * LENGTH + k] > best ? x[g * LENGTH + k] : best;
        y[g] = best;
    }
}

// y[g, m, n] (+)= Σ_k a[g, m, k] b[g, k, n], with the strides of a and b in (m, k) and (k, n)
template <typename T, int GROUPS, int M, int K, int N, bool ADD> static inline void multiply_groups(
    const T* a, int a_group, int am, int ak, const T* b, int b_group, int bk, int bn, T* y
) {
    for (int g = 0; g < GROUPS; ++g)
        for (int m = 0; m < M; ++m)
            for (int n = 0; n < N; ++n) {
                T sum = ADD ? y[(g * M + m) * N + n] : T(0);
                for (int k = 0; k < K; ++k) sum += a[g * a_group + m * am + k * ak] * b[g * b_group + k * bk + n * bn];
                y[(g * M + m) * N + n] = sum;
            }
}

}  // namespace warp_phys
