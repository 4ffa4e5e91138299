"""Generation backends stay TRL's: RLSD adds nothing between the sampler and TRL, and takes nothing from it but tokens.

vLLM itself does not run here. TRL's own VLLMGeneration runs, on a stand-in for the engine (colocate) or for the client
of the server, which does what TRL relies on: it holds the weights that it was sent, samples from them, and returns the
log-probs of its samples, here moved by a mismatch. Transformers' continuous batching runs as it is.
"""

import math
import os
from types import SimpleNamespace

import pytest
import torch
from conftest import (
    assert_same,
    byte_reward,
    byte_tokenizer,
    config,
    dataset,
    differs,
    lora,
    tiny_llama,
    trainer,
    weights,
)
from transformers import TrainerCallback
from trl import GRPOTrainer
from trl.generation import vllm_generation

from trl_rlsd import RLSDTrainer


TOKENS, MISMATCH = 6, -0.7  # exp(0.7) = 2.01 is below TRL's upper bound of the ratio, 3


OPTIONS = {
    "use_vllm": True,
    "vllm_importance_sampling_mode": "token_truncate",
    "max_completion_length": TOKENS,
    "teacher_sync_steps": 2,
}


class Engine:
    """Samples from the weights that it was sent, with a generator of its own."""

    mismatch = MISMATCH
    events: list  # ("sync", weights) and ("generate", None), in order

    def __init__(self):
        self.model = tiny_llama(seed=99)  # not the student: what was never sent would show in the log-probs
        self.generator = torch.Generator().manual_seed(3)
        self.received = {}

    def load(self, name, value):
        self.model.get_parameter(name).data.copy_(value)
        self.received[name] = value.detach().clone()

    def synced(self):
        Engine.events.append(("sync", self.received))
        self.received = {}

    @torch.no_grad()
    def sample(self, prompt):
        ids, tokens, logps = list(prompt), [], []
        for _ in range(TOKENS):
            log_probs = self.model(torch.tensor([ids])).logits[0, -1].log_softmax(-1)
            tokens.append(torch.multinomial(log_probs.exp(), 1, generator=self.generator).item())
            logps.append(log_probs[tokens[-1]].item() + self.mismatch)
            ids.append(tokens[-1])
        return tokens, logps


class StandInLLM(Engine):
    """vllm.LLM, as far as TRL 1.16 goes."""

    def __init__(self, model, **options):
        super().__init__()
        self.options = options
        for name in (
            "RANK",
            "LOCAL_RANK",
            "WORLD_SIZE",
        ):  # TRL sets them for vLLM; the next trainer would join a group
            os.environ.pop(name, None)
        runner = SimpleNamespace(
            model=SimpleNamespace(load_weights=lambda pairs: [self.load(*pair) for pair in pairs])
        )
        executor = SimpleNamespace(driver_worker=SimpleNamespace(model_runner=runner))
        self.llm_engine = SimpleNamespace(
            model_executor=executor, model_config=SimpleNamespace(max_model_len=options["max_model_len"])
        )

    def reset_prefix_cache(self):
        self.synced()

    def generate(self, prompts, sampling_params, use_tqdm):
        Engine.events.append(("generate", None))
        outputs = []
        for prompt in prompts:
            tokens, logps = self.sample(prompt["prompt_token_ids"])
            steps = [{t: SimpleNamespace(rank=1, logprob=p)} for t, p in zip(tokens, logps, strict=True)]
            sampled = SimpleNamespace(token_ids=tokens, logprobs=steps)
            outputs.append(SimpleNamespace(prompt_token_ids=prompt["prompt_token_ids"], outputs=[sampled]))
        return outputs

    def sleep(self, level):
        for parameter in self.model.parameters():
            parameter.data.fill_(math.nan)  # level 2 discards the weights

    def wake_up(self, tags):
        pass


