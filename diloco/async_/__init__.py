"""Asynchronous DiLoCo: parts for islands that hand in as they finish. Importing it registers them by name."""

from diloco.async_ import config as config
