"""Teachers of sharded weights: what two processes do with pieces is what one does with the whole.

The functions without `test_` run in both places: here on whole weights, and on two processes over gloo under FSDP2
(torch's `fully_shard`, and Accelerate's preparation of it), or DeepSpeed's ZeRO where it is installed.
"""

import importlib.util
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate import PartialState
from accelerate.utils import DistributedType
from conftest import lora, run_on_two_ranks, tiny_llama, trainer
from peft import get_peft_model
from torch import distributed
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from trl_rlsd import shards
from trl_rlsd.checks import check_copies
from trl_rlsd.teacher import build_teacher, scoring


KINDS = ("synced", "ema", "base", "live")
IDS = torch.arange(2, 26).reshape(2, 12)
LAYOUTS = {
    "resharded": {},
    "kept": {"reshard_after_forward": False},
    "offloaded": {"offload_policy": CPUOffloadPolicy(pin_memory=False)},
    "bfloat16": {"mp_policy": MixedPrecisionPolicy(param_dtype=torch.bfloat16)},
    "assigned": {},  # as Accelerate's cpu_ram_efficient_loading does
}
# teacher, peft, layout, offload
TEACHERS = [(kind, peft, "resharded", False) for kind in KINDS for peft in (False, True)]
TEACHERS += [("synced", False, "kept", False), ("base", True, "kept", False), ("synced", True, "offloaded", False)]
TEACHERS += [
    ("synced", False, "bfloat16", False),
    ("synced", True, "assigned", False),
    ("ema", False, "resharded", True),
]


def name_of(*parts) -> str:
    return "-".join(map(str, parts))


# ---------------------------------------------------------------- a teacher, apart from any trainer


def build(kind, peft, layout=None, offload=False, seed=0):
    """A student, sharded if there is a layout, and its teacher. Three rows of an adapter cannot be halved."""
    student = get_peft_model(tiny_llama(seed=seed), lora(r=3)) if peft else tiny_llama(seed=seed)
    for name, parameter in student.named_parameters():
        if "layers.0.self_attn.q_proj" in name:
            parameter.requires_grad_(False)  # frozen by its owner
    teacher = build_teacher(
        kind, student, is_peft=peft, sync_steps=2, update_rate=0.25, offload=offload, sharded=layout is not None
    )
    if layout is not None:
        backbone = student.get_base_model() if peft else student
        for module in [*backbone.model.layers, student]:
            fully_shard(module, **LAYOUTS[layout])
    if layout == "assigned":
        student.load_state_dict({name: value.clone() for name, value in student.state_dict().items()}, assign=True)
    return student, teacher


@torch.no_grad()
def shift(student, step):
    for parameter in student.parameters():
        if parameter.requires_grad:
            parameter.mul_(1 + 0.1 * step).add_(0.02)


def pieces(student) -> list[torch.Tensor]:
    shards.drop_gathered(student)
    return [shards.piece(parameter).clone() for parameter in student.parameters()]


def whole(values, parameters=None) -> dict[str, torch.Tensor]:
    """Gathered from all processes; `values` may be copies of these parameters."""
    gathered = {}
    for name, value in values.items():
        parameter = (parameters or values)[name]
        if hasattr(parameter, "ds_tensor"):
            parts = [torch.empty_like(parameter.ds_tensor) for _ in range(distributed.get_world_size())]
            distributed.all_gather(parts, shards.held_as(value))
            gathered[name] = torch.cat(parts)[: parameter.ds_numel].view(parameter.ds_shape)
        else:
            gathered[name] = value.detach().full_tensor() if isinstance(value, DTensor) else value.detach().clone()
    return gathered


def follow(student, teacher) -> dict:
    """Two steps of a student; what its teacher says at each, and the student before and after."""
    teacher.start(0)
    said = []
    for step in (1, 2):
        shift(student, step)
        teacher.step_end(step)
        start, flags = pieces(student), [parameter.requires_grad for parameter in student.parameters()]
        with teacher.weights(student) as model, scoring(model):  # at the first step this is the model's first forward
            first = model(IDS).logits
        assert flags == [parameter.requires_grad for parameter in student.parameters()]
        with scoring(student):
            before = student(IDS).logits  # FSDP2's root stays gathered after this
        with pytest.raises(RuntimeError, match="boom"), teacher.weights(student) as model, scoring(model):
            again = model(IDS).logits
            raise RuntimeError("boom")
        with scoring(student):
            after = student(IDS).logits
        assert torch.equal(first, again)
        assert torch.equal(before, after)
        assert all(map(torch.equal, start, pieces(student)))
        assert flags == [parameter.requires_grad for parameter in student.parameters()]
        said.append((first, before))
    return {"said": said, "copy": whole(getattr(teacher, "copy", {}))}


