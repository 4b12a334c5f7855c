"""Drawn attempts to make homer_triton give a wrong result, break off or lose something.

Five kinds: `trees` against the oracle, `answers` side by side against the same alone, damaged
`files`, `commands` with drawn arguments, and `kills` at drawn moments. Every attempt follows from
its kind and its seed; `python -m fuzz` runs them (`make fuzz`), tests/test_fuzz.py a short part.
"""

import os

# Before torch and the hub's client are imported: one thread, and nothing is looked for elsewhere.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