class StandInClient(Engine):
    """trl.generation.vllm_client.VLLMClient and the server behind it."""

    def __init__(self, base_url, group_port, connection_timeout):
        super().__init__()

    def init_communicator(self, device):
        pass

    def get_server_info(self):
        return {"model_config": {"logprobs_mode": "processed_logprobs"}}

    def update_named_params(self, metadata, named_params):
        sent = [self.load(name, value) or (name, value.shape) for name, value in named_params]
        assert sent == [(name, torch.Size(shape)) for name, _, shape in metadata]

    def reset_prefix_cache(self):
        self.synced()

    def generate(self, prompts, features, n, **sampling_params):
        Engine.events.append(("generate", None))
        sampled = [self.sample(prompt) for prompt in prompts for _ in range(n)]
        return {
            "prompt_ids": prompts,
            "completion_ids": [tokens for tokens, _ in sampled],
            "logprobs": [[[p] for p in logps] for _, logps in sampled],
        }


@pytest.fixture(autouse=True)
def vllm(monkeypatch):
    """TRL 1.16: the names that vllm_generation takes from vLLM and from its client."""
    monkeypatch.setattr(vllm_generation, "is_vllm_available", lambda: True)
    monkeypatch.setattr(vllm_generation, "LLM", StandInLLM, raising=False)
    monkeypatch.setattr(vllm_generation, "SamplingParams", SimpleNamespace, raising=False)
    monkeypatch.setattr(vllm_generation, "VLLMClient", StandInClient)
    monkeypatch.setattr(Engine, "events", [], raising=False)
    monkeypatch.setattr(Engine, "mismatch", MISMATCH)
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "")  # so that they are gone again afterwards
        monkeypatch.delenv(name)


SERVER = {"vllm_mode": "server"}
COLOCATE = {"vllm_mode": "colocate", "vllm_max_model_length": 64}
SLEEP = {**COLOCATE, "vllm_enable_sleep_mode": True}
MODES = pytest.mark.parametrize("mode", [SERVER, COLOCATE, SLEEP], ids=["server", "colocate", "sleep"])


class Recorder(TrainerCallback):
    """The student's weights when a step begins, and the teacher's then."""

    def __init__(self):
        self.student, self.teacher, self.built = [], [], None

    def on_step_begin(self, args, state, control, **kwargs):
        self.student.append(weights(self.built.model))
        self.teacher.append({name: value.clone() for name, value in self.built.teacher.copy.items()})


def run(folder, *, kind="synced", peft=False, callbacks=(), **options):
    """A run of three steps, and its batches as they were generated and scored."""
    built = trainer(
        folder,
        peft_config=lora() if peft else None,
        teacher_model_kind=kind,
        callbacks=list(callbacks),
        **{**OPTIONS, "max_steps": 3, **options},
    )
    for callback in callbacks:
        callback.built = built
    batches, score = [], built._generate_and_score_completions

    def scored(inputs):
        batches.append(score(inputs))
        return batches[-1]

    built._generate_and_score_completions = scored
    built.train()
    return built, batches


@MODES
@pytest.mark.parametrize("peft", [False, True], ids=["full", "lora"])
def test_the_engine_samples_from_the_students_weights_of_this_step(tmp_path, mode, peft):
    """The ratio of TRL is the student's probability over the sampler's: were anything else sent, or sent too late, it
    would not be that of the mismatch."""
    _, batches = run(tmp_path, peft=peft, **mode)
    assert [event for event, _ in Engine.events] == ["sync", "generate"] * 3
    assert len(batches) == 3
    for batch in batches:
        ratio = batch["importance_sampling_ratio"][batch["completion_mask"].bool()]
        torch.testing.assert_close(ratio, torch.full_like(ratio, math.exp(-MISMATCH)), rtol=1e-4, atol=0)


