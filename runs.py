"""
Show, compare and remove runs.

    python runs.py list                          all runs, the newest last
    python runs.py list --sort test.f1 -n 10     the ten best by a result
    python runs.py show latest                   config, results, environment and folders of a run
    python runs.py compare 3 5                   what differs between two runs, or more, side by side
    python runs.py weights best                  path of a run's best weights
    python runs.py delete NAME                   removes log, weights and row, after asking
    python runs.py rebuild                       rewrites experiments.csv from the journals

A run is named by its name or a part of it, by the number of its row, or as latest or best. --json gives data
for scripts. To resume a run, to repeat it, or to predict with it: see train.py and run_prediction.py.
"""

import argparse
import os
import sys

from dida_core.errors import exit_code
from dida_core.runs import commands

from dida_tools.config.config import global_config


def main() -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--logfile", default="experiments.csv", help="the tracker's file (default: experiments.csv)"
    )
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    name = argparse.ArgumentParser(add_help=False)
    name.add_argument("name", metavar="NAME")
    names = argparse.ArgumentParser(add_help=False)
    names.add_argument("names", nargs="+", metavar="NAME")
    data = argparse.ArgumentParser(add_help=False)
    data.add_argument("--json", action="store_true", help="as JSON, with all columns")

    one = subparsers.add_parser("list", help="all runs in a table", parents=[data])
    one.add_argument("--sort", metavar="COLUMN", help="the best last: by MONITOR's direction for results")
    one.add_argument("-n", type=int, metavar="NUMBER", help="only the last ones")
    one.add_argument("--columns", metavar="A,B", help="further columns, such as OPTIMIZER_CONFIG.lr,test.iou")
    one.set_defaults(call=commands.list_runs)

    one = subparsers.add_parser("show", help="all about a run", parents=[name, data])
    one.set_defaults(call=commands.show_run)

    one = subparsers.add_parser("compare", help="what differs between runs", parents=[names, data])
    one.add_argument("--all", action="store_true", help="what is the same, too")
    one.set_defaults(call=commands.compare_runs)

    one = subparsers.add_parser("weights", help="path of a run's weights", parents=[name])
    one.add_argument("--last", action="store_true", help="of the newest checkpoint, not the best weights")
    one.set_defaults(call=commands.show_weights)

    one = subparsers.add_parser("delete", help="removes runs, given by their full names", parents=[names])
    one.add_argument("--yes", action="store_true", help="do not ask")
    one.set_defaults(call=commands.delete_runs)

    one = subparsers.add_parser("rebuild", help="rewrites the tracker's file from the journals")
    one.set_defaults(call=commands.rebuild)

    arguments = parser.parse_args()
    try:
        code = arguments.call(commands.Runs(global_config, arguments.logfile), arguments)
        sys.stdout.flush()
        return code or 0
    except BrokenPipeError:  # whoever read it has seen enough, such as head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


if __name__ == "__main__":
    sys.exit(exit_code(main))
