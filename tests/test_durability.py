"""Processes that are killed, disks that are full, files that are torn: nothing that a checkpoint holds is lost.

Trainings run in processes that are killed for real. A server imports everything once and forks a process for each
training, which starts within tenths of a second.
"""

import gc
import multiprocessing
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import traceback
from collections import Counter
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Timer
from types import SimpleNamespace

import pytest
import torch
from conftest import assert_same, byte_reward, dataset, lora, tiny_llama, trainer, weights
from safetensors.torch import load_file
from torch.distributed.launcher.api import LaunchConfig, elastic_launch
from transformers import TrainerCallback, TrainerState

from trl_rlsd import checkpoints, rollouts


STEPS = 28
TEACHER, STATE, ROLLOUTS = "rlsd_teacher.safetensors", "trainer_state.json", "rlsd_rollouts_0.pt"
OPTIONS = dict(
    teacher_model_kind="synced",
    teacher_sync_steps=2,
    num_iterations=2,  # every other checkpoint holds completions that are still to be used
    max_steps=STEPS,
    save_strategy="steps",
    save_steps=1,
    save_total_limit=2,
    data=dataset(8),  # 16 steps an epoch
)
PHASES = ("generation", "reward", "scoring", "loss", "step")
FILES = ("model.safetensors", "training_args.bin", "optimizer.pt", "scheduler.pt", TEACHER, ROLLOUTS, "rng_state.pth")
FILES += (checkpoints.MANIFEST, STATE)


# ---------------------------------------------------------------- in the process that trains


