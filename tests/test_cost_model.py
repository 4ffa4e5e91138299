"""Laws of tests/benchmarks/cost_model.py, the model behind the README's "Scaling"."""

import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest


sys.path.insert(0, str(Path(__file__).parent / "benchmarks"))

import cost_model as cm

from trl_rlsd import teacher_pass


ARCH = cm.Architecture(4, 256, 768, 4, 2, 64, 8192)
LOAD = cm.Load(16, 48, 32, 32, 8, 1, scores_prompts=True)
RATES = {
    "forward_flops": 1e-11,
    "backward_flops": 2e-11,
    "attention_flops": 5e-11,
    "logits": 1e-8,
    "elements": 1e-9,
    "operators": 2e-5,
    "decode_flops": 3e-11,
    "weight_bytes": 1e-10,
    "cache_bytes": 4e-10,
    "state_bytes": 2e-10,
}


def step(arch=ARCH, load=LOAD):
    return {phase: cm.price(counts, RATES) for phase, counts in cm.work(arch, load).items()}


def test_the_parameters_are_those_of_the_models_that_are_named():
    published = {"1B": 1.24e9, "8B": 8.03e9, "32B": 32.8e9, "70B": 70.6e9}
    for name, parameters in published.items():
        assert cm.MODELS[name].parameters == pytest.approx(parameters, rel=5e-3)


def test_a_step_of_no_completions_costs_nothing():
    assert set(step(load=replace(LOAD, completions=0, informative=0)).values()) == {0}


def test_no_informative_group_leaves_the_teacher_without_work():
    without = step(load=replace(LOAD, informative=0))
    assert without["teacher"] == 0
    assert {name: without[name] for name in ("generation", "update")} == {
        name: step()[name] for name in ("generation", "update")
    }


@pytest.mark.parametrize("size", ["layers", "hidden", "intermediate", "heads", "kv_heads", "vocabulary"])
def test_every_phase_takes_longer_with_a_larger_model(size):
    larger, base = step(arch=replace(ARCH, **{size: 2 * getattr(ARCH, size)})), step()
    assert all(larger[phase] > base[phase] for phase in cm.PHASES)


@pytest.mark.parametrize(
    ("size", "phases"),
    [
        ("completions", ("generation", "update")),
        ("tokens", cm.PHASES),
        ("prompt", cm.PHASES),
        ("context", ("teacher",)),
        ("informative", ("teacher",)),
        ("rank", cm.PHASES),
    ],
)
def test_a_larger_load_makes_its_phases_longer_and_no_other(size, phases):
    larger, base = step(load=replace(LOAD, **{size: 2 * getattr(LOAD, size)})), step()
    assert {phase for phase in cm.PHASES if larger[phase] != base[phase]} == set(phases)
    assert all(larger[phase] > base[phase] for phase in phases)


def test_a_group_with_a_shared_prompt_costs_the_prompt_once():
    shared = cm.teacher_forwards(replace(LOAD, shared=True))
    whole = cm.teacher_forwards(replace(LOAD, shared=False))
    prompt, tokens, group = LOAD.prompt + LOAD.context, LOAD.tokens, LOAD.group
    # the prompt's last token goes with every completion, whose first it predicts
    assert sum(rows * new for rows, new, _ in shared) == (prompt - 1) + group * (tokens + 1)
    assert sum(rows * new for rows, new, _ in whole) == group * (prompt + tokens)