@pytest.mark.parametrize("kind, mode", [("synced", SERVER), ("ema", COLOCATE)], ids=["server", "colocate"])
def test_what_is_sent_is_the_student_and_never_the_teacher(tmp_path, mode, kind):
    recorder = Recorder()
    run(tmp_path, kind=kind, callbacks=[recorder], **mode)
    sent = [weights for event, weights in Engine.events if event == "sync"]
    assert len(sent) == 3
    for received, student in zip(sent, recorder.student, strict=True):
        assert_same(received, student)
    assert differs(sent[1], recorder.teacher[1])  # by then the teacher is another model
    assert not differs(sent[0], recorder.teacher[0])


def test_weights_are_sent_once_for_completions_that_are_used_for_several_steps(tmp_path):
    run(tmp_path, num_iterations=2, vllm_mode="server", max_steps=4)
    assert [event for event, _ in Engine.events] == ["sync", "generate"] * 2


class Observed(RLSDTrainer):
    def observe_credit(self, batch, student_logps, credited):
        self.credits = [*getattr(self, "credits", []), (batch["teacher_logps"], student_logps, credited)]


@pytest.mark.parametrize("mode", [SERVER, COLOCATE], ids=["server", "colocate"])
def test_the_gain_does_not_read_the_samplers_log_probs(tmp_path, mode, monkeypatch):
    """Without TRL's correction the mismatch has nowhere else to go: runs with and without it are the same."""
    monkeypatch.setattr("conftest.RLSDTrainer", Observed)
    runs = []
    for mismatch in (0.0, MISMATCH):
        Engine.mismatch = mismatch
        built, batches = run(tmp_path, vllm_importance_sampling_correction=False, **mode)
        assert "importance_sampling_ratio" not in batches[0]
        runs.append((built, batches))
    for first, second in zip(runs[0][0].credits, runs[1][0].credits, strict=True):
        assert all(map(torch.equal, first, second))
    assert_same(*(weights(built.model) for built, _ in runs))
    # and there was something to ignore
    assert not torch.equal(*(batches[0]["sampling_per_token_logps"] for _, batches in runs))


@pytest.mark.parametrize(
    "mode, correction",
    [(SERVER, "token_truncate"), (COLOCATE, "sequence_mask")],
    ids=["server-token_truncate", "colocate-sequence_mask"],
)
def test_trls_importance_ratio_is_grpos_bit_for_bit(tmp_path, mode, correction, monkeypatch):
    mode = {**mode, "vllm_importance_sampling_mode": correction}
    monkeypatch.setattr("conftest.RLSDTrainer", Observed)
    built, ours = run(tmp_path, max_steps=1, **mode)
    args = config(tmp_path, max_steps=1, **{**OPTIONS, **mode})  # a GRPOConfig, too
    theirs = GRPOTrainer(tiny_llama(), byte_reward, args, dataset(), processing_class=byte_tokenizer())
    batches, score = [], theirs._generate_and_score_completions
    theirs._generate_and_score_completions = lambda inputs: batches.append(score(inputs)) or batches[-1]
    theirs.train()
    for name in ("completion_ids", "sampling_per_token_logps", "old_per_token_logps", "importance_sampling_ratio"):
        assert torch.equal(ours[0][name], batches[0][name]), name
    # the credit of the same completions without a mismatch, so with a ratio of 1
    Engine.mismatch = 0.0
    exact, _ = run(tmp_path, max_steps=1, **mode)
    assert all(map(torch.equal, built.credits[0], exact.credits[0]))


@pytest.mark.parametrize("peft", [pytest.param(False, marks=pytest.mark.slow), True], ids=["full", "lora"])
def test_continuous_batching_of_transformers_runs(tmp_path, peft):
    built = trainer(
        tmp_path,
        peft_config=lora() if peft else None,
        use_transformers_continuous_batching=True,
        # the default takes half of the memory for keys and values, and tens of seconds to fill it
        transformers_continuous_batching_config={"num_blocks": 16, "max_batch_tokens": 64, "block_size": 32},
        teacher_sync_steps=1,
    )
    start = weights(built.model)
    built.train()
    logs = built.state.log_history[:2]
    assert all(abs(log["rlsd/gain_mean"]) > 0.01 for log in logs)
    assert differs(start, weights(built.model))
    assert built.model.training
