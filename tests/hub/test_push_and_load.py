"""Through the Hub and back: the real client in processes of its own, a server of its protocol on this machine."""

from __future__ import annotations

import json
import re
import textwrap
from collections.abc import Callable, Iterator
from subprocess import CompletedProcess

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from sentence_transformers import SentenceTransformer

from gem_st import GemModelCardData, GemTransformer, hub

from .hub_server import HubServer

TEXTS = ["It rained all day.", "", "She bought bread at the market."]
WRITER, READER = "hf_writer", "hf_reader"

EMBED = """
import numpy as np
from sentence_transformers import SentenceTransformer
try:
    import gem_st
    raise SystemExit("gem_st can be imported")
except ImportError:
    pass
model = SentenceTransformer(sys.argv[1], trust_remote_code=True, device="cpu", revision=sys.argv[3] or None)
np.save(sys.argv[2], model.encode(["It rained all day.", "", "She bought bread at the market."]))
print(model[0].generate("It rained", max_new_tokens=6))
"""
GENERATE = """
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
model, info = AutoModelForCausalLM.from_pretrained(sys.argv[1], output_loading_info=True)
assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
ids = AutoTokenizer.from_pretrained(sys.argv[1])("It rained", return_tensors="pt")
print(model.generate(**ids, max_new_tokens=6, do_sample=False)[0].tolist())
"""
IMPATIENT = """
import sys, time
sleep = time.sleep
time.sleep = lambda seconds: sleep(min(seconds, 0.1))  # between two attempts at a request: it makes as many
"""


@pytest.fixture(scope="module")
def server() -> Iterator[HubServer]:
    users = {WRITER: ("alice", "write"), READER: ("bob", "read")}
    with HubServer(users, orgs={"acme": ["alice", "bob"], "others": []}) as running:
        yield running


@pytest.fixture
def client(server, python, tmp_path) -> Callable[..., CompletedProcess[str]]:
    """Function that runs code with gem_st against the server; the cache is that of the test."""

    def run(code: str, *args: object, token: str | None = WRITER, **env: str) -> CompletedProcess[str]:
        script = tmp_path / "client.py"
        script.write_text(IMPATIENT + textwrap.dedent(code))
        return python.run(script, *args, env={**server.env(tmp_path / "home", token=token), **env}, cwd=tmp_path)

    return run


@pytest.fixture
def stranger(server, tmp_path, run_without_gem_st) -> Callable[..., tuple[np.ndarray, str]]:
    """Function that loads a repository where gem_st is not installed: its vectors, and what it generates."""

    def load(repo_id: str, revision: str = "", token: str | None = None, **env: str) -> tuple[np.ndarray, str]:
        env = server.env(tmp_path / "stranger", token=token, **env)
        text = run_without_gem_st(EMBED, repo_id, tmp_path / "out.npy", revision, env=env)
        return np.load(tmp_path / "out.npy"), text.strip()

    return load


def build(base: object, seed: int = 0, **kwargs) -> SentenceTransformer:
    torch.manual_seed(seed)
    gem = GemTransformer(str(base), **kwargs)
    with torch.no_grad():
        for name, weight in gem.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.3)
    return SentenceTransformer(modules=[gem], device="cpu", model_card_data=GemModelCardData())


def check(done: CompletedProcess[str]) -> str:
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def cli(*arguments: object) -> str:
    """Code that runs the command line."""
    return f"from gem_st.cli import app\napp({[str(argument) for argument in arguments]})"


PUSH = """
from sentence_transformers import SentenceTransformer
model = SentenceTransformer(sys.argv[1], trust_remote_code=True, device="cpu")
print(model.push_to_hub(sys.argv[2], **eval(sys.argv[3])))
"""


