"""RLSDTrainer in TRL's training loop: what changes, what must not, and what it costs."""

import copy
import math

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
from datasets import Dataset, IterableDataset
from trl import GRPOConfig, GRPOTrainer

from trl_rlsd import RLSDConfig, RLSDTrainer, register_credit
from trl_rlsd.config import TEACHER_KINDS
from trl_rlsd.credit import lambda_at


PEFT = pytest.mark.parametrize("peft", [False, True], ids=["full", "lora"])
LOSS_TYPES = ["grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo", "vespo"]


SCRIPT = dict(
    use_cpu=True, bf16=False, per_device_train_batch_size=4, num_generations=4, max_completion_length=8,
    max_steps=3, learning_rate=1e-2, logging_steps=1, save_strategy="no", report_to=[], disable_tqdm=True, seed=7,
)  # fmt: skip


def run(trainer_class, config_class, folder, *, peft_config=None, data=None, **options):
    """A user's script: the two names are all that differs between GRPO and RLSD."""
    built = trainer_class(
        model=tiny_llama(),
        reward_funcs=byte_reward,
        args=config_class(str(folder), **{**SCRIPT, **options}),
        train_dataset=data if data is not None else dataset(),
        processing_class=byte_tokenizer(),
        peft_config=peft_config,
    )
    start = weights(built.model)
    built.train()
    assert differs(weights(built.model), start), "nothing was learned, so nothing was compared"
    return built


# ---------------------------------------------------------------- the swap


@PEFT
@pytest.mark.parametrize("kind", [kind for kind in TEACHER_KINDS if kind != "external"])
def test_lambda_zero_gives_grpos_weights_bit_for_bit(tmp_path, peft, kind):
    peft_config = lora(lora_dropout=0.1) if peft else None
    grpo = run(GRPOTrainer, GRPOConfig, tmp_path, peft_config=peft_config)
    rlsd = run(RLSDTrainer, RLSDConfig, tmp_path, peft_config=peft_config, rlsd_lambda=0.0, teacher_model_kind=kind)
    assert_same(weights(grpo.model), weights(rlsd.model))


@PEFT
def test_lambda_above_zero_trains_with_token_credit(tmp_path, peft):
    peft_config = lora() if peft else None
    grpo = run(GRPOTrainer, GRPOConfig, tmp_path, peft_config=peft_config)
    rlsd = run(RLSDTrainer, RLSDConfig, tmp_path, peft_config=peft_config)
    assert differs(weights(grpo.model), weights(rlsd.model))


def test_credit_grpo_is_grpo_bit_for_bit(tmp_path):
    grpo = run(GRPOTrainer, GRPOConfig, tmp_path)
    assert_same(weights(grpo.model), weights(run(RLSDTrainer, RLSDConfig, tmp_path, credit="grpo").model))


@PEFT
def test_once_lambda_has_decayed_the_steps_are_grpos(tmp_path, peft):
    """From the same checkpoint both trainers go on to the same weights: nothing of RLSD lingers."""
    options = dict(max_steps=4, save_strategy="steps", save_steps=2, lr_scheduler_type="constant")
    peft_config = lora() if peft else None
    rlsd = run(RLSDTrainer, RLSDConfig, tmp_path, peft_config=peft_config, rlsd_lambda_decay_steps=2, **options)
    grpo = GRPOTrainer(
        tiny_llama(),
        byte_reward,
        GRPOConfig(str(tmp_path / "grpo"), **{**SCRIPT, **options}),
        dataset(),
        processing_class=byte_tokenizer(),
        peft_config=peft_config,
    )
    grpo.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert_same(weights(rlsd.model), weights(grpo.model))


def test_a_row_without_context_keeps_grpos_credit(tmp_path):
    rows = dataset().to_dict()
    rows["privileged_context"] = [None, ""] * 8
    without = run(RLSDTrainer, RLSDConfig, tmp_path, data=Dataset.from_dict(rows))
    assert_same(weights(without.model), weights(run(GRPOTrainer, GRPOConfig, tmp_path).model))
    assert without.state.log_history[0]["rlsd/no_context"] == 1


# ---------------------------------------------------------------- what the token advantages are


