"""Training language models on islands of workers that are far apart, unequal and unreliable."""

from diloco.config import RunConfig as RunConfig
from diloco.train import Result as Result
from diloco.train import train as train
