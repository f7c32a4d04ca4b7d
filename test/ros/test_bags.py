"""Bags of all storages, written and read back; every way in which a bag can be the wrong one, or damaged."""

from __future__ import annotations

import io
import random
import shutil
import sqlite3
import struct
import sys
import tracemalloc
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("rosbags", reason="rosbags is not installed: pip install 'scfeat-python[bags]'")

import lz4.frame  # type: ignore[import-untyped]
from rosbags.rosbag1 import Writer as Ros1Writer
from rosbags.typesys import Stores, get_typestore

from scfeat_core.errors import DataError
from scfeat_ros.bags import (
    CAMERA_INFO,
    COMPRESSED_IMAGE,
    IMAGE,
    STORAGES,
    BagMessage,
    Topic,
    header_frame,
    header_stamp,
    of_one_camera,
    open_bag,
    write_bag,
)
from scfeat_ros.images import image_to_array

STORE = get_typestore(Stores.ROS2_HUMBLE)
START = 1_700_000_000_123_456_789
STEP = 100_000_000


def header(stamp: int, frame: str = "camera_optical_frame"):
    time = STORE.types["builtin_interfaces/msg/Time"](*divmod(stamp, 1_000_000_000))
    return STORE.types["std_msgs/msg/Header"](time, frame)


def image(stamp: int, value: int = 0, shape: tuple[int, int] = (24, 32), frame: str = "camera_optical_frame") -> bytes:
    height, width = shape
    pixels = np.full(height * width, value, np.uint8)
    message = STORE.types[IMAGE](header(stamp, frame), height, width, "mono8", 0, width, pixels)
    return bytes(STORE.serialize_cdr(message, IMAGE))


def text(stamp: int) -> bytes:
    return bytes(STORE.serialize_cdr(STORE.types["std_msgs/msg/String"](str(stamp)), "std_msgs/msg/String"))


def tiny_bag(path: Path, storage: str, compression: str | None = None, frames: int = 12) -> list[BagMessage]:
    """A bag with an image topic, a shorter one, and a text."""
    messages = []
    for i in range(frames):
        at = START + i * STEP
        # recorded a little after it was stamped, as on a robot
        messages.append(BagMessage("/cam/image_raw", at + 5_000_000, image(at, i % 256)))
        messages.append(BagMessage("/chatter", at + 6_000_000, text(at)))
        if i % 2 == 0:
            messages.append(BagMessage("/other/image", at + 7_000_000, image(at, 200)))
    types = {"/cam/image_raw": IMAGE, "/other/image": IMAGE, "/chatter": "std_msgs/msg/String"}
    write_bag(path, types, messages, storage, compression)
    return messages


@pytest.mark.parametrize(
    ("storage", "compression"),
    [
        ("mcap", None),
        ("mcap", "message"),
        ("mcap", "file"),
        ("mcap", "storage"),
        ("sqlite3", None),
        ("sqlite3", "message"),
        ("sqlite3", "file"),
    ],
)
def test_messages_come_back_as_they_were_written(tmp_path: Path, storage: str, compression: str | None) -> None:
    written = tiny_bag(tmp_path / "bag", storage, compression)
    with open_bag(tmp_path / "bag") as bag:
        topic, why = bag.choose_image_topic()
        assert topic == Topic("/cam/image_raw", IMAGE, 12)
        assert "/other/image (6)" in why
        assert "--topic" in why
        read = list(bag.messages([topic]))
    assert read == [m for m in written if m.topic == "/cam/image_raw"]
    assert [header_stamp(m.data) for m in read] == [START + i * STEP for i in range(12)]


def test_depth_maps_are_chosen_only_where_there_is_nothing_else(tmp_path: Path) -> None:
    """They are told by their name, or by their encoding."""
    shades = image(START)
    depth = STORE.deserialize_cdr(shades, IMAGE)
    depth.encoding, depth.width, depth.step = "16UC1", 16, 32
    depth_map = bytes(STORE.serialize_cdr(depth, IMAGE))
    topics = {"/a/range": depth_map, "/aligned_depth/image": shades, "/z/infra": shades}
    for name in ("all", "depth"):
        chosen = {topic: data for topic, data in topics.items() if name == "all" or topic != "/z/infra"}
        messages = [BagMessage(topic, START, data) for topic, data in chosen.items()]
        write_bag(tmp_path / name, dict.fromkeys(chosen, IMAGE), messages)
    with open_bag(tmp_path / "all") as bag:
        topic, why = bag.choose_image_topic()
        assert topic.name == "/z/infra" and "/a/range (1)" in why and "--topic" in why
    with open_bag(tmp_path / "depth") as bag:
        assert bag.choose_image_topic()[0].name == "/a/range"


def test_several_topics_come_in_the_order_of_recording(tmp_path: Path) -> None:
    written = tiny_bag(tmp_path / "bag", "sqlite3")
    with open_bag(tmp_path / "bag") as bag:
        assert list(bag.messages(bag.topics)) == written


@pytest.mark.parametrize("storage", STORAGES)
def test_a_storage_file_that_lost_its_metadata_is_read(tmp_path: Path, storage: str) -> None:
    tiny_bag(tmp_path / "bag", storage)
    (tmp_path / "bag" / "metadata.yaml").unlink()
    (file,) = (tmp_path / "bag").iterdir()
    for path in (tmp_path / "bag", file):
        with open_bag(path) as bag:
            assert [topic.count for topic in bag.image_topics] == [12, 6]


def test_header_stamp_knows_both_byte_orders() -> None:
    assert header_stamp(b"\x00\x01\x00\x00" + struct.pack("<iI", 3, 7) + b"\x00") == 3_000_000_007
    assert header_stamp(b"\x00\x00\x00\x00" + struct.pack(">iI", 3, 7) + b"\x00") == 3_000_000_007
    with pytest.raises(DataError, match="found 4 bytes"):
        header_stamp(b"\x00\x01\x00\x00")


def test_topic_by_name_and_camera_info_beside_it(tmp_path: Path) -> None:
    raw, jpeg = Topic("/a/image", IMAGE, 3), Topic("/b/image/compressed", COMPRESSED_IMAGE, 2)
    assert (raw.image_name, jpeg.image_name) == ("/a/image", "/b/image")
    tiny_bag(tmp_path / "bag", "mcap")
    with open_bag(tmp_path / "bag") as bag:
        assert bag.choose_image_topic("/other/image")[0].count == 6
        assert bag.camera_info_topic(raw) is None


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="found nothing there"):
        open_bag(tmp_path / "missing")


def test_a_folder_that_is_no_bag(tmp_path: Path) -> None:
    (tmp_path / "photo.jpg").write_bytes(b"x")
    with pytest.raises(DataError, match=r"metadata\.yaml.*photo\.jpg.*reindex"):
        open_bag(tmp_path)