def captured_credit(built):
    """Train; returns for each micro-batch what the loss was given and the student's log-probs of that forward."""
    taken = []
    original = built._token_credit

    def spy(inputs, student_logps):
        token_advantages = original(inputs, student_logps)
        taken.append({**inputs, "student_logps": student_logps, "token_advantages": token_advantages})
        return token_advantages

    built._token_credit = spy
    built.train()
    return taken


@PEFT
def test_the_loss_gets_the_papers_formula_on_update_time_log_probs(tmp_path, peft):
    """The whole path against the definition: full logits, teacher and student prompts rebuilt by hand."""
    built = trainer(tmp_path, peft_config=lora() if peft else None, reward=varied, max_steps=1, temperature=0.8)
    model = built.model
    start = copy.deepcopy(built.accelerator.unwrap_model(model).state_dict())
    (batch,) = captured_credit(built)
    built.accelerator.unwrap_model(model).load_state_dict(start)

    def logps(prompt, completion):
        with torch.no_grad():
            logits = model(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1] / 0.8
        return logits.log_softmax(-1).gather(1, torch.tensor(completion).unsqueeze(1)).squeeze(1)

    model.eval()
    contexts = {f"{i} + {i} = ?": f"the answer is {2 * i}" for i in range(16)}
    encode = built.processing_class.encode
    for row in range(4):
        length = int(batch["completion_mask"][row].sum())
        completion = batch["completion_ids"][row, :length].tolist()
        prompt = built.processing_class.decode(batch["prompt_ids"][row][batch["prompt_mask"][row].bool()])
        teacher_prompt = built.args.teacher_prompt_template.format(prompt=prompt, privileged_context=contexts[prompt])
        student, teacher = logps(encode(prompt), completion), logps(encode(teacher_prompt), completion)
        torch.testing.assert_close(batch["student_logps"][row, :length], student, rtol=0, atol=1e-4)
        torch.testing.assert_close(batch["teacher_logps"][row, :length], teacher, rtol=0, atol=1e-4)
        advantage = batch["advantages"][row]
        weight = (advantage.sign() * (teacher - student)).exp().clamp(0.8, 1.2)
        expected = advantage * (0.5 + 0.5 * weight)
        torch.testing.assert_close(batch["token_advantages"][row, :length], expected, rtol=0, atol=1e-4)


def test_rows_stay_with_their_teacher_through_shuffle_and_split(tmp_path):
    """Every row's teacher log-probs are those of its own prompt and completion, after TRL has shuffled the buffer."""
    built = trainer(tmp_path, gradient_accumulation_steps=4, max_steps=1, learning_rate=0.0)
    batches = captured_credit(built)
    assert len(batches) == 4
    built.model.eval()
    contexts = {f"{i} + {i} = ?": f"the answer is {2 * i}" for i in range(16)}
    for batch in batches:
        for row in range(4):
            prompt = built.processing_class.decode(batch["prompt_ids"][row][batch["prompt_mask"][row].bool()])
            text = built.args.teacher_prompt_template.format(prompt=prompt, privileged_context=contexts[prompt])
            ids = built.processing_class.encode(text) + batch["completion_ids"][row].tolist()
            with torch.no_grad():
                logits = built.model(torch.tensor([ids])).logits[0, -9:-1]
            expected = logits.log_softmax(-1).gather(1, batch["completion_ids"][row].unsqueeze(1)).squeeze(1)
            counted = batch["completion_mask"][row].bool()
            if batch["teacher_scored"][row]:
                torch.testing.assert_close(batch["teacher_logps"][row][counted], expected[counted], rtol=0, atol=1e-4)


def test_credit_is_not_put_upon_credit_when_a_batch_is_used_again(tmp_path):
    built = trainer(tmp_path, num_iterations=2, max_steps=2)
    first, second = captured_credit(built)
    assert torch.equal(first["completion_ids"], second["completion_ids"])
    assert first["advantages"].shape == second["advantages"].shape == (4,)
    assert torch.equal(first["advantages"], second["advantages"])
    # update-time log-probs: the student has moved between the two, the teacher's scores are the same
    assert torch.equal(first["teacher_logps"], second["teacher_logps"])
    assert not torch.equal(first["student_logps"], second["student_logps"])