def test_a_push_by_sentence_transformers_opens_every_door(
    server, client, stranger, make_base, tmp_path, run_without_gem_st
):
    model = build(make_base(tie_word_embeddings=False), num_gem_tokens=2)
    model.save_pretrained(str(tmp_path / "model"))
    check(client(PUSH, tmp_path / "model", "acme/gem", {}))
    assert set(server.files("acme/gem")) >= {"model.safetensors", "gem_st.py", "modules.json", "README.md"}
    expected = model.encode(TEXTS)
    vectors, text = stranger("acme/gem")
    assert np.array_equal(vectors, expected)
    assert text == model[0].generate("It rained", max_new_tokens=6).strip()

    # a plain generator, no remote code: nothing but its own files is asked for
    server.requests.clear()
    output = run_without_gem_st(GENERATE, "acme/gem", env=server.env(tmp_path / "plain"))
    ids = model[0].tokenizer("It rained", return_tensors="pt")
    assert json.loads(output) == model[0].model.generate(**ids, max_new_tokens=6, do_sample=False)[0].tolist()
    assert not any(path.endswith(".py") for _, path in server.requests)

    # offline, from the cache
    server.requests.clear()
    vectors, _ = stranger("acme/gem", HF_HUB_OFFLINE="1")
    assert np.array_equal(vectors, expected)
    assert server.requests == []

    # a stranger pushes it again
    code = PUSH.replace("sys.argv[1]", '"acme/gem"')
    run_without_gem_st(code, "", "alice/copy", {}, env=server.env(tmp_path / "stranger", token=WRITER))
    vectors, _ = stranger("alice/copy")
    assert np.array_equal(vectors, expected)
    assert server.files("alice/copy")["gem_st.py"] == server.files("acme/gem")["gem_st.py"]


def test_the_trainer_pushes(server, client, stranger, make_base, tmp_path):
    code = """
    import numpy as np
    from datasets import Dataset
    from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer
    from sentence_transformers import SentenceTransformerTrainingArguments
    from gem_st import GemLoss, GemTransformer
    model = SentenceTransformer(modules=[GemTransformer(sys.argv[1])], device="cpu")
    texts = ["It rained all day.", "", "She bought bread at the market."]
    arguments = {"max_steps": 2, "per_device_train_batch_size": 3, "report_to": "none", "use_cpu": True}
    arguments |= {"push_to_hub": True, "hub_model_id": "acme/trained", "save_steps": 1, "learning_rate": 0.01}
    trainer = SentenceTransformerTrainer(
        model=model,
        args=SentenceTransformerTrainingArguments("out", **arguments),
        train_dataset=Dataset.from_dict({"text": texts}),
        loss=GemLoss(model, alpha=0.5),
    )
    trainer.train()
    trainer.push_to_hub()
    np.save("trained.npy", model.encode(texts))
    """
    check(client(code, make_base()))
    vectors, _ = stranger("acme/trained")
    assert np.array_equal(vectors, np.load(tmp_path / "trained.npy"))
    assert (
        'SentenceTransformer("acme/trained", trust_remote_code=True)'
        in server.files("acme/trained")["README.md"].decode()
    )
    done = client(PUSH, "acme/trained", "acme/trained", {})  # Sentence Transformers' own answer to a 409
    assert "HfHubHTTPError: Client error '409 Conflict'" in done.stderr


def test_without_trust_nothing_of_ours_runs(server, make_base, tmp_path, run_without_gem_st, client):
    model = build(make_base())
    model.save_pretrained(str(tmp_path / "model"))
    check(client(PUSH, tmp_path / "model", "acme/untrusted", {}))
    server.requests.clear()
    code = """
    from sentence_transformers import SentenceTransformer
    try:
        SentenceTransformer("acme/untrusted", device="cpu")
    except ValueError as error:
        print(error)
    """
    output = run_without_gem_st(code, env=server.env(tmp_path / "home2"))
    assert "Please pass the argument `trust_remote_code=True` to allow custom code to be run." in output
    assert not any("gem_st.py" in path for _, path in server.requests)


