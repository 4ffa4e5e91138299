"""Publishing, with the real client against a Hub in memory: what is sent, what is refused, and what faults lead to."""

import hashlib
import json
import re
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import trl
import yaml
from conftest import byte_tokenizer, lora, tiny_llama
from hub_server import TOKEN
from huggingface_hub import ModelCard, constants
from peft import PeftModel, get_peft_model
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from trl_rlsd import RLSDTrainer
from trl_rlsd.hub import PublishError, _run, card, publish, upload
from trl_rlsd.hub.contents import check, name_base_model, select
from trl_rlsd.run_record import read_record


BASE = "tiny/base"
ADAPTER_FILES = {"README.md", "adapter_config.json", "adapter_model.safetensors", "chat_template.jinja",
                 "tokenizer.json", "tokenizer_config.json"}  # fmt: skip
RECORD = {
    "format": 1, "base_model": BASE, "model_class": "LlamaForCausalLM", "peft": {"peft_type": "LORA", "r": 4},
    "credit": "rlsd", "settings": {"learning_rate": 1e-6, "rlsd_lambda": 0.5},
    "dataset": {"name": "tiny/sums", "rows": 16, "columns": ["prompt", "privileged_context"], "eval_rows": 8},
    "rewards": [{"name": "exact_number", "weight": 1.0}], "eval_completions": 32,
    "versions": {"trl": "1.16.0"}, "device": "cpu", "processes": 1, "finished": True, "steps": 4,
}  # fmt: skip
EVALUATED = {"eval_dataset": None, "eval_rows": 8, "eval_completions": 32, "eval_even": True}
METRICS = [
    {"step": 0, "time": 1.0, "eval_reward": 0.25, "eval_rewards/exact_number/mean": 0.25, **EVALUATED},
    *({"step": i, "time": 1.0, "reward": i / 8, "entropy": 1 / i, "completions/mean_length": 5} for i in range(1, 5)),
    {"step": 4, "time": 2.0, "eval_reward": 0.75, "eval_rewards/exact_number/mean": 0.75, **EVALUATED},
]


@pytest.fixture(autouse=True)
def no_picture(monkeypatch):
    # it takes half a second
    monkeypatch.setattr(card, "find_spec", lambda name: None)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A run's output_dir: the adapter, what a run leaves beside it, and the base that it was trained from."""
    folder = tmp_path_factory.mktemp("saved")
    tiny_llama().save_pretrained(folder / "base")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(folder / "base"), lora(init_lora_weights=False))
    run = folder / "run"
    model.save_pretrained(run)
    byte_tokenizer().save_pretrained(run)
    (run / "rlsd_run.json").write_text(json.dumps(RECORD))
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in METRICS))
    for name in ("training_args.bin", "checkpoint-2/rlsd_teacher.safetensors", "completions/credit_00001.html"):
        (run / name).parent.mkdir(exist_ok=True)
        (run / name).write_bytes(b"private")
    return run


@pytest.fixture
def run(saved, tmp_path):
    """A copy of it that a test may change."""
    return copy(saved, tmp_path / "run")


def copy(source: Path, folder: Path) -> Path:
    for path in list(source.rglob("*")):
        if path.is_file():
            target = folder / path.relative_to(source)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(path.read_bytes())
    return folder


def contents(folder: Path) -> dict[str, str]:
    return {str(p): hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.rglob("*") if p.is_file()}


def usage(hub, repo_id: str) -> dict:
    """Run the snippet of a published card, as it stands there."""
    text = hub.repos[repo_id].branches["main"].files["README.md"].decode()
    snippet = re.search(r"```python\n(.*?)```", text, re.DOTALL).group(1).replace("=256", "=4")
    variables = {}
    exec(snippet, variables)
    return variables


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(torch.arange(2, 12)[None]).logits


def is_whole(hub, published, *more: str) -> None:
    """What was published is there, in one commit after the first."""
    head = hub.repos["me/adapter"].branches["main"]
    assert set(head.files) == {*ADAPTER_FILES, *more, ".gitattributes"}
    assert (published.commit, head.parent.title) == (head.oid, "initial commit")
    assert {name: len(head.files[name]) for name in published.files} == dict(published.files)


def is_untouched(hub) -> None:
    assert set(hub.repos["me/adapter"].branches["main"].files) == {".gitattributes"}


