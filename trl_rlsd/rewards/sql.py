"""Reward of SQL queries: run them, and compare results."""

from __future__ import annotations

import math
import re
import sqlite3
import threading
import time
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from decimal import Decimal
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from trl_rlsd.rewards.answer import after_thinking, final_answer
from trl_rlsd.rewards.fences import last_block
from trl_rlsd.rewards.grading import CannotGrade, Reward
from trl_rlsd.rewards.pool import run_all


_LANGUAGES = ("sql", "sqlite", "sqlite3", "duckdb")
_BEGINS = re.compile(r"\b(?:SELECT|WITH\s+(?:RECURSIVE\s+)?[^\s(,;]++\s*(?:\([^()]*+\)\s*)?AS)\b", re.IGNORECASE)
# strings, quoted names and comments, in which nothing is a keyword; one that is not closed runs to the end
_SKIPPED = r"(?:'[^']*+(?:'|\Z)|\"[^\"]*+(?:\"|\Z)|`[^`]*+(?:`|\Z)|\[[^\]]*+(?:\]|\Z)|--[^\n]*+|/\*.*?(?:\*/|\Z))"
_ENDS = re.compile(rf"{_SKIPPED}|(?P<end>;|\n[ \t\r]*+\n)", re.DOTALL)
_ORDERS = re.compile(rf"{_SKIPPED}|(?P<bracket>[()])|\b(?P<order>ORDER)\b", re.DOTALL | re.IGNORECASE)

_QUERY_LENGTH = 20_000
_VALUE_LENGTH = 1_000_000
_RESULT_SIZE = 64 * 2**20
_MEMORY = 512 * 2**20
# of SQLite's virtual machine, between two looks at the clock
_STEPS = 10_000
_PROGRAM_LENGTH = 100_000

# The database's failures, not the query's.
_BROKEN = {sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_IOERR}
_ALLOWED = {sqlite3.SQLITE_SELECT, sqlite3.SQLITE_READ, sqlite3.SQLITE_RECURSIVE}
_DENIED_FUNCTIONS = {"load_extension", "fts3_tokenizer", "sqlite_log", "readfile", "writefile", "edit"}