@pytest.mark.parametrize("kind", ["full", "frozen", "stock"])
def test_the_command_pushes_what_verifies(server, client, stranger, make_base, tmp_path, kind):
    model = build(make_base(), freeze_base=kind == "frozen")
    if kind == "stock":
        hub.export(model, tmp_path / "model", format="stock")
    else:
        model.save_pretrained(str(tmp_path / "model"))
    repo_id = f"acme/cli-{kind}"
    output = check(client(cli("push", tmp_path / "model", repo_id, "--private", "--json")))
    assert json.loads(output)["url"].startswith(f"{server.url}/{repo_id}/commit/")
    assert len(server.commits(repo_id)) == 2  # the initial one, and all of the checkpoint
    assert server.repos[repo_id].private
    card = ModelCard(server.files(repo_id)["README.md"].decode())
    assert f'SentenceTransformer("{repo_id}"' in card.text
    assert card.data.library_name == "sentence-transformers"

    done = client(cli("verify", repo_id), token=READER)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("\nok ") == 6
    assert done.stdout.startswith(f"{repo_id} at {server.commits(repo_id)[0].oid[:12]}\n")
    settings = json.loads(check(client(cli("info", repo_id, "--json"), token=READER)))
    assert settings["mode"] == kind
    done = client(cli("verify", repo_id), token=None, HF_HOME=str(tmp_path / "empty"))
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith(
        f"gem-st: There is no folder {repo_id}, and no repository of that name"
    )
    if kind != "stock":
        vectors, _ = stranger(repo_id, token=READER)
        assert np.array_equal(vectors, model.encode(TEXTS))

    # what lies in the cache is not what lies on the Hub, unless that is asked for
    del server.repos[repo_id]
    assert client(cli("verify", repo_id), token=READER).returncode == 1
    done = client(cli("verify", repo_id), token=READER, HF_HUB_OFFLINE="1")
    assert done.returncode == 0, done.stdout + done.stderr
    assert ", from the cache\n" in done.stdout


def test_an_adapter_finds_its_base_at_its_revision(server, client, stranger, make_base, tmp_path):
    base = make_base()
    files = {path.name: path.read_bytes() for path in base.iterdir()}
    server.seed("acme/base", {**files, "README.md": b"---\nlicense: llama3.2\n---\n"})
    code = """
    import numpy as np
    import torch
    from sentence_transformers import SentenceTransformer
    from gem_st import GemModelCardData, GemTransformer, hub
    torch.manual_seed(0)
    gem = GemTransformer("acme/base", freeze_base=True, num_gem_tokens=2, lora_rank=4)
    gem.save_base = False
    model = SentenceTransformer(modules=[gem], device="cpu", model_card_data=GemModelCardData())
    with torch.no_grad():
        for name, weight in gem.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.3)
    print(hub.push(model, "acme/adapter"))
    np.save("expected.npy", model.encode(["It rained all day.", "", "She bought bread at the market."]))
    """
    check(client(code))
    revision = server.commits("acme/base")[0].oid
    pushed = server.files("acme/adapter")
    assert not {"config.json", "model.safetensors"} & set(pushed)
    settings = json.loads(pushed["gem_config.json"])
    assert (settings["base_model_name_or_path"], settings["base_model_revision"]) == ("acme/base", revision)
    data = ModelCard(pushed["README.md"].decode()).data
    assert (data.base_model, data.base_model_relation, data.license) == ("acme/base", "adapter", "llama3.2")

    changed = {**json.loads(files["config.json"]), "rms_norm_eps": 0.1}
    server.seed("acme/base", {"config.json": json.dumps(changed).encode()})  # the base moves on, the adapter does not
    assert "ok      embeddings" in check(client(cli("verify", "acme/adapter"), token=None))
    vectors, _ = stranger("acme/adapter")
    assert np.array_equal(vectors, np.load(tmp_path / "expected.npy"))


