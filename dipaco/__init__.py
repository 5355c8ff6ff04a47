"""DiPaCo (arXiv:2403.10616): paths through shared modules, each trained on the data that a router sends it."""

from dipaco import config as config
from dipaco.loaded import Loaded as Loaded
from dipaco.loaded import load as load
