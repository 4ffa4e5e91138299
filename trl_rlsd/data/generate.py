"""Where completions come from: a server that speaks OpenAI's API, or a model in this process.

Both have `settings`, what a completion depends on, and `complete(prompts, seeds, keep)`, which yields `(index,
completion)` in the order of arrival. `keep(index, text)` is called with each text before anything else is asked for,
so that whoever has paid for it can write it down; it may be called in other threads.
"""

from __future__ import annotations

import hashlib
import logging
import os
import threading
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

Prompt = str | list[dict[str, Any]]
Keep = Callable[[int, str], None]

# no such model, no access, no money: what the next request would be told, too
_FATAL = {401: "api_key_env", 402: "the account", 403: "api_key_env", 404: "model and base_url"}
# requests that fail one after another before the server is given up
_GIVE_UP = 20


class RequestFailed(Exception):
    """One request, after all retries; another may work. `is_outage`: for the server's reasons, not the prompt's."""

    def __init__(self, message: str, is_outage: bool = False):
        super().__init__(message)
        self.is_outage = is_outage


class SourceFailed(RuntimeError):
    """No request can work; the message says what to do."""


@dataclass(frozen=True)
class Endpoint:
    """A model behind `/chat/completions` of a server that speaks OpenAI's API: a vendor's, or your own (vLLM, SGLang).

    One request asks for one completion. Plain prompts are sent as a user's message. Where the server keeps reasoning
    apart (`reasoning_content` or `reasoning`), the completion is `<think>...</think>` and the answer, as the models
    write it themselves. 408, 409, 429, 5xx, timeouts and broken connections are retried by the openai package, which
    waits longer each time, or as long as the server asks; a request that timed out may have been billed. 401, 402, 403
    and 404 end the run at once, and so do 20 failures in a row that are the server's, not the prompt's.

    Args:
        model: its name at the server.
        base_url: up to and including the version, as in "http://localhost:8000/v1".
        api_key_env: name of the environment variable that holds the key, which is stored nowhere; None for a server
            that asks for no key.
        temperature: None for the server's own, as for `top_p` and `max_tokens`.
        max_tokens: of a completion, reasoning included.
        extra: more fields of the request's body, as in {"max_completion_tokens": 8192, "reasoning_effort": "low"}.
        concurrency: requests at one time.
        timeout: seconds that the server may be silent in one try.
        retries: tries after the first.
    """

    model: str
    base_url: str
    api_key_env: str | None = "OPENAI_API_KEY"
    temperature: float | None = 1.0
    top_p: float | None = None
    max_tokens: int | None = 4096
    extra: Mapping[str, Any] = field(default_factory=dict)
    concurrency: int = 8
    timeout: float = 600.0
    retries: int = 5

    def __post_init__(self):
        for name, least in (("concurrency", 1), ("retries", 0), ("timeout", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)} must be {least} or more.")

    @property
    def settings(self) -> dict[str, Any]:
        """What a completion depends on. The address does not belong to it: a server may move."""
        return {**self._sampling, **{f"extra.{name}": value for name, value in self.extra.items()}}

    @property
    def _sampling(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("model", "temperature", "top_p", "max_tokens")}

    def complete(
        self, prompts: Sequence[Prompt], seeds: Sequence[int], keep: Keep
    ) -> Generator[tuple[int, str | RequestFailed], None, None]:
        """A text, or why there is none, for each prompt. The seeds are not used: servers do not agree on them.

        Closing the iterator, as Ctrl-C does, sends no more requests, and waits for those that are under way.

        Raises: ImportError, SourceFailed, ValueError (no key), and what `keep` raises.
        """
        client = self._client()
        todo, taking, stop = iter(enumerate(prompts)), threading.Lock(), threading.Event()
        results: SimpleQueue[tuple[int, str | Exception]] = SimpleQueue()

        def work() -> None:
            while not stop.is_set():
                with taking:
                    index, prompt = next(todo, (None, None))
                if index is None:
                    return
                try:
                    text = self._request(client, prompt)
                    keep(index, text)
                except Exception as error:
                    results.put((index, error))
                else:
                    results.put((index, text))

        # daemons: a second Ctrl-C, or the end of the script, does not wait for a slow server
        workers = [threading.Thread(target=work, daemon=True) for _ in range(min(self.concurrency, len(prompts)))]
        failed_in_a_row = 0
        try:
            for worker in workers:
                worker.start()
            for _ in prompts:
                index, result = results.get()
                if isinstance(result, Exception) and not isinstance(result, RequestFailed):
                    raise result
                out_of_order = isinstance(result, RequestFailed) and result.is_outage
                failed_in_a_row = failed_in_a_row + 1 if out_of_order else 0
                if failed_in_a_row == _GIVE_UP:
                    raise SourceFailed(f"{_GIVE_UP} requests in a row failed at {self.base_url}; the last: {result}")
                yield index, result
        except BaseException:
            logger.warning("Stopped; waiting for the requests under way (Ctrl-C leaves them).")
            raise
        finally:
            stop.set()
            for worker in workers:
                worker.join()
            client.close()

    def _client(self):
        try:
            from openai import OpenAI
        except ImportError as error:
            raise ImportError("An Endpoint needs the openai package: pip install 'trl-rlsd[traces]'") from error
        key = "none" if self.api_key_env is None else os.environ.get(self.api_key_env)
        if not key:
            raise ValueError(
                f"api_key_env={self.api_key_env!r}: there is no such environment variable, or it is empty. Set it, or "
                "api_key_env=None for a server that asks for no key."
            )
        return OpenAI(base_url=self.base_url, api_key=key, timeout=self.timeout, max_retries=self.retries)

    def _request(self, client, prompt: Prompt) -> str:
        from openai import APIStatusError, OpenAIError

        try:
            reply = client.chat.completions.create(
                messages=[{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt,
                extra_body=dict(self.extra),
                **{name: value for name, value in self._sampling.items() if value is not None},
            )
        except (OpenAIError, ValueError) as error:  # a body that is no JSON is a ValueError
            # servers repeat what they were sent, and messages end up in logs
            message = f"{type(error).__name__}: {error.__cause__ or error}".replace(client.api_key, "<key>")
            status = error.status_code if isinstance(error, APIStatusError) else None
            if status in _FATAL or getattr(error, "code", None) == "insufficient_quota":
                raise SourceFailed(
                    f"{self.base_url} refuses model {self.model!r} ({message}). Check "
                    f"{_FATAL.get(status, 'the account')}; what has arrived is kept."
                ) from None
            raise RequestFailed(message, is_outage=status is None or status == 429 or status >= 500) from None
        # half an emoji is JSON, but no text
        return _text(reply).encode(errors="replace").decode()


def _text(reply: Any) -> str:
    """Of a reply: an empty one is an answer too, and was paid for. Raises: RequestFailed, where there is none."""
    choices = getattr(reply, "choices", None)
    if not choices or getattr(choices[0], "message", None) is None:
        raise RequestFailed(f"the reply holds no completion: {str(reply)[:200]}", is_outage=True)
    choice = choices[0]
    if choice.finish_reason == "content_filter":
        raise RequestFailed("the server's content filter stopped the completion")
    content = choice.message.content or ""
    reasoning = getattr(choice.message, "reasoning_content", None) or getattr(choice.message, "reasoning", None)
    if not reasoning or not isinstance(reasoning, str):
        return content
    ended = content or choice.finish_reason != "length"
    return f"<think>\n{reasoning.strip()}\n" + (f"</think>\n\n{content}" if ended else "")


@dataclass(frozen=True)
class LocalModel:
    """A causal language model of transformers, in this process. For many problems, serve the model (`vllm serve`) and
    use an [`Endpoint`]: `generate` is slower by an order of magnitude.

    Conversations go through the tokenizer's chat template, plain prompts through the tokenizer alone. Fields that are
    not here are those of the model's own generation config.

    Args:
        model: a path or model id, or a loaded model, which is known by its `name_or_path`.
        tokenizer: of a loaded model. [that of the path]
        temperature: 0 decodes greedily.
        max_tokens: of a completion.
        batch_size: prompts at one time.
        seed: the same seed and batches give the same completions on the same machine.
        chat_template_kwargs: as in {"enable_thinking": False}.
    """

    model: str | PreTrainedModel
    tokenizer: PreTrainedTokenizerBase | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    max_tokens: int = 1024
    batch_size: int = 16
    seed: int = 0
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)

    @property
    def settings(self) -> dict[str, Any]:
        """What a completion depends on."""
        names = ("temperature", "top_p", "top_k", "max_tokens", "seed")
        template = {f"chat_template_kwargs.{name}": value for name, value in self.chat_template_kwargs.items()}
        model = self.model if isinstance(self.model, str) else self.model.name_or_path
        return {"model": model, **{name: getattr(self, name) for name in names}, **template}

    def complete(
        self, prompts: Sequence[Prompt], seeds: Sequence[int], keep: Keep
    ) -> Generator[tuple[int, str], None, None]:
        """A text for each prompt, batch by batch. The seeds, one of each completion, tell completions of one prompt
        apart. Raises what the model raises: a fault here is not one request's."""
        for start in range(0, len(prompts), self.batch_size):
            batch = slice(start, start + self.batch_size)
            texts = self._generate(prompts[batch], seeds[batch])
            for index, text in enumerate(texts, start):
                keep(index, text)
            yield from enumerate(texts, start)

    @cached_property
    def _loaded(self) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        model = self.model
        if isinstance(model, str):
            model = AutoModelForCausalLM.from_pretrained(model, dtype="auto", device_map="auto")
        tokenizer = self.tokenizer or AutoTokenizer.from_pretrained(model.name_or_path)
        if tokenizer.pad_token is None:  # as TRL does
            tokenizer.pad_token = tokenizer.eos_token
        return model, tokenizer

    def _generate(self, prompts: Sequence[Prompt], seeds: Sequence[int]) -> list[str]:
        import torch

        model, tokenizer = self._loaded
        plain = isinstance(prompts[0], str)
        texts = list(prompts) if plain else self._rendered(tokenizer, prompts)
        # a template writes the special tokens itself
        inputs = tokenizer(texts, padding=True, padding_side="left", add_special_tokens=plain, return_tensors="pt")
        inputs = {name: inputs[name].to(model.device) for name in ("input_ids", "attention_mask")}
        sampling = dict(do_sample=True, temperature=self.temperature, top_p=self.top_p, top_k=self.top_k)
        if self.temperature == 0:
            sampling = dict(do_sample=False, temperature=None, top_p=None, top_k=None)
        digest = hashlib.sha256(repr((self.seed, list(seeds))).encode()).digest()
        was_training = model.training
        model.eval()
        try:
            with torch.random.fork_rng([model.device] if model.device.type == "cuda" else []), torch.no_grad():
                torch.manual_seed(int.from_bytes(digest[:7], "big"))
                ids = model.generate(
                    **inputs, **sampling, max_new_tokens=self.max_tokens, pad_token_id=tokenizer.pad_token_id
                )
        finally:
            model.train(was_training)
        return tokenizer.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)

    def _rendered(self, tokenizer, prompts: Sequence[Prompt]) -> list[str]:
        return tokenizer.apply_chat_template(
            list(prompts), add_generation_prompt=True, tokenize=False, **self.chat_template_kwargs
        )
