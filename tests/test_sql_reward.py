"""SQL queries: how their results compare, what they cannot do, and whose fault a failure is."""

import hashlib
import pickle
import sqlite3
import threading
import time
from decimal import Decimal

import pytest

import trl_rlsd.rewards.sql as sql
from trl_rlsd.rewards.grading import CannotGrade
from trl_rlsd.rewards.sql import Result, Source, SQLReward, find_query, orders, same_result


SCRIPT = """
CREATE TABLE t (id INTEGER PRIMARY KEY, name TEXT, price REAL);
INSERT INTO t VALUES (1, 'a', 0.1), (2, 'b', 0.2), (3, 'b', NULL);
"""
ENGINES = [
    "sqlite",
    pytest.param("duckdb", marks=pytest.mark.skipif("not __import__('importlib').util.find_spec('duckdb')")),
]


def block(query):
    return f"I would write\n```sql\n{query}\n```\n"


def graded(queries, reference="SELECT 1", script=SCRIPT, **options):
    reward = SQLReward(schema_column="schema", **options)
    texts = [block(query) for query in queries]
    return reward(None, texts, query=[reference] * len(texts), schema=[script] * len(texts))


@pytest.fixture
def folder(tmp_path):
    with sqlite3.connect(tmp_path / "shop #1?.db") as connection:
        connection.executescript(
            SCRIPT + "CREATE VIRTUAL TABLE docs USING fts5(body); INSERT INTO docs VALUES ('a b');"
        )
    connection.close()
    return tmp_path


def opened(path, engine="sqlite"):
    return Source(engine, str(path), None, timeout=5, steps=10**8, max_rows=10)


def contents(folder):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


@pytest.mark.parametrize("engine", ENGINES)
def test_a_query_is_right_if_its_result_is(engine):
    queries = {
        "SELECT name FROM t": 1,
        "select name AS other from t -- comment": 1,
        "SELECT name FROM t ORDER BY id DESC;": 1,
        "SELECT 'a' UNION ALL SELECT 'b' UNION ALL SELECT 'b'": 1,
        "SELECT DISTINCT name FROM t": 0,
        "SELECT name, id FROM t": 0,
        "SELECT name FROM t WHERE id > 3": 0,
        "SELECT name FROM t UNION ALL SELECT 'c'": 0,
        "SELECT id FROM t": 0,
        "SELECT nope FROM t": 0,
        "SELEC name FROM t": 0,
        "SELECT name FROM t; SELECT name FROM t": 0,
        "-- nothing": 0,
    }
    assert graded(list(queries), "SELECT name FROM t", engine=engine) == list(map(float, queries.values()))


@pytest.mark.parametrize("engine", ENGINES)
def test_order_counts_where_the_reference_orders(engine):
    queries = ["SELECT id FROM t ORDER BY id", "SELECT id FROM t ORDER BY id DESC"]
    assert graded(queries, "SELECT id FROM t ORDER BY id DESC", engine=engine) == [0.0, 1.0]
    assert graded(queries, "SELECT id FROM t", engine=engine) == [1.0, 1.0]


@pytest.mark.parametrize(
    "query, ordered",
    [
        ("SELECT a FROM t ORDER BY a", True),
        ("select a from t order\nby a limit 3", True),
        ("WITH x AS (SELECT 1) SELECT * FROM x UNION SELECT 2 ORDER /* up */ BY 1", True),
        ("SELECT a FROM t", False),
        ("SELECT * FROM (SELECT a FROM t ORDER BY a)", False),
        ("SELECT row_number() OVER (ORDER BY a) FROM t", False),
        ("SELECT 'ORDER BY' AS \"order by\", [order] FROM t -- ORDER BY a\n/* ORDER BY a", False),
        ("SELECT 'it''s' FROM t ORDER BY a", True),
        ("SELECT reorder, border FROM t", False),
    ],
)
def test_only_the_outermost_order_by_orders(query, ordered):
    assert orders(query) is ordered