def test_masked_tokens_get_no_credit(tmp_path):
    def rollout(prompts, trainer):
        ids = [trainer.processing_class.encode(p) for p in prompts]
        completions = [[20 + i, 21, 22, 23] for i in range(len(prompts))]
        return {
            "prompt_ids": ids,
            "completion_ids": completions,
            "logprobs": [[0.0] * 4] * len(prompts),
            "env_mask": [[1, 0, 0, 1]] * len(prompts),  # tokens 1 and 2 are a tool's
        }

    (batch,) = captured_credit(trainer(tmp_path, rollout_func=rollout, max_steps=1))
    assert batch["tool_mask"].tolist() == [[1, 0, 0, 1]] * 4
    assert (batch["token_advantages"][:, 1:3] == 0).all()
    assert (batch["token_advantages"][batch["advantages"] != 0][:, [0, 3]] != 0).all()


def test_sampler_log_probs_never_enter_the_gain(tmp_path):
    def rollout(prompts, trainer):
        ids = [trainer.processing_class.encode(p) for p in prompts]
        return {
            "prompt_ids": ids,
            "completion_ids": [[20 + i, 21, 22] for i in range(len(prompts))],
            "logprobs": [[-99.0] * 3] * len(prompts),
        }

    (batch,) = captured_credit(trainer(tmp_path, rollout_func=rollout, max_steps=1))
    assert (batch["sampling_per_token_logps"] == -99).all()
    assert (batch["student_logps"] > -50).all()


# ---------------------------------------------------------------- what it costs


def forwards(built) -> int:
    """Forwards of whole batches through the model while training, generation left out."""
    model = built.accelerator.unwrap_model(built.model)
    backbone = (model.get_base_model() if hasattr(model, "get_base_model") else model).model
    calls = []
    hook = backbone.register_forward_pre_hook(
        lambda module, args, kwargs: calls.append(1) if kwargs.get("use_cache") is False else None, with_kwargs=True
    )
    built.train()
    hook.remove()
    return len(calls)


def varied(completions, **kwargs):
    """No group without information, so no row can be skipped."""
    return [float(i % 4) for i in range(len(completions))]


def constant(completions, **kwargs):
    return [1.0] * len(completions)


MICRO_BATCHES = 6  # two for each of three steps


@PEFT
def test_grpo_takes_one_forward_a_micro_batch(tmp_path, peft):
    options = dict(reward=varied, gradient_accumulation_steps=2, max_steps=3, peft_config=lora() if peft else None)
    assert forwards(trainer(tmp_path, credit="grpo", **options)) == MICRO_BATCHES


@PEFT
@pytest.mark.parametrize("kind", [kind for kind in TEACHER_KINDS if kind != "external"])
def test_the_teacher_costs_one_forward_a_micro_batch(tmp_path, peft, kind):
    options = dict(reward=varied, gradient_accumulation_steps=2, max_steps=3, peft_config=lora() if peft else None)
    grpo = MICRO_BATCHES
    whole = dict(teacher_shared_prefix=False, teacher_token_budget=4 * 200)  # no more than the student's four rows
    assert forwards(trainer(tmp_path, teacher_model_kind=kind, **whole, **options)) - grpo == 6
    assert forwards(trainer(tmp_path, teacher_model_kind=kind, **options)) - grpo <= 6
    assert forwards(trainer(tmp_path, teacher_model_kind=kind, rlsd_lambda=0.0, **options)) - grpo == 0


def test_no_forward_is_spent_where_the_teacher_cannot_matter(tmp_path):
    base = dict(reward=varied, max_steps=4)
    assert forwards(trainer(tmp_path, **base)) == 8
    assert forwards(trainer(tmp_path, **{**base, "reward": constant})) == 4  # A = 0 everywhere
    assert forwards(trainer(tmp_path, rlsd_lambda_decay_steps=2, **base)) == 6  # lambda 0.5, 0.25, 0, 0
    assert forwards(trainer(tmp_path, rlsd_lambda_warmup_steps=2, **base)) == 7  # lambda 0, 0.25, 0.5, ...
    empty = Dataset.from_dict({"prompt": ["p"] * 4, "privileged_context": [""] * 4})
    assert forwards(trainer(tmp_path, data=empty, **base)) == 4
    # additive credit needs the teacher also where A = 0
    assert forwards(trainer(tmp_path, credit="opsd", **{**base, "reward": constant})) == 8


