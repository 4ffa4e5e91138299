"""Where credit acts."""

import pytest
import torch
from conftest import byte_tokenizer, config, lora, trainer
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from trl_rlsd.spans import CreditSpan, before_answer, get_span, thinking


def merging_tokenizer():
    """Byte-level BPE that has learned to merge the tags' ends with their neighbours."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    texts = ["<think>\nso</think>\n\nwell", "x.</think>\n\nThe answer is 4", "<think>\nso 2 + 2. </think>\n\n"] * 9
    tokenizer.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


TOKENIZERS = {"bytes": byte_tokenizer(), "merged": merging_tokenizer()}


def tokens(name, tokenizer, text):
    """The text of the tokens in the span."""
    ids = torch.tensor([tokenizer(text)["input_ids"]])
    span = CreditSpan(name, tokenizer)(ids, torch.ones_like(ids))
    return tokenizer.decode(ids[span]), span


@pytest.mark.parametrize("tokenizer", TOKENIZERS.values(), ids=TOKENIZERS)
def test_the_thinking_span_survives_merged_tags(tokenizer):
    text = "<think>\nso 2 + 2. </think>\n\nThe answer is 4"
    inside, span = tokens("thinking", tokenizer, text)
    assert "so 2 + 2." in inside
    assert "answer" not in inside
    assert not span.all()


def test_a_merged_tag_is_really_merged():
    tokenizer = TOKENIZERS["merged"]
    tag, text = tokenizer("</think>")["input_ids"], tokenizer("<think>\nso 2 + 2. </think>\n\nThe")["input_ids"]
    assert not any(text[i : i + len(tag)] == tag for i in range(len(text))), "a search for ids would find it"


@pytest.mark.parametrize(
    ("text", "inside"),
    [
        ("<think>a</think>b", "a"),
        ("a</think>b", "a"),
        ("x<think>a", "a"),
        ("<think></think>b", ""),
        ("a</think>b<think>c", "a"),
        ("<think>a</think>b<think>c</think>", "a"),
        ("b", None),
    ],
)
def test_the_thinking_span(text, inside):
    span = thinking(text)
    assert (None if span is None else text[span[0] : span[1]]) == inside


@pytest.mark.parametrize(
    ("text", "inside"),
    [
        (r"so \boxed{3}", "so "),
        (r"\boxed{3} no, \boxed{4}", r"\boxed{3} no, "),
        ("2+2=4\n#### 4", "2+2=4\n"),
        ("Hence the answer is 4", "Hence the "),
        ("so <answer>4</answer>", "so "),
        ("4", None),
    ],
)
def test_the_span_before_the_answer(text, inside):
    span = before_answer(text)
    assert (None if span is None else text[span[0] : span[1]]) == inside


def byte_fallback_tokenizer():
    """Llama 2's and Gemma's kind: characters, and bytes for those that are not known."""
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2, **{f"<0x{i:02X}>": 3 + i for i in range(256)}}
    vocabulary |= {character: 259 + i for i, character in enumerate("▁abc")}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges=[], unk_token="<unk>", byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never", split=False)
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="</s>", eos_token="</s>")


TOKENIZERS["byte fallback"] = byte_fallback_tokenizer()
EDGES = "bé😀"


def between_edges(text):
    places = [i for i, character in enumerate(text) if character in EDGES]
    return (places[0], places[-1] + 1) if places else None


@given(st.text("abcé€😀 ", min_size=1, max_size=20), st.sampled_from(list(TOKENIZERS)))
def test_the_tokens_are_those_that_overlap_the_characters(text, name):
    """Whole characters at both edges, though some are several tokens."""
    tokenizer, found = TOKENIZERS[name], between_edges(text)
    inside, span = tokens("test_spans.between_edges", tokenizer, text)
    if found is None:
        assert not span.any()
    else:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        first, last = span[0].nonzero()[0].item(), span[0].nonzero()[-1].item()
        if name == "merged":  # a token may hold more than the span
            assert text[found[0] : found[1]] in inside
        else:
            assert inside == text[found[0] : found[1]]
        assert not set(EDGES) & set(tokenizer.decode(ids[:first]))
        assert not set(EDGES) & set(tokenizer.decode(ids[last + 1 :]))


def too_far(text):
    return 0, len(text) + 1


def test_a_span_that_is_never_found_is_an_error():
    ids = torch.tensor([byte_tokenizer()("none")["input_ids"]] * 100)
    span = CreditSpan("thinking", byte_tokenizer())
    for _ in range(2):
        assert not span(ids, torch.ones_like(ids)).any()
    span(ids, torch.zeros_like(ids))  # truncated completions tell nothing
    with pytest.raises(ValueError, match=r"credit_span='thinking' was found in none of the first 300 completions"):
        span(ids, torch.ones_like(ids))


def test_an_empty_span_is_found_too():
    tokenizer, span = byte_tokenizer(), CreditSpan("thinking", byte_tokenizer())
    ids = torch.tensor([tokenizer("<think></think>")["input_ids"]])
    assert not span(ids, torch.ones_like(ids)).any()
    assert span.missed == -1


def test_a_span_that_was_found_once_may_be_missing_later():
    tokenizer, span = byte_tokenizer(), CreditSpan("thinking", byte_tokenizer())
    for text in ("<think>a", *["none"] * 300):
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        span(ids, torch.ones_like(ids))


def test_mistakes_are_named(tmp_path):
    ids = torch.tensor([byte_tokenizer()("none")["input_ids"]])
    with pytest.raises(ValueError, match=r"Step 12: credit_span='test_spans.too_far' returned \(0, 5\) for row 0"):
        CreditSpan("test_spans.too_far", byte_tokenizer())(ids, torch.ones_like(ids), 12)
    for name in ("thoughts", "test_spans.nonesuch", "nonesuch.function"):
        with pytest.raises(ValueError, match=f"credit_span='{name}'"):
            config(tmp_path, credit_span=name)
    assert get_span("all") is None


@pytest.mark.parametrize("liger", [False, True], ids=["default", "liger"])
def test_outside_the_span_a_token_keeps_the_plain_advantage(tmp_path, liger):
    def spoken(prompts, trainer):
        tokenizer = trainer.processing_class
        ids = [tokenizer(f"<think>{i}</think>so {i}")["input_ids"] for i in range(len(prompts))]
        return {
            "prompt_ids": tokenizer(prompts)["input_ids"],
            "completion_ids": ids,
            "logprobs": [[0.0] * len(own) for own in ids],
        }

    built = trainer(
        tmp_path, credit_span="thinking", rollout_func=spoken, max_completion_length=24, peft_config=lora(),
        use_liger_loss=liger, max_steps=1, reward=lambda completions, **c: [float(i) for i in range(len(completions))],
    )  # fmt: skip
    credit, seen = built._token_credit, []

    def spy(inputs, logps, *rows):
        seen.append((inputs["advantages"], inputs["credit_span"], credit(inputs, logps, *rows)))
        return seen[-1][2]

    built._token_credit = spy
    built.train()
    advantages, span, credited = seen[-1]
    plain = advantages.unsqueeze(1).expand_as(credited)
    assert span.sum(1).tolist() == [1, 1, 1, 1]
    assert torch.equal(credited[~span], plain[~span])
    assert (credited[span] != plain[span]).all()
    assert built.state.log_history[0]["rlsd/no_span"] == 0
