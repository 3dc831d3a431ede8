// docs/maxsim.md stated once more, as two plain loops in double, from no code of the kernels.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

namespace check {

// One pair. Masks hold a flag for each token.
struct Pair {
    int64_t bags, patches, depth;
    const double *text, *image;             // [bags][depth], [patches][depth]
    const double *bag_scale, *patch_scale;  // null: 1
    std::vector<bool> bag_counts, patch_counts;
    bool zero, mean;

    double similarity(int64_t bag, int64_t patch, bool magnitude = false) const {
        double sum = 0;
        for (int64_t d = 0; d < depth; ++d) {
            const double product = text[bag * depth + d] * image[patch * depth + d];
            sum += magnitude ? std::fabs(product) : product;
        }
        const double scale = (bag_scale == nullptr ? 1 : bag_scale[bag]) *
                             (patch_scale == nullptr ? 1 : patch_scale[patch]);
        return sum * (magnitude ? std::fabs(scale) : scale);
    }
};

struct Side {
    double score = 0, slack = 0;  // slack: how far a float sum of this may be off
    std::vector<double> best;     // of each token; NaN: void or NaN
    std::vector<double> token_slack;
    std::vector<int64_t> winner;
};

struct Scores {
    Side text, image;
    bool has_nan = false;
    std::vector<std::vector<double>> similar;  // [bag][patch], masked ones 0
};

inline Side best_of(int64_t own, int64_t other, const std::vector<bool>& own_counts,
                    const std::vector<bool>& other_counts, bool zero, bool mean,
                    const std::vector<std::vector<double>>& similar,
                    const std::vector<std::vector<double>>& magnitude, bool turned) {
    Side side;
    side.best.assign(own, 0);
    side.token_slack.assign(own, 0);
    side.winner.assign(own, -1);
    int64_t count = 0;
    if (std::count(other_counts.begin(), other_counts.end(), true) == 0) return side;
    for (int64_t a = 0; a < own; ++a) {
        if (!own_counts[a]) continue;
        ++count;
        double best = -std::numeric_limits<double>::infinity();
        int64_t winner = -1;
        for (int64_t b = 0; b < other; ++b) {
            if (!other_counts[b] && !zero) continue;
            const double s = !other_counts[b] ? 0 : turned ? similar[b][a] : similar[a][b];
            if (other_counts[b])
                side.token_slack[a] =
                    std::max(side.token_slack[a], turned ? magnitude[b][a] : magnitude[a][b]);
            const bool wins = winner < 0 || (best == best && (s != s || s > best));
            if (wins) best = s;
            if (wins) winner = b;
        }
        side.best[a] = best;
        side.winner[a] = winner;
        side.score += best;
        side.slack += side.token_slack[a];
    }
    if (mean && count > 0) side.score /= static_cast<double>(count);
    return side;
}

inline Scores scores_of(const Pair& pair) {
    Scores found;
    const double none = 0;
    found.similar.assign(pair.bags, std::vector<double>(pair.patches, none));
    auto magnitude = found.similar;
    for (int64_t b = 0; b < pair.bags; ++b)
        for (int64_t p = 0; p < pair.patches; ++p) {
            if (!pair.bag_counts[b] || !pair.patch_counts[p]) continue;
            found.similar[b][p] = pair.similarity(b, p);
            magnitude[b][p] = pair.similarity(b, p, true);
            found.has_nan |= found.similar[b][p] != found.similar[b][p];
        }
    const auto any = [](const std::vector<bool>& counts) {
        return std::count(counts.begin(), counts.end(), true) > 0;
    };
    found.text = best_of(pair.bags, pair.patches, pair.bag_counts, pair.patch_counts, pair.zero,
                         pair.mean, found.similar, magnitude, false);
    found.image = best_of(pair.patches, pair.bags, pair.patch_counts, pair.bag_counts, pair.zero,
                          pair.mean, found.similar, magnitude, true);
    if (!any(pair.bag_counts) || !any(pair.patch_counts)) return found;
    if (found.has_nan) found.text.score = found.image.score = std::nan("");
    return found;
}

}  // namespace check
