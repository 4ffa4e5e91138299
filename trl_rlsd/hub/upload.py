"""Files into a repository: one commit, retried where that is safe, read back before it is called done.

    who am I -> repository, branch, head -> large files -> commit on that head -> the commit's files, compared

The commit names its parent, so of a commit that was sent twice the Hub takes one. When an answer is lost, the history
says whether it was taken. huggingface_hub 2.4 itself retries the large files and what it lists (http_backoff); it does
not retry the token, the repository and the commit, nor does it ever time out: both are done here.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any, TypeVar

from huggingface_hub import CommitOperationAdd, HfApi, constants, get_session
from huggingface_hub.errors import (
    HfHubHTTPError,
    HTTPError,  # of httpx, in whatever version the client stands on: the way to the Hub, not its answer
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import parse_ratelimit_headers


ATTEMPTS = 5
LONGEST_WAIT = 300.0  # seconds; the Hub's windows of rate limits
TIMEOUT = 120.0  # seconds without a byte

_PASSING = (408, 429, 500, 502, 503, 504)
_LOST = (*_PASSING, 409, 412)  # of a commit: it may have been taken, or the head may have moved
_FAILURES = (HTTPError, OSError, RuntimeError, ValueError)
Result = TypeVar("Result")


class PublishError(RuntimeError):
    """What failed, what is on the Hub now, and what to do."""


@dataclass(frozen=True)
class Publication:
    """What is on the Hub, or would be after a dry run: then `commit` is None.

    `files`: name -> bytes. `left_out`: what else the folder holds. `also_there`: what the repository held before and
    still holds.
    """

    repo_id: str
    url: str
    commit: str | None
    files: Mapping[str, int]
    left_out: Sequence[str] = ()
    also_there: Sequence[str] = ()

    def __str__(self) -> str:
        done = f"Published, commit {self.commit}," if self.commit else "Would be published"
        lines = [f"{done} at {self.url}:", *(f"  {size:>14,} bytes  {name}" for name, size in self.files.items())]
        lines += [f"Not published: {', '.join(self.left_out)}"] if self.left_out else []
        lines += [f"Already there, and kept: {', '.join(self.also_there)}"] if self.also_there else []
        return "\n".join(lines)


def push(
    files: Mapping[str, bytes | Path],
    repo_id: str,
    *,
    left_out: Sequence[str] = (),
    token: str | None = None,
    private: bool | None = None,
    revision: str | None = None,
    commit_message: str,
    dry_run: bool = False,
) -> Publication:
    """Publish files that were checked; see `trl_rlsd.hub.publish`."""
    sizes = {name: len(file) if isinstance(file, bytes) else file.stat().st_size for name, file in files.items()}
    if dry_run:
        return Publication(repo_id, f"{constants.ENDPOINT}/{repo_id}", None, sizes, left_out)
    api = HfApi(token=token)
    with _timeout():
        target = _open(api, repo_id, private, revision)
        operations = [CommitOperationAdd(path_in_repo=name, path_or_fileobj=file) for name, file in files.items()]
        expected = {operation.path_in_repo: _fingerprint(operation, files) for operation in operations}
        with _told("uploading the large files", target.no_commit):
            api.preupload_lfs_files(target.repo_id, operations, revision=target.revision, free_memory=False)
        commit = _commit(api, target, operations, expected, commit_message)
        with _told("reading back", f"commit {commit} is at {target.url}, unverified; publish again to compare it"):
            there = _listed(api, target, commit)
        if wrong := _differences(there, expected):
            raise PublishError(
                f"Commit {commit} is at {target.url}, but not as it was sent: {'; '.join(wrong)}. A .gitignore in the "
                "repository may leave files out. Publish again, or undo the commit on the Hub."
            )
    also_there = sorted(set(there) - set(expected) - {".gitattributes"})
    return Publication(target.repo_id, target.url, commit, sizes, left_out, also_there)


@dataclass(frozen=True)
class _Target:
    repo_id: str
    url: str
    revision: str
    head: str
    """The commit that ours comes after."""

    @property
    def no_commit(self) -> str:
        return f"nothing of this is in {self.url}, since there was no commit; publish again when that is mended"


def _open(api: HfApi, repo_id: str, private: bool | None, revision: str | None) -> _Target:
    """The repository and its branch, made if need be."""
    with _told("asking whose token this is", "nothing was sent"):
        _patiently(api.whoami)  # elsewhere a token that has expired looks like a repository that is not there
    url, branch = f"{api.endpoint}/{repo_id}", revision or constants.DEFAULT_REVISION
    with _told(f"opening {repo_id}", "no file was sent"):
        try:
            info = _patiently(lambda: api.model_info(repo_id))
        except RepositoryNotFoundError:
            _patiently(lambda: api.create_repo(repo_id, private=private, exist_ok=True))
            info = _patiently(lambda: api.model_info(repo_id))
        if private and info.private is False:
            raise PublishError(
                f"{url} is public and was to be private. No file was sent. Make it private in its settings, or choose "
                "another name."
            )
        if branch != constants.DEFAULT_REVISION:
            try:
                info = _patiently(lambda: api.model_info(repo_id, revision=branch))
            except RevisionNotFoundError:
                _patiently(lambda: api.create_branch(repo_id, branch=branch, exist_ok=True))
                info = _patiently(lambda: api.model_info(repo_id, revision=branch))
    return _Target(repo_id, url, branch, info.sha)


def _commit(
    api: HfApi, target: _Target, operations: list[CommitOperationAdd], expected: Mapping[str, str], message: str
) -> str:
    """Commit once, however often it is sent; returns the commit's id."""
    for attempt in range(ATTEMPTS):
        try:
            return api.create_commit(
                target.repo_id,
                operations,
                commit_message=message,
                revision=target.revision,
                parent_commit=target.head,
            ).oid
        except _FAILURES as error:
            failure = error
        if not (_status(failure) in _LOST or _way_broke(failure)):
            with _told("committing", target.no_commit):
                raise failure
        wait = _wait(failure, attempt)
        if wait is not None:
            time.sleep(wait)
        with _told("committing, and then asking whether the commit was taken", f"look at {target.url}/commits"):
            commits = api.list_repo_commits(target.repo_id, revision=target.revision)
            newer = list(takewhile(lambda commit: commit.commit_id != target.head, commits))
            for commit in reversed(newer):
                if not _differences(_listed(api, target, commit.commit_id), expected):
                    return commit.commit_id  # it was taken, and its answer was lost
        if newer:
            raise PublishError(
                f"{target.url} was changed by someone else meanwhile (its head was {target.head}, now it is "
                f"{newer[0].commit_id}: {newer[0].title!r}). None of these files were committed. Look at that change, "
                "and publish again."
            ) from failure
        if wait is None:
            break
    with _told("committing", target.no_commit):
        raise failure