def test_what_the_cards_snippet_loads_is_the_adapter_that_was_trained(hub, saved, monkeypatch):
    monkeypatch.setattr(card, "find_spec", find_spec)
    base = saved.parent / "base"
    hub.create(BASE, files={path.name: path.read_bytes() for path in base.iterdir()})
    before = contents(saved)
    published = publish(saved, "me/adapter", token=TOKEN)
    is_whole(hub, published, "training_curves.png")
    assert {"training_args.bin", "checkpoint-2/", "completions/", "metrics.jsonl"} <= set(published.left_out)
    assert contents(saved) == before
    loaded = usage(hub, "me/adapter")
    expected = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), saved)
    torch.testing.assert_close(logits(loaded["model"]), logits(expected), atol=1e-6, rtol=0)
    assert not torch.allclose(logits(loaded["model"]), logits(AutoModelForCausalLM.from_pretrained(base)), atol=1e-2)
    assert loaded["output"].shape[1] > loaded["inputs"]["input_ids"].shape[1]


def test_a_full_model_of_several_files_is_published_whole_and_loads(hub, tmp_path):
    model = tiny_llama()
    model.config._name_or_path = "/home/me/base"
    model.save_pretrained(tmp_path / "model", max_shard_size="40KB")
    byte_tokenizer(chat_template=None).save_pretrained(tmp_path / "model")
    published = publish(tmp_path / "model", "me/full", token=TOKEN)
    assert sum(name.endswith(".safetensors") for name in published.files) > 1
    torch.testing.assert_close(logits(usage(hub, "me/full")["model"]), logits(model), atol=1e-6, rtol=0)


def test_a_vision_language_adapter_loads_with_its_processor(hub, tmp_path):
    pytest.importorskip("PIL")
    from vlm_models import tiny_gemma3

    model, processor = tiny_gemma3()
    for part in (model, processor):
        part.save_pretrained(tmp_path / "base")
    hub.create(BASE, files={path.name: path.read_bytes() for path in (tmp_path / "base").iterdir()})
    get_peft_model(model, lora(init_lora_weights=False)).save_pretrained(tmp_path / "adapter")
    processor.save_pretrained(tmp_path / "adapter")
    publish(tmp_path / "adapter", "me/vision", token=TOKEN, base_model=BASE)
    loaded = usage(hub, "me/vision")
    assert loaded["output"].shape[1] > loaded["inputs"]["input_ids"].shape[1]
    data = ModelCard(hub.repos["me/vision"].branches["main"].files["README.md"].decode()).data
    assert data.pipeline_tag == "image-text-to-text"


# what happens once, on the way to a publication that then succeeds
PASSING = {
    "token 503": ("GET", "/whoami", dict(status=503)),
    "repository 500": ("GET", "/api/models/me/adapter", dict(status=500)),
    "creation 502": ("POST", "/repos/create", dict(status=502)),
    "creation answered by nobody": ("POST", "/repos/create", dict(cut="after")),
    "modes 503": ("POST", "/preupload/", dict(status=503)),
    "batch 502": ("POST", "/objects/batch", dict(status=502)),
    "upload 500": ("PUT", "/lfs/", dict(status=500)),
    "upload cut": ("PUT", "/lfs/", dict(cut="during")),
    "upload cut thrice": ("PUT", "/lfs/", dict(cut="during", times=3)),
    "upload hangs": ("PUT", "/lfs/", dict(hang=20)),
    "verification 503": ("POST", "/verify", dict(status=503)),
    "card check answered by a proxy": ("POST", "/validate-yaml", dict(status=503, body=b"<html>")),
    "commit 500": ("POST", "/commit/", dict(status=500)),
    "commit 409": ("POST", "/commit/", dict(status=409)),
    "commit 429": ("POST", "/commit/", dict(status=429, headers={"Retry-After": "7"})),
    "commit cut": ("POST", "/commit/", dict(cut="before")),
    "commit taken, answer lost": ("POST", "/commit/", dict(cut="after")),
    "commit answered by a proxy": ("POST", "/commit/", dict(status=200, body=b"<html>")),
    "commit hangs": ("POST", "/commit/", dict(hang=20, cut="before")),
    "list 503": ("GET", "/tree/", dict(status=503)),
}  # fmt: skip


@pytest.mark.parametrize("fault", PASSING)
def test_a_passing_fault_ends_in_one_whole_commit(hub, saved, fault, monkeypatch):
    method, path, options = PASSING[fault]
    if "hang" in options:
        monkeypatch.setattr(upload, "TIMEOUT", 0.5)
    hub.fail(method, path, **options)
    began = time.monotonic()
    is_whole(hub, publish(saved, "me/adapter", token=TOKEN))
    assert time.monotonic() - began < 15  # what hangs does so for 20 seconds
    assert not hub.faults
    assert sum(hub.waits) <= 10
    if fault == "commit 429":
        assert hub.waits == [7]
    if fault == "commit taken, answer lost":
        assert hub.asked("POST", "/commit/") == 1


