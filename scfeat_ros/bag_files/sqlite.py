"""A .db3 file, whole or damaged: the schema of rosbag2_storage_sqlite3.

A whole file is read in the order of its index of times. Where a page is damaged or missing, SQLite ends the query; then
the rows are taken from the pages that can be read. SQLite has no checksums: bytes that changed within an image are not
noticed.
"""

from __future__ import annotations

import sqlite3
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from scfeat_core.errors import DataError

from .blocks import Channel, Damage, Record, Source, normalised_type
from .sqlite_pages import Pages


class SqliteFile:
    """See :class:`scfeat_ros.bag_files.blocks.BagFile`. Raises DataError where nothing can be read."""

    def __init__(self, path: Path, damage: Damage) -> None:
        self._path = path
        self._damage = damage
        self._source = Source(path)
        self._database = self._connect()
        self._pages: Pages | None = None  # where the database is damaged
        try:
            topics = self._database.execute("SELECT id, name, type FROM topics").fetchall()
            counts = self._database.execute("SELECT topic_id, count(*) FROM messages GROUP BY topic_id").fetchall()
            self.counts: dict[int, int] = dict(counts)
        except (sqlite3.Error, UnicodeDecodeError, MemoryError) as error:  # SQLite believes sizes that are none
            self._pages = Pages(self._source)
            topics = [(number, name, kind) for number, (name, kind) in self._pages.topics.items()]
            if not topics:
                self.close()
                raise DataError(
                    f"expected a rosbag2 database at {path}, found it damaged or truncated ({error}): "
                    "'sqlite3 FILE .recover' may find more"
                ) from error
            self._damage.add(f"{path.name} is damaged ({error}): only what its readable pages hold is there")
            self.counts = Counter(row.topic for row in self._pages.rows)
        self.channels = {number: Channel(name, normalised_type(kind)) for number, name, kind in topics}

    def close(self) -> None:
        self._database.close()
        self._source.close()

    def messages(self, wanted: set[int]) -> Iterator[Record]:
        done: set[int] = set()
        if self._pages is None:
            query = (
                f"SELECT timestamp, id, topic_id, data FROM messages WHERE topic_id IN ({','.join('?' * len(wanted))})"
            )
            try:
                for row in self._database.execute(query + " ORDER BY timestamp, id", sorted(wanted)):
                    done.add(row[1])
                    if isinstance(row[0], int) and isinstance(row[3], bytes):
                        yield Record(*row)
                    else:
                        self._damage.add(f"row {row[1]} of {self._path.name} is damaged")
                return
            except (sqlite3.Error, MemoryError) as error:
                self._damage.add(f"{self._path.name} is damaged ({error}): only what its readable pages hold is there")
                self._pages = Pages(self._source)
        yield from self._salvaged(self._pages, wanted, done)

    def _salvaged(self, pages: Pages, wanted: set[int], done: set[int]) -> Iterator[Record]:
        """The readable ones of the rows that are not done."""
        found = Counter(row.topic for row in pages.rows if row.id in done)
        for row in pages.rows:
            if row.topic not in wanted or row.id in done:
                continue
            data = pages.data(row)
            if data is not None:
                found[row.topic] += 1
                yield Record(row.time, row.id, row.topic, data)
        for topic in sorted(wanted):
            lost = self.counts.get(topic, 0) - found[topic]
            if lost > 0:
                name = self.channels[topic].topic
                self._damage.add(f"{self._path.name} is damaged: {lost} messages on {name} cannot be read")

    def _connect(self) -> sqlite3.Connection:
        """Without "immutable" SQLite takes the rows that a killed recorder left in the log beside the file, too."""
        log = self._path.with_name(self._path.name + "-wal")
        uri = self._path.resolve().as_uri()
        if log.is_file() and log.stat().st_size > 0:
            try:
                database = sqlite3.connect(f"{uri}?mode=ro", uri=True, check_same_thread=False)
                database.execute("SELECT count(*) FROM sqlite_master").fetchone()
                return database
            except sqlite3.Error:
                database.close()
                self._damage.add(f"the rows in {log.name} cannot be read: copy the bag to a folder that can be written")
        return sqlite3.connect(f"{uri}?mode=ro&immutable=1", uri=True, check_same_thread=False)
