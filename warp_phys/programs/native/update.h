// The end of an update on a CPU: is the trajectory finite, its loss, the flow's update, clipping, Adam.
//
// What update_kernels.py calls. Sums are in double precision, of eight numbers side by side, in a fixed order.

namespace warp_phys {

template <typename T, typename F> static inline double sum_of(const T* x, long long size, F term) {
    constexpr int WIDTH = 8;
    double sums[WIDTH] = {};
    long long i = 0;
    for (; i + WIDTH <= size; i += WIDTH)
        for (int k = 0; k < WIDTH; ++k) sums[k] += term(x[i + k]);
    for (; i < size; ++i) sums[0] += term(x[i]);
    double total = 0;
    for (int k = 0; k < WIDTH; ++k) total += sums[k];
    return total;
}

template <typename T> static inline double sum(const T* x, long long size) {
    return sum_of(x, size, [](T v) { return double(v); });
}

template <typename T> static inline double sum_of_squares(const T* x, long long size) {
    return sum_of(x, size, [](T v) { return double(v) * double(v); });
}

// Zero times a number is not zero where the number is not finite.
template <typename T> static inline bool all_finite(const T* x, long long size) {
    return sum_of(x, size, [](T v) { return double(v * T(0)); }) == 0.0;
}

// What a rule makes of every two numbers.
template <typename T, typename Rule>
static inline void combine(Rule rule, const T* base, const T* other, T* update, long long size) {
    for (long long i = 0; i < size; ++i) update[i] = rule(base[i], other[i]);
}

// The same with the first of two others that leaves anything.
template <typename T, typename Rule>
static inline void combine_either(Rule rule, const T* base, const T* first, const T* second, T* update, long long size) {
    for (long long i = 0; i < size; ++i) {
        const T value = rule(base[i], first[i]);
        update[i] = value == 0 ? rule(base[i], second[i]) : value;
    }
}

// A running average of updates, each scaled to length 1; one that is not finite leaves it as it is, and then `false` is returned.
template <typename T> static inline bool remember(const T* update, T* mean, long long size, double decay) {
    const double length = wp::sqrt(sum_of_squares(update, size));
    if (!wp::isfinite(length)) return false;
    const double take = length > 0.0 ? (1.0 - decay) / length : 0.0;
    for (long long i = 0; i < size; ++i) mean[i] = T(double(update[i]) * take + double(mean[i]) * decay);
    return true;
}

constexpr int CLIP_VALUE = 1, CLIP_NORM = 2;

// Each component to at most `limit`, or the norm of all; what is not a number stays so.
template <typename T> static inline void clip(const T* update, T* grad, long long size, int kind, double limit) {
    const T most = T(limit), least = T(-limit);
    T factor = T(1);
    if (kind == CLIP_NORM) {
        const double ratio = limit / wp::sqrt(sum_of_squares(update, size));
        if (!(ratio > 1.0)) factor = T(ratio);
    }
    for (long long i = 0; i < size; ++i) {
        T value = update[i] * factor;
        if (kind == CLIP_VALUE) value = value > most ? most : value < least ? least : value;
        grad[i] = value;
    }
}

// What a group of parameters is trained with, as torch.optim.Adam has it; `decoupled` is AdamW's weight decay.
struct Adam { double rate, beta1, beta2, epsilon, decay, decoupled; };

// One step of one tensor. Source: Kingma & Ba, "Adam", ICLR 2015; Loshchilov & Hutter, "Decoupled Weight Decay", 2019.
template <typename T>
static inline void adam(T* parameter, const T* grad, T* mean, T* square, float* step, long long size, const Adam& group) {
    *step += 1.0f;
    const double correction = 1.0 - wp::pow(group.beta2, double(*step));
    const T length = T(group.rate / (1.0 - wp::pow(group.beta1, double(*step)))), root = T(wp::sqrt(correction));
    const T shrink = T(group.decoupled != 0.0 ? 1.0 - group.rate * group.decay : 1.0);
    const T decay = T(group.decoupled != 0.0 ? 0.0 : group.decay), epsilon = T(group.epsilon);
    const T keep1 = T(group.beta1), take1 = T(1.0 - group.beta1), keep2 = T(group.beta2), take2 = T(1.0 - group.beta2);
    constexpr int WIDTH = Vector<T>::lanes;
    long long i = 0;
    const auto advance = [&](auto theta, auto g, auto m, auto v, auto put) {
        g = g + theta * decay;
        m = m * keep1 + g * take1;
        v = v * keep2 + g * g * take2;
        const auto size = __builtin_elementwise_sqrt(v) / root + epsilon;
        put(theta * shrink - m * length / size, m, v);
    };
    for (; i + WIDTH <= size; i += WIDTH)
        advance(load(parameter + i), load(grad + i), load(mean + i), load(square + i), [&](auto theta, auto m, auto v) {
            store(parameter + i, theta), store(mean + i, m), store(square + i, v);
        });
    for (; i < size; ++i)
        advance(parameter[i], grad[i], mean[i], square[i], [&](T theta, T m, T v) {
            parameter[i] = theta, mean[i] = m, square[i] = v;
        });
}

}  // namespace warp_phys