# what stays, what the message says of it, and whether the repository is there then
LASTING = {
    "expired token": ("GET", "/whoami", dict(status=401), "expired or was revoked.*nothing was sent", False),
    "may not create": ("POST", "/repos/create", dict(status=403), "403.*write access.*no file was sent", False),
    "no such page": ("POST", "/preupload/", dict(status=404), "no such repository.*no commit", True),
    "may not upload": ("PUT", "/lfs/", dict(status=403), "403.*write access.*no commit", True),
    "storage is down": ("PUT", "/lfs/", dict(status=503), "uploading.*trouble .503.*no commit", True),
    "upload is cut": ("PUT", "/lfs/", dict(cut="during"), "uploading.*connection broke.*no commit", True),
    "token expires": ("POST", "/commit/", dict(status=401), "401.*no commit", True),
    "commit 403": ("POST", "/commit/", dict(status=403), "403.*write access.*no commit", True),
    "commit 409": ("POST", "/commit/", dict(status=409), "committing.*no commit", True),
    "commit 5xx": ("POST", "/commit/", dict(status=500), "trouble .500.*no commit", True),
    "commit 400": ("POST", "/commit/", dict(status=400), "committing.*injected.*no commit", True),
    "commit is cut": ("POST", "/commit/", dict(cut="before"), "connection broke.*no commit", True),
    "wait an hour": ("POST", "/commit/", dict(status=429, headers={"Retry-After": "3600"}),
                     "try again in 3600 s.*no commit", True),
}  # fmt: skip


@pytest.mark.parametrize("fault", LASTING)
def test_a_lasting_fault_is_told_and_leaves_no_commit(hub, saved, fault):
    method, path, options, message, created = LASTING[fault]
    hub.fail(method, path, times=100, **options)
    with pytest.raises(PublishError, match=re.compile(message, re.DOTALL)):
        publish(saved, "me/adapter", token=TOKEN)
    assert ("me/adapter" in hub.repos) == created
    if created:
        is_untouched(hub)
    assert hub.asked(method, path) <= 13
    assert sum(hub.waits) < 60


@pytest.mark.slow  # hf_xet leaves threads behind
def test_what_xets_storage_refuses_is_told_and_leaves_no_commit(hub, saved, monkeypatch):
    pytest.importorskip("hf_xet")
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
    hub.fail("GET", "/xet-write-token/", status=403, times=100)
    with pytest.raises(PublishError, match=re.compile(r"Xet.*403.*no commit", re.DOTALL)):
        publish(saved, "me/adapter", token=TOKEN)
    is_untouched(hub)


def test_after_a_lasting_fault_the_same_call_publishes(hub, saved):
    hub.fail("POST", "/commit/", status=500, times=5)
    with pytest.raises(PublishError):
        publish(saved, "me/adapter", token=TOKEN)
    is_whole(hub, publish(saved, "me/adapter", token=TOKEN))
    assert hub.asked("PUT", "/lfs/") == 1


def test_a_commit_that_cannot_be_read_back_is_not_reported_as_done(hub, saved):
    hub.fail("GET", "/tree/", status=500, times=100)
    with pytest.raises(PublishError, match=r"commit \w{40} is at .*, unverified"):
        publish(saved, "me/adapter", token=TOKEN)


def test_what_is_published_again_unchanged_is_the_same_commit(hub, saved):
    first = publish(saved, "me/adapter", token=TOKEN)
    assert publish(saved, "me/adapter", token=TOKEN).commit == first.commit
    assert hub.asked("POST", "/commit/") == 1


def another_commits(hub, when: str, name: str = "theirs.md"):
    """Somebody else commits once, when a request comes."""

    def hook(method, path):
        if when in path:
            hub.on_request = lambda method, path: None
            hub.commit("me/adapter", "main", "theirs", {name: b"theirs"})

    hub.on_request = hook


def test_a_head_that_moved_is_told_and_nothing_is_written_over(hub, saved):
    another_commits(hub, "/commit/")
    with pytest.raises(PublishError, match=r"changed by someone else.*'theirs'.*None of these files"):
        publish(saved, "me/adapter", token=TOKEN)
    assert set(hub.repos["me/adapter"].branches["main"].files) == {".gitattributes", "theirs.md"}


