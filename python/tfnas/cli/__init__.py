"""The `tfnas` command: one module per subcommand, loaded when it is called.

Exit codes: 0 done; 1 failed on the way (loss not finite, not enough memory, disk full, GPU not to be timed); 2 bad
input or a target out of reach; 3 the derived network misses the target (only with `--derive paper`), or a `--strict`
check does not hold; 130 interrupted (Ctrl-C) and 143 terminated, after a checkpoint. Anything else is a bug and shows
a traceback.
"""

from __future__ import annotations

import contextlib
import difflib
import importlib
import io
import os
import sys
from collections.abc import Callable, Sequence

from jsonargparse import ArgumentError

from tfnas.cli.codes import BAD_INPUT, FAILED, INTERRUPTED, OK
from tfnas.cli.functions import run_function
from tfnas.files import is_text, shown
from tfnas.interrupt import ProcessFailed, RunFailed, RunInterrupted
from tfnas.openmp import wait_briefly
from tfnas.shortage import is_disk_full, is_out_of_memory, is_timing_failure

COMMANDS = {
    "search": "search a network that meets a latency target (also `tfnas-search`)",
    "train": "train the network of an architecture file or of a search",
    "evaluate": "accuracy on the test images, latency measured against the table",
    "export": "write a network for other programs: safetensors, ONNX, timm, published code",
    "report": "a self-contained page about a search",
    "scale": "fit an architecture's widths to a latency target by a table",
    "lut": "measure, check, show, compare and convert latency tables",
    "bench": "fused blocks against plain PyTorch on this machine",
    "info": "versions, devices and backends; facts about an architecture file",
}
_USAGE = """usage: tfnas COMMAND [options]     (tfnas COMMAND --help shows the options)

Search for a network that meets a latency target (TF-NAS, ECCV 2020).

commands:
{commands}

exit codes: 0 done, 1 failed on the way (loss not finite, memory, disk full), 2 bad input or impossible target,
3 target missed (--derive paper) or a --strict check not held, 130 interrupted, 143 terminated
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `tfnas COMMAND ...`; returns the exit code. `TFNAS_DEBUG=1` shows tracebacks of input errors too."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if arguments and arguments[0] in COMMANDS:
        return run_command(arguments[0], arguments[1:])
    return _guarded("tfnas", lambda: _without_command(arguments))


def search_main() -> int:
    """`tfnas-search` is `tfnas search`."""
    return run_command("search", sys.argv[1:])


def run_command(command: str, arguments: Sequence[str]) -> int:
    """Run one subcommand, turning input errors into one message and exit code 2, failures of the machine into 1.

    A module of this package has either `run(arguments) -> int` or a function of the command's name, whose parameters
    become options.
    """
    wait_briefly()
    return _guarded(f"tfnas {command}", lambda: _call(command, list(arguments)))


def _call(command: str, arguments: list[str]) -> int:
    for argument in arguments:
        if not is_text(argument):
            # neither a stored configuration nor the reader of weights can hold such a name: not after hours of work
            raise ValueError(
                f"{shown(argument)}: expected text in the encoding of file names here ({sys.getfilesystemencoding()}), "
                "got other bytes; rename the file or folder, reach it by a link, or take a locale with UTF-8"
            )
    module = importlib.import_module(f"tfnas.cli.{command}")
    try:
        if hasattr(module, "run"):
            code: int = module.run(arguments)
            return code
        return run_function(f"tfnas {command}", getattr(module, command), arguments)
    except RunInterrupted as stopped:
        from tfnas.processes import is_first_process

        if is_first_process():
            _complain(f"tfnas {command}: {stopped}")
        return 128 + stopped.signal_number
    except RunFailed as error:
        _complain(f"tfnas {command}: error: {error}")
        return FAILED


def _without_command(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_USAGE.format(commands="\n".join(f"  {name:<8} {text}" for name, text in COMMANDS.items())), end="")
        return OK if arguments else BAD_INPUT
    if arguments[0] == "--version":
        from tfnas.versions import software_versions

        print(f"tfnas {software_versions()['tfnas']}")
        return OK
    near = difflib.get_close_matches(arguments[0], COMMANDS, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"commands: {', '.join(COMMANDS)}"
    raise ValueError(f"no command {arguments[0]!r}; {hint}")


def _guarded(name: str, call: Callable[[], int]) -> int:
    """The exit code of `call`, whatever it raises and whatever state the standard streams are in."""
    for stream_name in ("stdout", "stderr"):
        if getattr(sys, stream_name) is None:  # closed by the caller (`>&-`)
            setattr(sys, stream_name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
        stream = getattr(sys, stream_name)
        if isinstance(stream, io.TextIOWrapper):
            # a name that the locale's encoding lacks must not end a command or its progress
            stream.reconfigure(errors="backslashreplace")
    code = OK
    try:
        code = call()
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        _complain(f"{name}: interrupted")
        return INTERRUPTED
    except ProcessFailed as error:
        _complain(f"{name}: {error}")
        return FAILED
    except BrokenPipeError:
        # The reader (`| head`) has seen enough. A run goes on without it; what else a command did may have a code.
        _drop_output()
        return code
    except Exception as error:
        failed = is_out_of_memory(error) or is_disk_full(error) or is_timing_failure(error)
        if not failed and not isinstance(error, ValueError | LookupError | OSError | ArgumentError):
            raise
        if os.environ.get("TFNAS_DEBUG") == "1":
            raise
        what = "not enough memory: " if is_out_of_memory(error) else ""
        if is_disk_full(error):
            _drop_output()
        text = error.args[0] if isinstance(error, KeyError) and error.args else error
        _complain(f"{name}: error: {what}{text}")
        return FAILED if failed else BAD_INPUT


def _complain(text: str) -> None:
    with contextlib.suppress(OSError):  # where nobody can be told, the exit code still says it
        print(text, file=sys.stderr, flush=True)


def _drop_output() -> None:
    """Let nothing that standard output cannot take fail again at exit."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
