"""Tools and environments: TRL's own tool loop, with a real chat template, on the tiny model."""

import importlib.resources

import pytest
import torch
from conftest import byte_tokenizer, config, dataset, tiny_llama

from trl_rlsd import RLSDTrainer


class Calculator:
    """An environment whose observation is part of the student's prompt, and so must be of the teacher's."""

    def reset(self, **columns):
        return " (observed)"

    def double(self, number: int) -> int:
        """Doubles a number.

        Args:
            number: The number.
        """
        return 2 * number


def double(number: int) -> int:
    """Doubles a number.

    Args:
        number: The number.
    """
    return 2 * number


def build(folder, credit="rlsd", contrast_reference="answer", **options):
    template = importlib.resources.files("trl").joinpath("chat_templates/qwen3.jinja").read_text()
    tokenizer = byte_tokenizer(template, extra=("<|im_start|>", "<|im_end|>", "<tool_call>", "</tool_call>"))

    def varied(completions, **columns):
        return [i % 4 / 4 for i in range(len(completions))]

    built = RLSDTrainer(
        tiny_llama(vocab_size=len(tokenizer), max_position_embeddings=4096),
        varied,
        config(folder, max_steps=1, max_completion_length=256, credit=credit, contrast_reference=contrast_reference),
        dataset(conversational=True),
        processing_class=tokenizer,
        **options,
    )
    # the random model will not call a tool by itself: its first turn is a call, its second an answer
    turns = ['<tool_call>\n{"name": "double", "arguments": {"number": 21}}\n</tool_call><|im_end|>', "42<|im_end|>"]

    def next_turn(prompt_ids, *args, **kwargs):
        return [tokenizer.encode(turns.pop(0) if len(turns) > 1 else turns[0])] * len(prompt_ids), None

    built._generate_single_turn = next_turn
    return built


@pytest.mark.parametrize("options", [{"tools": [double]}, {"environment_factory": Calculator}], ids=["tools", "env"])
def test_tool_results_are_read_but_get_no_credit(tmp_path, options):
    built = build(tmp_path, **options)
    seen = {}
    score, credit = built._score_with_teacher, built._token_credit

    def watch_scoring(batch, prompt_ids, has_context):
        seen["teacher_prompt"] = built.processing_class.decode(prompt_ids[0])
        return score(batch, prompt_ids, has_context)

    def watch_credit(inputs, student_logps):
        seen.update(inputs)
        seen["credit"] = credit(inputs, student_logps)
        return seen["credit"]

    built._score_with_teacher, built._token_credit = watch_scoring, watch_credit
    built.train()
    prompt = seen["teacher_prompt"]
    assert '"name": "double"' in prompt, "the teacher must see the tools that the student sees"
    assert "the answer is" in prompt
    assert ("(observed)" in prompt) == ("environment_factory" in options)
    row = int(seen["advantages"].abs().argmax())
    masks = seen["completion_mask"][row].bool(), seen["tool_mask"][row].bool()
    tool_tokens, own_tokens = masks[0] & ~masks[1], masks[0] & masks[1]
    decoded = built.processing_class.decode(seen["completion_ids"][row][tool_tokens])
    assert "42" in decoded
    assert "tool_response" in decoded
    assert (seen["credit"][row][tool_tokens] == 0).all()
    assert (seen["credit"][row][own_tokens] != 0).all()
    assert torch.isfinite(seen["teacher_logps"]).all()
    # the teacher reads the tool's result, too: those tokens are scored, not skipped
    assert (seen["teacher_logps"][row][tool_tokens] != 0).all()


def test_an_environment_that_shows_the_context_to_the_student_is_refused(tmp_path):
    class Leaky(Calculator):
        def reset(self, privileged_context, **columns):
            return f" ({privileged_context}, as the reference says)"

    built = build(tmp_path, environment_factory=Leaky)
    generated = []
    built._generate_single_turn = lambda *args, **kwargs: generated.append(1)
    longer = built.train_dataset.map(lambda row: {"privileged_context": row["privileged_context"] + " exactly"})
    built.train_dataset = longer
    with pytest.raises(ValueError, match="is in the student's prompt already"):
        built.train()
    assert generated == []


@pytest.mark.parametrize("options", [{"tools": [double]}, {"environment_factory": Calculator}], ids=["tools", "env"])
def test_a_contrast_works_with_tools_and_environments(tmp_path, options):
    """TRL pairs every prompt that it tokenizes with an environment, also those with a wrong reference."""
    built = build(tmp_path, credit="rlsd_contrast", contrast_reference="completion", **options)
    turns = iter(range(1000))
    built._generate_single_turn = lambda prompt_ids, *args, **kwargs: (
        [built.processing_class.encode(f"{next(turns)}<|im_end|>") for _ in prompt_ids],
        None,
    )
    seen = []
    score = built._score_with_teacher
    built._score_with_teacher = lambda batch, *rest: score(batch, *rest) or seen.append(batch)
    built.train()
    assert seen[0]["wrong_scored"].any()
    assert torch.isfinite(seen[0]["wrong_logps"]).all()