class Killer:
    """Writes down what a training is doing, and kills it there.

    Args:
        victim: the phase, or the file that is being written (it stays half-written), in which the process is killed
            the `count`-th time. None: at the `count`-th event of any kind, `delay` seconds later.
    """

    def __init__(self, folder: Path, victim: str | None, count: int, delay: float | None):
        self.file = os.open(folder / "phase", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        self.victim, self.left, self.delay = victim, count, delay

    def enter(self, phase: str) -> None:
        os.pwrite(self.file, phase.encode().ljust(40), 0)
        if self.victim is None and self.delay is not None:
            self.left -= 1
            if self.left == 0:
                Timer(self.delay, kill).start()
        elif phase in PHASES and self.hits(phase):
            kill()

    def hits(self, phase: str) -> bool:
        self.left -= phase == self.victim
        return phase == self.victim and self.left == 0

    def phase(self, name: str, function):
        def wrapped(*args, **kwargs):
            self.enter(name)
            return function(*args, **kwargs)

        return wrapped

    def writes(self, function, path_of):
        """`path_of` says from the arguments which file is written."""

        def wrapped(*args, **kwargs):
            path = Path(path_of(*args))
            self.enter(path.name)
            result = function(*args, **kwargs)
            if self.hits(path.name):
                os.truncate(path, path.stat().st_size // 2)
                kill()
            return result

        return wrapped

    def watch(self, built) -> None:
        built._generate = self.phase("generation", built._generate)
        built._calculate_rewards = self.phase("reward", built._calculate_rewards)
        built._score_with_teacher = self.phase("scoring", built._score_with_teacher)
        built._compute_loss = self.phase("loss", built._compute_loss)
        built.add_callback(OptimizerStep(self))
        model = "adapter_model.safetensors" if hasattr(built.model, "peft_config") else "model.safetensors"
        built.model.save_pretrained = self.writes(built.model.save_pretrained, lambda folder: Path(folder) / model)
        built.teacher.save = self.writes(built.teacher.save, lambda folder, *_: Path(folder) / TEACHER)
        torch.save = self.writes(torch.save, lambda content, path: path)
        TrainerState.save_to_json = self.writes(TrainerState.save_to_json, lambda state, path: path)
        replace, rmtree = Path.replace, shutil.rmtree

        def half_replaced(staged, path):
            self.enter(Path(path).name)
            if self.hits(Path(path).name):
                os.truncate(staged, 10)
                kill()
            return replace(staged, path)

        def half_deleted(folder, *args, **kwargs):
            place = "clearing" if sys._getframe(1).f_code.co_name == "_clear" else "rotation"
            self.enter(place)
            if self.hits(place):
                for path in sorted(path for path in Path(folder).rglob("*") if path.is_file())[::2]:
                    path.unlink()
                kill()
            rmtree(folder, *args, **kwargs)

        Path.replace, shutil.rmtree = half_replaced, half_deleted


class OptimizerStep(TrainerCallback):
    def __init__(self, killer):
        self.killer = killer

    def on_pre_optimizer_step(self, *args, **kwargs):
        self.killer.enter("step")

    def on_step_end(self, *args, **kwargs):
        self.killer.enter("after the step")


def kill():
    os.kill(os.getpid(), signal.SIGKILL)


def train(folder: Path, victim=None, count=1, delay=None, rank=0, resume=None, **options) -> None:
    """One training, which goes on from the newest whole checkpoint where there is any."""
    own = int(os.environ.get("RANK", "0"))
    killer = Killer(folder, victim, count, delay) if own == rank else None
    if resume is None:
        resume = any(checkpoints.fault(path) is None for path in folder.glob("checkpoint-*"))
    built = trainer(folder, **{**OPTIONS, **options})
    if killer is not None:
        killer.watch(built)
    save = torch.save
    built.train(resume_from_checkpoint=resume)
    torch.save = save
    if own == 0:
        torch.save(state_of(built), folder / "result.pt")


def state_of(built) -> dict:
    moments = built.optimizer.state_dict()["state"].items()
    return {
        "step": built.state.global_step,
        "weights": weights(built.model),
        "teacher": built.teacher.copy,
        "optimizer": {f"{i} {name}": value for i, state in moments for name, value in state.items()},
    }


def train_on_two_ranks(folder: Path, **options) -> None:
    """What torchrun does, with workers that are forked."""
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=2,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        start_method="fork",
        monitor_interval=0.1,
        max_restarts=0,
    )
    elastic_launch(config, rank_of_two)(folder, options)


def rank_of_two(folder: Path, options: dict) -> None:
    torch.set_num_threads(1)
    try:
        train(folder, **options)
    except Exception:
        traceback.print_exc()  # as a script does; elastic_launch itself tells of the first failure alone
        raise


# ---------------------------------------------------------------- the server that forks it


def serve(pipe) -> None:
    torch.set_num_threads(1)
    multiprocessing.set_start_method("fork", force=True)  # otherwise killed processes leak tqdm's semaphores
    with TemporaryDirectory() as folder:  # fills a table of transformers that every process would build anew
        tiny_llama().save_pretrained(folder)
    gc.freeze()  # a process that goes through what it shares with the server copies it
    pipe.send("ready")
    for job, folder, options in iter(pipe.recv, None):
        process = os.fork()
        if process == 0:
            output = os.open(log_file(folder), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(output, 1), os.dup2(output, 2)
            try:
                job(folder, **options)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        pipe.send(os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]))


class Server:
    def __init__(self):
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=serve, args=(theirs,))
        self.process.start()
        assert self.pipe.recv() == "ready"

    def run(self, folder: Path, job=train, limit: float = 120, **options) -> int:
        """The exit code: 0 for success, -9 where the process was killed."""
        folder.mkdir(parents=True, exist_ok=True)
        self.pipe.send((job, folder, options))
        assert self.pipe.poll(limit), f"still running after {limit} s: {log(folder)}"
        return self.pipe.recv()

    def finish(self, folder: Path, **options) -> None:
        assert self.run(folder, **options) == 0, log(folder)


