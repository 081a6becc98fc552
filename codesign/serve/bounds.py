"""How much one client may ask for. Everything that a request can make large has a bound here.

What has no bound elsewhere became advisories: `n` (CVE-2026-34756), lists of prompts (CVE-2026-73559), tensors
(CVE-2025-62164), template arguments (CVE-2025-62426).
"""

from codesign.units import KIB, MIB

BODY_BYTES = MIB
DISCARDED_BYTES = 8 * MIB  # read and forgotten of a body that is refused, so that the client can read why
BODY_S = 30.0  # to send a body; a client that trickles gives its connection back
CHOICES = 8  # n
PROMPTS = 64  # of one request
SEQUENCES = 256  # n times prompts
PROMPT_TOKENS = 2**20  # of one prompt in the schema; the model's own limit is checked with the model at hand
MESSAGES = 1024
STOPS = 16
STOP_CHARS = 256
TOP_LOGPROBS = 20
USER_CHARS = 512

WAITING = 256  # sequences beyond those that the engine has slots for; more are answered 429
RETRY_AFTER_S = 1
CONNECTIONS = 768  # open at once, below the usual 1024 files of a process; more are answered 503 by uvicorn

TEMPLATE_BYTES = MIB  # of a chat template's source
TEMPLATE_S = 1.0
TEMPLATE_MEMORY_BYTES = 256 * MIB
TEMPLATE_OUTPUT_BYTES = MIB
KEY_BYTES = 4 * KIB

DRAIN_S = 30.0  # for running requests after SIGTERM
