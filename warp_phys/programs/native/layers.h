// Layers of small networks on a CPU: what the kernels of native_kernels.py call.
//
// A layer is a dense layer on the windows of its input row: `positions` windows of `window` numbers, `stride` apart, each
// times the same weights. A plain dense layer has one window; a convolution over a grid with its channels last has as
// many as it has output points. All sizes are compile-time constants, so that the sums of a block of rows stay in
// registers. Outputs are padded to a multiple of PAD numbers; what lies in the padding is never read as a result.
//
// Layouts of a layer's weights: `forward` holds the bias, then one row of outgoing weights per input, each `padded(outputs)`
// long; `transposed` holds one row of incoming weights per output, each `padded(window)` long, zero where padded.

namespace warp_phys {

#if defined(__AVX512F__)
constexpr int VECTOR_BYTES = 64, REGISTERS = 32;
#elif defined(__AVX__)
constexpr int VECTOR_BYTES = 32, REGISTERS = 16;
#elif defined(__aarch64__)
constexpr int VECTOR_BYTES = 16, REGISTERS = 32;
#else
constexpr int VECTOR_BYTES = 16, REGISTERS = 16;
#endif

constexpr int PAD = 16;
constexpr int padded(int n) { return (n + PAD - 1) / PAD * PAD; }

template <typename T> struct Vector {
    typedef T type __attribute__((vector_size(VECTOR_BYTES)));
    typedef T in_memory __attribute__((vector_size(VECTOR_BYTES), aligned(sizeof(T)), may_alias));
    static constexpr int lanes = VECTOR_BYTES / int(sizeof(T));
};
template <typename T> using vector = typename Vector<T>::type;

template <typename T> static inline vector<T> load(const T* p) {
    return *(const typename Vector<T>::in_memory*)p;
}
template <typename T> static inline void store(T* p, vector<T> v) { *(typename Vector<T>::in_memory*)p = v; }

// The widest panel of columns, and the rows of a block beside it: sums, weights and one factor fit in the registers.
constexpr int PANEL = REGISTERS == 32 ? 7 : 3;
constexpr int panel_width(int vectors) {
    const int panels = (vectors + PANEL - 1) / PANEL;
    return (vectors + panels - 1) / panels;
}
constexpr int block_rows(int width) {
    const int rows = (REGISTERS - 1 - width) / width;
    return rows > 6 ? 6 : rows;
}

// ---- activations: value(z) of a vector, and the slope as a function of the value, or of z where that is not possible

template <typename T> static inline vector<T> select(vector<T> a, vector<T> b, decltype(vector<T>{} < vector<T>{}) which) {
    return which ? a : b;
}

// z between two limits; what is not a number stays so. Two instructions, where elementwise min and max would be six.
template <typename T> static inline vector<T> clamp(vector<T> z, vector<T> low, vector<T> high) {
    z = high < z ? high : z;
    return low > z ? low : z;
}

// e^z and e^z - 1 in float32: z = n ln 2 + r, |r| <= ln 2 / 2, Taylor's series to the seventh power, error 5e-9.
static inline void exponential(vector<float> z, vector<float>& value, vector<float>& minus_one) {
#pragma clang fp contract(fast)
    typedef int integers __attribute__((vector_size(VECTOR_BYTES)));
    const vector<float> low = vector<float>{} - 87.0f, high = vector<float>{} + 88.0f;
    const vector<float> x = clamp<float>(z, low, high);
    const vector<float> n = __builtin_elementwise_rint(x * 1.44269504f);
    const vector<float> r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    vector<float> q = r * (1.0f / 5040.0f) + (1.0f / 720.0f);
    q = q * r + (1.0f / 120.0f);
    q = q * r + (1.0f / 24.0f);
    q = q * r + (1.0f / 6.0f);
    q = q * r + 0.5f;
    const vector<float> tail = q * (r * r) + r;
    const integers exponent = (__builtin_convertvector(n, integers) + 127) << 23;
    const vector<float> scale = (vector<float>)exponent;
    value = select<float>(z, tail * scale + scale, z != z);
    minus_one = select<float>(tail, value - 1.0f, n == 0.0f);
}

struct identity {
    static constexpr bool of_value = true;
    template <typename V> static inline V value(V z, V&) { return z; }
    template <typename V> static inline V slope(V) { return V{} + 1; }
};

struct relu {
    static constexpr bool of_value = true;
    template <typename V> static inline V value(V z, V&) { return z < V{} ? V{} : z; }
    template <typename V> static inline V slope(V y) { return y > V{} ? V{} + 1 : V{}; }
};

struct hyperbolic_tangent {
    static constexpr bool of_value = true;
    // A rational function of degrees 13 and 6, good to float32 rounding: see activations.py.
    static inline vector<float> value(vector<float> z, vector<float>&) {
#pragma clang fp contract(fast)
        const vector<float> limit = vector<float>{} + 7.90531f;
        const vector<float> x = clamp<float>(z, -limit, limit);
        const vector<float> s = x * x;
        vector<float> p = s * -2.76076847742355e-16f + 2.00018790482477e-13f;
        p = p * s + -8.60467152213735e-11f;
        p = p * s + 5.12229709037114e-08f;
        p = p * s + 1.48572235717979e-05f;
        p = p * s + 6.37261928875436e-04f;
        p = p * s + 4.89352455891786e-03f;
        vector<float> q = s * 1.19825839466702e-06f + 1.18534705686654e-04f;
        q = q * s + 2.26843463243900e-03f;
        q = q * s + 4.89352518554385e-03f;
        return x * p / q;
    }
    static inline vector<double> value(vector<double> z, vector<double>&) {
        for (int i = 0; i < Vector<double>::lanes; ++i) z[i] = ::tanh(z[i]);
        return z;
    }
    template <typename V> static inline V slope(V y) { return 1 - y * y; }
};

static inline vector<float> logistic(vector<float> z) {
    vector<float> e, unused;
    exponential(-z, e, unused);
    return 1.0f / (1.0f + e);
}
static inline vector<double> logistic(vector<double> z) {
    for (int i = 0; i < Vector<double>::lanes; ++i) z[i] = 1.0 / (1.0 + ::exp(-z[i]));
    return z;
}

struct sigmoid {
    static constexpr bool of_value = true;
    template <typename V> static inline V value(V z, V&) { return logistic(z); }
    template <typename V> static inline V slope(V y) { return y * (1 - y); }
};

struct elu {
    static constexpr bool of_value = true;
    static inline vector<float> value(vector<float> z, vector<float>&) {
        vector<float> unused, e;
        exponential(z, unused, e);
        return z < vector<float>{} ? e : z;
    }
    static inline vector<double> value(vector<double> z, vector<double>&) {
        for (int i = 0; i < Vector<double>::lanes; ++i) z[i] = z[i] < 0.0 ? ::exp(z[i]) - 1.0 : z[i];
        return z;
    }
    template <typename V> static inline V slope(V y) { return y < V{} ? y + 1 : V{} + 1; }
};

struct silu {
    static constexpr bool of_value = false;
    template <typename V> static inline V value(V z, V& slope) {
        const V low = V{} - (sizeof(z[0]) == 4 ? 88 : 746), s = logistic(z);
        const V x = __builtin_elementwise_max(z, low);  // below it s has no smaller numbers to make up for z
        slope = s * (1 + x * (1 - s));
        return x * s;
    }
    template <typename V> static inline V slope(V y) { return y; }
};

// ---- products

// y[i] = activation(bias + x[i] W) for ROWS rows and NV vectors of columns; slopes go to y + slopes where they are kept.
template <typename T, typename A, int ROWS, int NV>
static inline void forward_block(
    int window, const T* const* x, const T* weights, int pitch, T* const* y, int slopes
) {
#pragma clang fp contract(fast)
    constexpr int L = Vector<T>::lanes;
    vector<T> sum[ROWS][NV];
#pragma unroll
    for (int j = 0; j < NV; ++j) {
        const vector<T> bias = load(weights + j * L);
#pragma unroll
        for (int i = 0; i < ROWS; ++i) sum[i][j] = bias;
    }
    const T* w = weights + pitch;
#pragma clang loop unroll(disable)
    for (int k = 0; k < window; ++k, w += pitch) {
#pragma unroll
        for (int j = 0; j < NV; ++j) {
            const vector<T> column = load(w + j * L);
#pragma unroll
            for (int i = 0; i < ROWS; ++i) sum[i][j] += x[i][k] * column;
        }
    }
#pragma unroll
    for (int i = 0; i < ROWS; ++i)
#pragma unroll
        for (int j = 0; j < NV; ++j) {
            vector<T> slope;
            store(y[i] + j * L, A::value(sum[i][j], slope));
            if constexpr (!A::of_value) store(y[i] + slopes + j * L, slope);
        }
}

// y[i] (+)= d[i] Wt for ROWS rows and NV vectors of columns, times the slopes at h where these are given.
template <typename T, typename A, bool ADD, bool SLOPE, int ROWS, int NV>
static inline void pull_block(
    int outputs, const T* const* d, const T* transposed, int pitch, T* const* y, const T* const* h
) {
#pragma clang fp contract(fast)
    constexpr int L = Vector<T>::lanes;
    vector<T> sum[ROWS][NV];
#pragma unroll
    for (int i = 0; i < ROWS; ++i)
#pragma unroll
        for (int j = 0; j < NV; ++j) sum[i][j] = vector<T>{};
    const T* w = transposed;
#pragma clang loop unroll(disable)
    for (int k = 0; k < outputs; ++k, w += pitch) {
#pragma unroll
        for (int j = 0; j < NV; ++j) {
            const vector<T> column = load(w + j * L);
#pragma unroll
            for (int i = 0; i < ROWS; ++i) sum[i][j] += d[i][k] * column;
        }
    }
#pragma unroll
    for (int i = 0; i < ROWS; ++i)
#pragma unroll
        for (int j = 0; j < NV; ++j) {
            // windows may overlap: a row adds to what the row before it has stored
            vector<T> value = sum[i][j];
            if constexpr (ADD) value += load(y[i] + j * L);
            if constexpr (SLOPE) value *= A::slope(load(h[i] + j * L));
            store(y[i] + j * L, value);
        }
}

// Sums over `rows` rows of `positions` windows: g[k] += x[k] d for ROWS inputs k and NV vectors of outputs.
template <typename T, int ROWS, int NV>
static inline void contract_block(
    int rows, int positions, const T* x, int x_row, int x_step, const T* d, int d_row, int d_step, T* g, int pitch
) {
#pragma clang fp contract(fast)
    constexpr int L = Vector<T>::lanes;
    vector<T> sum[ROWS][NV];
#pragma unroll
    for (int i = 0; i < ROWS; ++i)
#pragma unroll
        for (int j = 0; j < NV; ++j) sum[i][j] = load(g + i * pitch + j * L);
    for (int r = 0; r < rows; ++r) {
        const T *xr = x + (long long)r * x_row, *dr = d + (long long)r * d_row;
#pragma clang loop unroll(disable)
        for (int p = 0; p < positions; ++p, xr += x_step, dr += d_step) {
#pragma unroll
            for (int j = 0; j < NV; ++j) {
                const vector<T> column = load(dr + j * L);
#pragma unroll
                for (int i = 0; i < ROWS; ++i) sum[i][j] += xr[i] * column;
            }
        }
    }
#pragma unroll
    for (int i = 0; i < ROWS; ++i)
#pragma unroll
        for (int j = 0; j < NV; ++j) store(g + i * pitch + j * L, sum[i][j]);
}

// g += Σ d: the gradient of a bias.
template <typename T, int NV>
static inline void sum_block(int rows, int positions, const T* d, int d_row, int d_step, T* g) {
    constexpr int L = Vector<T>::lanes;
    vector<T> sum[NV];
#pragma unroll
    for (int j = 0; j < NV; ++j) sum[j] = load(g + j * L);
    for (int r = 0; r < rows; ++r)
        for (int p = 0; p < positions; ++p) {
            const T* dr = d + (long long)r * d_row + p * d_step;
#pragma unroll
            for (int j = 0; j < NV; ++j) sum[j] += load(dr + j * L);
        }
#pragma unroll
    for (int j = 0; j < NV; ++j) store(g + j * L, sum[j]);
}

template <typename T> static inline T total(vector<T> v) {
    constexpr int L = Vector<T>::lanes;
    T part[L];
    store(part, v);
#pragma unroll
    for (int half = L / 2; half > 0; half /= 2)
#pragma unroll
        for (int i = 0; i < half; ++i) part[i] += part[i + half];
    return part[0];
}

// ---- layers

template <typename T, typename A, int POSITIONS, int WINDOW, int STRIDE, int OUTPUTS>
struct Layer {
    static constexpr int L = Vector<T>::lanes, NO = padded(OUTPUTS) / L, NW = padded(WINDOW) / L;