def follow_on_ranks(folder: Path) -> dict:
    results = {}
    for kind, peft, layout, offload in TEACHERS:
        student, teacher = build(kind, peft, layout, offload)
        results[name_of(kind, peft, layout, offload)] = outcome = follow(student, teacher)
        if teacher.copies:
            held = sum(copy.to_local().numel() for copy in teacher.copy.values())
            outcome["share"] = held / sum(copy.numel() for copy in outcome["copy"].values())
            outcome["all"] = sum(parameter.numel() for parameter in student.parameters())
            assert all(copy.to_local().device.type == "cpu" for copy in teacher.copy.values())
        if layout == "resharded" and teacher.copies and not offload:
            outcome["errors"] = save_and_load(folder / name_of(kind, peft), kind, peft, teacher)
    return results


def save_and_load(folder: Path, kind, peft, teacher) -> list[str]:
    """Save, load into another model, then spoil what was saved; the errors."""
    teacher.save(str(folder), write=distributed.get_rank() == 0)
    student, other = build(kind, peft, "resharded", seed=1)
    assert other.load(str(folder))
    other.start(2)
    assert other.copied_at == teacher.copied_at
    assert all(torch.equal(other.copy[name].to_local(), copy.to_local()) for name, copy in teacher.copy.items())
    errors = []

    def expect_error(teacher):
        try:
            teacher.load(str(folder))
        except ValueError as error:
            errors.append(str(error))

    expect_error(build("ema" if kind == "synced" else "synced", peft, "resharded")[1])
    expect_error(build(kind, not peft, "resharded")[1])
    distributed.barrier()
    if distributed.get_rank() == 0:
        shutil.copytree(folder / "rlsd_teacher", folder / "whole" / "rlsd_teacher")
        (folder / "rlsd_teacher" / "__1_0.distcp").unlink()
    distributed.barrier()
    expect_error(other)
    return errors


# ---------------------------------------------------------------- the whole trainer


def rollout(prompts, built):
    """Completions that depend on the prompt alone, so that any number of processes samples the same."""
    if isinstance(built.model, FSDPModule):
        with torch.no_grad():  # as generation does, this leaves the model's root gathered
            built.model(IDS)
    drawn = [random.Random(f"{prompt} {i % 4}") for i, prompt in enumerate(prompts)]
    return {
        "prompt_ids": [built.processing_class.encode(prompt) for prompt in prompts],
        "completion_ids": [[draw.randrange(40, 200) for _ in range(draw.randrange(3, 9))] for draw in drawn],
        "logprobs": None,
    }


def half_of_the_prompts_teach(prompts, completion_ids, **columns):
    return [
        float(sum(ids) % 7) if int(p.split()[0]) % 2 else 1.0 for p, ids in zip(prompts, completion_ids, strict=True)
    ]


def train(folder, kind, peft, *, processes, resume=None, **options) -> dict:
    """The weights after three steps of eight rows each, the teacher's copy, and the rows scored in each step."""
    external = {"teacher_model": tiny_llama(seed=5)} if kind == "external" else {}
    built = trainer(
        folder,
        peft_config=lora(r=3) if peft else None,
        reward=half_of_the_prompts_teach,
        rollout_func=rollout,
        teacher_model_kind=kind,
        teacher_sync_steps=2,
        teacher_update_rate=0.5,
        teacher_token_budget=64,  # a row or two at a time: the processes have different numbers of forwards
        per_device_train_batch_size=8 // processes,
        max_steps=3,
        **external,
        **{"optim": "sgd", "learning_rate": 0.3, **options},
    )
    scored, score = [], built._teacher_pass.__call__
    built._teacher_pass = lambda *args: scored.append(len(args[4])) or score(*args)
    start = whole(trainable(built.model))
    built.train(resume_from_checkpoint=resume)
    shards.drop_gathered(built.model)
    copy = whole(built.teacher.copy, built.teacher.trainable) if built.teacher.copies else {}
    return {"start": start, "end": whole(trainable(built.model)), "copy": copy, "scored": scored}


def trainable(model) -> dict[str, torch.nn.Parameter]:
    return {shards.plain_name(name): p for name, p in model.named_parameters() if p.requires_grad}


FSDP = {
    "fsdp": True,
    "fsdp_config": {"transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"], "state_dict_type": "SHARDED_STATE_DICT"},
}
RUNS = [("synced", True), ("ema", False), ("base", False), ("live", True)]
MORE_RUNS = [
    ("synced", False),
    ("ema", True),
    ("base", True),
    ("live", False),
    ("external", True),
    ("external", False),
]
RESUMED = [("synced", True), ("base", False)]
PRELUDE = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from test_sharded import *
"""


def zero(stage: int, **options) -> dict:
    automatic = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
    config = {"zero_optimization": {"stage": stage, **options}, "zero_allow_untested_optimizer": True}
    return {"use_cpu": False, "deepspeed": config | dict.fromkeys((*automatic, "gradient_clipping"), "auto")}


ENGINES = {
    "fsdp2": FSDP,
    "zero-2": zero(2),
    "zero-3": zero(3, stage3_param_persistence_threshold=0),
    "zero-3 persistent": zero(3),  # all of the tiny model stays gathered
}


def use_zero_on_cpu():
    """As `fsdp_cpu`: Accelerate takes DeepSpeed on any device, but asks for a backend of accelerators alone."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    PartialState._prepare_backend = lambda self, *args, **kwargs: ("gloo", DistributedType.NO)