def test_revisions_of_weights_and_of_code(server, client, stranger, make_base, tmp_path, run_without_gem_st):
    first, second = (build(make_base(), seed) for seed in (0, 1))
    for name, model in (("first", first), ("second", second)):
        hub.export(model, tmp_path / name)
    code = """
    from huggingface_hub import HfApi
    from gem_st import hub
    print(hub.push("first", "acme/versions"))
    HfApi().create_tag("acme/versions", tag="v1")
    HfApi().upload_file(path_or_fileobj=b"mine", path_in_repo="notes.txt", repo_id="acme/versions")
    print(hub.push("second", "acme/versions", exist_ok=True))
    print(hub.push("first", "acme/versions", revision="side", exist_ok=True))
    HfApi().upload_file(path_or_fileobj=b"raise SystemExit('ran')", path_in_repo="gem_st.py", repo_id="acme/versions")
    """
    check(client(code))
    assert server.files("acme/versions")["notes.txt"] == b"mine"
    vectors, _ = stranger("acme/versions", "v1")
    assert np.array_equal(vectors, first.encode(TEXTS))
    vectors, _ = stranger("acme/versions", "side")
    assert np.array_equal(vectors, first.encode(TEXTS))
    pinned = EMBED.replace("revision=", 'model_kwargs={"code_revision": "v1"}, revision=')
    env = server.env(tmp_path / "pinned")
    run_without_gem_st(pinned, "acme/versions", tmp_path / "out.npy", "", env=env)
    assert np.array_equal(np.load(tmp_path / "out.npy"), second.encode(TEXTS))


def test_an_update_removes_what_is_no_longer_part_of_the_checkpoint(server, client, make_base, tmp_path):
    build(make_base(), freeze_base=True).save_pretrained(str(tmp_path / "frozen"))
    build(make_base()).save_pretrained(str(tmp_path / "full"))
    check(client(cli("push", tmp_path / "frozen", "acme/moving")))
    assert "gem_adapter/adapter_config.json" in server.files("acme/moving")
    done = client(cli("push", tmp_path / "full", "acme/moving"))
    assert done.returncode == 1
    assert "acme/moving holds files already. Pass exist_ok=True (--exist-ok)" in done.stderr
    check(client(cli("push", tmp_path / "full", "acme/moving", "--exist-ok")))
    files = server.files("acme/moving")
    assert not any(name.startswith("gem_adapter/") for name in files)
    assert "| mode | full |" in files["README.md"].decode()  # the old card would be false
    edited = files["README.md"] + b"Words of its owner."
    server.seed("acme/moving", {"README.md": edited})
    output = client(cli("push", tmp_path / "full", "acme/moving", "--exist-ok"))
    assert "The card of acme/moving is kept" in output.stderr
    assert server.files("acme/moving")["README.md"] == edited
    assert client(cli("verify", "acme/moving")).returncode == 0
    check(client(cli("push", tmp_path / "full", "acme/moving", "--exist-ok", "--replace-model-card")))
    assert server.files("acme/moving")["README.md"] != edited


def test_another_push_in_between_is_not_overwritten_by_half(server, client, make_base, tmp_path):
    hub.export(build(make_base()), tmp_path / "model")
    code = """
    from huggingface_hub import HfApi
    from gem_st import hub
    from gem_st.hub import pushing
    add = pushing.list_operations
    def wait(*args):
        HfApi().upload_file(path_or_fileobj=b"theirs", path_in_repo="gem_config.json", repo_id="acme/race")
        return add(*args)
    pushing.list_operations = wait
    hub.push("model", "acme/race")
    """
    done = client(code)
    assert "OSError: acme/race was changed by somebody else in the meantime. Push again." in done.stderr
    assert "gem_st.py" not in server.files("acme/race")