def results(first, second, ordered=False, tolerance=1e-6):
    first, second = ([row if isinstance(row, tuple) else (row,) for row in rows] for rows in (first, second))
    width = len((first or second or [()])[0])
    return same_result(Result(width, first), Result(width, second, ordered), tolerance)


@pytest.mark.parametrize(
    "value, same, different",
    [
        (1, [1.0, Decimal(1)], [2, "1", True, None, b"1", 1.00001]),
        (2_000_001, [2_000_001.0], [2_000_002, 2_000_000]),
        (0.1 + 0.2, [0.3, Decimal("0.3"), 0.30000001], [0.31, "0.3", 0]),
        (0.0, [-0.0, 1e-17, 0], [1e-9, None, ""]),
        (2**63 - 1, [2**63 - 1], [2**63 - 2]),
        (1e300, [1e300 * (1 + 1e-9)], [1e301, float("inf")]),
        (float("nan"), [float("nan")], [0.0, None]),
        (None, [None], [0, "", "None"]),
        ("a", ["a"], ["A", "a ", b"a"]),
        (b"\0", [b"\0"], ["\0", b""]),
    ],
)
def test_values_are_equal_within_their_type(value, same, different):
    for other in same:
        assert results([value], [other]), other
        assert results([other], [value]), other
    for other in different:
        assert not results([value], [other]), other
        assert not results([other], [value]), other


def test_rows_count_as_often_as_they_stand_there():
    assert results([1, 2, 2], [2, 1, 2])
    assert not results([1, 2, 2], [1, 1, 2])
    assert not results([1, 2], [1, 2, 2])
    assert results([], [])
    assert not results([], [1])
    assert not same_result(Result(1, []), Result(2, []), 1e-6)
    assert not results([1, 2], [2, 1], ordered=True)


def test_tolerance_has_no_edges_and_does_not_mix_rows():
    near, far = 0.3, 0.1 + 0.2
    assert results([(far, "a"), (near, "b")], [(near, "a"), (far, "b")])
    assert results([(far, 4.0), (near, 5.0)], [(near, 4.0), (far, 5.0)], ordered=True)
    assert not results([(far, "a"), (near, "a")], [(near, "a"), (far, "b")])
    # at six digits these two round apart
    assert results([0.12345650000001], [0.12345649999999])


@pytest.mark.parametrize(
    "text, query",
    [
        ("```sql\nSELECT 1\n```\nas SELECT 2 is wrong", "SELECT 1"),
        ("```sql\nSELECT 1\n```\n```sql\nSELECT 2;\n```", "SELECT 2;"),
        ("```sqlite\nSELECT 1\n```\nIt gives\n```\n1\n```", "SELECT 1"),
        ("```\nSELECT 1\n```", "SELECT 1"),
        ("```sql\nSELECT 1\nFROM t", "SELECT 1\nFROM t"),
        ("```sql SELECT 1```", "SELECT 1"),
        ("<answer>SELECT 1</answer>", "SELECT 1"),
        ("SELECT 1", "SELECT 1"),
        ("select a,\nb from t; It selects.", "select a,\nb from t"),
        ("It is `SELECT 1`, not SELECT 2.", "SELECT 1"),
        (
            "The query:\nSELECT a FROM t WHERE b IN (\nSELECT 1)\n\nIt works; well.",
            "SELECT a FROM t WHERE b IN (\nSELECT 1)",
        ),
        ("Query: WITH x AS (SELECT ';') SELECT * FROM x;", "WITH x AS (SELECT ';') SELECT * FROM x"),
        ("SELECT 1;\n\nNo, better:\n\nSELECT 2", "SELECT 2"),
        ("SELECT 1\n\nWith this query, you select the rows.", "SELECT 1"),
        ("<think>SELECT 1</think>SELECT 2", "SELECT 2"),
        ("<think>SELECT 1", None),
        ("", None),
        ("We select from the table.", None),
        ("```sql\nSELECT '\ud800'\n```", None),
        ("```sql\nSELECT " + "1+" * 10_000 + "1\n```", None),
    ],
)
def test_what_is_read_as_the_query(text, query):
    assert find_query(text) == query


