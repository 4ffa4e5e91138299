"""The start of every run on the built-in task: a decoder under 1M parameters, made once and kept.

task -> corpus -> pre-training (minutes on 2 cores) -> a model folder in the Hugging Face cache
"""

from __future__ import annotations

import hashlib
import inspect
import json
import random
import tempfile
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.constants import HF_HOME
from tokenizers import Tokenizer, decoders, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, Trainer, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from trl_rlsd.files import make_folder
from trl_rlsd.lab.task import CITE, FILLERS, MARKERS, OPERATORS, ChainTask


PAD, END = "_", "$"
# many small steps: after as many texts in batches of 48 it knows 0.41 of the easy facts, in batches of 12 0.93
RECIPE: dict[str, Any] = {"batch": 12, "learning_rate": 1e-3, "hidden_size": 128, "layers": 3, "heads": 4}


def start_model(task: ChainTask, steps: int = 4000) -> Path:
    """The folder of the task's start, pre-trained if it is not there yet.

    Args:
        steps: of pre-training, 12 texts each.
    """
    folder = Path(HF_HOME) / "trl-rlsd" / f"lab-{start_key(task, steps)}"
    if (folder / "config.json").is_file():
        return folder
    print(f"Pre-training the start of the built-in task (once, {steps} steps) ...", flush=True)
    model, tokenizer = _pretrained(task, steps)

    def fill(staged: Path) -> None:
        model.save_pretrained(staged)
        tokenizer.save_pretrained(staged)
        (staged / "recipe.json").write_text(json.dumps(_recipe(task, steps), indent=2) + "\n")

    make_folder(folder, fill)  # an interrupted writing must not look like a model
    return folder


def start_key(task: ChainTask, steps: int) -> str:
    """Of the start that a task and its corpus, as the code writes it now, lead to."""
    return hashlib.sha256(json.dumps(_recipe(task, steps), sort_keys=True).encode()).hexdigest()[:12]


def _recipe(task: ChainTask, steps: int) -> dict[str, Any]:
    return {"task": asdict(task), "steps": steps, "corpus": source_hash(ChainTask), **RECIPE}


def source_hash(thing: Any) -> str:
    """Of the source file that a class or function stands in."""
    return hashlib.sha256(Path(inspect.getfile(thing)).read_bytes()).hexdigest()[:12]


def character_tokenizer() -> PreTrainedTokenizerFast:
    """One token a character, so that positions in a text are positions among its tokens."""
    characters = [PAD, END, *"0123456789", *OPERATORS, *"=<>#", CITE, *MARKERS, *FILLERS]
    tokenizer = Tokenizer(models.BPE({character: i for i, character in enumerate(characters)}, merges=[]))
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=PAD, eos_token=END, padding_side="left")


def _pretrained(task: ChainTask, steps: int) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    tokenizer = character_tokenizer()
    torch.manual_seed(task.seed)
    width = RECIPE["hidden_size"]
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=5 * width // 2,
        num_hidden_layers=RECIPE["layers"],
        num_attention_heads=RECIPE["heads"],
        num_key_value_heads=RECIPE["heads"],
        max_position_embeddings=512,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config)
    with tempfile.TemporaryDirectory() as scratch:
        arguments = TrainingArguments(
            scratch,
            use_cpu=True,  # on several GPUs a batch would be several batches
            max_steps=steps,
            per_device_train_batch_size=RECIPE["batch"],
            learning_rate=RECIPE["learning_rate"],
            lr_scheduler_type="warmup_stable_decay",
            lr_scheduler_kwargs={"num_decay_steps": steps * 3 // 10},
            warmup_steps=min(100, steps // 10),
            logging_steps=max(1, steps // 10),
            save_strategy="no",
            report_to=[],
            seed=task.seed,
            dataloader_pin_memory=False,
        )
        corpus = Corpus(task, tokenizer, steps * RECIPE["batch"])
        trainer = Trainer(model, arguments, train_dataset=corpus, data_collator=corpus.collate)
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    return model.to("cpu").eval(), tokenizer


class Corpus(torch.utils.data.IterableDataset):
    """Texts of the task in order, written when asked for; the loss is on completions alone."""

    def __init__(self, task: ChainTask, tokenizer: PreTrainedTokenizerFast, size: int):
        self.task, self.tokenizer, self.size = task, tokenizer, size

    def __iter__(self) -> Iterator[tuple[list[int], list[int]]]:
        for index in range(self.size):
            rng = random.Random(f"corpus-{self.task.seed}-{index}")
            prompt, text = self.task.write(rng, progress=index / self.size)
            yield self.tokenizer(prompt)["input_ids"], self.tokenizer(text + END)["input_ids"]

    def collate(self, texts: list[tuple[list[int], list[int]]]) -> dict[str, torch.Tensor]:
        width = max(len(prompt) + len(text) for prompt, text in texts)
        shape = len(texts), width
        ids = torch.full(shape, self.tokenizer.pad_token_id)
        labels, mask = torch.full(shape, -100), torch.zeros(shape, dtype=torch.long)
        for row, (prompt, text) in enumerate(texts):
            end = len(prompt) + len(text)
            ids[row, :end] = torch.tensor(prompt + text)
            labels[row, len(prompt) : end] = torch.tensor(text)
            mask[row, :end] = 1
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}
