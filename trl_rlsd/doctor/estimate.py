"""A recipe as `trl_rlsd.memory` reads it: the model counted on the meta device, the fields as bytes and rows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import transformers
import yaml
from accelerate import init_empty_weights
from peft import get_peft_model
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from trl import ModelConfig, get_peft_config

from trl_rlsd.config import RLSDConfig
from trl_rlsd.memory import Architecture, Setup, Sizes


BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
# of one value in 4 bits: a float32 scale for 64 values, or (nested) one of 8 bits, and a float32 for 256 of these
FOUR_BITS, NESTED = 0.5 + 4 / 64, 0.5 + 1 / 64 + 4 / (64 * 256)
# what such devices have for a process, in bytes; it is less than their name says, or more
USUAL = {"T4, 16 GB": 15.8e9, "24 GB": 23.7e9, "40 GB": 42e9, "80 GB": 85e9}


def empty_model(path: str, revision: str | None = None, trust_remote_code: bool = False) -> PreTrainedModel:
    """The model without weights. Raises: OSError, where its config is neither in a folder nor on the Hub."""
    config = AutoConfig.from_pretrained(path, revision=revision, trust_remote_code=trust_remote_code)
    made = getattr(transformers, (config.architectures or [""])[0], None)
    with init_empty_weights():
        if made is None:
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
        else:
            model = made(config)
    model.tie_weights()  # which a model on the meta device is not
    return model


def sizes_of(model: PreTrainedModel, fields: ModelConfig) -> Sizes:
    """Counted before and after PEFT has put its adapter in, if there is one."""
    config, head = model.config.get_text_config(), model.get_output_embeddings()
    linear = sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear) and m is not head)
    parameters = trainable = sum(p.numel() for p in model.parameters())
    peft_config = get_peft_config(fields)
    if peft_config is not None:
        with init_empty_weights():
            adapted = get_peft_model(model, peft_config)
        trainable = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    return Sizes(architecture_of(config), parameters, linear, trainable)


def architecture_of(config: PreTrainedConfig) -> Architecture:
    """For activations and the cache; of experts, those that a token goes through."""
    heads = config.num_attention_heads
    intermediate = getattr(config, "intermediate_size", None) or 4 * config.hidden_size
    if experts := getattr(config, "num_experts_per_tok", None):
        intermediate = experts * (getattr(config, "moe_intermediate_size", None) or intermediate)
    return Architecture(
        config.num_hidden_layers,
        config.hidden_size,
        intermediate,
        heads,
        getattr(config, "num_key_value_heads", None) or heads,
        getattr(config, "head_dim", None) or config.hidden_size // heads,
        config.vocab_size,
        bool(config.tie_word_embeddings),
    )


def setup_of(
    args: RLSDConfig,
    fields: ModelConfig,
    sizes: Sizes,
    launch: Mapping[str, Any],
    *,
    own_dtype: torch.dtype | None,
    prompt: int,
    context: int,
    teacher: bool,
    others: float = 0,
) -> Setup:
    """
    Args:
        launch: what the launcher's config says; see `launch_options`.
        own_dtype: that of the model's config, for dtype="auto".
        prompt, context, teacher: as `Setup` has them; whether a teacher scores at all.
        others: bytes of an external teacher.
    """
    dtype = (args.model_init_kwargs or {}).get("dtype", fields.dtype)
    dtype = str(own_dtype or "float32") if dtype in ("auto", None) else str(dtype)
    weights = BYTES.get(dtype.removeprefix("torch."))
    if weights is None:
        raise ValueError(f"dtype={dtype!r} is not supported. Give one of {', '.join(BYTES)}, auto.")
    quantized = fields.load_in_4bit or fields.load_in_8bit
    bits = (NESTED if fields.use_bnb_nested_quant else FOUR_BITS) if fields.load_in_4bit else 1
    # PEFT lifts adapters to float32; TRL 1.16 lowers those on a quantised base to bfloat16, which fp16 does not bear
    trained = weights if sizes.full else 2 if quantized and not args.fp16 else 4
    copies = args.teacher_model_kind in ("synced", "ema") or (args.teacher_model_kind == "base" and sizes.full)
    processes = int(launch.get("num_processes") or 1)
    engine = 0 if not args.use_vllm else None
    if args.use_vllm and args.vllm_mode == "colocate" and not args.vllm_enable_sleep_mode:
        engine = args.vllm_gpu_memory_utilization
    return Setup(
        rows=args.per_device_train_batch_size,
        sampled=max(1, args.generation_batch_size // processes),
        tokens=args.max_completion_length,
        prompt=prompt,
        context=context,
        weights=weights,
        linear=bits if quantized else weights,
        trained=trained,
        compute=2 if args.bf16 or args.fp16 else weights,
        optimizer=_optimizer(str(args.optim), trained),
        teacher=teacher,
        copy=int(teacher and copies and not args.teacher_offload),
        others=others + (sizes.parameters * weights if args.beta and sizes.full else 0),
        checkpointing=args.gradient_checkpointing,
        liger=args.use_liger_loss,
        budget=args.teacher_token_budget,
        shards=processes if launch.get("sharded") else 1,
        processes=processes,
        engine=engine,
    )


def _optimizer(name: str, trained: float) -> float:
    """Bytes of state for one value; any other optimizer is taken for Adam, which has two."""
    name = name.lower().rpartition(".")[2]
    if "sgd" in name or "adafactor" in name:
        return 0
    return 2 if "8bit" in name else 2 * trained


def launch_options(arguments: Any) -> dict[str, Any]:
    """`num_processes`, and whether weights are `sharded` (FSDP, ZeRO-3), of the launcher's parsed arguments and the
    file that they name. Arguments win over the file, as in the launcher."""
    content: dict[str, Any] = {}
    if arguments.config_file:
        with open(arguments.config_file) as file:
            content = yaml.safe_load(file) or {}
    processes = arguments.num_processes or content.get("num_processes") or 1
    stage = (content.get("deepspeed_config") or {}).get("zero_stage")
    fsdp = arguments.use_fsdp or content.get("distributed_type") == "FSDP"
    sharded = fsdp or 3 in (stage, arguments.zero_stage if arguments.use_deepspeed else None)
    return {"num_processes": processes, "sharded": sharded and processes > 1}