def test_a_file_is_read_and_stays_as_it_was(folder):
    before = contents(folder)
    reward = SQLReward(root=str(folder))
    queries = {
        "SELECT body FROM docs WHERE docs MATCH 'b'": 1,
        "SELECT value FROM json_each('[\"a b\"]')": 1,
        "SELECT body FROM docs WHERE docs MATCH 'c'": 0,
        "DELETE FROM t": 0,
        "UPDATE sqlite_master SET name = 'x'": 0,
        "DROP TABLE t": 0,
        "CREATE TEMP TABLE x (a)": 0,
        "BEGIN": 0,
    }
    columns = {"query": ["SELECT body FROM docs"] * len(queries), "database": ["shop #1?.db"] * len(queries)}
    assert reward(None, [block(query) for query in queries], **columns) == list(map(float, queries.values()))
    assert contents(folder) == before


@pytest.mark.parametrize(
    "query",
    [
        "ATTACH '{}/new.db' AS new",
        "VACUUM INTO '{}/new.db'",
        "PRAGMA table_info(t)",
        "PRAGMA writable_schema = 1",
        "SELECT * FROM pragma_table_info('t')",
        "SELECT load_extension('{}/new.so')",
        "SELECT fts3_tokenizer('simple')",
        "INSERT INTO t VALUES (4, 'c', 1) RETURNING 1",
        "DETACH main",
    ],
)
def test_sqlite_does_nothing_but_read(query, folder):
    before = contents(folder)
    source = opened(folder / "shop #1?.db")
    with pytest.raises(CannotGrade, match=r"not authorized|authorization denied|prohibited"):
        sql.reference_result(source, query.format(folder))
    assert contents(folder) == before


@pytest.mark.parametrize(
    "query",
    [
        "COPY t TO '{}/new.csv'",
        "EXPORT DATABASE '{}/new'",
        "ATTACH '{}/new.db' AS new",
        "INSTALL httpfs",
        "LOAD httpfs",
        "SET enable_external_access = true",
        "CREATE TABLE x (a INT)",
        "PRAGMA database_list",
        "SELECT * FROM read_csv('/etc/passwd')",
        "SELECT * FROM read_text('/etc/passwd')",
        "SELECT * FROM '/etc/passwd'",
        "SELECT * FROM glob('/etc/*')",
        "SELECT * FROM max_rows",  # a Python variable there
        "SELECT 1; SELECT 1",
        "EXPLAIN SELECT 1",
    ],
)
def test_duckdb_does_nothing_but_read(query, tmp_path):
    duckdb = pytest.importorskip("duckdb")
    with duckdb.connect(str(tmp_path / "x.duckdb")) as connection:
        connection.execute("CREATE TABLE t (a INT); INSERT INTO t VALUES (1)")
    before = contents(tmp_path)
    source = opened(tmp_path / "x.duckdb", "duckdb")
    assert sql.reference_result(source, "SELECT a FROM t") == Result(1, [(1,)])
    with pytest.raises(CannotGrade, match=r"not one SELECT|disabled|does not exist"):
        sql.reference_result(source, query.format(tmp_path))
    assert contents(tmp_path) == before


ENDLESS = "WITH RECURSIVE r(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM r) SELECT count(*) FROM r"
HOSTILE = [
    ENDLESS,
    "SELECT zeroblob(1000000000)",
    "SELECT printf('%.*c', 2000000000, 'x')",
    "WITH RECURSIVE r(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM r) SELECT group_concat(n) FROM r",
    "WITH RECURSIVE r(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM r) SELECT n FROM r ORDER BY randomblob(100000)",
    "WITH RECURSIVE r(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM r) SELECT zeroblob(900000) FROM r",
    "WITH a AS (SELECT 1 UNION SELECT 2) SELECT count(*) FROM " + ", ".join(f"a a{i}" for i in range(40)),
    "WITH t0 AS (SELECT 1), "
    + ", ".join(f"t{i} AS (SELECT * FROM t{i - 1} UNION SELECT * FROM t{i - 1})" for i in range(1, 30))
    + " SELECT * FROM t29",
    "SELECT " + "(" * 5000 + "1" + ")" * 5000,
    "SELECT " + "1+" * 9000 + "1",
    "SELECT 1 " + "UNION SELECT 1 " * 1000,
    "SELECT '\0'",
    "\0" * 10**6,
    "SELECT '\ud800'",
    "SELECT '" + "x" * 10**6 + "'",
]