def test_a_file_that_is_no_bag(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_bytes(b"#ROSBAG V2.0")
    with pytest.raises(DataError, match=r"\.mcap or \.db3"):
        open_bag(tmp_path / "notes.txt")
    text, zeros = b"#ROSBAG V1.2\nand more", bytes(4096)
    for name, content, found in (
        ("a.mcap", b"", "an .mcap file.*found an empty file"),
        ("a.mcap", text, "an .mcap file.*found something else.*#ROSBAG.*no .mcap"),
        ("a.mcap", zeros, "an .mcap file.*found something else"),
        ("a.mcap", b"\x89MCAP0\r\n", "an .mcap file.*truncated after 8 bytes"),
        ("a.db3", b"", "rosbag2 database.*found an empty file"),
        ("a.db3", text, "rosbag2 database.*found text.*no database"),
        ("a.db3", zeros, "rosbag2 database.*found it damaged or truncated, or another one"),
        ("a.bag", b"", "ROS 1 bag of version 2.0.*found an empty file"),
        ("a.bag", text, "ROS 1 bag of version 2.0.*found another beginning.*rosbag fix"),
        ("a.bag", b"#ROSBAG V", "ROS 1 bag of version 2.0.*truncated after 9 bytes"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match=found), open_bag(tmp_path / name):
            pass


def test_no_image_topic_lists_what_there_is(tmp_path: Path) -> None:
    write_bag(tmp_path / "bag", {"/chatter": "std_msgs/msg/String"}, [BagMessage("/chatter", START, text(START))])
    with open_bag(tmp_path / "bag") as bag:
        with pytest.raises(DataError, match=r"/chatter \[std_msgs/msg/String\] 1"):
            bag.choose_image_topic()
        with pytest.raises(DataError, match=r"'/cam'.*/chatter"):
            bag.choose_image_topic("/cam")


def test_an_empty_bag(tmp_path: Path) -> None:
    write_bag(tmp_path / "bag", {}, [])
    with open_bag(tmp_path / "bag") as bag, pytest.raises(DataError, match="the bag is empty"):
        bag.choose_image_topic()


@pytest.mark.parametrize("folder", [True, False], ids=["folder", "file"])
@pytest.mark.parametrize("compression", [None, "storage"])
def test_a_recording_that_was_cut_off_is_read_up_to_there(
    tmp_path: Path, folder: bool, compression: str | None
) -> None:
    written = tiny_bag(tmp_path / "bag", "mcap", compression, frames=4000)
    file = tmp_path / "bag" / "bag.mcap"
    file.write_bytes(file.read_bytes()[: round(0.7 * file.stat().st_size)])
    with open_bag(tmp_path / "bag" if folder else file) as bag:
        assert "ends in the middle" in bag.damage
        topic, _ = bag.choose_image_topic()
        kept = list(bag.messages([topic]))
    assert 1000 < len(kept) < 4000
    assert kept == [message for message in written if message.topic == "/cam/image_raw"][: len(kept)]


def test_a_complete_file_is_not_called_cut(tmp_path: Path) -> None:
    tiny_bag(tmp_path / "bag", "mcap")
    file = tmp_path / "bag" / "bag.mcap"
    with open_bag(tmp_path / "bag") as bag:
        list(bag.messages(bag.topics))
        assert bag.damage == ""
    file.write_bytes(file.read_bytes()[:12])
    with pytest.raises(DataError, match="truncated after 12 bytes"), open_bag(tmp_path / "bag"):
        pass


def test_without_the_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_bag(tmp_path / "bag", "mcap")
    monkeypatch.setitem(sys.modules, "rosbags.rosbag2", None)
    monkeypatch.setitem(sys.modules, "rosbags", None)
    with pytest.raises(DataError, match=r"pip install 'scfeat-python\[bags\]'"):
        open_bag(tmp_path / "bag")


def test_writing_refuses_what_it_cannot_do(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="storage of mcap, sqlite3"):
        write_bag(tmp_path / "bag", {}, [], storage="zip")
    with pytest.raises(DataError, match="found one"):
        write_bag(tmp_path, {}, [])


# -------------------------------------------------------------------------------------------------------------- damage


def read_twice(path: Path, name: str = "/cam/image_raw") -> tuple[list[BagMessage], str]:
    """The messages of a topic, and the damage; the same each time, whoever reads, and however often."""
    found = []
    for _ in range(2):
        with open_bag(path) as bag:
            topics = [topic for topic in bag.topics if topic.name == name]
            messages = list(bag.messages(topics))
            once = bag.damage
            assert list(bag.messages(topics)) == messages
            assert bag.damage == once
            found.append((messages, once))
    assert found[0] == found[1]
    return found[0]


def overwrite(file: Path, at: int, size: int, value: bytes = b"\xff") -> None:
    data = bytearray(file.read_bytes())
    data[at : at + size] = value * size
    file.write_bytes(data)


def cut(file: Path, share: float) -> None:
    file.write_bytes(file.read_bytes()[: round(share * file.stat().st_size)])


def chunks(file: Path) -> list[Any]:
    """Where the chunks of an .mcap are."""
    with open_bag(file) as bag:
        return list(bag._files[0]._blocks)  # type: ignore[attr-defined]


def of(messages: Sequence[BagMessage], topic: str = "/cam/image_raw") -> list[BagMessage]:
    return [message for message in messages if message.topic == topic]


def check_gap(kept: Sequence[BagMessage], written: Sequence[BagMessage], most: int) -> None:
    """All that was kept is as it was written, from both sides of one gap of at most ``most`` messages."""
    assert 0 < len(written) - len(kept) <= most
    first = next((i for i, (a, b) in enumerate(zip(kept, written, strict=False)) if a != b), len(kept))
    assert 0 < first < len(kept)
    assert list(kept) == [*written[:first], *written[len(written) - len(kept) + first :]]


@pytest.mark.parametrize("value", [b"\xff", b"\x00", b"\x05"])
def test_damage_within_a_chunk_costs_the_messages_there(tmp_path: Path, value: bytes) -> None:
    written = of(tiny_bag(tmp_path / "bag", "mcap", frames=3000))
    file = tmp_path / "bag" / "bag.mcap"
    overwrite(file, file.stat().st_size // 2, 8192, value)
    kept, damage = read_twice(tmp_path / "bag")
    check_gap(kept, written, 12)
    lost = len(written) - len(kept)
    assert f"{lost} on /cam/image_raw" in damage
    assert "bytes in the chunk at" in damage
    assert f"{len(kept)} of 3000 messages on /cam/image_raw can be read" in damage


def test_damage_within_a_compressed_chunk_costs_the_chunk(tmp_path: Path) -> None:
    written = of(tiny_bag(tmp_path / "bag", "mcap", "storage", frames=4000))
    file = tmp_path / "bag" / "bag.mcap"
    block = chunks(file)[2]
    overwrite(file, block.at + block.size // 2, 64)
    kept, damage = read_twice(tmp_path / "bag")
    check_gap(kept, written, 1100)
    assert f"messages {len(written) - len(kept)} on /cam/image_raw, " in damage
    assert "on /chatter" in damage


def test_damaged_and_cut_off_at_once(tmp_path: Path) -> None:
    written = of(tiny_bag(tmp_path / "bag", "mcap", frames=6000))
    file = tmp_path / "bag" / "bag.mcap"
    cut(file, 0.8)
    overwrite(file, file.stat().st_size // 3, 8192)
    kept, damage = read_twice(tmp_path / "bag")
    check_gap(kept, written[: written.index(kept[-1]) + 1], 12)
    assert len(kept) > 4500
    assert "ends in the middle" in damage
    assert "broken records" in damage


def test_the_header_of_a_chunk_is_damaged_and_the_index_is_gone(tmp_path: Path) -> None:
    """The next chunk is found by looking for one."""
    written = of(tiny_bag(tmp_path / "bag", "mcap", "storage", frames=6000))
    file = tmp_path / "bag" / "bag.mcap"
    at = chunks(file)[2].at
    overwrite(file, at, 20)
    cut(file, 0.9)
    kept, damage = read_twice(file)
    check_gap(kept, written[: written.index(kept[-1]) + 1], 1100)
    assert f"damaged bytes of bag.mcap at {at}" in damage


def index_records(file: Path, block: Any) -> list[tuple[int, int]]:
    """Where each record of the index behind a chunk begins and ends."""
    data, at, found = file.read_bytes(), block.at + block.size, []
    while data[at] == 7:
        found.append((at, at + 9 + struct.unpack_from("<Q", data, at + 1)[0]))
        at = found[-1][1]
    return found


def readable(file: Path, written: Sequence[BagMessage]) -> tuple[int, ...]:
    """How many messages on each topic come out, which are the first ones that were written."""
    with open_bag(file) as bag:
        kept = [list(bag.messages([topic])) for topic in bag.topics]
    assert all(part == of(written, part[0].topic)[: len(part)] for part in kept)
    return tuple(map(len, kept))


def test_a_chunk_counts_whose_index_is_cut_off(tmp_path: Path) -> None:
    """Wherever in the index behind it the file ends, all of the chunk comes out."""
    written = tiny_bag(tmp_path / "bag", "mcap", "storage", frames=2000)
    file = tmp_path / "bag" / "bag.mcap"
    data, block = file.read_bytes(), chunks(file)[1]
    records = index_records(file, block)
    file = tmp_path / "alone.mcap"
    found = set()
    for size in [block.at + block.size, *(place for begin, end in records for place in (begin + 5, end - 5, end))]:
        file.write_bytes(data[:size])
        found.add(readable(file, written))
    ((images_of, texts, others),) = found
    assert len(records) == 3 and images_of > 1500 and texts > 1500 and others > 750
    assert losses(file) == (images_of, None, None, True)


@pytest.mark.parametrize(("byte", "value"), [(0, b"\x0c"), (9, b"\x77"), (3, b"\x77")], ids=["kind", "channel", "size"])
def test_a_damaged_record_of_an_index_costs_no_messages(tmp_path: Path, byte: int, value: bytes) -> None:
    """Where nothing but the index behind a chunk counts its messages."""
    written = tiny_bag(tmp_path / "bag", "mcap", frames=2000)
    file = tmp_path / "bag" / "bag.mcap"
    records = index_records(file, chunks(file)[1])
    data = file.read_bytes()[: round(0.99 * file.stat().st_size)]
    file = tmp_path / "alone.mcap"
    file.write_bytes(data)
    whole = readable(file, written)
    for begin, _ in records:
        file.write_bytes(data)
        overwrite(file, begin + byte, 1, value)
        assert readable(file, written) == whole


def test_messages_of_a_damaged_chunk_whose_index_is_cut_off_are_not_counted(tmp_path: Path) -> None:
    tiny_bag(tmp_path / "bag", "mcap", "storage", frames=2000)
    file = tmp_path / "bag" / "bag.mcap"
    block = chunks(file)[1]
    _, end = index_records(file, block)[0]
    (tmp_path / "bag" / "metadata.yaml").unlink()
    overwrite(file, block.at + block.size // 2, 64)
    file.write_bytes(file.read_bytes()[:end])
    _, damage = read_twice(file)
    assert "with an unknown number of messages" in damage


def test_a_damaged_index_is_done_without(tmp_path: Path) -> None:
    written = of(tiny_bag(tmp_path / "bag", "mcap", frames=3000))
    file = tmp_path / "bag" / "bag.mcap"
    overwrite(file, file.stat().st_size - 300, 40)
    kept, damage = read_twice(tmp_path / "bag")
    assert kept == written
    assert "the index of bag.mcap is damaged" in damage


@pytest.mark.parametrize("storage", STORAGES)
def test_a_corrupted_compressed_message_costs_only_itself(tmp_path: Path, storage: str) -> None:
    written = of(tiny_bag(tmp_path / "bag", storage, "message"))
    (file,) = (path for path in (tmp_path / "bag").iterdir() if path.suffix != ".yaml")
    data = file.read_bytes()
    with open_bag(tmp_path / "bag") as bag:
        numbers = [n for n, c in bag._files[0].channels.items() if c.topic == "/cam/image_raw"]
        packed = [record.data for record in bag._files[0].messages(set(numbers))][5]
    assert data.count(packed) == 1
    overwrite(file, data.index(packed) + 4, len(packed) - 4)
    kept, damage = read_twice(tmp_path / "bag")
    assert kept == written[:5] + written[6:]
    assert f"a message on /cam/image_raw at {written[5].log_time} ns is damaged" in damage


@pytest.mark.parametrize("share", [0.3, 0.5, 0.95])
def test_a_truncated_database_is_read_up_to_there(tmp_path: Path, share: float) -> None:
    written = of(tiny_bag(tmp_path / "bag", "sqlite3", frames=2000))
    cut(tmp_path / "bag" / "bag.db3", share)
    kept, damage = read_twice(tmp_path / "bag")
    assert len(kept) > 0.8 * share * len(written)
    # SQLite fills its pages nearly in order
    assert kept[: len(kept) - 20] == written[: len(kept) - 20]
    stamps = {message.log_time for message in kept}
    assert kept == [message for message in written if message.log_time in stamps]
    assert f"{len(kept)} of 2000 messages on /cam/image_raw can be read" in damage
    assert "bag.db3 is damaged" in damage


def test_a_damaged_page_of_a_database_costs_its_rows(tmp_path: Path) -> None:
    written = of(tiny_bag(tmp_path / "bag", "sqlite3", frames=2000))
    file = tmp_path / "bag" / "bag.db3"
    data = file.read_bytes()
    overwrite(file, data.index(written[1000].data) // 4096 * 4096, 8192)
    kept, damage = read_twice(tmp_path / "bag")
    check_gap(kept, written, 20)
    assert f"{len(kept)} of 2000 messages on /cam/image_raw can be read" in damage


def test_large_rows_of_a_damaged_database(tmp_path: Path) -> None:
    """Images fill many pages: the row is found, and then not its end."""
    at = [START + i * STEP for i in range(20)]
    written = [BagMessage("/cam/image_raw", stamp, image(stamp, i, (120, 160))) for i, stamp in enumerate(at)]
    write_bag(tmp_path / "bag", {"/cam/image_raw": IMAGE}, written, "sqlite3")
    file = tmp_path / "bag" / "bag.db3"
    overwrite(file, file.stat().st_size // 2 // 4096 * 4096, 4096)
    kept, damage = read_twice(tmp_path / "bag")
    check_gap(kept, written, 2)
    assert "messages on /cam/image_raw cannot be read" in damage


def test_a_database_whose_recorder_was_killed(tmp_path: Path) -> None:
    """The last rows are in the log beside the file."""
    tiny_bag(tmp_path / "bag", "sqlite3")
    file = tmp_path / "bag" / "bag.db3"
    writer = sqlite3.connect(file)
    writer.execute("PRAGMA journal_mode = WAL")
    writer.execute("INSERT INTO messages SELECT NULL, topic_id, timestamp + 10000000000, data FROM messages")
    writer.commit()
    copied = tmp_path / "killed"
    shutil.copytree(tmp_path / "bag", copied)
    writer.close()
    kept, _ = read_twice(copied)
    assert len(kept) == 24


@pytest.mark.parametrize("storage", STORAGES)
def test_a_compressed_file_without_its_end(tmp_path: Path, storage: str) -> None:
    frames, rng = 3000, np.random.default_rng(0)
    noise = [rng.bytes(200) for _ in range(frames)]  # so that the compressed file has many blocks
    written = [BagMessage("/cam/image_raw", START + i, image(i, i % 256) + noise[i]) for i in range(frames)]
    write_bag(tmp_path / "bag", {"/cam/image_raw": IMAGE}, written, storage, "file")
    (file,) = (tmp_path / "bag").glob("*.zstd")
    cut(file, 0.6)
    kept, damage = read_twice(tmp_path / "bag")
    assert 300 < len(kept) < frames
    assert kept == written[: len(kept)]
    assert f"{file.name} ends in the middle" in damage


def split_bag(folder: Path, storage: str, names: Sequence[str]) -> list[BagMessage]:
    """A bag of several files, as ros2 bag record --max-bag-size writes it. The last name sorts before the others."""
    written, files = [], []
    folder.mkdir()
    for number, name in enumerate(names):
        messages = [BagMessage("/cam/image_raw", START + 100 * number + i, image(i, number)) for i in range(5)]
        part = folder.parent / f"part{number}"
        write_bag(part, {"/cam/image_raw": IMAGE}, messages, storage)
        (source,) = (path for path in part.iterdir() if path.suffix != ".yaml")
        files.append(f"{name}{source.suffix}")
        source.rename(folder / files[-1])
        written += messages
    text = (part / "metadata.yaml").read_text()
    listing = "\n".join(f"  - {file}" for file in files)
    text = text.replace("message_count: 5", f"message_count: {len(written)}")
    head, _, tail = text.partition("relative_file_paths:")
    rest = tail[tail.index("\n", tail.index("- ")) :]
    (folder / "metadata.yaml").write_text(f"{head}relative_file_paths:\n{listing}{rest}")
    return written


@pytest.mark.parametrize("storage", STORAGES)
def test_a_split_bag(tmp_path: Path, storage: str) -> None:
    names = ["bag_2", "bag_9", "bag_10"]
    written = split_bag(tmp_path / "bag", storage, names)
    assert read_twice(tmp_path / "bag") == (written, "")
    (tmp_path / "bag" / "metadata.yaml").rename(tmp_path / "metadata.yaml")
    assert read_twice(tmp_path / "bag") == (written, "")
    (tmp_path / "metadata.yaml").rename(tmp_path / "bag" / "metadata.yaml")
    middle = next((tmp_path / "bag").glob("bag_9.*"))
    content = middle.read_bytes()
    middle.unlink()
    kept, damage = read_twice(tmp_path / "bag")
    assert kept == written[:5] + written[10:]
    assert f"{middle.name} of the bag is missing" in damage
    assert "10 of 15 messages on /cam/image_raw" in damage
    middle.write_bytes(bytes(len(content)))
    kept, damage = read_twice(tmp_path / "bag")
    assert kept == written[:5] + written[10:]
    assert f"nothing of {middle.name} can be read" in damage
    assert str(tmp_path) not in damage
    for name in names:
        next((tmp_path / "bag").glob(f"{name}.*")).unlink()
    with pytest.raises(DataError, match="found none of them"):
        open_bag(tmp_path / "bag")


def test_a_folder_of_several_bags_is_none(tmp_path: Path) -> None:
    for name in ("first", "second"):
        tiny_bag(tmp_path / name, "mcap")
        (tmp_path / name / f"{name}.mcap").rename(tmp_path / f"{name}.mcap")
    with pytest.raises(DataError, match="found first, first.mcap, second"):
        open_bag(tmp_path)


@pytest.mark.parametrize("text", ["rosbag2_bagfile_information: [", "rosbag2_bagfile_information: {}", "3", "\x00"])
def test_a_damaged_metadata_file_is_done_without(tmp_path: Path, text: str) -> None:
    written = of(tiny_bag(tmp_path / "bag", "mcap"))
    (tmp_path / "bag" / "metadata.yaml").write_text(text)
    kept, damage = read_twice(tmp_path / "bag")
    assert kept == written
    assert "metadata.yaml is damaged" in damage


def test_a_compression_that_is_not_known(tmp_path: Path) -> None:
    tiny_bag(tmp_path / "bag", "mcap", "message")
    file = tmp_path / "bag" / "metadata.yaml"
    file.write_text(file.read_text().replace("zstd", "brotli"))
    with pytest.raises(DataError, match="found 'brotli'"):
        open_bag(tmp_path / "bag")


@pytest.mark.parametrize(
    ("storage", "compression"),
    [("mcap", None), ("mcap", "storage"), ("sqlite3", None), ("sqlite3", "file"), ("ros1", None), ("ros1", "lz4")],
)
def test_random_damage_is_told(tmp_path: Path, storage: str, compression: str | None) -> None:
    """Whatever is overwritten, cut out or put in: messages come out, or a DataError; what is lost is told."""
    if storage == "ros1":
        ros1_bag(tmp_path / "old.bag", 300, compression)
        file, written = tmp_path / "old.bag", read_twice(tmp_path / "old.bag")[0]
    else:
        written = of(tiny_bag(tmp_path / "bag", storage, compression, frames=300))
        (file,) = (path for path in (tmp_path / "bag").iterdir() if path.suffix != ".yaml")
    whole, rng = file.read_bytes(), np.random.default_rng(0)
    complete = 0
    for _ in range(20):
        data = bytearray(whole)
        for _ in range(rng.integers(1, 4)):
            at, size = int(rng.integers(len(data))), int(rng.integers(1, 3000))
            data[at : at + size * int(rng.integers(2))] = rng.bytes(size * int(rng.integers(2)))
        file.write_bytes(data)
        try:
            with open_bag(file.parent if storage != "ros1" else file) as bag:
                topics = [topic for topic in bag.topics if topic.name == "/cam/image_raw"]
                kept = list(bag.messages(topics))
                assert len(kept) >= len(written) or bag.damage
                complete += len(kept) == len(written)
        except DataError as error:
            assert "found" in str(error)
    assert complete < 20


# --------------------------------------------------------------------------------------------------------- other mcaps


class Mcap:
    """Writes what the library does not: lz4, checksums, no chunks, no index, chunks out of order."""

    def __init__(self, kind: str = IMAGE, encoding: str = "cdr") -> None:
        self.out = io.BytesIO()
        self.out.write(b"\x89MCAP0\r\n" + record(1, text_field("") + text_field("test")))
        self.head = record(3, struct.pack("<H", 1) + text_field(kind) + text_field("ros2msg") + text_field(""))
        self.head += record(
            4, struct.pack("<HH", 1, 1) + text_field("/cam/image_raw") + text_field(encoding) + bytes(4)
        )
        self.indices: list[bytes] = []

    def chunk(
        self,
        messages: Sequence[BagMessage],
        method: str = "",
        crc: bool = True,
        claimed: int | None = None,
        indexed: int | None = None,
    ) -> None:
        """claimed: bytes that it says it has when it is unpacked. indexed: its length, as the index says."""
        content = self.head + b"".join(map(message_record, messages))
        packed = {"": bytes, "lz4": lz4.frame.compress}[method](content)
        times = [message.log_time for message in messages]
        size = len(content) if claimed is None else claimed
        body = struct.pack("<QQQI", min(times), max(times), size, zlib.crc32(content) if crc else 0)
        body += text_field(method) + struct.pack("<Q", len(packed)) + packed
        at, written = self.out.tell(), record(6, body)
        length = len(written) if indexed is None else indexed
        index = struct.pack("<QQQQ", min(times), max(times), at, length) + struct.pack("<IHQ", 10, 1, 0)
        index += struct.pack("<Q", 0) + text_field(method) + struct.pack("<QQ", len(packed), len(content))
        self.indices.append(record(8, index))
        self.out.write(written)

    def close(self, path: Path, count: int | None, chunks: int | None = None) -> None:
        """count: messages, to write an index; None: without one. chunks: how many it says there are."""
        start = 0
        self.out.write(record(0x0F, bytes(4)))
        if count is not None:
            start = self.out.tell()
            numbers = struct.pack(
                "<QHIIIIQQ", count, 1, 1, 0, 0, len(self.indices) if chunks is None else chunks, 0, 0
            ) + struct.pack("<IHQ", 10, 1, count)
            self.out.write(self.head + b"".join(self.indices) + record(0x0B, numbers))
        self.out.write(record(2, struct.pack("<QQI", start, 0, 0)) + b"\x89MCAP0\r\n")
        path.write_bytes(self.out.getvalue())


def record(kind: int, body: bytes) -> bytes:
    return struct.pack("<BQ", kind, len(body)) + body


def text_field(text: str) -> bytes:
    return struct.pack("<I", len(text)) + text.encode()


def message_record(message: BagMessage) -> bytes:
    return record(5, struct.pack("<HIQQ", 1, 0, message.log_time, message.log_time) + message.data)


def images(count: int) -> list[BagMessage]:
    return [BagMessage("/cam/image_raw", START + i * STEP, image(START + i * STEP, i % 256)) for i in range(count)]


@pytest.mark.parametrize("indexed", [True, False])
@pytest.mark.parametrize("method", ["", "lz4"])
def test_chunks_in_any_order_and_lz4(tmp_path: Path, method: str, indexed: bool) -> None:
    written = images(12)
    writer = Mcap()
    for part in (written[8:], written[0:8:2], written[1:8:2]):
        writer.chunk(part, method)
    writer.close(tmp_path / "a.mcap", 12 if indexed else None)
    assert read_twice(tmp_path / "a.mcap") == (written, "")


@pytest.mark.parametrize("indexed", [True, False])
def test_a_wrong_checksum_costs_the_chunk(tmp_path: Path, indexed: bool) -> None:
    written = images(12)
    writer = Mcap()
    for start in (0, 4, 8):
        writer.chunk(written[start : start + 4])
    writer.close(tmp_path / "a.mcap", 12 if indexed else None)
    overwrite(tmp_path / "a.mcap", (tmp_path / "a.mcap").read_bytes().index(written[5].data) + 200, 1)
    kept, damage = read_twice(tmp_path / "a.mcap")
    assert kept == written[:4] + written[8:]
    assert "wrong checksum" in damage


def test_messages_without_chunks(tmp_path: Path) -> None:
    written = images(3000)
    writer = Mcap()
    writer.out.write(writer.head)
    for message in reversed(written):
        writer.out.write(message_record(message))
    writer.close(tmp_path / "a.mcap", 3000)
    assert read_twice(tmp_path / "a.mcap") == (written, "")
    overwrite(tmp_path / "a.mcap", 1_000_000, 5000)
    kept, damage = read_twice(tmp_path / "a.mcap")
    check_gap(kept, written, 8)
    assert "damaged bytes of a.mcap at" in damage


@pytest.mark.parametrize("name", ["sensor_msgs/Image", "sensor_msgs/msg/Image", "sensor_msgs::msg::dds_::Image_"])
def test_names_of_types_are_normalised(tmp_path: Path, name: str) -> None:
    writer = Mcap(name)
    writer.chunk(images(3))
    writer.close(tmp_path / "a.mcap", 3)
    with open_bag(tmp_path / "a.mcap") as bag:
        assert bag.choose_image_topic()[0].type == IMAGE


def at_most(size: int) -> Any:
    """Fails where more memory than so many bytes is taken meanwhile."""

    class Watch:
        def __enter__(self) -> None:
            tracemalloc.start()

        def __exit__(self, kind: Any, *_: object) -> None:
            _, peak = tracemalloc.get_traced_memory()
            tracemalloc.stop()
            assert kind is not None or peak < size

    return Watch()


@pytest.mark.parametrize("method", ["", "lz4"])
@pytest.mark.parametrize(("claimed", "indexed"), [(10 << 30, None), (1 << 40, None), (100, None), (None, 1 << 62)])
def test_a_chunk_that_lies_about_its_size_costs_itself(
    tmp_path: Path, method: str, claimed: int | None, indexed: int | None
) -> None:
    written = images(12)
    writer = Mcap()
    for part in (written[:4], written[4:8], written[8:]):
        lies = {"claimed": claimed, "indexed": indexed} if part[0] is written[4] else {}
        writer.chunk(part, method, **lies)
    writer.close(tmp_path / "a.mcap", 12)
    with at_most(20_000_000):
        kept, damage = read_twice(tmp_path / "a.mcap")
    assert kept == written[:4] + written[8:]
    assert "in the chunk at" in damage


def test_what_unpacks_to_more_than_it_says_is_not_unpacked(tmp_path: Path) -> None:
    """Sixty megabytes of zeros are a quarter of one in lz4."""
    writer = Mcap()
    good = images(2)
    writer.chunk(good[:1])
    bomb = BagMessage("/cam/image_raw", good[1].log_time, bytes(60_000_000))
    writer.chunk([bomb], "lz4", claimed=1000)
    writer.close(tmp_path / "a.mcap", 2)
    del bomb
    with at_most(30_000_000):
        kept, damage = read_twice(tmp_path / "a.mcap")
    assert kept == good[:1] and "more than the 1000 bytes" in damage


@pytest.mark.parametrize("kind", [1, 3, 4, 5, 7, 8])
def test_records_that_claim_more_than_is_plausible_are_damage(tmp_path: Path, kind: int) -> None:
    """In a sparse file of 100 GB a record may be as long as that; nothing is read for it."""
    written = images(4)
    writer = Mcap()
    writer.out.write(writer.head + b"".join(map(message_record, written[:2])))
    at = writer.out.tell()
    path = tmp_path / "a.mcap"
    path.write_bytes(writer.out.getvalue() + struct.pack("<BQ", kind, 90 << 30))
    rest = writer.head + b"".join(map(message_record, written[2:]))
    with path.open("r+b") as file:
        file.seek(at + 1000)
        file.write(rest + record(0x0F, bytes(4)) + record(2, bytes(20)) + b"\x89MCAP0\r\n")
        file.truncate(100 << 30)
    with at_most(50_000_000):
        kept, damage = read_twice(path)
    assert set(of(kept)) >= {*written[2:], written[0]} and "damaged bytes of a.mcap at" in damage


def test_an_index_that_points_outside_of_the_file(tmp_path: Path) -> None:
    written = images(8)
    writer = Mcap()
    writer.chunk(written[:4])
    writer.chunk(written[4:])
    good = writer.indices[1]
    for at in (1 << 40, (1 << 64) - 1, 9):
        writer.indices[1] = good[:25] + struct.pack("<Q", at) + good[33:]
        copy = Mcap()
        copy.out.write(writer.out.getvalue()[len(copy.out.getvalue()) :])
        copy.indices = writer.indices
        copy.close(tmp_path / "a.mcap", 8)
        kept, damage = read_twice(tmp_path / "a.mcap")
        assert kept == written[:4] and "no chunk where the index says" in damage


def test_an_index_that_lists_too_little_or_twice(tmp_path: Path) -> None:
    written = images(8)
    for listed in ([0], [0, 1, 1, 0]):
        writer = Mcap()
        writer.chunk(written[:4])
        writer.chunk(written[4:])
        count = len(writer.indices)
        writer.indices = [writer.indices[i] for i in listed]
        writer.close(tmp_path / "a.mcap", 8, chunks=count)
        assert read_twice(tmp_path / "a.mcap")[0] == written


def test_times_that_no_clock_has_are_damage(tmp_path: Path) -> None:
    written = images(6)
    writer = Mcap()
    head, tail = b"".join(map(message_record, written[:3])), b"".join(map(message_record, written[3:]))
    wrong = record(5, struct.pack("<HIQQ", 1, 0, 1 << 63, 0) + written[0].data)
    writer.out.write(writer.head + head + wrong + tail)
    writer.close(tmp_path / "a.mcap", None)
    kept, damage = read_twice(tmp_path / "a.mcap")
    assert kept == written and "broken records" in damage


def test_records_of_applications_are_passed_over(tmp_path: Path) -> None:
    """Opcodes from 0x80 on are theirs."""
    written = images(6)
    writer = Mcap()
    own = record(0x93, bytes(50))
    writer.out.write(own + writer.head + own.join(map(message_record, written)) + own)
    writer.close(tmp_path / "a.mcap", None)
    assert read_twice(tmp_path / "a.mcap") == (written, "")


def test_a_damaged_beginning_of_an_mcap_is_read_all_the_same(tmp_path: Path) -> None:
    written = of(tiny_bag(tmp_path / "bag", "mcap"))
    overwrite(tmp_path / "bag" / "bag.mcap", 0, 8)
    assert read_twice(tmp_path / "bag")[0] == written


def test_parts_of_a_recording_come_by_time_whatever_their_order(tmp_path: Path) -> None:
    """Also where they overlap, as those of two recorders do."""
    rng = random.Random(0)
    for storage in STORAGES:
        folder = tmp_path / storage
        folder.mkdir()
        written = split_bag(folder / "bag", storage, ["bag_2", "bag_9", "bag_10"])
        file = folder / "bag" / "metadata.yaml"
        lines = file.read_text().split("\n")
        places = [i for i, line in enumerate(lines) if line.startswith("  - bag_")]
        names = [lines[i] for i in places]
        rng.shuffle(names)
        for place, name in zip(places, reversed(names), strict=True):
            lines[place] = name
        file.write_text("\n".join(lines))
        assert read_twice(folder / "bag") == (written, "")
    images_of = images(12)
    (tmp_path / "both").mkdir()
    for number in range(2):
        writer = Mcap()
        writer.chunk(images_of[number::2])
        writer.close(tmp_path / "both" / f"a_{number}.mcap", 6)
    assert read_twice(tmp_path / "both") == (images_of, "")


@pytest.mark.parametrize("storage", [*STORAGES, "ros1"])
def test_reading_from_a_time_on(tmp_path: Path, storage: str) -> None:
    if storage == "ros1":
        path = tmp_path / "old.bag"
        ros1_bag(path, 3000)
    else:
        path = tmp_path / "bag"
        tiny_bag(path, storage, frames=3000)
    with open_bag(path) as bag:
        topics = [topic for topic in bag.topics if topic.name == "/cam/image_raw"]
        everything = list(bag.messages(topics))
        since = everything[2000].log_time
        assert list(bag.messages(topics, since)) == everything[2000:]
        assert list(bag.messages(topics, since + 1)) == everything[2001:]
        assert list(bag.messages(topics, everything[-1].log_time + 1)) == []
        assert bag.damage == "" and bag.lost_messages(topics[0]) == 0


# ------------------------------------------------------------------------------------------------- how much was lost


def losses(path: Path, name: str = "/cam/image_raw") -> tuple[int, int | None, int | None, bool]:
    """Messages that came, that were lost, bytes that were lost, and whether the end is missing."""
    with open_bag(path) as bag:
        (topic,) = (topic for topic in bag.topics if topic.name == name)
        kept = len(list(bag.messages([topic])))
        return kept, bag.lost_messages(topic), bag.lost_bytes, bag.cut_off


@pytest.mark.parametrize("metadata", [True, False])
def test_lost_messages_of_an_mcap_are_counted(tmp_path: Path, metadata: bool) -> None:
    """With the index at the end, or metadata.yaml, or that behind the chunk."""
    tiny_bag(tmp_path / "bag", "mcap", "storage", frames=4000)
    file = tmp_path / "bag" / "bag.mcap"
    assert losses(tmp_path / "bag") == (4000, 0, 0, False)
    if not metadata:
        (tmp_path / "bag" / "metadata.yaml").unlink()
    block = chunks(file)[2]
    overwrite(file, block.at + block.size // 2, 64)
    kept, lost, size, _ = losses(tmp_path / "bag")
    assert kept < 4000 and (lost, size) == (4000 - kept, block.size)
    cut(file, 0.8)
    again, lost, size, at_end = losses(tmp_path / "bag")
    assert again < kept and at_end and size is None
    assert lost == (4000 - again if metadata else None), "without metadata.yaml nobody knows what was behind the cut"


def test_lost_messages_of_a_chunk_are_those_of_its_index(tmp_path: Path) -> None:
    """Where neither the end of the file nor metadata.yaml counts them, what is behind the chunk does."""
    tiny_bag(tmp_path / "bag", "mcap", "storage", frames=4000)
    file = tmp_path / "bag" / "bag.mcap"
    data = file.read_bytes()
    start = struct.unpack_from("<Q", data, len(data) - 28)[0]
    (tmp_path / "a.mcap").write_bytes(data[:start] + record(2, bytes(20)) + data[-8:])
    assert losses(tmp_path / "a.mcap") == (4000, 0, 0, False)
    block = chunks(tmp_path / "a.mcap")[2]
    overwrite(tmp_path / "a.mcap", block.at + block.size // 2, 64)
    kept, lost, size, _ = losses(tmp_path / "a.mcap")
    assert (lost, size) == (4000 - kept, block.size)


def missing_ends(path: Path) -> tuple[bool, bool, bool]:
    """Whether the beginning is missing, the end, and either, as told when all was read."""
    with open_bag(path) as bag:
        (topic,) = (topic for topic in bag.topics if topic.name == "/cam/image_raw")
        assert list(bag.messages([topic])) and bag.damage
        return bag.lacks_beginning(topic), bag.lacks_end, bag.cut_off


@pytest.mark.parametrize(
    ("number", "missing"), [(0, (True, False, True)), (1, (False, False, False)), (2, (False, True, True))]
)
def test_which_end_is_missing_where_a_file_is(tmp_path: Path, number: int, missing: tuple[bool, ...]) -> None:
    """It is gone, nothing in it can be read, or it is cut off: then its beginning is there."""
    split_bag(tmp_path / "bag", "mcap", ["bag_0", "bag_1", "bag_2"])
    file = tmp_path / "bag" / f"bag_{number}.mcap"
    data = file.read_bytes()
    file.unlink()
    assert missing_ends(tmp_path / "bag") == missing
    file.write_bytes(bytes(100))
    assert missing_ends(tmp_path / "bag") == missing
    file.write_bytes(data[: len(data) // 2])
    assert missing_ends(tmp_path / "bag") == (False, missing[1], missing[1])


@pytest.mark.parametrize(("number", "missing"), [(0, True), (1, False), (2, False)])
def test_the_beginning_is_missing_where_it_is_damaged(tmp_path: Path, number: int, missing: bool) -> None:
    """In the first chunk of the first file, found by the index or without it."""
    tiny_bag(tmp_path / "bag", "mcap", "storage", frames=2000)
    file = tmp_path / "bag" / "bag.mcap"
    block = chunks(file)[number]
    overwrite(file, block.at + block.size // 2, 64)
    assert missing_ends(tmp_path / "bag") == (missing, False, missing)
    writer, written = Mcap(), images(12)
    for start in (0, 4, 8):
        writer.chunk(written[start : start + 4])
    writer.close(tmp_path / "a.mcap", None)
    overwrite(tmp_path / "a.mcap", chunks(tmp_path / "a.mcap")[number].at, 20)
    assert missing_ends(tmp_path / "a.mcap") == (missing, False, missing)


@pytest.mark.parametrize(("at", "missing"), [(0, True), (1000, False)])
def test_the_beginning_of_a_damaged_database(tmp_path: Path, at: int, missing: bool) -> None:
    written = of(tiny_bag(tmp_path / "bag", "sqlite3", frames=2000))
    file = tmp_path / "bag" / "bag.db3"
    overwrite(file, file.read_bytes().index(written[at].data) // 4096 * 4096, 8192)
    assert missing_ends(tmp_path / "bag") == (missing, False, missing)


@pytest.mark.parametrize("metadata", [True, False])
def test_lost_messages_of_a_database_are_counted_or_unknown(tmp_path: Path, metadata: bool) -> None:
    tiny_bag(tmp_path / "bag", "sqlite3", frames=2000)
    if not metadata:
        (tmp_path / "bag" / "metadata.yaml").unlink()
    assert losses(tmp_path / "bag") == (2000, 0, 0, False)
    file = tmp_path / "bag" / "bag.db3"
    whole = file.stat().st_size
    cut(file, 0.5)
    kept, lost, size, at_end = losses(tmp_path / "bag")
    assert (lost, at_end) == (2000 - kept if metadata else None, True)
    assert size == whole - file.stat().st_size, "the database says how long it was"


def test_lost_messages_of_a_ros1_bag_are_counted(tmp_path: Path) -> None:
    file = tmp_path / "old.bag"
    ros1_bag(file, 4000, "lz4")
    assert losses(file) == (4000, 0, 0, False)
    overwrite(file, file.stat().st_size // 2, 4096)
    kept, lost, size, at_end = losses(file)
    assert kept < 4000 and lost == 4000 - kept and size and not at_end
    cut(file, 0.7)
    _, lost, size, at_end = losses(file)
    assert (lost, size, at_end) == (None, None, True)


def test_a_message_that_does_not_decompress_is_lost(tmp_path: Path) -> None:
    tiny_bag(tmp_path / "bag", "mcap", "message")
    file = tmp_path / "bag" / "bag.mcap"
    with open_bag(tmp_path / "bag") as bag:
        numbers = [n for n, c in bag._files[0].channels.items() if c.topic == "/cam/image_raw"]
        packed = [record.data for record in bag._files[0].messages(set(numbers))][5]
    overwrite(file, file.read_bytes().index(packed) + 4, len(packed) - 4)
    assert losses(tmp_path / "bag") == (11, 1, len(packed), False)


def test_a_row_whose_pages_lead_in_a_circle(tmp_path: Path) -> None:
    written = [BagMessage("/cam/image_raw", START + i, image(START + i, i, (120, 160))) for i in range(6)]
    write_bag(tmp_path / "bag", {"/cam/image_raw": IMAGE}, written, "sqlite3")
    file = tmp_path / "bag" / "bag.db3"
    data = bytearray(file.read_bytes())
    row = data.index(written[3].data[:200])
    page = next(at for at in range(row // 4096 * 4096, len(data), 4096) if at > row and data[at : at + 3] == bytes(3))
    data[page : page + 4] = struct.pack(">I", page // 4096 + 1)
    file.write_bytes(data[: -2 * 4096])
    kept, damage = read_twice(tmp_path / "bag")
    assert 1 <= len(kept) < 6 and set(kept) <= set(written) and "bag.db3 is damaged" in damage


# --------------------------------------------------------------------------------------------------------------- ROS 1

NOETIC = get_typestore(Stores.ROS1_NOETIC)


def ros1_bag(path: Path, frames: int = 12, method: str | None = None, tear: Callable[[bytes], bytes] = bytes) -> None:
    """A bag with images and calibrations; ``tear`` spoils the third image."""
    writer: Any = Ros1Writer(path)
    if method is not None:
        writer.set_compression(getattr(writer.CompressionFormat, method.upper()))
    with writer:
        topics = {
            name: writer.add_connection(name, kind, typestore=NOETIC)
            for name, kind in (("/cam/image_raw", IMAGE), ("/cam/camera_info", CAMERA_INFO))
        }
        for i in range(frames):
            at = START + i * STEP
            time = NOETIC.types["builtin_interfaces/msg/Time"](*divmod(at, 1_000_000_000))
            head = NOETIC.types["std_msgs/msg/Header"](i, time, "camera_optical_frame")
            pixels = np.full(24 * 32, i % 256, np.uint8)
            data = NOETIC.serialize_ros1(NOETIC.types[IMAGE](head, 24, 32, "mono8", 0, 32, pixels), IMAGE)
            writer.write(topics["/cam/image_raw"], at + 5_000_000, tear(bytes(data)) if i == 3 else data)
            roi = NOETIC.types["sensor_msgs/msg/RegionOfInterest"](0, 0, 0, 0, False)
            k = np.array([500.0, 0, 16, 0, 501, 12, 0, 0, 1])
            info = (head, 24, 32, "plumb_bob", np.zeros(5), k, np.eye(3).ravel(), np.zeros(12), 0, 0, roi)
            data = NOETIC.serialize_ros1(NOETIC.types[CAMERA_INFO](*info), CAMERA_INFO)
            writer.write(topics["/cam/camera_info"], at + 5_000_000, data)


@pytest.mark.parametrize("method", [None, "bz2", "lz4"])
def test_a_ros1_bag_comes_out_as_ros2_serializes(tmp_path: Path, method: str | None) -> None:
    ros1_bag(tmp_path / "old.bag", method=method)
    with open_bag(tmp_path / "old.bag") as bag:
        topic, _ = bag.choose_image_topic()
        assert topic == Topic("/cam/image_raw", IMAGE, 12)
        read = list(bag.messages([topic]))
        assert [message.data for message in read] == [image(START + i * STEP, i) for i in range(12)]
        assert [message.log_time for message in read] == [START + i * STEP + 5_000_000 for i in range(12)]
        pixels = image_to_array(bag.deserialize(read[7]))
        assert (pixels.shape, pixels.min(), pixels.max()) == ((24, 32), 7, 7)
        info_topic = bag.camera_info_topic(topic)
        assert info_topic is not None
        info = bag.deserialize(next(bag.messages([info_topic])))
        assert (info.k[0], info.d.tolist(), info.header.frame_id) == (500, [0] * 5, "camera_optical_frame")
        assert bag.damage == ""


def test_a_ros1_bag_without_index(tmp_path: Path) -> None:
    """As the recorder leaves it when it is killed: .bag.active."""
    ros1_bag(tmp_path / "old.bag", 3000)
    whole, _ = read_twice(tmp_path / "old.bag")
    file = tmp_path / "old.bag.active"
    file.write_bytes((tmp_path / "old.bag").read_bytes())
    cut(file, 0.7)
    kept, damage = read_twice(file)
    assert 1900 < len(kept) < 3000
    assert kept == whole[: len(kept)]
    assert "ends in the middle" in damage


@pytest.mark.parametrize("method", [None, "lz4"])
def test_damage_within_a_ros1_bag(tmp_path: Path, method: str | None) -> None:
    file = tmp_path / "old.bag"
    ros1_bag(file, 4000, method)
    whole, _ = read_twice(file)
    overwrite(file, file.stat().st_size // 2, 4096)
    kept, damage = read_twice(file)
    check_gap(kept, whole, 12 if method is None else 1100)
    assert f"{len(whole) - len(kept)} on /cam/image_raw" in damage
    overwrite(file, file.stat().st_size - 500, 400)  # the index, too
    again, _ = read_twice(file)
    assert again == kept


def test_a_damaged_message_of_ros1_costs_only_itself(tmp_path: Path) -> None:
    ros1_bag(tmp_path / "old.bag", tear=lambda data: data[:-5])
    kept, damage = read_twice(tmp_path / "old.bag")
    assert [header_stamp(message.data) for message in kept] == [START + i * STEP for i in range(12) if i != 3]
    assert "a message on /cam/image_raw" in damage


# -------------------------------------------------------------------------------------------------------- wrong content


def test_two_cameras_on_one_topic_are_named(tmp_path: Path) -> None:
    frames = ["left", "right"] * 4
    messages = [BagMessage("/cam/image_raw", START + i, image(i, frame=frame)) for i, frame in enumerate(frames)]
    write_bag(tmp_path / "bag", {"/cam/image_raw": IMAGE}, messages)
    with open_bag(tmp_path / "bag") as bag, pytest.raises(DataError, match="'left' and, after 1 images, 'right'"):
        bag.choose_image_topic()


def test_a_second_camera_that_comes_later_is_named_when_it_comes(tmp_path: Path) -> None:
    frames = ["left"] * 20 + ["right"] * 2
    messages = [BagMessage("/cam/image_raw", START + i, image(i, frame=frame)) for i, frame in enumerate(frames)]
    write_bag(tmp_path / "bag", {"/cam/image_raw": IMAGE}, messages)
    kept = []
    with open_bag(tmp_path / "bag") as bag:
        topic, _ = bag.choose_image_topic()
        with pytest.raises(DataError, match="after 20 images, 'right'"):
            for message in of_one_camera(bag.messages([topic])):
                kept.append(message)
    assert kept == messages[:21], "the first that differs may be damaged"


@pytest.mark.parametrize("at", [0, 3])
@pytest.mark.parametrize("damaged", [b"\x00\x01\x00\x00", image(START, frame="lefT")], ids=["no header", "frame_id"])
def test_one_damaged_header_is_no_other_camera(tmp_path: Path, at: int, damaged: bytes) -> None:
    messages = [BagMessage("/cam/image_raw", START + i, image(i, frame="left")) for i in range(12)]
    messages[at] = BagMessage("/cam/image_raw", START + at, damaged)
    write_bag(tmp_path / "bag", {"/cam/image_raw": IMAGE}, messages)
    with open_bag(tmp_path / "bag") as bag:
        topic, _ = bag.choose_image_topic()
        assert list(of_one_camera(bag.messages([topic]))) == messages and bag.frame_id(topic) == "left"


def test_depth_maps_are_told_where_the_first_is_damaged(tmp_path: Path) -> None:
    depth = STORE.deserialize_cdr(image(START), IMAGE)
    depth.encoding, depth.width, depth.step = "16UC1", 16, 32
    data = [b"\x00\x01\x00\x00", bytes(STORE.serialize_cdr(depth, IMAGE))]
    messages = [BagMessage("/range", START + i, data[i]) for i in range(2)]
    write_bag(tmp_path / "bag", {"/range": IMAGE}, messages)
    with open_bag(tmp_path / "bag") as bag:
        assert [topic.name for topic in bag.depth_topics] == ["/range"]


def test_two_types_on_one_topic_are_named(tmp_path: Path) -> None:
    writer = Mcap()
    head = writer.head
    for number, kind in ((2, COMPRESSED_IMAGE), (3, "std_msgs/msg/String")):
        head += record(3, struct.pack("<H", number) + text_field(kind) + text_field("ros2msg") + text_field(""))
        head += record(
            4, struct.pack("<HH", number, number) + text_field("/cam/image_raw") + text_field("cdr") + bytes(4)
        )
    first, second = images(2)
    other = message_record(second)
    writer.out.write(head + message_record(first) + other[:9] + struct.pack("<H", 2) + other[11:])
    writer.close(tmp_path / "a.mcap", None)
    with open_bag(tmp_path / "a.mcap") as bag, pytest.raises(DataError, match=f"found {COMPRESSED_IMAGE} and {IMAGE}"):
        bag.choose_image_topic()


def test_wrong_type_asked_for(tmp_path: Path) -> None:
    tiny_bag(tmp_path / "bag", "mcap")
    with open_bag(tmp_path / "bag") as bag:
        with pytest.raises(DataError, match="image topic '/chatter'.*found std_msgs/msg/String"):
            bag.choose_image_topic("/chatter")
        image_topic, _ = bag.choose_image_topic()
        with pytest.raises(DataError, match="CameraInfo on /chatter.*found std_msgs/msg/String"):
            bag.camera_info_topic(image_topic, "/chatter")
        with pytest.raises(DataError, match="CameraInfo on /nothing.*found no such topic"):
            bag.camera_info_topic(image_topic, "/nothing")


def test_header_frame() -> None:
    assert header_frame(image(5, frame="left")) == "left"
    for broken in (b"", bytes(12), image(5)[:20]):
        with pytest.raises(DataError, match="with a header"):
            header_frame(broken)


def test_a_message_that_is_none(tmp_path: Path) -> None:
    good = images(1)[0]
    for data in (b"", b"\x00\x01", good.data[:40], b"\xff" * 100):
        folder = tmp_path / f"{len(data)}"
        write_bag(folder, {"/cam/image_raw": IMAGE}, [BagMessage("/cam/image_raw", 1, data)])
        with open_bag(folder) as bag:
            (message,) = bag.messages(bag.topics)
            with pytest.raises(DataError, match="Image on /cam/image_raw"):
                bag.deserialize(message)


@pytest.mark.parametrize(
    ("name", "topic", "frames"),
    [
        ("tum_fr1_rpy", "/camera/rgb/image_raw/compressed", 330),
        ("euroc_v101", "/cam0/image_raw", 90),
        ("hololens_office", "/head/camera/image_raw/compressed", 373),
        ("kitti_seq1", "/kitti/left/image_raw/compressed", 51),
    ],
)
def test_real_bags(shared_data: Path, name: str, topic: str, frames: int) -> None:
    with open_bag(shared_data / "bag" / name) as bag:
        chosen, _ = bag.choose_image_topic()
        assert (chosen.name, chosen.count) == (topic, frames)
        info = bag.camera_info_topic(chosen)
        assert info is not None
        assert info.name == chosen.image_name.rpartition("/")[0] + "/camera_info"
        stamps = [header_stamp(message.data) for message in bag.messages([chosen])]
    assert len(stamps) == frames
    assert stamps == sorted(stamps)
