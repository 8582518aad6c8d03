"""Start a function in several processes on this machine, one or more for each network."""

from __future__ import annotations

import atexit
import gc
import json
import logging
import multiprocessing
import os
import pickle
import signal
import socket
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any, Literal, NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.api import DefaultLogsSpecs, SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.elastic.rendezvous import (
    RendezvousHandler,
    RendezvousInfo,
    RendezvousParameters,
    RendezvousStoreInfo,
    rendezvous_handler_registry,
)
from torch.distributed.elastic.rendezvous.static_tcp_rendezvous import StaticTCPRendezvous
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from dist_graft.errors import (
    ConfigError,
    DistGraftError,
    NetworkFailedError,
    PeerError,
    StoppedAtStartError,
    StoppedEarlyError,
    StoppedError,
    UserCodeError,
)
from dist_graft.population.collectives import raised_by_backend
from dist_graft.population.compat import shutdown_option
from dist_graft.population.runtime.process import (
    SIGNALS,
    communicate_on_loopback,
    die_with_launcher,
    leave,
    not_ignored,
    report_failure,
)
from dist_graft.population.runtime.process_info import ProcessInfo, read_process_info

StartMethod = Literal["spawn", "fork", "forkserver"]
_Result = TypeVar("_Result")

_LOOPBACK = "127.0.0.1"
LOOPBACK_RENDEZVOUS = "dist_graft_loopback"
_FORWARDED_SIGNALS = (*SIGNALS, signal.SIGQUIT)
_WHILE_STARTING = (signal.SIGINT,)
"""Blocked until a process runs the function: a terminal sends Ctrl-C to all, and Python would print
where each import was interrupted."""
_CAUSE_SECONDS = 2.0  # for the process that failed first to report and end
_INTERRUPTED = 128 + signal.SIGINT
_STORE_SECONDS = 300


def launch(
    function: Callable[..., _Result],
    *args: Any,
    networks: int,
    replicas: int = 1,
    start_method: StartMethod | None = None,
    shutdown_timeout: int = 30,
) -> list[_Result]:
    """Run ``function(*args)`` in ``networks * replicas`` processes on this machine.

    The processes are started by torch's elastic launcher, which sets ``RANK``, ``WORLD_SIZE``,
    ``LOCAL_RANK``, ``MASTER_ADDR`` and ``MASTER_PORT`` as ``torchrun`` does. All sockets listen on
    the loopback interface. In a script, call this under ``if __name__ == "__main__":``. Signals
    that ask a run to stop (SIGINT, SIGTERM, SIGUSR1, SIGHUP) are forwarded to the processes, unless
    they are ignored, as SIGHUP is under nohup.

    Args:
        function: called in each process. With ``"spawn"`` it must be defined at the top level of
            a module or script.
        args: passed to the function; must be picklable with ``"spawn"``.
        networks: size of the population.
        replicas: processes that train each network (``runtime.replicas``).
        start_method: start method of ``multiprocessing``. Default: ``"spawn"``, except ``"fork"``
            in an interactive session that has not used CUDA.
        shutdown_timeout: seconds between forwarding a signal and killing the processes. Older
            versions of torch have 30 seconds only.

    Returns: the results of the function, by rank; they must be picklable. None if the function
        called ``sys.exit(0)``.

    Raises:
        NetworkFailedError: a process failed. The message is that of the first failure. All other
            processes have been stopped.
        StoppedEarlyError: the run was asked to stop, and has saved a checkpoint.
        StoppedError: a signal stopped the processes; KeyboardInterrupt for SIGINT.
        ConfigError: an argument is out of range, or the function cannot be sent to the processes.
    """
    processes = _check_call(networks, replicas)
    method = _choose_start_method(function, start_method)
    handles_interrupts = threading.current_thread() is threading.main_thread()
    handled = [
        number
        for number in not_ignored(_FORWARDED_SIGNALS)
        if number != signal.SIGINT or not handles_interrupts
    ]
    with tempfile.TemporaryDirectory(prefix="dist_graft_") as folder:
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=processes,
            run_id="dist_graft",
            rdzv_backend=LOOPBACK_RENDEZVOUS,
            max_restarts=0,
            start_method=method,
            logs_specs=DefaultLogsSpecs(log_dir=folder),
            local_addr=_LOOPBACK,
            signals_to_handle=",".join(number.name for number in handled),
            **shutdown_option(shutdown_timeout),
        )
        try:
            with (
                _silent_launcher(),
                _silent_store(),
                _restored_signal_handlers(),
                _interrupts.handled(),
                _no_process_left(),
            ):
                own_method = multiprocessing.get_start_method(allow_none=True)
                start = elastic_launch(config, _run)
                results = start(function, args, os.getpid(), own_method or "")
        except (ChildFailedError, SignalException) as error:
            failure = _first_failure(error, _read_reports(Path(folder)), processes, replicas)
        else:
            return [pickle.loads(results[rank]) for rank in range(processes)]
    gc.collect()  # the launcher's semaphores, which multiprocessing would otherwise call leaked
    raise failure


