"""Streams: what a sample is, that epochs are whole, that a run goes on exactly, and what is said about bad shards."""

import itertools
import json
import pickle
import re
import warnings
from collections import Counter

import numpy as np
import pytest
import torch
from support import shards as make

from dcdit.config import DataSection
from dcdit.data import StreamDataset, batches, create_dataset
from dcdit.data.stream.lanes import Deal, deal_out

SIZES = (5, 7, 3, 6, 5, 4)


@pytest.fixture(scope="module")
def latents(tmp_path_factory):
    """Thirty latents in six shards. The latent of row n is n everywhere."""
    return make.latent_shards(tmp_path_factory.mktemp("latents"), SIZES)


def stream(path, **options):
    defaults = {"held_out": 0, "flip": False, "num_classes": 3, "shuffle_buffer": 8, "size": 8}
    return StreamDataset(str(path), **{**defaults, **options})


def numbers(x):
    """Which latents a batch shows."""
    assert torch.equal(x.amin((1, 2, 3)), x.amax((1, 2, 3)))
    return x[:, 0, 0, 0].long().tolist()


def shown(data, stop, batch_size=4, **options):
    return [(numbers(x), y.tolist()) for x, y in batches(data, 0, stop, batch_size, **options)]


# --- samples --------------------------------------------------------------------------------------------------------


def test_images(tmp_path):
    data = stream(make.image_shards(tmp_path, (2, 1)))
    assert data.shape == (3, 8, 8) and data.class_names == ("cat", "dog", "fox") and not data.notes
    expected = {n: torch.from_numpy(make.pixels(n)).permute(2, 0, 1) for n in range(3)}
    found = {}
    for n in range(3):
        x, label = data[n]
        (row,) = (n for n, p in expected.items() if torch.equal(((x + 1) * 127.5).round().byte(), p))
        found[row] = label
    assert found == {0: 0, 1: 1, 2: 2}


def test_images_are_cropped_and_mirrored_at_random_while_training(tmp_path):
    make.image_shards(tmp_path, (1,))
    seen = {tuple(stream(tmp_path, flip=True)[n][0].flatten().tolist()) for n in range(20)}
    assert len(seen) == 2
    assert stream(tmp_path, size=4)[0][0].shape == (3, 4, 4)


def test_latents_with_a_scale(latents):
    data = stream(latents, scale=0.5)
    assert data.shape == (4, 8, 8) and data.class_names == ("0", "1", "2")
    assert json.loads(data.notes["latent_range"]) == [[0.0], [0.5]] and not stream(latents).notes
    x, label = data[0]
    (number,) = set(x.flatten().tolist())
    assert 2 * number % 3 == label


@pytest.mark.parametrize("kind", ["image", "npy", "text"])
def test_tars(tmp_path, kind):
    """Files of one name are a row. Labels are text in a tar: numbers, or names of classes."""
    value = ("jpg", lambda n: make.png(n)) if kind == "image" else ("npy", lambda n: make.npy(make.latent(n)))
    for shard in range(2):
        rows = range(3 * shard, 3 * shard + 3)
        label = ("cat", "dog", "fox") if kind == "text" else ("0", "1", "2")
        rest = (("cls", lambda n, names=label: f"{names[n % 3]}\n".encode()), ("json", lambda n: b"{not json"))
        members = [(f"{n}.{end}", content(n)) for n in rows for end, content in (value, *rest)]
        make.write_tar(tmp_path / f"{shard}.tar", members)
    data = stream(tmp_path, classes=["cat", "dog", "fox"] if kind == "text" else None)
    assert data.shape == ((3, 8, 8) if kind == "image" else (4, 8, 8))
    labels = Counter(data[n][1] for n in range(6))
    assert labels == {0: 2, 1: 2, 2: 2}
    if kind != "image":
        assert all(numbers(data[n][0][None])[0] % 3 == data[n][1] for n in range(6))


def test_arrays_of_datasets_own_type(tmp_path):
    from datasets import Array3D, Features, Value

    features = Features({"latents": Array3D((4, 8, 8), "float32"), "label": Value("int64")})
    rows = [{"latents": make.latent(n).tolist(), "label": 1} for n in range(2)]
    make.write_parquet(tmp_path / "a.parquet", rows, features)
    assert sorted(numbers(torch.stack([stream(tmp_path)[n][0] for n in range(2)]))) == [0, 1]


