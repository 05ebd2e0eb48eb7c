// Guidance by repulsion, explicit Euler, for eight samples at a time: see systems/repulsion.py for the equations.

namespace warp_phys {

template <typename T, int DRIVERS, int EVADERS> struct Repulsion {
    static constexpr int AGENTS = DRIVERS + EVADERS, D = 4 * AGENTS, K = 2 * DRIVERS;
    static constexpr bool READS_NEXT = false;
    static constexpr int P = 0;
    typedef lanes<T> V;

    struct Numbers {  // in the order of the Python fields
        V dt, regularisation, driver_friction, driver_spacing, fright, evader_friction, flocking, flock_distance;
        explicit Numbers(const V* p)
            : dt(p[0]), regularisation(p[1]), driver_friction(p[2]), driver_spacing(p[3]), fright(p[4]),
              evader_friction(p[5]), flocking(p[6]), flock_distance(p[7]) {}
    };

    // A force along r = (x, y): factor(|r|) r, and the part of its derivative that turns with r.
    struct Pair {
        V x, y, factor, stretch;

        Pair() = default;

        // factor = a w^2 + b w with w = 1 / (regularisation + |r|)
        Pair(V rx, V ry, V regularisation, V a, V b) : x(rx), y(ry) {
#pragma clang fp contract(fast)
            const V length = square_root(rx * rx + ry * ry), w = T(1) / (regularisation + length);
            factor = (a * w + b) * w;
            const V inverse = length > V{} ? T(1) / length : V{};  // agents that coincide: the derivative's limit is 0 r
            stretch = -(T(2) * a * w + b) * w * w * inverse;
        }

        inline void pull(V gx, V gy, V& out_x, V& out_y) const {
#pragma clang fp contract(fast)
            const V along = (gx * x + gy * y) * stretch;
            out_x = factor * gx + along * x;
            out_y = factor * gy + along * y;
        }
    };

    // Calls visit(i, j, mutual, pair) for every pair of agents that meet: the force on j is that of pair.factor (p_i - p_j),
    // and, where it is mutual, that on i the opposite one. `pair_of` returns the pair of two agents and two coefficients.
    template <typename P, typename F> static inline void visit_pairs(const Numbers& n, P pair_of, F visit) {
        for (int i = 0; i < DRIVERS; ++i) {
            for (int j = i + 1; j < DRIVERS; ++j) visit(i, j, true, pair_of(i, j, -n.driver_spacing, V{}));
            for (int j = DRIVERS; j < AGENTS; ++j) visit(i, j, false, pair_of(i, j, -n.fright, V{}));
        }
        for (int i = DRIVERS; i < AGENTS; ++i)
            for (int j = i + 1; j < AGENTS; ++j)
                visit(i, j, true, pair_of(i, j, n.flocking * n.flock_distance, -n.flocking));
    }

    static inline Pair meet(const V* x, const Numbers& n, int i, int j, V a, V b) {
        return Pair(x[4 * i] - x[4 * j], x[4 * i + 1] - x[4 * j + 1], n.regularisation, a, b);
    }

    static inline void flock(const V* x, V& sum_x, V& sum_y) {
        sum_x = sum_y = V{};
        for (int e = DRIVERS; e < AGENTS; ++e) {
            sum_x += x[4 * e];
            sum_y += x[4 * e + 1];
        }
    }

    static inline void step(const V* x, const V* c, const V* p, V* y) {
#pragma clang fp contract(fast)
        const Numbers n(p);
        V ax[AGENTS], ay[AGENTS], sum_x, sum_y;
        flock(x, sum_x, sum_y);
        for (int i = 0; i < AGENTS; ++i) {
            const V friction = i < DRIVERS ? n.driver_friction : n.evader_friction;
            ax[i] = -friction * x[4 * i + 2];
            ay[i] = -friction * x[4 * i + 3];
        }
        for (int i = 0; i < DRIVERS; ++i) {
            const V rx = x[4 * i] - sum_x, ry = x[4 * i + 1] - sum_y;
            ax[i] += c[2 * i] * rx - c[2 * i + 1] * ry;
            ay[i] += c[2 * i] * ry + c[2 * i + 1] * rx;
        }
        const auto pair_of = [&](int i, int j, V a, V b) { return meet(x, n, i, j, a, b); };
        visit_pairs(n, pair_of, [&](int i, int j, bool mutual, const Pair& pair) {
            const V fx = pair.factor * pair.x, fy = pair.factor * pair.y;
            ax[j] += fx;
            ay[j] += fy;
            if (mutual) {
                ax[i] -= fx;
                ay[i] -= fy;
            }
        });
        for (int i = 0; i < AGENTS; ++i) {
            y[4 * i] = x[4 * i] + n.dt * x[4 * i + 2];
            y[4 * i + 1] = x[4 * i + 1] + n.dt * x[4 * i + 3];
            y[4 * i + 2] = x[4 * i + 2] + n.dt * ax[i];
            y[4 * i + 3] = x[4 * i + 3] + n.dt * ay[i];
        }
    }

    // A linearised step keeps its pairs, for several flows, where they are few.
    static constexpr int PAIRS = DRIVERS * (DRIVERS - 1) / 2 + DRIVERS * EVADERS + EVADERS * (EVADERS - 1) / 2;
    static constexpr bool KEEPS = PAIRS <= 64;

    const V *x, *c;
    Numbers n;
    Pair kept[KEEPS ? PAIRS : 1];

    Repulsion(const V* state, const V* control, const V* p, const V*) : x(state), c(control), n(p) {
        if constexpr (KEEPS) {
            Pair* next = kept;
            const auto pair_of = [&](int i, int j, V a, V b) { return meet(x, n, i, j, a, b); };
            visit_pairs(n, pair_of, [&](int, int, bool, const Pair& pair) { *next++ = pair; });
        }
    }

    inline void pull(V* lambda, V* mu) const {
#pragma clang fp contract(fast)
        V gx[AGENTS], gy[AGENTS], px[AGENTS], py[AGENTS], sum_x, sum_y, flock_x = V{}, flock_y = V{};
        flock(x, sum_x, sum_y);
        for (int i = 0; i < AGENTS; ++i) {
            gx[i] = n.dt * lambda[4 * i + 2];
            gy[i] = n.dt * lambda[4 * i + 3];
            px[i] = lambda[4 * i];
            py[i] = lambda[4 * i + 1];
        }
        for (int i = 0; i < DRIVERS; ++i) {
            const V rx = x[4 * i] - sum_x, ry = x[4 * i + 1] - sum_y;
            mu[2 * i] = gx[i] * rx + gy[i] * ry;
            mu[2 * i + 1] = gy[i] * rx - gx[i] * ry;
            const V dx = c[2 * i] * gx[i] + c[2 * i + 1] * gy[i], dy = c[2 * i] * gy[i] - c[2 * i + 1] * gx[i];
            px[i] += dx;
            py[i] += dy;
            flock_x += dx;
            flock_y += dy;
        }
        for (int e = DRIVERS; e < AGENTS; ++e) {
            px[e] -= flock_x;
            py[e] -= flock_y;
        }
        const Pair* next = kept;
        const auto pair_of = [&](int i, int j, V a, V b) {
            if constexpr (KEEPS) return *next++;
            else return meet(x, n, i, j, a, b);
        };
        visit_pairs(n, pair_of, [&](int i, int j, bool mutual, const Pair& pair) {
            V dx, dy;
            pair.pull(mutual ? gx[j] - gx[i] : gx[j], mutual ? gy[j] - gy[i] : gy[j], dx, dy);
            px[i] += dx;
            py[i] += dy;
            px[j] -= dx;
            py[j] -= dy;
        });
        for (int i = 0; i < AGENTS; ++i) {
            const V friction = i < DRIVERS ? n.driver_friction : n.evader_friction;
            lambda[4 * i + 2] += n.dt * lambda[4 * i] - friction * gx[i];
            lambda[4 * i + 3] += n.dt * lambda[4 * i + 1] - friction * gy[i];
            lambda[4 * i] = px[i];
            lambda[4 * i + 1] = py[i];
        }
    }
};

}  // namespace warp_phys