def _check_call(networks: int, replicas: int) -> int:
    """Check the sizes and the calling process; returns the number of processes."""
    for name, value in (("networks", networks), ("replicas", replicas)):
        if value < 1:
            raise ConfigError(f"launch: {name} must be at least 1, got {value}")
    if read_process_info().launched:
        raise ConfigError(
            "launch: this process was itself started by a launcher (RANK is set); call the "
            "function directly, or start the script without torchrun"
        )
    if multiprocessing.parent_process() or "--multiprocessing-fork" in sys.orig_argv:
        raise ConfigError(
            "launch: called in a process that multiprocessing started; in a script, call it under "
            'if __name__ == "__main__":, because a new process imports the script'
        )
    return networks * replicas


def _choose_start_method(function: Callable[..., Any], requested: StartMethod | None) -> str:
    is_interactive = not Path(getattr(sys.modules["__main__"], "__file__", "")).is_file()
    uses_cuda = torch.cuda.is_initialized()
    method = requested or ("fork" if is_interactive and not uses_cuda else "spawn")
    if method == "fork":
        return method
    name = getattr(function, "__qualname__", repr(function))
    if is_interactive and getattr(function, "__module__", "__main__") == "__main__":
        raise ConfigError(
            f"launch: {name} is defined in an interactive session, which a new process cannot "
            "import: define it in a module, or restart the session and call launch before CUDA is "
            "used"
        )
    try:
        pickle.dumps(function)
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise ConfigError(
            f"launch: {name} cannot be sent to a new process ({error}): define it at the top level "
            'of a module, or pass start_method="fork"'
        ) from error
    return method


# In the started processes


def _run(
    function: Callable[..., Any], args: tuple[Any, ...], launcher: int, start_method: str
) -> bytes:
    """Run the function in one process; returns its pickled result.

    The start method is that of the launcher; empty: the platform's default.
    """
    die_with_launcher(launcher)
    # Drop the launcher's handlers, which a forked process inherits.
    for number in not_ignored(_FORWARDED_SIGNALS):
        is_interrupt = number == signal.SIGINT
        signal.signal(number, signal.default_int_handler if is_interrupt else signal.SIG_DFL)
    # A spawned process would otherwise spawn its data loader workers, too.
    multiprocessing.set_start_method(start_method or None, force=True)
    has_returned = threading.Event()
    # Exit without finalizing the interpreter; see `leave`.
    atexit.register(lambda: leave(0 if has_returned.is_set() else 1))
    communicate_on_loopback()
    torch.set_num_threads(read_process_info().cpu_share())
    try:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _WHILE_STARTING)
        result = pickle.dumps(function(*args))
    except KeyboardInterrupt:
        leave(_INTERRUPTED)
    except SystemExit as error:
        if error.code not in (None, 0):
            _report_and_leave(error)
        result = pickle.dumps(None)
    except Exception as error:  # noqa: BLE001  the caller of launch raises it
        _report_and_leave(error)
    has_returned.set()
    return result