# --- the order ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"world": 2}, {"workers": 2}, {"world": 2, "workers": 2}])
@pytest.mark.parametrize("local_batch", [1, 4])
def test_an_epoch_shows_every_row_once(latents, local_batch, options):
    """Over all processes and loading processes; and no process reads a shard that another one reads."""
    world, workers = options.get("world", 1), options.get("workers", 0)
    seen, readers = Counter(), {}
    for rank in range(world):
        data = stream(latents)
        data.begin(local_batch, world, workers)
        places = [
            (k % max(workers, 1), data.place(n).tolist(), numbers(data[n][0][None])[0])
            for k in range(80 // local_batch)
            for n in range((k * world + rank) * local_batch, (k * world + rank + 1) * local_batch)
        ]
        for worker, (lane, _, epoch, *_), number in places:
            assert readers.setdefault(lane, (rank, worker)) == (rank, worker)
            if epoch == 0:
                seen[number] += 1
    assert seen == Counter(range(30))
    assert len(readers) == data.deal.lanes >= world * max(workers, 1)


def test_every_epoch_has_another_order(latents):
    first, second = ([numbers(stream(latents)[n][0][None])[0] for n in range(e * 30, e * 30 + 30)] for e in (0, 1))
    assert sorted(first) == sorted(second) == list(range(30)) and first != second != sorted(second)
    assert [numbers(stream(latents, seed=1)[n][0][None])[0] for n in range(30)] != first


def test_a_buffer_of_one_shuffles_the_shards_only(latents):
    found = [numbers(stream(latents, shuffle_buffer=1)[n][0][None])[0] for n in range(30)]
    assert sum(b == a + 1 for a, b in itertools.pairwise(found)) >= 24 and found != sorted(found)


def test_loading_processes_show_what_one_process_would(latents):
    data = stream(latents)
    data.begin(2, 2, 2)
    deal = data.state(lambda parts: parts)
    alone = stream(latents)
    alone.restore(deal, 0)
    expected = shown(alone, 12)
    for rank in (0, 1):
        for workers in (0, 2):
            part = stream(latents)
            part.restore(deal, 0)
            found = shown(part, 12, rank=rank, world=2, workers=workers)
            assert found == [(x[2 * rank : 2 * rank + 2], y[2 * rank : 2 * rank + 2]) for x, y in expected]


def test_a_deal_gives_every_reader_lanes_of_its_own():
    assert deal_out(shards=100, local_batch=32, readers=4, rows=800) == Deal(lanes=32, run=4, block=100)
    assert deal_out(shards=12, local_batch=32, readers=4, rows=800) == Deal(lanes=8, run=16, block=400)
    assert deal_out(shards=5, local_batch=32, readers=8, rows=800) == Deal(lanes=4, run=32, block=800)
    deal = Deal(lanes=3, run=2, block=1)
    assert [deal.lane_of(n) for n in range(8)] == [(0, 0), (0, 1), (1, 0), (1, 1), (2, 0), (2, 1), (0, 2), (0, 3)]
    for n in range(20):
        assert [deal.dealt(lane, n) for lane in range(3)] == [
            sum(deal.lane_of(m)[0] == lane for m in range(n)) for lane in range(3)
        ]


def test_fewer_shards_than_loading_processes(latents):
    """They read the same shards, with a warning, and still show every row once."""
    data = stream(latents)
    with pytest.warns(UserWarning, match=r"8 processes read 4 of 6 shards at a time, so several read the same"):
        data.begin(2, 4, 2)
    seen = [numbers(data[n][0][None])[0] for n in range(200) if data.place(n)[2] == 0]
    assert Counter(seen) == Counter(range(30))


# --- going on -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("stop", [1, 3, 8, 15], ids=lambda stop: f"after-{stop}")
def test_a_stream_goes_on_exactly(latents, workers, stop):
    """With the same loading processes or others; 15 batches are two epochs. What is loaded ahead does not count."""
    whole = shown(stream(latents), 20, workers=workers)
    data = stream(latents)
    loading = batches(data, 0, 20, 4, workers=workers)
    before = [(numbers(x), y.tolist()) for _, (x, y) in zip(range(stop), loading, strict=False)]
    state = json.loads(json.dumps(data.state(lambda parts: parts)))
    loading.close()
    for now in {workers, 0}:
        again = stream(latents)
        again.restore(state, stop * 4)
        after = [(numbers(x), y.tolist()) for x, y in batches(again, stop, 20, 4, workers=now)]
        assert before + after == whole
        again.restore(again.state(lambda parts: parts), 80)


@pytest.mark.parametrize("workers", [0, 2])
def test_two_processes_go_on_as_one(latents, workers):
    ranks = [stream(latents) for _ in range(2)]
    before = [shown(data, 5, rank=rank, world=2, workers=workers) for rank, data in enumerate(ranks)]
    parts = [part for data in ranks for part in _parts(data)]
    state = ranks[0].state(lambda own: parts)
    assert state == ranks[1].state(lambda own: parts)
    whole = stream(latents)
    whole.begin(2, 2, workers)
    expected = shown(whole, 12)
    assert [(a[0] + b[0], a[1] + b[1]) for a, b in zip(*before, strict=True)] == expected[:5]
    again = stream(latents)
    again.restore(state, 20)
    assert [(numbers(x), y.tolist()) for x, y in batches(again, 5, 12, 4)] == expected[5:]


def _parts(data):
    gathered = []
    data.state(lambda own: gathered.extend(own) or own)
    return gathered


def test_to_go_on_reads_one_block_again(latents, monkeypatch):
    data = stream(latents, shuffle_buffer=2)
    read = list(batches(data, 0, 5, 4))[-1]
    state = data.state(lambda parts: parts)
    again = stream(latents, shuffle_buffer=2)
    again.restore(state, 16)
    rows, found = again.source.rows, []
    monkeypatch.setattr(again.source, "rows", lambda *arguments: (found.append(1) or row for row in rows(*arguments)))
    assert len(list(batches(again, 4, 5, 4))) == 1 and len(read) == 2
    assert len(found) <= 4 * 4


def test_other_shards_begin_anew(latents, tmp_path):
    data = stream(latents)
    shown(data, 3)
    state = data.state(lambda parts: parts)
    other = stream(make.latent_shards(tmp_path, (4, 4)))
    with pytest.warns(UserWarning, match="not the shards of the checkpoint, so they are read from the first epoch on"):
        other.restore(state, 12)
    assert sorted(n for x, _ in batches(other, 3, 5, 4) for n in numbers(x)) == list(range(8))


@pytest.mark.parametrize(
    "change",
    [
        {"lanes": 0},
        {"lanes": 7},
        {"lanes": 1 << 60},
        {"run": 0},
        {"block": "all"},
        {"block": 1_000_001},
        {"places": []},
        {"places": [[0, 0, 0]]},
        {"places": [[0, 0, 0, -1]] * 4},
        {"places": None},
    ],
)
def test_states_that_no_run_writes(latents, change):
    data = stream(latents)
    data.begin(4, 1, 0)
    state = {**data.state(lambda parts: parts), **change}
    with pytest.raises(ValueError, match=r"the checkpoint has the stream .*accepted: what dcdit train writes"):
        data.restore(state, 4)


def test_a_stream_can_be_sent_to_another_process(latents, tmp_path):
    for data in (
        stream(latents),
        stream(make.write_tar(tmp_path / "a.tar", [("0.png", make.png(0)), ("0.cls", b"1")])),
    ):
        assert torch.equal(pickle.loads(pickle.dumps(data))[0][0], data[0][0])


# --- held out -------------------------------------------------------------------------------------------------------


def test_whole_shards_are_held_out(latents):
    train, held = (stream(latents, split=split, held_out=0.01) for split in ("train", "held_out"))
    assert len(held.shards) == 1 and sorted(train.shards + held.shards) == list(range(6))
    rows = SIZES[held.shards[0]]
    other = stream(latents, split="held_out", held_out=0.01, seed=5)
    first = [numbers(held[n][0][None])[0] for n in range(rows)]
    assert first == list(range(first[0], first[0] + rows)) == [numbers(other[n][0][None])[0] for n in range(rows)]
    assert not set(first) & {numbers(train[n][0][None])[0] for n in range(30 - rows)}


def test_shards_of_their_own_are_held_out(latents, tmp_path):
    make.latent_shards(tmp_path, (3,))
    section = DataSection(kind="stream", path=str(latents), held_out_path=str(tmp_path), size=8)
    train, held = (create_dataset(section, split, num_classes=3) for split in ("train", "held_out"))
    assert len(train.shards) == 6 and [numbers(held[n][0][None])[0] for n in range(4)] == [0, 1, 2, 0]


def test_too_few_shards_to_hold_one_out(tmp_path):
    make.latent_shards(tmp_path, (9,))
    with pytest.raises(ValueError, match=r"has 1 shards, none of them in split 'train'.*data\.held_out_path"):
        stream(tmp_path, held_out=0.1)


# --- what is damaged ------------------------------------------------------------------------------------------------


def test_damaged_rows_are_named_and_left_out(tmp_path):
    rows = [make.image_row(n) for n in range(6)]
    rows[1]["image"] = {"bytes": b"not an image", "path": None}
    rows[2]["image"] = {"bytes": None, "path": "/etc/hostname"}
    rows[3]["label"] = None
    file = make.write_parquet(tmp_path / "a.parquet", rows, make.FEATURES)
    with pytest.raises(ValueError, match=rf"{file}, row group 0, row \d"):
        [stream(file)[n] for n in range(6)]
    data = stream(file, skip_damaged=True)
    with pytest.warns(UserWarning, match="skipped: ") as warned:
        assert {data[n][1] for n in range(12)} == {0, 1, 2}
    said = sorted(str(warning.message) for warning in warned)
    assert len(said) == 3 and {message.rpartition("(")[2] for message in said} == {f"{i} so far)" for i in (1, 2, 3)}
    assert "row 1, image': it is damaged or of another format" in "".join(said)
    assert "row 2: image is the path '/etc/hostname'; accepted: the content of an image" in "".join(said)
    assert "row 3: label is None; accepted: 0 to 2" in "".join(said)


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"latent": make.latent(0).tolist(), "label": 3}, "label is 3; accepted: 0 to 2"),
        ({"latent": make.latent(0).tolist(), "label": -1}, "label is -1; accepted: 0 to 2"),
        ({"latent": (make.latent(0) + np.nan).tolist(), "label": 0}, "not finite"),
        ({"latent": make.latent(0)[:, :4].tolist(), "label": 0}, r"latent is \(4, 4, 8\); accepted: \(4, 8, 8\)"),
        ({"latent": [[[1.0], [1.0, 2.0]]], "label": 0}, "row 4"),
        ({"latent": None, "label": 0}, "latent is None; accepted: an image file, or a latent"),
    ],
)
def test_damaged_latents(tmp_path, row, says):
    rows = [{"latent": make.latent(n).tolist(), "label": 0} for n in range(4)]
    make.write_parquet(tmp_path / "a.parquet", [*rows, row])
    with pytest.raises(ValueError, match=says) as error:
        [stream(tmp_path)[n] for n in range(5)]
    assert "a.parquet, row group 0, row 4" in str(error.value) and "\n" not in str(error.value)
    data = stream(tmp_path, skip_damaged=True)
    with pytest.warns(UserWarning, match=says):
        assert {numbers(data[n][0][None])[0] for n in range(5)} == {0, 1, 2, 3}


