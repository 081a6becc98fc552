"""`python -m codesign.engine.parallel.worker REPORT_FD JOB`: a rank in a new interpreter, started by rank 0 only."""

import json
import sys

from codesign.engine.build import serve_rank
from codesign.engine.parallel.processes import be_rank

if __name__ == "__main__":
    be_rank(json.loads(sys.argv[2]), int(sys.argv[1]), serve_rank)
