// The bag automaton without Python, to be watched by sanitizers: tests/test_sanitizers.py.
//
//     bags threads N      N threads search automata that others build and open meanwhile
//     bags damage COUNT   images damaged at random are refused, or searched without harm
#include <algorithm>
#include <array>
#include <atomic>
#include <cstddef>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <span>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "bags/builder.h"
#include "bags/search.h"
#include "tensors.h"

namespace check {

namespace {

using namespace bagformer::bags;

constexpr Matcher kMatchers[] = {Matcher::leftmost_longest, Matcher::original,
                                 Matcher::backward_max};
constexpr int64_t kTokens = 150;  // bits of a row end inside a word

std::atomic<int> failures{0};

void fail(const std::string& what) {
    if (++failures <= 20) std::printf("FAILED %s\n", what.c_str());
}

// Ids that entities are made of: some in the dense table, few that are rare.
int64_t random_id(Random& random) {
    return random.below(20) == 0 ? (1 << 25) + random.below(3) : random.below(12);
}

Image built(Matcher matcher, uint64_t seed) {
    Random random(seed);
    Builder builder(matcher, {0, 3, 1u << 26});
    for (int chunk = 0; chunk < 3; ++chunk) {
        std::vector<int64_t> ids, lengths;
        for (int k = 0; k < 40; ++k) {
            lengths.push_back(1 + random.below(5));
            for (int64_t n = 0; n < lengths.back(); ++n) ids.push_back(random_id(random));
        }
        builder.add(ids, lengths);
    }
    return builder.finish();
}

struct Rows {
    int64_t rows;
    std::vector<int64_t> ids;

    Rows(int64_t n, uint64_t seed) : rows(n), ids(n * kTokens) {
        Random random(seed);
        for (int64_t& id : ids) id = random_id(random);
    }
    Ids view() const {
        const auto* bytes = reinterpret_cast<const std::byte*>(ids.data());
        return {bytes, IdType::i64, rows, kTokens, kTokens * 8, 8};
    }
};

struct Bags {
    int64_t n_bags;
    std::vector<int32_t> offsets, counts;
    std::unique_ptr<bool[]> mask;  // exactly as large as what is to be written

    Bags(const bagformer::bags::View& view, const Rows& of, int threads) {
        const Cuts cuts(view, of.view(), threads);
        n_bags = cuts.n_bags();
        offsets.resize(of.rows * (n_bags + 1));
        counts.resize(of.rows);
        mask = std::make_unique<bool[]>(of.rows * n_bags);
        cuts.write(offsets.data(), mask.get(), counts.data());
    }
    bool operator==(const Bags& other) const {
        return n_bags == other.n_bags && offsets == other.offsets && counts == other.counts &&
               std::memcmp(mask.get(), other.mask.get(), counts.size() * n_bags) == 0;
    }
    bool sound() const {
        for (size_t row = 0; row < counts.size(); ++row) {
            const int32_t* at = offsets.data() + row * (n_bags + 1);
            if (counts[row] < 0 || counts[row] > n_bags || at[0] != 0 || at[n_bags] != kTokens ||
                !std::is_sorted(at, at + n_bags + 1))
                return false;
        }
        return true;
    }
};

int check_threads(int n) {
    std::vector<Image> images;
    std::vector<bagformer::bags::View> views;
    for (Matcher matcher : kMatchers) images.push_back(built(matcher, 5));
    for (const Image& image : images) views.push_back(open({image.data(), image.size()}));
    const Rows rows(37, 7);
    std::vector<Bags> alone;
    for (const auto& view : views) alone.emplace_back(view, rows, 1);
    for (const Bags& bags : alone)
        if (bags.n_bags < 50 || !bags.sound()) fail("the rows are no test");
    std::vector<std::thread> threads;
    for (int worker = 0; worker < n; ++worker)
        threads.emplace_back([&, worker] {
            for (int turn = 0; turn < 12; ++turn) {
                const int which = (turn + worker) % 3;
                if (!(Bags(views[which], rows, 1 + turn % 3) == alone[which]))
                    fail("a search beside others differs");
                if (turn % n != worker) continue;
                const Image again = built(kMatchers[which], 5);
                if (again.size() != images[which].size() ||
                    std::memcmp(again.data(), images[which].data(), again.size()) != 0)
                    fail("an image built beside others differs");
                const auto view = open({again.data(), again.size()});
                if (!(Bags(view, rows, 2) == alone[which])) fail("a new automaton differs");
            }
        });
    for (std::thread& thread : threads) thread.join();
    Rows bad = rows;
    bad.ids[30 * kTokens] = -1;
    bad.ids[11 * kTokens + 3] = int64_t{1} << 31;
    try {
        Bags(views[0], bad, n);
        fail("a bad id passed");
    } catch (const std::invalid_argument& error) {
        if (std::string(error.what()).find("row 11 ") != 0) fail(error.what());
    }
    std::printf("%d threads, %d failures\n", n, failures.load());
    return failures == 0 ? 0 : 1;
}

// A copy that ends where its bytes do, so that a read behind them is seen.
class Exact {
  public:
    explicit Exact(const Image& image)
        : copy_(std::make_unique<std::byte[]>(image.size())), size_(image.size()) {
        std::memcpy(copy_.get(), image.data(), size_);
    }
    std::span<std::byte> bytes() { return {copy_.get(), size_}; }
    uint32_t word(size_t at) const {
        uint32_t value = 0;  // earlier damage may have cut the word off
        if (at + 4 <= size_) std::memcpy(&value, copy_.get() + at, 4);
        return value;
    }
    void set(size_t at, uint32_t value) {
        if (at + 4 <= size_) std::memcpy(copy_.get() + at, &value, 4);
    }
    size_t words() const { return size_ / 4; }

