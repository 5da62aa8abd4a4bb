"""The one exception for problems that a user can fix, and what command-line programs do with it."""

import difflib
import functools
import re
import sys
import warnings
from collections.abc import Callable, Iterable, Sequence

EXIT_FAILED = 1
EXIT_BAD_INPUT = 2
EXIT_INTERRUPTED = 130  # by Ctrl-C, as shells give it
EXIT_REQUEUE = 75  # a requested stop that wants to go on later (EX_TEMPFAIL); the Slurm script requeues on it

_URL_PASSWORD = re.compile(r"(?<=://)[^/\s]*@")
TRUST_HELP = "run Python code that the folder brings along (read it before)"


class InputError(ValueError):
    """Bad input: what is wrong, with the value and the place, then what to set instead.

    ``place: what is wrong (value) -> what to do``, where place is ``file:line``, a config key or a group id.
    """


class InputErrors(InputError):
    """Several problems found in one pass, reported together: all, or the first ``shown`` (a wrong folder has one for
    each of its tensors)."""

    def __init__(self, heading: str, problems: Sequence[str], shown: int | None = None):
        self.heading, self.problems, self.shown = heading, list(problems), shown
        lines = self.problems if shown is None or len(problems) <= shown + 1 else self.problems[:shown]
        more = [f"and {len(problems) - len(lines)} more"] if len(lines) < len(problems) else []
        super().__init__(f"{heading} ({len(problems)}):\n" + "\n".join(f"  - {p}" for p in [*lines, *more]))

    def __reduce__(self) -> tuple:  # it can come from another process
        return type(self), (self.heading, self.problems, self.shown)


def refuse(heading: str, problems: Iterable[str], shown: int | None = None) -> None:
    """Raise :class:`InputErrors` of the problems, if there are any."""
    if problems := list(problems):
        raise InputErrors(heading, problems, shown)


def shown(text: str, secrets: Iterable[str] = ()) -> str:
    """Text of others for a terminal: control characters are spelled, ``secrets`` and passwords in urls starred out."""
    for secret in sorted(secrets, key=len, reverse=True):
        text = text.replace(secret, "***")
    text = _URL_PASSWORD.sub("***@", text)
    return "".join(c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode("ascii") for c in text)


# Keys of a run, and what Megatron-LM and transformers call them.
ELSEWHERE = """data.max_tokens_per_pack micro_batch_size per_device_train_batch_size seq_length max_length /
logging.every log_interval logging_steps / data.groups_per_step global_batch_size batch_size
gradient_accumulation_steps / train.epochs num_train_epochs / checkpoint.save_every save_interval save_steps /
train.validate_every eval_interval eval_steps / parallel.tp tensor_model_parallel_size / train.max_steps train_iters
steps / checkpoint.init_from load model_name_or_path / parallel.pp pipeline_model_parallel_size / optimizer.lr
learning_rate / optimizer.distributed use_distributed_optimizer / model.precision bf16 fp16 torch_dtype /
train.output save output_dir / model.recompute recompute_granularity gradient_checkpointing"""
KEY_OF = {name: key for key, *names in map(str.split, ELSEWHERE.split("/")) for name in names}


def nearest(name: str, known: Iterable[str], cutoff: float = 0.6) -> str | None:
    """The known name most like a misspelt one ("did you mean ..."), None where none is alike (0 to 1: ``cutoff``)."""
    return next(iter(difflib.get_close_matches(name, known, 1, cutoff)), None)


def command(main: Callable[..., int | None]) -> Callable[..., int]:
    """Turn a tool's ``main(argv=None)`` into one that returns 2 with one message on :class:`InputError`, and when the
    system refuses a file that it names.

    Ctrl-C gives a line and 130; every tool may be run again then, and goes on where it keeps finished work.

    Other exceptions are our bugs and keep their traceback. Warnings of Megatron-Core and torch are left out: they speak
    to us ("Apex is not installed"), not to the user of a tool.
    """

    @functools.wraps(main)
    def run(*args, **kwargs) -> int:
        warnings.filterwarnings("ignore", module=r"(megatron|torch|megatron_gft\.cpu)(\..*)?$")
        try:
            return main(*args, **kwargs) or 0
        except InputError as error:
            print(f"error: {shown(str(error))}", file=sys.stderr, flush=True)
            return EXIT_BAD_INPUT
        except OSError as error:  # of a file: no permission, a folder in its place, a loop of links, a full disk
            if error.filename is None:
                raise
            print(f"error: {error.filename}: {error.strerror} -> see to this file", file=sys.stderr, flush=True)
            return EXIT_BAD_INPUT
        except KeyboardInterrupt:
            print("interrupted -> run the same command again to go on", file=sys.stderr, flush=True)
            return EXIT_INTERRUPTED

    return run