    // y = activation(x W + b) for `count` rows, `pitch` numbers apart; slopes are stored `slopes` numbers behind y.
    template <int NV, int ROWS> static inline int forward_rows(
        int first, int rows, const T* x, int x_pitch, const T* weights, T* y, int y_pitch, int slopes
    ) {
        while (rows - first >= ROWS) {
            const T* xs[ROWS];
            T* ys[ROWS];
#pragma unroll
            for (int i = 0; i < ROWS; ++i) {
                const int s = (first + i) / POSITIONS, p = (first + i) % POSITIONS;
                xs[i] = x + s * x_pitch + p * STRIDE;
                ys[i] = y + s * y_pitch + p * OUTPUTS;
            }
            forward_block<T, A, ROWS, NV>(WINDOW, xs, weights, NO * L, ys, slopes);
            first += ROWS;
        }
        return first;
    }

    // The last panel first: where windows' outputs stand side by side, its padding spills over the next window's first
    // outputs, which are written afterwards.
    template <int FROM> static inline void forward_panels(
        int rows, const T* x, int x_pitch, const T* weights, T* y, int y_pitch, int slopes
    ) {
        if constexpr (FROM < NO) {
            constexpr int W = panel_width(NO), NV = NO - FROM < W ? NO - FROM : W, R = block_rows(NV);
            forward_panels<FROM + NV>(rows, x, x_pitch, weights, y, y_pitch, slopes);
            const T* w = weights + FROM * L;
            T* to = y + FROM * L;
            int first = forward_rows<NV, R>(0, rows, x, x_pitch, w, to, y_pitch, slopes);
            if constexpr (R > 4) first = forward_rows<NV, 4>(first, rows, x, x_pitch, w, to, y_pitch, slopes);
            if constexpr (R > 2) first = forward_rows<NV, 2>(first, rows, x, x_pitch, w, to, y_pitch, slopes);
            if constexpr (R > 1) forward_rows<NV, 1>(first, rows, x, x_pitch, w, to, y_pitch, slopes);
        }
    }

