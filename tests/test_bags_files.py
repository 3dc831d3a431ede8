"""Saved segmenters: round trips, workers, and damaged or hostile files."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import pickle
import random
import stat
from itertools import pairwise

import pytest
import torch
from support import bag_files
from support.bag_cases import offsets_of, random_cases

from bagformer import _C, reference
from bagformer.bags import BagSegmenter

ENTITIES = [(1, 2), (1, 2, 3, 4), (3, 4), (2, 3), (5,), (2**25, 1, 2)]
ROWS = [[1, 2, 3, 4, 9], [9, 1, 2, 3, 9], [2**25, 1, 2, 5, 0]]


def same_bags(a, b):
    return all(torch.equal(getattr(a, f), getattr(b, f)) for f in ("offsets", "mask", "counts"))


@pytest.fixture
def path(tmp_path):
    return tmp_path / "entities.bags"


@pytest.fixture(scope="module")
def image(tmp_path_factory):
    path = tmp_path_factory.mktemp("image") / "x.bags"
    BagSegmenter(ENTITIES, masked_ids=[0, 7]).save(path)
    return path.read_bytes()


@pytest.mark.parametrize("matcher", reference.MATCHERS)
def test_round_trip(path, matcher):
    for entities, rows in random_cases(30, n_rows=20, seed=31):
        made = BagSegmenter(entities, matcher=matcher, masked_ids=[0, 101])
        made.save(path)
        read = BagSegmenter.load(path)
        assert (read.matcher, read.masked_ids, len(read)) == (matcher, (0, 101), len(made))
        assert same_bags(read(rows), made(rows))
        assert read.sha256 == made.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


def test_saving_replaces_whole_files_and_leaves_nothing_behind(path):
    first, second = BagSegmenter(ENTITIES), BagSegmenter(ENTITIES[:1])
    first.save(path)
    mapped = BagSegmenter.load(path)
    second.save(path)
    assert same_bags(mapped(ROWS), first(ROWS)), "a mapped file lives on when it is replaced"
    assert BagSegmenter.load(path).sha256 == second.sha256
    assert os.listdir(path.parent) == [path.name]
    umask = os.umask(0)
    os.umask(umask)
    assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~umask
    with pytest.raises(FileNotFoundError):
        first.save(path.parent / "missing" / "x.bags")
    (path.parent / "folder").mkdir()
    with pytest.raises(OSError):
        first.save(path.parent / "folder")
    assert sorted(os.listdir(path.parent)) == [path.name, "folder"]


def test_pickled_by_path(path):
    made = BagSegmenter([tuple(range(k, k + 3)) for k in range(5000)])
    made.save(path)
    for segmenter in (made, BagSegmenter.load(path)):
        data = pickle.dumps(segmenter)
        assert len(data) < 1000
        assert pickle.loads(data).sha256 == made.sha256
    data = pickle.dumps(made)
    BagSegmenter(ENTITIES).save(path)
    with pytest.raises(ValueError, match=f"{path.name}: the file has changed since"):
        pickle.loads(data)
    assert pickle.loads(pickle.dumps(made)).sha256 == made.sha256, "carries its bytes instead"
    path.unlink()
    assert pickle.loads(pickle.dumps(made)).sha256 == made.sha256


@pytest.mark.timeout(120)
@pytest.mark.parametrize(
    ("method", "saved"), [("fork", False), ("forkserver", True), ("spawn", False)]
)
def test_workers(path, method, saved):
    if method not in multiprocessing.get_all_start_methods():
        pytest.skip(f"this system cannot {method}")
    segmenter = BagSegmenter(ENTITIES)
    if saved:
        segmenter.save(path)
    want = offsets_of((segmenter, ROWS))
    with multiprocessing.get_context(method).Pool(2) as pool:
        assert pool.map(offsets_of, [(segmenter, ROWS)] * 8) == [want] * 8


class _Batches(torch.utils.data.Dataset):
    def __init__(self, segmenter):
        self.segmenter = segmenter

    def __len__(self):
        return 6

    def __getitem__(self, index):
        return self.segmenter(ROWS[index % 3 :]).offsets[0, :4]


def test_data_loader_workers_after_threads_were_used():
    segmenter = BagSegmenter(ENTITIES)
    segmenter(torch.ones(4096, 4, dtype=torch.int64), n_threads=2)
    alone = [batch.tolist() for batch in torch.utils.data.DataLoader(_Batches(segmenter))]
    loader = torch.utils.data.DataLoader(
        _Batches(segmenter), num_workers=2, multiprocessing_context="fork"
    )
    assert [batch.tolist() for batch in loader] == alone


def refuse(path, data, text):
    path.write_bytes(data)
    with pytest.raises(ValueError, match=text) as caught:
        BagSegmenter.load(path)
    assert str(caught.value).startswith(f"{path}: ")


def test_files_of_another_kind(path, image):
    refuse(path, b"", "the file is empty")
    refuse(path, b"BGF", "checksum")
    refuse(path, image[:-1], "the checksum is wrong, the file is damaged or no bag file")
    refuse(path, bag_files.reseal(image[:50]), "too short to be a bag file")
    refuse(path, bag_files.reseal(b"X" + image[1:]), "wrong magic")
    refuse(path, bag_files.reseal(image[:-4] + bytes(8)), "size in the header")
    with pytest.raises(FileNotFoundError):
        BagSegmenter.load(path.parent / "missing.bags")


@pytest.mark.parametrize(
    ("words", "text"),
    [
        ({"version": 2}, "bag file version 2, this build reads version 3"),
        ({"byte_order": 0x04030201}, "wrong byte order mark"),
        ({"matcher": 3}, "unknown matcher"),
        ({"matcher": 1}, "wrong number of links"),
        ({"header_bytes": 64}, "wrong header size"),
        ({"file_bytes": 2**63}, "size in the header"),
        ({"n_entities": 5}, "the number of entities is wrong"),
        ({"alphabet": 0}, "too few slots"),
        ({"alphabet": 2**32 - 1}, "too few slots"),
        ({"n_dense": 2**32 - 1}, "counts in the header do not fit"),
        ({"n_links": 0}, "counts in the header do not fit|wrong number of links"),
        ({"n_states": 2**32 - 1, "n_links": 2**32 - 1}, "counts in the header do not fit"),
        ({"n_states": 0}, "counts in the header do not fit|no root"),
        ({"n_blocks": 2**32 - 1}, "counts in the header do not fit"),
        ({"n_items": 0}, "counts in the header do not fit|wrong number of items"),
    ],
)
def test_headers_that_lie(path, image, words, text):
    refuse(path, bag_files.with_header(image, **words), text)


def _base(image, state):
    return bag_files.entry(image, "states", state)[0] & (2**30 - 1)


def _rank(image, slot):
    """States lie in the order of the slots in use."""
    used, before = bag_files.entry(image, "blocks", slot // 32)
    assert used >> slot % 32 & 1
    return before + (used & (1 << slot % 32) - 1).bit_count()


def _state(image, *ids):
    """Where a path of token ids leads."""
    state = 0
    for token in ids:
        code = bag_files.entry(image, "dense", token)[0] & (2**31 - 1)
        child = _rank(image, _base(image, state) + code)
        assert bag_files.entry(image, "states", child)[1] == state
        state = child
    return state


@pytest.mark.parametrize(
    ("section", "path_ids", "words", "text"),
    [
        ("states", (), {"w1": 0}, "the root is damaged"),
        ("states", (), {"w0": 2**31}, "the root is damaged"),
        ("states", (1, 2), {"w1": 2**31}, "a parent does not exist"),
        ("states", (1, 2), {"w1": 2**32 - 1}, "a parent does not exist"),
        ("states", (1, 2), {"w0": 2**30 - 1}, "a base lies outside the slots"),
        ("states", (3, 4), {"w0": 0}, "the number of entities is wrong"),
        ("links", (), {"w0": 1}, "a link keeps|the root's link is damaged"),
        ("links", (), {"w1": 1}, "the root's link is damaged"),
        ("links", (1, 2, 3), {"w2": 0}, "a link keeps a path that is not its state's"),
        ("links", (5,), {"w2": 1}, "a link keeps a path that is not its state's"),
        ("links", (1, 2), {"w0": 1, "w2": 1}, "a link keeps a path that is not its state's"),
        ("links", (1, 2, 3), {"w0": 2**31}, "a link leads to no state"),
        ("links", (1, 2, 3), {"w1": 2**31}, "a link's item does not exist"),
        ("links", (1, 2), {"w1": 0}, "a plain flag is wrong"),
        ("links", (5,), {"w1": 1}, "a plain flag is wrong"),
    ],
)
def test_states_that_lie(path, image, section, path_ids, words, text):
    state = _state(image, *path_ids)
    refuse(path, bag_files.with_entry(image, section, state, **words), text)


def test_the_last_base_that_fits(path, image):
    header, state = bag_files.header_of(image), _state(image, 5)
    word = bag_files.entry(image, "states", state)[0]
    last = header["n_blocks"] * 32 - header["alphabet"]
    fits = bag_files.with_entry(image, "states", state, w0=word - _base(image, state) + last)
    path.write_bytes(fits)
    assert same_bags(BagSegmenter.load(path)([[5, 9], [5, 5]]), BagSegmenter([(5,)])([[5, 9]] * 2))
    beyond = bag_files.with_entry(fits, "states", state, w0=word - _base(image, state) + last + 1)
    refuse(path, beyond, "a base lies outside the slots")


def test_blocks_that_lie(path, image):
    used, before = bag_files.entry(image, "blocks", 0)
    assert before == 0 and used & 1
    refuse(path, bag_files.with_entry(image, "blocks", 0, w0=used - 1), "the root has no slot")
    refuse(path, bag_files.with_entry(image, "blocks", 0, w1=1), "a block's count is wrong")
    last = bag_files.header_of(image)["n_blocks"] - 1
    used = bag_files.entry(image, "blocks", last)[0]
    refuse(path, bag_files.with_entry(image, "blocks", last, w0=used ^ 1 << 31), "differ in number")


# a try that fails behind (1, 2, 3, 4, 5) keeps (3, 4, 5), and there (5,)
DEEP = [(1, 2, 3, 4, 5, 6), (1, 2), (3, 4, 5, 7), (3, 4), (5, 8)]
DEEP_ROW = [1, 2, 3, 4, 5, 9]


@pytest.mark.parametrize("n_threads", [1, 2])
@pytest.mark.parametrize(
    ("section", "ids", "words"),
    [
        ("links", (1, 2, 3, 4, 5), {"w2": 5}),  # decides nothing: would go round for ever
        ("links", (1, 2, 3, 4, 5), {"w2": 2**32 - 1}),  # keeps tokens before the row's first
        ("links", (3, 4, 5), {"w2": 3}),
        ("links", (3, 4, 5), {"w0": (3, 4, 5), "w2": 2}),  # to itself
        ("links", (1, 2, 3, 4, 5), {"w0": (3, 4, 5, 7), "w2": 4}),  # item in undecided tokens
        ("items", None, {"w1": 2**32 - 8, "w2": 7}),  # far behind the row
        ("items", None, {"w2": 2**32 - 1}),
    ],
)
def test_links_that_contradict_each_other_stop_the_search(
    path, section, ids, words, n_threads, tmp_path
):
    """Such a file opens: only a search can tell, and it must neither hang nor leave its row."""
    made = BagSegmenter(DEEP)
    made.save(path)
    image = path.read_bytes()
    assert made([DEEP_ROW]).spans(0) == [(0, 2), (2, 4), (4, 5), (5, 6)]
    words = {w: _state(image, *v) if isinstance(v, tuple) else v for w, v in words.items()}
    if ids is None:
        index = bag_files.entry(image, "links", _state(image, 1, 2, 3, 4, 5))[1]
    else:
        index = _state(image, *ids)
    path.write_bytes(bag_files.with_entry(image, section, index, **words))
    forged = BagSegmenter.load(path)
    for rows in ([DEEP_ROW], [DEEP_ROW] * 2000, [[9, *DEEP_ROW]]):
        with pytest.raises(RuntimeError, match="links contradict each other"):
            forged(rows, n_threads=n_threads)
    assert forged([[9, 9]]).spans(0) == [(0, 1), (1, 2)]


def test_items_that_overlap_and_ids_that_repeat(path):
    BagSegmenter([(1, 2), (3, 4), (1, 2, 3, 4, 5, 6), (5, 7), (2**25, 1), (2**26, 1)]).save(path)
    image = path.read_bytes()
    last = bag_files.entry(image, "links", _state(image, 1, 2, 3, 4, 5))[1]
    previous, start, length = bag_files.entry(image, "items", last)
    assert previous != 0 and (start, length) == (2, 2)
    refuse(path, bag_files.with_entry(image, "items", last, w1=1), "two items overlap")
    repeated = bag_files.with_entry(image, "rare", 1, w0=2**25)
    refuse(path, repeated, "rare ids are out of order")


@pytest.mark.timeout(60, method="thread")  # a search that hangs is deaf to signals
def test_a_link_to_itself_that_decides_nothing_is_found(path):
    BagSegmenter([(1, 2, 3), (2, 4)]).save(path)
    image = path.read_bytes()
    state = _state(image, 1, 2)
    assert bag_files.entry(image, "links", state) == (_state(image, 2), 0, 1)
    path.write_bytes(bag_files.with_entry(image, "links", state, w0=state, w2=2))
    with pytest.raises(RuntimeError, match="links contradict each other"):
        BagSegmenter.load(path)([[1, 2, 9]], n_threads=1)


def test_items_and_tokens_that_lie(path, image):
    refuse(path, bag_files.with_entry(image, "items", 0, w2=2), "the first item is damaged")
    refuse(path, bag_files.with_entry(image, "items", 1, w0=1), "does not lie before it")
    refuse(path, bag_files.with_entry(image, "items", 1, w2=1), "an item is too short")
    refuse(path, bag_files.with_entry(image, "dense", 1, w0=2**31 - 1), "outside the alphabet")
    code = bag_files.entry(image, "dense", 1)[0]
    refuse(path, bag_files.with_entry(image, "dense", 2, w0=code), "two tokens share a code")
    refuse(path, bag_files.with_entry(image, "dense", 1, w0=0), "a code belongs to no token")
    refuse(path, bag_files.with_entry(image, "masked", 0, w0=1), "masked flags differ")
    refuse(path, bag_files.with_entry(image, "rare", 0, w0=1), "rare ids are out of order")
    refuse(path, bag_files.with_entry(image, "rare", 0, w0=2**31), "rare ids are out of order")


def test_random_damage(path):
    """Damage is an error or, where a right checksum was forged, a file that can be searched."""
    make, probes = (
        random.Random(1),
        [list(range(9)) * 3, [1, 2, 3, 4, 5] * 5 + [2**25] * 2],
    )
    images = []
    for matcher in reference.MATCHERS:
        BagSegmenter(ENTITIES, matcher=matcher, masked_ids=[0, 3]).save(path)
        images.append(path.read_bytes())
    n_refused = n_loaded = 0
    for trial in range(2400):
        image = images[trial % 3]
        data = bag_files.mutated(image, make)
        forged = trial % 2 == 1 and len(data) > 4
        if forged:
            data = bag_files.reseal(data)
        path.write_bytes(data)
        try:
            segmenter = BagSegmenter.load(path)
        except ValueError as error:
            assert str(error).startswith(f"{path}: ")
            n_refused += 1
            continue
        assert forged or data == image
        n_loaded += 1
        for row in probes:
            try:
                spans = segmenter([row]).spans(0)
            except RuntimeError as error:
                assert "links contradict each other" in str(error) and forged
                continue
            assert spans[0][0] == 0 and spans[-1][1] == len(row)
            assert all(a[1] == b[0] for a, b in pairwise(spans))
    assert n_refused > 2000 and n_loaded > 10


def test_a_damaged_pickle_is_an_error():
    data = bytearray(pickle.dumps(BagSegmenter(ENTITIES)))
    data[data.index(b"BGFBAGS") + 200] ^= 1
    with pytest.raises(ValueError, match="checksum"):
        pickle.loads(bytes(data))


def test_repeats_and_order_leave_the_bytes_alone():
    once = BagSegmenter(ENTITIES, masked_ids=[0, 7])
    again = BagSegmenter([*ENTITIES[::-1], *ENTITIES[3:], *ENTITIES[4:]], masked_ids=[7, 0])
    assert once.sha256 == again.sha256


def test_a_buffer_with_gaps_is_refused(image):
    with pytest.raises(ValueError, match="the buffer must be contiguous"):
        _C.BagAutomaton(memoryview(image * 2)[::2])