def test_pull_requests(server, client, stranger, make_base, tmp_path):
    model, changed = (build(make_base(), seed) for seed in (0, 1))
    for name, one in (("model", model), ("changed", changed)):
        hub.export(one, tmp_path / name)
    check(client(cli("push", tmp_path / "model", "acme/reviewed")))
    output = check(client(cli("push", tmp_path / "changed", "acme/reviewed", "--create-pr")))
    assert re.search(r"acme/reviewed/discussions/1\nCheck it: gem-st verify acme/reviewed --revision refs/pr/1", output)
    done = client(cli("push", tmp_path / "changed", "acme/reviewed", "--create-pr", "--revision", "side"))
    assert "gem-st: A pull request is made to main" in done.stderr
    url = check(client(PUSH, tmp_path / "changed", "acme/reviewed", {"create_pr": True})).split()[-1]
    assert url.endswith("/2")
    for revision, expected in (("", model), ("refs/pr/1", changed), ("refs/pr/2", changed)):
        vectors, _ = stranger("acme/reviewed", revision)
        assert np.array_equal(vectors, expected.encode(TEXTS))
    check(client('from huggingface_hub import HfApi\nHfApi().merge_pull_request("acme/reviewed", 1)'))
    vectors, _ = stranger("acme/reviewed")
    assert np.array_equal(vectors, changed.encode(TEXTS))


@pytest.mark.parametrize(("way", "place"), [("cli", "upload"), ("sentence_transformers", "commit")])
def test_an_interrupted_push_leaves_the_last_commit(server, client, stranger, make_base, tmp_path, way, place):
    model, changed = (build(make_base(), seed) for seed in (0, 1))
    for name, one in (("model", model), ("changed", changed)):
        hub.export(one, tmp_path / name)
    repo_id = f"acme/broken-{way}-{place}"
    check(client(cli("push", tmp_path / "model", repo_id)))
    before = server.files(repo_id)

    def push() -> CompletedProcess[str]:
        if way == "cli":
            return client(cli("push", tmp_path / "changed", repo_id, "--exist-ok"))
        return client(PUSH, tmp_path / "changed", repo_id, {"exist_ok": True})

    where = {"upload": (rf"/cdn/{repo_id}/", "PUT"), "commit": (rf"/api/models/{repo_id}/commit/", "POST")}[place]
    fault = server.fail_next(where[0], method=where[1], after_bytes=100, times=50)
    done = push()
    assert fault.fired
    assert done.returncode != 0
    if way == "cli":
        assert re.search(
            rf"gem-st: The connection to the Hub broke \(\w+\)\. {repo_id} holds what it held", done.stderr
        )
    assert server.files(repo_id) == before
    server.clear_faults()
    vectors, _ = stranger(repo_id)
    assert np.array_equal(vectors, model.encode(TEXTS))
    check(push())
    vectors, _ = stranger(repo_id)
    assert np.array_equal(vectors, changed.encode(TEXTS))


def test_an_interrupted_download_is_taken_up_again(server, client, stranger, make_base, tmp_path):
    model = build(make_base())
    hub.export(model, tmp_path / "model")
    check(client(cli("push", tmp_path / "model", "acme/slow")))
    fault = server.fail_next(r"/cdn/acme/slow/.*model\.safetensors", method="GET", after_bytes=5_000)
    vectors, _ = stranger("acme/slow")
    assert fault.fired
    assert np.array_equal(vectors, model.encode(TEXTS))


def test_what_the_hub_refuses_is_one_line(server, client, make_base, tmp_path):
    hub.export(build(make_base()), tmp_path / "model")
    repos = set(server.repos)
    code = """
    import json
    from gem_st import hub
    messages = []
    for repo_id, token, revision in json.loads(sys.argv[1]):
        try:
            hub.push("model", repo_id, token=token) if revision is None else hub.info(repo_id, revision=revision)
            messages.append(["none", ""])
        except Exception as error:
            messages.append([type(error).__name__, str(error)])
    print(json.dumps(messages))
    """
    server.seed("acme/here", {"gem_config.json": b"{}"})
    asked = [
        ("acme/new", "hf_unknown", None),
        ("acme/new", READER, None),
        ("others/new", WRITER, None),
        ("acme/here", None, "no-such-branch"),
        ("acme/not-here", None, "main"),
    ]
    output = check(client(code, json.dumps(asked)))
    (bad_token, read_only, no_member, no_revision, no_repo) = json.loads(output.splitlines()[-1])
    assert bad_token[0] == read_only[0] == no_member[0] == "PermissionError"
    assert "does not accept the token" in bad_token[1]
    assert read_only[1].startswith("The token may not write to acme/new. Use one with write permission")
    assert no_member[1].startswith("The token may not write to others/new")
    assert no_revision[0] == no_repo[0] == "FileNotFoundError"
    assert "no such revision" in no_revision[1]
    assert no_repo[1].startswith("There is no folder acme/not-here, and no repository of that name")
    assert set(server.repos) == repos | {"acme/here"}
    done = client(cli("push", tmp_path / "model", "acme/new"), token=None)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("gem-st: There is no Hub token. Run `hf auth login`")
    done = client(cli("push", tmp_path / "model", "acme/new"), HF_ENDPOINT="http://127.0.0.1:9")
    assert done.returncode == 1
    assert "gem-st: The connection to the Hub broke (ConnectError). acme/new holds what it held" in done.stderr