def run_all(runs, resumed, engine, *, processes=2) -> dict:
    results = {"straight": {}, "resumed": {}}
    for kind, peft in runs:
        folder, options = name_of(kind, peft), engine
        if (kind, peft) in resumed:
            options = engine | {"save_strategy": "steps", "save_steps": 1}
        results["straight"][kind, peft] = train(folder, kind, peft, processes=processes, **options)
    for kind, peft in resumed:
        checkpoint = f"{name_of(kind, peft)}/checkpoint-1"
        run = train("resumed", kind, peft, processes=processes, resume=checkpoint, **engine)
        results["resumed"][kind, peft] = run
    return results


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("sharded")


@pytest.fixture(scope="module")
def ranks(folder):
    script = f"""{PRELUDE}
import fsdp_cpu
distributed.init_process_group("gloo")
results = run_all(RUNS, RESUMED, FSDP) | {{"teachers": follow_on_ranks(Path("teachers"))}}
torch.save(results, f"rank{{distributed.get_rank()}}.pt")
"""
    return run_on_two_ranks(folder, script)


@pytest.mark.parametrize("kind, peft, layout, offload", TEACHERS)
def test_a_sharded_teacher_says_what_the_whole_one_says(ranks, kind, peft, layout, offload):
    expected = follow(*build(kind, peft, offload=offload))
    for rank in ranks:
        outcome = rank["teachers"][name_of(kind, peft, layout, offload)]
        if layout != "bfloat16":
            torch.testing.assert_close(outcome["said"], expected["said"], rtol=0, atol=1e-5)
        torch.testing.assert_close(outcome["copy"], expected["copy"], rtol=0, atol=1e-6)
        if kind == "synced":  # renewed at the second step
            same = [torch.equal(teacher, student) for teacher, student in outcome["said"]]
            assert same == [False, True]


@pytest.mark.parametrize("peft", [False, True], ids=["full", "lora"])
def test_a_process_copies_its_pieces_of_the_trainable_weights_alone(ranks, peft):
    outcomes = [rank["teachers"][name_of("synced", peft, "resharded", False)] for rank in ranks]
    assert sum(outcome["share"] for outcome in outcomes) == pytest.approx(1, abs=1e-9)
    assert all(0.3 < outcome["share"] < 0.7 for outcome in outcomes)
    assert all(("lora_" in name) == peft for name in outcomes[0]["copy"])
    if peft:
        assert sum(copy.numel() for copy in outcomes[0]["copy"].values()) < 0.3 * outcomes[0]["all"]


@pytest.mark.parametrize("kind, peft", [("synced", False), ("synced", True), ("ema", True), ("base", False)])
def test_a_saved_sharded_teacher_can_be_read_by_one_process(ranks, folder, kind, peft):
    _, teacher = build(kind, peft, seed=1)
    assert teacher.load(str(folder / "teachers" / name_of(kind, peft) / "whole"))
    expected = ranks[0]["teachers"][name_of(kind, peft, "resharded", False)]["copy"]
    assert teacher.copy.keys() == expected.keys()
    assert all(torch.equal(teacher.copy[name], value) for name, value in expected.items())


def test_a_torn_or_foreign_sharded_teacher_is_named_on_every_process(ranks):
    for rank in ranks:
        kind, shapes, torn = rank["teachers"][name_of("synced", True, "resharded", False)]["errors"]
        assert "holds a teacher of kind 'synced', but teacher_model_kind='ema'" in kind
        assert "holds other weights than the model trains" in shapes
        assert "cannot be read" in torn
        assert "__1_0.distcp" in torn


def test_an_unsharded_teacher_is_not_taken_for_a_sharded_one(tmp_path, monkeypatch):
    student, teacher = build("synced", True)
    teacher.start(0)
    teacher.save(str(tmp_path))
    monkeypatch.setattr(shards, "is_sharded", lambda parameter: True)
    with pytest.raises(ValueError, match="was saved by a run whose weights were not sharded"):
        teacher.load(str(tmp_path))