def _report_and_leave(error: BaseException) -> NoReturn:
    for number in _FORWARDED_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    if isinstance(error, DistGraftError):
        text, status = str(error), error.exit_status
        trace = error.user_traceback() if isinstance(error, UserCodeError) else ""
    else:
        text = f"{type(error).__name__}: {error}".rstrip(": ")
        code = error.code if isinstance(error, SystemExit) else 1
        status = code if isinstance(code, int) else 1
        above = error.__traceback__.tb_next if error.__traceback__ else None
        trace = "".join(traceback.format_exception(type(error), error, above))
    is_consequence = isinstance(error, PeerError | StoppedError) or raised_by_backend(error)
    report_failure(
        " ".join(text.split()),
        exit_status=status,
        type=type(error).__name__,
        traceback=trace,
        is_consequence=is_consequence,
        is_common=isinstance(error, DistGraftError) and error.is_common,
    )
    if is_consequence and not isinstance(error, StoppedError):
        # The launcher ends this process once it has noticed the first failure.
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(_CAUSE_SECONDS)
    leave(status)


# In the launcher


def _read_reports(folder: Path) -> dict[int, Mapping[str, Any]]:
    """Failures that the processes reported, by rank."""
    files = folder.glob("*/attempt_0/*/error.json")
    return {int(file.parent.name): json.loads(file.read_text()) for file in files}


def _first_failure(
    error: ChildFailedError | SignalException,
    reports: Mapping[int, Mapping[str, Any]],
    processes: int,
    replicas: int,
) -> BaseException:
    """Exception for the caller of `launch`."""
    if isinstance(error, SignalException) and not reports:
        if error.sigval == signal.SIGINT:
            return KeyboardInterrupt()
        return StoppedError(f"stopped by {error.sigval.name}")
    if isinstance(error, ChildFailedError):
        rank, failure = error.get_first_failure()
        if rank not in reports:
            process = _describe(rank, processes, replicas)
            return NetworkFailedError(
                f"{process} {_cause(failure.exitcode)}", network=process.network, rank=rank
            )
    # Consequences of another failure come last, even if they were reported first.
    rank = min(reports, key=lambda rank: (reports[rank]["is_consequence"], reports[rank]["time"]))
    report = reports[rank]
    text, trace = report["message"]["message"], report["traceback"]
    status = report["message"]["errorCode"]
    for kind in (StoppedEarlyError, StoppedAtStartError, StoppedError):
        if report["type"] == kind.__name__:
            stopped = kind(text)
            stopped.exit_status = status
            return stopped
    process = _describe(rank, processes, replicas)
    return NetworkFailedError(
        text if report["is_common"] else f"{process}: {text}",
        network=process.network,
        rank=rank,
        exit_status=status,
        traceback=trace,
    )


def _describe(rank: int, processes: int, replicas: int) -> ProcessInfo:
    return ProcessInfo(rank, processes, rank, processes, replicas=replicas)


def _cause(status: int) -> str:
    if status < 0:
        return f"was killed by {signal.Signals(-status).name}"
    if status == _INTERRUPTED:
        return "was interrupted by SIGINT"
    return (
        f"ended with status {status} before it ran the function or without a Python exception; its "
        'output says why (in a script, call launch under if __name__ == "__main__":)'
    )


@contextmanager
def _silent_launcher() -> Iterator[None]:
    """Suppress the launcher's own log lines: the exception says what failed."""
    silent = logging.NullHandler()
    loggers = [
        logging.getLogger(f"torch.{name}") for name in ("distributed.elastic", "multiprocessing")
    ]
    before = [logger.propagate for logger in loggers]
    for logger in loggers:
        logger.addHandler(silent)
        logger.propagate = False
    try:
        yield
    finally:
        for logger, propagate in zip(loggers, before, strict=True):
            logger.removeHandler(silent)
            logger.propagate = propagate


