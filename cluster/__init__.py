"""Where it runs: the store, the Ray cluster, the hardware."""

import os
import sys

# Ray reads this once, when it is imported; who imported it earlier has chosen already. With it, every cluster asks
# for its token: the embedded one gets a token of its own (see session.py), another's is given to Ray by the user.
if "ray" not in sys.modules:
    os.environ.setdefault("RAY_AUTH_MODE", "token")