def test_a_hostile_query_is_wrong_and_leaves_nothing_behind(folder):
    before = contents(folder)
    reward = SQLReward(root=str(folder), timeout=0.5)
    texts = [*map(block, HOSTILE), "", "```sql\n", "SELECT " * 10**5, "<think>" * 10**5, block("SELECT 1")]
    rows = {"query": ["SELECT 1"] * len(texts), "database": ["shop #1?.db"] * len(texts)}
    assert reward(None, texts, **rows) == [0.0] * (len(texts) - 1) + [1.0]
    assert contents(folder) == before
    start = time.perf_counter()
    assert reward(None, [block("SELECT 1")], query=["SELECT 1"], database=["shop #1?.db"]) == [1.0]
    assert time.perf_counter() - start < 20  # no process is busy with what was stopped


def test_a_hostile_query_is_wrong_for_duckdb():
    pytest.importorskip("duckdb")
    queries = [
        ENDLESS,
        "SELECT repeat('x', 10000000000)",
        "SELECT list(range) FROM range(10000000000)",
        "SELECT count(*) FROM range(1000000) a, range(1000000) b WHERE a.range * b.range = -1",
        "SELECT '\0'",
        "SELECT '\ud800'",
        "SELECT 1",
    ]
    assert graded(queries, engine="duckdb", timeout=1) == [0.0] * 6 + [1.0]


def test_memory_is_limited(folder):
    numbers = "WITH RECURSIVE r(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM r LIMIT {})"
    query = numbers + " SELECT max(n) OVER () FROM r ORDER BY zeroblob(900000 + n)"
    source = opened(folder / "shop #1?.db")
    assert sql.reference_result(source, query.format(9)).rows == [(9,)] * 9
    with pytest.raises(CannotGrade, match="MemoryError"):
        sql.reference_result(source, query.format(700))


def test_steps_are_limited_apart_from_time():
    count = "WITH RECURSIVE r(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM r LIMIT 20000) SELECT count(*) FROM r"
    assert graded([count], "SELECT 20000") == [1.0]
    assert graded([count], "SELECT 20000", step_limit=50_000) == [0.0]


@pytest.mark.parametrize(
    "reference, said", [(ENDLESS, "interrupted"), ("SELEC 1", "syntax error"), ("DELETE FROM t", "not authorized")]
)
def test_a_reference_that_fails_is_not_a_wrong_answer(reference, said, caplog):
    assert graded(["SELECT 1", "junk"], reference, timeout=0.5) == [None, None]
    assert said in caplog.text
    assert reference[:20] in caplog.text


def test_a_reference_has_at_most_max_rows(caplog):
    assert graded(["SELECT id FROM t"], "SELECT id FROM t", max_rows=3) == [1.0]
    assert graded(["SELECT id FROM t"], "SELECT id FROM t", max_rows=2) == [None]
    assert "max_rows=2" in caplog.text


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(
    "reference", ["SELECT id FROM t WHERE id > 3", "SELECT max(id) FROM t WHERE id > 3", "SELECT NULL FROM t"]
)
def test_a_reference_that_gives_nothing_is_judged_on_demand_alone(reference, engine, caplog):
    queries = [reference, "SELECT 1"]
    assert graded(queries, reference, engine=engine) == [None, None]
    assert "gives no rows, or NULLs alone" in caplog.text
    assert "empty_reference=True" in caplog.text
    assert graded(queries, reference, engine=engine, empty_reference=True) == [1.0, 0.0]


def test_an_empty_query_earns_nothing_by_default():
    assert graded(["SELECT 1 WHERE 0"], "SELECT id FROM t WHERE id > 3", empty_reference=True) == [1.0]
    assert graded(["SELECT 1 WHERE 0"], "SELECT id FROM t WHERE id > 3") == [None]
    assert graded(["SELECT 1 WHERE 0"], "SELECT id FROM t") == [0.0]