def test_a_batch_that_lambda_reaches_only_at_its_last_slice_is_scored(tmp_path):
    """Generated at lambda 0, used up at lambda 0.5: the teacher must have been asked when the batch was made."""
    built = trainer(tmp_path, reward=varied, steps_per_generation=2, rlsd_lambda_warmup_steps=1, max_steps=2)
    batches = captured_credit(built)
    assert [log["rlsd/lambda"] for log in built.state.log_history[:-1]] == pytest.approx([0.0, 0.5], abs=0.02)
    assert len(batches) == 1
    assert batches[0]["teacher_scored"].all()


def test_rounding_errors_are_not_advantages(tmp_path):
    """Eight rewards of 0.1 have a mean of 0.1 - 7e-9, and TRL's advantages are then -7e-5, not 0."""
    built = trainer(
        tmp_path,
        reward=lambda completions, **k: [0.1] * len(completions),
        per_device_train_batch_size=8,
        num_generations=8,
    )
    seen = []
    score = built._score_with_teacher
    built._score_with_teacher = lambda batch, *rest: seen.append(batch["advantages"]) or score(batch, *rest)
    assert forwards(built) == 2
    assert all((advantages != 0).any() for advantages in seen), "the case is gone, and with it the need for this"
    assert built.state.log_history[0]["rlsd/skipped"] == 1


def test_negative_only_scores_the_wrong_completions_alone(tmp_path):
    built = trainer(tmp_path, reward=varied, rlsd_negative_only=True, max_steps=1)
    (batch,) = captured_credit(built)
    assert batch["teacher_scored"].tolist() == (batch["advantages"] < 0).tolist()
    right = batch["advantages"] > 0
    plain = batch["advantages"][right].unsqueeze(1) * batch["completion_mask"][right]
    assert torch.equal(batch["token_advantages"][right], plain)
    assert "rlsd/weight_mean_pos" not in built.state.log_history[0]
    assert "rlsd/weight_mean_neg" in built.state.log_history[0]


def test_a_batch_is_scored_once_for_all_its_iterations(tmp_path):
    options = dict(reward=varied, num_iterations=3, max_steps=3)
    grpo = forwards(trainer(tmp_path, credit="grpo", **options))
    assert forwards(trainer(tmp_path, **options)) - grpo == 1


def test_half_the_groups_informative_cost_half_the_forwards(tmp_path):
    def half(prompts, completions, **kwargs):
        return [float(i % 4) if i < 4 else 1.0 for i in range(len(completions))]

    options = dict(reward=half, gradient_accumulation_steps=2, max_steps=2)
    grpo = forwards(trainer(tmp_path, credit="grpo", **options))
    built = trainer(tmp_path, **options)
    assert forwards(built) - grpo == 2
    assert [log["rlsd/skipped"] for log in built.state.log_history[:-1]] == [0.5, 0.5]


def test_no_logits_of_the_whole_vocabulary_are_made_while_scoring(tmp_path):
    built = trainer(tmp_path, max_steps=1, reward=varied)
    shapes = []
    original = built._get_per_token_logps_and_entropies

    def spy(model, *args, **kwargs):
        head = built.model.lm_head.register_forward_hook(lambda m, i, o: shapes.append(o.shape))
        try:
            return original(model, *args, **kwargs)
        finally:
            head.remove()

    built._get_per_token_logps_and_entropies = spy
    built.train()
    assert shapes == [], "the head module ran, so it made logits"


# ---------------------------------------------------------------- with everything that GRPOTrainer does


@pytest.mark.parametrize("credit", ["rlsd", "opsd", "grpo_opsd"])
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_every_loss_type_trains_with_token_credit(tmp_path, loss_type, credit):
    if loss_type == "vespo" and credit != "rlsd":
        pytest.skip("refused at construction")
    plain = trainer(tmp_path, loss_type=loss_type, credit="grpo", max_steps=1)
    credited = trainer(tmp_path, loss_type=loss_type, credit=credit, max_steps=1)
    for built in (plain, credited):
        built.train()
    assert differs(weights(plain.model), weights(credited.model))


