"""The Dockerfile, read: what would rot in it without a word until somebody builds it."""

from __future__ import annotations

import ast
import re
import shlex
import subprocess
import tomllib
from fnmatch import fnmatch
from pathlib import Path

import pytest
from packaging.specifiers import SpecifierSet

ROOT = Path(__file__).parents[2]
VENV = "/opt/mimray"


def instructions(text: str) -> list[tuple[str, str]]:
    """The instructions, each with its arguments, without comments and line breaks."""
    lines = [
        line for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")
    ]
    joined = re.sub(r"\\\n\s*", " ", "\n".join(lines))
    return [
        (name, rest.strip()) for name, _, rest in (x.partition(" ") for x in joined.split("\n"))
    ]


@pytest.fixture(scope="module")
def steps() -> list[tuple[str, str]]:
    return instructions((ROOT / "Dockerfile").read_text())


def all_of(steps: list[tuple[str, str]], name: str) -> list[str]:
    return [rest for found, rest in steps if found == name]


@pytest.fixture(scope="module")
def environment(steps: list[tuple[str, str]]) -> dict[str, str]:
    """The environment of the image's last stage."""
    last = len(steps) - [name for name, _ in reversed(steps)].index("FROM")
    words = [word for rest in all_of(steps[last:], "ENV") for word in shlex.split(rest)]
    return dict(word.split("=", 1) for word in words)


def ignored(path: str) -> bool:
    """True if .dockerignore keeps a path of the checkout out of the build."""
    left_out = False
    for line in (ROOT / ".dockerignore").read_text().splitlines():
        if not line or line.startswith("#"):
            continue
        pattern, kept = line.removeprefix("!"), line.startswith("!")
        parts = path.split("/")
        heads = ["/".join(parts[: n + 1]) for n in range(len(parts))]
        if pattern.startswith("**/"):
            heads = parts
        if any(fnmatch(head, pattern.removeprefix("**/")) for head in heads):
            left_out = not kept
    return left_out


def copied(steps: list[tuple[str, str]]) -> list[str]:
    """Paths of the checkout that a build copies."""
    copies = [rest.split() for rest in all_of(steps, "COPY")]
    return [path for words in copies if not words[0].startswith("--from") for path in words[:-1]]


def test_copies__are_there_and_reach_the_build(steps: list[tuple[str, str]]) -> None:
    paths = copied(steps)

    assert {"pyproject.toml", "constraints.txt", "mimray", "trainers"} <= set(paths)
    for path in paths:
        assert (ROOT / path).exists(), path
        assert not ignored(path), path


def test_context__holds_nothing_else() -> None:
    left = (
        ".git/config",
        ".venv/bin/python",
        "runs/a/plan.json",
        "keys.json",
        "serving/__pycache__/x",
    )
    for path in left:
        assert ignored(path), path


def test_links__lead_to_what_is_copied(steps: list[tuple[str, str]]) -> None:
    links = [path for path in (ROOT / "mimray").iterdir() if path.is_symlink()]

    assert links
    assert {str(link.resolve().relative_to(ROOT)) for link in links} <= set(copied(steps))


def test_wheel__finds_the_files_that_it_is_built_of(steps: list[tuple[str, str]]) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

    assert {project["readme"], *project["license-files"]} <= set(copied(steps))


def test_base__is_pinned_and_of_a_python_that_is_supported(steps: list[tuple[str, str]]) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    bases = [rest.split()[0] for rest in all_of(steps, "FROM")]

    assert len(bases) == 2
    assert len(set(bases)) == 1  # the environment holds a link to the Python of the first
    pinned = re.fullmatch(r"python:(\d+\.\d+\.\d+)-slim-[a-z]+", bases[0])
    assert pinned
    assert pinned[1] in SpecifierSet(project["requires-python"])


def test_versions__are_those_of_the_constraints(steps: list[tuple[str, str]]) -> None:
    installs = [rest for rest in all_of(steps, "RUN") if "uv pip install" in rest]

    with_dependencies = [rest for rest in installs if "--no-deps" not in rest]
    assert with_dependencies
    assert all("--constraint constraints.txt" in rest for rest in with_dependencies)
    assert "UV_BUILD_CONSTRAINT=/build/constraints.txt" in " ".join(all_of(steps, "ENV"))
    # What installs the others is pinned as well.
    assert re.search(r"pip install \S+ uv==[\d.]+", " ".join(all_of(steps, "RUN")))
    extras = set(re.findall(r"--extra (\S+)", " ".join(installs)))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert extras == set(project["optional-dependencies"])


def test_user__is_not_root_and_named_by_number(steps: list[tuple[str, str]]) -> None:
    assert all_of(steps, "USER") == ["1000:1000"]
    after = [name for name, _ in steps[[n for n, _ in steps].index("USER") :]]
    assert not {"RUN", "COPY", "ADD"} & set(after)
    assert "--uid 1000" in " ".join(all_of(steps, "RUN"))


def test_environment__names_files_that_the_image_has(environment: dict[str, str]) -> None:
    launcher = environment["RAY_SERVE_HAPROXY_BINARY_PATH"]
    python = all_of(instructions((ROOT / "Dockerfile").read_text()), "FROM")[0]
    version = re.search(r"python:(\d+\.\d+)", python)

    assert version
    package = f"{VENV}/lib/python{version[1]}/site-packages/"
    assert launcher.startswith(package)
    assert (ROOT / launcher.removeprefix(package)).stat().st_mode & 0o100
    assert environment["MIMRAY_PYTHON"] == f"{VENV}/bin/python"
    assert environment["PATH"].startswith(f"{VENV}/bin:")
    assert environment["RAY_AUTH_MODE"] == "token"


def test_environment__has_haproxy_as_mimray_serve_has_it(environment: dict[str, str]) -> None:
    from mimray.serving.config import Limits
    from mimray.serving.deploy.haproxy import HAProxyState
    from mimray.serving.deploy.haproxy_launcher import REQUESTS_PER_SOURCE

    ours = HAProxyState(8000).environment(
        silence_s=Limits().body_timeout_s, requests_per_source=Limits().requests_per_source
    )
    of_a_machine = re.compile(r"_(PATH|LOC|BASE|FILE|PORT|NBTHREAD)$")

    def serve(variables: dict[str, str]) -> dict[str, str]:
        return {
            name: value
            for name, value in variables.items()
            if name.startswith("RAY_SERVE_") and not of_a_machine.search(name)
        }

    assert serve(environment) == serve(ours)
    assert environment[REQUESTS_PER_SOURCE] == ours[REQUESTS_PER_SOURCE]


def test_health__is_asked_of_a_program_that_the_image_has(steps: list[tuple[str, str]]) -> None:
    (check,) = all_of(steps, "HEALTHCHECK")
    command = ast.literal_eval(check[check.index("CMD") + 3 :].strip())
    *sources, target = next(rest.split() for rest in all_of(steps, "COPY") if "healthy.py" in rest)

    assert command == ["python", f"{target}healthy.py"]
    assert "deploy/image/healthy.py" in sources


def test_shell__each_run_is_one_that_sh_can_read(steps: list[tuple[str, str]]) -> None:
    for rest in all_of(steps, "RUN"):
        read = subprocess.run(["sh", "-n", "-c", rest], capture_output=True, text=True)
        assert read.returncode == 0, (rest, read.stderr)
