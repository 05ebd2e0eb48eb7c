// Crank-Nicolson steps of eight wave functions at a time, one in each lane of a vector: see systems/quantum.py.

namespace warp_phys {

template <typename T, int N>
struct Quantum {
    static constexpr int L = 8;
    typedef T lanes __attribute__((vector_size(L * sizeof(T))));

    // Rows (re, im, re, im, ...) of up to eight samples; lanes without a sample repeat the last one.
    static inline void read(const T* rows, int count, lanes* re, lanes* im) {
        for (int s = 0; s < L; ++s) {
            const T* row = rows + (s < count ? s : count - 1) * 2 * N;
            for (int j = 0; j < N; ++j) {
                re[j][s] = row[2 * j];
                im[j][s] = row[2 * j + 1];
            }
        }
    }

    static inline void write(T* rows, int count, const lanes* re, const lanes* im) {
        for (int s = 0; s < count; ++s)
            for (int j = 0; j < N; ++j) {
                rows[s * 2 * N + 2 * j] = re[j][s];
                rows[s * 2 * N + 2 * j + 1] = im[j][s];
            }
    }

    // B = tridiagonal: `base + j tilt` at point j = 1 ... N, and `beside` next to the diagonal.
    struct Operator {
        lanes base, tilt, beside;

        Operator(lanes dt, lanes c) {
            const T dx = T(2) / T(N + 1);
            base = dt / (dx * dx);
            tilt = T(0.5) * dt * c * dx;
            beside = T(-0.5) * dt / (dx * dx);
        }

        // out = (1 + sign iB) psi
        inline void apply(T sign, const lanes* re, const lanes* im, lanes* out_re, lanes* out_im) const {
#pragma clang fp contract(fast)
            for (int j = 0; j < N; ++j) {
                const lanes d = base + tilt * T(j + 1);
                const lanes zero = lanes{};
                const lanes side_re = (j > 0 ? re[j - 1] : zero) + (j < N - 1 ? re[j + 1] : zero);
                const lanes side_im = (j > 0 ? im[j - 1] : zero) + (j < N - 1 ? im[j + 1] : zero);
                out_re[j] = re[j] - sign * (d * im[j] + beside * side_im);
                out_im[j] = im[j] + sign * (d * re[j] + beside * side_re);
            }
        }

        // The factors of 1 + sign iB: inverse pivots w, and r = off w with off = sign i beside. Every pivot has a real
        // part of at least 1, so no exchange of rows is needed.
        inline void factor(T sign, lanes* r_re, lanes* r_im, lanes* w_re, lanes* w_im) const {
#pragma clang fp contract(fast)
            const lanes off = sign * beside;
            lanes re = lanes{}, im = lanes{};
            for (int j = 0; j < N; ++j) {
                const lanes pivot_re = T(1) + off * im, pivot_im = sign * (base + tilt * T(j + 1)) - off * re;
                const lanes inverse = T(1) / (pivot_re * pivot_re + pivot_im * pivot_im);
                w_re[j] = pivot_re * inverse;
                w_im[j] = -pivot_im * inverse;
                re = -off * w_im[j];
                im = off * w_re[j];
                r_re[j] = re;
                r_im[j] = im;
            }
        }

        // (re, im) becomes the solution for that right-hand side.
        inline void solve(
            T sign, const lanes* r_re, const lanes* r_im, const lanes* w_re, const lanes* w_im, lanes* re, lanes* im
        ) const {
#pragma clang fp contract(fast)
            const lanes off = sign * beside;
            lanes y_re = lanes{}, y_im = lanes{};
            for (int j = 0; j < N; ++j) {
                const lanes u = re[j] + off * y_im, v = im[j] - off * y_re;
                re[j] = y_re = u * w_re[j] - v * w_im[j];
                im[j] = y_im = u * w_im[j] + v * w_re[j];
            }
            for (int j = N - 2; j >= 0; --j) {
                re[j] = re[j] - (r_re[j] * re[j + 1] - r_im[j] * im[j + 1]);
                im[j] = im[j] - (r_re[j] * im[j + 1] + r_im[j] * re[j + 1]);
            }
        }
    };

    // y = (1 + iB)^-1 (1 - iB) x
    static inline void step(int count, const T* x, lanes dt, lanes c, T* y) {
        lanes re[N], im[N], psi_re[N], psi_im[N], r_re[N], r_im[N], w_re[N], w_im[N];
        const Operator b(dt, c);
        read(x, count, re, im);
        b.apply(T(-1), re, im, psi_re, psi_im);
        b.factor(T(1), r_re, r_im, w_re, w_im);
        b.solve(T(1), r_re, r_im, w_re, w_im, psi_re, psi_im);
        write(y, count, psi_re, psi_im);
    }

    // For each flow, lambda becomes (1 + iB) mu with (1 - iB) mu = lambda, and dc = (dt / 2) Im sum x_j conj(mu_j) (x + y)_j.
    static inline void pull(
        int count, int flows, const T* x, const T* y, lanes dt, lanes c, T* lambda, long long flow_pitch, T* dc, int dc_pitch
    ) {
#pragma clang fp contract(fast)
        lanes re[N], im[N], other_re[N], other_im[N], r_re[N], r_im[N], w_re[N], w_im[N], mu_re[N], mu_im[N];
        const Operator b(dt, c);
        read(x, count, re, im);
        read(y, count, other_re, other_im);
        for (int j = 0; j < N; ++j) {
            re[j] += other_re[j];
            im[j] += other_im[j];
        }
        b.factor(T(-1), r_re, r_im, w_re, w_im);
        for (int f = 0; f < flows; ++f) {
            read(lambda + f * flow_pitch, count, mu_re, mu_im);
            b.solve(T(-1), r_re, r_im, w_re, w_im, mu_re, mu_im);
            b.apply(T(1), mu_re, mu_im, other_re, other_im);
            write(lambda + f * flow_pitch, count, other_re, other_im);
            lanes sum = lanes{};
            for (int j = 0; j < N; ++j) sum += T(j + 1) * (mu_re[j] * im[j] - mu_im[j] * re[j]);
            sum *= T(0.5) * dt * (T(2) / T(N + 1));
            for (int s = 0; s < count; ++s) dc[f * dc_pitch + s] = sum[s];
        }
    }
};

}  // namespace warp_phys
