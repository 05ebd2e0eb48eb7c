// Crank-Nicolson steps of eight wave functions at a time: see systems/quantum.py for the equations.

namespace warp_phys {

template <typename T, int N> struct Quantum {
    static constexpr int D = 2 * N, K = 1;
    static constexpr bool READS_NEXT = true;
    static constexpr int P = 0;
    typedef lanes<T> V;

    // B is tridiagonal: base + j tilt at point j = 1 ... N, and `beside` next to the diagonal. The factors of
    // 1 + sign iB are the inverse pivots w and r = off w, with off = sign i beside. Every pivot has a real part of at
    // least 1, so no rows are exchanged. Complex numbers stand as re, im in turn, as in a state.
    struct Operator {
        V base, tilt, beside;
        T sign;
        V r[2 * N], w[2 * N];

        Operator(V dt, V c, T side) : sign(side) {
#pragma clang fp contract(fast)
            const T dx = T(2) / T(N + 1);
            base = dt / (dx * dx);
            tilt = T(0.5) * dt * c * dx;
            beside = T(-0.5) * dt / (dx * dx);
            const V off = sign * beside;
            V re = V{}, im = V{};
            for (int j = 0; j < N; ++j) {
                const V pivot_re = T(1) + off * im, pivot_im = sign * (base + tilt * T(j + 1)) - off * re;
                const V inverse = T(1) / (pivot_re * pivot_re + pivot_im * pivot_im);
                w[2 * j] = pivot_re * inverse;
                w[2 * j + 1] = -pivot_im * inverse;
                r[2 * j] = re = -off * w[2 * j + 1];
                r[2 * j + 1] = im = off * w[2 * j];
            }
        }

        // out = (1 - sign iB) psi
        inline void apply_conjugate(const V* psi, V* out) const {
#pragma clang fp contract(fast)
            for (int j = 0; j < N; ++j) {
                const V d = base + tilt * T(j + 1), zero = V{};
                const V side_re = (j > 0 ? psi[2 * j - 2] : zero) + (j < N - 1 ? psi[2 * j + 2] : zero);
                const V side_im = (j > 0 ? psi[2 * j - 1] : zero) + (j < N - 1 ? psi[2 * j + 3] : zero);
                out[2 * j] = psi[2 * j] + sign * (d * psi[2 * j + 1] + beside * side_im);
                out[2 * j + 1] = psi[2 * j + 1] - sign * (d * psi[2 * j] + beside * side_re);
            }
        }

        // psi becomes (1 + sign iB)^-1 psi
        inline void solve(V* psi) const {
#pragma clang fp contract(fast)
            const V off = sign * beside;
            V re = V{}, im = V{};
            for (int j = 0; j < N; ++j) {
                const V u = psi[2 * j] + off * im, v = psi[2 * j + 1] - off * re;
                psi[2 * j] = re = u * w[2 * j] - v * w[2 * j + 1];
                psi[2 * j + 1] = im = u * w[2 * j + 1] + v * w[2 * j];
            }
            for (int j = N - 2; j >= 0; --j) {
                psi[2 * j] -= r[2 * j] * psi[2 * j + 2] - r[2 * j + 1] * psi[2 * j + 3];
                psi[2 * j + 1] -= r[2 * j] * psi[2 * j + 3] + r[2 * j + 1] * psi[2 * j + 2];
            }
        }
    };

    static inline void step(const V* x, const V* c, const V* p, V* y) {
        const Operator forward(p[0], c[0], T(1));
        forward.apply_conjugate(x, y);
        forward.solve(y);
    }

    Operator backward;
    V dt, total[2 * N];

    Quantum(const V* x, const V* c, const V* p, const V* y) : backward(p[0], c[0], T(-1)), dt(p[0]) {
        for (int j = 0; j < 2 * N; ++j) total[j] = x[j] + y[j];
    }

    // mu = (1 - iB)^-1 lambda, lambda becomes (1 + iB) mu, and the control's adjoint (dt / 2) Im sum x_j conj(mu_j) total_j.
    inline void pull(V* lambda, V* adj_c) const {
#pragma clang fp contract(fast)
        V mu[2 * N], sum = V{};
        for (int j = 0; j < 2 * N; ++j) mu[j] = lambda[j];
        backward.solve(mu);
        backward.apply_conjugate(mu, lambda);
        for (int j = 0; j < N; ++j) sum += T(j + 1) * (mu[2 * j] * total[2 * j + 1] - mu[2 * j + 1] * total[2 * j]);
        adj_c[0] = T(0.5) * dt * sum * (T(2) / T(N + 1));
    }
};

}  // namespace warp_phys