    static inline void forward(int count, const T* x, int x_pitch, const T* weights, T* y, int y_pitch, int slopes) {
        forward_panels<0>(count * POSITIONS, x, x_pitch, weights, y, y_pitch, slopes);
    }

    // The same for a layer of few outputs and one window: weights are the bias, then the transposed layout.
    static inline void forward_few(
        int count, const T* x, int x_pitch, const T* weights, T* y, int y_pitch, int slopes
    ) {
#pragma clang fp contract(fast)
        const T* transposed = weights + padded(OUTPUTS);
        for (int s = 0; s < count; ++s)
            for (int o = 0; o < OUTPUTS; ++o) {
                vector<T> sum = vector<T>{};
#pragma clang loop unroll_count(4)
                for (int j = 0; j < NW; ++j) sum += load(x + s * x_pitch + j * L) * load(transposed + (o * NW + j) * L);
                vector<T> z = vector<T>{} + (total<T>(sum) + weights[o]), slope;
                y[s * y_pitch + o] = A::value(z, slope)[0];
                if constexpr (!A::of_value) y[s * y_pitch + slopes + o] = slope[0];
            }
    }

    // x (+)= d Wᵀ, times the slope of the activation B that made x, at its value h, if SLOPE.
    template <typename B, bool ADD, bool SLOPE, int NV, int ROWS> static inline int pull_rows(
        int first, int rows, const T* d, int d_pitch, const T* transposed, T* x, int x_pitch, const T* h, int h_pitch
    ) {
        while (rows - first >= ROWS) {
            const T *ds[ROWS], *hs[ROWS];
            T* xs[ROWS];
#pragma unroll
            for (int i = 0; i < ROWS; ++i) {
                const int s = (first + i) / POSITIONS, p = (first + i) % POSITIONS;
                ds[i] = d + s * d_pitch + p * OUTPUTS;
                xs[i] = x + s * x_pitch + p * STRIDE;
                hs[i] = h + s * h_pitch + p * STRIDE;
            }
            pull_block<T, B, ADD, SLOPE, ROWS, NV>(OUTPUTS, ds, transposed, NW * L, xs, hs);
            first += ROWS;
        }
        return first;
    }

