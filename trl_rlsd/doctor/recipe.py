"""A recipe, examined without its weights: its own checks, its rows, its first prompts, what it takes.

config file and flags -> fields -> rewards, rows -> tokenizer, prompts -> memory; each step says what is wrong
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields
from typing import Any

import psutil
import torch
from accelerate.commands.launch import launch_command_parser
from datasets import Dataset
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from trl import ModelConfig
from trl.data_utils import is_conversational

from trl_rlsd import checks
from trl_rlsd.collator import PrivilegedPromptCollator
from trl_rlsd.config import RLSDConfig
from trl_rlsd.doctor.estimate import USUAL, empty_model, launch_options, setup_of, sizes_of
from trl_rlsd.doctor.finding import ERROR, OK, WARNING, Finding
from trl_rlsd.doctor.machine import has_bf16, lacking
from trl_rlsd.images import prompt_with_images
from trl_rlsd.memory import Setup, Sizes, engine, peak, phases, resident, room
from trl_rlsd.prompt_check import PromptCheck
from trl_rlsd.token_credit import TokenCredit
from trl_rlsd.train import RLSDScriptArguments, launcher_arguments, make_parser, rewards_of, rows_of


# of what an estimate may miss: above it, a run that should fit may not
TIGHT = 0.85
NO_ENGINE = "vLLM may not start"
ENGINE_FIX = "Raise vllm_gpu_memory_utilization, or lower vllm_max_model_length"
STREAM_ROWS = 64  # that are looked at
# without which a config is not that of a decoder like Llama
SHAPE = ("num_hidden_layers", "hidden_size", "num_attention_heads", "vocab_size")


@dataclass
class Examined:
    findings: list[Finding] = field(default_factory=list)
    prompts: str | None = None
    memory: dict[str, Any] | None = None

    @contextlib.contextmanager
    def step(self, subject: str) -> Iterator[None]:
        """What is wrong becomes a line; what does not depend on it is examined all the same."""
        try:
            yield
        except Exception as error:  # the datasets, rewards and model code are the user's: they may raise anything
            said = str(error) if isinstance(error, ValueError | TypeError) else f"{type(error).__name__}: {error}"
            self.findings.append(Finding(ERROR, subject, said))

    def say(self, level: str, subject: str, text: str) -> None:
        self.findings.append(Finding(level, subject, text))


@dataclass(frozen=True)
class Recipe:
    script: RLSDScriptArguments
    args: RLSDConfig
    model: ModelConfig
    launch: dict[str, Any]
    elsewhere: bool  # it is for a GPU, and there is none here


def examine_recipe(argv: list[str]) -> Examined:
    """Everything that a recipe can say of itself here."""
    done = Examined()
    recipe = dataset = model = None
    with done.step("config"):
        recipe = read(argv, done)
    if recipe is None:
        return done
    done.say(OK, "config", f"processes: {recipe.launch['num_processes']}, credit: {recipe.args.credit}")
    if recipe.args.bf16 and not recipe.elsewhere and not all(map(has_bf16, _gpus())):
        done.say(WARNING, "config", "bf16 is emulated on this GPU, and slow: fp16: true, dtype: float16")
    done.findings += lacking(recipe.args, recipe.model)
    with done.step("teacher"):
        check_teacher(recipe)
    with done.step("dataset"):
        dataset = _rows(recipe, done)
    with done.step("rewards"):
        checks.check_rewards(rewards_of(recipe.script), dataset)
        done.say(OK, "rewards", ", ".join(recipe.script.reward_funcs or ()) or "the environment's own")
    with done.step("model"):
        model = _fetched("model", recipe.model.model_name_or_path, recipe, done, recipe.model.model_revision)
    prompts = None
    with done.step("prompts"):
        prompts = render(recipe, dataset, model, done)
    if model is not None:
        with done.step("memory"):
            weigh(recipe, model, prompts, done)
    return done


def _fetched(
    subject: str, path: str, recipe: Recipe, done: Examined, revision: str | None = None
) -> PreTrainedModel | None:
    """A model without weights; None where even its config is out of reach, which is no fault of the recipe."""
    try:
        return empty_model(path, revision, recipe.args.trust_remote_code)
    except OSError as error:
        done.say(WARNING, subject, f"{path!r} is not here and cannot be fetched: what it takes is not known. {error}")
        return None


def _rows(recipe: Recipe, done: Examined) -> Any:
    """The dataset; None where the Hub is out of reach, which is no fault of the recipe."""
    name = recipe.script.dataset_name
    try:
        dataset = rows_of(recipe.script, recipe.model)
    except StopIteration as error:  # datasets 5.2: of a file without a line
        raise ValueError(f"dataset_name={name!r} has no rows.") from error
    except OSError as error:
        # Transformers raises a plain OSError where a tokenizer cannot be fetched; a file that is missing is a mistake
        if not isinstance(error, ConnectionError) and type(error) is not OSError:
            raise
        done.say(WARNING, "dataset", f"{name!r} cannot be read from here: its rows are not known. {error}")
        return None
    done.say(OK, "dataset", f"{_count(dataset)}columns {', '.join(dataset.column_names or ['unknown'])}")
    return dataset


# ------------------------------------------------------------------ config


def read(argv: list[str], done: Examined) -> Recipe:
    """The fields, as `trl-rlsd train` reads them. Raises: ValueError and others, with the fields' own messages."""
    if argv[-1] == "--config":
        raise ValueError("--config names no file. Give one: --config FILE.")
    parser = make_parser(prog="trl-rlsd doctor", launches=True)
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            given, *rest = parser.parse_args_and_config(
                argv, return_remaining_strings=True, separate_remaining_strings=True
            )
            arguments = launcher_arguments([text for part in rest for text in part])
            launch = launch_options(launch_command_parser().parse_args([*arguments, "script"]))
    except SystemExit as exit:
        lines = said.getvalue().strip().splitlines() or ["the arguments cannot be parsed"]
        raise ValueError(lines[-1]) from exit
    kinds = (RLSDScriptArguments, RLSDConfig, ModelConfig)
    each = [{f.name: getattr(given, f.name) for f in fields(kind) if f.init} for kind in kinds]
    script, own, model = kinds[0](**each[0]), each[1], kinds[2](**each[2])
    elsewhere = not torch.accelerator.is_available() and not own["use_cpu"]
    if elsewhere:
        done.say(WARNING, "config", "there is no GPU here; for a run on this CPU: use_cpu: true, bf16: false")
        own["use_cpu"] = True  # else Transformers refuses bf16 before anything else is checked
    processes = launch["num_processes"]
    if processes > 1 and own["generation_batch_size"] is None:
        # this process stands for all: as many completions in a generation batch as theirs together
        own["steps_per_generation"] = processes * (own["steps_per_generation"] or own["gradient_accumulation_steps"])
    if not model.model_name_or_path:
        raise ValueError("model_name_or_path is not set. Give a model's path or its id on the Hub.")
    return Recipe(script, RLSDConfig(**own), model, launch, elsewhere)


