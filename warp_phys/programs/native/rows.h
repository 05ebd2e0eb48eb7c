// Elementwise functions of row programs on vectors of numbers: what programs/operations.py writes into kernels.

namespace warp_phys {

template <typename V, typename F> static __attribute__((noinline)) V each(V x, F function) {
    for (int i = 0; i < int(sizeof(V) / sizeof(x[0])); ++i) x[i] = function(x[i]);
    return x;
}
template <typename V, typename F> static __attribute__((noinline)) V each(V x, V y, F function) {
    for (int i = 0; i < int(sizeof(V) / sizeof(x[0])); ++i) x[i] = function(x[i], y[i]);
    return x;
}

// The vectors' own e^z ends at e^-87 and e^88: beyond 60 it is taken in two factors, so that it goes on to 0 and infinity.
static inline vector<float> exponential_of(vector<float> z) {
    const vector<float> none{}, part = none + 30.0f;
    const vector<float> shift = z > 60.0f ? part : z < -60.0f ? -part : none;
    const vector<float> factor = z > 60.0f ? none + 1.06864746e13f : z < -60.0f ? none + 9.35762297e-14f : none + 1.0f;
    vector<float> value, unused;
    exponential(z - shift, value, unused);
    value = value * factor;
    return z > 89.0f ? none + __builtin_inff() : value;
}
static inline vector<double> exponential_of(vector<double> z) {
    return each(z, [](double x) { return ::exp(x); });
}

template <typename V> static inline V tanh_of(V z) { V unused; return hyperbolic_tangent::value(z, unused); }

template <typename V> static inline V sine(V x) { V s, c; sine_cosine(x, s, c); return s; }
template <typename V> static inline V cosine(V x) { V s, c; sine_cosine(x, s, c); return c; }

template <typename V> static inline V root(V x) { return __builtin_elementwise_sqrt(x); }

#define WARP_PHYS_EACH(name, function) \
    static inline float name##_of(float x) { return ::function##f(x); } \
    static inline double name##_of(double x) { return ::function(x); } \
    template <typename V> static inline V name(V x) { return each(x, [](auto a) { return name##_of(a); }); }
WARP_PHYS_EACH(logarithm, log)
WARP_PHYS_EACH(error_function, erf)
WARP_PHYS_EACH(tangent, tan)
WARP_PHYS_EACH(arctangent, atan)
WARP_PHYS_EACH(arcsine, asin)
WARP_PHYS_EACH(arccosine, acos)
WARP_PHYS_EACH(hyperbolic_sine, sinh)
WARP_PHYS_EACH(hyperbolic_cosine, cosh)
#undef WARP_PHYS_EACH

#define WARP_PHYS_EACH_OF_TWO(name, function) \
    static inline float name##_of(float x, float y) { return ::function##f(x, y); } \
    static inline double name##_of(double x, double y) { return ::function(x, y); } \
    template <typename V> static inline V name(V x, V y) { return each(x, y, [](auto a, auto b) { return name##_of(a, b); }); }
WARP_PHYS_EACH_OF_TWO(angle_of, atan2)
WARP_PHYS_EACH_OF_TWO(remainder_towards_zero, fmod)
WARP_PHYS_EACH_OF_TWO(power, pow)
#undef WARP_PHYS_EACH_OF_TWO

// Of the sign of b.
template <typename V> static inline V remainder(V a, V b) {
    const V r = remainder_towards_zero(a, b);
    return ((r != V{}) & ((r < V{}) != (b < V{}))) ? r + b : r;
}

// As in torch: what is no number stays so, and of limits that cross the upper one counts.
template <typename V, typename T> static inline V clamped(V a, T low, T high) {
    a = a < V{} + low ? V{} + low : a;
    return a > V{} + high ? V{} + high : a;
}
template <typename V> static inline V larger(V a, V b) { return ((a > b) | (a != a)) ? a : b; }
template <typename V> static inline V smaller(V a, V b) { return ((a < b) | (a != a)) ? a : b; }

// e^z - 1 and log(1 + x), good for small numbers too.
template <typename V> static inline V exponential_less_one(V z) { return tanh_of(z / 2) * (exponential_of(z) + 1); }
template <typename V> static inline V logarithm_of_one_more(V x) {
#pragma clang fp reassociate(off) contract(off)
    const V more = 1 + x;
    const V value = more == V{} + 1 ? x : logarithm(more) * (x / (more - 1));
    return x > V{} + 1 ? logarithm(more) : value;
}

// log(2 x); log 2 in two parts: a vector of floats takes no double literal, and a double needs more than a float.
template <typename V> static inline V logarithm_of_twice(V x) { return logarithm(x) + 0.693147182f - 1.90465421e-9f; }

template <typename V> static inline V inverse_hyperbolic_sine(V x) {
    const V size = x < V{} ? -x : x, y = logarithm_of_one_more(size + size * size / (1 + root(size * size + 1)));
    const V value = size > V{} + 1e9f ? logarithm_of_twice(size) : y;
    return x < V{} ? -value : value;
}
template <typename V> static inline V inverse_hyperbolic_cosine(V x) {
    const V value = logarithm_of_one_more(x - 1 + root((x - 1) * (x + 1)));
    return x > V{} + 1e9f ? logarithm_of_twice(x) : value;
}
template <typename V> static inline V inverse_hyperbolic_tangent(V x) { return logarithm_of_one_more(2 * x / (1 - x)) / 2; }

// log(1 + e^z) without overflow
template <typename V> static inline V softplus_of(V z) {
    const V size = z < V{} ? z : -z;
    return (z > V{} ? z : V{}) + logarithm_of_one_more(exponential_of(size));
}

template <typename V> static inline V one_where(decltype(V{} < V{}) which) { return which ? V{} + 1 : V{}; }

// A part of a row of N numbers, vector by vector; what lies behind them in the last vectors becomes zero.
template <typename T, int N, int FROM = N> static inline void clear_tail(T* y) {
    for (int k = FROM; k < padded(N); ++k) y[k] = 0;
}

// Numbers of the vectors that hold N numbers.
template <typename T> constexpr int whole(int n) {
    return (n + Vector<T>::lanes - 1) / Vector<T>::lanes * Vector<T>::lanes;
}

// Of a vector whose first number is number k, those of the first N numbers; else zero.
template <typename T, int N> static inline vector<T> kept(vector<T> v, int k) {
    if constexpr (N % Vector<T>::lanes != 0)
        for (int i = 0; i < Vector<T>::lanes; ++i) v[i] = k + i < N ? v[i] : T(0);
    return v;
}

// A vector of one number, and zeros.
template <typename T> static inline vector<T> alone(T x) {
    vector<T> v{};
    v[0] = x;
    return v;
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
