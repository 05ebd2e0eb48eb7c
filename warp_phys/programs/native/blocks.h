// A layer of a network, shared out among the threads of a block: what the kernels of block_kernels.py call.
//
// The same code runs on CUDA and, with one thread a block, on a CPU. A block has a tile of samples: number k of sample s
// stands at k * TILE + s, so that a thread finds the tile's numbers side by side, and a weight that it reads serves them all.
// Neighbouring threads take neighbouring outputs, whose weights are neighbours in memory: a layer's are its biases, then
// one row of outgoing weights per input. Where outputs are fewer than threads, PARTS threads share the sum of an output.

namespace warp_phys {

// The activations of a block: in its multiprocessor's own memory if SHARED numbers shall be there, else where `own` says.
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

template <typename T, unsigned TILE> inline CUDA_CALLABLE void put(T* to, int i, const wp::vec_t<TILE, T>& value) {
    for (unsigned s = 0; s < TILE; ++s) to[i * TILE + s] = value[s];
}

template <typename T, int TILE, int POSITIONS, int WINDOW, int STRIDE, int OUTPUTS, int PARTS> struct BlockLayer {
    typedef wp::vec_t<TILE, T> Sums;
    // inputs of a part, a multiple of 4: one instruction loads as many where they start at such a multiple
    static constexpr int CHUNK = ((WINDOW + PARTS - 1) / PARTS + 3) / 4 * 4;
    static constexpr int ALIGNED = (TILE % 4 == 0 || POSITIONS == 1 || STRIDE % 4 == 0) ? 4 : 1;

    // Item i: the sum of one part of one output of one position, the first part's with the bias.
    static inline CUDA_CALLABLE Sums sums(const T* from, const T* weights, int i) {
        const int o = i % OUTPUTS, part = i / OUTPUTS % PARTS, position = i / (OUTPUTS * PARTS);
        const T* x = (const T*)__builtin_assume_aligned(from + position * STRIDE * TILE, ALIGNED * sizeof(T));
        const int begin = part * CHUNK, end = begin + CHUNK < WINDOW ? begin + CHUNK : WINDOW;
        Sums sum(part == 0 ? weight_at(weights + o) : T(0));
        const T* w = weights + OUTPUTS + o;
#pragma unroll 4
        for (int k = begin; k < end; ++k) {
            const T weight = weight_at(w + k * OUTPUTS);
            for (int s = 0; s < TILE; ++s) sum[s] += weight * x[k * TILE + s];
        }
        return sum;
    }

    // Item i of the outputs: its parts, as `put` has put them, together.
    static inline CUDA_CALLABLE Sums total(const T* parts, int i) {
        const T* at = parts + (i / OUTPUTS * PARTS * OUTPUTS + i % OUTPUTS) * TILE;
        Sums sum(T(0));
        for (int part = 0; part < PARTS; ++part)
            for (int s = 0; s < TILE; ++s) sum[s] += at[part * OUTPUTS * TILE + s];
        return sum;
    }
};

}  // namespace warp_phys