def _fingerprint(operation: CommitOperationAdd, files: Mapping[str, bytes | Path]) -> str:
    """What the Hub must say of a file: the SHA-256 of a large one, which it is stored by, or git's own of a small one.
    Which of both it is, the Hub decides."""
    content = files[operation.path_in_repo]
    sha256 = operation.upload_info.sha256.hex()  # computed once, and used for the upload
    if operation.upload_info.size > 20_000_000:  # the Hub takes none of this size as a regular file
        return sha256
    content = content if isinstance(content, bytes) else content.read_bytes()
    blob = b"blob %d\0" % len(content) + content
    return f"{sha256} {hashlib.sha1(blob).hexdigest()}"


def _listed(api: HfApi, target: _Target, commit: str) -> dict[str, RepoFile]:
    tree = api.list_repo_tree(target.repo_id, recursive=True, revision=commit)
    return {entry.path: entry for entry in tree if isinstance(entry, RepoFile)}


def _differences(there: Mapping[str, RepoFile], expected: Mapping[str, str]) -> list[str]:
    wrong = []
    for name, fingerprint in expected.items():
        if name not in there:
            wrong.append(f"{name} is missing")
        elif (there[name].lfs.sha256 if there[name].lfs else there[name].blob_id) not in fingerprint.split():
            wrong.append(f"{name} has another content")
    return wrong