def test_a_sharded_base_teacher_cannot_begin_at_a_checkpoint(tmp_path):
    student = tiny_llama()
    options = {"sync_steps": 1, "update_rate": 0.1, "offload": False, "sharded": True}
    teacher = build_teacher("base", student, is_peft=False, **options)
    with pytest.raises(ValueError, match=r"holds no teacher.*pass the folder as `model`"):
        teacher.load(str(tmp_path))


def test_copies_of_flat_parameters_are_refused():
    class Plugin:
        fsdp_version = 1

    for kind in ("synced", "ema", "base"):
        with pytest.raises(ValueError, match=f"teacher_model_kind='{kind}' copies weights.*FSDP1.*`fsdp_config`"):
            check_copies(kind, True, Plugin, False)
    check_copies("live", False, Plugin, False)
    Plugin.fsdp_version = 2
    check_copies("synced", True, Plugin, False)


def assert_same_update(runs, expected):
    """To 1e-5 of the update, over all parameters."""
    assert all(run[part].keys() == expected[part].keys() for run in runs for part in ("end", "copy"))
    start, end = (torch.cat([t.flatten() for t in expected[part].values()]) for part in ("start", "end"))
    for run in runs:
        own = torch.cat([run["end"][name].flatten() for name in expected["end"]])
        assert (own - end).norm() <= 1e-5 * (end - start).norm()
        torch.testing.assert_close(run["copy"], expected["copy"], rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind, peft", RUNS)
def test_two_processes_of_fsdp2_make_the_update_of_one(ranks, tmp_path, kind, peft):
    expected = train(tmp_path, kind, peft, processes=1)
    runs = [rank["straight"][kind, peft] for rank in ranks]
    assert_same_update(runs, expected)
    scored = [run["scored"] for run in runs]
    assert [sum(rows) for rows in zip(*scored, strict=True)] == expected["scored"]
    assert any(0 in rows and any(rows) for rows in zip(*scored, strict=True)), "no process had nothing to score"


def assert_resumed(ranks):
    for rank in ranks:
        for run, resumed in rank["resumed"].items():
            straight = rank["straight"][run]
            for part in ("end", "copy"):
                assert all(torch.equal(straight[part][name], value) for name, value in resumed[part].items())


def test_a_sharded_run_that_is_resumed_ends_as_the_straight_one(ranks):
    assert_resumed(ranks)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
def test_every_teacher_makes_the_same_update_under_every_engine(tmp_path, engine):
    if engine != "fsdp2" and importlib.util.find_spec("deepspeed") is None:
        pytest.skip("deepspeed is not installed")
    runs, resumed = (MORE_RUNS, []) if engine == "fsdp2" else (RUNS + MORE_RUNS, RESUMED)
    script = f"""{PRELUDE}
{"import fsdp_cpu" if engine == "fsdp2" else "use_zero_on_cpu()"}
results = run_all({runs}, {resumed}, ENGINES[{engine!r}])
torch.save(results, f"rank{{distributed.get_rank()}}.pt")
"""
    ranks = run_on_two_ranks(tmp_path, script)
    for kind, peft in runs:
        expected = train(tmp_path / "one", kind, peft, processes=1)
        assert_same_update([rank["straight"][kind, peft] for rank in ranks], expected)
    assert_resumed(ranks)


@pytest.mark.slow
def test_a_checkpoint_with_whole_weights_is_resumed_too(tmp_path):
    """TRL's fsdp2 config asks for it. Not with plain SGD: its state is empty, and torch cannot load that."""
    runs = [("synced", False), ("synced", True)]
    whole_weights = {**FSDP["fsdp_config"], "state_dict_type": "FULL_STATE_DICT"}
    options = FSDP | {"fsdp_config": whole_weights, "optim": "adamw_torch", "learning_rate": 1e-2}
    script = f"""{PRELUDE}
import fsdp_cpu
torch.save(run_all({runs}, {runs}, {options}), f"rank{{distributed.get_rank()}}.pt")
"""
    assert_resumed(run_on_two_ranks(tmp_path, script))


@pytest.mark.slow
@pytest.mark.parametrize("kind, peft", RESUMED)
def test_a_sharded_run_can_be_resumed_by_one_process(ranks, folder, kind, peft):
    script = f"""{PRELUDE}
import fsdp_cpu
run = train("alone", {kind!r}, {peft}, processes=1, resume="{name_of(kind, peft)}/checkpoint-1", **FSDP)
torch.save(run, "alone.pt")
"""
    (folder / "alone.py").write_text(script)
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parent.parent)}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "1", "alone.py"]
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    alone, straight = torch.load(folder / "alone.pt"), [rank["straight"][kind, peft] for rank in ranks]
    for part in ("end", "copy"):
        torch.testing.assert_close(alone[part], straight[0][part], rtol=0, atol=1e-6)
    assert alone["scored"] == [sum(rows) for rows in zip(*(run["scored"][1:] for run in straight), strict=True)]