def test_a_commit_whose_answer_was_lost_is_found_below_a_later_one(hub, saved):
    hub.fail("POST", "/commit/", cut="after")
    another_commits(hub, "/commits/")
    published = publish(saved, "me/adapter", token=TOKEN)
    head = hub.repos["me/adapter"].branches["main"]
    assert (head.title, head.parent.oid) == ("theirs", published.commit)
    assert hub.asked("POST", "/commit/") == 1


def test_a_file_that_the_repository_ignores_is_noticed(hub, saved):
    hub.create("me/adapter", files={".gitignore": b"tokenizer.json"})
    with pytest.raises(PublishError, match=r"tokenizer\.json is missing"):
        publish(saved, "me/adapter", token=TOKEN)


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_config.json"])
def test_a_file_that_arrived_changed_is_noticed(hub, saved, name):
    def spoil(method, path):
        if "/tree/" in path:
            hub.repos["me/adapter"].branches["main"].files[name] += b" "

    hub.on_request = spoil
    with pytest.raises(PublishError, match=f"{name} has another content"):
        publish(saved, "me/adapter", token=TOKEN)


def test_a_repository_that_is_public_takes_no_private_model(hub, saved):
    hub.create("me/adapter", private=False)
    with pytest.raises(PublishError, match="is public and was to be private"):
        publish(saved, "me/adapter", token=TOKEN, private=True)
    is_untouched(hub)
    assert hub.asked("PUT", "") == 0


@pytest.mark.parametrize("private", [True, False, None])
def test_a_new_repository_is_as_private_as_was_asked(hub, saved, private):
    publish(saved, "me/adapter", token=TOKEN, private=private)
    assert hub.repos["me/adapter"].private is bool(private)


def test_a_branch_is_made_and_main_stays(hub, saved):
    published = publish(saved, "me/adapter", token=TOKEN, revision="v2")
    is_untouched(hub)
    head = hub.repos["me/adapter"].branches["v2"]
    assert head.oid == published.commit
    assert 'PeftModel.from_pretrained(model, "me/adapter", revision="v2")' in head.files["README.md"].decode()


def test_what_the_repository_held_before_is_named(hub, saved):
    hub.create("me/adapter", files={"training_args.bin": b"old"})
    assert publish(saved, "me/adapter", token=TOKEN).also_there == ["training_args.bin"]


def test_without_a_token_or_online_it_says_so(hub, saved, monkeypatch):
    monkeypatch.setattr("huggingface_hub.hf_api.get_token", lambda: None)
    with pytest.raises(PublishError, match="hf auth login"):
        publish(saved, "me/adapter")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(PublishError, match="HF_HUB_OFFLINE is set"):
        publish(saved, "me/adapter", token=TOKEN)
    assert not hub.requests


def test_a_dry_run_lists_what_a_publication_sends_and_asks_nobody(hub, saved):
    listed = publish(saved, "me/adapter", token=TOKEN, dry_run=True)
    assert (hub.requests, listed.commit) == ([], None)
    published = publish(saved, "me/adapter", token=TOKEN)
    assert (listed.files, listed.left_out) == (published.files, published.left_out)
    assert all(name in str(listed) for name in ADAPTER_FILES)


def put(name: str, **values):
    """Into a JSON file."""
    return lambda run: (run / name).write_text(json.dumps({**json.loads((run / name).read_text()), **values}))


def tensors(**names):
    return lambda run: save_file({k: torch.zeros(1) for k in names}, run / "adapter_model.safetensors")


def named_teacher(run):
    return run.rename(run.with_name("teacher"))


