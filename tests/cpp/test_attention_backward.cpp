// SPDX-License-Identifier: Apache-2.0
// Gradients of attention: a directional derivative, the same bits on any number of threads (chunks
// of keys take turns at dq: the thread sanitizer watches), and refusals.
#include "quire/attention_backward.h"

#include <doctest/doctest.h>

#include <random>
#include <vector>

#include "quire/backend.h"
#include "quire/error.h"

namespace {

using quire::AttentionGradients;
using quire::AttentionOptions;
using quire::AttentionTensors;
using quire::DType;
using quire::TensorView;

constexpr int kHeads = 4, kKvHeads = 2, kDim = 24, kDimV = 40;

struct Call {
  // Lengths of one ragged batch.
  Call(std::vector<int32_t> cu_q_, std::vector<int32_t> cu_k_) : cu_q(cu_q_), cu_k(cu_k_) {
    std::mt19937 random(1);
    std::normal_distribution<float> normal;
    const auto fill = [&](std::vector<float>& x, int64_t size) {
      x.resize(size);
      for (float& value : x) value = normal(random);
    };
    const int64_t rows = cu_q.back(), keys = cu_k.back();
    fill(q, rows * kHeads * kDim);
    fill(k, keys * kKvHeads * kDim);
    fill(v, keys * kKvHeads * kDimV);
    fill(dout, rows * kHeads * kDimV);
    fill(sinks, kHeads);
    out.resize(dout.size());
    lse.resize(rows * kHeads);
    dq.resize(q.size());
    dk.resize(k.size());
    dv.resize(v.size());
    dsinks.resize(kHeads);
    options.causal = true;
    options.window_left = 150;
    options.softcap = 4;
  }

  static TensorView view(std::vector<float>& x, std::initializer_list<int64_t> shape) {
    return {x.data(), DType::kFloat32, shape};
  }
  AttentionTensors tensors() {
    const int64_t rows = cu_q.back(), keys = cu_k.back();
    AttentionTensors t;
    t.q = view(q, {rows, kHeads, kDim});
    t.k = view(k, {keys, kKvHeads, kDim});
    t.v = view(v, {keys, kKvHeads, kDimV});
    t.out = view(out, {rows, kHeads, kDimV});
    t.lse = view(lse, {kHeads, rows});
    t.sinks = view(sinks, {kHeads});
    return t;
  }
  AttentionGradients gradients() {
    const AttentionTensors t = tensors();
    AttentionGradients g;
    g.dout = t.out;
    g.dout.data = dout.data();
    g.dq = t.q, g.dk = t.k, g.dv = t.v, g.dsinks = t.sinks;
    g.dq.data = dq.data(), g.dk.data = dk.data(), g.dv.data = dv.data();
    g.dsinks.data = dsinks.data();
    return g;
  }
  TensorView index(std::vector<int32_t>& cu) const {
    return {cu.data(), DType::kInt32, {static_cast<int64_t>(cu.size())}};
  }
  double loss() {
    quire::attention(tensors(), options, index(cu_q), index(cu_k));
    double sum = 0;
    for (size_t i = 0; i < out.size(); ++i) sum += double{out[i]} * dout[i];
    return sum;
  }
  void backward() {
    quire::attention_backward(tensors(), gradients(), options, index(cu_q), index(cu_k));
  }

  std::vector<int32_t> cu_q, cu_k;
  std::vector<float> q, k, v, dout, sinks, out, lse, dq, dk, dv, dsinks;
  AttentionOptions options;
};

}  // namespace

TEST_CASE("a step along the gradient changes the loss by its square") {
  Call call({0, 5, 5, 40}, {0, 9, 12, 152});
  call.loss();
  call.backward();
  const double step = 1e-3;
  for (auto [x, gradient] : {std::pair{&call.q, call.dq}, std::pair{&call.k, call.dk},
                             std::pair{&call.v, call.dv}, std::pair{&call.sinks, call.dsinks}}) {
    const std::vector<float> before = *x;
    double expected = 0, losses[2];
    for (float g : gradient) expected += double{g} * g;
    for (int side : {0, 1}) {
      for (size_t i = 0; i < x->size(); ++i)
        (*x)[i] = before[i] + static_cast<float>(side ? step : -step) * gradient[i];
      losses[side] = call.loss();
    }
    *x = before;
    CHECK((losses[1] - losses[0]) / (2 * step) == doctest::Approx(expected).epsilon(0.01));
  }
}

TEST_CASE("the same bits on any number of threads") {
  const int before = quire::num_threads();
  Call call({0, 300, 301, 420}, {0, 700, 703, 900});
  quire::set_num_threads(1);
  call.loss();
  call.backward();
  const auto dq = call.dq, dk = call.dk, dv = call.dv, dsinks = call.dsinks;
  for (int threads : {2, 4, 7}) {
    quire::set_num_threads(threads);
    for (int repeat = 0; repeat < 3; ++repeat) {
      call.backward();
      CHECK(call.dq == dq);
      CHECK(call.dk == dk);
      CHECK(call.dv == dv);
      CHECK(call.dsinks == dsinks);
    }
  }
  quire::set_num_threads(before);
}

TEST_CASE("what is wrong is named and nothing is written") {
  Call call({0, 5}, {0, 9});
  call.loss();
  std::fill(call.dq.begin(), call.dq.end(), 7.0f);
  const auto refused = [&](AttentionGradients g, const char* argument) {
    try {
      quire::attention_backward(call.tensors(), g, call.options, call.index(call.cu_q),
                                call.index(call.cu_k));
      FAIL("was not refused");
    } catch (const quire::InvalidArgument& error) {
      CHECK(std::string(error.what()).find(argument) != std::string::npos);
    }
    CHECK(call.dq == std::vector<float>(call.dq.size(), 7.0f));
  };
  AttentionGradients g = call.gradients();
  g.dsinks = {};
  refused(g, "attention_backward: dsinks: expected with sinks");
  g = call.gradients();
  g.dk.shape[2] += 1;
  refused(g, "attention_backward: dk: expected [9, 2, 24] float32, got [9, 2, 25] float32");
  g = call.gradients();
  g.dv.read_only = true;
  refused(g, "attention_backward: dv: expected writable memory");
}