def log_file(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.log")  # beside it: its disk may be full


def log(folder: Path) -> str:
    return log_file(folder).read_text()


@pytest.fixture(scope="module")
def server():
    server = Server()
    yield server
    server.pipe.send(None)
    server.process.kill()
    server.process.join()


@pytest.fixture(scope="module")
def straight(server, tmp_path_factory):
    """The folder of the uninterrupted run."""
    folder = tmp_path_factory.mktemp("straight")
    server.finish(folder)
    return folder


def assert_same_end(folder: Path, straight: Path, steps: int = STEPS) -> None:
    end, expected = (torch.load(path / "result.pt") for path in (folder, straight))
    assert end["step"] == expected["step"] == steps
    for part in ("weights", "teacher", "optimizer"):
        assert expected[part], part
        assert_same(end[part], expected[part])


# ---------------------------------------------------------------- killed processes


def kills(seed: int) -> list[dict]:
    """Twenty: in every phase, in the writing of every file, in the deleting of folders, and at four other moments."""
    draw = random.Random(seed)
    each = [{"victim": phase, "count": draw.randint(1, 2)} for phase in PHASES]
    each += [{"victim": file, "count": 1 if file == ROLLOUTS else 2} for file in FILES]
    each += [{"victim": "rotation", "count": 1}]
    each += [{"count": draw.randint(1, 30), "delay": draw.uniform(0, 0.05)} for _ in range(4)]
    draw.shuffle(each)
    torn = next(i for i, one in enumerate(each) if one.get("victim") in FILES)
    each.insert(torn + 1, {"victim": "clearing", "count": 1})  # only a torn checkpoint is cleared away
    return each


def assert_killed(server: Server, folder: Path, one: dict, **options) -> str:
    """Returns what the process was doing."""
    assert server.run(folder, **one, **options) == -signal.SIGKILL, (one, log(folder)[-3000:])
    return (folder / "phase").read_text().strip()


def test_a_killed_run_ends_with_the_same_weights(server, straight, tmp_path):
    hit = Counter(assert_killed(server, tmp_path, one) for one in kills(seed=0))
    print(f"killed during: {dict(hit)}")
    assert hit.total() == 20
    assert hit.keys() >= {*PHASES, *FILES, "rotation", "clearing"}
    server.finish(tmp_path)
    assert_same_end(tmp_path, straight)


def test_a_finished_run_is_not_trained_further(server, straight, tmp_path):
    """It may have been killed after its last step, before its model was saved."""
    shutil.copytree(straight, tmp_path / "run")
    (tmp_path / "run" / "result.pt").unlink()
    server.finish(tmp_path / "run", resume=True)
    assert_same_end(tmp_path / "run", straight)


VARIANTS = {
    "lora, ema": {"peft_config": lora(lora_dropout=0.1), "teacher_model_kind": "ema", "teacher_offload": True},
    "accumulation": {"gradient_accumulation_steps": 2, "steps_per_generation": 4, "num_iterations": 1},
    "best": {"eval_strategy": "steps", "eval_steps": 1, "load_best_model_at_end": True, "eval_dataset": dataset(4)},
}


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_it_ends_with_the_same_weights_after_twenty_random_moments(server, tmp_path, variant):
    options = {"max_steps": 40, **VARIANTS[variant]}
    server.finish(tmp_path / "straight", **options)
    draw = random.Random(variant)
    hit = Counter()
    for _ in range(20):
        one = {"count": draw.randint(1, 30), "delay": draw.uniform(0, 0.1)}
        hit[assert_killed(server, tmp_path / "killed", one, **options)] += 1
    print(f"{variant}: killed during {dict(hit)}")
    server.finish(tmp_path / "killed", **options)
    assert_same_end(tmp_path / "killed", tmp_path / "straight", steps=40)


# ---------------------------------------------------------------- two processes


DDP = {"job": train_on_two_ranks, "max_steps": 8}
LOST = r"Signal 9 \(SIGKILL\)|(closed|reset) by peer|[Bb]roken pipe"


def raises_on_the_second_rank(completions, trainer_state, **columns):
    if os.environ["RANK"] == "1" and trainer_state.global_step >= 4:
        raise ZeroDivisionError("the grader of the second rank is broken")
    return byte_reward(completions)


@pytest.fixture(scope="module")
def straight_on_two(server, tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    server.finish(folder, **DDP)
    return folder


def test_when_one_rank_dies_or_raises_all_end_and_the_run_goes_on(server, straight_on_two, tmp_path):
    """Within a minute, with the reason on stderr."""
    assert server.run(tmp_path, **DDP, limit=60, rank=1, victim="rlsd_rollouts_1.pt", count=2) == 1
    # the launcher names what it has seen first: the rank that is gone, or the other one's lost connection, which
    # gloo words by the system call that has noticed it
    assert re.search(LOST, log(tmp_path))
    assert checkpoints.fault(tmp_path / "checkpoint-3") is not None
    assert server.run(tmp_path, **DDP, limit=60, reward=raises_on_the_second_rank) == 1
    assert "checkpoint-3 (trainer_state.json is missing)" in log(tmp_path), "what is passed over is said"
    assert "ZeroDivisionError: the grader of the second rank is broken" in log(tmp_path)
    assert checkpoints.fault(tmp_path / "checkpoint-4") is None
    assert server.run(tmp_path, **DDP, limit=60, rank=0, victim="step", count=2) == 1
    assert (tmp_path / "checkpoint-5" / ROLLOUTS).exists(), "both ranks go on with completions that are left"
    server.finish(tmp_path, **DDP)
    assert_same_end(tmp_path, straight_on_two, steps=8)


@pytest.mark.parametrize("before, after", [(2, 1), (1, 2)])
def test_a_run_goes_on_with_another_number_of_processes(server, straight, straight_on_two, tmp_path, before, after):
    source, step = (straight_on_two, 7) if before == 2 else (straight, STEPS - 1)
    saved = shutil.copytree(source / f"checkpoint-{step}", tmp_path / f"checkpoint-{step}")
    # as many prompts a step as before; and the teacher stays as it was restored
    options = {"per_device_train_batch_size": 4 * before // after, "teacher_sync_steps": 100}
    job = {**DDP, "job": train if after == 1 else train_on_two_ranks, **options}
    server.finish(tmp_path, **{**job, "max_steps": step})  # nothing is left to do: what is there is what was restored
    restored = torch.load(tmp_path / "result.pt")
    assert_same(restored["weights"], load_file(saved / "model.safetensors"))
    moments = torch.load(saved / "optimizer.pt")["state"].items()
    assert_same(restored["optimizer"], {f"{i} {k}": value for i, state in moments for k, value in state.items()})
    server.finish(tmp_path, **{**job, "max_steps": step + 1})
    end = torch.load(tmp_path / "result.pt")
    assert end["step"] == step + 1
    assert_same(end["teacher"], load_file(saved / TEACHER))
    assert f"written by {before} processes, this run has {after}" in log(tmp_path)
    assert "new ones are generated" in log(tmp_path), "the checkpoint holds completions for the other number"


@pytest.mark.slow
@pytest.mark.parametrize(
    "action, said",
    [("raise ZeroDivisionError('broken')", "ZeroDivisionError: broken"), ("kill()", LOST)],
    ids=["raises", "dies"],
)
def test_torchrun_ends_when_one_rank_raises_or_dies(tmp_path, action, said):
    """As above, with processes that torchrun starts."""
    script = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from test_durability import *

def reward(completions, trainer_state, **columns):
    if os.environ["RANK"] == "1" and trainer_state.global_step >= 2:
        {action}
    return byte_reward(completions)

train(Path("."), reward=reward, max_steps=4)
"""
    (tmp_path / "run.py").write_text(script)
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "run.py"],
        cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 1
    assert re.search(said, done.stderr), done.stderr[-3000:]
    assert checkpoints.fault(tmp_path / "checkpoint-2") is None


# ---------------------------------------------------------------- full disks


@pytest.fixture
def small_disk(tmp_path):
    """A file system of its own, and a function that sets its size."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("a file system cannot be mounted here: this needs root")
    try:
        yield folder, lambda size: subprocess.run(["mount", "-o", f"remount,size={size}", folder], check=True)
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)


def test_a_full_disk_costs_the_checkpoint_that_is_written_and_no_other(server, straight, small_disk):
    folder, resize = small_disk
    files = (straight / f"checkpoint-{STEPS}").iterdir()
    size = sum(path.stat().st_size for path in files)
    # two checkpoints fit, and of the third a part: each time another file is the one that fails
    for part in (0.2, 0.6, 0.9):
        resize(int((2 + part) * size))
        assert server.run(folder) == 1
        said = log(folder)
        assert re.search(r"checkpoint-\d+ is incomplete; [01]\.\d MB are free there", said), said[-600:]
        newest = max(path for path in folder.glob("checkpoint-*") if checkpoints.fault(path) is None)
        assert f"go on from {newest.name} with resume_from_checkpoint=True" in said
    resize("100m")
    server.finish(folder)
    assert_same_end(folder, straight)


# ---------------------------------------------------------------- torn files


ONE_PROCESS = SimpleNamespace(num_processes=1)


@pytest.fixture(scope="module")
def short_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("short")
    trainer(folder, **{**OPTIONS, "max_steps": 4}).train()
    return folder


@pytest.fixture
def two_checkpoints(short_run, tmp_path):
    """The last two; the first of them has completions that are still to be used."""
    return [shutil.copytree(short_run / name, tmp_path / name) for name in ("checkpoint-3", "checkpoint-4")]


# a checkpoint without a manifest is another trainer's
FAULTS = [
    (file, missing) for file in FILES for missing in (False, True) if not (missing and file == checkpoints.MANIFEST)
]


@pytest.mark.parametrize("file, missing", FAULTS)
def test_a_torn_checkpoint_is_refused_by_name_and_otherwise_passed_over(two_checkpoints, caplog, file, missing):
    older, newer = two_checkpoints
    torn, whole = (older, newer) if file == ROLLOUTS else (newer, older)  # the last step leaves no completions
    (torn / file).unlink() if missing else os.truncate(torn / file, (torn / file).stat().st_size // 2)
    why = f"{file} is {'missing' if missing else 'torn'}"
    with pytest.raises(ValueError, match=rf"incomplete: {why}.*Resume from {whole}, the newest complete one"):
        checkpoints.choose(str(torn), "unused", ONE_PROCESS, saves=True)
    assert checkpoints.choose(True, str(torn.parent), ONE_PROCESS, saves=True) == str(whole)
    if torn == newer:
        assert f"Passed over, because they are incomplete: {torn.name} ({why}" in caplog.text
    (whole / STATE).unlink()
    with pytest.raises(ValueError, match=r"no checkpoint in .* is complete: checkpoint-\d+ \(.*\), checkpoint-\d+"):
        checkpoints.choose(True, str(torn.parent), ONE_PROCESS, saves=True)


def test_a_checkpoint_without_a_manifest_is_whole_if_its_state_is(two_checkpoints):
    """Other trainers write none, and `save_only_model` neither."""
    _, folder = two_checkpoints
    (folder / checkpoints.MANIFEST).unlink()
    assert checkpoints.choose(True, str(folder.parent), ONE_PROCESS, saves=True) == str(folder)
    (folder / STATE).write_text("{")
    assert checkpoints.fault(folder) == f"{STATE} is torn"
    (folder / STATE).unlink()
    assert checkpoints.fault(folder) == f"{STATE} is missing"


def test_a_checkpoint_that_transformers_has_marked_as_incomplete_is_one(two_checkpoints):
    older, newer = two_checkpoints
    (newer / "checkpoint-is-incomplete.txt").touch()
    assert checkpoints.choose(True, str(newer.parent), ONE_PROCESS, saves=True) == str(older)


def test_files_that_are_written_after_the_manifest_must_be_there_too(tmp_path):
    accelerator = SimpleNamespace(num_processes=1, wait_for_everyone=lambda: None)
    checkpoints.seal(str(tmp_path), accelerator, saves=True, later=("entropy_ctrl_state.json",))
    (tmp_path / STATE).write_text("{}")
    assert checkpoints.fault(tmp_path) == "entropy_ctrl_state.json is missing"
    (tmp_path / "entropy_ctrl_state.json").write_text("{}")
    assert checkpoints.fault(tmp_path) is None


def test_shards_in_folders_are_files_too(tmp_path):
    """As FSDP writes them."""
    shard = tmp_path / "optimizer_0" / "__1_0.distcp"
    shard.parent.mkdir()
    shard.write_text("shard")
    (tmp_path / STATE).write_text("{}")
    checkpoints.seal(str(tmp_path), SimpleNamespace(num_processes=2, wait_for_everyone=lambda: None), saves=True)
    assert checkpoints.fault(tmp_path) is None
    shard.unlink()
    assert checkpoints.fault(tmp_path) == "optimizer_0/__1_0.distcp is missing"


def test_without_any_checkpoint_transformers_says_so(tmp_path):
    assert checkpoints.choose(True, str(tmp_path), ONE_PROCESS, saves=True) is True
    assert checkpoints.choose(None, str(tmp_path), ONE_PROCESS, saves=True) is None
    missing = str(tmp_path / "checkpoint-1")
    assert checkpoints.choose(missing, str(tmp_path), ONE_PROCESS, saves=True) == missing


def test_on_machines_with_disks_of_their_own_a_checkpoint_is_whole_on_all(two_checkpoints, monkeypatch):
    older, newer = two_checkpoints
    elsewhere = {older: None, newer: f"{TEACHER} is missing"}  # what the first process of another machine sees
    monkeypatch.setattr(checkpoints, "gather_object", lambda own: [*own, None, elsewhere, None])
    assert checkpoints.choose(True, str(newer.parent), ONE_PROCESS, saves=True) == str(older)
    elsewhere.clear()
    with pytest.raises(ValueError, match="missing on another machine"):
        checkpoints.choose(str(newer), "unused", ONE_PROCESS, saves=True)


def test_a_process_that_sees_no_files_takes_what_the_first_one_has_chosen(two_checkpoints, tmp_path, monkeypatch):
    older, newer = two_checkpoints
    seen = [{newer: f"{TEACHER} is missing", older: None}]
    monkeypatch.setattr(checkpoints, "gather_object", lambda own: [*seen, *own])
    assert checkpoints.choose(True, str(newer.parent), ONE_PROCESS, saves=False) == str(older)


def test_a_checkpoint_is_written_into_an_empty_folder(tmp_path):
    """Or completions of another number of processes, and the teacher of another run, would stay."""
    args = {**OPTIONS, "max_steps": 1}
    trainer(tmp_path, **args).train()
    stale = tmp_path / "checkpoint-1" / "rlsd_rollouts_1.pt"
    stale.touch()
    trainer(tmp_path, **args).train()
    assert not stale.exists()
    assert checkpoints.fault(stale.parent) is None


def test_completions_that_cannot_be_read_are_named_on_every_process(two_checkpoints):
    path = two_checkpoints[0] / ROLLOUTS
    os.truncate(path, 100)
    with pytest.raises(ValueError, match=rf"{path} cannot be read .*Resume from another one; or delete"):
        rollouts.load_rollouts(str(path), 1, 1, torch.device("cpu"))


def test_completions_are_used_by_all_processes_or_by_none(two_checkpoints, monkeypatch, caplog):
    """One that generates while another does not would wait for it for ever."""
    load = lambda: rollouts.load_rollouts(str(two_checkpoints[0] / ROLLOUTS), 1, 1, torch.device("cpu"))  # noqa: E731
    assert load() is not None
    monkeypatch.setattr(rollouts, "gather_object", lambda own: [*own, (None, False, False)])
    assert load() is None
    assert "new ones are generated" in caplog.text
