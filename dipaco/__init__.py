"""DiPaCo: paths through shared modules, each trained on its own documents. Importing it registers its parts by name."""

from dipaco import config as config