def _patiently(call: Callable[[], Result]) -> Result:
    """Call until it answers, where asking again changes nothing."""
    for attempt in range(ATTEMPTS):
        try:
            return call()
        except _FAILURES as error:
            wait = _wait(error, attempt) if _status(error) in _PASSING or _way_broke(error) else None
            if wait is None:
                raise
        time.sleep(wait)
    raise AssertionError("the last attempt returns or raises")


def _status(error: Exception) -> int | None:
    return error.response.status_code if isinstance(error, HfHubHTTPError) else None


def _way_broke(error: Exception) -> bool:
    """Whether there was no answer, or none of the Hub: a proxy's page instead of JSON."""
    return isinstance(error, json.JSONDecodeError) or (
        isinstance(error, HTTPError) and not isinstance(error, HfHubHTTPError)
    )


def _wait(error: Exception, attempt: int) -> float | None:
    """Seconds to the next attempt, as the Hub asks or doubling; None where there is none."""
    if attempt == ATTEMPTS - 1:
        return None
    asked = _asked_to_wait(error)
    if asked is not None:
        return asked if asked <= LONGEST_WAIT else None
    return float(2**attempt)


def _asked_to_wait(error: Exception) -> float | None:
    if not isinstance(error, HfHubHTTPError):
        return None
    limit, after = parse_ratelimit_headers(error.response.headers), error.response.headers.get("Retry-After", "")
    if limit is not None and limit.remaining == 0:
        return float(limit.reset_in_seconds)
    return float(after) if after.isdigit() else None


@contextmanager
def _timeout() -> Iterator[None]:
    """The client waits for ever; a connection that is dead without being closed would hang the process."""
    session = get_session()
    before, session.timeout = session.timeout, TIMEOUT
    try:
        yield
    finally:
        session.timeout = before


@contextmanager
def _told(doing: str, now: str) -> Iterator[None]:
    """Turn a failure into a PublishError that says where it was, what is on the Hub, and what to do."""
    try:
        yield
    except PublishError:
        raise
    except _FAILURES as error:
        raise PublishError(f"Publishing failed while {doing}: {_advice(error)}\nNow: {now}.") from error


def _advice(error: Any) -> str:
    while not isinstance(error, HTTPError) and isinstance(error.__cause__, HTTPError):
        error = error.__cause__  # uploads wrap what the Hub said
    status, said = _status(error), " ".join(str(error).split())[:300]
    if isinstance(error, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set; unset it to publish."
    if isinstance(error, ConnectionError):  # of hf_xet 1.8, after minutes of attempts of its own
        return f"the storage of large files (Xet) refused or was not reached; HF_HUB_DISABLE_XET=1 avoids it. ({said})"
    if status == 401 and not isinstance(error, RepositoryNotFoundError):
        return (
            "the Hub does not take the token (401): it has expired or was revoked. Make one with write access at "
            f"https://huggingface.co/settings/tokens and run `hf auth login`, or pass token=. ({said})"
        )
    if status == 403:
        return f"the token may not write there (403); it needs write access to that account. ({said})"
    if status in (401, 404):
        return f"there is no such repository or branch that this token may see ({status}); check its name. ({said})"
    if status == 429:
        asked = _asked_to_wait(error)
        return f"too many requests (429); try again in {f'{asked:.0f} s' if asked else 'a few minutes'}. ({said})"
    if status is not None and status >= 500:
        return f"the Hub has trouble ({status}), at each of several attempts; try again later. ({said})"
    if isinstance(error, HTTPError) and status is None:
        return f"the connection broke or timed out, at each of several attempts ({type(error).__name__}: {said})"
    return f"{said or type(error).__name__}"