@pytest.mark.parametrize("credit", ["rlrt", "antisd", "sdar"])
@pytest.mark.parametrize("liger", [False, True], ids=["default", "liger"])
def test_every_credit_trains_as_something_else_than_grpo(tmp_path, credit, liger):
    """Those that the tests of losses, contrasts and teachers do not train."""
    options = dict(use_liger_loss=liger, max_steps=1, rlsd_lambda_decay_steps=0)
    plain, credited = trainer(tmp_path, credit="grpo", **options), trainer(tmp_path, credit=credit, **options)
    for built in (plain, credited):
        built.train()
    assert differs(weights(plain.model), weights(credited.model))
    assert all(weight.isfinite().all() for weight in weights(credited.model).values())


def gradient(built, batch, token_advantages):
    built.model.zero_grad()
    built.current_gradient_accumulation_steps = 1
    built._compute_loss(built.model, {**batch, "advantages": token_advantages}).backward()
    return torch.cat([p.grad.flatten() for p in built.model.parameters()])


def fixed_batch():
    ids = torch.arange(20, 28).repeat(4, 1)
    return {
        "prompt_ids": torch.full((4, 3), 5), "prompt_mask": torch.ones(4, 3, dtype=torch.long),
        "completion_ids": ids, "completion_mask": torch.ones_like(ids), "num_items_in_batch": torch.tensor(32.0),
    }  # fmt: skip


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_on_policy_every_loss_type_follows_the_token_credit(tmp_path, loss_type):
    """Where the importance ratio is 1, the gradient of every loss type is that of -sum_t A_t log p_t, up to a factor
    (all rows have the same length, so that their normalisations agree)."""
    built = trainer(tmp_path, credit="grpo", loss_type=loss_type)
    batch = fixed_batch()
    credit = torch.tensor([[1.0], [-1.0], [1.0], [-1.0]]) * torch.linspace(0.5, 1.5, 8)
    logits = built.model(torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)).logits[:, 2:-1]
    logps = logits.log_softmax(-1).gather(2, batch["completion_ids"].unsqueeze(2)).squeeze(2)
    row = torch.tensor([1.0, 0.5, 0.25, 2.0]).unsqueeze(1)  # or the rows, which are alike, would cancel
    of_loss = gradient(built, batch, row * credit)
    built.model.zero_grad()
    (-(row * credit * logps).sum()).backward()
    expected = torch.cat([p.grad.flatten() for p in built.model.parameters()])
    assert expected.norm() > 0.1
    assert torch.nn.functional.cosine_similarity(of_loss, expected, dim=0).item() == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_the_refused_combinations_are_those_that_lose_the_credit(tmp_path, loss_type, level):
    """Token credit and its mean per row give the same gradient exactly where RLSDConfig refuses the combination."""
    built = trainer(tmp_path, credit="grpo", loss_type=loss_type, importance_sampling_level=level)
    batch = fixed_batch()
    credit = torch.rand(4, 8, generator=torch.Generator().manual_seed(0)) + 0.1
    mean = credit.mean(dim=1, keepdim=True).expand_as(credit)
    by_token, by_mean = gradient(built, batch, credit), gradient(built, batch, mean)
    lost = torch.allclose(by_token, by_mean, rtol=1e-4, atol=1e-6)
    try:
        config(tmp_path, loss_type=loss_type, importance_sampling_level=level)
        refused = False
    except ValueError:
        refused = True
    assert lost == refused


@PEFT
@pytest.mark.parametrize(
    "options",
    [
        {"num_iterations": 2},
        {"steps_per_generation": 4, "gradient_accumulation_steps": 2},
        {"gradient_accumulation_steps": 2, "steps_per_generation": 1},
        {"gradient_checkpointing": True},
        {"beta": 0.1},
        {"mask_truncated_completions": True},
        {"top_entropy_quantile": 0.5},
        {"off_policy_mask_threshold": 0.5, "num_iterations": 2},
        {"bf16": True},
        {"scale_rewards": "none"},
        {"per_device_train_batch_size": 8},
        {"teacher_model_kind": "ema", "teacher_offload": True},
        {"disable_dropout": True},
        {"cast_lm_head_to_fp32": True},
    ],
    ids=lambda options: "-".join(options),
)
def test_grpos_options_keep_working(tmp_path, options, peft):
    folder = tmp_path / "model"  # beta > 0 loads the reference from the model's path
    tiny_llama().save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    results = []
    for credit in ("rlsd", "grpo"):
        built = trainer(
            tmp_path, model=str(folder), peft_config=lora() if peft else None, credit=credit, max_steps=4, **options
        )
        built.train()
        assert built.state.global_step == 4
        results.append(weights(built.model))
    if "mask_truncated_completions" not in options:  # there every row is truncated, and nothing may be learned
        assert differs(*results)


