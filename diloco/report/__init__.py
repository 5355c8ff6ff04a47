"""What runs came to, as a page to look at: `write_report(runs, to)`. Needs neither torch nor Ray."""

from diloco.report.page import write_report as write_report
from diloco.report.runs import default_folder as default_folder
