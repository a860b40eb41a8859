"""llara_dist: distributed tuning of large language models as sequential recommenders (LLaRA, SIGIR'24).

Importing the package is instant: no torch, no polars, no device query. Import the room you need.
"""

__version__ = "0.1.0"
