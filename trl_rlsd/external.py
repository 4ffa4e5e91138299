"""The model of an `external` teacher: loaded, checked against the student's vocabulary, readied to score."""

from __future__ import annotations

from accelerate import Accelerator
from accelerate.utils import DistributedType, is_peft_model
from torch import nn
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from trl import GRPOConfig
from trl.models.utils import prepare_deepspeed, prepare_fsdp
from trl.trainer.utils import add_fused_lm_head, create_model_from_path, get_config_model_id


def external_teacher(
    teacher_model: str | PreTrainedModel,
    student: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    accelerator: Accelerator,
    args: GRPOConfig,
    **init_kwargs,
) -> PreTrainedModel:
    """The model of an `external` teacher, ready to score, once it is known that its token ids mean the student's
    tokens. `init_kwargs` go to `from_pretrained` where a path is given.

    Raises:
        ValueError: it is the student itself, or has another vocabulary.
    """
    if teacher_model is student:
        raise ValueError(
            "teacher_model is the student itself. Use teacher_model_kind='live', or another copy of the model."
        )
    if isinstance(teacher_model, str):
        path, teacher = teacher_model, create_model_from_path(teacher_model, **init_kwargs)
    else:
        path, teacher = get_config_model_id(teacher_model.config), teacher_model
    try:
        teacher_tokenizer = AutoTokenizer.from_pretrained(
            path, trust_remote_code=init_kwargs.get("trust_remote_code", False)
        )
    except (OSError, ValueError):  # a model made in code has no files, and its tokenizer is not known
        teacher_tokenizer = None
    sizes = [model.config.get_text_config().vocab_size for model in (student, teacher)]
    check_vocabularies(tokenizer, teacher_tokenizer, *sizes)
    return _prepared(teacher, accelerator, args.temperature, args.cast_lm_head_to_fp32)


def check_vocabularies(
    tokenizer: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase | None, size: int, teacher_size: int
) -> None:
    """Every token of the student must have the same id in the teacher. A teacher may know more, and the two heads may
    be padded to different sizes; where the teacher's tokenizer is not known, only equal sizes are taken.

    Raises: ValueError.
    """
    consequence = (
        "log-probs of the same token ids would mean other tokens. Use a teacher of the student's model family."
    )
    if teacher is not None:
        known = teacher.get_vocab()
        other = [token for token, index in tokenizer.get_vocab().items() if known.get(token) != index]
        if other:
            raise ValueError(
                f"teacher_model has another vocabulary ({len(teacher)} tokens) than the student ({len(tokenizer)}), "
                f"first difference {other[0]!r}: {consequence}"
            )
    elif size != teacher_size:
        raise ValueError(
            f"teacher_model has a vocabulary of {teacher_size} tokens, the student one of {size}: {consequence}"
        )


def _prepared(
    teacher_model: PreTrainedModel, accelerator: Accelerator, temperature: float, float32_head: bool
) -> PreTrainedModel:
    """Give the teacher TRL's fused LM head, at the student's temperature, and place it as Accelerate places models."""
    add_fused_lm_head(
        teacher_model.get_base_model() if is_peft_model(teacher_model) else teacher_model,
        temperature=temperature,
        cast_lm_head_to_fp32=float32_head,
    )
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        return prepare_deepspeed(teacher_model, accelerator)
    if accelerator.distributed_type == DistributedType.FSDP:
        return prepare_fsdp(teacher_model, accelerator)
    return accelerator.prepare_model(teacher_model, evaluation_mode=True)
