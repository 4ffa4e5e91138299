"""RLSD (Self-Distilled RLVR, arXiv:2604.03128) for TRL.

The rooms, upper ones import lower ones only:

    cli           the commands of `trl-rlsd`
    lab           the same problems learned with several methods and seeds, with intervals
    train         the training script: a config file and flags in, a trained model out
    quickstart    a small, real run from nothing to a trained adapter
    inspection    `trl-rlsd inspect`: which tokens get the credit, before anything is trained
    doctor        `trl-rlsd doctor`: what is installed, what a recipe reads, whether it fits
    trainer       RLSDTrainer: wires the rooms below into TRL's GRPOTrainer
    publishing    GRPOTrainer whose run leaves a record, and whose pushes hold what is meant for others
    credit_log    pictures of credit while training
    resumable     GRPOTrainer whose resumed run is the run that was not interrupted
    privileged_batch
                  what the teacher reads for one generation batch
    hub           publishing: what is uploaded, what never is, the model card
    report        credit token by token, and a run's curves, as pages and in a terminal
    run_record    what a run leaves of itself: settings and metrics
    config        RLSDConfig: fields and their ranges
    prompt_check  what both will read, rendered and shown before anything is generated
    teacher_pass  which completions are scored together, and what is encoded once
    token_credit  from a micro-batch to token advantages and their diagnostics
    teacher       whose weights score: live, synced, ema, base, external
    external      another model as teacher: loaded, checked, placed
    losses        the clipped surrogate: a plain specification, and its fused twin on Liger's base
    collator      the privileged prompt that the teacher reads
    checkpoints   which of them are whole, and which a run goes on from
    rollouts      completions that a checkpoint keeps for later use
    checks        what is refused before anything is loaded or generated
    context       what a privileged context may be: text, images
    images        a processor's fields, by row and for a forward
    shards        weights of which every process holds a piece
    contrast      wrong references, for a second reading by the teacher
    spans         where in a completion credit acts
    alarms        what the metrics say when the signal is broken
    leakage       whether completions hold what only the teacher may read
    metrics       credit diagnostics
    credit        the maths: gain, credit functions by name, the lambda schedule
    rewards       verifiable rewards, by name
    data          datasets with a privileged column
    dotted        a user's function by its dotted path
    files         files and folders that are there whole or not at all
    memory        what a run takes, part by part
    texts         how texts are compared, and shown

Axes, everywhere: B rows, T completion tokens, P and P' prompt tokens of student and teacher. `student_*` is read after
the plain prompt, `teacher_*` after the privileged one; `*_logps` (B, T) are nats; `*_mask` 1 = counts; `gain` =
teacher - student.
"""

from importlib import import_module
from typing import TYPE_CHECKING


__version__ = "0.1.0"

# Loaded on first use: `import trl_rlsd.credit` needs torch alone, and the command line answers --help at once.
_EXPORTS = {
    "RLSDTrainer": "trainer",
    "RLSDConfig": "config",
    "PrivilegedPromptCollator": "collator",
    "register_credit": "credit",
    "lambda_at": "credit",
}
__all__ = ["PrivilegedPromptCollator", "RLSDConfig", "RLSDTrainer", "lambda_at", "register_credit"]

if TYPE_CHECKING:
    from trl_rlsd.collator import PrivilegedPromptCollator
    from trl_rlsd.config import RLSDConfig
    from trl_rlsd.credit import lambda_at, register_credit
    from trl_rlsd.trainer import RLSDTrainer


def __getattr__(name: str):
    if name in _EXPORTS:
        return getattr(import_module(f"trl_rlsd.{_EXPORTS[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
