// Texts as the kernels take them: the bags that count, in tiles, several short texts to a tile.
#pragma once

#include <cstdint>
#include <vector>

#include "cpu/maxsim.h"
#include "cpu/maxsim_pack.h"

namespace bagformer {

// Consecutive texts of a group whose bags fill common tiles, cut as those of one text are: a text
// may lie in two tiles. Long texts are alone.
struct Bundle {
    int64_t first, texts;
    int32_t rows;
};

template <class E>
struct Texts {
    int64_t first = 0;
    std::vector<Places> places;
    std::vector<Bundle> bundles;
    std::vector<int32_t> ends;  // of each text: rows of its bundle up to its own last
    std::vector<E> packed;      // [texts][room], those of a bundle behind each other

    void resize(int64_t texts, int64_t room) {
        places.resize(texts);
        ends.resize(texts);
        packed.resize(texts * room);
    }

    // Cuts texts [0, count), whose places are known, into bundles.
    void bundle(int64_t count, int max_rows) {
        bundles.clear();
        for (int64_t text = 0; text < count; ++text) {
            const int32_t rows = places[text].count();
            if (bundles.empty() || !joins(bundles.back(), rows, max_rows))
                bundles.push_back({text, 0, 0});
            Bundle& last = bundles.back();
            ++last.texts;
            last.rows += rows;
            ends[text] = last.rows;
        }
    }

  private:
    // A tile of one text with few rows waits for its own multiply-adds, and costs as much to enter
    // and to leave as a full one. Four tiles are long enough for even heights.
    static bool joins(const Bundle& bundle, int32_t rows, int max_rows) {
        const auto is_short = [&](int32_t count) {
            return count == 0 || tile_height(count, 1 << 30, max_rows) < max_rows - max_rows / 4;
        };
        const int32_t most = 4 * max_rows;
        const bool alone = bundle.texts == 1 && !is_short(bundle.rows);
        return !alone && is_short(rows) && bundle.rows + rows <= most && bundle.texts < most;
    }
};

// The tiles of one bundle behind each other. `rows_of` gives the rows of a text.
template <class E, class RowsOf>
void pack_bundle(const Texts<E>& texts, const Bundle& bundle, int max_rows, RowsOf&& rows_of,
                 E* out) {
    int row = 0, tile = 0, first = 0, height = 0;
    for (int64_t text = bundle.first; text < bundle.first + bundle.texts; ++text) {
        const auto rows = rows_of(text);
        for (int32_t place : texts.places[text].index) {
            if (row == first + height) {
                first = row;
                height = tile_height(bundle.rows, tile++, max_rows);
            }
            interleave_row(rows, place, height,
                           out + first * Packed<E>::depth(rows.depth) + (row - first));
            ++row;
        }
    }
}

}  // namespace bagformer