    // Cuts or extends by zeros, and tells the header.
    void resize(size_t size) {
        auto other = std::make_unique<std::byte[]>(size);
        std::memcpy(other.get(), copy_.get(), std::min(size, size_));
        copy_ = std::move(other);
        size_ = size;
        const uint64_t told = size;
        std::memcpy(copy_.get() + offsetof(Header, file_bytes), &told, sizeof told);
    }
    Header header() const {
        Header read;
        std::memcpy(&read, copy_.get(), sizeof read);
        return read;
    }

  private:
    std::unique_ptr<std::byte[]> copy_;
    size_t size_;
};

uint32_t interesting(Random& random, const Exact& image, uint32_t own) {
    const uint32_t other = image.word(4 * random.below(int64_t(image.words())));
    const std::array<uint32_t, 10> values{
        0,   1,        own - 1,          own + 1,      other,
        ~0u, 1u << 31, own ^ (1u << 31), own ^ kPlain, random.next()};
    return values[random.below(values.size())];
}

// What holds of each entry alone stays so: only the search can find out.
void damage_entry(Random& random, Exact& image) {
    const Header header = image.header();
    const Layout layout = layout_of(header);
    const uint32_t state = 1 + uint32_t(random.below(std::max(1u, header.n_states - 1)));
    const uint64_t at = layout.states + state * sizeof(State);
    const uint64_t link = layout.links + state * sizeof(Link);
    const uint32_t word = image.word(at);
    const auto number = [&](uint32_t n) { return uint32_t(random.below(std::max(1u, n))); };
    switch (random.below(header.n_links > 0 ? 5 : 2)) {
        case 0:
            return image.set(at + 4, number(header.n_states));
        case 1:
            return image.set(
                at, (word & ~kIndex) | number(header.n_blocks * kBlock - header.alphabet + 1));
        case 2:
            return image.set(link, 1 + number(header.n_states - 1));
        case 3:
            return image.set(link + 4, 1 + number(header.n_items - 1));
        default:
            return image.set(link + 8, 1 + number(8));
    }
}

void damage(Random& random, Exact& image) {
    const size_t size = image.bytes().size();
    const size_t at = 4 * random.below(int64_t(image.words()));
    switch (random.below(7)) {
        case 0:
            image.bytes()[random.below(int64_t(size))] ^= std::byte(1 << random.below(8));
            return;
        case 1:
            return image.set(at, interesting(random, image, image.word(at)));
        case 2: {  // a count, with a file of the size that it asks for
            const size_t field = offsetof(Header, alphabet) + 4 * random.below(8);
            image.set(field, image.word(field) + uint32_t(random.below(5)) - 2);
            const uint64_t wanted = layout_of(image.header()).file_bytes;
            if (wanted < 2 * size + 1024) image.resize(wanted);
            return;
        }
        case 3:
            return image.resize(random.below(int64_t(size) + 80) + sizeof(Header));
        default:
            return damage_entry(random, image);
    }
}

int check_damage(int64_t count) {
    std::vector<Image> images;
    for (Matcher matcher : kMatchers)
        for (uint64_t seed : {5, 6}) images.push_back(built(matcher, seed));
    const Rows rows(9, 7);
    int64_t refused = 0, contradicted = 0, searched = 0;
    for (int64_t turn = 0; turn < count; ++turn) {
        Random random(uint64_t(turn) + 1);
        Exact image(images[random.below(images.size())]);
        for (int64_t n = random.below(3); n >= 0; --n) damage(random, image);
        try {
            const Bags bags(open(image.bytes()), rows, 1);
            ++searched;
            if (!bags.sound()) fail("bags of damaged image " + std::to_string(turn));
        } catch (const std::invalid_argument&) {
            ++refused;
        } catch (const std::runtime_error&) {
            ++contradicted;
        }
    }
    // each end is reached often, or this tests nothing
    for (int64_t reached : {refused, contradicted, searched})
        if (reached < count / 100) fail("too few images took one of the ends");
    std::printf(
        "%lld images: %lld refused, %lld contradict themselves, %lld searched; %d failures\n",
        static_cast<long long>(count), static_cast<long long>(refused),
        static_cast<long long>(contradicted), static_cast<long long>(searched), failures.load());
    return failures == 0 ? 0 : 1;
}

}  // namespace

}  // namespace check

int main(int argc, char** argv) {
    const std::string what = argc > 2 ? argv[1] : "";
    const int number = argc > 2 ? std::atoi(argv[2]) : 0;
    if (what == "threads" && number > 0) return check::check_threads(number);
    if (what == "damage" && number > 0) return check::check_damage(number);
    std::fputs("bags threads N | bags damage COUNT\n", stderr);
    return 2;
}
