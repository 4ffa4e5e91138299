"""Two 'hosts', network namespaces joined by a cable: a run across them equals the same run on one of them."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest
import yaml
from accelerate.commands.config import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from conftest import assert_same, byte_tokenizer, dataset, tiny_llama
from safetensors.torch import load_file

from trl_rlsd.train import launcher_arguments, make_parser


ROOT = Path(__file__).parent.parent
MULTI_CPU = ROOT / "configs" / "accelerate" / "multi_cpu.yaml"
RUN = {
    "model_name_or_path": "model", "dataset_name": "rows.parquet", "reward_funcs": ["conftest.byte_reward"],
    "use_peft": True, "lora_r": 4, "lora_target_modules": "all-linear", "use_cpu": True, "bf16": False,
    "gradient_checkpointing": False, "per_device_train_batch_size": 4, "num_generations": 4,
    "max_completion_length": 8, "max_steps": 3, "teacher_sync_steps": 2, "learning_rate": 1.0e-2, "logging_steps": 1,
    "report_to": "none", "save_strategy": "no", "save_on_each_node": True, "disable_tqdm": True, "seed": 7,
}  # fmt: skip


def ip(*arguments: str) -> str:
    return subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True).stdout


class Host:
    """A network namespace with one cable and an address."""

    def __init__(self, number: int):
        self.name, self.cable, self.address = f"rlsd{os.getpid()}-{number}", f"veth{number}", f"10.77.0.{number + 1}"
        self.runs: list[subprocess.Popen] = []
        ip("netns", "add", self.name)

    def plug_in(self) -> None:
        ip("-n", self.name, "address", "add", f"{self.address}/24", "dev", self.cable)
        for device in ("lo", self.cable):
            ip("-n", self.name, "link", "set", device, "up")

    def launch(self, folder: Path, log: str, launcher: dict, script: dict) -> None:
        """Start `accelerate launch` with launcher's and script's flags."""
        paths = os.pathsep.join(map(str, (ROOT, ROOT / "tests")))
        # without the name of an interface gloo takes the one that the machine's name resolves to
        env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths, "GLOO_SOCKET_IFNAME": self.cable}
        command = ["ip", "netns", "exec", self.name, sys.executable, "-m", "accelerate.commands.launch"]
        command += [*flags(launcher), "-m", "trl_rlsd.train", *flags(script)]
        with open(folder / log, "w") as file:
            options = dict(cwd=folder, env=env, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT)
            self.runs.append(subprocess.Popen(command, **options))

    def sent(self) -> int:
        """Bytes that have left through the cable."""
        return json.loads(ip("-n", self.name, "-s", "-j", "link", "show", self.cable))[0]["stats64"]["tx"]["bytes"]

    def remove(self) -> None:
        # torchrun's workers have sessions of their own, and outlive a launcher that is killed
        while processes := ip("netns", "pids", self.name).split():
            for process in processes:
                with suppress(ProcessLookupError):
                    os.kill(int(process), signal.SIGKILL)
            for run in self.runs:
                run.wait()
            time.sleep(0.05)
        ip("netns", "delete", self.name)


def flags(values: dict) -> list[str]:
    return [part for name, value in values.items() for part in (f"--{name}", str(value))]


@pytest.fixture
def hosts() -> Iterator[list[Host]]:
    if os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("network namespaces need root and the command `ip`: apt-get install iproute2")
    with ExitStack() as stack:
        made: list[Host] = []
        try:
            for number in range(2):
                made.append(Host(number))
                stack.callback(made[-1].remove)
            first, second = made
            other_end = "peer", "name", second.cable, "netns", second.name
            ip("link", "add", first.cable, "netns", first.name, "type", "veth", *other_end)
        except subprocess.CalledProcessError as error:
            pytest.skip(f"network namespaces are not permitted here: {error.stderr.strip()}")
        for host in made:
            host.plug_in()
        yield made


def finish(runs: list[subprocess.Popen], folder: Path, seconds: float = 110) -> None:
    """Wait for all runs; as soon as one fails, or time is up, fail with what was printed."""
    end = time.monotonic() + seconds
    while (status := [run.poll() for run in runs]) != [0] * len(runs):
        if any(status) or time.monotonic() > end:
            pytest.fail("\n".join(f"{log.name}:\n{log.read_text()[-2000:]}" for log in folder.glob("*.log")))
        time.sleep(0.1)


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_a_run_across_a_network_is_the_run_on_one_host(tmp_path, hosts):
    tiny_llama().save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    dataset().to_parquet(tmp_path / "rows.parquet")
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(RUN))
    launcher = {"config_file": MULTI_CPU, "num_processes": 2}

    network = {"num_machines": 2, "main_process_ip": hosts[0].address, "main_process_port": 29500}
    before = [host.sent() for host in hosts]
    for rank, host in enumerate(hosts):
        script = {"config": "run.yaml", "output_dir": f"across{rank}"}
        host.launch(tmp_path, f"host{rank}.log", launcher | network | {"machine_rank": rank}, script)
    finish([run for host in hosts for run in host.runs], tmp_path)
    sent = [host.sent() - was for host, was in zip(hosts, before, strict=True)]

    hosts[0].launch(tmp_path, "one.log", launcher, {"config": "run.yaml", "output_dir": "one"})
    finish(hosts[0].runs, tmp_path)
    assert min(host.sent() for host in hosts) < 2 * max(sent), "the run on one host does not use the cable"

    folders = ("across0", "across1", "one")
    first, second, one = (load_file(tmp_path / folder / "adapter_model.safetensors") for folder in folders)
    # with two processes each sends as many bytes of gradient in a step as there are
    assert min(sent) > RUN["max_steps"] * sum(tensor.nbytes for tensor in one.values())
    assert_same(first, second)
    for name, value in one.items():
        assert (first[name] - value).abs().max() <= 1e-6
    # B starts at zero
    assert all(value.any() for name, value in one.items() if "lora_B" in name)


def test_the_recipe_asks_for_two_machines():
    """What `accelerate launch` makes of its lines."""
    arguments = ["--config", str(ROOT / "configs" / "multi_node.yaml"), "--use_cpu", "true"]
    *_, rest = make_parser().parse_args_and_config(arguments, return_remaining_strings=True)
    parsed = launch_command_parser().parse_args([*launcher_arguments(rest), "--machine_rank", "1", "script.py"])
    launch = _validate_launch_command(parsed)[0]
    assert launch.multi_gpu
    assert (launch.num_machines, launch.num_processes, launch.machine_rank) == (2, 16, 1)


@pytest.mark.parametrize("config", sorted(MULTI_CPU.parent.glob("*.yaml")), ids=lambda config: config.stem)
def test_accelerate_reads_our_accelerate_configs(config):
    load_config_from_file(str(config))  # raises where it does not know a key
