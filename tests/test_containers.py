"""Container files and README: what images copy is there, and every command is one that gpudia or dask understands."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from gpudia.arguments import parse

ROOT = Path(__file__).resolve().parents[1]
DOCKERFILES = sorted((ROOT / "docker").glob("Dockerfile.*"))
COMPOSE = ROOT / "docker" / "compose.yaml"


def instructions(path):
    """Instructions of a Dockerfile with their arguments, continued lines joined and comments left out."""
    lines = [line for line in path.read_text().splitlines() if not line.lstrip().startswith("#")]
    joined = "\n".join(lines).replace("\\\n", " ")
    return [tuple(line.split(None, 1)) for line in joined.splitlines() if line.strip()]


def filled(value, given):
    """Put variables in, as Compose does: ${NAME:-default}, ${NAME:?message}."""
    if isinstance(value, dict):
        return {k: filled(v, given) for k, v in value.items()}
    if isinstance(value, list):
        return [filled(v, given) for v in value]
    if not isinstance(value, str):
        return value
    return re.sub(r"\$\{(\w+):([-?])([^}]*)\}", lambda m: given.get(m[1]) or (m[3] if m[2] == "-" else ""), value)


def services(**given):
    return filled(yaml.safe_load(COMPOSE.read_text())["services"], {"DATA": "/frames", **given})


def understands(command):
    """Parse a command as its program does, without doing it."""
    program, *arguments = command
    if program == "gpudia":
        try:
            parse(arguments)
            code = 0
        except SystemExit as stop:  # --help, or what it does not understand
            code = stop.code
        assert code == 0, command
        return
    assert program == "dask", command
    name, *arguments = arguments
    module = pytest.importorskip(f"distributed.cli.dask_{name}")
    module.main.make_context(name, list(arguments))  # an unknown option raises


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_an_image_has_what_it_copies_and_runs_as_nobody(path):
    steps = instructions(path)
    stages = [rest.split()[-1] for name, rest in steps if name == "FROM" and " AS " in rest]
    let_in = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    for name, rest in steps:
        if name != "COPY":
            continue
        words = rest.split()
        if words[0].startswith("--from="):
            assert words[0].removeprefix("--from=") in stages
        else:
            assert all((ROOT / word).exists() and word in let_in for word in words[:-1]), rest
    last = steps[max(i for i, (name, _) in enumerate(steps) if name == "FROM") :]
    assert not any("pip " in rest for name, rest in last if name == "RUN")
    told = dict(last)
    assert int(told["USER"]) > 0
    assert json.loads(told["ENTRYPOINT"]) == ["gpudia"]
    understands(["gpudia", *json.loads(told["CMD"])])
    health = told["HEALTHCHECK"]
    understands(json.loads(health[health.index("[") :]))
    assert "org.opencontainers.image.licenses" in told["LABEL"]


def test_every_command_of_the_compose_file_is_understood():
    for name, service in services().items():
        command = [*service["entrypoint"], *service["command"]]
        assert all(isinstance(word, str) for word in command), name
        understands(command)
    understands([*services()["run"]["entrypoint"], "night/*.fits", "--output", "event"])


def test_the_services_of_the_compose_file_fit_together():
    found = services(OWNER="1000:1000")
    assert set(found) == {"scheduler", "worker", "worker-1", "cpu-worker", "run"}
    port = found["scheduler"]["entrypoint"][found["scheduler"]["entrypoint"].index("--port") + 1]
    assert found["scheduler"]["ports"] == [f"127.0.0.1:{port}:{port}"]
    assert port in found["scheduler"]["healthcheck"]["test"][-1]
    for name, service in found.items():
        assert service["volumes"] == ["/frames:/data"]
        assert service["user"] == "1000:1000"
        assert service["image"] == "gpudia:cuda"
        build = service["build"]
        assert (COMPOSE.parent / build["context"] / build["dockerfile"]) in [COMPOSE.parent / ".." / "docker" / p.name
                                                                              for p in DOCKERFILES]
        if name != "scheduler":
            assert f"tcp://scheduler:{port}" in service["entrypoint"]
            assert service["depends_on"] == {"scheduler": {"condition": "service_healthy"}}
    devices = [d for s in found.values() for d in s.get("deploy", {}).get("resources", {}).get("reservations", {}).get(
        "devices", [])]
    assert [(d["driver"], d["device_ids"], d["capabilities"]) for d in devices] == [
        ("nvidia", ["0"], ["gpu"]), ("nvidia", ["1"], ["gpu"])]


def test_the_health_line_of_the_scheduler_tells_a_port_that_listens():
    test = services()["scheduler"]["healthcheck"]["test"]
    assert test[0] == "CMD"
    script = test[-1].replace("8786", "1")  # nobody listens there
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, check=False)
    assert done.returncode != 0
    assert b"ConnectionRefusedError" in done.stderr


def test_the_gpudia_commands_of_the_readme_are_understood():
    """Those that are run in a container, or not: each line of the shell examples."""
    text = (ROOT / "README.md").read_text()
    lines = [line for block in re.findall(r"```sh\n(.*?)```", text, re.S) for line in block.splitlines()]
    commands = [shlex.split(line, comments=True) for line in lines if line.strip()]
    found = 0
    for words in commands:
        words = words[max((i + 1 for i, w in enumerate(words) if w == "&&"), default=0) :]
        words = words[: words.index(">")] if ">" in words else words
        image = next((i for i, w in enumerate(words) if w.startswith("gpudia:") and "run" in words[:i]), None)
        if image is not None:
            entry = words[words.index("--entrypoint") + 1] if "--entrypoint" in words else "gpudia"
            words = [entry, *words[image + 1 :]]
        elif words[:2] == ["docker", "compose"] and words.count("run") == 2:
            words = [*services()["run"]["entrypoint"], *words[len(words) - words[::-1].index("run") :]]
        if Path(words[0]).name in ("gpudia", "dask"):
            understands([Path(words[0]).name, *words[1:]])
            found += 1
    assert found > 8