def test_truncated_completions_are_not_scored(tmp_path):
    built = trainer(tmp_path, mask_truncated_completions=True, reward=varied, max_steps=1, max_completion_length=2)
    built.train()
    log = built.state.log_history[0]
    assert log["rlsd/skipped"] == log["completions/clipped_ratio"] > 0


def test_several_and_async_rewards_evaluation_and_streams(tmp_path):
    async def later(completions, **kwargs):
        return [0.5 * value for value in byte_reward(completions)]

    def columns_reach_rewards(completions, privileged_context, **kwargs):
        return [float(len(context)) for context in privileged_context]

    data = dataset()
    stream = IterableDataset.from_generator(lambda: iter(data))
    built = trainer(
        tmp_path,
        data=stream,
        eval_dataset=data.select(range(4)),
        reward=[byte_reward, later, columns_reach_rewards],
        eval_strategy="steps",
        eval_steps=1,
        eval_on_start=True,
        per_device_eval_batch_size=4,
        max_steps=2,
    )
    built.train()
    logs = built.state.log_history
    assert sum("eval_reward" in log for log in logs) == 3
    # what the verifier and the texts say; no teacher runs in evaluation
    expected = {"eval_rlsd/right", "eval_rlsd/leak_cites", "eval_rlsd/length_trend"}
    assert all({key for key in log if key.startswith("eval_rlsd")} == expected for log in logs if "eval_reward" in log)
    assert all(log["rlsd/skipped"] < 1 for log in logs if "rlsd/skipped" in log)


def test_evaluation_needs_no_privileged_column_and_no_teacher(tmp_path):
    built = trainer(
        tmp_path, eval_dataset=dataset(4).remove_columns("privileged_context"), per_device_eval_batch_size=4
    )
    built._score_with_teacher = None  # would raise if it were called
    assert "eval_reward" in built.evaluate()


def test_a_users_credit_function_trains(tmp_path):
    @register_credit("signed_gain", teacher_rows="all")
    def signed_gain(advantages, student_logps, teacher_logps, mask, **knobs):
        assert set(knobs) == {"lam", "clip_range", "negative_only"}
        return advantages.unsqueeze(1) * (teacher_logps - student_logps).tanh()

    start = run(GRPOTrainer, GRPOConfig, tmp_path)
    mine = run(RLSDTrainer, RLSDConfig, tmp_path, credit="signed_gain")
    assert differs(weights(mine.model), weights(start.model))


def test_a_users_credit_function_that_needs_no_teacher_is_run_all_the_same(tmp_path):
    @register_credit("nothing", teacher_rows="none")
    def nothing(advantages, student_logps, teacher_logps, mask, **knobs):
        assert torch.equal(student_logps, teacher_logps)
        return torch.zeros_like(student_logps)

    built = trainer(tmp_path, credit="nothing", data=dataset().remove_columns("privileged_context"), reward=varied)
    start = weights(built.model)
    built.train()
    assert_same(weights(built.model), start)


def test_a_rollout_from_another_prompt_is_warned_of(tmp_path, caplog):
    def rollout(prefix):
        def generate(prompts, trainer):
            return {
                "prompt_ids": [trainer.processing_class.encode(prefix + p) for p in prompts],
                "completion_ids": [[20 + i, 21] for i in range(len(prompts))],
                "logprobs": [[0.0] * 2] * len(prompts),
            }

        return generate

    trainer(tmp_path, rollout_func=rollout(""), max_steps=1).train()
    assert "samples from another prompt" not in caplog.text
    trainer(tmp_path, rollout_func=rollout("SYSTEM "), max_steps=2).train()
    assert caplog.text.count("samples from another prompt") == 1


