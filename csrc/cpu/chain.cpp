// Chains of operators. Compiled once, unlike the kernels.
#include "pyxai_bounds/chain.h"

#include <algorithm>
#include <memory>
#include <utility>

namespace pyxai_bounds {
namespace {

constexpr int64_t in_cache = 1 << 20;  // bytes that stay in a second-level cache

// Room for a box.
struct Boxes {
    Memory memory;
    Address mid, rad;
    Boxes(int64_t count, int element_size)
        : memory(2 * count * element_size), mid(memory.start()), rad(mid + count * element_size) {}
};

// The gradient at an address or, if there is none, zeros in its place.
class Filled {
  public:
    Filled(Address given, int64_t bytes) : zeros_(given ? 0 : bytes), start_(given ? given : zeros_.start()) {
        if (!given) std::fill_n(at<char>(start_), bytes, 0);
    }
    Address start() const { return start_; }

  private:
    const Memory zeros_;
    Address start_;
};

}  // namespace

// The sums of gradients so far. Those of the given values are summed up where the caller wants them.
struct Chain::Gradients {
    const Chain& chain;
    const std::vector<Address>* overwritten;  // the values, if they may be
    const std::vector<Address>& wanted;
    std::vector<Address>& of;
    const Memory block{chain.is_small() ? chain.size_ : 0};
    std::vector<std::unique_ptr<Memory>> own = std::vector<std::unique_ptr<Memory>>(of.size());

    Address target(int64_t value) {
        if (value < chain.given_) return wanted[value];
        if (chain.is_small()) return block.start() + chain.places_[value];
        if (overwritten && chain.is_kept_[value] && chain.readers_[value] == 1) return (*overwritten)[value];
        if (!own[value]) own[value] = std::make_unique<Memory>(chain.sizes_[value]);
        return own[value]->start();
    }
};

// One summand of a value's gradient, of `count` elements. The first one is computed in the place of the sum, unless
// `may_be_first` forbids it; every other one is computed elsewhere and added.
class Chain::Part {
  public:
    Part(Gradients& gradients, int64_t value, int64_t count, bool may_be_first)
        : gradients_(gradients), value_(value), count_(count), may_be_first_(may_be_first) {}
    Address start() {
        if (start_) return start_;
        if (may_be_first_ && !gradients_.of[value_]) return start_ = gradients_.target(value_);
        apart_ = std::make_unique<Memory>(count_ * gradients_.chain.element_size_);
        return start_ = apart_->start();
    }
    void add() {
        const Address to = gradients_.target(value_);
        if (start_ != to)
            typed(gradients_.chain.element_size_, [&, before = gradients_.of[value_]](const auto& stages) {
                using T = decltype(element_type(stages));
                const T *const sum = at<T>(before), *const more = at<T>(start_);
                for (int64_t i = 0; i < count_; ++i) at<T>(to)[i] = sum ? sum[i] + more[i] : more[i];
            });
        gradients_.of[value_] = to;
    }