    template <typename B, bool ADD, bool SLOPE, int FROM> static inline void pull_panels(
        int rows, const T* d, int d_pitch, const T* transposed, T* x, int x_pitch, const T* h, int h_pitch
    ) {
        if constexpr (FROM < NW) {
            constexpr int W = panel_width(NW), NV = NW - FROM < W ? NW - FROM : W, R = block_rows(NV), O = FROM * L;
            const T *w = transposed + O, *hs = h + O;
            T* to = x + O;
            int first = pull_rows<B, ADD, SLOPE, NV, R>(0, rows, d, d_pitch, w, to, x_pitch, hs, h_pitch);
            if constexpr (R > 4)
                first = pull_rows<B, ADD, SLOPE, NV, 4>(first, rows, d, d_pitch, w, to, x_pitch, hs, h_pitch);
            if constexpr (R > 2)
                first = pull_rows<B, ADD, SLOPE, NV, 2>(first, rows, d, d_pitch, w, to, x_pitch, hs, h_pitch);
            if constexpr (R > 1) pull_rows<B, ADD, SLOPE, NV, 1>(first, rows, d, d_pitch, w, to, x_pitch, hs, h_pitch);
            pull_panels<B, ADD, SLOPE, FROM + NV>(rows, d, d_pitch, transposed, x, x_pitch, h, h_pitch);
        }
    }