def test_a_reward_that_raises_loses_no_checkpoint(tmp_path):
    calls = []

    def brittle(completions, **kwargs):
        calls.append(1)
        if len(calls) == 3:
            raise RuntimeError("the grader died")
        return byte_reward(completions)

    options = dict(save_strategy="steps", save_steps=1, max_steps=4)
    with pytest.raises(RuntimeError, match="the grader died"):
        trainer(tmp_path, reward=brittle, **options).train()
    assert (tmp_path / "checkpoint-2" / "rlsd_teacher.safetensors").is_file()
    straight = trainer(tmp_path / "straight", **options)
    straight.train()
    resumed = trainer(tmp_path, **options)
    resumed.train(resume_from_checkpoint=True)
    assert_same(weights(resumed.model), weights(straight.model))


# ---------------------------------------------------------------- metrics


def test_metrics_are_logged_with_the_values_of_their_definition(tmp_path):
    built = trainer(tmp_path, gradient_accumulation_steps=2, max_steps=3, rlsd_lambda_decay_steps=2, reward=varied)
    batches_of = captured_credit(built)
    logs = built.state.log_history[:-1]
    assert [log["rlsd/lambda"] for log in logs] == [0.5, 0.25, 0.0]
    assert [log["rlsd/skipped"] for log in logs] == [0.0, 0.0, 1.0]
    assert all(log["rlsd/teacher_seconds"] > 0 for log in logs[:2])
    for step in (0, 1):
        # tokens of both micro-batches in one mean, not the mean of two means
        batches = batches_of[2 * step : 2 * step + 2]
        counted = [b["completion_mask"].bool() for b in batches]
        gains = torch.cat(
            [(b["teacher_logps"] - b["student_logps"])[c] for b, c in zip(batches, counted, strict=True)]
        )
        signs = torch.cat(
            [b["advantages"].sign().unsqueeze(1).expand_as(c)[c] for b, c in zip(batches, counted, strict=True)]
        )
        weight = (signs * gains).exp()
        log = logs[step]
        close = lambda value: pytest.approx(value.double().mean().item(), abs=1e-5)  # noqa: E731
        assert log["rlsd/gain_mean"] == close(gains)
        assert log["rlsd/kl"] == close(gains.exp() - 1 - gains)
        assert log["rlsd/weight_mean_pos"] == close(weight[signs > 0].clamp(0.8, 1.2))
        assert log["rlsd/weight_mean_neg"] == close(weight[signs < 0].clamp(0.8, 1.2))
        assert log["rlsd/clip_low"] == close((weight < 0.8)[signs != 0])
        assert log["rlsd/clip_high"] == close((weight > 1.2)[signs != 0])


def test_lambda_follows_the_schedule_of_the_steps(tmp_path):
    schedule = dict(rlsd_lambda=0.4, rlsd_lambda_warmup_steps=2, rlsd_lambda_decay_steps=3)
    built = trainer(tmp_path, max_steps=6, **schedule)
    built.train()
    expected = [lambda_at(s, peak=0.4, warmup_steps=2, decay_steps=3) for s in range(6)]
    assert [log["rlsd/lambda"] for log in built.state.log_history[:-1]] == pytest.approx(expected)


def test_the_model_card_names_the_method_and_its_paper(tmp_path):
    built = trainer(tmp_path)
    built.create_model_card("m")
    card = (tmp_path / "README.md").read_text()
    assert "2604.03128" in card
    assert "rlsd" in card


@pytest.mark.parametrize("liger", [False, True], ids=["default", "liger"])
@pytest.mark.parametrize(("name", "message"), [("gives_nan", "gave nan at row"), ("turns_over", "keeps_sign=True")])
def test_a_users_broken_credit_is_stopped_with_function_step_and_row(tmp_path, name, message, liger):
    broken = {
        "gives_nan": lambda advantages, student, teacher, mask, **knobs: teacher * math.nan,
        "turns_over": lambda advantages, student, teacher, mask, **knobs: -advantages.unsqueeze(1) * mask,
    }
    registered = f"{name}_{liger}"
    register_credit(registered, keeps_sign=name == "turns_over")(broken[name])
    built = trainer(tmp_path, credit=registered, use_liger_loss=liger)
    with pytest.raises(ValueError, match=rf"Step 0.*: The credit function '{registered}' .*{message}"):
        built.train()