  private:
    Gradients& gradients_;
    int64_t value_, count_;
    bool may_be_first_;
    std::unique_ptr<Memory> apart_;
    Address start_ = 0;
};

Chain::Chain(int element_size, const std::vector<std::vector<int64_t>>& steps, std::vector<int64_t> sizes,
             int64_t given, const std::vector<int64_t>& taken, const std::vector<int64_t>& kept)
    : element_size_(element_size), sizes_(std::move(sizes)), given_(given) {
    for (const std::vector<int64_t>& s : steps) {
        const auto kernel = static_cast<Kernel>(s.at(0));
        Step step{kernel,  s.at(1) != 0, s.at(2) != 0, s.at(3),  s.at(4),  s.at(5),  s.at(6),
                  s.at(7), s.at(8),      s.at(9),      s.at(10), s.at(11), s.at(12), {}};
        if (kernel == Kernel::conv2d)
            for (std::size_t i = 0; i < step.shape.size(); ++i) step.shape[i] = s.at(10 + i);
        steps_.push_back(std::move(step));
    }
    is_kept_.resize(sizes_.size());
    for (const int64_t value : kept) is_kept_[value] = true;
    for (auto step = steps_.begin(); step != steps_.end(); ++step) apply_next_relu(step, taken);
    for (auto step = steps_.rbegin(); step != steps_.rend(); ++step) join_next(step.base() - 1, taken);
    places_.resize(sizes_.size());
    for (const bool are_kept : {true, false}) {
        for (std::size_t i = given_; i < sizes_.size(); ++i)
            if (is_kept_[i] == are_kept) places_[i] = size_, size_ += (sizes_[i] + 63) / 64 * 64;
        if (are_kept) kept_size_ = size_;
    }
    readers_.resize(sizes_.size());
    for (const Step& step : steps_)
        if (const auto reads = step.reads(); step.differentiable)
            for (auto value = reads.begin(); value != reads.end(); ++value)
                if (*value >= 0 && std::find(reads.begin(), value, *value) == value) ++readers_[*value];
    std::vector<bool> read(sizes_.size());
    const auto note = [&](Step& step, int64_t value) {
        if (value >= given_ && !read[value]) read[value] = true, step.last.push_back(value);
    };
    for (auto step = steps_.rbegin(); step != steps_.rend(); ++step) {
        for (const int64_t value : step->reads()) note(*step, value);
        for (const int64_t value : step->makes()) note(*step, value);
    }
}

void Chain::apply_next_relu(Steps::iterator step, const std::vector<int64_t>& taken) {
    const auto reader = only_reader(step, taken);
    if (!step->backward || reader == steps_.end() || !reader->backward || reader->third < 0 ||
        std::any_of(step, reader, [&](const Step& other) { return other.state == reader->third; }))
        return;
    step->next_state = reader->third;
    reader->is_gated = true;
    if (!reader->differentiable) return;
    step->next_gate = reader->gate = static_cast<int64_t>(sizes_.size());
    sizes_.push_back(sizes_[reader->third]);
    is_kept_.push_back(true);
}

Chain::Steps::iterator Chain::only_reader(Steps::iterator step, const std::vector<int64_t>& taken) {
    const auto is_made = [step](int64_t value) { return value == step->out_mid || value == step->out_rad; };
    const auto reads_it = [&](const Step& other) {
        const auto reads = other.reads();
        return std::any_of(reads.begin(), reads.end(), is_made);
    };
    const auto reader = std::find_if(step + 1, steps_.end(), reads_it);
    const bool is_one = step->kernel == Kernel::conv2d && reader != steps_.end() && reader->kernel == Kernel::conv2d &&
                        reader->mid == step->out_mid && reader->rad == step->out_rad &&
                        std::none_of(reader + 1, steps_.end(), reads_it) &&
                        std::none_of(taken.begin(), taken.end(), is_made);
    return is_one ? reader : steps_.end();
}

void Chain::join_next(Steps::iterator step, const std::vector<int64_t>& taken) {
    const Geometry& shape = step->shape;
    const auto next = step + 1;
    if (step->kernel != Kernel::conv2d) return;
    step->weights = shape[1] * shape[4] * shape[7] * shape[8];
    if (next == steps_.end() || next->kernel != Kernel::conv2d || next->shape[0] != shape[0] ||
        next->together == most_conv2d_steps || (step->weights + next->weights) * element_size_ > in_cache ||
        2 * next->elements_read() / shape[0] * element_size_ > in_cache / 2)
        return;
    step->together = next->together + 1;
    step->weights += next->weights;
    step->hands_on = only_reader(step, taken) == next;
}

void Chain::run(std::vector<Address> values, Address kept) const {
    const Memory block(!kept && is_small() ? size_ : 0);
    values.resize(sizes_.size());
    if (kept || is_small()) place(values, kept ? kept : block.start());
    std::vector<std::unique_ptr<Memory>> own(values.size());
    const auto make = [&](int64_t value) {
        if (value < 0 || values[value] != 0) return;
        own[value] = std::make_unique<Memory>(sizes_[value]);
        values[value] = own[value]->start();
    };
    for (auto step = steps_.begin(), next = step; step != steps_.end(); step = next) {
        next = step + (go_together(*step) ? step->together : 1);
        for (auto s = step; s != next; ++s) {
            const bool is_between = s->hands_on && s + 1 != next && !values[s->out_mid] && !values[s->out_rad];
            for (const int64_t made : s->makes())
                if (!is_between || made == s->state) make(made);
        }
        next - step > 1 ? take_together(step, next, values) : take(*step, values);
        for (auto s = step; s != next; ++s)
            for (const int64_t value : s->last) own[value].reset();
    }
}

void Chain::place(std::vector<Address>& values, Address block) const {
    for (std::size_t i = given_; i < values.size(); ++i)
        if (values[i] == 0 && (is_small() || is_kept_[i])) values[i] = block + places_[i];
}

bool Chain::go_together(const Step& first) const {
    const auto suits = [this](const Step& s) {
        const bool has_bits = s.backward ? s.third >= 0 && !s.is_gated : s.state >= 0;
        return (!has_bits || packs(element_size_, s.shape[4])) &&
               (s.next_state < 0 || packs(element_size_, s.shape[1]));
    };
    const int64_t images = first.shape[0], team = threads(), idle = (team - images % team) % team;
    return first.together > 1 && images >= (team > 1 ? 8 * team : 2) && 25 * idle <= images &&
           std::all_of(&first, &first + first.together, suits);
}

void Chain::take_together(Steps::const_iterator begin, Steps::const_iterator end,
                          const std::vector<Address>& values) const {
    const auto value = [&](int64_t number) { return number < 0 ? Address(0) : values[number]; };
    typed(element_size_, [&](const auto& stages) {
        using T = decltype(element_type(stages));
        std::vector<Conv2dStep<T>> steps;
        for (auto s = begin; s != end; ++s) {
            const Address third = value(s->third);
            const Epilogue after =
                s->backward ? relu_backward_at(value(s->next_state), value(s->next_gate)) : relu_into(value(s->state));
            steps.push_back({s->backward, conv2d_of(s->shape), at<T>(value(s->mid)), at<T>(value(s->rad)),
                             at<T>(value(s->weight)), at<T>(s->backward ? 0 : third),
                             at<uint8_t>(s->backward && !s->is_gated ? third : 0), at<T>(value(s->out_mid)),
                             at<T>(value(s->out_rad)), after});
        }
        stages.conv2d_steps(static_cast<int64_t>(steps.size()), steps.data());
    });
}

template <class F>
void Chain::rectified(int64_t size, int64_t outputs, Address out_mid, Address out_rad, Address state, F run) const {
    const bool fused = packs(element_size_, outputs);
    run(fused ? state : 0);
    if (state && !fused) relu(element_size_, size, out_mid, out_rad, out_mid, out_rad, state, false);
}

template <class F>
void Chain::gated(int64_t size, int64_t outputs, Address mid, Address rad, Address state, F run) const {
    if (!state || packs(element_size_, outputs)) return run(mid, rad, state);
    const Boxes boxes(size, element_size_);
    relu_backward(element_size_, size, mid, rad, state, boxes.mid, boxes.rad, 0, false);
    run(boxes.mid, boxes.rad, Address(0));
}

template <class F>
void Chain::gated_after(int64_t size, int64_t outputs, Address out_mid, Address out_rad, Address state, Address made,
                        F run) const {
    const bool fused = state && packs(element_size_, outputs);
    run(relu_backward_at(fused ? state : 0, made));
    if (state && !fused) relu_backward(element_size_, size, out_mid, out_rad, state, out_mid, out_rad, made, false);
}

void Chain::take(const Step& s, const std::vector<Address>& values) const {
    const auto value = [&](int64_t number) { return number < 0 ? Address(0) : values[number]; };
    const Address mid = value(s.mid), rad = value(s.rad), weight = value(s.weight), third = value(s.third);
    const Address out_mid = value(s.out_mid), out_rad = value(s.out_rad), state = value(s.state);
    switch (s.kernel) {
        case Kernel::linear:
            if (s.backward)
                return linear_backward(element_size_, s.batch, s.n, s.m, mid, rad, third, weight, out_mid, out_rad);
            return linear(element_size_, s.batch, s.n, s.m, mid, rad, weight, third, out_mid, out_rad, state);
        case Kernel::linear_many:
            if (s.backward)
                return gated(s.elements_read(), s.n, mid, rad, third,
                             [&](Address of_mid, Address of_rad, Address bits) {
                                 linear_backward_many(element_size_, s.batch, s.n, s.m, {}, of_mid, of_rad, bits,
                                                      weight, s.m, 1, out_mid, out_rad);
                             });
            return rectified(s.elements_made(), s.m, out_mid, out_rad, state, [&](Address bits) {
                linear_many(element_size_, s.batch, s.n, s.m, {}, mid, rad, weight, s.n, 1, third, out_mid, out_rad,
                            bits);
            });
        case Kernel::conv2d:
            if (s.backward)
                return gated(s.elements_read(), s.shape[4], mid, rad, s.is_gated ? 0 : third,
                             [&](Address of_mid, Address of_rad, Address bits) {
                                 gated_after(s.elements_made(), s.shape[1], out_mid, out_rad, value(s.next_state),
                                             value(s.next_gate), [&](Epilogue after) {
                                                 conv2d_backward_then(element_size_, s.shape, {}, of_mid, of_rad, bits,
                                                                      weight, out_mid, out_rad, after);
                                             });
                             });
            return rectified(s.elements_made(), s.shape[4], out_mid, out_rad, state, [&](Address bits) {
                conv2d(element_size_, s.shape, {}, mid, rad, weight, third, out_mid, out_rad, bits);
            });
        case Kernel::transpose:
            transpose(element_size_, s.batch, s.n, s.m, mid, out_mid);
    }
}

std::vector<bool> Chain::adjoint(std::vector<Address> values, Address kept, bool overwrite, std::vector<Address> grads,
                                 const std::vector<Address>& wanted) const {
    values.resize(sizes_.size());
    grads.resize(sizes_.size());
    place(values, kept);
    std::vector<bool> needed(values.size());
    const auto is_needed = [&needed](int64_t value) { return value >= 0 && needed[value]; };
    for (int64_t i = 0; i < given_; ++i) needed[i] = wanted[i] != 0;
    for (const Step& s : steps_)
        if (s.differentiable &&
            (is_needed(s.mid) || is_needed(s.rad) || is_needed(s.weight) || (!s.backward && is_needed(s.third))))
            for (const int64_t made : {s.out_mid, s.out_rad})
                if (made >= 0) needed[made] = true;
    Gradients gradients{*this, overwrite ? &values : nullptr, wanted, grads};
    for (auto step = steps_.rbegin(); step != steps_.rend(); ++step) {
        if (step->differentiable && needed[step->out_mid]) differentiate(*step, values, needed, gradients);
        for (const int64_t made : {step->out_mid, step->out_rad})
            if (made >= 0) gradients.own[made].reset();
    }
    std::vector<bool> written;
    for (int64_t i = 0; i < given_; ++i) written.push_back(grads[i] != 0);
    return written;
}

void Chain::differentiate(const Step& s, const std::vector<Address>& values, const std::vector<bool>& needed,
                          Gradients& gradients) const {
    const Address of_mid = gradients.of[s.out_mid], of_rad = s.out_rad < 0 ? 0 : gradients.of[s.out_rad];
    if (!of_mid && !of_rad) return;
    if (s.kernel == Kernel::transpose) {
        Part part(gradients, s.mid, s.elements_read(), true);
        transpose(element_size_, s.batch, s.m, s.n, of_mid, part.start());
        return part.add();
    }
    const int64_t state = s.backward ? s.third : s.state;
    const bool has_mid = of_mid || state >= 0, has_rad = of_rad || state >= 0;
    const bool apart = s.mid == s.weight || s.rad == s.weight;
    Part mid(gradients, s.mid, s.elements_read(), needed[s.mid] && !apart);
    Part rad(gradients, s.rad, s.elements_read(), needed[s.rad] && !apart && s.rad != s.mid);
    const bool box = needed[s.mid] || needed[s.rad];
    const bool convolves = s.kernel == Kernel::conv2d;  // which writes midpoints in any case
    const auto run = !convolves   ? &Chain::differentiate_linear
                     : s.backward ? &Chain::differentiate_conv2d_backward
                                  : &Chain::differentiate_conv2d;
    (this->*run)(s, values, of_mid, of_rad, state < 0 ? 0 : values[state],
                 box && (has_mid || convolves) ? mid.start() : 0, box ? rad.start() : 0, gradients);
    if (needed[s.mid] && has_mid) mid.add();
    if (needed[s.rad] && has_rad) rad.add();
}

void Chain::differentiate_linear(const Step& s, const std::vector<Address>& values, Address of_mid, Address of_rad,
                                 Address state, Address to_mid, Address to_rad, Gradients& gradients) const {
    const Filled filled(of_rad, s.elements_made() * element_size_);
    const Address to_weight = gradients.wanted[s.weight];
    const bool many = s.kernel == Kernel::linear_many, add = gradients.of[s.weight] != 0;
    if (s.backward) {
        linear_backward_adjoint(element_size_, many, s.batch, s.n, s.m, values[s.mid], values[s.rad], values[s.weight],
                                state, of_mid, filled.start(), to_mid, to_rad, to_weight, add);
    } else {
        const Address to_bias = s.third >= 0 && (of_mid || state) ? gradients.wanted[s.third] : 0;
        linear_adjoint(element_size_, many, s.batch, s.n, s.m, values[s.mid], values[s.rad], values[s.weight], state,
                       of_mid, filled.start(), to_mid, to_rad, to_weight, add, to_bias,
                       to_bias && gradients.of[s.third]);
        if (to_bias) gradients.of[s.third] = to_bias;
    }
    if (to_weight) gradients.of[s.weight] = to_weight;
}

void Chain::differentiate_conv2d(const Step& s, const std::vector<Address>& values, Address of_mid, Address of_rad,
                                 Address state, Address to_mid, Address to_rad, Gradients& gradients) const {
    const int64_t made = s.elements_made(), bytes = made * element_size_;
    const Boxes gated(state ? made : 0, element_size_);
    if (state) {
        const Filled rad(of_rad, bytes);
        gate(element_size_, made, of_mid, rad.start(), state, gated.mid, gated.rad);
        of_mid = gated.mid, of_rad = gated.rad;
    }
    add_to_weight(s, values, of_mid, of_rad, values[s.mid], values[s.rad], gradients);
    if (s.third >= 0 && of_mid) add_to_bias(s, of_mid, gradients);
    if (!to_rad) return;
    const Filled mid(of_mid, bytes), rad(of_rad, bytes);
    conv2d_backward(element_size_, s.shape, {}, mid.start(), rad.start(), 0, values[s.weight], to_mid, to_rad);
}

void Chain::differentiate_conv2d_backward(const Step& s, const std::vector<Address>& values, Address of_mid,
                                          Address of_rad, Address state, Address to_mid, Address to_rad,
                                          Gradients& gradients) const {
    const int64_t read = s.elements_read(), bytes = s.elements_made() * element_size_;
    const bool again = state && !s.is_gated;
    Address box_mid = values[s.mid], box_rad = values[s.rad], applied = s.is_gated ? values[s.gate] : 0;
    const Boxes gated(again ? read : 0, element_size_);
    const Memory bits(again ? 2 * ((read + 7) / 8) : 0);
    if (again) {
        relu_backward(element_size_, read, box_mid, box_rad, state, gated.mid, gated.rad, bits.start(), false);
        box_mid = gated.mid, box_rad = gated.rad, applied = bits.start();
    }
    add_to_weight(s, values, box_mid, box_rad, of_mid, of_rad, gradients);  // in exchanged roles
    if (!to_rad) return;
    const Filled mid(of_mid, bytes), rad(of_rad, bytes);
    const bool fused = applied && packs(element_size_, s.shape[4]);
    conv2d_then(element_size_, s.shape, {}, mid.start(), rad.start(), values[s.weight], 0, to_mid, to_rad,
                fused ? Epilogue{Epilogue::gate, at<uint8_t>(applied), nullptr} : Epilogue{});
    if (applied && !fused) gate(element_size_, read, to_mid, to_rad, applied, to_mid, to_rad);
}

void Chain::add_to_weight(const Step& s, const std::vector<Address>& values, Address of_mid, Address of_rad,
                          Address mid, Address rad, Gradients& gradients) const {
    if (!gradients.wanted[s.weight]) return;
    const int64_t outputs = s.shape[4], channels = s.shape[1], taps = s.shape[7] * s.shape[8];
    // Written in the order of the indices; a weight may have its channels last.
    const bool turned = s.shape[16] == 1 && channels > 1 && taps > 1;
    Part part(gradients, s.weight, outputs * channels * taps, !turned);
    const bool has_mid = of_mid && mid, has_rad = of_rad && rad;
    conv2d_weight(element_size_, s.shape, has_mid ? of_mid : 0, has_rad ? of_rad : 0, has_mid ? mid : 0,
                  has_rad ? rad : 0, values[s.weight], part.start());
    if (!turned) return part.add();
    Part in_order(gradients, s.weight, outputs * channels * taps, true);
    transpose(element_size_, outputs, channels, taps, part.start(), in_order.start());
    in_order.add();
}

void Chain::add_to_bias(const Step& s, Address of_mid, Gradients& gradients) const {
    if (!gradients.wanted[s.third]) return;
    const int64_t outputs = s.shape[4], made = s.elements_made();
    Part part(gradients, s.third, outputs, true);
    typed(element_size_, [&](const auto& stages) {
        using T = decltype(element_type(stages));
        T* const sum = at<T>(part.start());
        std::fill_n(sum, outputs, T(0));
        for (int64_t i = 0; i < made; i += outputs)
            for (int64_t j = 0; j < outputs; ++j) sum[j] += at<T>(of_mid)[i + j];
    });
    part.add();
}

}  // namespace pyxai_bounds