def check_teacher(recipe: Recipe) -> None:
    """As the trainer has it. Raises: ValueError."""
    path, used = recipe.script.teacher_model_name_or_path, TokenCredit(recipe.args).uses_teacher
    try:
        checks.check_teacher_model(recipe.args.teacher_model_kind, path, used)
    except ValueError as error:
        raise ValueError(f"{error} In a recipe teacher_model is teacher_model_name_or_path.") from error


# ------------------------------------------------------------------ prompts


def check_prompts(rows: Dataset) -> None:
    """Of the first rows. Raises: ValueError where there are none, or one has nothing that a student could read."""
    if not len(rows):
        raise ValueError("The dataset has no rows.")
    if "prompt" not in rows.column_names:
        raise ValueError(
            f"The dataset has no column 'prompt'; its columns are {', '.join(rows.column_names)}. Rename one, or name "
            "it in dataset_options: {columns: {prompt: ...}}."
        )
    for index, prompt in enumerate(rows[:STREAM_ROWS]["prompt"]):
        if not prompt:
            raise ValueError(f"prompt={prompt!r} of row {index} is empty. Give text or messages, or drop the row.")
        for message in prompt if isinstance(prompt, list) else ():
            if message.get("content") is None and not message.get("tool_calls"):
                raise ValueError(f"A message of the prompt of row {index} has no content: {message}.")


