"""Exit code 0 where the server beside it answers and its models run, 1 otherwise."""

import os
import sys
import urllib.request

try:
    with urllib.request.urlopen(f"http://127.0.0.1:{os.environ.get('PORT', '8000')}/health", timeout=4) as answer:
        print(answer.read().decode())
except OSError as error:
    print(error, file=sys.stderr)
    sys.exit(1)