@dataclass(frozen=True)
class SQLReward(Reward):
    """1 where a completion's query gives the result of the reference query, else 0.

    The query is the last closed ```` ```sql ```` block, else one that runs to the end, else a block without a
    language, else in `<answer>` tags, else the last SELECT or WITH that begins a text, a paragraph or inline code, up
    to a semicolon or an empty line. Only what follows a thinking block is read.

    Results are equal if they have as many columns and the same rows as often; the order of rows counts where the
    reference's outermost query orders them, the names of columns do not. Numbers are equal within `tolerance`,
    integers exactly; text never equals a number, NULL equals NULL. A reference that leaves ties in its order in no
    certain order should break them.

    A query reads one database and cannot write: no other statement, no ATTACH, no PRAGMA, no extension, no file. One
    that fails or exceeds a limit is wrong; where the reference does, or the database cannot be read, its rows have no
    reward; nor have rows whose reference is no query, but an UPDATE, INSERT or DELETE. A value may have 1,000,000
    bytes, a query 20,000 characters, the engine's memory 512 MiB.

    Args:
        query_column: of the reference query.
        database_column: of the path of a database file, from `root` on. It is not changed, nor may others change it
            meanwhile.
        schema_column: of a script (CREATE TABLE, INSERT) that makes a database in memory, in place of a file.
        root: folder of the database files.
        engine: "sqlite", or "duckdb" (pip install 'trl-rlsd[duckdb]').
        timeout: seconds of one query, and of the script.
        step_limit: instructions of SQLite's virtual machine that a query may take: unlike seconds, the same on every
            machine. DuckDB has time alone.
        max_rows: rows that the reference may give.
        empty_reference: judge references whose result has no rows, or NULLs alone, although `SELECT 1 WHERE 0` is
            right then. By default their rows have no reward; a count of nothing, 0, is judged in any case.
        tolerance: of two numbers of which one is no integer, relative to the larger.
        workers: processes to run in. [the cores]

    Raises: ValueError, where there is no such engine; ImportError, where it is not installed.
    """

    query_column: str = "query"
    database_column: str = "database"
    schema_column: str | None = None
    root: str = ""
    engine: str = "sqlite"
    timeout: float = 10.0
    step_limit: int = 100_000_000
    max_rows: int = 10_000
    empty_reference: bool = False
    tolerance: float = 1e-6
    workers: int | None = None

    kind: ClassVar[str] = "sql"
    packages: ClassVar[tuple[str, ...]] = ("pebble", "loky")

    def __post_init__(self):
        if self.engine not in ENGINES:
            raise ValueError(f"engine={self.engine!r} is none of {', '.join(map(repr, ENGINES))}.")
        if self.engine == "duckdb" and find_spec("duckdb") is None:
            raise ImportError("engine='duckdb' needs duckdb, which is not installed: pip install 'trl-rlsd[duckdb]'")

    @property
    def required_columns(self) -> tuple[str, ...]:
        return (self.query_column, self.schema_column or self.database_column)

    def grade_all(self, texts: list[str], rows: list[dict[str, Any]]) -> list[float | Exception]:
        sources = [self._source(row) for row in rows]
        references = [(source, str(row[self.query_column])) for source, row in zip(sources, rows, strict=True)]
        distinct = list(dict.fromkeys(references))
        # Apart from the completions' queries, so that a process that is killed tells whose fault it was.
        results = dict(zip(distinct, self._run(reference_result, distinct), strict=True))
        grades: list[float | Exception] = [0.0] * len(texts)
        calls = {}
        for i, (text, reference) in enumerate(zip(texts, references, strict=True)):
            right, query = results[reference], find_query(text)
            if isinstance(right, TimeoutError):
                grades[i] = CannotGrade(f"the reference query {reference[1][:200]!r} or its database: {right}")
            elif isinstance(right, Exception):
                grades[i] = right
            elif not self.empty_reference and right.empty:
                said = "gives no rows, or NULLs alone: fill the tables, or set empty_reference=True"
                grades[i] = CannotGrade(f"the reference query {reference[1][:200]!r} {said}")
            elif query is not None:
                calls[i] = (reference[0], query, right, self.tolerance)
        for i, grade in zip(calls, self._run(query_grade, list(calls.values())), strict=True):
            grades[i] = 0.0 if isinstance(grade, TimeoutError) else grade
        return grades

    def _run(self, function: Callable[..., Any], calls: list[tuple]) -> list[Any | Exception]:
        # For what an engine's own limits do not end; there is time for the script, the query and opening a database.
        return run_all(function, calls, timeout=2 * self.timeout + 1, workers=self.workers)

    def _source(self, row: dict[str, Any]) -> Source:
        value = row[self.schema_column or self.database_column]
        script = database = None
        if value is not None and self.schema_column is not None:
            script = str(value)
        elif value is not None:
            database = str(Path(self.root, str(value)).absolute())
        return Source(self.engine, database, script, self.timeout, self.step_limit, self.max_rows)


class Source(NamedTuple):
    """A database, of a file or a script, and what a query of it may take."""

    engine: str
    database: str | None
    script: str | None
    timeout: float
    steps: int
    max_rows: int

    def broken(self, error: BaseException) -> CannotGrade:
        name = self.database or f"of the script {(self.script or '')[:80]!r}"
        return CannotGrade(f"the database {name} cannot be read: {type(error).__name__}: {error}")


class Result(NamedTuple):
    columns: int
    rows: list[tuple]
    ordered: bool = False

    @property
    def empty(self) -> bool:
        return all(value is None for row in self.rows for value in row)


class QueryFailed(Exception):
    """A query is malformed, forbidden or takes too much."""


def reference_result(source: Source, query: str) -> Result:
    """What a reference query gives.

    Raises: CannotGrade, where it fails.
    """
    with closing(ENGINES[source.engine](source)) as database:
        try:
            result = database.result(query, source.max_rows + 1)
        except QueryFailed as error:
            raise CannotGrade(f"the reference query {query[:200]!r} failed: {error}") from error
    if len(result.rows) > source.max_rows:
        raise CannotGrade(f"the reference query {query[:200]!r} gives more than max_rows={source.max_rows} rows")
    return Result(result.columns, result.rows, orders(query))


def query_grade(source: Source, query: str, right: Result, tolerance: float) -> float:
    """1 where a query gives the right result, else 0.

    Raises: CannotGrade, where the database cannot be read.
    """
    with closing(ENGINES[source.engine](source)) as database:
        try:
            found = database.result(query, len(right.rows) + 1)
        except QueryFailed:
            return 0.0
    return float(same_result(found, right, tolerance))


def find_query(text: str) -> str | None:
    """The query in a completion's text, see [`SQLReward`]; None where there is none, or it is too long."""
    text = after_thinking(text) or ""
    query = last_block(text, *_LANGUAGES)
    if query is None:
        query = last_block(text, "")
    if query is None:
        query = final_answer(text) if "</answer>" in text else _bare_query(text)
    try:
        return query if query and len(query.encode()) <= _QUERY_LENGTH else None
    except UnicodeEncodeError:  # a lone surrogate
        return None


