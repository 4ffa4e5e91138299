"""What is refused, and what is warned of, before anything is loaded or generated. Every message names field, value
and fix."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from accelerate.logging import get_logger
from torch import nn

from trl_rlsd.rewards.grading import check_columns


logger = get_logger(__name__)

_TEXT_OR_MESSAGES = ("string", "large_string", "string_view", "null", "list", "dict")


def warn(*warnings: str | None) -> None:
    """Log those that there are, on the main process."""
    for warning in filter(None, warnings):
        logger.warning(warning)


def check_teacher_model(kind: str, teacher_model: Any, used: bool) -> None:
    """`teacher_model` goes with `teacher_model_kind='external'`, and with no other.

    Raises: ValueError.
    """
    if kind == "external" and teacher_model is None and used:
        raise ValueError(
            "teacher_model_kind='external' needs a model: pass `teacher_model=` to RLSDTrainer, or choose 'synced', "
            "'live', 'ema' or 'base'."
        )
    if teacher_model is not None and (kind != "external" or not used):
        reason = f"teacher_model_kind={kind!r}" if used else "the credit function uses no teacher"
        raise ValueError(
            f"teacher_model was given, but {reason}. Set teacher_model_kind='external', or leave teacher_model out."
        )


def check_column(dataset: Any, column: str, field: str = "privileged_column") -> None:
    """What a dataset tells of a column with references before a row is read.

    Raises: ValueError where it is missing, TypeError where it holds numbers or the like.
    """
    if dataset is None:
        raise ValueError(
            f"train_dataset is None, so there is no column {column!r} ({field}) for the teacher. Give a "
            "dataset with that column, or use credit='grpo'."
        )
    columns = getattr(dataset, "column_names", None)  # None for a stream that has not been looked at
    if columns is not None and column not in columns:
        raise ValueError(
            f"train_dataset has no column {column!r} ({field}); its columns are "
            f"{', '.join(map(repr, columns))}. Add the column (None or '' for rows without privileged context), set "
            f"`{field}` to the one that holds it, or use credit='grpo'."
        )
    kind = getattr((getattr(dataset, "features", None) or {}).get(column), "dtype", None)
    if isinstance(kind, str) and kind not in _TEXT_OR_MESSAGES:
        raise TypeError(
            f"Column {column!r} ({field}) of train_dataset is of type {kind}; it must be a string or a list "
            f"of messages. Convert it: dataset.map(lambda row: {{{column!r}: str(row[{column!r}])}})."
        )


def check_rewards(reward_funcs: Any, *datasets: Any) -> None:
    """Rewards that say what they need (`required_columns`, `check()`) are asked before anything is generated.

    Args:
        datasets: for training and for evaluation; None, or a dictionary of several, too.

    Raises: ValueError where a dataset lacks a column, and what a reward's own check raises.
    """
    each = [part for data in datasets for part in (data.values() if isinstance(data, dict) else [data])]
    for reward in reward_funcs if isinstance(reward_funcs, list | tuple) else [reward_funcs]:
        for columns in filter(None, (getattr(dataset, "column_names", None) for dataset in each)):
            check_columns(reward, columns)
        if callable(check := getattr(reward, "check", None)):
            check()


def check_template(template: str | dict | None, conversational: bool) -> None:
    """Conversations need a chat template, the teacher's too.

    Raises: ValueError.
    """
    if conversational and not template:
        raise ValueError(
            "processing_class has no chat template, but the dataset's prompts are conversational. Set "
            "`tokenizer.chat_template`, or give plain-text prompts."
        )


def check_copies(kind: str, copies: bool, fsdp_plugin: Any, offload: bool) -> str | None:
    """FSDP1's flat parameters cannot be copied; offloading needs something to offload.

    Returns: a warning, or None. Raises: ValueError.
    """
    if copies and fsdp_plugin is not None and fsdp_plugin.fsdp_version == 1:
        raise ValueError(
            f"teacher_model_kind={kind!r} copies weights, and FSDP1 keeps them in flat parameters. Set version 2 in "
            "`fsdp_config` (`fsdp_version: 2` for Accelerate), or use 'live', 'base' with LoRA, or 'external'."
        )
    if offload and not copies:
        return f"teacher_offload=True has no effect: teacher_model_kind={kind!r} keeps no copy of the weights."
    return None


def check_storage(copies_shards: bool, save_on_each_node: bool) -> None:
    """Shards of all processes make one folder. Raises: ValueError."""
    if copies_shards and save_on_each_node:
        raise ValueError(
            "save_on_each_node=True with sharded weights: the teacher's shards would lie on several machines' disks, "
            "where none could read them all. Set output_dir to storage that all machines see, and "
            "save_on_each_node=False."
        )


def check_mixed_images(lacking: Sequence[bool | None], sharded: bool) -> str | None:
    """Batches without images beside batches with some, on several processes.

    Args:
        lacking: of each dataset whether rows lack images, None where that is not known.

    Returns: a warning, or None. Raises: ValueError.
    """
    if sharded and any(lacking):
        raise ValueError(
            "Some rows of the dataset have no image: with sharded weights (FSDP, ZeRO-3) every process must run the "
            "vision tower whenever one does, and a batch without images does not. Give every row an image, train on "
            "the rows with images alone, or use DDP or ZeRO-2."
        )
    if sharded and None in lacking:
        return (
            "It is not known whether every row has an image. With sharded weights a batch without images on one "
            "process, and with images on another, would make the run hang."
        )
    if any(lacks is not False for lacks in lacking):
        return "Images are left out of the logged completions (log_multimodal): rows without images may be among them."
    return None


def check_head(head: nn.Module, has_router_loss: bool) -> None:
    """Which LM heads the fused loss can read: a plain linear layer, without an adapter and not quantised.

    Raises: ValueError.
    """
    alternative = "Leave use_liger_loss=False: the loss then runs through TRL's fused head."
    if type(head) is not nn.Linear or not head.weight.is_floating_point():
        raise ValueError(
            f"use_liger_loss=True needs a plain linear LM head, this one is {type(head).__name__} ("
            f"{head.weight.dtype}): the fused loss would go past its adapter or quantisation. Take `lm_head` out of "
            f"target_modules and modules_to_save. Or: {alternative}"
        )
    if has_router_loss:
        raise ValueError(
            "use_liger_loss=True with router_aux_loss_coef != 0: the fused forward does not return the router's "
            f"load-balancing loss. Set router_aux_loss_coef=0. Or: {alternative}"
        )


def check_adapter(model: nn.Module) -> None:
    """PEFT methods that TRL's fused head cannot score, or whose checkpoints cannot be resumed.

    Raises: ValueError.
    """
    for name, config in getattr(model, "peft_config", {}).items():
        kind = getattr(config.peft_type, "value", config.peft_type)
        # TRL 1.16, peft 0.21: all three fail at the first forward, with an error that names neither
        if kind in ("ADAPTION_PROMPT", "CPT", "MULTITASK_PROMPT_TUNING"):
            raise ValueError(
                f"Adapter {name!r} is of type {kind}, whose forward does not pass on what TRL's fused LM head returns "
                "or needs. Use another method, such as LoRA."
            )
        # peft 0.21 saves the virtual tokens that the encoder gives, not the encoder that is trained
        if kind == "P_TUNING" or getattr(config, "prefix_projection", False):
            raise ValueError(
                f"Adapter {name!r} trains an encoder of virtual tokens ({kind}), which PEFT does not save: a "
                "resumed run would go on from another model. Use prompt tuning, prefix tuning without "
                "prefix_projection, or LoRA."
            )
    # peft 0.21: the wrapper of a head whose tokens are trained
    if hasattr(model.get_output_embeddings(), "token_adapter"):
        raise ValueError(
            "trainable_token_indices reaches the LM head (tied to the embeddings, or named): TRL's fused head reads "
            "the head's weights as they were before training. Take a model with tie_word_embeddings=False, train the "
            "tokens of embed_tokens alone, or use modules_to_save=['embed_tokens']."
        )


def check_quantized(model: nn.Module, kind: str, use_vllm: bool) -> str | None:
    """What bitsandbytes' formats cost in exactness.

    Returns: a warning, or None. Raises: ValueError.
    """
    if use_vllm and getattr(model, "is_loaded_in_4bit", False):
        # TRL 1.16: VLLMGeneration.sync_weights calls merge_adapter and unmerge_adapter
        problem = (
            "use_vllm=True with load_in_4bit=True: TRL merges the adapter into the base weights before it generates "
            "and takes it out again, and PEFT rounds them to 4 bits each time, so the base model moves with every "
            "generation."
        )
        if kind == "base":
            raise ValueError(
                f"{problem} teacher_model_kind='base' would score with a model that is not the base. Set "
                "use_vllm=False, load the base without quantisation, or take 'synced', 'ema' or 'live'."
            )
        return f"{problem} Set use_vllm=False, or load the base without quantisation."
    threshold = getattr(getattr(model.config, "quantization_config", None), "llm_int8_threshold", 0.0)
    if getattr(model, "is_loaded_in_8bit", False) and threshold:
        return (
            f"load_in_8bit=True with llm_int8_threshold={threshold}: a feature above it in one token is kept in 16 "
            "bits for all tokens of that forward, so that log-probs depend on what else is scored, and the gain holds "
            "that (0.2 nats a token with SmolLM2-135M). Set llm_int8_threshold=0.0, or load_in_4bit=True."
        )
    return None


def mend_quantized(model: nn.Module, *, fp16: bool) -> None:
    """Two mends for quantised bases, without which gradients are lost or refused.

    bitsandbytes 0.50 repacks 4-bit weights for inference, for good, when a layer first runs in eval mode on a CPU with
    AVX512-BF16, and its kernel for that layout has no backward: after one pass of the teacher, or one evaluation, no
    gradient would go through the base any more (those of the first layer's adapters fell to 1/40 in a tiny Llama), and
    no error would say so.

    TRL 1.16 makes adapters on a quantised base bfloat16 whatever is asked for, and torch's gradient scaler, which fp16
    needs (on a T4, say), cannot unscale bfloat16 gradients on CUDA (pytorch#127176). In float32, as peft makes them,
    it can.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    for parameter in model.parameters() if fp16 else ():
        if parameter.requires_grad and parameter.dtype == torch.bfloat16:
            parameter.data = parameter.data.float()


def position_limit(*models: nn.Module) -> int | None:
    """The most positions that all of the models have; None where no model says."""
    limits = [getattr(model.config.get_text_config(), "max_position_embeddings", None) for model in models]
    return min((limit for limit in limits if limit), default=None)


def position_warning(model_type: str) -> str | None:
    """TRL 1.16 passes no position ids, so left padding moves the positions where they are learned."""
    if model_type not in ("gpt2", "gpt_neo", "gpt_bigcode", "openai-gpt", "biogpt", "xglm", "ctrl"):
        return None
    return (
        f"Models of type {model_type!r} learn absolute positions, which left padding shifts, differently for the "
        "teacher's prompt than for the student's: the gain is not exact. Use a model with rotary positions."
    )


def dropout_warning(model: nn.Module) -> str | None:
    """Teacher and student are the same function only without dropout."""
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Dropout) and module.p > 0]
    if not names:
        return None
    return (
        f"The student trains with dropout ({len(names)} modules, e.g. {names[0]}), the teacher scores without: the "
        "gain then holds the student's dropout noise. Set `disable_dropout=True` in RLSDConfig (or `lora_dropout=0`)."
    )


def sampler_warning(args: Any) -> str | None:
    """The gain compares plain distributions; a reshaped sampler draws tokens from another one."""
    neutral = {"top_p": (None, 1.0), "top_k": (None, 0, -1), "min_p": (None, 0.0), "repetition_penalty": (None, 1.0)}
    odd = [f"{name}={getattr(args, name)}" for name, values in neutral.items() if getattr(args, name) not in values]
    if not odd:
        return None
    return (
        f"Completions are sampled with {', '.join(odd)}, but the gain compares the plain distributions of teacher and "
        "student. The tokens are then not samples of the student that is compared."
    )
