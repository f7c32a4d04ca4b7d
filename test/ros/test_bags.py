"""Bags in both storages, written and read back, and every way in which a bag can be the wrong one."""

from __future__ import annotations

import struct
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("rosbags", reason="rosbags is not installed: pip install 'scfeat-python[bags]'")

from rosbags.typesys import Stores, get_typestore

from scfeat_core.errors import DataError
from scfeat_ros.bags import (
    COMPRESSED_IMAGE,
    IMAGE,
    STORAGES,
    BagMessage,
    Topic,
    header_stamp,
    open_bag,
    write_bag,
)
from scfeat_ros.cut_mcap import complete_size

STORE = get_typestore(Stores.ROS2_HUMBLE)
START = 1_700_000_000_123_456_789
STEP = 100_000_000


def header(stamp: int):
    time = STORE.types["builtin_interfaces/msg/Time"](*divmod(stamp, 1_000_000_000))
    return STORE.types["std_msgs/msg/Header"](time, "camera_optical_frame")


def image(stamp: int, value: int = 0, shape: tuple[int, int] = (24, 32)) -> bytes:
    height, width = shape
    pixels = np.full(height * width, value, np.uint8)
    message = STORE.types[IMAGE](header(stamp), height, width, "mono8", 0, width, pixels)
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
    ("storage", "compression"), [("mcap", None), ("sqlite3", None), ("mcap", "message"), ("sqlite3", "file")]
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
    for name, words in (("notes.txt", r"\.mcap or \.db3"), ("old.bag", "ROS 1.*rosbags-convert")):
        (tmp_path / name).write_bytes(b"#ROSBAG V2.0")
        with pytest.raises(DataError, match=words):
            open_bag(tmp_path / name)


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


def test_a_truncated_database_is_named(tmp_path: Path) -> None:
    tiny_bag(tmp_path / "bag", "sqlite3", frames=200)
    file = tmp_path / "bag" / "bag.db3"
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(DataError, match="damaged or truncated"), open_bag(tmp_path / "bag") as bag:
        for topic in bag.image_topics:
            list(bag.messages([topic]))


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
    assert complete_size(file) is None
    with open_bag(tmp_path / "bag") as bag:
        assert bag.damage == ""
    file.write_bytes(file.read_bytes()[:30])
    with pytest.raises(DataError, match="damaged or truncated"), open_bag(tmp_path / "bag"):
        pass


def test_what_lies_before_the_damage_is_kept(tmp_path: Path) -> None:
    """A chunk in the middle is overwritten: the messages before it still come, then the error says so."""
    written = tiny_bag(tmp_path / "bag", "mcap", frames=3000)
    file = tmp_path / "bag" / "bag.mcap"
    data = bytearray(file.read_bytes())
    middle = len(data) // 2
    data[middle : middle + 8192] = b"\xff" * 8192
    file.write_bytes(data)
    kept = []
    with open_bag(tmp_path / "bag") as bag:
        topic, _ = bag.choose_image_topic("/cam/image_raw")
        with pytest.raises(DataError, match=r"after [1-9][0-9]* messages"):
            for message in bag.messages([topic]):
                kept.append(message)
    assert len(kept) > 500
    assert kept == [message for message in written if message.topic == "/cam/image_raw"][: len(kept)]


def test_a_damaged_metadata_file(tmp_path: Path) -> None:
    tiny_bag(tmp_path / "bag", "mcap")
    (tmp_path / "bag" / "metadata.yaml").write_text("rosbag2_bagfile_information: [")
    with pytest.raises(DataError, match="damaged"), open_bag(tmp_path / "bag"):
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
