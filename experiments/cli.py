"""The command `diloco`: train, plan, report, export, sample, soup, pairs, route and doctor."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from experiments import entry
from experiments.entry import FINISHED, INTERRUPTED, Parser

ABOUT = "Train one model on islands of machines that seldom talk, and use what came out."
COMMANDS = {
    "train": "run an experiment: diloco train +experiment=quickstart islands=4; see diloco train --help",
    "plan": "what a configuration will send and wait for: diloco plan +experiment=quickstart --step-s 0.2 --link 1gbit",
    "report": "draw what came out of a run, of several side by side, or of a sweep, as one HTML page",
    "export": "write the trained model as a folder that transformers loads",
    "sample": "let the trained model write",
    "soup": "average models that were trained from one start, or measure the way between them",
    "pairs": "let a trained model answer prompts N times each, and keep the best and the worst as pairs to learn from",
    "route": "how well a run of several paths does when texts change path as they go on; fits a router for that",
    "chaos": "faults for a run that is going on, drawn from a seed, and a report of what they cost",
    "doctor": "what this machine or cluster can run, and what is missing",
}


def command() -> NoReturn:
    """What `diloco` runs."""
    entry.leave(main())


def main(argv: Sequence[str] | None = None) -> int:
    """Carry out one subcommand and return the exit status."""
    argv = sys.argv[1:] if argv is None else list(argv)
    if argv[:1] == ["train"]:
        return entry.main(argv[1:], program="diloco train")
    if argv[:1] == ["plan"]:
        from experiments import planning

        return planning.main(argv[1:])
    arguments = _parser().parse_args(argv)
    try:
        match arguments.command:
            case "report":
                return _report(arguments.runs, arguments.to)
            case "export":
                return _export(arguments.run, arguments.to)
            case "sample":
                return _sample(arguments)
            case "soup":
                from experiments import soups

                return soups.cook(arguments)
            case "pairs":
                from experiments import pairs

                return pairs.make(arguments)
            case "route":
                from experiments import routing

                return routing.route(arguments)
            case "chaos":
                from experiments import chaos

                return chaos.strike(arguments)
            case _:
                from experiments.doctor import examine

                return examine(quick=arguments.quick, gbits=arguments.link, rtt_s=arguments.rtt)
    except ValueError as error:
        return entry.tell(error)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED


def _parser() -> Parser:
    from experiments import chaos

    parser = Parser(prog="diloco", description=ABOUT, allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", title="commands")
    subparsers = {
        name: commands.add_parser(name, help=text, description=_about(text)) for name, text in COMMANDS.items()
    }
    subparsers["report"].add_argument(
        "runs", metavar="RUN", type=Path, nargs="+", help="directory of a run or a sweep, such as runs/latest"
    )
    subparsers["report"].add_argument(
        "--to",
        metavar="DIR",
        type=Path,
        help="folder for the page; default RUN/report, or a new one in runs/ for several",
    )
    for name in ("export", "sample", "route"):
        subparsers[name].add_argument("run", metavar="RUN", type=Path, help="directory of a run, such as runs/latest")
    subparsers["export"].add_argument("--to", metavar="DIR", type=Path, required=True, help="a new or empty folder")
    subparsers["sample"].add_argument("--prompt", required=True, help="the text to go on with; may be empty")
    subparsers["sample"].add_argument(
        "--tokens", metavar="N", type=_positive, default=100, help="at most so many; default 100"
    )
    subparsers["sample"].add_argument("--seed", metavar="N", type=int, default=0, help="another seed, another text")
    subparsers["sample"].add_argument(
        "--reroute-every",
        metavar="W",
        type=int,
        help="of a run of several paths: choose one anew for every W tokens, after diloco route RUN",
    )
    _add_route(subparsers["route"])
    _add_soup(subparsers["soup"])
    _add_pairs(subparsers["pairs"])
    _add_doctor(subparsers["doctor"])
    chaos.add_options(subparsers["chaos"])
    return parser


def _add_doctor(parser: argparse.ArgumentParser) -> None:
    from experiments import links, planning

    parser.add_argument("--quick", action="store_true", help="do not start Ray or ask its cluster")
    text = "between islands: 200mbit, 1gbit; default 1gbit where the round trip is known"
    parser.add_argument("--link", metavar="GBITS", type=planning.gbits, help=text)
    text = "round trip between islands, such as 80ms; default: measured between the nodes of a cluster (RAY_ADDRESS)"
    parser.add_argument("--rtt", metavar="TIME", type=links.seconds, help=text)


def _add_soup(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", metavar="RUN", type=Path, nargs="+", help="directories of runs from one start")
    parser.add_argument("--to", metavar="DIR", type=Path, required=True, help="a new or empty folder")
    parser.add_argument("--merge", choices=["mean", "slerp", "rda"], default="mean", help="default mean")
    parser.add_argument("--weights", metavar="W,...", type=_numbers, help="one a run; default: all the same")
    parser.add_argument("--greedy", action="store_true", help="only runs that make the soup no worse, the best first")
    parser.add_argument(
        "--eta", metavar="E", type=float, default=1.0, help="how far to go from the start to the soup; default 1"
    )
    text = "a run or an export that the way begins at; default: where the runs did"
    parser.add_argument("--start", metavar="PATH", type=Path, help=text)
    text = "measure N points of the way instead: from the first to the second of two runs, else from the start"
    parser.add_argument("--points", metavar="N", type=int, default=0, help=text)


def _add_pairs(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", type=Path, help="directory of a run of workload=online")
    parser.add_argument("--to", metavar="FILE", type=Path, required=True, help="a new .jsonl file")
    parser.add_argument("--judge", default="", help="default: the run's own")
    parser.add_argument("--completions", metavar="N", type=_positive, default=8, help="of each prompt; default 8")
    parser.add_argument("--prompts", metavar="N", type=_positive, default=1000, help="at most so many; default 1000")
    text = "keep this share of the pairs, those whose rewards are furthest apart; default 1"
    parser.add_argument("--keep", metavar="SHARE", type=float, default=1.0, help=text)
    parser.add_argument("--seed", metavar="N", type=int, default=0, help="another seed, other answers")


def _numbers(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text} is not a list of numbers, such as 0.7,0.3") from None


def _add_route(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--every", metavar="W,...", type=_lengths, default=[64, 32, 16], help="tokens in a window; default 64,32,16"
    )
    for name, letter, text in (
        ("look-ahead", "L", "tokens over which the router learns to tell the best path; default 64"),
        ("documents", "N", "that it learns from (1000): held out for it, then trained on; 0 = only the former"),
        ("steps", "N", "of its training; default 600"),
    ):
        parser.add_argument(f"--{name}", metavar=letter, type=int, help=text)
    parser.add_argument("--refit", action="store_true", help="fit it, though one with these settings was saved")
    parser.add_argument("--to", metavar="DIR", type=Path, help="folder for evaluation.json; default RUN/routing")


def _lengths(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text} is not a list of whole numbers, such as 64,32,16") from None


def _about(text: str) -> str:
    return text[0].upper() + text[1:] + "."


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive whole number")
    return int(text)


def _report(runs: Sequence[Path], folder: Path | None) -> int:
    from diloco.report import default_folder, write_report

    print(write_report(runs, folder or default_folder(runs)))
    return FINISHED


def _export(run: Path, folder: Path) -> int:
    from experiments.trained import export

    export(run, folder)
    print(folder)
    return FINISHED


def _sample(arguments: argparse.Namespace) -> int:
    from experiments.trained import trained

    run, prompt, tokens, seed = arguments.run, arguments.prompt, arguments.tokens, arguments.seed
    if (run / "export" / "paths.json").is_file():
        import dipaco

        print(dipaco.load(run).generate(prompt, tokens=tokens, seed=seed, every=arguments.reroute_every))
        return FINISHED
    if arguments.reroute_every is not None:
        raise ValueError(f"{run} has no export of several paths: leave out --reroute-every")
    found = trained(run)
    text = found.config.workload.sample(found.model, found.corpus, prompt, tokens=tokens, seed=seed)
    if not text:
        raise ValueError(f"{run}: its workload writes no text")
    print(text)
    return FINISHED


if __name__ == "__main__":
    command()