def test_a_reference_with_some_nulls_or_a_zero_is_judged():
    assert graded(["SELECT price FROM t"], "SELECT price FROM t") == [1.0]
    assert graded(["SELECT 0"], "SELECT count(*) FROM t WHERE id > 3") == [1.0]


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("reference", ["UPDATE t SET id = 9", "INSERT INTO t VALUES (9, 'c', 1)", "DELETE FROM t"])
def test_a_reference_that_is_no_query_gives_no_reward(reference, engine):
    assert graded([reference, "SELECT 1"], reference, engine=engine) == [None, None]


def test_a_database_that_cannot_be_read_is_not_a_wrong_answer(folder, caplog):
    (folder / "junk.db").write_bytes(b"junk" * 2000)
    (folder / "busy.db").write_bytes((folder / "shop #1?.db").read_bytes())
    (folder / "busy.db-wal").write_bytes(b"x")
    names = ["nowhere.db", "junk.db", "busy.db", None, "shop #1?.db"]
    rewards = SQLReward(root=str(folder))(None, [block("SELECT 1")] * 5, query=["SELECT 1"] * 5, database=names)
    assert rewards == [None, None, None, None, 1.0]
    failures = SQLReward(root=str(folder)).grade_all(
        [""] * 4, [{"query": "SELECT 1", "database": name} for name in names[:4]]
    )
    assert all(str(name or "no database") in str(failure) for name, failure in zip(names, failures, strict=False))


@pytest.mark.parametrize("engine", ENGINES)
def test_a_script_that_fails_is_not_a_wrong_answer(engine):
    assert graded(["SELECT 1"], script="CREATE TABL t", engine=engine) == [None]
    assert graded(["SELECT 1"], script=None, engine=engine) == [None]


def test_a_script_writes_no_file(tmp_path):
    for statement in ("ATTACH '{}/new.db' AS new", "VACUUM INTO '{}/new.db'"):
        assert graded(["SELECT 1"], script=statement.format(tmp_path)) == [None]
    assert list(tmp_path.iterdir()) == []


def test_a_killed_process_is_the_fault_of_whose_query_it_ran(monkeypatch):
    late, dead = TimeoutError("no result within 1 s"), RuntimeError("the process died")

    def blame(reference, completion):
        def run_all(function, calls, **limits):
            return [reference if function is sql.reference_result else completion] * len(calls)

        monkeypatch.setattr(sql, "run_all", run_all)
        return graded(["SELECT 1"])

    assert blame(Result(1, [(1,)]), 1.0) == [1.0]
    assert blame(Result(1, [(1,)]), late) == [0.0]
    assert blame(late, None) == [None]
    assert blame(Result(1, [(1,)]), dead) == [None]


def test_a_group_runs_its_reference_once(monkeypatch):
    ran = []
    run_all = sql.run_all
    monkeypatch.setattr(
        sql, "run_all", lambda f, calls, **limits: ran.append(len(calls)) or run_all(f, calls, **limits)
    )
    assert graded(["SELECT 1", "SELECT 2", "SELECT 1.0", "x"]) == [1.0, 0.0, 1.0, 0.0]
    assert ran == [1, 4]


@pytest.mark.parametrize("options, said", [({"engine": "mysql"}, "'sqlite', 'duckdb'")])
def test_wrong_options_are_named_when_they_are_given(options, said):
    with pytest.raises(ValueError, match=said):
        SQLReward(**options)


def test_it_is_pickled_and_called_in_threads():
    reward = pickle.loads(pickle.dumps(SQLReward(schema_column="schema")))
    assert reward == SQLReward(schema_column="schema")
    grades = {}

    def grade(thread):
        texts = [block(f"SELECT {i % 4}") for i in range(20)]
        grades[thread] = reward(None, texts, query=[f"SELECT {thread}"] * 20, schema=[SCRIPT] * 20)

    threads = [threading.Thread(target=grade, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert grades == {i: [float(j % 4 == i) for j in range(20)] for i in range(4)}