def test_pickles_in_tars_are_not_loaded(tmp_path):
    header = b"{'descr': '|O', 'fortran_order': False, 'shape': (1,), }".ljust(117) + b"\n"
    bad = b"\x93NUMPY\x01\x00\x76\x00" + header + b"cos\nsystem\n."
    rows = [[("npy", array), ("cls", b"1"), ("pkl", b"cos\nsystem\n.")] for array in (make.npy(make.latent(0)), bad)]
    make.write_tar(tmp_path / "a.tar", [(f"{n}.{end}", content) for n, row in enumerate(rows) for end, content in row])
    with pytest.raises(ValueError, match=r"a\.tar, row 1: it holds Python objects"):
        [stream(tmp_path)[n] for n in range(2)]


@pytest.mark.parametrize("kind", ["parquet", "tar"])
def test_the_rest_of_a_damaged_shard_is_left_out(tmp_path, kind):
    """Also when a run goes on in front of the damage."""
    for shard in range(2):
        rows = range(100 * shard, 100 * shard + 100)
        if kind == "tar":
            fields = [((f"{n}.npy", make.npy(make.latent(n))), (f"{n}.cls", b"1")) for n in rows]
            file = make.write_tar(tmp_path / f"{shard}.tar", [part for both in fields for part in both])
        else:
            rng = np.random.default_rng(shard)
            values = [{"latent": (make.latent(n) + 0 * rng.random((4, 8, 8))).tolist(), "label": 1} for n in rows]
            file = make.write_parquet(tmp_path / f"{shard}.parquet", values)
    content = bytearray(file.read_bytes())
    if kind == "tar":
        file.write_bytes(content[: 512 * (len(content) // 1024) - 100])
    else:
        content[len(content) // 3 : len(content) // 2] = bytes(len(content) // 2 - len(content) // 3)
        file.write_bytes(content)
    with pytest.raises(ValueError, match=rf"cannot read {re.escape(str(file))}.* from row \d+ on: "):
        [stream(tmp_path)[n] for n in range(200)]
    data = stream(tmp_path, skip_damaged=True)
    with pytest.warns(UserWarning, match=r"skipped: cannot read .* from row \d+ on: .*\(1 so far\)"):
        whole = shown(data, 60)
    found = {n for x, _ in whole for n in x}
    assert set(range(100)) <= found and (kind == "parquet" or 100 in found)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for stop in (11, 12, 13):
            data = stream(tmp_path, skip_damaged=True)
            assert shown(data, stop) == whole[:stop]
            again = stream(tmp_path, skip_damaged=True)
            again.restore(data.state(lambda parts: parts), 4 * stop)
            assert [(numbers(x), y.tolist()) for x, y in batches(again, stop, 60, 4)] == whole[stop:]


def test_shards_without_a_row_that_can_be_read(tmp_path):
    make.write_parquet(tmp_path / "a.parquet", [{"latent": None, "label": 0}] * 3)
    with (
        pytest.warns(UserWarning, match="skipped"),
        pytest.raises(ValueError, match=r"none of the first .* can be read"),
    ):
        stream(tmp_path, skip_damaged=True)


# --- what is refused ------------------------------------------------------------------------------------------------


def test_shards_of_one_kind_and_one_split(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no shards at .*accepted: a folder of \.parquet or \.tar"):
        stream(tmp_path)
    make.write_parquet(tmp_path / "train-00000.parquet", [{"latent": make.latent(0).tolist(), "label": 0}] * 2)
    make.write_parquet(tmp_path / "validation-00000.parquet", [{"latent": make.latent(1).tolist(), "label": 0}])
    (tmp_path / ".hidden.parquet").write_bytes(b"")
    with pytest.raises(ValueError, match=r"several splits \(train, validation\); accepted: .*/train\*"):
        stream(tmp_path)
    assert numbers(stream(tmp_path / "train-*.parquet")[0][0][None]) == [0]
    make.write_tar(tmp_path / "a.tar", [("0.png", b"")])
    with pytest.raises(ValueError, match=r"holds \.parquet and \.tar files; accepted: one kind"):
        stream(tmp_path)


@pytest.mark.parametrize(("name", "content"), [("a.parquet", b"nothing"), ("a.tar", b"nothing"), ("a.tar", b"")])
def test_files_that_are_no_shards(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=rf"not readable as shards \(.*{name}, \.\.\.\): ") as error:
        stream(tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"column": "pixels"}, r"no column 'pixels' \(data\.column\); accepted: image, label, id"),
        ({"label_column": "lable"}, r"no column 'lable' .*did you mean 'label'\?"),
        (
            {"label_column": "id", "num_classes": None},
            r"how many classes column 'id' has; accepted: model\.num_classes",
        ),
        ({"num_classes": 2}, r"has 3 classes; model\.num_classes is 2"),
        ({"classes": ["a", "a"]}, "two classes of 'label' have one name"),
    ],
)
def test_columns(tmp_path, options, says):
    make.image_shards(tmp_path, (2,))
    with pytest.raises(ValueError, match=says):
        stream(tmp_path, **options)


def test_columns_that_are_not_found(tmp_path):
    make.write_parquet(tmp_path / "a.parquet", [{"x": make.latent(0).tolist(), "label": 0, "class": 1}])
    with pytest.raises(
        ValueError, match=r"data\.column is null and no column has a usual name; accepted: one of x, la"
    ):
        stream(tmp_path)
    with pytest.raises(ValueError, match=r"data\.label_column is null and several columns may be it \(label, class\)"):
        stream(tmp_path, column="x")
    assert stream(tmp_path, column="x", label_column="class")[0][1] == 1


def test_names_of_classes(tmp_path):
    make.write_parquet(tmp_path / "a.parquet", [{"latent": make.latent(0).tolist(), "label": "dog"}])
    with pytest.raises(ValueError, match=r"label is 'dog'; accepted: 0 to 2, or names listed in data\.classes"):
        stream(tmp_path)[0]
    data = stream(tmp_path, classes=["cat", "dog"], num_classes=None)
    assert data.class_names == ("cat", "dog") and data[0][1] == 1


def test_without_datasets(tmp_path, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'dcdit\[stream\]'"):
        stream(tmp_path)


def test_a_network_that_fails_is_no_damage():
    from dcdit.data.stream.shards import is_damage

    assert is_damage("/a.tar", OSError()) and is_damage("hf://a.tar", ValueError())
    assert not is_damage("hf://a.tar", OSError()) and not is_damage("https://a.tar", RuntimeError())
