"""Population methods, one module each.

To add a method, write a module and register its rule in RULES. Modules of this package import torch
only inside functions, because command-line help and validation read the rules' options.
"""

from dist_graft.grafting.rules.average import Average
from dist_graft.grafting.rules.base import Interval, RoundSchedule, Rule
from dist_graft.grafting.rules.diloco import Diloco
from dist_graft.grafting.rules.graft import Graft
from dist_graft.grafting.rules.papa import Papa
from dist_graft.grafting.rules.wash import Wash

RULES: dict[str, type[Rule]] = {
    "graft": Graft,
    "average": Average,
    "papa": Papa,
    "wash": Wash,
    "diloco": Diloco,
}
"""Rule of each method, by the name that --method takes."""

__all__ = [
    "RULES",
    "Average",
    "Diloco",
    "Graft",
    "Interval",
    "Papa",
    "RoundSchedule",
    "Rule",
    "Wash",
]