    template <typename B, bool SLOPE, bool ADD> static inline void pull(
        int count, const T* d, int d_pitch, const T* transposed, T* x, int x_pitch, const T* h, int h_pitch
    ) {
        constexpr int INPUTS = padded((POSITIONS - 1) * STRIDE + WINDOW);
        if constexpr (POSITIONS == 1) {
            pull_panels<B, ADD, SLOPE, 0>(count, d, d_pitch, transposed, x, x_pitch, h, h_pitch);
        } else {
            if constexpr (!ADD)
                for (int s = 0; s < count; ++s)
                    for (int j = 0; j < INPUTS; j += L) store(x + s * x_pitch + j, vector<T>{});
            pull_panels<B, true, false, 0>(count * POSITIONS, d, d_pitch, transposed, x, x_pitch, h, h_pitch);
            if constexpr (SLOPE)
                for (int s = 0; s < count; ++s)
                    for (int j = 0; j < INPUTS; j += L) {
                        T* at = x + s * x_pitch + j;
                        store(at, load(at) * B::slope(load(h + s * h_pitch + j)));
                    }
        }
    }

    // Gradient of the forward layout: g += [1, x]ᵀ d over `count` rows.
    template <int NV, int ROWS> static inline int contract_rows(
        int first, int count, const T* x, int x_pitch, const T* d, int d_pitch, T* g
    ) {
        for (; WINDOW - first >= ROWS; first += ROWS)
            contract_block<T, ROWS, NV>(
                count, POSITIONS, x + first, x_pitch, STRIDE, d, d_pitch, OUTPUTS, g + (1 + first) * NO * L, NO * L
            );
        return first;
    }

    template <int FROM> static inline void contract_panels(
        int count, const T* x, int x_pitch, const T* d, int d_pitch, T* g
    ) {
        if constexpr (FROM < NO) {
            constexpr int W = panel_width(NO), NV = NO - FROM < W ? NO - FROM : W, R = block_rows(NV), O = FROM * L;
            sum_block<T, NV>(count, POSITIONS, d + O, d_pitch, OUTPUTS, g + O);
            int first = contract_rows<NV, R>(0, count, x, x_pitch, d + O, d_pitch, g + O);
            if constexpr (R > 4) first = contract_rows<NV, 4>(first, count, x, x_pitch, d + O, d_pitch, g + O);
            if constexpr (R > 2) first = contract_rows<NV, 2>(first, count, x, x_pitch, d + O, d_pitch, g + O);
            if constexpr (R > 1) contract_rows<NV, 1>(first, count, x, x_pitch, d + O, d_pitch, g + O);
            contract_panels<FROM + NV>(count, x, x_pitch, d, d_pitch, g);
        }
    }

    static inline void contract(int count, const T* x, int x_pitch, const T* d, int d_pitch, T* g) {
        contract_panels<0>(count, x, x_pitch, d, d_pitch, g);
    }

    // The same for a layer of few outputs and one window: the bias, then the transposed layout.
    static inline void contract_few(int count, const T* x, int x_pitch, const T* d, int d_pitch, T* g) {
#pragma clang fp contract(fast)
        for (int o = 0; o < OUTPUTS; ++o) {
            T sum = g[o];
            for (int s = 0; s < count; ++s) sum += d[s * d_pitch + o];
            g[o] = sum;
            T* row = g + padded(OUTPUTS) + o * NW * L;
            for (int j = 0; j < NW; ++j) {
                vector<T> total = load(row + j * L);
                for (int s = 0; s < count; ++s) total += d[s * d_pitch + o] * load(x + s * x_pitch + j * L);
                store(row + j * L, total);
            }
        }
    }
};

}  // namespace warp_phys