REFUSED = {
    "teacher's folder": (named_teacher, "holds a teacher, by its name"),
    "teacher's tensors": (tensors(**{"layers.0.lora_A.teacher.weight": 1}), "holds teacher or reference weights"),
    "TRL's reference": (tensors(**{"layers.0.lora_A.ref.weight": 1}), "holds teacher or reference weights"),
    "pickle": (lambda run: (run / "adapter_model.safetensors").rename(run / "adapter_model.bin"), "is a pickle"),
    "pickle in disguise": (lambda run: torch.save({}, run / "adapter_model.safetensors"), "is a pickle"),
    "torn weights": (lambda run: (run / "adapter_model.safetensors").write_bytes(b"torn"), "cannot be read"),
    "base is a folder": (put("adapter_config.json", base_model_name_or_path="/home/me/base"), "pass base_model="),
    "bases differ": (put("adapter_config.json", base_model_name_or_path="other/base"), "pass the right one"),
    "Hub token": (put("tokenizer_config.json", note=TOKEN), "looks like a key .hf_aB"),
    "other key": (put("tokenizer_config.json", note="sk-" + "a1" * 20), "looks like a key .sk-a1"),
    "W&B key": (put("tokenizer_config.json", wandb_api_key="0a" * 20), "looks like a key"),
    "password": (put("tokenizer_config.json", proxy="http://me:secret@proxy"), "looks like a key"),
    "path": (put("adapter_config.json", revision="/data2/models/base"), "adapter_config.json holds a path"),
    "path in a text": (lambda run: (run / "chat_template.jinja").write_text("{# /home/me/x #}"), "holds a path"),
    "Windows path": (put("tokenizer_config.json", note=r"see C:\Users\me\x"), "holds a path"),
    "path of the run": (put("rlsd_run.json", device="/tmp/me/x"), "README.md holds a p"),
    "no adapter": (lambda run: (run / "adapter_config.json").unlink(), "it holds no model"),
    "long path": (put("adapter_config.json", revision="/fsx/" + "a" * 90 + "/b"), r"holds a path of .*\.\.\."),
    "torn config": (lambda run: (run / "tokenizer_config.json").write_text("{"), "tokenizer_config.json"),
}  # fmt: skip


# as they stand in a longer text, which the card escapes
PRIVATE = {
    "Hub token": (TOKEN, "looks like a key .hf_aB"),
    "other key": ("sk-" + "a1" * 20, "looks like a key .sk-a1"),
    "password": ("http://me:secret@proxy", "looks like a key"),
    "secret of the environment": ("abc_def-ghi_jkl-mno", "value of an environment variable"),
    "Windows path": (r"C:\Users\me", "holds a path"),
    "URL of a file": ("file:///x", "holds a path"),
    "path": ("/tmp/my_team-x/y", "holds a path"),
}


@pytest.mark.parametrize("case", PRIVATE)
@pytest.mark.parametrize("where", ["device", "settings", "alarm"])
def test_what_the_card_escapes_is_refused_as_it_is_read(run, case, where, monkeypatch):
    monkeypatch.setenv("MY_SECRET", PRIVATE["secret of the environment"][0])
    private, message = PRIVATE[case]
    put("adapter_config.json", base_model_name_or_path=BASE)(run)
    told, metrics = f"a card of {private}, as it is", METRICS
    if where == "alarm":
        metrics = [*METRICS, {"step": 1, "alarm": told, "advice": "none"}]
    else:
        put("rlsd_run.json", **{where: told if where == "device" else {"optim_args": [told]}})(run)
    with pytest.raises(ValueError, match=rf"README\.md holds.*{message}|README\.md {message}") as refusal:
        publish(run, "me/adapter", metrics=metrics, dry_run=True)
    assert TOKEN not in str(refusal.value)


def test_an_alarms_advice_is_not_published():
    assert "advised" not in made(RECORD, [*METRICS, {"step": 1, "alarm": "leakage", "advice": f"advised {TOKEN}"}])


def test_chat_templates_may_tell_a_model_of_folders_but_not_of_this_machines(run, monkeypatch):
    put("adapter_config.json", base_model_name_or_path=BASE)(run)
    harmless = "The drive at '/mnt/data' keeps files."  # GPT-OSS
    put("tokenizer_config.json", chat_template=[{"name": "tools", "template": harmless}])(run)
    (run / "chat_template.jinja").write_text(harmless)
    publish(run, "me/adapter", dry_run=True)
    monkeypatch.setattr(tempfile, "gettempdir", lambda: "/fast/temporary")
    for place in ("/home/me/x", "/root/x", r"C:\Users\me", "/fast/temporary/x"):
        (run / "chat_template.jinja").write_text(f"{harmless} {place}")
        with pytest.raises(ValueError, match=r"chat_template\.jinja holds a path"):
            publish(run, "me/adapter", dry_run=True)
    (run / "chat_template.jinja").write_text(harmless)
    put("tokenizer_config.json", chat_template="see /home/me/x")(run)
    with pytest.raises(ValueError, match=r"tokenizer_config\.json holds a path"):
        publish(run, "me/adapter", dry_run=True)


def test_trls_own_chat_templates_pass():
    templates = sorted((Path(trl.__file__).parent / "chat_templates").glob("*.jinja"))
    assert templates
    for path in templates:
        check({"chat_template.jinja": path.read_bytes()})