def render(recipe: Recipe, dataset: Any, model: PreTrainedModel | None, done: Examined) -> tuple[int, int] | None:
    """Show what student and teacher read of the first row; the lengths of the longest prompt, and by what the
    teacher's is longer. Raises what the trainer's self-check raises."""
    script, args = recipe.script, recipe.args
    uses_teacher = TokenCredit(args).uses_teacher
    collator = PrivilegedPromptCollator(
        args.teacher_prompt_template, args.privileged_column, needs_context=args.teacher_model_kind != "external"
    )
    reads = uses_teacher and collator.reads_context
    if dataset is None:
        return None
    if reads and not script.environment_factory:
        checks.check_column(dataset, args.privileged_column)
    if script.environment_factory or script.tools or hasattr(getattr(model, "config", None), "vision_config"):
        done.say(WARNING, "prompts", "not rendered: tools, environments and images are known to the trainer alone")
        return None
    if model is None:
        done.say(WARNING, "prompts", "not rendered: there is no tokenizer without the model")
        return None
    tokenizer = AutoTokenizer.from_pretrained(
        recipe.model.model_name_or_path, revision=recipe.model.model_revision, trust_remote_code=args.trust_remote_code
    )
    rows = dataset if isinstance(dataset, Dataset) else Dataset.from_list(list(dataset.take(STREAM_ROWS)))
    check_prompts(rows)
    checks.check_template(tokenizer.chat_template, is_conversational(rows[0]))
    tokenize = tokenizer_as_trls(tokenizer, args.chat_template_kwargs or {})
    if not uses_teacher:
        done.prompts = f"The student reads:\n{tokenizer.decode(tokenize([rows[0]['prompt']])[0][0])}"
        done.say(OK, "prompts", "no teacher: this credit needs none")
        return max(map(len, tokenize(list(rows[:STREAM_ROWS]["prompt"]))[0])), 0
    check = PromptCheck(collator, tokenize, tokenizer, args.max_completion_length, checks.position_limit(model))
    check.dataset(rows)
    done.prompts = check.shown
    _, longest = collator.first_and_longest(rows)
    if longest is None:
        done.say(
            WARNING, "prompts", f"no row has privileged context in {args.privileged_column!r}: this is plain GRPO"
        )
        return max(map(len, tokenize(list(rows[:STREAM_ROWS]["prompt"]))[0])), 0
    row = rows[longest]
    student, teacher = (
        len(tokenize([prompt])[0][0])
        for prompt in (row["prompt"], collator.prompts(collator.contexts([row]), [prompt_with_images(row)])[0][0])
    )
    done.say(OK, "prompts", f"the longest: student {student} tokens, teacher {teacher}; the first is shown below")
    return student, teacher - student


def tokenizer_as_trls(tokenizer: PreTrainedTokenizerBase, options: dict[str, Any]) -> Callable:
    """Prompts -> token ids and no images, as TRL tokenizes text."""

    def tokenize(prompts: list) -> tuple[list[list[int]], list[None]]:
        if isinstance(prompts[0], str):
            ids = tokenizer(text=prompts)["input_ids"]
        else:
            ids = tokenizer.apply_chat_template(
                prompts, add_generation_prompt=True, tokenize=True, return_dict=True, **options
            )["input_ids"]
        return ids, [None] * len(prompts)

    return tokenize


def _count(dataset: Any) -> str:
    return f"{len(dataset)} rows, " if isinstance(dataset, Dataset) else "a stream, "


# ------------------------------------------------------------------ memory


