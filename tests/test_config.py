"""Bad input is refused at construction, with field, value and fix."""

import pytest
from conftest import byte_tokenizer, config, dataset, lora, tiny_llama, trainer
from datasets import Dataset
from transformers import GPT2Config, GPT2LMHeadModel, LlamaForCausalLM
from trl import GRPOConfig

from trl_rlsd import RLSDConfig, RLSDTrainer


@pytest.mark.parametrize(
    "options, error, said",
    [
        ({"rlsd_lambda": 1.5}, ValueError, r"rlsd_lambda=1.5.*\[0, 1\]"),
        ({"rlsd_lambda": -0.1}, ValueError, r"rlsd_lambda=-0.1.*\[0, 1\]"),
        ({"rlsd_lambda": float("nan")}, ValueError, "rlsd_lambda=nan"),
        ({"rlsd_lambda": "half"}, TypeError, "rlsd_lambda='half'.*number"),
        ({"rlsd_lambda": True}, TypeError, "rlsd_lambda=True"),
        ({"rlsd_reweight_clip_range": -0.2}, ValueError, "rlsd_reweight_clip_range=-0.2.*at least 0"),
        ({"rlsd_reweight_clip_range": float("inf")}, ValueError, "rlsd_reweight_clip_range=inf"),
        ({"rlsd_lambda_warmup_steps": -1}, ValueError, "rlsd_lambda_warmup_steps=-1.*at least 0"),
        ({"rlsd_lambda_decay_steps": 2.5}, TypeError, "rlsd_lambda_decay_steps=2.5.*whole number"),
        ({"teacher_sync_steps": 0}, ValueError, "teacher_sync_steps=0.*at least 1"),
        ({"teacher_update_rate": 1.1}, ValueError, r"teacher_update_rate=1.1.*\[0, 1\]"),
        ({"teacher_update_rate": 0.0}, ValueError, "teacher_update_rate=0 never moves"),
        ({"credit": "nonesuch"}, ValueError, "credit='nonesuch'.*grpo, grpo_opsd"),
        ({"rlsd_negative_only": "False"}, TypeError, "rlsd_negative_only='False' must be True or False"),
        ({"teacher_offload": 1}, TypeError, "teacher_offload=1 must be True or False"),
        ({"credit": None}, TypeError, "credit=None must be a string"),
        ({"teacher_model_kind": "frozen"}, ValueError, "teacher_model_kind='frozen'.*'synced', 'live'"),
        ({"importance_sampling_level": "sequence"}, ValueError, "importance_sampling_level='sequence'.*'cispo'"),
        ({"importance_sampling_level": "sequence", "loss_type": "luspo"}, ValueError, "loss_type='luspo'"),
        ({"loss_type": "vespo", "credit": "opsd"}, ValueError, "loss_type='vespo'.*keeps the sign"),
        (
            {"off_policy_mask_threshold": 0.5, "credit": "grpo_opsd"},
            ValueError,
            "off_policy_mask_threshold=0.5.*keeps the sign",
        ),
    ],
)
def test_a_value_that_means_nothing_is_refused(tmp_path, options, error, said):
    with pytest.raises(error, match=said):
        config(tmp_path, **options)


@pytest.mark.parametrize(
    "options",
    [
        {"importance_sampling_level": "sequence", "credit": "grpo"},
        {"importance_sampling_level": "sequence", "loss_type": "cispo"},
        {"loss_type": "vespo"},
        {"rlsd_lambda": 1, "rlsd_lambda_decay_steps": 0},
    ],
)
def test_what_means_something_is_taken(tmp_path, options):
    config(tmp_path, **options)


@pytest.mark.parametrize(
    "data, error, said",
    [
        (
            dataset(column="answer"),
            ValueError,
            "no column 'privileged_context'.*'prompt', 'answer'.*privileged_column",
        ),
        (Dataset.from_dict({"prompt": ["p"], "privileged_context": [4]}), TypeError, "'privileged_context'.*int64"),
        (None, ValueError, "train_dataset is None"),
    ],
)
def test_a_dataset_that_cannot_teach_is_refused_before_the_model_is_loaded(tmp_path, data, error, said):
    with pytest.raises(error, match=said):
        RLSDTrainer("no/such-model", lambda **k: [], config(tmp_path), data)


def test_the_privileged_column_has_any_name(tmp_path):
    trainer(tmp_path, data=dataset(column="answer"), privileged_column="answer", max_steps=1).train()


def test_plain_grpo_credit_needs_no_privileged_column(tmp_path):
    built = trainer(tmp_path, data=dataset().remove_columns("privileged_context"), credit="grpo", max_steps=1)
    built.train()
    # what the verifier and the lengths say, and nothing of a teacher
    logged = {key for key in built.state.log_history[0] if key.startswith("rlsd/")}
    assert logged == {"rlsd/right", "rlsd/length_trend"}