@contextmanager
def _silent_store() -> Iterator[None]:
    """Suppress the warnings of torch's store in the processes: errors say what failed."""
    name = "TORCH_CPP_LOG_LEVEL"
    is_set = name in os.environ
    os.environ.setdefault(name, "ERROR")
    try:
        yield
    finally:
        if not is_set:
            os.environ.pop(name, None)


@contextmanager
def _restored_signal_handlers() -> Iterator[None]:
    """Undo the launcher's changes of the blocked signals, and of handlers (main thread only)."""
    is_main_thread = threading.current_thread() is threading.main_thread()
    before = {number: signal.getsignal(number) for number in _FORWARDED_SIGNALS}
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    try:
        yield
    finally:
        for number, handler in before.items() if is_main_thread else ():
            signal.signal(number, handler)
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)


@contextmanager
def _no_process_left() -> Iterator[None]:
    """Kill the processes that would outlive a signal during their start."""
    before = set(multiprocessing.active_children())
    try:
        yield
    finally:
        for process in set(multiprocessing.active_children()) - before:
            process.kill()
            process.join()


class _Interrupts:
    """Handles SIGINT like the other signals, but defers it while processes start.

    A process whose launcher is interrupted then prints a traceback. Blocking the signal does not
    suffice, because a thread that a library has started earlier does not block it.
    """

    def __init__(self) -> None:
        self._postpones = False
        self._pending = False

    @contextmanager
    def handled(self) -> Iterator[None]:
        """Handle SIGINT; without effect outside of the main thread."""
        self._postpones = self._pending = False
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, lambda number, _: self._interrupt())
        yield
        self.resume()  # the processes may end before the launcher first polls them

    def postpone(self) -> None:
        """Keep an interrupt until `resume`."""
        self._postpones = True

    def resume(self) -> None:
        """Raise SignalException if there was an interrupt, and at the next one."""
        self._postpones = False
        if self._pending:
            self._interrupt()

    def _interrupt(self) -> None:
        self._pending = self._postpones
        if not self._postpones:
            raise SignalException("interrupted", signal.SIGINT)


_interrupts = _Interrupts()


class _LoopbackRendezvous(StaticTCPRendezvous):
    """Rendezvous of one machine, whose store listens on the loopback interface only."""

    def next_rendezvous(self) -> RendezvousInfo:
        """Open a new store, so that restarted processes do not read keys of the earlier ones.

        The launcher then starts the processes, which inherit its blocked signals.
        """
        _interrupts.postpone()
        # The tracker inherits the blocked signals: one to all processes must not end it.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, _FORWARDED_SIGNALS)
        resource_tracker.ensure_running()
        signal.pthread_sigmask(signal.SIG_SETMASK, before | set(_WHILE_STARTING))
        listener = socket.create_server((self.master_addr, self.master_port))
        port = listener.getsockname()[1]
        store = dist.TCPStore(
            self.master_addr,
            port,
            is_master=True,
            wait_for_workers=False,
            timeout=self.timeout,
            master_listen_fd=listener.detach(),
        )
        address = RendezvousStoreInfo(self.master_addr, port)
        return RendezvousInfo(dist.PrefixStore("launcher", store), 0, 1, address)

    def get_backend(self) -> str:
        return LOOPBACK_RENDEZVOUS

    def num_nodes_waiting(self) -> int:
        """Called regularly once the processes are started."""
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _WHILE_STARTING)
        _interrupts.resume()
        return 0


def _loopback_rendezvous(parameters: RendezvousParameters) -> RendezvousHandler:
    return _LoopbackRendezvous(_LOOPBACK, 0, 0, 1, parameters.run_id, _STORE_SECONDS)


rendezvous_handler_registry.register(LOOPBACK_RENDEZVOUS, _loopback_rendezvous)
