"""Tiny models, tokenizers and datasets, built in code: no test needs a download."""

import os
import shutil
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path


# before anything of Hugging Face is imported
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

import pytest
import torch
from accelerate import PartialState
from datasets import Dataset
from hypothesis import settings
from peft import LoraConfig
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from trl_rlsd import RLSDConfig, RLSDTrainer
from trl_rlsd.rewards.sandbox import Bubblewrap


# an example can take long while other tests have the cores
settings.register_profile("tests", deadline=None)
settings.load_profile("tests")

CHAT_TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% if no_think is defined %}<no-think>{% endif %}{% endif %}"
)


def byte_tokenizer(chat_template: str | None = CHAT_TEMPLATE, extra: tuple[str, ...] = (), first: str = "<pad>"):
    """One token a byte, and the special tokens: every text survives encoding and decoding."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([first, "</s>", *alphabet, *extra])}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=first,
        eos_token="</s>",
        padding_side="left",
        chat_template=chat_template,
    )


def tiny_text(vocab_size: int, **options) -> dict:
    """The config of a text model of two layers with grouped-query attention. The weights are large enough for
    log-probs to differ by tenths of a nat between prompts; at the usual 0.02 every gain would be about 0 and the tests
    would see nothing."""
    defaults = dict(
        vocab_size=vocab_size,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=0.3,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
    )
    return {**defaults, **options}


def tiny_llama(vocab_size: int = 258, seed: int = 0, **options) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**tiny_text(vocab_size, **options)))


def lora(**options) -> LoraConfig:
    return LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **options})


def dataset(rows: int = 16, conversational: bool = False, column: str = "privileged_context") -> Dataset:
    prompts = [f"{i} + {i} = ?" for i in range(rows)]
    if conversational:
        prompts = [[{"role": "user", "content": prompt}] for prompt in prompts]
    return Dataset.from_dict({"prompt": prompts, column: [f"the answer is {2 * i}" for i in range(rows)]})


def byte_reward(completions, **kwargs):
    """Varied within almost every group, and the same for the same completions."""
    texts = [c if isinstance(c, str) else c[-1]["content"] for c in completions]
    return [float(sum(text.encode()) % 7) for text in texts]


def config(tmp_path, **options) -> RLSDConfig:
    defaults = dict(
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        per_device_train_batch_size=4,
        num_generations=4,
        max_completion_length=8,
        max_steps=2,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        seed=7,
    )
    return RLSDConfig(str(tmp_path), **{**defaults, **options})


def trainer(tmp_path, *, model=None, data=None, peft_config=None, reward=byte_reward, args=None, **options):
    """An RLSDTrainer on the tiny model; `options` are config fields, and `teacher_model`, `callbacks`, `tools`, ...
    go to the trainer."""
    names = ("teacher_model", "callbacks", "tools", "eval_dataset", "processing_class", "rollout_func")
    own = {name: options.pop(name) for name in names if name in options}
    own.setdefault("processing_class", byte_tokenizer())
    return RLSDTrainer(
        model if model is not None else tiny_llama(),
        reward,
        args if args is not None else config(tmp_path, **options),
        data if data is not None else dataset(),
        peft_config=peft_config,
        **own,
    )


def run_on_two_ranks(folder: Path, script: str) -> list:
    """Run a script on two processes in a folder, and load what each has saved as rank0.pt and rank1.pt."""
    (folder / "run.py").write_text(script)
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parent.parent)}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "run.py"]
    with subprocess.Popen(command, cwd=folder, env=env, stderr=subprocess.PIPE, text=True) as launcher:
        try:
            _, errors = launcher.communicate(timeout=240)
        except subprocess.TimeoutExpired:
            launcher.terminate()  # it ends its workers, which would outlive a kill
            raise
    assert launcher.returncode == 0, errors[-3000:]
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(2)]


def weights(model) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def assert_same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    """Bit for bit."""
    assert first.keys() == second.keys()
    different = [name for name in first if not torch.equal(first[name], second[name])]
    assert not different, different


def differs(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return any(not torch.equal(first[name], second[name]) for name in first)


def pytest_runtest_setup(item):
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a GPU")


@pytest.fixture(scope="session")
def chromium():
    """A Chromium of the system's, driven by playwright; tests of pages are skipped without."""
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install playwright")
    names = ("chromium", "chromium-browser", "google-chrome")
    path = next(filter(None, map(shutil.which, names)), None)
    if path is None:
        pytest.skip("chromium is not installed: apt-get install chromium")
    with api.sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture
def browser(chromium):
    """A function path -> context with the page, opened; afterwards it must have complained of nothing and have asked
    for nothing but itself. `options` are playwright's."""

    @contextmanager
    def opened(path, **options):
        context = chromium.new_context(**{"viewport": {"width": 900, "height": 900}, **options})
        page, complaints, asked = context.new_page(), [], []
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("request", lambda request: asked.append(request.url))
        page.goto(path.as_uri())
        yield page
        context.close()
        assert complaints == []
        assert {url for url in asked if url != "about:srcdoc"} == {path.as_uri()}

    return opened


@pytest.fixture(autouse=True, scope="session")
def accelerate_state():
    PartialState()  # its loggers ask for it, and not every test builds a trainer


@pytest.fixture(autouse=True)
def one_thread():
    # tests run in several processes; spinning threads on taken cores are many times slower
    torch.set_num_threads(1)


def pytest_report_header() -> str:
    """Which isolator the tests of code_reward run in, or why they are skipped."""
    try:
        Bubblewrap().check()
    except (ImportError, RuntimeError) as error:
        return f"sandbox: none ({error})"
    return f"sandbox: {subprocess.run(['bwrap', '--version'], capture_output=True, text=True).stdout.strip()}"


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """The server, with the client pointed at it and at an empty cache; seconds that are waited for are kept in
    `hub.waits`, and not waited."""
    import huggingface_hub.hf_api
    import transformers
    from hub_server import TOKEN, HubServer
    from huggingface_hub import constants

    with HubServer() as server:
        server.tokens[TOKEN] = "me"
        server.waits = []
        # read from the environment when the client is imported
        for name, value in {
            "HF_HUB_OFFLINE": False,
            "HF_HUB_DISABLE_XET": True,
            "ENDPOINT": server.url,
            "HUGGINGFACE_CO_URL_TEMPLATE": server.url + "/{repo_id}/resolve/{revision}/{filename}",
            "HF_HUB_CACHE": str(tmp_path / "cache"),
        }.items():
            monkeypatch.setattr(constants, name, value)
        for client in (huggingface_hub.hf_api.api, transformers.utils.hub.hf_api()):
            monkeypatch.setattr(client, "endpoint", server.url)
        sleep = time.sleep

        def wait(seconds):  # threads that other tests have left wait as they did, or they would spin
            server.waits.append(seconds) if threading.current_thread() is threading.main_thread() else sleep(seconds)

        monkeypatch.setattr(time, "sleep", wait)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        yield server
