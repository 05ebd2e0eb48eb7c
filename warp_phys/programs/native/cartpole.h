// The cart-pole's semi-implicit Euler step, for eight samples at a time: see systems/cartpole.py for the equations.

namespace warp_phys {

template <typename T, int POLES> struct CartPole {
    static constexpr int D = 2 * POLES + 2, K = 1;
    static constexpr bool READS_NEXT = false;
    typedef lanes<T> V;

    V dt, gravity, mass_length, pole_mass, total_mass, half_length;
    V sine[POLES], cosine[POLES], omega[POLES], push[POLES], inertia[POLES], alpha[POLES];

    // The parameters come in the order of the Python fields.
    CartPole(const V* x, const V* c, const V* p, const V*)
        : dt(p[0]), gravity(p[1]), mass_length(p[2] * p[4]), pole_mass(p[2]), total_mass(p[3]), half_length(p[4]) {
#pragma clang fp contract(fast)
        for (int i = 0; i < POLES; ++i) {
            sine_cosine(x[2 * i + 2], sine[i], cosine[i]);
            omega[i] = x[2 * i + 3];
            push[i] = (c[0] + mass_length * sine[i] * omega[i] * omega[i]) / total_mass;
            inertia[i] = half_length * (T(4) / T(3) - pole_mass * cosine[i] * cosine[i] / total_mass);
            alpha[i] = (gravity * sine[i] - cosine[i] * push[i]) / inertia[i];
        }
    }

    static inline void step(const V* x, const V* c, const V* p, V* y) {
#pragma clang fp contract(fast)
        const CartPole at(x, c, p, nullptr);
        V reaction = V{};
        for (int i = 0; i < POLES; ++i)
            reaction += at.sine[i] * at.omega[i] * at.omega[i] - at.alpha[i] * at.cosine[i];
        y[1] = x[1] + at.dt * ((c[0] + at.mass_length * reaction) / at.total_mass);
        y[0] = x[0] + at.dt * y[1];
        for (int i = 0; i < POLES; ++i) {
            y[2 * i + 3] = x[2 * i + 3] + at.dt * at.alpha[i];
            y[2 * i + 2] = x[2 * i + 2] + at.dt * y[2 * i + 3];
        }
    }

    inline void pull(V* lambda, V* mu) const {
#pragma clang fp contract(fast)
        const V velocity = lambda[1] + dt * lambda[0], force = dt * velocity / total_mass;
        lambda[1] = velocity;
        V control = force;
        for (int i = 0; i < POLES; ++i) {
            const V s = sine[i], c = cosine[i], w = omega[i], rate = lambda[2 * i + 3] + dt * lambda[2 * i + 2];
            const V numerator = (dt * rate - force * mass_length * c) / inertia[i];
            const V pushed = -numerator * c / total_mass, swing = mass_length * (force + pushed);
            control += pushed;
            const V by_sine = swing * w * w + numerator * gravity;
            const V by_inertia = numerator * alpha[i] * (T(2) * half_length * pole_mass / total_mass);
            const V by_cosine = by_inertia * c - force * mass_length * alpha[i] - numerator * push[i];
            lambda[2 * i + 3] = rate + T(2) * swing * s * w;
            lambda[2 * i + 2] += by_sine * c - by_cosine * s;
        }
        mu[0] = control;
    }
};

}  // namespace warp_phys
