"""A .db3 file, whole or damaged: the schema of rosbag2_storage_sqlite3.

A whole file is read in the order of its index of times. Where a page is damaged or missing, SQLite ends the query; then
the rows are taken from the pages that can be read. SQLite has no checksums: bytes that changed within an image are not
noticed.
"""

from __future__ import annotations

import sqlite3
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from scfeat_core.errors import DataError

from .blocks import Channel, Damage, Loss, Record, Source, normalised_type
from .sqlite_pages import Pages


class SqliteFile:
    """See :class:`scfeat_ros.bag_files.blocks.BagFile`. Raises DataError where nothing can be read."""

    def __init__(self, path: Path, damage: Damage) -> None:
        self._path = path
        self._damage = damage
        self._source = Source(path)
        self._database: sqlite3.Connection | None = None
        self._pages: Pages | None = None  # where the database is damaged
        try:
            _check_is_database(self._source)
            self._database = self._connect()
            self.channels, self.counts, self.start = self._topics()
        except BaseException:
            self.close()
            raise
        self.complete = self._pages is None

    def close(self) -> None:
        if self._database is not None:
            self._database.close()
        self._source.close()

    def messages(self, wanted: set[int], since: int = 0) -> Iterator[Record]:
        done: set[int] = set()
        if self._pages is None:
            try:
                yield from self._whole(wanted, since, done)
                return
            except (sqlite3.Error, MemoryError) as error:
                self._salvage(error)
        assert self._pages is not None
        yield from (record for record in self._salvaged(self._pages, wanted, done) if record.time >= since)

    def _topics(self) -> tuple[dict[int, Channel], dict[int, int], int | None]:
        """Channels, messages of each, and the time of the first. Raises DataError where there is nothing."""
        try:
            topics = self._execute("SELECT id, name, type FROM topics").fetchall()
            counts = dict(self._execute("SELECT topic_id, count(*) FROM messages GROUP BY topic_id").fetchall())
            start = self._execute("SELECT min(timestamp) FROM messages").fetchone()[0]
        except (sqlite3.Error, UnicodeDecodeError, MemoryError) as error:  # SQLite believes sizes that are none
            pages = self._salvage(error)
            topics = [(number, name, kind) for number, (name, kind) in pages.topics.items()]
            if not topics:
                raise DataError(
                    f"expected a rosbag2 database at {self._path}, found it damaged or truncated, or another one "
                    f"({error}): 'sqlite3 FILE .recover' may find more"
                ) from error
            counts = Counter(row.topic for row in pages.rows)
            start = min((row.time for row in pages.rows), default=None)
        channels = {number: Channel(name, normalised_type(kind)) for number, name, kind in topics}
        return channels, counts, start if isinstance(start, int) else None

    def _execute(self, query: str, values: Sequence[int] = ()) -> sqlite3.Cursor:
        assert self._database is not None
        return self._database.execute(query, values)

    def _whole(self, wanted: set[int], since: int, done: set[int]) -> Iterator[Record]:
        """All rows by time. done: ids of those that came.

        The order is asked for without the data, as SQLite would sort all of it where there is no index of times.
        """
        chosen = f"topic_id IN ({','.join('?' * len(wanted))})" + (" AND timestamp >= ?" if since else "")
        order = f"SELECT timestamp, id, topic_id FROM messages WHERE {chosen} ORDER BY timestamp, id"
        for time, number, topic in self._execute(order, [*sorted(wanted), *([since] if since else [])]):
            (data,) = self._execute("SELECT data FROM messages WHERE id = ?", [number]).fetchone() or (None,)
            done.add(number)
            if isinstance(time, int) and isinstance(data, bytes):
                yield Record(time, number, topic, data)
            else:
                lost = {self.channels[topic].topic: 1} if topic in self.channels else None
                self._damage.add(f"row {number} of {self._path.name} is damaged", Loss(None, lost))

    def _salvage(self, error: Exception) -> Pages:
        """The pages of a database in which SQLite finds no way."""
        if self._pages is None:
            self._pages = Pages(self._source)
            text = f"{self._path.name} is damaged ({error}): only what its readable pages hold is there"
            missing = self._pages.written_size - self._source.size
            at_end = missing > 0  # the file is shorter than the database says that it is
            at_start = all(row.id > 1 for row in self._pages.rows)  # SQLite counts from 1
            self._damage.add(text, Loss(missing if at_end else None, None, at_start, at_end))
        return self._pages

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
                text = f"{self._path.name} is damaged: {lost} messages on {name} cannot be read"
                self._damage.add(text, Loss(0, {name: lost}))

    def _connect(self) -> sqlite3.Connection:
        """Without "immutable" SQLite takes the rows that a killed recorder left in the log beside the file, too."""
        log = self._path.with_name(self._path.name + "-wal")
        uri = self._path.resolve().as_uri()
        if log.is_file() and log.stat().st_size > 0:
            try:
                return self._opened(f"{uri}?mode=ro")
            except sqlite3.Error:
                text = f"the rows in {log.name} cannot be read: copy the bag to a folder that can be written"
                self._damage.add(text, Loss(log.stat().st_size, None, at_end=True))
        return sqlite3.connect(f"{uri}?mode=ro&immutable=1", uri=True, check_same_thread=False)

    def _opened(self, uri: str) -> sqlite3.Connection:
        """Raises sqlite3.Error where it cannot be read."""
        database = sqlite3.connect(uri, uri=True, check_same_thread=False)
        try:
            database.execute("SELECT count(*) FROM sqlite_master").fetchone()
        except sqlite3.Error:
            database.close()
            raise
        return database


def _check_is_database(source: Source) -> None:
    """Raises DataError for an empty file, and for text: of a database with a damaged beginning the pages count."""
    expected = f"expected a rosbag2 database at {source.path}"
    if source.size == 0:
        raise DataError(f"{expected}, found an empty file: nothing was recorded, or it was not copied; copy it again")
    begins = source.read(0, 512)
    if not begins.startswith(b"SQLite format 3\0") and begins.isascii() and b"\0" not in begins:
        raise DataError(f"{expected}, found text (it begins with {begins[:16]!r}): no database, check which file it is")