def weigh(recipe: Recipe, model: PreTrainedModel, prompts: tuple[int, int] | None, done: Examined) -> None:
    """The estimate, against the devices that there are and the usual ones."""
    script, args = recipe.script, recipe.args
    if missing := [name for name in SHAPE if not hasattr(model.config.get_text_config(), name)]:
        done.say(
            WARNING, "memory", f"not estimated: the model's config has no {missing[0]}, it is no decoder like Llama"
        )
        return
    others = 0
    if script.teacher_model_name_or_path:
        teacher = _fetched("teacher", script.teacher_model_name_or_path, recipe, done)
        if teacher is None:  # without it the estimate would be too low
            return
        others = 2 * teacher.num_parameters() * (1 if args.bf16 else 2)
    own_dtype = getattr(model.config, "dtype", None)
    sizes = sizes_of(model, recipe.model)
    prompt, context = prompts or (512, 512)
    setup = setup_of(
        args,
        recipe.model,
        sizes,
        recipe.launch,
        own_dtype=own_dtype,
        prompt=prompt,
        context=context,
        teacher=TokenCredit(args).uses_teacher,
        others=others,
    )
    if prompts is None:
        done.say(WARNING, "memory", "prompts are not known; 512 tokens and 512 of privileged context are assumed")
    gpu = not args.use_cpu or recipe.elsewhere
    share, at_least = weigh_engine(args, model, sizes, setup, done)
    needs, phase = peak(sizes, setup, gpu=gpu)
    table = []
    for name, size, here in _devices(gpu):
        free = room(size, setup) if gpu else size
        verdict = "fits" if needs <= TIGHT * free else "tight" if needs <= free else "does not fit"
        if at_least > share * size and verdict != "does not fit":
            verdict = NO_ENGINE
        table.append({"device": name, "bytes": size, "verdict": verdict, "here": here})
        if here:
            level = {"fits": OK, "tight": WARNING, NO_ENGINE: WARNING}.get(verdict, ERROR)
            fix = "" if level == OK else f". {ENGINE_FIX if verdict == NO_ENGINE else _less(setup, phase)}"
            done.say(level, "memory", f"about {needs / 1e9:.1f} GB of {name}'s {size / 1e9:.1f}: {verdict}{fix}")
    if not any(row["here"] for row in table):
        done.say(OK, "memory", f"about {needs / 1e9:.1f} GB a process, most in the {phase}; devices below")
    done.memory = {
        "parameters": sizes.parameters,
        "trainable": sizes.trainable,
        "peak": needs,
        "phase": phase,
        "resident": resident(sizes, setup, gpu=gpu),
        "phases": phases(sizes, setup, gpu=gpu),
        "devices": table,
    }


def weigh_engine(
    args: RLSDConfig, model: PreTrainedModel, sizes: Sizes, setup: Setup, done: Examined
) -> tuple[float, float]:
    """vLLM's share of a GPU, and the bytes without which it does not start; zeros where none runs beside training."""
    if not args.use_vllm or args.vllm_mode != "colocate":
        return 0, 0
    length = args.vllm_max_model_length or checks.position_limit(model)
    if length is None:
        return args.vllm_gpu_memory_utilization, 0
    needs = engine(sizes, setup, length) / args.vllm_tensor_parallel_size
    if args.vllm_max_model_length is None:
        done.say(
            WARNING, "vLLM",
            f"vllm_max_model_length is not set: vLLM keeps a cache for all {length} positions of the model, and does "
            f"not start with less than about {needs / 1e9:.0f} GB. Set it to the longest prompt and completion.",
        )  # fmt: skip
    return args.vllm_gpu_memory_utilization, needs


def _devices(gpu: bool) -> Iterator[tuple[str, float, bool]]:
    """Name, bytes, and whether it is here."""
    if not gpu:
        yield "this machine", psutil.virtual_memory().total, True
        return
    for index, found in enumerate(_gpus()):
        yield f"GPU {index} ({found.name})", found.total_memory, True
    for name, size in USUAL.items():
        yield name, size, False


def _gpus() -> list[Any]:
    return [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]


def _less(setup: Setup, phase: str) -> str:
    """What makes the largest phase smaller."""
    if phase == "generation":
        return "Sampling takes most: lower per_device_train_batch_size or max_completion_length"
    if phase == "teacher pass":
        return "The teacher pass takes most: lower teacher_token_budget"
    more = "" if setup.checkpointing else ", set gradient_checkpointing: true"
    return f"The update takes most: lower per_device_train_batch_size{more}, or take LoRA, 4 bits or FSDP2"
