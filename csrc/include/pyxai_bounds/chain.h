// Layers and their backward passes, one after the other, as one call; and the derivative of them all as another.
#pragma once

#include <array>
#include <cstdint>
#include <vector>

#include "pyxai_bounds/calls.h"
#include "pyxai_bounds/memory.h"

namespace pyxai_bounds {

// Values are numbered; those that a call is given come first.
class Chain {
  public:
    enum class Kernel : int64_t { linear, linear_many, conv2d, transpose };
    // `mid` to `state` are numbers of values, -1 where the step has none. `third` is a bias or, in a backward pass, the
    // state of the ReLU' before it. No gradient passes through a step that is not differentiable. A convolution reads
    // `shape`. The others read `batch` and `n`, `m`: features in and out, or rows and columns of matrices to transpose.
    struct Step {
        Kernel kernel;
        bool backward, differentiable;
        int64_t mid, rad, weight, third, out_mid, out_rad, state, batch, n, m;
        Geometry shape;
        // The ReLU' of the only step that reads the results, if this step applies it: its state, and where to write the
        // gate, which the derivative reads.
        int64_t next_state = -1, next_gate = -1;
        // Has another step applied this step's ReLU' already? `gate` is then what it wrote.
        bool is_gated = false;
        int64_t gate = -1;
        bool hands_on = false;        // are the results read by the next step alone, a convolution like this one?
        std::size_t together = 1;     // so many steps from here on can take an image through, one after the other
        int64_t weights = 0;          // elements of the weights of these steps
        std::vector<int64_t> last{};  // values that no later step reads

        std::array<int64_t, 4> reads() const { return {mid, rad, weight, third}; }
        std::array<int64_t, 3> makes() const { return {out_mid, out_rad, state}; }
        // Elements of a midpoint that is read, and of one that is made.
        int64_t elements_read() const { return elements(true); }
        int64_t elements_made() const { return elements(false); }
        int64_t elements(bool read) const {
            if (kernel == Kernel::transpose) return batch * n * m;
            if (kernel != Kernel::conv2d) return batch * (read ? n : m);
            return shape[0] * (read == backward ? shape[4] * shape[5] * shape[6] : shape[1] * shape[2] * shape[3]);
        }
    };

    using Steps = std::vector<Step>;

    // `steps`: the members of each Step from `kernel` to `state`, then its `shape` or `batch`, `n` and `m`. `sizes`:
    // the bytes of each value. `taken`: the values that a call returns. `kept`: the others that the derivative reads.
    Chain(int element_size, const std::vector<std::vector<int64_t>>& steps, std::vector<int64_t> sizes, int64_t given,
          const std::vector<int64_t>& taken, const std::vector<int64_t>& kept);

    // Where values lie in a block that keeps them, and the size of that block.
    const std::vector<int64_t>& places() const { return places_; }
    int64_t size() const { return is_small() ? size_ : kept_size_; }

    // `values` has an address for what is given or taken, and 0 for the rest. If `kept` is not 0, it is a block of
    // size() bytes, in which what the derivative reads is left.
    void run(std::vector<Address> values, Address kept) const;

    // The derivative, after a `run` that left its values in the block `kept`. `grads` has the address of each value's
    // gradient, 0 where there is none. The gradient of a given value is written to its address in `wanted`, unless that
    // is 0. Returns which have been written; the others are zero. `overwrite`: nobody will read the block again, so
    // that gradients may be written over the values in it.
    std::vector<bool> adjoint(std::vector<Address> values, Address kept, bool overwrite, std::vector<Address> grads,
                              const std::vector<Address>& wanted) const;

  private:
    struct Gradients;
    class Part;

    // Small values share one block: a block for each would take longer than their memory is worth.
    bool is_small() const { return size_ <= static_cast<int64_t>(least_kept); }

    // Lets a convolution's backward pass apply the ReLU' of the one after it before its results leave the registers, if
    // nobody else reads these. What is stored is then the gated box, and for the derivative its gate.
    void apply_next_relu(Steps::iterator step, const std::vector<int64_t>& taken);

    // The convolution whose box is this convolution's result, if nothing else reads that result; else the end.
    Steps::iterator only_reader(Steps::iterator step, const std::vector<int64_t>& taken);

    // Lets a convolution share a pass over the images with the steps after it, which have been joined already. Each
    // image meets all of their weights, so these must fit a second-level cache, beside what lies between two steps.
    void join_next(Steps::iterator step, const std::vector<int64_t>& taken);

    // Does each thread take whole images through the joined steps from here on? That needs about equally many images
    // for each thread, and steps whose packed bits are all read and written by the tiles.
    bool go_together(const Step& first) const;

    // Fills in the addresses of the values that have a place in the block.
    void place(std::vector<Address>& values, Address block) const;

    void take_together(Steps::const_iterator begin, Steps::const_iterator end,
                       const std::vector<Address>& values) const;
    void take(const Step& s, const std::vector<Address>& values) const;

    // Calls run(state), and ReLU after it where the kernel has none.
    template <class F>
    void rectified(int64_t size, int64_t outputs, Address out_mid, Address out_rad, Address state, F run) const;
    // Calls run(mid, rad, state), and ReLU' before it where the kernel has none.
    template <class F>
    void gated(int64_t size, int64_t outputs, Address mid, Address rad, Address state, F run) const;
    // Calls run(epilogue), and ReLU' after it where the kernel has none.
    template <class F>
    void gated_after(int64_t size, int64_t outputs, Address out_mid, Address out_rad, Address state, Address made,
                     F run) const;

    void differentiate(const Step& s, const std::vector<Address>& values, const std::vector<bool>& needed,
                       Gradients& gradients) const;
    void differentiate_linear(const Step& s, const std::vector<Address>& values, Address of_mid, Address of_rad,
                              Address state, Address to_mid, Address to_rad, Gradients& gradients) const;
    void differentiate_conv2d(const Step& s, const std::vector<Address>& values, Address of_mid, Address of_rad,
                              Address state, Address to_mid, Address to_rad, Gradients& gradients) const;
    void differentiate_conv2d_backward(const Step& s, const std::vector<Address>& values, Address of_mid,
                                       Address of_rad, Address state, Address to_mid, Address to_rad,
                                       Gradients& gradients) const;
    // Adds what a convolution of `mid`, `rad` contributes, given the gradients `of_mid`, `of_rad` of its results.
    void add_to_weight(const Step& s, const std::vector<Address>& values, Address of_mid, Address of_rad, Address mid,
                       Address rad, Gradients& gradients) const;
    void add_to_bias(const Step& s, Address of_mid, Gradients& gradients) const;

    int element_size_;
    Steps steps_;
    std::vector<int64_t> sizes_, places_;
    std::vector<bool> is_kept_;
    std::vector<int> readers_;  // of each value, the differentiable steps that read it
    int64_t size_ = 0, kept_size_ = 0, given_;
};

}  // namespace pyxai_bounds