@pytest.mark.parametrize("repo_id", ["adapter", "me/adapter/more", "me/a b"])
def test_a_repository_is_named_with_its_owner(saved, repo_id):
    with pytest.raises(ValueError, match=r"names no owner|Repo id must"):
        publish(saved, repo_id, dry_run=True)


@pytest.mark.parametrize("case", REFUSED)
def test_what_must_not_be_published_is_refused_before_any_request(hub, run, case):
    spoil, message = REFUSED[case]
    if case == "base is a folder":
        (run / "rlsd_run.json").unlink()
    elif case != "bases differ":
        put("adapter_config.json", base_model_name_or_path=BASE)(run)
    moved = spoil(run)
    folder = moved if case == "teacher's folder" else run
    with pytest.raises(ValueError, match=message) as refusal:
        publish(folder, "me/adapter", token=TOKEN)
    assert TOKEN not in str(refusal.value)
    assert not hub.requests


def test_a_secret_of_the_environment_is_known_by_its_value(hub, run, monkeypatch):
    monkeypatch.setenv("MY_SERVICE_KEY", "correct horse battery staple")
    put("tokenizer_config.json", note="the correct horse battery staple")(run)
    with pytest.raises(ValueError, match="value of an environment variable") as refusal:
        publish(run, "me/adapter", token=TOKEN, dry_run=True)
    assert "horse" not in str(refusal.value)


@pytest.mark.parametrize("where", ["settings", "chat_template.jinja", "tokenizer_config.json"])
def test_a_privileged_context_is_refused_however_it_is_written(run, where):
    secret = 'The "answer"\nto <row> 7 | is_forty-two, é!'
    if where == "settings":
        put("rlsd_run.json", settings={"teacher_prompt_template": f"Example: {secret}"})(run)
    elif where == "chat_template.jinja":
        (run / where).write_text("{# " + secret.replace("\n", "   ") + " #}")
    else:
        put(where, note=secret)(run)
    name = "README.md" if where == "settings" else where
    with pytest.raises(ValueError, match=f"{name} holds 1 of the dataset's prompts") as refusal:
        publish(run, "me/adapter", private_texts=[secret, "another row that is not there"], dry_run=True)
    assert "forty" not in str(refusal.value)
    publish(run, "me/adapter", private_texts=["forty", "another row that is not there"], dry_run=True)


def test_a_local_base_is_replaced_in_what_is_sent_alone(hub, run):
    assert json.loads((run / "adapter_config.json").read_text())["base_model_name_or_path"].startswith("/")
    before = contents(run)
    publish(run, "me/adapter", token=TOKEN, base_model="other/base")
    sent = json.loads(hub.repos["me/adapter"].branches["main"].files["adapter_config.json"])
    assert sent["base_model_name_or_path"] == "other/base"
    assert contents(run) == before


def sent(folder, **options) -> str:
    """The base that the card of a publication names."""
    (files, _), run = select(folder), _run(folder, None, None)
    return name_base_model(files, options.get("base_model"), folder, run.record)


def test_a_relative_folder_is_no_id_of_the_hub(run, monkeypatch):
    monkeypatch.chdir(run.parent)
    put("adapter_config.json", base_model_name_or_path="models/foo")(run)
    put("tokenizer_config.json", name_or_path="models/foo")(run)
    put("rlsd_run.json", base_model=None)(run)  # as a run writes it that was trained from a folder
    with pytest.raises(ValueError, match="'models/foo', which is a local folder; pass base_model="):
        sent(run)
    assert sent(run, base_model=BASE) == BASE
    files, _ = select(run)
    name_base_model(files, BASE, run, {"base_model": None})
    assert not any(b"models/foo" in content for content in files.values() if isinstance(content, bytes))
    (run / "rlsd_run.json").unlink()
    assert sent(run) == "models/foo"
    for place in (Path(), run):
        (place / "models/foo").mkdir(parents=True)
        with pytest.raises(ValueError, match="which is a local folder"):
            sent(run)
        (place / "models/foo").rmdir()


def test_an_id_that_is_given_or_recorded_holds_where_a_folder_has_its_name(run, monkeypatch):
    monkeypatch.chdir(run.parent)
    Path(BASE).mkdir(parents=True)
    put("adapter_config.json", base_model_name_or_path=BASE)(run)
    assert sent(run) == BASE  # rlsd_run.json says so
    (run / "rlsd_run.json").unlink()
    assert sent(run, base_model=BASE) == BASE


