// Physics of eight samples at a time, one in each lane of a vector: what native_physics.py puts into kernels.
//
// A system is a struct with the numbers D of a state and K of a control, whether it READS_NEXT state, `step`, and a
// constructor that linearises a step, after which `pull` takes the adjoint of its result to those of state and control;
// and to those of P physical parameters, where it has them.

namespace warp_phys {

constexpr int LANES = 8;

template <typename T> struct Lane { typedef T type __attribute__((vector_size(LANES * sizeof(T)))); };
template <typename T> using lanes = typename Lane<T>::type;

template <typename T> struct LaneInMemory {
    typedef T type __attribute__((vector_size(LANES * sizeof(T)), aligned(sizeof(T)), may_alias));
};

// Eight vectors of eight numbers, as rows of a matrix, become its columns.
template <typename V> static inline void transpose(V* v) {
    static_assert(LANES == 8);
    for (int i = 0; i < 8; i += 2) {
        const V a = v[i], b = v[i + 1];
        v[i] = __builtin_shufflevector(a, b, 0, 8, 2, 10, 4, 12, 6, 14);
        v[i + 1] = __builtin_shufflevector(a, b, 1, 9, 3, 11, 5, 13, 7, 15);
    }
    for (int k = 0; k < 4; ++k) {
        const int i = k < 2 ? k : k + 2;
        const V a = v[i], b = v[i + 2];
        v[i] = __builtin_shufflevector(a, b, 0, 1, 8, 9, 4, 5, 12, 13);
        v[i + 2] = __builtin_shufflevector(a, b, 2, 3, 10, 11, 6, 7, 14, 15);
    }
    for (int i = 0; i < 4; ++i) {
        const V a = v[i], b = v[i + 4];
        v[i] = __builtin_shufflevector(a, b, 0, 1, 2, 3, 8, 9, 10, 11);
        v[i + 4] = __builtin_shufflevector(a, b, 4, 5, 6, 7, 12, 13, 14, 15);
    }
}

// Rows of up to eight samples, `pitch` numbers apart, to lanes; lanes without a sample repeat the last one.
template <int N, typename T> static inline void read_lanes(const T* rows, long long pitch, int count, lanes<T>* out) {
    const T* row[LANES];
    for (int s = 0; s < LANES; ++s) row[s] = rows + (s < count ? s : count - 1) * pitch;
    int j = 0;
    for (; j + LANES <= N; j += LANES) {
        for (int s = 0; s < LANES; ++s) out[j + s] = *(const typename LaneInMemory<T>::type*)(row[s] + j);
        transpose(out + j);
    }
    for (; j < N; ++j)
        for (int s = 0; s < LANES; ++s) out[j][s] = row[s][j];
}

template <int N, typename T> static inline void write_lanes(T* rows, long long pitch, int count, const lanes<T>* in) {
    int j = 0;
    for (; j + LANES <= N; j += LANES) {
        lanes<T> block[LANES];
        for (int k = 0; k < LANES; ++k) block[k] = in[j + k];
        transpose(block);
        for (int s = 0; s < count; ++s) *(typename LaneInMemory<T>::type*)(rows + s * pitch + j) = block[s];
    }
    for (; j < N; ++j)
        for (int s = 0; s < count; ++s) rows[s * pitch + j] = in[j][s];
}

// Steps of up to eight samples, in rows of states and controls that are so many numbers apart.
template <typename T, typename S, int X, int C, int W = S::D> struct Block {
    static inline void advance(int count, const T* x, const T* c, const lanes<T>* p, T* y) {
        lanes<T> state[S::D], control[S::K], next[S::D];
        read_lanes<S::D, T>(x, X, count, state);
        read_lanes<S::K, T>(c, C, count, control);
        S::step(state, control, p, next);
        write_lanes<W, T>(y, X, count, next);
    }

    // For each flow, adj_x becomes its product with the Jacobian of the step by x, adj_c that by c; that by physical
    // parameters is added to rows of `by_p`, if S has it.
    static inline void retreat(
        int count, int flows, const T* x, const T* c, const lanes<T>* p, const T* y, T* adj_x, long long flow_pitch, T* adj_c,
        T* by_p, long long by_p_pitch
    ) {
        lanes<T> state[S::D], control[S::K], next[S::D], lambda[S::D], mu[S::K];
        read_lanes<S::D, T>(x, X, count, state);
        read_lanes<S::K, T>(c, C, count, control);
        if constexpr (S::READS_NEXT) read_lanes<S::D, T>(y, X, count, next);
        const S linear(state, control, p, next);
        for (int f = 0; f < flows; ++f) {
            read_lanes<S::D, T>(adj_x + f * flow_pitch, X, count, lambda);
            if constexpr (S::P > 0) {
                lanes<T> own[S::P];
                linear.pull(lambda, mu, own);
                for (int s = 0; s < count; ++s)
                    for (int i = 0; i < S::P; ++i) by_p[f * by_p_pitch + s * S::P + i] += own[i][s];
            } else {
                linear.pull(lambda, mu);
            }
            write_lanes<S::D, T>(adj_x + f * flow_pitch, X, count, lambda);
            write_lanes<S::K, T>(adj_c + f * LANES * C, C, count, mu);
        }
    }
};

// Sine and cosine: in float32 the quadrant by pi/2 in three parts, then minimax polynomials on [-pi/4, pi/4].
template <typename V> static inline void sine_cosine(V x, V& sine, V& cosine) {
#pragma clang fp contract(fast)
    constexpr int count = sizeof(V) / sizeof(x[0]);
    if constexpr (sizeof(x[0]) == 4) {
        typedef decltype(x < x) integers;
        const V n = __builtin_elementwise_rint(x * 0.636619772f);
        V r = x - n * 1.5703125f;
        r = r - n * 4.837512969970703125e-4f;
        r = r - n * 7.54978995489188e-8f;
        const V q = r * r;
        const V s = r + r * q * (-1.6666654611e-1f + q * (8.3321608736e-3f + q * -1.9515295891e-4f));
        const V c =
            1.0f - 0.5f * q + q * q * (4.166664568298827e-2f + q * (-1.388731625493765e-3f + q * 2.443315711809948e-5f));
        const integers quadrant = __builtin_convertvector(n, integers);
        const V odd_sine = (quadrant & 1) != 0 ? c : s, odd_cosine = (quadrant & 1) != 0 ? s : c;
        sine = (quadrant & 2) != 0 ? -odd_sine : odd_sine;
        cosine = ((quadrant + 1) & 2) != 0 ? -odd_cosine : odd_cosine;
        for (int i = 0; i < count; ++i)
            if (!(__builtin_fabsf(x[i]) < 8192.0f)) {  // the parts have no more digits
                sine[i] = ::sinf(x[i]);
                cosine[i] = ::cosf(x[i]);
            }
    } else {
        for (int i = 0; i < count; ++i) {
            sine[i] = ::sin(x[i]);
            cosine[i] = ::cos(x[i]);
        }
    }
}

// A function of the processor's own vectors, of eight numbers.
template <typename T, typename F> static inline lanes<T> by_vectors(lanes<T> x, F function) {
    constexpr int L = Vector<T>::lanes, N = L > LANES ? L : LANES;
    T numbers[N] = {};
    for (int s = 0; s < LANES; ++s) numbers[s] = x[s];
    for (int k = 0; k < N; k += L) store(numbers + k, function(load(numbers + k)));
    for (int s = 0; s < LANES; ++s) x[s] = numbers[s];
    return x;
}

static inline lanes<float> square_root(lanes<float> x) {
    for (int s = 0; s < LANES; ++s) x[s] = __builtin_sqrtf(x[s]);
    return x;
}
static inline lanes<double> square_root(lanes<double> x) {
    for (int s = 0; s < LANES; ++s) x[s] = __builtin_sqrt(x[s]);
    return x;
}

}  // namespace warp_phys
