"""The text of `diloco train --help`: the keys, the choices and the experiments that there are now."""

from __future__ import annotations

from dataclasses import fields
from importlib.resources import files

from diloco import config as configuration
from diloco.config import RunConfig
from experiments.composition import CONFIGS, Request, experiments

USAGE = """\
usage: {program} [+experiment=NAME] [key=value ...] [flags]

Trains one run, or with -m one for each combination of values (key=1,2). The run's directory is
runs/<date>_<time>_<name>/, and runs/latest points at the newest run or sweep.

examples
  {program} +experiment=quickstart
  {program} +experiment=quickstart islands=4 inner.lr=0.002
  {program} -m +experiment=quickstart islands=2,4 inner_steps=10,50
  {program} resume=runs/latest rounds=50
  {program} --import my_package.my_parts codec=mine

flags (anywhere among the overrides)
  -m, --multirun     a sweep: key=1,2 or key=range(1,5); its runs and sweep.csv go to one directory
  --import MODULE    import a module with parts of your own first; may be repeated
  --config-dir DIR   a folder with experiment/NAME.yaml files of your own
  --restarts N       when the run's process is killed, start it again and go on with the run, up to N times
  -c, --cfg job      print the configuration instead of running it
  -p, --package KEY  ... only what is below this key
  --resolve          ... with interpolations replaced
  -h, --help         this text

exit status
  0 finished; 2 a mistake in the configuration or input; 3 the run stopped by its own rule;
  130 interrupted, after writing a checkpoint that resume=RUN goes on from
"""


def usage(program: str, request: Request) -> str:
    """All of it."""
    parts = [
        USAGE.format(program=program),
        "experiments",
        *_described(experiments(request.config_dir)),
        "\ngroups, the defaults in brackets: choose a part, then set its keys (codec=bfloat16, outer.lr=0.5)",
        *_groups(),
        "\nsettings of each part: --cfg job --package inner",
        "\nkeys",
        *_keys(),
    ]
    return "\n".join(parts)


def _described(names: list[str]) -> list[str]:
    """Each name with the comment at the top of its file, where it is a shipped one."""
    lines = []
    for name in names:
        file = files(CONFIGS) / "experiment" / f"{name}.yaml"
        text = file.read_text() if file.is_file() else ""
        about = [line[2:] for line in text.splitlines() if line.startswith("# ") and "@package" not in line]
        lines.append(f"  {name:18} {' '.join(about)}".rstrip())
    return lines


def _groups() -> list[str]:
    lines = []
    default = RunConfig()
    for key, group in configuration.GROUPS.items():
        address = key if key == group else f"{group}@{key}"
        chosen = configuration.choice_of(key, vars(default)[key])
        names = [f"[{name}]" if name == chosen else name for name in configuration.choices(group)]
        lines.append(f"  {address + '=':18} {' | '.join(names)}")
    single = ", ".join(f"{key}.*" for key in configuration.SINGLE)
    return [*lines, f"  without a choice:  {single}"]


def _keys() -> list[str]:
    plain = vars(RunConfig())
    names = [f.name for f in fields(RunConfig) if f.name not in (*configuration.GROUPS, *configuration.SINGLE)]
    return [f"  {name + '=':18} {plain[name]}".rstrip() for name in names]