@pytest.mark.parametrize("name, known", [("sft", False), ("adapter", True), ("checkpoint-3", True)])
def test_the_record_above_is_a_folders_own_only_by_its_name(run, name, known):
    own = _run(copy(run, run / name), None, None)
    assert (own.record, len(own.metrics)) == (RECORD, 4 if name == "checkpoint-3" else 6)
    for file in ("rlsd_run.json", "metrics.jsonl"):
        (run / name / file).unlink()
    own = _run(run / name, None, None)
    assert (own.record is not None, len(own.metrics) > 0) == (known, known)


def test_an_index_of_shards_that_are_gone_does_not_stand_in_the_way_of_a_whole_model(tmp_path):
    model = tiny_llama()
    model.save_pretrained(tmp_path, max_shard_size="40KB")
    model.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors.index.json").exists()
    published = publish(tmp_path, "me/full", dry_run=True)
    assert "model.safetensors" in published.files
    assert "model.safetensors.index.json" in published.left_out
    assert not any("index" in name or "-of-" in name for name in published.files)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="which is not there"):
        publish(tmp_path, "me/full", dry_run=True)


@pytest.mark.parametrize("part", [
    {"settings": [1]}, {"dataset": "x"}, {"dataset": {"columns": 3}}, {"peft": "x"}, {"rewards": [3]},
    {"rewards": [{}]}, {"versions": []}, {"steps": "4"}, {"eval_completions": "x"},
])  # fmt: skip
def test_a_record_with_a_part_of_a_wrong_type_is_not_known(run, part):
    put("adapter_config.json", base_model_name_or_path=BASE)(run)
    put("rlsd_run.json", **part)(run)
    publish(run, "me/adapter", dry_run=True)
    assert read_record(run) is None
    assert read_record(run.parent) is None


def made(record, metrics=(), files=("adapter_config.json", "tokenizer.json", "chat_template.jinja"), step=None) -> str:
    own = card.make(card.Run(record, list(metrics), step), "me/adapter", files, base_model=BASE)
    return own["README.md"].decode()


def test_the_card_tells_the_run_and_its_measurements():
    text = made(RECORD, METRICS)
    data = ModelCard(text).data
    assert (data.base_model, data.library_name, data.pipeline_tag) == (BASE, "peft", "text-generation")
    assert {"trl", "rlsd", "generated_from_trainer", "lora"} <= set(data.tags)
    assert (data.datasets, data.license) == (["tiny/sums"], None)
    assert [(r.metric_name, r.metric_value) for r in data.eval_results] == [("mean reward", 0.75)]
    assert "| reward | 0.25 | 0.75 |" in text
    assert "the mean of 32 completions, of 8 rows" in text
    assert "| learning_rate | 1e-06 |" in text
    assert "- Reward function: exact_number, weight 1.0" in text
    assert RLSDTrainer._paper["citation"] in text
    assert "vonwerra2020trl" in text
    assert not re.search(r"\n{3,}|[ \t]\n|[^\n]\n#", text)


@pytest.mark.parametrize("metrics, present, absent", [
    ([], ["Not measured during the run"], ["Before training", "model-index"]),
    (METRICS[:1], ["Before training"], ["Step 4", "model-index"]),
    (METRICS[1:], ["Step 4"], ["Before training"]),
])  # fmt: skip
def test_nothing_is_claimed_that_was_not_measured(metrics, present, absent):
    text = made(RECORD, metrics)
    assert not re.search(r"\n{3,}|[ \t]\n|[^\n]\n#", text)
    assert all(phrase in text for phrase in present)
    assert not any(phrase in text for phrase in absent)


def evaluation(step, reward, dataset=None, rows=8, completions=32, even=True) -> dict:
    about = {"eval_dataset": dataset, "eval_rows": rows, "eval_completions": completions, "eval_even": even}
    return {"step": step, "eval_reward": reward, "eval_rlsd/right": reward / 2, **about}


def test_several_evaluation_datasets_are_each_told_by_name():
    text = made(RECORD, [evaluation(step, own + step / 8, name, rows, 4 * rows) for step in (0, 4)
                         for name, rows, own in (("easy", 4, 0.5), ("h|rd", 8, 0.125))])  # fmt: skip
    easy, hard = text.split("## Evaluation\n")[1].split("### easy")[1].split("### h\\|rd")
    assert "of 16 completions, of 4 rows" in easy
    assert "| reward | 0.5 | 1 |" in easy
    assert "of 32 completions, of 8 rows" in hard
    assert "| reward | 0.125 | 0.625 |" in hard
    assert ModelCard(text).data.eval_results is None
    assert not re.search(r"\n{3,}|[ \t]\n|[^\n]\n#", text)


