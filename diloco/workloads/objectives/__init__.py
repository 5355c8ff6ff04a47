"""Losses that learn from preferences, by name: what a workload on pairs of completions chooses from.

`OBJECTIVES[name](...)(PairLogps(...))` gives a loss for each pair; `KTO` is for completions without a partner.
"""

from diloco.workloads.objectives.anchored import AOT, BCO, NCA, SPPO, AOTUnpaired, APODown, APOZero
from diloco.workloads.objectives.base import Objective, PairLogps, implied_rewards
from diloco.workloads.objectives.differences import CDPO, DPO, EXO, IPO, DiscoPOP, RobustDPO, SLiC
from diloco.workloads.objectives.reference_free import CPO, ORPO, NllBy, SimPO
from diloco.workloads.objectives.unpaired import KTO, UnpairedLogps, kl_estimate

__all__ = [
    "AOT",
    "AOTUnpaired",
    "APODown",
    "APOZero",
    "BCO",
    "CDPO",
    "CPO",
    "DPO",
    "DiscoPOP",
    "EXO",
    "IPO",
    "KTO",
    "NCA",
    "NllBy",
    "OBJECTIVES",
    "ORPO",
    "Objective",
    "PairLogps",
    "RobustDPO",
    "SLiC",
    "SPPO",
    "SimPO",
    "UnpairedLogps",
    "implied_rewards",
    "kl_estimate",
]

OBJECTIVES: dict[str, type[Objective]] = {
    "dpo": DPO,
    "ipo": IPO,
    "slic": SLiC,
    "cdpo": CDPO,
    "robust_dpo": RobustDPO,
    "bco": BCO,
    "nca": NCA,
    "exo": EXO,
    "sppo": SPPO,
    "discopop": DiscoPOP,
    "simpo": SimPO,
    "cpo": CPO,
    "orpo": ORPO,
    "apo_zero": APOZero,
    "apo_down": APODown,
    "aot": AOT,
    "aot_unpaired": AOTUnpaired,
}
