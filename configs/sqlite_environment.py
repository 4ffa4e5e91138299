"""A database that the model may ask before it answers: an environment for `environment_factory`.

    reset -> the tables' schema, for the prompt
    query -> a tool; the last query that runs is the model's answer
    get_reward -> whether that gives what the reference query gives
    get_privileged_context -> the reference query, what it gives, and how the rollout's last query failed: what the
        teacher reads, and the student never

Queries run in the processes and within the limits of `sql_reward`: they cannot write, and none can hang the trainer.
"""

from trl_rlsd.rewards.pool import run_all
from trl_rlsd.rewards.sql import Result, Source, SQLReward, reference_result


REWARD = SQLReward(schema_column="schema", timeout=5.0, max_rows=100)  # a query that gives more rows fails
SCHEMA = "SELECT sql FROM sqlite_schema WHERE sql IS NOT NULL"
MAX_CHARACTERS = 1000  # of a result: what a tool says takes tokens of max_completion_length


class SQLiteEnvironment:
    """A row's `schema`, a script of CREATE and INSERT, makes the database, in memory and anew for each query; `query`
    is the reference. Nothing is kept open, so that rollouts cannot meet."""

    def __init__(self):
        REWARD.check()

    def reset(self, query: str, schema: str, **columns) -> str:
        self._row = {"query": query, "schema": schema}
        self._answer = self._failure = None
        return f"\n\nThe database:\n{_text(self._run(SCHEMA))}"

    def query(self, sql: str) -> str:
        """Runs a query against the SQLite database, which it cannot change.

        Args:
            sql: One SELECT statement.

        Returns:
            The rows of the result, one a line, or an error.
        """
        result = self._run(sql)
        self._failure = None if isinstance(result, Result) else f"{sql}\n{result}"
        if self._failure is None:
            self._answer = sql
        return _text(result)

    def get_reward(self) -> float | None:
        answer = "" if self._answer is None else f"```sql\n{self._answer}\n```"
        return REWARD(None, [answer], **{name: [value] for name, value in self._row.items()})[0]

    def get_privileged_context(self) -> str | None:
        result = self._run(self._row["query"])
        if not isinstance(result, Result) or result.empty:
            return None  # the row has no reward either
        context = f"A right query:\n{self._row['query']}\n\nIts result:\n{_text(result)}"
        return context if self._failure is None else f"{context}\n\nThe last query failed:\n{_text(self._failure)}"

    def _run(self, sql: str) -> Result | str:
        """A query's result, or why there is none."""
        source = Source("sqlite", None, self._row["schema"], REWARD.timeout, REWARD.step_limit, REWARD.max_rows)
        (result,) = run_all(reference_result, [(source, sql)], timeout=2 * REWARD.timeout + 1)
        if isinstance(result, Result):
            return result
        return f"Error: {str(result).removeprefix(f'the reference query {sql[:200]!r} ')}"


def _text(result: Result | str) -> str:
    if isinstance(result, Result):
        result = "\n".join(" | ".join(map(str, row)) for row in result.rows) or "No rows."
    result = result.encode(errors="replace").decode()  # databases and JSON may hold what is no UTF-8
    return result if len(result) <= MAX_CHARACTERS else f"{result[:MAX_CHARACTERS]}\n(cut)"