def test_a_grpo_config_is_refused(tmp_path):
    args = GRPOConfig(str(tmp_path), use_cpu=True, bf16=False, report_to=[])
    with pytest.raises(TypeError, match="args is a GRPOConfig; RLSDTrainer needs an RLSDConfig"):
        RLSDTrainer(tiny_llama(), lambda **k: [], args, dataset())


def test_external_needs_a_model_and_no_other_kind_takes_one(tmp_path):
    with pytest.raises(ValueError, match="teacher_model_kind='external' needs a model"):
        trainer(tmp_path, teacher_model_kind="external")
    with pytest.raises(ValueError, match="teacher_model was given, but teacher_model_kind='synced'"):
        trainer(tmp_path, teacher_model=tiny_llama())
    with pytest.raises(ValueError, match=r"teacher_model was given.*uses no teacher"):
        trainer(tmp_path, teacher_model=tiny_llama(), teacher_model_kind="external", credit="grpo")


def test_teachers_of_another_vocabulary_are_refused(tmp_path):
    with pytest.raises(ValueError, match="vocabulary of 300 tokens, the student one of 258"):
        trainer(tmp_path, teacher_model=tiny_llama(vocab_size=300), teacher_model_kind="external")
    # the same size says nothing: the tokens are compared
    folder = tmp_path / "teacher"
    other = byte_tokenizer(first="<padding>")
    tiny_llama().save_pretrained(folder)
    other.save_pretrained(folder)
    for teacher in (str(folder), LlamaForCausalLM.from_pretrained(folder)):
        with pytest.raises(ValueError, match=r"another vocabulary \(258 tokens\) than the student \(258\).*'<pad>'"):
            trainer(tmp_path, teacher_model=teacher, teacher_model_kind="external")


def test_a_teacher_may_know_more_tokens(tmp_path):
    folder = tmp_path / "teacher"
    tiny_llama(vocab_size=320).save_pretrained(folder)
    byte_tokenizer(extra=("new",)).save_pretrained(folder)
    trainer(tmp_path, teacher_model=str(folder), teacher_model_kind="external", max_steps=1).train()


def test_the_student_is_not_its_own_external_teacher(tmp_path):
    model = tiny_llama()
    with pytest.raises(ValueError, match="teacher_model is the student itself"):
        trainer(tmp_path, model=model, teacher_model=model, teacher_model_kind="external")


@pytest.mark.parametrize(
    "options, said", [({"bias": "all"}, "bias='all'"), ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa'")]
)
def test_base_is_refused_where_disabling_the_adapter_does_not_give_the_base_model(tmp_path, options, said):
    with pytest.raises(ValueError, match=rf"teacher_model_kind=.base..*{said}"):
        trainer(tmp_path, peft_config=lora(**options), teacher_model_kind="base")


@pytest.mark.parametrize("kind", ["synced", "ema"])
def test_nothing_to_copy_is_an_error(tmp_path, kind):
    model = tiny_llama()
    model.requires_grad_(False)
    with pytest.raises(ValueError, match=f"teacher_model_kind='{kind}' copies the trainable weights"):
        trainer(tmp_path, model=model, teacher_model_kind=kind)


def test_every_field_has_help():
    own = set(RLSDConfig.__dataclass_fields__) - set(GRPOConfig.__dataclass_fields__)
    assert own == {
        "credit", "rlsd_lambda", "rlsd_lambda_warmup_steps", "rlsd_lambda_decay_steps", "rlsd_reweight_clip_range",
        "rlsd_negative_only", "teacher_model_kind", "teacher_sync_steps", "teacher_update_rate", "privileged_column",
        "teacher_prompt_template", "teacher_offload", "teacher_token_budget", "teacher_shared_prefix",
        "use_liger_loss", "rlsd_lambda_negative", "rlsd_reweight_clip_range_negative", "credit_span",
        "credit_mean_one", "contrast_column", "contrast_reference", "contrast_reward_below", "contrast_fallback",
        "leak_phrases", "alarm_steps", "alarm_thresholds", "rlsd_log_credit_steps",
    }  # fmt: skip
    assert all(RLSDConfig.__dataclass_fields__[name].metadata["help"] for name in own)


def test_models_that_learn_absolute_positions_are_warned_of(tmp_path, caplog):
    model = GPT2LMHeadModel(
        GPT2Config(vocab_size=258, n_embd=32, n_layer=1, n_head=2, n_positions=512, eos_token_id=1)
    )
    trainer(tmp_path, model=model)
    assert "'gpt2' learn absolute positions" in caplog.text
