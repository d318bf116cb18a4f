// The CUDA kernel of commit, run on the host: all algorithms, windows around the width of a warp,
// layers enough for two launches, pending that is zero, Inf or NaN; the state is that of commit() on the CPU, to the
// bit.
#include "commit/commit.cu"

#include <cmath>
#include <cstring>
#include <limits>
#include <random>
#include <vector>

#include "check.h"

using namespace fp8kernels;

namespace {

struct State {
    std::vector<float> history, pending, scale, target;
    int64_t tensors, window;

    ScaleState view() { return {history.data(), pending.data(), scale.data(), target.data(), tensors, window}; }
};

State random_state(int64_t tensors, int64_t window, std::mt19937& random) {
    std::uniform_real_distribution<float> amax(1e-3f, 1e3f);
    std::uniform_int_distribution<int> dice(0, 9);
    State s{};
    s.tensors = tensors, s.window = window;
    for (int64_t t = 0; t < tensors; ++t) {
        const int64_t filled = std::uniform_int_distribution<int64_t>(0, window)(random);
        for (int64_t slot = 0; slot < window; ++slot) s.history.push_back(slot < filled ? amax(random) : 0.0f);
        const int roll = dice(random);
        s.pending.push_back(roll == 0   ? 0.0f
                            : roll == 1 ? std::numeric_limits<float>::infinity()
                            : roll == 2 ? std::numeric_limits<float>::quiet_NaN()
                            : roll == 3 ? 1e-44f
                                        : amax(random));
        s.scale.push_back(amax(random));
        s.target.push_back(dice(random) == 0 ? 0.0f : t % 2 ? 224.0f : 15.0f);
    }
    return s;
}

bool same(const std::vector<float>& a, const std::vector<float>& b) {
    return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0;
}

void check_commit(int64_t layers, int64_t tensors, int64_t window, Algorithm algorithm, ScaleRule rule) {
    std::mt19937 random(static_cast<uint32_t>(layers + 10 * tensors + 100 * window));
    std::vector<State> want;
    for (int64_t i = 0; i < layers; ++i) want.push_back(random_state(tensors, window, random));
    std::vector<State> got = want;
    for (int turn = 0; turn < 2; ++turn) {  // the second time nothing is pending, and nothing changes
        std::vector<ScaleState> views;
        for (State& s : got) views.push_back(s.view());
        CHECK(commit_cuda(views.data(), layers, algorithm, rule, 0.9f, nullptr) == 0, "%lld",
              static_cast<long long>(layers));
        for (State& s : want) commit(s.view(), algorithm, rule, 0.9f);
        for (size_t i = 0; i < want.size(); ++i) {
            const bool all = same(want[i].history, got[i].history) && same(want[i].pending, got[i].pending) &&
                             same(want[i].scale, got[i].scale);
            CHECK(all, "layer %zu of %lld, %lld tensors, window %lld, algorithm %d, turn %d", i,
                  static_cast<long long>(layers), static_cast<long long>(tensors), static_cast<long long>(window),
                  static_cast<int>(algorithm), turn);
        }
    }
}

}  // namespace

int main() {
    for (const Algorithm algorithm :
         {Algorithm::max, Algorithm::moving_average, Algorithm::most_recent, Algorithm::exponential_moving_average}) {
        for (const int64_t window : {1, 2, 31, 32, 33, 64, 100}) {
            for (const int64_t tensors : {1, 3, 6}) {
                check_commit(2, tensors, window, algorithm, {1.0f, false});
                check_commit(1, tensors, window, algorithm, {4.0f, true});
            }
        }
    }
    check_commit(kLayers + 3, 1, 2, Algorithm::max, {1.0f, false});  // more than one launch takes
    return report("commit_cuda");
}