def _bare_query(text: str) -> str | None:
    for begin in reversed(list(_BEGINS.finditer(text))):
        before = text[max(0, begin.start() - 200) : begin.start()]
        prose = before.rstrip()
        query = text[begin.start() : begin.start() + _QUERY_LENGTH + 1]
        if before.endswith("`"):
            return query.partition("`")[0]
        # else it is a subquery, or prose
        if not prose or prose[-1] in ";:." or before[len(prose) :].count("\n") > 1:
            end = next((token.start() for token in _ENDS.finditer(query) if token["end"]), None)
            return query[:end]
    return None


def orders(query: str) -> bool:
    """Whether a query's outermost SELECT has an ORDER BY: one outside of all brackets."""
    depth = 0
    for token in _ORDERS.finditer(query):
        if token["bracket"]:
            depth += 1 if token["bracket"] == "(" else -1
        elif token["order"] and depth == 0:
            return True
    return False


def same_result(found: Result, right: Result, tolerance: float) -> bool:
    """Whether two results are equal, see [`SQLReward`]."""
    if found.columns != right.columns or len(found.rows) != len(right.rows):
        return False
    columns = [_comparable(list(column), tolerance) for column in zip(*found.rows, *right.rows, strict=True)]
    rows = list(zip(*columns, strict=True))
    middle = len(found.rows)
    if right.ordered:
        return rows[:middle] == rows[middle:]
    return Counter(rows[:middle]) == Counter(rows[middle:])


def _comparable(values: list[Any], tolerance: float) -> list[Any]:
    """The values of a column such that equal ones are `==`, and hashable.

    Numbers become one where each is within the tolerance of the next: unlike rounding, this has no edges that part
    neighbours.
    """
    numbers = [_number(value) for value in values]
    same: dict[float, float] = {}
    last = None
    for number in sorted({number for number in numbers if number is not None}):
        near = last is not None and math.isclose(number, last, rel_tol=tolerance, abs_tol=1e-12)
        # integers may be keys, of which no two are the same
        same[number] = same[last] if near and not (_whole(number) and _whole(last)) else number
        last = number
    return [
        # types tell 1 from true and from '1'
        (type(value).__name__, str(value)) if number is None else same[number]
        for value, number in zip(values, numbers, strict=True)
    ]


def _number(value: Any) -> float | int | None:
    if isinstance(value, Decimal) and value.is_finite():
        return int(value) if value == value.to_integral_value() else float(value)
    if isinstance(value, (int, float)) and not isinstance(value, bool) and not math.isnan(value):
        return value
    return None


def _whole(number: float | int) -> bool:
    return isinstance(number, int) or (abs(number) < 2**53 and number.is_integer())


def _taken(rows: Iterable[tuple], most: int) -> list[tuple]:
    taken, size = [], 0
    for row in islice(rows, most):
        size += sum(len(value) for value in row if isinstance(value, (str, bytes)))
        if size > _RESULT_SIZE:
            raise QueryFailed(f"its result has more than {_RESULT_SIZE} bytes")
        taken.append(row)
    return taken


class Engine(ABC):
    """A database, opened for queries that cannot change it.

    Raises: CannotGrade, where it cannot be opened.
    """

    def __init__(self, source: Source):
        self.source = source
        if source.script is None and source.database is None:
            raise CannotGrade("the row names no database")
        if source.database is not None and not Path(source.database).is_file():
            raise CannotGrade(f"the database {source.database} is not there; `root` is the folder of relative paths")

    @abstractmethod
    def result(self, query: str, max_rows: int) -> Result:
        """What a query gives, its first `max_rows` rows.

        Raises: QueryFailed; CannotGrade, where the database cannot be read.
        """

    @abstractmethod
    def close(self) -> None: ...


