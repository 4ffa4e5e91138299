"""Publishing a trained model on the Hub: its own files, a model card made from the run, and nothing else.

folder -> contents: what is uploaded, and what refuses -> card: README.md, curves -> upload: one commit, read back

publish("quickstart-output/adapter", "me/adapter", dry_run=True)    the list, no network
publish("quickstart-output/adapter", "me/adapter")                  the same, published
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub.utils import validate_repo_id

from trl_rlsd.hub import card, contents
from trl_rlsd.hub.upload import Publication, PublishError, push
from trl_rlsd.run_record import read_metrics, read_record


__all__ = ["Publication", "PublishError", "publish"]


def publish(
    folder: str | Path,
    repo_id: str,
    *,
    base_model: str | None = None,
    token: str | None = None,
    private: bool | None = None,
    revision: str | None = None,
    commit_message: str = "Upload model trained with RLSD",
    record: Mapping[str, Any] | None = None,
    metrics: Sequence[Mapping[str, Any]] | None = None,
    private_texts: Iterable[str] = (),
    license: str | None = None,
    dry_run: bool = False,
) -> Publication:
    """Put a model and its card into a repository, in one commit that is read back before this returns.

    Args:
        folder: an adapter or a full model as `trainer.save_model` writes it, alone or among a run's other files.
        repo_id: "owner/name", as the card's snippet loads it. The repository is made if there is none.
        base_model: the id that others load the base by; needed where the folder names a local path.
        token: of the Hub, with write access; else the one of `hf auth login` or HF_TOKEN.
        private: True refuses to publish into a repository that is public. None leaves it as it is.
        revision: the branch, made if there is none; else "main".
        record: what rlsd_run.json says; else it is looked for in the folder, and of a checkpoint or a folder named
            "adapter" in the one above.
        metrics: the lines of metrics.jsonl; else likewise.
        private_texts: prompts and privileged contexts. No file may hold one, unless it is shorter than 20 characters.
        license: of the model, for the card.
        dry_run: check, and return what would be uploaded, without any request.

    Raises:
        ValueError: something in the folder must not be published, or is missing. Nothing was sent.
        PublishError: the Hub or the way to it failed; the message says what is there now.
    """
    folder = Path(folder)
    validate_repo_id(repo_id)
    if "/" not in repo_id:
        raise ValueError(f"repo_id={repo_id!r} names no owner; pass 'owner/{repo_id}', your account or organization.")
    files, left_out = contents.select(folder)
    run = _run(folder, record, metrics)
    base_model = contents.name_base_model(files, base_model, folder, run.record)
    files |= card.make(run, repo_id, files, base_model=base_model, license=license, revision=revision)
    contents.check(files, private_texts=private_texts, token=token)
    return push(
        files,
        repo_id,
        left_out=[name for name in left_out if name not in files],
        token=token,
        private=private,
        revision=revision,
        commit_message=commit_message,
        dry_run=dry_run,
    )


def _run(folder: Path, record: Mapping[str, Any] | None, metrics: Sequence[Mapping[str, Any]] | None) -> card.Run:
    """What was recorded of the run that made a folder; what is not given is looked for."""
    checkpoint = re.fullmatch(r"checkpoint-(\d+)", folder.resolve().name)
    # what lies above any other folder may be of another run
    above = checkpoint or folder.resolve().name == "adapter"
    places = (folder, folder.resolve().parent) if above else (folder,)
    if record is None:
        record = next(filter(None, map(read_record, places)), None)
    if metrics is None:
        metrics = next(filter(None, (read_metrics(place)[0] for place in places)), ())
    # what a checkpoint was not trained on is not claimed of it
    step = int(checkpoint.group(1)) if checkpoint else None
    return card.Run(record, [line for line in metrics if step is None or line["step"] <= step], step)
