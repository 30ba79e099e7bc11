"""The `mmrep` command. Nothing heavy is imported before the subcommand is known, so that help answers at once."""

from __future__ import annotations

import importlib
import os
import sys

from mmrep.errors import ConfigError, MmrepError, did_you_mean
from mmrep.printing import printable

HELP = """\
mmrep: contrastive representations of any number of modalities

usage: mmrep COMMAND ...

train (a YAML file says what; see configs/)
  fit       --config FILE [--any.key value] [--name RUN] [--overwrite | --resume auto]
  fit       --model.help SwAV         the settings of an objective: also PairwiseCLIP, Symile, ModalityPairwise, HigherOrder
  validate  --config FILE --ckpt_path CKPT
  test      --config FILE --ckpt_path CKPT
  predict   --config FILE --ckpt_path CKPT

data
  data index DIR --modality image=jpg,png --modality text=txt [--group-key K] [--label-key K] [--out DIR]
  data index 'DIR/train-{000..099}.tar' ...                             or by a pattern, also a URL
  data index DIR [--exclude QUARANTINE.csv]                             anew: keeps modalities, splits, labels
  data check DIR                                                        verify every shard against its index
  data stats DIR [--html FILE]                                          a table; a page with samples of each split

evaluate
  eval retrieval --checkpoint RUN --data SHARDS [--split S] [--out FILE.json] [--picture FILE.png]
  eval probe --checkpoint RUN --data SHARDS --modality image --label NAME [--method ridge|sgd|knn] [--out FILE.json]
  eval classification --checkpoint RUN --data SHARDS [--label NAME] [--templates FILE | --language de] [--out FILE.json]
  eval report --checkpoint RUN --data SHARDS --out FILE.html            one page: tables, curves, examples

search
  embed --checkpoint RUN --data SHARDS --out DIR                        also by torchrun, srun, arrays; --engine ray
  search --index DIR [--text "..."] [--image FILE] [--audio FILE] [-k 10] [--html FILE]

share
  export --checkpoint RUN --out DIR [--format mmrep|open_clip] [--push-to-hub ORG/NAME]

  --help after a command says more; --debug shows the traceback of an error; --version
"""

COMMANDS = {
    "fit": "mmrep.cli.train",
    "validate": "mmrep.cli.train",
    "test": "mmrep.cli.train",
    "predict": "mmrep.cli.train",
    "data": "mmrep.cli.data",
    "eval": "mmrep.cli.evaluate",
    "embed": "mmrep.cli.embed",
    "search": "mmrep.cli.search",
    "export": "mmrep.cli.export",
}


def main(argv: list[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: Words after ``mmrep``; those of the process by default.

    Returns:
        The exit code: 0, or 2 after an error that the user can mend, which is printed in one line.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments
    arguments = [argument for argument in arguments if argument != "--debug"]
    try:
        return _dispatch(arguments)
    except MmrepError as error:
        if debug:
            raise
        print(f"mmrep: error: {printable(error)}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # the reader of our output, `head` say, has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        if debug or error.errno is None or isinstance(error, ConnectionError):  # not of a file: no permission, no room
            raise
        place = f" [{printable(error.filename)}]" if error.filename is not None else ""
        print(f"mmrep: error: cannot be read or written ({error.strerror}){place}", file=sys.stderr)
        return 2


def _dispatch(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help"):
        print(HELP, end="")
        return 0
    if arguments[0] == "--version":
        from mmrep import __version__

        print(f"mmrep {__version__}")
        return 0
    if arguments[0] not in COMMANDS:
        raise ConfigError(f"no command '{arguments[0]}'", fix=did_you_mean(arguments[0], COMMANDS))
    code: int = importlib.import_module(COMMANDS[arguments[0]]).run(arguments)
    return code