class SQLite(Engine):
    def __init__(self, source: Source):
        super().__init__(source)
        try:
            self.connection = self._open()
            # some databases hold text that is not UTF-8
            self.connection.text_factory = lambda text: text.decode(errors="surrogateescape")
            self.connection.setlimit(sqlite3.SQLITE_LIMIT_ATTACHED, 0)
            self._limit()
            self.connection.executescript(source.script or "")
            self.connection.execute("SELECT count(*) FROM sqlite_schema")
            self._protect()
        except (sqlite3.Error, sqlite3.Warning, ValueError, MemoryError) as error:
            raise source.broken(error) from error

    def _open(self) -> sqlite3.Connection:
        database = self.source.database
        if database is None:
            return sqlite3.connect(":memory:", isolation_level=None)
        for journal in (Path(f"{database}-wal"), Path(f"{database}-journal")):
            if journal.exists() and journal.stat().st_size:
                raise CannotGrade(f"{journal} holds changes that its writer has not finished; open {database} once")
        # immutable: no lock, no journal, nothing is written beside it
        return sqlite3.connect(f"{Path(database).as_uri()}?mode=ro&immutable=1", uri=True, isolation_level=None)

    def _protect(self) -> None:
        # sorters spill to files otherwise; the limit of memory is the process's
        for pragma in ("temp_store = MEMORY", f"hard_heap_limit = {_MEMORY}", "query_only = ON"):
            self.connection.execute(f"PRAGMA {pragma}")
        self.connection.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, _VALUE_LENGTH)
        self.connection.setlimit(sqlite3.SQLITE_LIMIT_SQL_LENGTH, _QUERY_LENGTH)
        self.connection.setlimit(sqlite3.SQLITE_LIMIT_VDBE_OP, _PROGRAM_LENGTH)
        self.connection.set_authorizer(_authorize)

    def _limit(self) -> None:
        """Of what is run from now on."""
        deadline, steps = time.monotonic() + self.source.timeout, 0

        def exceeded() -> bool:
            nonlocal steps
            steps += _STEPS
            return steps > self.source.steps or time.monotonic() > deadline

        self.connection.set_progress_handler(exceeded, _STEPS)

    def result(self, query: str, max_rows: int) -> Result:
        self._limit()
        try:
            cursor = self.connection.execute(query)
            if cursor.description is None:
                raise QueryFailed("it is no query")
            return Result(len(cursor.description), _taken(cursor, max_rows))
        except (sqlite3.Error, sqlite3.Warning, ValueError, MemoryError) as error:
            # the low byte of an extended code is the kind
            if (getattr(error, "sqlite_errorcode", None) or 0) & 0xFF in _BROKEN:
                raise self.source.broken(error) from error
            raise QueryFailed(f"{type(error).__name__}: {error}") from error

    def close(self) -> None:
        self.connection.close()


def _authorize(action: int, first: str | None, second: str | None, *where: str | None) -> int:
    # What virtual tables (FTS, json_each) do to open: SQLite declares them so, and FTS looks whether it is outdated.
    opens = (action, first) in ((sqlite3.SQLITE_UPDATE, "sqlite_master"), (sqlite3.SQLITE_PRAGMA, "data_version"))
    function = action == sqlite3.SQLITE_FUNCTION and second not in _DENIED_FUNCTIONS
    return sqlite3.SQLITE_OK if function or opens or action in _ALLOWED else sqlite3.SQLITE_DENY


class DuckDB(Engine):
    def __init__(self, source: Source):
        import duckdb

        super().__init__(source)
        config: dict[str, Any] = {
            "enable_external_access": False,  # files, extensions, variables of Python
            "autoinstall_known_extensions": False,
            "autoload_known_extensions": False,
            "temp_directory": "",
            "memory_limit": f"{_MEMORY // 2**20}MiB",
            "threads": 1,
        }
        try:
            self.connection = duckdb.connect(
                source.database or ":memory:", read_only=source.database is not None, config=config
            )
            with self._limit():
                self.connection.execute(source.script or "")
            self.connection.execute("SET lock_configuration = true")
        except (duckdb.Error, MemoryError) as error:
            raise source.broken(error) from error

    @contextmanager
    def _limit(self) -> Iterator[None]:
        timer = threading.Timer(self.source.timeout, self.connection.interrupt)
        timer.start()
        try:
            yield
        finally:
            timer.cancel()
            timer.join()

    def result(self, query: str, max_rows: int) -> Result:
        import duckdb

        try:
            with self._limit():
                statements = self.connection.extract_statements(query)
                if [statement.type for statement in statements] != [duckdb.StatementType.SELECT]:
                    raise QueryFailed("it is not one SELECT")
                cursor = self.connection.execute(statements[0])
                rows = _taken(iter(cursor.fetchone, None), max_rows)
                return Result(len(cursor.description), rows)
        except duckdb.IOException as error:
            raise self.source.broken(error) from error
        except (duckdb.Error, RuntimeError, ValueError, MemoryError) as error:
            raise QueryFailed(f"{type(error).__name__}: {error}") from error

    def close(self) -> None:
        self.connection.close()


ENGINES: dict[str, type[Engine]] = {"sqlite": SQLite, "duckdb": DuckDB}

sql_reward = SQLReward()