def test_what_cannot_be_pushed_makes_no_repository(server, client, make_base, tmp_path):
    folder = hub.export(build(make_base()), tmp_path / "model")
    (folder / "optimizer.pt").write_bytes(b"x")
    for message in (r"may hold code: .*optimizer\.pt", r"gem_config\.json was changed"):
        done = client(cli("push", folder, "acme/changed"))
        assert done.returncode == 1
        assert re.search(rf"gem-st: .* is not as it was exported: .*{message}", done.stderr)
        (folder / "optimizer.pt").unlink(missing_ok=True)
        (folder / "gem_config.json").write_text("{}")
    adapter = build(make_base(), freeze_base=True)
    adapter[0].save_base = False
    adapter.save_pretrained(str(tmp_path / "adapter"))
    for folder, message in (
        ("no-such-folder", "is no folder"),
        (make_base(), "not a GEM checkpoint"),
        (tmp_path / "adapter", "The adapter names its base by a folder of this machine"),
    ):
        done = client(cli("push", folder, "acme/changed"))
        assert done.returncode == 1
        assert message in done.stderr
    assert "acme/changed" not in server.repos


def test_a_push_takes_its_own_files_and_leaves_others(server, client, make_base, tmp_path):
    folder = hub.export(build(make_base()), tmp_path / "model")
    (folder / "notes.md").write_text("mine")
    server.seed("acme/other", {"tokenizer.json": b"theirs", "embedding/a.txt": b"theirs"})
    check(client(cli("push", folder, "acme/other", "--exist-ok")))
    files = server.files("acme/other")
    assert files["embedding/a.txt"] == b"theirs"  # there was no GEM checkpoint that it could have been part of
    assert "notes.md" not in files
    done = client(cli("push", folder, "acme/other", "--exist-ok", "--private"))
    assert "gem-st: acme/other exists and is public" in done.stderr


def test_tokens_are_in_no_log(server, client, make_base, tmp_path):
    build(make_base(), freeze_base=True).save_pretrained(str(tmp_path / "model"))
    code = """
    import logging
    logging.basicConfig(level=logging.DEBUG)
    from huggingface_hub import HfApi
    from gem_st import hub
    hub.push("model", "acme/quiet", token=sys.argv[1])
    hub.load("acme/quiet", token=sys.argv[1], device="cpu")
    hub.info("acme/quiet", token=sys.argv[1])
    print(hub.verify("acme/quiet", token=sys.argv[1]))
    for call in (hub.push, hub.load, hub.info):
        try:
            call(*(["model"] if call is hub.push else []), "acme/private", token="hf_wrong")
        except Exception as error:
            logging.exception("as it should be")
    """
    server.seed("acme/private", {"README.md": b"secret"})
    server.repos["acme/private"].private = True
    done = client(code, WRITER, token=None)
    check(done)
    assert done.stderr.count("as it should be") == 3
    assert "DEBUG" in done.stderr
    for token in (WRITER, "hf_wrong"):
        assert token not in done.stdout + done.stderr.replace('token="hf_wrong"', "")
    assert all(WRITER.encode() not in content for content in server.files("acme/quiet").values())
