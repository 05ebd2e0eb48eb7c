// A row program, shared out among the threads of a block: what the kernels of block_kernels.py call.
//
// The same code runs on CUDA and, with one thread a block, on a CPU. A block has a tile of samples: number k of sample s
// stands at k * TILE + s, so that a thread finds the tile's numbers side by side, and a weight that it reads serves them all.
// Neighbouring threads take neighbouring outputs, whose weights are neighbours in memory: a layer's are its biases, one
// row of outgoing weights per input, and for the way back one row of incoming weights per output.

namespace warp_phys {

// The numbers of a block: in its multiprocessor's own memory if SHARED of them shall be there, else where `own` says.
template <typename T, int SHARED> inline CUDA_CALLABLE T* block_memory(T* own) {
#if defined(__CUDA_ARCH__)
    if constexpr (SHARED > 0) {
        __shared__ __align__(32) T memory[SHARED];
        return memory;
    }
#endif
    return own;
}

// Waits for all threads of the block, which see afterwards what each has written.
inline CUDA_CALLABLE void barrier() { WP_TILE_SYNC(); }

template <typename T> inline CUDA_CALLABLE T weight_at(const T* p) {
#if defined(__CUDA_ARCH__)
    return __ldg(p);
#else
    return *p;
#endif
}

// Goes through COUNT sums of a tile. Where sums are fewer than threads, PARTS threads share one: `part(i, part, sum)`
// finds a part of it, `finish(i, sum)` takes the whole.
template <typename T, int TILE, int COUNT, int PARTS, typename P, typename F>
inline CUDA_CALLABLE void share(int thread, int threads, T* parts, P part, F finish) {
    if constexpr (PARTS == 1) {
        for (int i = thread; i < COUNT; i += threads) {
            T sum[TILE] = {};
            part(i, 0, sum);
            finish(i, sum);
        }
    } else {
        for (int i = thread; i < COUNT * PARTS; i += threads) {
            T sum[TILE] = {};
            part(i % COUNT, i / COUNT, sum);
            for (int s = 0; s < TILE; ++s) parts[i * TILE + s] = sum[s];
        }
        barrier();
        for (int i = thread; i < COUNT; i += threads) {
            T sum[TILE] = {};
            for (int part = 0; part < PARTS; ++part)
                for (int s = 0; s < TILE; ++s) sum[s] += parts[(part * COUNT + i) * TILE + s];
            finish(i, sum);
        }
    }
}

// Numbers of a part of `all`, a multiple of 4: one instruction loads as many where they start at such a multiple.
constexpr int part_size(int all, int parts) { return ((all + parts - 1) / parts + 3) / 4 * 4; }

template <typename T, int TILE, int POSITIONS, int WINDOW, int STRIDE, int OUTPUTS> struct BlockLayer {
    static constexpr int INPUTS = (POSITIONS - 1) * STRIDE + WINDOW;

    // sum += Σ a[k] w[k · pitch] for begin <= k < end, where begin is a multiple of 4 and so is, if ALIGNED, where a stands
    template <bool ALIGNED>
    static inline CUDA_CALLABLE void add(const T* a, const T* w, int pitch, int begin, int end, T (&sum)[TILE]) {
        const T* x = (const T*)__builtin_assume_aligned(a, (ALIGNED ? 4 : 1) * sizeof(T));
#pragma unroll 4
        for (int k = begin; k < end; ++k) {
            const T weight = weight_at(w + k * pitch);
            for (int s = 0; s < TILE; ++s) sum[s] += weight * x[k * TILE + s];
        }
    }

    // y = activation(x W + b)
    template <int PARTS, typename A> static inline CUDA_CALLABLE void forward(
        int thread, int threads, const T* x, const T* weights, T* parts, T* y, A activation
    ) {
        constexpr int CHUNK = part_size(WINDOW, PARTS);
        const auto part = [&](int i, int part, T(&sum)[TILE]) {
            const int o = i % OUTPUTS, begin = part * CHUNK, end = begin + CHUNK < WINDOW ? begin + CHUNK : WINDOW;
            if (part == 0)
                for (int s = 0; s < TILE; ++s) sum[s] = weight_at(weights + o);
            constexpr bool ALIGNED = TILE % 4 == 0 || POSITIONS == 1 || STRIDE % 4 == 0;
            add<ALIGNED>(x + i / OUTPUTS * STRIDE * TILE, weights + OUTPUTS + o, OUTPUTS, begin, end, sum);
        };
        share<T, TILE, POSITIONS * OUTPUTS, PARTS>(thread, threads, parts, part, [&](int i, const T(&sum)[TILE]) {
            for (int s = 0; s < TILE; ++s) y[i * TILE + s] = activation(sum[s]);
        });
    }

    // x += d Wᵀ
    template <int PARTS> static inline CUDA_CALLABLE void pull(
        int thread, int threads, const T* d, const T* weights, T* parts, T* x
    ) {
        constexpr int CHUNK = part_size(OUTPUTS, PARTS);
        const T* transposed = weights + OUTPUTS * (1 + WINDOW);
        const auto part = [&](int i, int part, T(&sum)[TILE]) {
            const int begin = part * CHUNK, end = begin + CHUNK < OUTPUTS ? begin + CHUNK : OUTPUTS;
            for (int p = 0; p < POSITIONS; ++p) {
                const int k = i - p * STRIDE;
                constexpr bool ALIGNED = TILE % 4 == 0 || POSITIONS == 1 || OUTPUTS % 4 == 0;
                if (k >= 0 && k < WINDOW) add<ALIGNED>(d + p * OUTPUTS * TILE, transposed + k, WINDOW, begin, end, sum);
            }
        };
        share<T, TILE, INPUTS, PARTS>(thread, threads, parts, part, [&](int i, const T(&sum)[TILE]) {
            for (int s = 0; s < TILE; ++s) x[i * TILE + s] += sum[s];
        });
    }

    // Returns Σ x[k] d[o] over a part of `rows` rows; k is -1 for the bias. Tiles are `tile` numbers apart.
    static inline CUDA_CALLABLE T contract(
        int rows, int part, int parts, int tile, const T* x, const T* d, int k, int o
    ) {
        T sum[TILE] = {};
        for (int first = part * TILE; first < rows; first += parts * TILE) {
            const long long at = (long long)(first / TILE) * tile;
            const int count = rows - first < TILE ? rows - first : TILE;
            for (int p = 0; p < POSITIONS; ++p)
                for (int s = 0; s < count; ++s) {
                    const T delta = d[at + (p * OUTPUTS + o) * TILE + s];
                    sum[s] += k < 0 ? delta : delta * x[at + (p * STRIDE + k) * TILE + s];
                }
        }
        T total = sum[0];
        for (int s = 1; s < TILE; ++s) total += sum[s];
        return total;
    }
};

}  // namespace warp_phys