@pytest.mark.parametrize("budget", [1, 300, 1000, 16_384])
@pytest.mark.parametrize(
    ("context", "tokens", "group", "informative"), [(32, 48, 8, 3), (2, 90, 2, 5), (700, 20, 4, 2)]
)
@pytest.mark.parametrize("share", [None, False, True])
def test_the_forwards_are_those_that_the_teacher_pass_plans(context, tokens, group, informative, budget, share):
    load = replace(LOAD, context=context, tokens=tokens, group=group, informative=informative, budget=budget)
    rows, prompt = informative * group, load.prompt + context
    planned = teacher_pass.plan(
        [[row // group] * prompt for row in range(rows)],
        [tokens] * rows,
        range(rows),
        budget=budget,
        share=share,
        overhead=load.overhead,
    )
    counted = cm.teacher_forwards(replace(load, shared=share))
    assert any(past for _, _, past in counted) == planned[0].shared
    firsts = [count for count, _, past in counted if not past]  # of rows, or of prompts that rows go on from
    assert firsts == [len(batch.groups) for batch in planned]
    if planned[0].shared:
        assert sum(count for count, _, past in counted if past) == rows


def test_shares_of_the_phases_add_to_one():
    taken = step()
    shares = [cm.share({**taken, "teacher": taken[phase], phase: taken["teacher"]}) for phase in cm.PHASES]
    assert sum(shares) == pytest.approx(1, abs=1e-12)


def test_lora_has_no_gradients_of_the_base_weights():
    lora, full = (cm.update(ARCH, replace(LOAD, rank=rank, informative=0)) for rank in (1, None))
    tokens = LOAD.completions * (LOAD.prompt + LOAD.tokens)
    scored = LOAD.completions * (LOAD.prompt + LOAD.tokens - 1)
    saved = 2 * ARCH.blocks * tokens + 2 * ARCH.head * scored - 4 * ARCH.adapter(1) * tokens
    assert full["backward_flops"] - lora["backward_flops"] == pytest.approx(saved, rel=1e-12)
    assert lora["state_bytes"] / full["state_bytes"] == pytest.approx(ARCH.adapter(1) / ARCH.parameters, rel=1e-12)


def test_checkpointing_adds_one_forward_of_the_blocks_and_takes_memory_away():
    load = replace(LOAD, checkpointing=False)
    again = (
        cm.update(ARCH, replace(LOAD, checkpointing=True))["forward_flops"] - cm.update(ARCH, load)["forward_flops"]
    )
    tokens = LOAD.completions * (LOAD.prompt + LOAD.tokens)
    assert again == pytest.approx(2 * (ARCH.blocks + ARCH.adapter(LOAD.rank)) * tokens, rel=1e-12)
    deep = replace(ARCH, layers=16)
    assert cm.memory(deep, LOAD)["activations"] < cm.memory(deep, load)["activations"] / 4


def test_the_fit_finds_the_rates_that_made_the_times():
    loads = [
        replace(LOAD, **{name: factor * getattr(LOAD, name)}, rank=rank)
        for name in ("completions", "tokens", "prompt", "context")
        for factor in (1, 2, 5)
        for rank in (16, None)
    ]
    archs = [
        replace(ARCH, **{name: 2 * getattr(ARCH, name)}) for name in ("layers", "hidden", "vocabulary", "kv_heads")
    ]
    counted = [counts for arch in archs for load in loads for counts in cm.work(arch, load).values()]
    found = cm.fit([(counts, cm.price(counts, RATES)) for counts in counted], cm.KINDS)
    assert found == pytest.approx(RATES, rel=1e-4)


def test_a_fitted_rate_is_never_negative():
    rates = cm.fit([({"a": 1, "b": 1}, 1.0), ({"a": 2, "b": 1}, 1.0), ({"a": 4, "b": 1}, 0.5)], ("a", "b"))
    assert min(rates.values()) == 0


CLUSTER = cm.Cluster()


def predicted(model, ranks, cluster=CLUSTER, **job):
    return cm.predict(cm.MODELS[model], cm.Job(**job), cluster, ranks)


@pytest.mark.parametrize("setup", [{"rank": 16, "sharded": False}, {"rank": None, "sharded": True}])
@pytest.mark.parametrize("model", cm.MODELS)
def test_more_ranks_make_no_phase_of_the_same_step_slower(model, setup):
    times = [predicted(model, 2**n, **setup) for n in range(9)]
    fitting = [taken for taken in times if taken is not None]
    assert times[len(times) - len(fitting) :] == fitting  # what fits on some ranks fits on more
    for fewer, more in pairwise(fitting):
        assert all(more[phase] <= fewer[phase] for phase in cm.PHASES)


def test_sharding_divides_what_is_resident_and_ddp_nothing():
    arch = cm.MODELS["8B"]
    sharded, copied = cm.Job(rank=None, sharded=True), cm.Job(rank=16, sharded=False)
    for name, size in cm.resident(arch, sharded, 1).items():
        assert cm.resident(arch, sharded, 64)[name] == pytest.approx(size / 64, rel=1e-12)
    assert cm.resident(arch, copied, 64) == cm.resident(arch, copied, 1)


def test_the_teacher_holds_one_copy_of_what_is_trained():
    arch = cm.MODELS["8B"]
    job = cm.Job(rank=16, sharded=False)
    assert cm.resident(arch, job, 1)["teacher"] == 4 * arch.adapter(16)
    assert cm.resident(arch, replace(job, rank=None), 1)["teacher"] == 4 * arch.parameters
    assert cm.resident(arch, replace(job, rank=None, copy="cpu"), 1)["teacher"] == 0


def test_what_does_not_fit_has_no_time():
    assert predicted("70B", 8, rank=None) is None
    assert predicted("70B", 8, cm.Cluster(memory=1e12), rank=None) is not None
    # weights, optimizer and an engine with a completion fit, gathered weights and gradients do not
    assert predicted("8B", 8, cm.Cluster(memory=26e9), rank=None) is None
    assert predicted("8B", 8, cm.Cluster(memory=36e9), rank=None) is not None


def test_the_slowest_rank_scores_the_mean_alone_and_all_it_has_among_many():
    assert cm.slowest(32, 0.5, 1) == pytest.approx(16, abs=1e-9)
    assert cm.slowest(1, 0.5, 256) == pytest.approx(1, abs=1e-9)
    # two ranks with one group each: neither is informative in a quarter of all steps
    assert cm.slowest(1, 0.5, 2) == pytest.approx(0.75, abs=1e-9)


def test_communication_that_is_not_hidden_adds_its_time():
    alone, hidden = predicted("8B", 64), predicted("8B", 64, cm.Cluster(network=1e8))
    added = predicted("8B", 64, cm.Cluster(network=1e8, overlap=False))
    assert alone["teacher"] < hidden["teacher"] < added["teacher"]


def test_ranks_that_would_split_a_group_are_refused():
    with pytest.raises(ValueError, match="prompts=256 on 3 ranks"):
        predicted("1B", 3)