@pytest.mark.parametrize("other", [{"dataset": "other"}, {"rows": 4}, {"completions": 64}])
def test_evaluations_of_different_rows_are_not_before_and_after(other):
    text = made(RECORD, [evaluation(0, 0.25), evaluation(4, 0.75, **other)])
    assert "| reward | 0.25 |\n" in text
    assert "| reward | 0.75 |\n" in text
    assert "model-index" not in text


def test_a_mean_of_batches_is_called_a_mean_of_completions_only_where_it_is():
    even, uneven = ([evaluation(step, 0.5, even=own) for step in (0, 4)] for own in (True, False))
    silent = [{name: own for name, own in line.items() if name not in EVALUATED} for line in even]
    assert "Each column is the mean of 32 completions, of 8 rows of the evaluation dataset.\n" in made(RECORD, even)
    told = "means of the evaluation's batches, the last of which was smaller; the share of right"
    assert told in made(RECORD, uneven)
    assert "Each column is of 32 completions, of 8 rows of the evaluation dataset.\n" in made(RECORD, silent)
    for metrics, name in ((even, "mean reward"), (uneven, "reward"), (silent, "reward")):
        assert [own.metric_name for own in ModelCard(made(RECORD, metrics)).data.eval_results] == [name]
    unknown = [evaluation(4, 0.5, rows=None, completions=None, even=False)]
    assert "batches" not in made(RECORD, unknown)
    assert "was not recorded." in made(RECORD, unknown)


def test_a_number_beyond_floats_is_none():
    text = made(RECORD, [*METRICS, {"step": 5, "reward": 10**400, "eval_reward": 10**400, **EVALUATED}])
    assert "| reward | 0.25 | 0.75 |" in text


def test_a_checkpoint_claims_nothing_of_later_steps(hub, run):
    checkpoint = copy(run, run / "checkpoint-3")
    publish(checkpoint, "me/adapter", token=TOKEN)
    text = hub.repos["me/adapter"].branches["main"].files["README.md"].decode()
    assert "its checkpoint of step 3" in text
    assert "0.75" not in text
    assert "Optimizer steps: 3" in text


def test_without_a_record_the_card_says_what_is_not_known():
    text = made(None)
    assert "was not found" in text
    assert not re.search(r"\n{3,}|[ \t]\n|[^\n]\n#", text)
    assert "Self-Distilled RLVR](https" not in text
    assert yaml.safe_load(text.split("---")[1])["base_model"] == BASE


def test_without_matplotlib_the_curves_are_a_table():
    own = card.make(card.Run(RECORD, METRICS), "me/adapter", ["adapter_config.json"], base_model=BASE)
    assert set(own) == {"README.md"}
    assert "| 4 | 0.5 | 5 | 0.25 |" in own["README.md"].decode()


HOSTILE = "<script>alert(1)</script> | `x` [a](http://b) **c** @me &lt; {{ 7*7 }} \n---\n# head\n![i](x)"


def test_what_comes_from_the_run_stays_text():
    record = {
        **RECORD,
        "credit": HOSTILE, "device": HOSTILE, "settings": {HOSTILE: HOSTILE, "list": [HOSTILE]},
        "peft": {"peft_type": HOSTILE}, "versions": {HOSTILE: HOSTILE},
        "dataset": {"name": HOSTILE, "rows": HOSTILE, "columns": [HOSTILE], "eval_rows": HOSTILE},
        "rewards": [{"name": HOSTILE, "weight": HOSTILE}], "eval_completions": HOSTILE,
    }  # fmt: skip
    metrics = [
        *METRICS,
        {"step": 4, "alarm": HOSTILE},
        {"step": 4, "eval_reward": 1.0, f"eval_rewards/{HOSTILE}/mean": 1},
    ]
    text = made(record, metrics)
    assert ModelCard(text).data.base_model == BASE
    body = re.sub(r"```.*?```", "", ModelCard(text).text, flags=re.DOTALL)
    assert body.count("alert") >= 12
    for live in ("<script", "\n---", "\n# head", "http://b"):
        assert live not in body
    own = re.sub(r"\\.", "", body)  # what is escaped is text
    assert not re.search(r"`x`|\[a\]|\*\*c|@me|!\[i\]|\{\{|&lt;script>", own)
    tables = [line for line in own.splitlines() if line.startswith("|") and "alert" in line]
    assert tables
    assert {line.count("|") for line in tables} <= {3, 4}
